"""The Marlin format: a layer's tensors are the buffers of marlin.Layer, under their own names.

    B     int32 (K / 16, 2 N)      s  float16 (K / group, N)      bias  (n,), optional

as csrc/layout.h draws them; K and N are k and n rounded up to what the format can hold. Depends on
layer.py and layout.py; called by model.py and write.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import layout
from ..layer import Layer
from .config import Scheme, Spec
from .errors import CheckpointError
from .files import NAMES, Shards
from .record import FLOATS, Expected, Linear, Record, read_bias, read_scales

MARK = "B"


def new_layer(k: int, n: int, spec: Spec, bias: bool, device: torch.device | str) -> Layer:
    """A layer that holds what the spec says.

    Raises:
        CheckpointError: there is no such layer.
    """
    try:
        return Layer(k, n, spec.groupsize, bias=bias, device=torch.device(device))
    except ValueError as error:
        raise CheckpointError(f"marlin.checkpoint: {error}") from error


def expected(name: str, k: int, n: int, spec: Spec) -> Expected:
    """Shape, types and necessity of each tensor of a layer (n, k)."""
    layer = new_layer(k, n, spec, False, "meta")
    tensors = {
        suffix: (tuple(tensor.shape), (NAMES[tensor.dtype],), True)
        for suffix, tensor in layer.state_dict().items()
        if suffix != "workspace"
    }
    return tensors | {"bias": ((n,), FLOATS, False)}


def read(
    shards: Shards, name: str, linear: Linear, scheme: Scheme, device: torch.device | str
) -> Record:
    """Reads a layer whose headers have been checked.

    Raises:
        CheckpointError: NaN or Inf.
    """
    B = shards.read(f"{name}.B", device)
    s = read_scales(shards, f"{name}.s", device)
    return Record(
        layout.unpack_weights(B)[: linear.k, : linear.n].t(),
        layout.unpermute_scales(s)[:, : linear.n].t().contiguous(),
        bias=read_bias(shards, name, device),
        groupsize=linear.spec.groupsize,
    )


def record_of(layer: Layer) -> Record:
    """What a layer holds."""
    return Record(
        layout.unpack_weights(layer.B)[: layer.k, : layer.n].t(),
        layout.unpermute_scales(layer.s)[:, : layer.n].t().contiguous(),
        bias=layer.bias,
        groupsize=-1 if layer.groupsize == layer.k else layer.groupsize,
    )


def layer_of(record: Record) -> Layer:
    """A layer, on the record's device, that holds the record."""
    spec = Spec(record.groupsize, record.zeros is None, record.g_idx is not None)
    layer = new_layer(record.k, record.n, spec, record.bias is not None, record.q.device)
    if record.zeros is not None or record.g_idx is not None:
        raise CheckpointError("marlin.checkpoint: zero points and act-order have no layer yet")
    K, N = 16 * layer.B.shape[0], layer.B.shape[1] // 2
    q = torch.full((K, N), 8, dtype=torch.uint8, device=record.q.device)
    q[: record.k, : record.n] = record.q.t()
    layer.B.copy_(layout.pack_weights(q))
    s = torch.zeros_like(layer.s)
    s[:, : record.n] = record.scales.t()
    layer.s.copy_(layout.permute_scales(s))
    if layer.bias is not None and record.bias is not None:
        layer.bias.copy_(record.bias)
    return layer


def write(name: str, record: Record) -> dict[str, Tensor]:
    """The tensors of a layer."""
    state = layer_of(record).state_dict()
    tensors = {f"{name}.{key}": value for key, value in state.items() if key != "workspace"}
    if record.bias is not None:
        tensors[f"{name}.bias"] = record.bias
    return tensors


def configuration(default: Spec, dynamic: dict[str, Any], lm_head: bool) -> dict[str, Any]:
    """The quantisation config of files of this format.

    Args:
        default: of the layers that `dynamic` says nothing about.
        dynamic: overrides by regular expression, as GPTQModel has them.
        lm_head: whether the output projection is compressed.
    """
    config = {
        "quant_method": "marlin",
        "checkpoint_format": "marlin",
        "bits": 4,
        "group_size": default.groupsize,
        "sym": default.symmetric,
        "desc_act": default.act_order,
        "lm_head": lm_head,
    }
    return config | ({"dynamic": dynamic} if dynamic else {})
