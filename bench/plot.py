"""Pictures of a result file: speed-up over cuBLAS, and part of the limit reached, against M.

    python bench/plot.py                                  # every file of bench/results
    python bench/plot.py bench/results/nvidia-h200.json --out docs/img

Draws only what bench.py wrote, and the peers of bench/peers if the GPU has some. Depends on
matplotlib and method.py.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import method

log = logging.getLogger("plot")

# One hue a shape, in the order of method.SHAPES; readable with any colour vision (Okabe and Ito).
HUES = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8B7500"]
SHAPE_STYLE = {"linewidth": 1.0, "alpha": 0.75, "marker": "o", "markersize": 2.5}
MEAN_STYLE = {"linewidth": 2.6, "color": "black", "marker": "o", "markersize": 4.5, "zorder": 5}


def series(rows: list[method.Row], value: Any) -> list[tuple[str, list[int], list[float]]]:
    """(shape, M, value) for each shape, in the order of the rows."""
    shapes = dict.fromkeys((row["K"], row["N"]) for row in rows)
    found = []
    for K, N in shapes:
        mine = sorted((r for r in rows if (r["K"], r["N"]) == (K, N)), key=lambda row: row["M"])
        found.append((f"{K} x {N}", [r["M"] for r in mine], [value(r) for r in mine]))
    return found


def axes_of(results: dict[str, Any], title: str, tokens: list[int]) -> tuple[Any, Any]:
    """A figure with a logarithmic M axis and what was measured in its title."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.2), layout="constrained")
    kernel = "" if results["backend"] == "auto" else f", kernel {results['backend']}"
    axes.set_title(f"{title}\n", fontsize=12, loc="left", fontweight="bold")
    axes.text(
        0, 1.02,
        f"{results['gpu']}{kernel}, FP16, group {method.GROUP}, cold weights; driver "
        f"{results['driver']}, CUDA {results['cuda']}, torch {results['torch']}",
        transform=axes.transAxes, fontsize=8.5, color="0.35",
    )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [str(M) for M in tokens], fontsize=8.5)
    axes.tick_params(axis="x", which="minor", bottom=False)
    axes.set_xlabel("M, tokens")
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def draw_shapes(axes: Any, rows: list[method.Row], value: Any) -> None:
    """A thin line a shape, a thick one for their geometric mean."""
    for idx, (label, tokens, values) in enumerate(series(rows, value)):
        axes.plot(tokens, values, label=label, color=HUES[idx % len(HUES)], **SHAPE_STYLE)
    mean = method.means(rows, value)
    axes.plot(list(mean), list(mean.values()), label="geometric mean", **MEAN_STYLE)


def speedup_figure(results: dict[str, Any], peers: dict[str, Any] | None) -> Any:
    """Speed-up over cuBLAS against M, with the other kernels' means."""
    rows = [row for row in results["rows"] if row["group"] == method.GROUP]
    tokens = sorted({row["M"] for row in rows})
    figure, axes = axes_of(results, "Speed-up over cuBLAS FP16", tokens)
    draw_shapes(axes, rows, method.speedup)
    limit = method.means(rows, lambda row: row["cublas"] / row["limit"])
    lines = [("limit of the hardware (mean)", limit, "0.55", ":")]
    others = method.peer_speedups(peers) if peers else {}
    if others and all(method.key(row) in others for row in rows):
        for idx, (label, dashes) in enumerate(
            (("original Marlin (mean)", "--"), ("best other kernel (mean)", "-."))
        ):
            mean = method.means(rows, lambda row, idx=idx: others[method.key(row)][idx])
            lines.append((label, mean, "0.4", dashes))
    for label, mean, colour, dashes in lines:
        axes.plot(list(mean), list(mean.values()), dashes, label=label, color=colour, linewidth=1.6)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("time of cuBLAS / time of marlin")
    axes.legend(fontsize=8.5, frameon=False)
    return figure


def limit_figure(results: dict[str, Any]) -> Any:
    """Part of the limit reached against M: the roofline, divided by itself."""
    rows = [row for row in results["rows"] if row["group"] == method.GROUP]
    tokens = sorted({row["M"] for row in rows})
    figure, axes = axes_of(results, "Part of the hardware's limit reached", tokens)
    draw_shapes(axes, rows, method.frac)
    mean = method.means(rows, lambda row: row["limit"] / row["cublas"])
    axes.plot(
        list(mean),
        list(mean.values()),
        "--",
        label="cuBLAS FP16 (mean)",
        color="0.4",
        linewidth=1.6,
    )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylim(0, max(1.05, 1.05 * max(method.frac(row) for row in rows)))
    axes.set_ylabel(f"max(read the weights, 2MNK / {results['tflops']:g} TFLOP/s) / time")
    axes.legend(fontsize=8.5, frameon=False, loc="lower right")  # under the curves
    return figure


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 if there is nothing to draw."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "results", type=Path, nargs="*", help="files (default bench/results/*.json)"
    )
    parser.add_argument("--out", type=Path, default=method.ROOT / "docs" / "img", help="folder")
    args = parser.parse_args(argv)
    paths = args.results or sorted(method.RESULTS.glob("*.json"))
    if not paths:
        log.error("plot: bench/results has no file to draw")
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    for path in paths:
        results = method.load(path)
        if not any(row["group"] == method.GROUP for row in results["rows"]):
            log.warning(f"plot: {path} has no rows of group {method.GROUP}")
            continue
        peers_path = method.PEERS / f"{method.slug(results['gpu'])}.json"
        peers = method.load(peers_path) if peers_path.exists() else None
        for name, figure in (
            ("speedup", speedup_figure(results, peers)),
            ("limit", limit_figure(results)),
        ):
            picture = args.out / f"{path.stem}-{name}.png"
            figure.savefig(picture, dpi=130)
            log.info(f"{picture} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
