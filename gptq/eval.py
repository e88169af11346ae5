"""Evaluates FP16 and compressed models in the lm-evaluation-harness, with the harness's own
options.

    python gptq/eval.py --model hf --model_args pretrained=MODEL,dtype=float16 --tasks arc_easy
    python gptq/eval.py --model hf --model_args pretrained=MODEL --tasks arc_easy \\
        --marlin_checkpoint DIR

Every option but --marlin_checkpoint is the harness's (--help lists them). With it, the weights, and
the tokenizer unless --model_args names one, come from the checkpoint in DIR; `pretrained` then only
says what was compressed. Depends on lm_eval 0.4 and marlin.integrations.lm_eval.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

ROOT = str(pathlib.Path(__file__).resolve().parents[1])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)


def rewrite(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """Turns our option into the harness's.

    Args:
        argv: the command line without the program's name.

    Returns:
        The command line for the harness, and the checkpoint's folder or None.
    """
    parser = argparse.ArgumentParser(prog="gptq/eval.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--marlin_checkpoint", metavar="DIR")
    ours, rest = parser.parse_known_args(argv)
    if ours.marlin_checkpoint is None:
        return rest, None
    parser.add_argument("--model", "-M", default="hf")
    parser.add_argument("--model_args", "-a", nargs="*", default=[])
    model, rest = parser.parse_known_args(rest)
    if model.model != "hf":
        parser.error(f"--model is {model.model} but should be hf when --marlin_checkpoint is given")
    pairs = [pair for text in model.model_args for pair in text.split(",") if pair]
    kept = [pair for pair in pairs if not pair.startswith("pretrained=")]
    arguments = ",".join([f"pretrained={ours.marlin_checkpoint}", *kept])
    return ["--model", "marlin", "--model_args", arguments, *rest], ours.marlin_checkpoint


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; a checkpoint that cannot be read is one sentence and exit status 1."""
    argv = sys.argv[1:] if argv is None else list(argv)
    rest, directory = rewrite(argv)
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        print(
            "gptq: eval.py needs the package lm_eval (pip install lm_eval==0.4.13)", file=sys.stderr
        )
        return 1
    from marlin.checkpoint import CheckpointError

    if directory is not None:
        import marlin.integrations.lm_eval  # noqa: F401  # registers "marlin"
    sys.argv = [
        "gptq/eval.py",
        *(rest if rest[:1] in (["run"], ["ls"], ["validate"]) else ["run", *rest]),
    ]
    try:
        cli_evaluate()
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
