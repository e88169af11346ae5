"""compressed-tensors, format "pack-quantized", as llm-compressor writes it.

    weight_packed      int32 (n, k / 8)       along k, the first lowest, rounded up
    weight_scale       (n, groups)
    weight_zero_point  int32 (n / 8, groups)  along n, only if asymmetric; int8 (n, groups) of
                                              value - 8 in the first versions
    weight_shape       int64 (2,)             n, k
    weight_g_idx       int32 (k,)             only with act-order, which version 0.19 gave up
    bias               (n,)                   optional

Depends on record.py; called by model.py and write.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .config import Scheme, Spec
from .errors import CheckpointError
from .files import Shards
from .record import (
    FLOATS,
    Expected,
    Linear,
    Record,
    check_order,
    integer_zeros,
    named,
    num_groups,
    pack_last,
    read_bias,
    read_scales,
    unpack_last,
)

MARK = "weight_packed"


def expected(name: str, k: int, n: int, spec: Spec) -> Expected:
    """Shape, types and necessity of each tensor of a layer (n, k)."""
    groups = num_groups(k, spec.groupsize)
    tensors = {
        "weight_packed": ((n, -(-k // 8)), ("I32",), True),
        "weight_scale": ((n, groups), FLOATS, True),
        "weight_shape": ((2,), ("I64", "I32"), True),
        "bias": ((n,), FLOATS, False),
    }
    if not spec.symmetric:
        tensors["weight_zero_point"] = ((-(-n // 8), groups), ("I32",), True)
    if spec.act_order:
        tensors["weight_g_idx"] = ((k,), ("I32",), True)
    return tensors


def expected_of(shards: Shards, name: str, k: int, n: int, spec: Spec) -> Expected:
    """As `expected`, of the version that wrote these tensors."""
    tensors = dict(expected(name, k, n, spec))
    entry = shards.get(f"{name}.weight_zero_point")
    if not spec.symmetric and entry is not None and entry.dtype == "I8":
        tensors["weight_zero_point"] = ((n, num_groups(k, spec.groupsize)), ("I8",), True)
    return tensors


def read(
    shards: Shards, name: str, linear: Linear, scheme: Scheme, device: torch.device | str
) -> Record:
    """Reads a layer whose headers have been checked.

    Raises:
        CheckpointError: a weight_shape or an order that is not what the config says; NaN or Inf.
    """
    key = f"{name}.weight_shape"
    shape = shards.read(key).tolist()
    if shape != [linear.n, linear.k]:
        raise CheckpointError(
            f"marlin.checkpoint.load: {shards[key].file} has {key} of {shape}, but config.json "
            f"needs {[linear.n, linear.k]}"
        )
    zeros = g_idx = None
    if not linear.spec.symmetric:
        zeros = _read_zeros(shards, f"{name}.weight_zero_point", linear.n, device)
    if linear.spec.act_order:
        g_idx = shards.read(f"{name}.weight_g_idx", device)
        check_order(shards, f"{name}.weight_g_idx", g_idx, linear.spec.groupsize)
    return Record(
        unpack_last(shards.read(f"{name}.weight_packed", device), linear.k),
        read_scales(shards, f"{name}.weight_scale", device),
        zeros,
        g_idx,
        read_bias(shards, name, device),
        linear.spec.groupsize,
    )


def _read_zeros(shards: Shards, key: str, n: int, device: torch.device | str) -> Tensor:
    stored = shards.read(key, device)
    if stored.dtype == torch.int32:
        return unpack_last(stored.t(), n).t().contiguous()
    low, high = int(stored.min()), int(stored.max())
    if low < -8 or high > 7:
        raise CheckpointError(
            f"marlin.checkpoint.load: {shards[key].file} has {key} with a zero point "
            f"{low if low < -8 else high}, but it should be of -8..7"
        )
    return (stored + 8).to(torch.uint8)


def write(name: str, record: Record) -> dict[str, Tensor]:
    """The tensors of a layer.

    Raises:
        CheckpointError: the layer has act-order, which the format gave up.
    """
    if record.g_idx is not None:
        raise CheckpointError(
            f"marlin.checkpoint: {name} has act-order (g_idx), which compressed-tensors gave up in "
            "version 0.19; write gptq or marlin instead"
        )
    tensors = {
        "weight_packed": pack_last(record.q),
        "weight_scale": record.scales.contiguous(),
        "weight_shape": torch.tensor([record.n, record.k]),
    }
    zeros = integer_zeros(name, record, "compressed-tensors")
    if zeros is not None:
        tensors["weight_zero_point"] = pack_last(zeros.t()).t().contiguous()
    return named(name, record, tensors)


def configuration(groups: dict[Spec, list[str] | None], ignore: list[str]) -> dict[str, Any]:
    """The quantisation config of files of this format.

    Args:
        groups: the layers of each kind; None for all that no other kind names.
        ignore: linear layers that are not compressed.
    """
    config_groups = {}
    for i, (spec, names) in enumerate(groups.items()):
        weights = {
            "num_bits": 4,
            "type": "int",
            "symmetric": spec.symmetric,
            "strategy": "channel" if spec.groupsize == -1 else "group",
            "group_size": None if spec.groupsize == -1 else spec.groupsize,
            "actorder": None,
            "block_structure": None,
            "dynamic": False,
            "observer": "minmax",
            "observer_kwargs": {},
        }
        config_groups[f"group_{i}"] = {
            "targets": ["Linear"] if names is None else names,
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": config_groups,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
