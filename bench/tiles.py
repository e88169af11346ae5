"""Fits the constants of the kernel files' tables of tiles to measured times.

    python bench/tiles.py --save bench/results/tiles/nvidia-h200.csv   # measures: minutes
    python bench/tiles.py --times bench/results/tiles/nvidia-h200.csv  # fits what was measured
    python bench/tiles.py --backend sm90 ...   # of both Hopper kernels, which are chosen between

Prints the rows of kTiles, and what the choice by them costs over the best tile of each row. The
models are those of make_config in the kernel files. Depends on numpy and scipy; to measure, also
on nvcc and a GPU.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

HERE = Path(__file__).resolve().parent
STAGE_K = 64
START_US = 2.2
Constants = tuple[float, ...]  # of a tile, in the order of predict's arguments
Size = tuple[int, int, int]  # K, N, M
BYTES_PER_US = 4.3e6
SMS = 132
ANCHOR = 0.03  # what 1% of error costs, of what 1% of time does
NUDGES = 100000  # a minute, for each of two starts


@dataclass(frozen=True)
class Time:
    """One measured product: sizes, the tile as its numbers, how it was dealt out, microseconds."""

    K: int
    N: int
    M: int
    tile: str
    features: int
    tokens: int

    @property
    def tiles(self) -> int:
        """Tiles of C."""
        return -(-self.N // self.features) * -(-self.M // self.tokens)

    @property
    def memory_us(self) -> float:
        """Microseconds to read the packed weight."""
        return self.K * self.N / 2 / BYTES_PER_US


@dataclass(frozen=True)
class TimeSm80(Time):
    """Of csrc/marlin_sm80.cu."""

    teams: int
    ctas: int
    us: float

    FIRST_GUESS = (0.15, 1.0, 2.0)  # stage_us, tile_us, shared_us

    def predict(self, stage_us: float, tile_us: float, shared_us: float) -> float:
        """Microseconds by the model."""
        stages = -(-self.K // STAGE_K)
        ctas = min(self.ctas, stages * self.tiles)
        stripe = -(-stages * self.tiles // ctas)
        shared = 0 if self.tiles % ctas == 0 else 1 if ctas % self.tiles == 0 else 2
        ends = stripe // stages if shared == 0 else shared + (stripe - 1) // stages
        rounds = -(-stripe // self.teams) * self.teams
        compute_us = rounds * stage_us + ends * tile_us
        return START_US + max(compute_us, self.memory_us) + shared * shared_us


@dataclass(frozen=True)
class TimeSm90(Time):
    """Of csrc/marlin_sm90.cu."""

    stage_k: int  # rows of K that a cluster takes at once
    clusters: int
    stripes: int  # 0: the tiles that do not fill a round are whole ones
    us: float

    FIRST_GUESS = (0.3, 1.0, 2.0, 3.0)  # stage_us, tile_us, sharer_us, start_us

    def predict(self, stage_us: float, tile_us: float, sharer_us: float, start_us: float) -> float:
        """Microseconds by the model."""
        stages = -(-self.K // self.stage_k)
        rounds, striped = divmod(self.tiles, self.clusters)
        units, ends, sharers = rounds * stages, rounds, 0
        if striped:
            stripes = self.stripes or striped
            even = stripes % striped == 0
            if stripes != striped:
                sharers = stripes // striped if even else -(-stripes // striped) + 1
            units += -(-striped * stages // stripes)
            ends += 1 if even else 2
        compute_us = units * stage_us + ends * tile_us
        return start_us + max(compute_us, self.memory_us) + sharers * sharer_us


@dataclass(frozen=True)
class TimeSm90Few(Time):
    """Of csrc/marlin_sm90_few.cu."""

    warps: int
    ctas: int
    us: float

    FIRST_GUESS = (0.05, 0.5, 0.5, 2.0)  # stage_us, tile_us, sharer_us, start_us

    def predict(self, stage_us: float, tile_us: float, sharer_us: float, start_us: float) -> float:
        """Microseconds by the model."""
        stages = -(-self.K // STAGE_K)
        stripes = min(self.ctas, stages * self.tiles)
        stripe = -(-stages * self.tiles // stripes)
        if self.tiles % stripes == 0:
            sharers, ends = 0, self.tiles // stripes
        elif stripes % self.tiles == 0:
            sharers, ends = stripes // self.tiles, 1
        else:
            sharers, ends = -(-stripes // self.tiles) + 1, -(-stripe // stages) + 1
        compute_us = -(-stripe // self.warps) * self.warps * stage_us + ends * tile_us
        # of the multiprocessor that reads most, 32 bytes a row of K: each has its share of the rate
        memory_us = -(-stripes // SMS) * stripe * STAGE_K * 32 / (BYTES_PER_US / SMS)
        return start_us + max(compute_us, memory_us) + sharers * sharer_us


TIMES: dict[str, type[TimeSm80] | type[TimeSm90] | type[TimeSm90Few]] = {
    "sm80": TimeSm80,
    "sm90": TimeSm90,
    "sm90_few": TimeSm90Few,
}
PAIR = "-2"  # of the last number of a tile in marlin_sm90.cu
KERNELS = {"sm80": ["sm80"], "sm90": ["sm90", "sm90_few"]}  # that a backend chooses between


def kernel_of(tile: str, backend: str) -> str:
    """Whose tile it is: those of sm90_few have four numbers, those of sm90 five."""
    return "sm90_few" if backend == "sm90" and tile.count("x") == 3 else backend


def measure(kernel: str) -> str:
    """Compiles tiles.cu with a kernel file for this machine's GPU, runs it, returns its lines."""
    program = HERE.parent / "build" / "bench" / f"tiles-{kernel}"
    program.parent.mkdir(parents=True, exist_ok=True)
    hopper = [f"-D{kernel.upper()}", "-gencode=arch=compute_90a,code=sm_90a"]
    flags = ["-arch=native"] if kernel == "sm80" else hopper
    command = ["nvcc", "-std=c++17", "-O3", *flags, str(HERE / "tiles.cu"), "-o", str(program)]
    subprocess.run(command, check=True)
    return subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout


def parse(lines: str, backend: str = "sm80") -> list[Any]:
    """The lines of tiles.cu; those that start with # are comments."""
    rows = csv.reader(line for line in lines.splitlines() if line and not line.startswith("#"))
    return [
        TIMES[kernel_of(row[3], backend)](
            *map(int, row[:3]), row[3], *map(int, row[4:-1]), float(row[-1])
        )
        for row in rows
    ]


def fit(times: list[Any], best: dict[Size, float]) -> Constants:
    """The constants of one tile, by the logarithm of its times.

    Outliers weigh little, and so do products at which other tiles are much faster.
    """

    def residuals(logs: np.ndarray) -> list[float]:
        return [
            (best[time.K, time.N, time.M] / time.us) ** 3
            * math.log(time.predict(*np.exp(logs)) / time.us)
            for time in times
        ]

    first, *others = times[0].FIRST_GUESS
    fits = [
        least_squares(residuals, np.log([scale * first, *others]), loss="soft_l1", f_scale=0.05)
        for scale in (1 / 3, 1, 3)
    ]
    return rounded(np.exp(min(fits, key=lambda each: each.cost).x).tolist())


def rounded(constants: Iterable[float]) -> Constants:
    """As they are printed."""
    return tuple(round(value, 2 if i > 0 else 4) for i, value in enumerate(constants))


def nudge(times: list[Any], constants: dict[str, Constants]) -> None:
    """Moves single constants, at random, where that makes the choice better.

    A row that loses 10% counts as much as four that lose 4%. Predictions that are wrong cost a
    little, too: shapes that nobody has measured live on them.
    """
    rows: dict[Size, list[list[Any]]] = defaultdict(list)  # of [predicted, time]
    entries: dict[str, list[list[Any]]] = defaultdict(list)
    for time in times:
        entry = [time.predict(*constants[time.tile]), time]
        rows[time.K, time.N, time.M].append(entry)
        entries[time.tile].append(entry)
    least = {size: min(entry[1].us for entry in row) for size, row in rows.items()}
    sizes = {
        tile: {(entry[1].K, entry[1].N, entry[1].M) for entry in some}
        for tile, some in entries.items()
    }

    def loss(size: Size) -> float:
        predicted, time = min(rows[size], key=lambda entry: entry[0])
        x = math.log(time.us / least[size])
        return x + 10 * x * x + ANCHOR * abs(math.log(predicted / time.us))

    lost = {size: loss(size) for size in rows}
    generator = np.random.default_rng(1)
    tiles = list(entries)
    for _ in range(NUDGES):
        tile = tiles[generator.integers(len(tiles))]
        index, spread = generator.integers(len(constants[tile])), generator.choice([0.02, 0.1, 0.5])
        factor, shift = generator.lognormal(0, spread), abs(generator.normal(0, spread)) / 4
        nudged = rounded(
            v * factor + (shift if i > 0 else 0) if i == index else v
            for i, v in enumerate(constants[tile])
        )
        before = [entry[0] for entry in entries[tile]]
        for entry in entries[tile]:
            entry[0] = entry[1].predict(*nudged)
        now = {size: loss(size) for size in sizes[tile]}
        if sum(now.values()) < sum(lost[size] for size in now):
            constants[tile] = nudged
            lost.update(now)
        else:
            for entry, predicted in zip(entries[tile], before, strict=True):
                entry[0] = predicted


def table(kernel: str) -> dict[str, Constants]:
    """The constants that a kernel file has now, in the order of tile_idx."""
    text = (HERE.parent / "csrc" / f"marlin_{kernel}.cu").read_text()
    return {
        sizes.replace(", ", "x").replace("PAIR", PAIR): tuple(
            float(x.rstrip("f")) for x in numbers.split(", ")
        )
        for sizes, numbers in re.findall(r"{{([\w, ]+)}, ([\d.f, ]+)}", text)
    }


def losses(times: list[Any], constants: dict[str, Constants]) -> list[float]:
    """What the choice by these constants takes over the best tile, for every K, N, M."""
    rows = defaultdict(list)
    for time in times:
        rows[time.K, time.N, time.M].append(time)
    return [
        min(row, key=lambda time: time.predict(*constants[time.tile])).us
        / min(time.us for time in row)
        for row in rows.values()
    ]


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", choices=list(KERNELS), default="sm80", help="whose tiles")
    parser.add_argument("--times", type=Path, help="measured before; without it, measure")
    parser.add_argument("--save", type=Path, help="where to put what is measured")
    args = parser.parse_args()
    kernels = KERNELS[args.backend]
    lines = args.times.read_text() if args.times else "".join(map(measure, kernels))
    if args.save:
        args.save.parent.mkdir(parents=True, exist_ok=True)
        args.save.write_text(lines)
    times = parse(lines, args.backend)
    of_tile = defaultdict(list)
    for time in times:
        of_tile[time.tile].append(time)
    best: dict[Size, float] = defaultdict(lambda: math.inf)
    for time in times:
        best[time.K, time.N, time.M] = min(best[time.K, time.N, time.M], time.us)
    fitted = {tile: fit(some, best) for tile, some in of_tile.items()}
    present = {tile: row for kernel in kernels for tile, row in table(kernel).items()}
    starts = [fitted, {tile: present.get(tile, fitted[tile]) for tile in fitted}]
    for start in starts:
        nudge(times, start)
    constants = min(starts, key=lambda start: math.prod(losses(times, start)))
    for tile, values in constants.items():
        sizes = tile.replace("x", ", ").replace(PAIR, "PAIR")
        numbers = [f"{values[0]:.4f}f", *(f"{value:.2f}f" for value in values[1:])]
        print(f"    {{{{{sizes}}}, {', '.join(numbers)}}},")
    lost = losses(times, constants)
    mean = math.exp(sum(map(math.log, lost)) / len(lost))
    print(f"the choice takes {mean:.4f} times the best, {max(lost):.2f} at worst", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
