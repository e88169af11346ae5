"""marlin check, marlin bench: whether the library is right on this machine, and how fast it is."""

from __future__ import annotations

import json
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import click
import torch
from torch import nn

from .. import _C, Layer, __version__, checkpoint, quantize
from ..support import MIN_CAPABILITY, can_run
from .common import CommandError, device_option, emit, json_option, progress, quiet, table

TOLERANCE = 5e-4  # of the norm, for FP16: what the README promises
# (k, n, groupsize, tokens): padded sizes, one group and several, one token and many
PROBLEMS = ((256, 256, 128, 1), (576, 192, 64, 17), (100, 70, -1, 33), (1024, 512, 128, 128))


def self_test(device: torch.device) -> list[dict[str, Any]]:
    """Compares products with float64 ones, and two runs with each other.

    Args:
        device: that computes.

    Returns:
        For each of PROBLEMS its sizes, the norm-wise relative error, and whether it passed.
    """
    results = []
    generator = torch.Generator().manual_seed(0)
    for k, n, groupsize, num_tokens in PROBLEMS:
        linear = nn.Linear(k, n, bias=False)
        linear.weight.data = torch.randn(n, k, generator=generator) * 0.05
        layer = Layer(k, n, groupsize)
        layer.pack(linear, quantize.scales_for(linear.weight, groupsize))
        x = torch.randn(num_tokens, k, generator=generator).half()
        expected = x.double() @ layer.unpack().double().t()
        layer, x = layer.to(device), x.to(device)
        y = layer(x)
        error = float((y.cpu().double() - expected).norm() / expected.norm())
        same = torch.equal(y, layer(x))
        results.append(
            {
                "k": k,
                "n": n,
                "group_size": groupsize,
                "tokens": num_tokens,
                "error": error,
                "same_bits_again": same,
                "ok": error <= TOLERANCE and same,
            }
        )
    return results


def _gpus() -> Iterator[dict[str, Any]]:
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        answer = can_run(4096, 4096, 128, device=f"cuda:{index}")
        yield {
            "name": found.name,
            "capability": f"{found.major}.{found.minor}",
            "memory_bytes": found.total_memory,
            "new_enough": (found.major, found.minor) >= MIN_CAPABILITY,
            "runs": bool(answer),
            "reason": answer.reason,
        }


@click.command()
@json_option
def check(as_json: bool) -> None:
    """Say whether GPU, driver and build are fine, and test the products on each device.

    The exit status is 1 if a test failed, or if there is a GPU that this build cannot use.

    \b
    Examples:
      marlin check
      marlin check --json
    """
    gpus = list(_gpus())
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i, gpu in enumerate(gpus) if gpu["runs"]]
    tests: dict[str, list[dict[str, Any]]] = {}
    problems = [f"{gpu['name']} is not used: {gpu['reason']}" for gpu in gpus if not gpu["runs"]]
    with progress("testing", len(devices)) as step:
        for device in devices:
            step(str(device))
            try:
                tests[str(device)] = self_test(device)
            except RuntimeError as error:  # a driver that is too old, memory that is not there
                problems.append(f"{device}: {str(error).splitlines()[0]}")
                continue
            for result in tests[str(device)]:
                if not result["ok"]:
                    shape = f"{result['k']}x{result['n']}, {result['tokens']} tokens"
                    problems.append(f"{device}: wrong at {shape}, error {result['error']:.1e}")
    values = {
        "marlin": __version__,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cpu_isa": _C.cpu_isa(),
        "cpu_threads": torch.get_num_threads(),
        "built_with_cuda": _C.has_cuda(),
        "gpus": gpus,
        "tests": tests,
        "problems": problems,
        "ok": not problems,
    }

    def lines() -> Iterator[str]:
        yield f"marlin {__version__}, torch {torch.__version__}, Python {values['python']}"
        kernels = "with CUDA kernels" if _C.has_cuda() else "without CUDA kernels"
        yield f"built {kernels}; CPU kernels: {_C.cpu_isa()}, {torch.get_num_threads()} thread(s)"
        for gpu in gpus:
            yield f"GPU {gpu['name']}, compute capability {gpu['capability']}"
        if not gpus:
            yield "no CUDA GPU"
        for device, results in tests.items():
            worst = max(result["error"] for result in results)
            passed = sum(result["ok"] for result in results)
            yield f"{device}: {passed} of {len(results)} products right, largest error {worst:.1e}"
        for problem in problems:
            yield f"problem: {problem}"
        yield "all is well" if not problems else "not all is well"

    emit(values, as_json, lines)
    if problems:
        click.get_current_context().exit(1)


def _median_seconds(
    product: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, budget: float
) -> float:
    """The median over as many runs as fit into the budget (in seconds), at least 3."""

    def once() -> float:
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        began = time.perf_counter()
        product(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        return time.perf_counter() - began

    first = once()
    count = max(3, min(200, int(budget / max(first, 1e-6))))
    return statistics.median(once() for _ in range(count))


def _shape(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> Any:
    shapes = []
    for value in values:
        k, _, n = value.partition("x")
        if not (k.isdigit() and n.isdigit() and 0 < int(k) < 2**20 and 0 < int(n) < 2**20):
            raise click.BadParameter(f"{value!r} is no shape KxN such as 4096x11008")
        shapes.append((int(k), int(n)))
    return shapes


@click.command()
@click.argument(
    "directory", metavar="[DIR]", required=False, type=click.Path(path_type=pathlib.Path)
)
@click.option("--shape", "shapes", multiple=True, callback=_shape, metavar="KxN",
              help="A layer to measure, instead of those of DIR; default 4096x4096.")  # fmt: skip
@click.option("--tokens", default="1,16,128", show_default=True, help="Numbers of tokens.")
@click.option("--group-size", default=128, show_default=True, help="For --shape; -1 for one group.")
@click.option("--seconds", default=0.5, show_default=True, help="To spend on each measurement.")
@device_option
@json_option
def bench(
    directory: pathlib.Path | None,
    shapes: list[tuple[int, int]],
    tokens: str,
    group_size: int,
    seconds: float,
    device: torch.device,
    as_json: bool,
) -> None:
    """Measure layers against torch's own product of 16-bit (on a CPU 32-bit) weights.

    Weights stay in the caches between the runs if they fit; bench/bench.py of the source tree
    measures them cold.

    \b
    Examples:
      marlin bench
      marlin bench llama-awq --tokens 1,8
      marlin bench --shape 4096x14336 --group-size 64 --device cpu
    """
    quiet()
    counts = []
    for text in tokens.split(","):
        if not text.strip().isdigit() or int(text) < 1:
            raise click.BadParameter(f"--tokens holds {text!r} but should hold positive numbers")
        counts.append(int(text))
    layers: dict[str, Layer] = {}
    if directory is not None and not shapes:
        read = checkpoint.open_checkpoint(directory)
        seen = set()
        for name, linear in read.linears.items():
            kind = (linear.k, linear.n, linear.spec)
            if kind not in seen:
                seen.add(kind)
                layers[name] = read.layer(name, device)
    else:
        for k, n in shapes or [(4096, 4096)]:
            try:
                layers[f"{k}x{n}"] = Layer(k, n, group_size, device=device)
            except ValueError as error:
                raise CommandError(str(error)) from error
            layers[f"{k}x{n}"].s.fill_(0.01)
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    rows: list[dict[str, Any]] = []
    with progress("measuring", len(layers) * len(counts)) as step, torch.no_grad():
        for name, layer in layers.items():
            dense = nn.Linear(layer.k, layer.n, bias=False, device="meta")
            dense.weight = nn.Parameter(layer.unpack().to(dtype), requires_grad=False)
            for count in counts:
                step(f"{name}, {count} token(s)")
                own = torch.randn(count, layer.k, device=device).to(layer.s.dtype)
                x = own.to(dtype)
                ours = _median_seconds(layer, own, seconds)
                torchs = _median_seconds(dense, x, seconds)
                rows.append(
                    {
                        "layer": name,
                        "k": layer.k,
                        "n": layer.n,
                        "group_size": -1 if layer.groupsize == layer.k else layer.groupsize,
                        "tokens": count,
                        "marlin_us": round(1e6 * ours, 1),
                        "torch_us": round(1e6 * torchs, 1),
                        "speedup": round(torchs / ours, 3),
                    }
                )
    values = {"device": str(device), "torch_dtype": str(dtype).removeprefix("torch."), "rows": rows}

    def lines() -> Iterator[str]:
        heading = ("layer", "k", "n", "group", "tokens", "marlin, us", "torch, us", "speed-up")
        keys = ("layer", "k", "n", "group_size", "tokens", "marlin_us", "torch_us", "speedup")
        yield f"on {device}, against {values['torch_dtype']}"
        yield from table([heading, *(tuple(str(row[key]) for key in keys) for row in rows)])

    emit(json.loads(json.dumps(values)), as_json, lines)
