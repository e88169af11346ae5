"""The method of the measurements as far as it needs no GPU: sizes, figures, files and tables.

Depends on the standard library alone. bench.py measures by it, plot.py draws what bench.py wrote,
and the tests run it on any machine.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PEERS = ROOT / "bench" / "peers"

Row = dict[str, Any]

# The layers of the 8B and 70B Llamas, (K, N).
SHAPES = [
    (4096, 4096),
    (4096, 6144),
    (4096, 28672),
    (14336, 4096),
    (8192, 8192),
    (8192, 57344),
    (28672, 8192),
]
TOKENS = [1, 8, 16, 32, 48, 64, 96, 128, 256, 512, 1024, 2048, 4096, 8192]
GROUP = 128

# One round over the copies of the weights touches at least this many bytes, so that each launch
# finds its own in DRAM (the L2 of an H200 holds 60 MB).
COLD_BYTES = 256_000_000

# Relative Frobenius error that a timed call may have: rounding to FP16 alone costs 2.8e-4.
ERR_LIMIT = 5e-4

# What dense FP16 with FP32 accumulation can sustain, TFLOP/s. H200: measured over large random
# products; H100: the same processor; the others: the vendor's figure. `--tflops` overrides.
TFLOPS = {"H200": 800, "H100": 800, "A100": 312, "A10": 125, "A30": 165, "L40S": 362, "L4": 121}
DEFAULT_TFLOPS = 800

# Geometric means over SHAPES, x cuBLAS at group GROUP, that a kernel is held to: (GPU, backend), M.
GOALS = {
    ("NVIDIA H200", "sm80"): {
        1: 2.6, 8: 2.5, 16: 2.2, 32: 1.6, 64: 1.2, 128: 0.85, 256: 0.6, 1024: 0.55
    },
    ("NVIDIA H200", "auto"): {
        1: 3.6, 8: 3.5, 16: 3.0, 32: 2.6, 48: 2.4, 64: 2.1, 96: 1.7, 128: 1.42, 256: 1.08,
        512: 1.0, 1024: 1.01, 2048: 1.03, 4096: 1.02, 8192: 1.02
    },
}  # fmt: skip

ROW_FIELDS = ("K", "N", "M", "group", "cublas", "stream", "limit", "marlin", "err")
HEADER_FIELDS = (
    "gpu", "driver", "cuda", "torch", "date", "command", "csrc_sha256", "backend", "tflops", "group"
)  # fmt: skip
SOURCE_SUFFIXES = (".h", ".cuh", ".cu", ".cpp")


# --------------------------------------------------------------------------------------------------
# Sizes
# --------------------------------------------------------------------------------------------------


def num_groups(K: int, group: int) -> int:
    """Rows of the scales of a weight with K rows; group -1 is one for all of K."""
    if group == -1:
        return 1
    if group <= 0 or K % group:
        raise ValueError(f"group is {group}, but should be -1 or divide K={K}")
    return K // group


def packed_bytes(K: int, N: int) -> int:
    """Bytes of B: two values in a byte."""
    return K * N // 2


def marlin_bytes(K: int, N: int, group: int) -> int:
    """Bytes of B and s."""
    return packed_bytes(K, N) + 2 * num_groups(K, group) * N


def dense_bytes(K: int, N: int) -> int:
    """Bytes of the FP16 weight."""
    return 2 * K * N


def num_copies(weight_bytes: int) -> int:
    """Copies of a weight so that one round over them touches COLD_BYTES; at least 2."""
    return max(2, -(-COLD_BYTES // weight_bytes))


def num_launches(copies: int, launch_us: float) -> int:
    """Launches in one graph: whole rounds over the copies, 8 launches and 200 us at least.

    A graph too short would count the start of the graph itself (a microsecond or two). Where that
    takes more than 20 ms one round has to do. launch_us is a guess, and no launch takes under 1.5.
    """
    launch_us = max(launch_us, 1.5)
    wanted = max(8.0, 200.0 / launch_us)
    affordable = 20_000.0 / launch_us
    return copies * max(1, math.ceil(min(wanted, affordable) / copies))


# --------------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------------


def math_us(M: int, N: int, K: int, tflops: float) -> float:
    """Microseconds of the arithmetic of one product at `tflops` TFLOP/s."""
    return 2.0 * M * N * K / (tflops * 1e6)


def limit_us(stream: float, M: int, N: int, K: int, tflops: float) -> float:
    """The least time for the product: to read the packed weights (`stream`, us), or to compute."""
    return max(stream, math_us(M, N, K, tflops))


def geomean(values: Iterable[float]) -> float:
    """Geometric mean of positive numbers."""
    logs = [math.log(v) for v in values]
    if not logs:
        raise ValueError("geomean: values is empty")
    return math.exp(math.fsum(logs) / len(logs))


def speedup(row: Row) -> float:
    """Time of cuBLAS over ours."""
    return row["cublas"] / row["marlin"]


def frac(row: Row) -> float:
    """Part of the limit that our time reaches."""
    return row["limit"] / row["marlin"]


def tflops_of(gpu: str) -> float:
    """TFLOP/s that stand in `limit` for a GPU's name; unknown names get DEFAULT_TFLOPS."""
    words = re.split(r"[^A-Za-z0-9]+", gpu)
    return next((rate for name, rate in TFLOPS.items() if name in words), DEFAULT_TFLOPS)


# --------------------------------------------------------------------------------------------------
# Names and options
# --------------------------------------------------------------------------------------------------


def slug(gpu: str) -> str:
    """A GPU's name as part of a file name: `NVIDIA H200` is `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def results_path(gpu: str, backend: str, complete: bool) -> Path:
    """Where a run is written if nothing is said: only a whole one replaces a committed file."""
    name = slug(gpu) + ("" if backend == "auto" else f"-{backend}") + ".json"
    return (RESULTS if complete else ROOT / "build" / "bench") / name


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """`4096x4096,8192x57344` as pairs (K, N)."""
    shapes = []
    for item in text.split(","):
        match = re.fullmatch(r"\s*(\d+)x(\d+)\s*", item)
        if match is None:
            raise ValueError(f"shapes has {item!r}, but should be KxN, as 4096x28672")
        K, N = int(match[1]), int(match[2])
        if K == 0 or N == 0 or K % 16 or N % 64:
            raise ValueError(f"shapes has {item!r}, but K should be a multiple of 16 and N of 64")
        shapes.append((K, N))
    return shapes


def parse_ints(text: str) -> list[int]:
    """`1,8,16` as numbers."""
    try:
        return [int(item) for item in text.split(",")]
    except ValueError:
        raise ValueError(f"{text!r} should be whole numbers with commas between") from None


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def csrc_sha256(csrc: Path = ROOT / "csrc") -> str:
    """Hash of the C++ and CUDA sources: name and content of each, in the order of the names."""
    digest = hashlib.sha256()
    for path in sorted(p for p in csrc.iterdir() if p.suffix in SOURCE_SUFFIXES):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def key(row: Row) -> tuple[int, int, int, int]:
    """What a row is about."""
    return row["K"], row["N"], row["group"], row["M"]


def _order(row: Row) -> tuple[Any, ...]:
    shape = (row["K"], row["N"])
    known = SHAPES.index(shape) if shape in SHAPES else len(SHAPES)
    return row["group"] != GROUP, row["group"], known, shape, row["M"]


def merge_rows(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Old rows, those with the key of a new one replaced by it, in the order of the tables."""
    rows = {key(row): row for row in old} | {key(row): row for row in new}
    return sorted(rows.values(), key=_order)


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """New results with the rows of the old ones that they lack.

    Rows measured with other sources make the file stale, and it says so.

    Raises:
        ValueError: the two are from different GPUs or backends.
    """
    for field in ("gpu", "backend", "tflops"):
        if old[field] != new[field]:
            raise ValueError(
                f"merge: {field} is {new[field]!r}, but the rows of the file have {old[field]!r}"
            )
    merged = dict(new)
    if new["command"] not in old["command"].split("; "):
        merged["command"] = f"{old['command']}; {new['command']}"
    merged["rows"] = merge_rows(old["rows"], new["rows"])
    merged["group"] = sorted({row["group"] for row in merged["rows"]})
    if "host" in old and "host" not in merged:
        merged["host"] = old["host"]
    num_kept = len(merged["rows"]) - len(new["rows"])
    if num_kept and (old["csrc_sha256"] != new["csrc_sha256"] or old.get("stale")):
        reason = f"{num_kept} rows were measured with csrc {old['csrc_sha256'][:12]}"
        merged["stale"] = old.get("stale", reason)
    return merged


def check(results: dict[str, Any]) -> list[str]:
    """Sentences on what is wrong with a result file; none if it is sound."""
    found = [f"{field} is missing" for field in HEADER_FIELDS if field not in results]
    rows = results.get("rows", [])
    if not rows:
        found.append("rows is empty")
    if len({key(row) for row in rows if all(f in row for f in ROW_FIELDS)}) != len(rows):
        found.append("two rows have the same K, N, group, M, or a row lacks one of them")
    for row in rows:
        name = "row " + " ".join(f"{f}={row.get(f)}" for f in ("K", "N", "group", "M"))
        found += [f"{name}: {field} is missing" for field in ROW_FIELDS if field not in row]
        for field in ("cublas", "stream", "limit", "marlin"):
            value = row.get(field, 1.0)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                found.append(f"{name}: {field} is {value}, but should be microseconds above 0")
        if not row.get("err", 0.0) <= ERR_LIMIT:
            found.append(f"{name}: err is {row['err']}, but should be at most {ERR_LIMIT}")
    if "stale" in results and not str(results["stale"]).strip():
        found.append("stale is empty, but should be the reason")
    return found


def load(path: Path) -> dict[str, Any]:
    """A result or peers file."""
    return json.loads(path.read_text())


def save(path: Path, results: dict[str, Any]) -> None:
    """Write results, a row a line, aside and then in place of the old file."""
    lines = []
    for field, value in results.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = ",\n".join("  " + json.dumps(row) for row in value)
            lines.append(f"{json.dumps(field)}: [\n{rows}\n ]")
        else:
            lines.append(f"{json.dumps(field)}: {json.dumps(value)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    aside.write_text("{\n " + ",\n ".join(lines) + "\n}\n")
    os.replace(aside, path)


# --------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------


def means(rows: Iterable[Row], value: Any) -> dict[int, float]:
    """Geometric mean over the shapes of value(row), for each M."""
    by_M: dict[int, list[float]] = {}
    for row in rows:
        by_M.setdefault(row["M"], []).append(value(row))
    return {M: geomean(by_M[M]) for M in sorted(by_M)}


def _line(label: str, cells: Iterable[str]) -> str:
    return f"{label:<16}" + "".join(f"{cell:>7}" for cell in cells)


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def table(title: str, rows: Sequence[Row], value: Any, mark: Any = lambda row: "") -> list[str]:
    """Lines of one table: a shape a line, an M a column, the geometric mean below."""
    tokens = sorted({row["M"] for row in rows})
    lines = [_line(title, [f"{M}" for M in tokens])]
    shapes = dict.fromkeys((row["K"], row["N"]) for row in rows)
    for shape in shapes:
        cells = {r["M"]: _short(value(r)) + mark(r) for r in rows if (r["K"], r["N"]) == shape}
        lines.append(_line(f"{shape[0]}x{shape[1]}", [cells.get(M, "-") for M in tokens]))
    lines.append(_line("geomean", [f"{v:.2f}" for v in means(rows, value).values()]))
    return lines


def peer_speedups(peers: dict[str, Any]) -> dict[tuple[int, int, int, int], tuple[float, float]]:
    """Speed-up over cuBLAS of the original Marlin and of the best other kernel, by key."""
    group = peers.get("group", GROUP)
    return {
        (r["K"], r["N"], group, r["M"]): (
            r["cublas"] / r["ist"],
            r.get("best_speedup", r["cublas"] / r["best"]),
        )
        for r in peers["rows"]
    }


def report(results: dict[str, Any], peers: dict[str, Any] | None = None) -> str:
    """The tables of a result file; with peers, rows that lose to one are marked.

    `*`: below the original Marlin's speed-up; `+`: below that of the best other kernel.
    """
    lines = [
        f"{results['gpu']}, driver {results['driver']}, CUDA {results['cuda']}, "
        f"torch {results['torch']}, backend {results['backend']}, "
        f"limit at {results['tflops']} TFLOP/s"
    ]
    others = peer_speedups(peers) if peers else {}
    for group in dict.fromkeys(row["group"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["group"] == group]

        def mark(row: Row) -> str:
            ist, best = others.get(key(row), (0.0, 0.0))
            return "*" if speedup(row) < ist else "+" if speedup(row) < best else ""

        lines += ["", f"group {group}"]
        lines += table("x cublas, M =", rows, speedup, mark)
        goals = GOALS.get((results["gpu"], results["backend"]), {}) if group == GROUP else {}
        if goals and {(row["K"], row["N"]) for row in rows} == set(SHAPES):
            tokens = sorted({row["M"] for row in rows})
            lines.append(_line("goal", [f"{goals[M]:.2f}" if M in goals else "-" for M in tokens]))
        known = [row for row in rows if key(row) in others]
        if known and len(known) == len(rows):
            for idx, label in enumerate(("original Marlin", "best other")):
                values = means(rows, lambda row, idx=idx: others[key(row)][idx]).values()
                lines.append(_line(label, [f"{v:.2f}" for v in values]))
        lines += ["", *table("frac of limit", rows, frac)]
        if all("marlin_nopdl" in row for row in rows):
            nopdl = [row | {"marlin": row["marlin_nopdl"]} for row in rows]
            lines += ["", *table("without PDL", nopdl, speedup)]
        lines += ["", *table("us", rows, lambda row: row["marlin"])[:-1]]
        lines.append(f"largest relative error {max(row['err'] for row in rows):.2e}")
        if known:
            num_ist = sum(mark(row) == "*" for row in rows)
            num_best = sum(mark(row) != "" for row in rows)
            lines.append(
                f"below the original Marlin (*): {num_ist} of {len(known)} rows; "
                f"below the best other kernel (* or +): {num_best}"
            )
    if results.get("host"):
        lines += ["", "host time of a call, us  matmul    mul  linear"]
        lines += [
            f"{r['K']}x{r['N']} M={r['M']}".ljust(24)
            + f"{r['matmul']:7.2f}{r['mul']:7.2f}{r['linear']:8.2f}"
            for r in results["host"]
        ]
    return "\n".join(lines)
