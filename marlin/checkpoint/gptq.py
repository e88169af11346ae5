"""GPTQ, versions 1 and 2, as AutoGPTQ and GPTQModel write it.

    qweight  int32 (k / 8, n)            a word holds 8 input features, the first lowest
    qzeros   int32 (groups, n / 8)       a word holds 8 output features, the first lowest
    scales   (groups, n)
    g_idx    int32 (k,)                  the group of each input feature
    bias     (n,)                        optional

Version 1 stores a zero point less one. The one was taken off all eight in a word at once, by
subtracting 0x11111111 from the word, so a zero point of 0 borrows from its neighbour: the word has
to be put right before it is taken apart. Depends on record.py; called by model.py and write.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .config import Scheme, Spec, written
from .errors import CheckpointError
from .files import Shards
from .record import (
    FLOATS,
    ZERO_POINT,
    Expected,
    Linear,
    Record,
    check_order,
    check_symmetric,
    integer_zeros,
    named,
    num_groups,
    pack_first,
    pack_last,
    plain_order,
    read_bias,
    read_scales,
    unpack_first,
    unpack_last,
)

MARK = "qweight"  # a linear layer is compressed if it has this tensor
ONES = 0x11111111


def expected(name: str, k: int, n: int, spec: Spec) -> Expected:
    """Shape, types and necessity of each tensor of a layer (n, k).

    Raises:
        CheckpointError: the format has no such layer.
    """
    if k % 8 or n % 8:
        raise CheckpointError(
            f"marlin.checkpoint: {name} is {n} x {k}, but GPTQ stores multiples of 8 only"
        )
    groups = num_groups(k, spec.groupsize)
    return {
        "qweight": ((k // 8, n), ("I32",), True),
        "qzeros": ((groups, n // 8), ("I32",), True),
        "scales": ((groups, n), FLOATS, True),
        "g_idx": ((k,), ("I32",), spec.act_order),
        "bias": ((n,), FLOATS, False),
    }


def _add_to_words(words: Tensor, addend: int) -> Tensor:
    """Adds to each word modulo 2**32."""
    wide = (words.long() + addend) & 0xFFFFFFFF
    return torch.where(wide >= 2**31, wide - 2**32, wide).int()


def read(
    shards: Shards, name: str, linear: Linear, scheme: Scheme, device: torch.device | str
) -> Record:
    """Reads a layer whose headers have been checked.

    Raises:
        CheckpointError: zero points or an order that are not what the config says; NaN or Inf.
    """
    key = f"{name}.qzeros"
    words = shards.read(key, device)
    zeros = unpack_last(_add_to_words(words, ONES * scheme.zero_offset), linear.n)
    if linear.spec.symmetric:
        other = unpack_last(_add_to_words(words, ONES * (1 - scheme.zero_offset)), linear.n)
        hint = ""
        if bool((other == 8).all()):
            names = ("gptq_v2", "gptq") if scheme.zero_offset else ("gptq", "gptq_v2")
            hint = (
                f" (as checkpoint_format {names[0]} it would be, but {scheme.path} says {names[1]})"
            )
        check_symmetric(shards, key, zeros, "sym is true", hint)
    return Record(
        unpack_first(shards.read(f"{name}.qweight", device)).t(),
        read_scales(shards, f"{name}.scales", device).t().contiguous(),
        None if linear.spec.symmetric else zeros.t().contiguous(),
        _read_order(shards, f"{name}.g_idx", linear, scheme, device),
        read_bias(shards, name, device),
        linear.spec.groupsize,
    )


def _read_order(
    shards: Shards, key: str, linear: Linear, scheme: Scheme, device: torch.device | str
) -> Tensor | None:
    """The g_idx of a layer; None if it is that of a layer without act-order."""
    if key not in shards:
        return None
    groupsize = linear.spec.groupsize
    g_idx = shards.read(key, device)
    check_order(shards, key, g_idx, groupsize)
    trivial = torch.equal(g_idx, plain_order(linear.k, groupsize, device))
    if not trivial and not linear.spec.act_order:
        raise CheckpointError(
            f"marlin.checkpoint.load: {shards[key].file} has {key} that is not i // "
            f"{groupsize}, but desc_act is false in {scheme.path}"
        )
    return None if trivial else g_idx


def write(name: str, record: Record, version: int = 1) -> dict[str, Tensor]:
    """The tensors of a layer.

    Args:
        name: of the layer.
        record: what it holds.
        version: 1; or 2 for a checkpoint with zero points, which GPTQModel refuses in version 1
            from others than itself, as the first writers got them wrong.

    Raises:
        CheckpointError: the format has no such layer.
    """
    expected(name, record.k, record.n, Spec(record.groupsize))
    zeros, g_idx = integer_zeros(name, record, "gptq"), record.g_idx
    if zeros is None:
        zeros = torch.full_like(record.scales, ZERO_POINT, dtype=torch.uint8)
    if g_idx is None:
        g_idx = plain_order(record.k, record.groupsize, record.q.device)
    tensors = {
        "qweight": pack_first(record.q.t()),
        "qzeros": _add_to_words(pack_last(zeros.t()), -ONES if version == 1 else 0),
        "scales": record.scales.t().contiguous(),
        "g_idx": g_idx,
    }
    return named(name, record, tensors)


def configuration(default: Spec, dynamic: dict[str, Any], lm_head: bool) -> dict[str, Any]:
    """The quantisation config of files of this format; arguments as of config.written."""
    from .. import __version__

    stored = "gptq" if default.symmetric else "gptq_v2"
    meta = {"quantizer": [f"marlin-int4:{__version__}"]}
    config = written("gptq", stored, default, dynamic, lm_head)
    return config | {"pack_dtype": "int32", "meta": meta}
