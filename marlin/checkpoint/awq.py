"""AWQ, version "gemm", as AutoAWQ and GPTQModel write it. It is read, not written.

    qweight  int32 (k, n / 8)            a word holds 8 output features, in the order below
    qzeros   int32 (groups, n / 8)       in the same order
    scales   (groups, n)
    bias     (n,)                        optional

Nibble i of a word, least significant first, is output feature ORDER[i] of the word's eight.
Depends on record.py; called by model.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import at_a_time
from .config import Scheme, Spec
from .errors import CheckpointError
from .files import Shards
from .record import (
    FLOATS,
    Expected,
    Linear,
    Record,
    check_symmetric,
    num_groups,
    read_bias,
    read_scales,
)

MARK = "qweight"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_CHUNK_WORDS = 1 << 16  # on a CPU


def expected(name: str, k: int, n: int, spec: Spec) -> Expected:
    """Shape, types and necessity of each tensor of a layer (n, k).

    Raises:
        CheckpointError: the format has no such layer.
    """
    if n % 8:
        raise CheckpointError(
            f"marlin.checkpoint: {name} has {n} output features, but AWQ stores multiples of 8 only"
        )
    groups = num_groups(k, spec.groupsize)
    return {
        "qweight": ((k, n // 8), ("I32",), True),
        "qzeros": ((groups, n // 8), ("I32",), True),
        "scales": ((groups, n), FLOATS, True),
        "bias": ((n,), FLOATS, False),
    }


def _unpack(words: Tensor) -> Tensor:
    """(m, n / 8) int32 to (m, n) uint8 in the order of the features."""
    # Even features are the lower four nibbles, odd ones the upper four: move each four apart, to
    # every second byte of 64 bits, and put one between the others; a few rows at a time, in cache.
    out = torch.empty(words.shape, dtype=torch.int64, device=words.device)
    num_rows = max(1, at_a_time(_CHUNK_WORDS, words.device) // max(1, words.shape[1]))
    for row in range(0, words.shape[0], num_rows):
        even = out[row : row + num_rows].copy_(words[row : row + num_rows])
        odd = (even >> 16).bitwise_and_(0xFFFF)
        even.bitwise_and_(0xFFFF)
        for four in (even, odd):
            four.bitwise_or_(four << 24).bitwise_and_(0x000000FF000000FF)
            four.bitwise_or_(four << 12).bitwise_and_(0x000F000F000F000F)
        even.bitwise_or_(odd << 8)
    return out.view(torch.uint8)


def read(
    shards: Shards, name: str, linear: Linear, scheme: Scheme, device: torch.device | str
) -> Record:
    """Reads a layer whose headers have been checked.

    Raises:
        CheckpointError: zero points that are not what the config says; NaN or Inf.
    """
    key = f"{name}.qzeros"
    zeros = _unpack(shards.read(key, device))
    if linear.spec.symmetric:
        check_symmetric(shards, key, zeros, f"{scheme.path} says that there are none")
    return Record(
        _unpack(shards.read(f"{name}.qweight", device)).t(),
        read_scales(shards, f"{name}.scales", device).t().contiguous(),
        None if linear.spec.symmetric else zeros.t().contiguous(),
        None,
        read_bias(shards, name, device),
        linear.spec.groupsize,
    )
