"""The Marlin format: a layer's tensors are the buffers of marlin.Layer, under their own names.

    B     int32 (K / 16, 2 N)                s     (K / group, N)
    z     (K / group, N), of s's type        perm  int32 (K,)           bias  (n,), optional

as csrc/layout.h draws them; K and N are k and n rounded up to what the format can hold. The
published format is B, s in float16 and bias; z and perm are there if the config says that the
layers are not symmetric, or have act-order. Depends on layer.py; called by model.py and write.py.
"""

from __future__ import annotations

import pathlib
from typing import Any

import torch
from torch import Tensor

from ..layer import Layer
from .config import Scheme, Spec, written
from .errors import CheckpointError
from .files import DTYPES, NAMES, Shards
from .record import FLOATS, HALVES, Expected, Linear, Record, named, read_bias, read_scales

MARK = "B"


def new_layer(
    k: int, n: int, spec: Spec, bias: bool, dtype: torch.dtype, device: torch.device | str
) -> Layer:
    """An empty layer for what the spec says.

    Raises:
        CheckpointError: there is no such layer, or none that runs on the device.
    """
    try:
        return Layer(
            k,
            n,
            spec.groupsize,
            bias=bias,
            dtype=dtype,
            zero_points=not spec.symmetric,
            act_order=spec.act_order,
            device=device,
        )
    except ValueError as error:
        raise CheckpointError(f"marlin.checkpoint: {error}") from error


def expected(name: str, k: int, n: int, spec: Spec) -> Expected:
    """Shape, types and necessity of each tensor of a layer (n, k)."""
    layer = new_layer(k, n, spec, False, torch.float16, "meta")
    tensors = {
        suffix: (tuple(tensor.shape), HALVES if tensor.is_floating_point() else ("I32",), True)
        for suffix, tensor in layer.state_dict().items()
    }
    return tensors | {"bias": ((n,), FLOATS, False)}


def read_layer(shards: Shards, name: str, linear: Linear, device: torch.device | str) -> Layer:
    """Reads a layer whose headers have been checked; nothing is repacked.

    Raises:
        CheckpointError: NaN or Inf; s and z of different types; a perm that is none.
    """
    dtype = DTYPES[shards[f"{name}.s"].dtype]
    bias = read_bias(shards, name, device)
    layer = new_layer(linear.k, linear.n, linear.spec, bias is not None, dtype, "meta")
    for suffix, buffer in layer.state_dict().items():
        key = f"{name}.{suffix}"
        if suffix == "bias":
            layer.bias = None if bias is None else bias.to(dtype)
            continue
        if buffer.is_floating_point() and shards[key].dtype != NAMES[dtype]:
            raise CheckpointError(
                f"marlin.checkpoint.load: {shards[key].file} has {key} of type "
                f"{shards[key].dtype}, but it should be {NAMES[dtype]} as {name}.s is"
            )
        read = read_scales if buffer.is_floating_point() else Shards.read
        setattr(layer, suffix, read(shards, key, device))
    layer.workspace = torch.zeros_like(layer.workspace, device=device)
    check_layer(layer, name, shards[f"{name}.s"].file)
    return layer


def check_layer(layer: Layer, name: str, file: pathlib.Path) -> None:
    """Checks values that a kernel believes without looking.

    Raises:
        CheckpointError: perm is no permutation, or NaN or Inf in scales or zero points.
    """
    prefix = f"marlin.checkpoint.load: {file} has {name}"
    for suffix, values in (("s", layer.s), ("z", layer.z)):
        if values is not None and not bool(torch.isfinite(values).all()):
            raise CheckpointError(f"{prefix}.{suffix} with NaN or Inf, but it should be finite")
    if layer.perm is not None:
        plain = torch.arange(len(layer.perm), dtype=torch.int32, device=layer.perm.device)
        if not torch.equal(layer.perm.sort().values, plain):
            raise CheckpointError(
                f"{prefix}.perm, which should be a permutation of 0..{len(plain) - 1} but is not"
            )


def read(
    shards: Shards, name: str, linear: Linear, scheme: Scheme, device: torch.device | str
) -> Record:
    """Reads a layer whose headers have been checked.

    Raises:
        CheckpointError: as read_layer.
    """
    return record_of(read_layer(shards, name, linear, device))


def record_of(layer: Layer) -> Record:
    """What a layer holds."""
    q, scales, zeros, g_idx = layer.unpack_values()
    if zeros is not None and torch.equal(zeros, zeros.clamp(0, 15).round()):
        zeros = zeros.to(torch.uint8)
    groupsize = -1 if layer.groupsize == layer.k else layer.groupsize
    return Record(q, scales, zeros, g_idx, layer.bias, groupsize)


def layer_of(record: Record) -> Layer:
    """A layer, on the record's device, that holds the record.

    Raises:
        CheckpointError: no kernel runs such a layer there.
    """
    spec = Spec(record.groupsize, record.zeros is None, record.g_idx is not None)
    bias, dtype = record.bias is not None, record.scales.dtype
    layer = new_layer(record.k, record.n, spec, bias, dtype, record.q.device)
    layer.pack_values(record.q, record.scales, record.zeros, record.g_idx, record.bias)
    return layer


def write(name: str, record: Record) -> dict[str, Tensor]:
    """The tensors of a layer."""
    return named(name, record, layer_of(record).state_dict())


def configuration(default: Spec, dynamic: dict[str, Any], lm_head: bool) -> dict[str, Any]:
    """The quantisation config of files of this format; arguments as of config.written."""
    return written("marlin", "marlin", default, dynamic, lm_head)
