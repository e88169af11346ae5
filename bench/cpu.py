"""Speed of `marlin.linear` on a CPU against what torch has there: `bench/results/cpu/<cpu>.json`.

Three contenders and what options cost, one process, the same threads, called in turn so that a
busy machine hurts all alike. Each is called twice and timed the second time: what fits into the
last-level cache is there. A figure is the median; `min` is the least, which on a busy machine says
more.

* `float16`, `bfloat16`, `float32`: `marlin.linear` with activations of that dtype.
* `zeros`, `act_order`: `float16` with zero points, with permuted columns; `all`: bfloat16 with
  both, bfloat16 scales and a bias.
* `int4`: torch's own 4-bit product, `_weight_int4pack_mm_for_cpu`, in bfloat16, its fast dtype.
* `linear`: `nn.Linear` in float32, the fastest dense product of most CPUs.

    python bench/cpu.py                     # 4096x4096, group 128: about two minutes on two cores
    python bench/cpu.py --shapes 2048x5632 --M 1,32 --threads 4 --isa avx2

Depends on torch and the built package.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

import marlin  # noqa: E402
from marlin import layout  # noqa: E402

log = logging.getLogger("bench")

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
MIN_CALLS = 7
MAX_CALLS = 300
# Norm-wise, of the timed call: output rounding is 2.8e-4 in float16 and 2.3e-3 in bfloat16.
TOLERANCE = {"float16": 5e-4, "bfloat16": 4e-3, "float32": 2e-6}
OPTIONS = ("zeros", "act_order", "all")


def cpu_model() -> str:
    """Return the name of the processor, as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def time_in_turn(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Call each in turn until the time is up.

    Args:
        calls: what to time, by name.
        seconds: for all together; at least MIN_CALLS rounds are made, at most MAX_CALLS.

    Returns:
        The times of each, in milliseconds; the first round, which warms up, is left out.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    for i in range(MAX_CALLS):
        if i >= MIN_CALLS and time.perf_counter() > end:
            break
        for name, call in calls.items():
            call()
            begin = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - begin) * 1e3)
    return times


def measure(K: int, N: int, group: int, tokens: list[int], seconds: float) -> list[dict[str, Any]]:
    """Measure one shape.

    Args:
        K: input features, a multiple of 32 and of the group.
        N: output features, a multiple of 64.
        group: rows that share a scale.
        tokens: the numbers of tokens M.
        seconds: to spend on each M.

    Returns:
        A row of the result file for each M: medians in milliseconds, marlin's errors.

    Raises:
        RuntimeError: a timed product was wrong.
    """
    q = torch.randint(0, 16, (K, N), dtype=torch.uint8)
    scales = ((torch.rand(K // group, N) + 0.5) * 0.01).half()
    B, s = layout.pack_weights(q), layout.permute_scales(scales)
    z = torch.randint(0, 16, s.shape).half()
    perm = torch.randperm(K).int()
    s_bf16, z_bf16, bias = s.bfloat16(), z.bfloat16(), torch.randn(N).bfloat16()
    W = (q.float() - 8) * scales.float().repeat_interleave(group, dim=0)
    dense = torch.nn.Linear(K, N, bias=False)
    dense.weight.data.copy_(W.t())
    int4 = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.t().contiguous().int(), 2)
    int4_scales = torch.stack(
        [scales, torch.zeros_like(scales)], dim=-1
    ).bfloat16()  # and zero points

    rows = []
    for M in tokens:
        x = torch.randn(M, K)
        by_dtype = {name: x.to(dtype) for name, dtype in DTYPES.items()}
        half = by_dtype["bfloat16"]
        calls: dict[str, Callable[[], Any]] = {
            "linear": lambda x=x: dense(x),  # type: ignore[misc]
            "int4": lambda x=half: torch.ops.aten._weight_int4pack_mm_for_cpu(
                x, int4, group, int4_scales
            ),
        }
        for name, a in by_dtype.items():
            calls[name] = lambda a=a: marlin.linear(a, B, s)  # type: ignore[misc]
        x16 = by_dtype["float16"]
        calls["zeros"] = lambda x=x16: marlin.linear(x, B, s, z=z)  # type: ignore[misc]
        calls["act_order"] = lambda x=x16: marlin.linear(x, B, s, perm=perm)  # type: ignore[misc]
        calls["all"] = lambda x=half: marlin.linear(  # type: ignore[misc]
            x, B, s_bf16, bias, z=z_bf16, perm=perm
        )
        times = time_in_turn(calls, seconds)
        row: dict[str, Any] = {
            "K": K,
            "N": N,
            "M": M,
            "group": group,
            "calls": len(times["linear"]),
        }
        row |= {name: round(statistics.median(values), 4) for name, values in times.items()}
        row["min"] = {name: round(min(values), 4) for name, values in times.items()}
        row["err"] = {}
        for name, a in by_dtype.items():
            expected = a.double() @ W.double()
            err = ((marlin.linear(a, B, s).double() - expected).norm() / expected.norm()).item()
            row["err"][name] = float(f"{err:.2e}")
            if not err < TOLERANCE[name]:
                raise RuntimeError(
                    f"bench: the product at M={M} in {name} is wrong: its error is {err:.1e}"
                )
        some = x16[:16]
        W_zeros = W + (8 - layout.unpermute_scales(z).float()).repeat_interleave(
            group, dim=0
        ) * scales.float().repeat_interleave(group, dim=0)
        for name, y, expected in (
            ("zeros", marlin.linear(some, B, s, z=z), some.double() @ W_zeros.double()),
            (
                "act_order",
                marlin.linear(some, B, s, perm=perm),
                some[:, perm].double() @ W.double(),
            ),
        ):
            err = ((y.double() - expected).norm() / expected.norm()).item()
            row["err"][name] = float(f"{err:.2e}")
            if not err < TOLERANCE["float16"]:
                raise RuntimeError(f"bench: {name} at M={M} is wrong: its error is {err:.1e}")
        rows.append(row)
        print(format_row(row), flush=True)
    return rows


HEADER = f"{'K':>6}{'N':>6}{'M':>6}{'linear':>10}{'int4':>10}" + "".join(
    f"{name:>10}{'x best':>8}{'x min':>7}" for name in DTYPES
)
HEADER += "".join(f"{name:>10}" for name in OPTIONS)  # times of the plain product, by minima


def format_row(row: dict[str, Any]) -> str:
    """Return a line of the table: milliseconds, how many times faster than the better other, what
    options cost."""
    text = f"{row['K']:>6}{row['N']:>6}{row['M']:>6}{row['linear']:>10.2f}{row['int4']:>10.2f}"
    for name in DTYPES:
        best = min(row["linear"], row["int4"]) / row[name]
        best_min = min(row["min"]["linear"], row["min"]["int4"]) / row["min"][name]
        text += f"{row[name]:>10.2f}{best:>8.2f}{best_min:>7.2f}"
    for name in OPTIONS:
        plain = row["min"]["bfloat16" if name == "all" else "float16"]
        text += f"{row['min'][name] / plain:>10.2f}"
    return text


def main() -> int:
    """Measure, print the table, write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="4096x4096", help="KxN, comma-separated")
    parser.add_argument(
        "--M", default="1,2,4,8,16,32,64,128,512", help="numbers of tokens, comma-separated"
    )
    parser.add_argument("--group", type=int, default=128, help="rows that share a scale")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of all contenders"
    )
    parser.add_argument(
        "--isa", default="auto", choices=["auto", "portable", "avx2", "avx512"], help="of marlin"
    )
    parser.add_argument("--seconds", type=float, default=8.0, help="for each shape and M")
    parser.add_argument("--output", type=Path, help="default: bench/results/cpu/<cpu>.json")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    marlin.ops.set_cpu_isa(args.isa)
    result: dict[str, Any] = {
        "cpu": cpu_model(),
        "isa": marlin._C.cpu_isa(),
        "threads": args.threads,
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "bench/cpu.py", *sys.argv[1:]]),
        "unit": "ms",
        "rows": [],
    }
    log.info(
        "%s, %s, %d threads, torch %s",
        result["cpu"],
        result["isa"],
        args.threads,
        torch.__version__,
    )
    print(HEADER)
    with torch.inference_mode():
        for shape in args.shapes.split(","):
            K, N = map(int, shape.split("x"))
            result["rows"] += measure(
                K, N, args.group, [int(M) for M in args.M.split(",")], args.seconds
            )
    slug = re.sub(r"[^a-z0-9]+", "-", result["cpu"].lower()).strip("-")
    output = args.output or ROOT / f"bench/results/cpu/{slug}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    log.info("wrote %s", output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
