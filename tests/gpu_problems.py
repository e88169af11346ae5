"""Products to try on a GPU, with float64 references: for test_gpu.py and sanitize.py.

Depends on torch and the package.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import marlin
from marlin import _C

DEVICE = "cuda"

# Norm-wise relative error promised for FP16: rounding the output alone costs 2.8e-4 on average and
# at most 2^-11 = 4.9e-4.
ERR_LIMIT = 5e-4


@dataclasses.dataclass(frozen=True)
class Weight:
    """A packed weight and what it stands for."""

    B: Tensor  # (K / 16, 2 N) int32
    s: Tensor  # (groups, N) float16, permuted
    dense: Tensor  # (K, N) float64, values that float16 holds
    workspace: Tensor  # int32, zeros


@functools.lru_cache(maxsize=16)
def random_weight(K: int, N: int, group: int = -1, seed: int = 0) -> Weight:
    """A random weight with scales of 0.002 to 0.012 on DEVICE."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (K, N), generator=generator, dtype=torch.uint8).to(DEVICE)
    groups = 1 if group == -1 else K // group
    s = (0.002 + 0.01 * torch.rand(groups, N, generator=generator)).half().to(DEVICE)
    return weight_of(q, s)


def weight_of(q: Tensor, s: Tensor) -> Weight:
    """The packed weight of values q (K, N) in 0..15 with scales s (groups, N) float16."""
    (K, N), groups = q.shape, len(s)
    dense = ((q.half() - 8) * s.repeat_interleave(K // groups, dim=0)).double()
    workspace = torch.zeros(N // 128 * 16, dtype=torch.int32, device=q.device)
    return Weight(marlin.pack_weights(q), marlin.permute_scales(s), dense, workspace)


def random_A(M: int, K: int, seed: int = 1) -> Tensor:
    """Normal activations (M, K) float16 on DEVICE."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(M, K, generator=generator).half().to(DEVICE)


def mul(A: Tensor, weight: Weight, **hints: int) -> Tensor:
    """marlin.mul into a C of NaN."""
    C = torch.full((len(A), weight.dense.shape[1]), torch.nan, dtype=A.dtype, device=A.device)
    marlin.mul(A, weight.B, C, weight.s, weight.workspace, **hints)
    return C


def relative_error(C: Tensor, exact: Tensor) -> float:
    """Frobenius norm of C - exact over that of exact; not finite if an element of C is not."""
    return ((C.double() - exact).norm() / exact.norm()).item()


def bits(t: Tensor) -> Tensor:
    """A float16 tensor as int16: NaN equals itself, 0 is not -0."""
    return t.view(torch.int16)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of marlin.mul."""

    M: int
    K: int
    N: int
    group: int
    sms: int
    backend: str
    tile_idx: int  # into the table of the backend's kernel file


class Kind(NamedTuple):
    """What is different about a case for the kernel."""

    backend: str
    tile_idx: int
    shared: bool  # whether CTAs share output tiles
    long: bool  # whether a CTA goes round its ring of stages several times
    scales: int  # rows of them in 64 rows of the weight: 2 or 1; 0 if channelwise
    several: bool  # whether there are more tiles than CTAs


LONG = 64  # pieces of k64 x tile in the stripe of a CTA: twice what any ring holds


def cases_of_all_configs() -> dict[Kind, Case]:
    """The smallest call found for each configuration that runs on this device."""
    properties = torch.cuda.get_device_properties(DEVICE)
    device = (
        10 * properties.major + properties.minor,
        properties.multi_processor_count,
        getattr(properties, "shared_memory_per_block_optin", 99 * 1024),  # the least of any
    )
    # Short K first: racecheck does not come back from products of K = 4096 and more by clusters.
    sizes = sorted(_candidates(), key=lambda c: (c[1] > 2048, c[0] * c[1] * c[2]))
    found: dict[Kind, Case] = {}
    for backend in ("sm80", "sm90", "sm90_few"):
        choose = getattr(_C, f"choose_config_{backend}")
        for tile_idx in range(MAX_TILES):
            for M, K, N, group, sms in sizes:
                hints = {"num_sms_hint": sms, "tile_idx": tile_idx}
                config = choose(M, N, K, group, *device, **hints)
                if config["tile_idx"] < 0:
                    continue
                tiles = -(-N // config["features"]) * -(-M // config["tokens"])
                long = tiles * -(-K // 64) >= LONG * config["grid"]
                scales = 0 if group == -1 else 1 if group >= 64 else 2
                shared, several = config["num_locks"] > 0, tiles > config["grid"]
                kind = Kind(backend, tile_idx, shared, long, scales, several)
                found.setdefault(kind, Case(M, K, N, group, sms, backend, tile_idx))
    return found


@contextlib.contextmanager
def forced(backend: str, tile_idx: int = -1, overlap: bool = True) -> Iterator[None]:
    """Calls run on this backend and tile."""
    before = _C.set_cuda_options(backend, overlap, tile_idx)
    try:
        yield
    finally:
        _C.set_cuda_options(*before)


MAX_TILES = 32  # more than any table has


def _candidates() -> Iterator[tuple[int, int, int, int, int]]:
    for M in (1, 9, 33, 65, 130, 300, 1024):
        for K, group in ((256, 64), (1040, -1), (1024, 128), (512, 32), (4096, 32), (8192, 64)):
            for N in (64, 192, 320, 1024, 4096):
                for sms in (-1, 2, 8, 64):
                    yield M, K, N, group, sms
