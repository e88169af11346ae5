"""Tables of what is read, written and run where, made by asking the code that decides it.

    python docs/tables.py           puts them into README.md and docs/checkpoints.md

A table stands between `<!-- table NAME -->` and `<!-- end -->`. tests/test_tables.py fails if one
is not what this file makes. Depends on marlin, built; nothing is launched and no GPU is needed.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

import marlin
from marlin import support
from marlin.checkpoint import CheckpointError, Record, write
from marlin.checkpoint.config import FORMATS, Fields, Spec, parse
from marlin.checkpoint.model import CODECS
from marlin.checkpoint.record import plain_order

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ("README.md", "docs/checkpoints.md")
K, N, GROUP = 64, 64, 32  # of the layers that are asked about

# What config files call the variants of a format; which of them are read is asked.
VARIANTS = {
    "marlin": ("checkpoint_format", ("marlin", "marlin_24")),
    "gptq": ("checkpoint_format", ("gptq", "gptq_v2", "gptq_p", "bitblas")),
    "awq": ("version", ("gemm", "gemv", "gemv_fast", "llm-awq")),
    "compressed-tensors": (
        "format",
        ("pack-quantized", "marlin-24", "int-quantized", "float-quantized", "nvfp4-pack-quantized"),
    ),
}


def yes(found: object) -> str:
    """How a table says whether."""
    return "yes" if found else "no"


def table(heading: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [heading, ("---",) * len(heading), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --------------------------------------------------------------------------------------------------
# What is read
# --------------------------------------------------------------------------------------------------


def config(form: str, bits: int = 4, symmetric: bool = True, act_order: bool = False) -> Any:
    """A quantisation config of a format, as its own writers make it."""
    if form != "compressed-tensors":
        values = {"quant_method": form, "bits": bits, "group_size": GROUP, "desc_act": act_order}
        return values | ({"zero_point": not symmetric} if form == "awq" else {"sym": symmetric})
    weights: dict[str, Any] = {"num_bits": bits, "strategy": "group", "group_size": GROUP}
    weights |= {"symmetric": symmetric, "actorder": "group" if act_order else None}
    return {
        "quant_method": form,
        "config_groups": {"a": {"targets": ["Linear"]} | {"weights": weights}},
    }


def spec(values: dict[str, Any]) -> Spec | None:
    """How the reader takes a layer to be stored; None if it refuses the config."""
    try:
        return parse(Fields(pathlib.Path("config.json"), values)).spec("layer")
    except CheckpointError:
        return None


def read_table() -> str:
    """What each reader takes."""
    rows = []
    for form in CODECS:
        key, variants = VARIANTS[form]
        taken = [name for name in variants if spec(config(form) | {key: name})]
        zeros, ordered = spec(config(form, symmetric=False)), spec(config(form, act_order=True))
        bits = [str(b) for b in (2, 3, 4, 5, 6, 8) if spec(config(form, bits=b))]
        rows.append(
            (
                form,
                ", ".join(taken),
                ", ".join(sorted(set(variants) - set(taken), key=variants.index)) or "-",
                ", ".join(bits),
                yes(zeros and not zeros.symmetric),
                yes(ordered and ordered.act_order),
            )
        )
    return table(("read", "variants", "refused", "bits", "zero points", "act-order"), rows)


# --------------------------------------------------------------------------------------------------
# What is written
# --------------------------------------------------------------------------------------------------


def record(k: int = K, n: int = N, zeros: str = "", act_order: bool = False) -> Record:
    """A layer that is to be written; zeros is "", "integer" or "float"."""
    groups = -(-k // GROUP)
    z = torch.full((n, groups), 3, dtype=torch.uint8)
    return Record(
        torch.zeros(n, k, dtype=torch.uint8),
        torch.ones(n, groups, dtype=torch.half),
        {"": None, "integer": z, "float": z.half() + 0.5}[zeros],
        plain_order(k, GROUP, "cpu").flip(0) if act_order else None,
        None,
        GROUP,
    )


def written(form: str, layer: Record) -> bool:
    """Whether a format holds a layer."""
    try:
        write.tensors_of(form, "layer", layer, layer.zeros is None)
    except CheckpointError:
        return False
    return True


def write_table() -> str:
    """What each writer takes."""
    rows = []
    for form in FORMATS:
        if form not in write.WRITTEN:
            rows.append((form, *(["no"] * 5)))
            continue
        layers = (
            record(),
            record(zeros="integer"),
            record(zeros="float"),
            record(act_order=True),
            record(K + 3, N + 3),
        )
        rows.append((form, *(yes(written(form, layer)) for layer in layers)))
    heading = ("written", "symmetric", "zero points 0..15", "zero points between", "act-order")
    return table((*heading, "any sizes"), rows)


# --------------------------------------------------------------------------------------------------
# What runs where
# --------------------------------------------------------------------------------------------------


def run_table() -> str:
    """What can_run says of a machine whose build, driver and GPU are as they should be."""
    with mock.patch.object(support, "_wrong_gpu", lambda device: ""):
        return table(
            ("device", "processors", "scales", "groups", "zero points", "act-order"),
            [_runs("cpu", "any"), _runs("cuda", capability(support.MIN_CAPABILITY))],
        )


def capability(oldest: tuple[int, int]) -> str:
    """The GPUs that are new enough."""
    return f"compute capability {oldest[0]}.{oldest[1]} and above"


def _runs(device: str, processors: str) -> tuple[str, ...]:
    def ask(**options: Any) -> bool:
        return bool(
            marlin.can_run(**({"infeatures": 3840, "outfeatures": N} | options), device=device)
        )

    dtypes = {"FP16": torch.float16, "BF16": torch.bfloat16, "FP32": torch.float32}
    multiples = range(16, 3841, 16)
    groups = [str(group) for group in multiples if group != 3840 and ask(groupsize=group)]
    shown = "any multiple of 16" if len(groups) == len(multiples) - 1 else ", ".join(groups)
    one = ["one"] if ask(groupsize=-1) else []
    return (
        device,
        processors,
        ", ".join(name for name, dtype in dtypes.items() if ask(dtype=dtype)),
        ", ".join([*one, shown]),
        yes(ask(zero_points=True)),
        yes(ask(act_order=True)),
    )


# --------------------------------------------------------------------------------------------------
# Into the pages
# --------------------------------------------------------------------------------------------------

TABLES: dict[str, Callable[[], str]] = {"read": read_table, "write": write_table, "run": run_table}


def filled(text: str) -> str:
    """A page with its tables made anew.

    Raises:
        KeyError: a table that is not known.
    """

    def made(match: re.Match[str]) -> str:
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", made, text, flags=re.DOTALL)


def main() -> None:
    """Writes the pages."""
    for page in PAGES:
        path = ROOT / page
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
