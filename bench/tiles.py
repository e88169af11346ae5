"""Fits the constants of csrc/marlin_sm80.cu's table of tiles to measured times.

    python bench/tiles.py --save bench/results/tiles/nvidia-h200.csv   # measures, about 15 s
    python bench/tiles.py --times bench/results/tiles/nvidia-h200.csv  # fits what was measured

Prints the rows of kTiles, and what the choice by them costs over the best tile of each row. The
model is the one of make_candidate in the kernel file. Depends on numpy and scipy; to measure, also
on nvcc and a GPU.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

HERE = Path(__file__).resolve().parent
STAGE_K = 64
Constants = tuple[float, float, float]  # stage_us, tile_us, shared_us: see Time.predict
START_US = 2.2
BYTES_PER_US = 4.3e6


@dataclass(frozen=True)
class Time:
    """One measured product: sizes, the tile as its six numbers, CTAs, microseconds."""

    K: int
    N: int
    M: int
    tile: str
    features: int
    tokens: int
    teams: int
    ctas: int
    us: float

    def predict(self, stage_us: float, tile_us: float, shared_us: float) -> float:
        """Microseconds by the model."""
        stages = -(-self.K // STAGE_K)
        tiles = -(-self.N // self.features) * -(-self.M // self.tokens)
        ctas = min(self.ctas, stages * tiles)
        stripe = -(-stages * tiles // ctas)
        shared = 0 if tiles % ctas == 0 else 1 if ctas % tiles == 0 else 2
        ends = stripe // stages if shared == 0 else shared + (stripe - 1) // stages
        rounds = -(-stripe // self.teams) * self.teams
        compute_us = rounds * stage_us + ends * tile_us
        memory_us = self.K * self.N / 2 / BYTES_PER_US
        return START_US + max(compute_us, memory_us) + shared * shared_us


def measure() -> str:
    """Compiles tiles.cu for this machine's GPU, runs it, returns its lines."""
    program = HERE.parent / "build" / "bench" / "tiles"
    program.parent.mkdir(parents=True, exist_ok=True)
    command = ["nvcc", "-std=c++17", "-O3", "-arch=native", str(HERE / "tiles.cu")]
    subprocess.run([*command, "-o", str(program)], check=True)
    return subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout


def parse(lines: str) -> list[Time]:
    """The lines of tiles.cu; those that start with # are comments."""
    rows = csv.reader(line for line in lines.splitlines() if line and not line.startswith("#"))
    return [
        Time(*map(int, row[:3]), row[3], *map(int, row[4:8]), float(row[8]))  # type: ignore[misc]
        for row in rows
    ]


def fit(times: list[Time], best: dict[tuple[int, int, int], float]) -> Constants:
    """The constants of one tile, by the logarithm of its times.

    Outliers weigh little, and so do products at which other tiles are much faster.
    """

    def residuals(logs: np.ndarray) -> list[float]:
        return [
            (best[time.K, time.N, time.M] / time.us) ** 3
            * math.log(time.predict(*np.exp(logs)) / time.us)
            for time in times
        ]

    fits = [
        least_squares(residuals, np.log([stage_us, 1.0, 2.0]), loss="soft_l1", f_scale=0.05)
        for stage_us in (0.05, 0.15, 0.5)
    ]
    stage_us, tile_us, shared_us = np.exp(min(fits, key=lambda each: each.cost).x)
    return float(stage_us), float(tile_us), float(shared_us)


def nudge(times: list[Time], constants: dict[str, Constants]) -> None:
    """Moves single constants, by 10% at most in a step, as long as that makes the choice better."""

    def loss() -> float:
        return sum(map(math.log, losses(times, constants)))

    least, before = loss(), math.inf
    while least < before:
        before = least
        for tile, index, factor in itertools.product(constants, range(3), (0.9, 0.95, 1.05, 1.1)):
            old = constants[tile]
            new = [value * factor if i == index else value for i, value in enumerate(old)]
            constants[tile] = (new[0], new[1], new[2])
            if (now := loss()) < least - 1e-4:
                least = now
            else:
                constants[tile] = old


def losses(times: list[Time], constants: dict[str, Constants]) -> list[float]:
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
    parser.add_argument("--times", type=Path, help="measured before; without it, measure")
    parser.add_argument("--save", type=Path, help="where to put what is measured")
    args = parser.parse_args()
    lines = args.times.read_text() if args.times else measure()
    if args.save:
        args.save.parent.mkdir(parents=True, exist_ok=True)
        args.save.write_text(lines)
    times = parse(lines)
    of_tile = defaultdict(list)
    for time in times:
        of_tile[time.tile].append(time)
    best: dict[tuple[int, int, int], float] = defaultdict(lambda: math.inf)
    for time in times:
        best[time.K, time.N, time.M] = min(best[time.K, time.N, time.M], time.us)
    constants = {tile: fit(some, best) for tile, some in of_tile.items()}
    nudge(times, constants)
    for tile, (stage_us, tile_us, shared_us) in constants.items():
        sizes = tile.replace("x", ", ")
        print(f"    {{{{{sizes}}}, {stage_us:.4f}f, {tile_us:.2f}f, {shared_us:.2f}f}},")
    lost = losses(times, constants)
    mean = math.exp(sum(map(math.log, lost)) / len(lost))
    print(f"the choice takes {mean:.4f} times the best, {max(lost):.2f} at worst", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
