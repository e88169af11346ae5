"""A linear layer with 4-bit weights, and the swap of a model's nn.Linear for it.

Depends on ops.py and layout.py. Called by users, gptq/ and the checkpoint readers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from . import layout, ops

_ZERO_WORD = int.from_bytes(bytes([0x11 * layout.ZERO_POINT] * 4), "little", signed=True)
_PACK_FEATURES = 1024  # features packed at a time: bounds the float32 temporaries


def _check_finite(name: str, values: Tensor) -> None:
    low, high = torch.aminmax(values.float())  # NaN if any is; a pass less than isfinite
    if not torch.isfinite(torch.stack((low, high))).all():
        raise ValueError(f"marlin.Layer.pack: {name} has NaN or Inf but should be finite")


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


class Layer(nn.Module):
    """``y = x @ W.t() + bias`` with W in 4 bits.

    The buffers are those of the published Marlin: ``B`` (K / 16, 2 N) int32 and ``s`` (K / group,
    N) float16, here with an optional ``bias`` (n) float16. K and N are infeatures and outfeatures
    rounded up to what the format can hold: K to a multiple of the group (of 16 for one group), N to
    a multiple of 64. What is added weighs nothing.

    The attributes ``k``, ``n`` and ``groupsize`` are the sizes without padding; ``groupsize`` is k
    for a single group. A new layer holds zeros. It runs on a CPU in float16, bfloat16 and float32,
    on a GPU in float16; ``s`` stays float16 whatever dtype the module is cast to.

    Args:
        infeatures: k, at least 1.
        outfeatures: n, at least 1.
        groupsize: input features that share a scale: -1 for all, or a multiple of 16 (a GPU takes
            32, 64, 128).
        bias: whether to add a bias.
        device: of the buffers.

    Raises:
        ValueError: a size that no layer can have.

    Example:
        >>> layer = marlin.Layer(576, 192, groupsize=64)
        >>> layer.pack(linear, scales)
        >>> y = layer(x)
    """

    B: Tensor
    s: Tensor
    bias: Tensor | None
    workspace: Tensor

    def __init__(
        self,
        infeatures: int,
        outfeatures: int,
        groupsize: int = -1,
        bias: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if infeatures < 1 or outfeatures < 1:
            raise ValueError(
                f"marlin.Layer: infeatures is {infeatures} and outfeatures {outfeatures} "
                "but both should be at least 1"
            )
        self.k = infeatures
        self.n = outfeatures
        self.groupsize = infeatures if groupsize == -1 else groupsize
        K, N, group = self._packed_sizes()
        B = torch.full((K // 16, 2 * N), _ZERO_WORD, dtype=torch.int32, device=device)
        self.register_buffer("B", B)
        self.register_buffer("s", torch.zeros(K // group, N, dtype=torch.half, device=device))
        zeros = torch.zeros(outfeatures, dtype=torch.half, device=device) if bias else None
        self.register_buffer("bias", zeros)
        # For callers who hand it to marlin.mul, which asks for it but does not use it.
        workspace = torch.zeros(N // 128 * 16, dtype=torch.int32, device=device)
        self.register_buffer("workspace", workspace, persistent=False)

    def _packed_sizes(self) -> tuple[int, int, int]:
        """Return K, N and group of the buffers for the attributes as they are now."""
        N = _round_up(self.n, layout.TILE_N)
        if self.groupsize in (-1, self.k):
            K = _round_up(self.k, layout.TILE_K)
            return K, N, K
        if self.groupsize < 1 or self.groupsize % layout.TILE_K:
            raise ValueError(
                f"marlin.Layer: groupsize is {self.groupsize} but should be -1 "
                f"or a multiple of {layout.TILE_K}"
            )
        return _round_up(self.k, self.groupsize), N, self.groupsize

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., n) of the dtype of x for x (..., k)."""
        bias = self.bias
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        return ops.linear(x, self.B, self.s, bias, self.k, self.n)

    @torch.no_grad()
    def pack(self, linear: nn.Linear, scales: Tensor) -> None:
        """Quantise a weight with given scales, ``q = round(w / s) + 8`` within 0..15, and store it.

        Goes by ``k``, ``n`` and ``groupsize`` as they are now; the buffers keep their device. The
        bias is taken over if this layer has one, else left alone.

        Args:
            linear: its weight is (n, k), any float dtype.
            scales: (n, groups), groups = k / groupsize rounded up; a scale of 0 stores zeros.

        Raises:
            ValueError: a wrong shape, or NaN or Inf in the weight or scales; the layer is as
                before.

        Example:
            >>> layer.pack(linear, quantize.scales_for(linear.weight, layer.groupsize))
        """
        K, N, group = self._packed_sizes()
        weight = linear.weight.detach()
        if weight.shape != (self.n, self.k):
            raise ValueError(
                f"marlin.Layer.pack: linear.weight has shape {tuple(weight.shape)} "
                f"but should be {(self.n, self.k)}"
            )
        if scales.shape != (self.n, K // group):
            raise ValueError(
                f"marlin.Layer.pack: scales has shape {tuple(scales.shape)} "
                f"but should be {(self.n, K // group)}"
            )
        if self.bias is not None and linear.bias is None:
            raise ValueError("marlin.Layer.pack: linear.bias is None but this layer has a bias")
        # What the product multiplies by is the float16 scale, so that is what divides here.
        scales = scales.detach().to(weight.device, torch.half)
        _check_finite("scales as float16", scales)
        s = torch.zeros(K // group, N, dtype=torch.half, device=weight.device)
        s[:, : self.n] = scales.t()
        B = torch.empty(K // 16, 2 * N, dtype=torch.int32, device=self.B.device)
        for n in range(0, N, _PACK_FEATURES):
            some = slice(n, min(n + _PACK_FEATURES, N))
            q = self._quantise(weight[some], scales[some], some.stop - n, K, group)
            B[:, 2 * n : 2 * some.stop] = layout.pack_weights(q.t())
        self._store("B", B)
        self._store("s", layout.permute_scales(s))
        if self.bias is not None and linear.bias is not None:
            self._store("bias", linear.bias.detach().to(self.bias.dtype))

    @staticmethod
    def _quantise(weight: Tensor, scales: Tensor, N: int, K: int, group: int) -> Tensor:
        """Return the stored values (N, K) uint8 of some features, padded with zeros."""
        s = scales.float()
        s = s.masked_fill_(s == 0, torch.inf)[:, :, None]  # w / inf is a stored zero
        w = torch.zeros(N, K, device=weight.device)
        w[: weight.shape[0], : weight.shape[1]] = weight
        _check_finite("linear.weight", w)
        w = w.view(N, -1, group)
        w[: weight.shape[0]] /= s
        return w.round_().add_(layout.ZERO_POINT).clamp_(0, 15).to(torch.uint8).view(N, K)

    def _store(self, name: str, value: Tensor) -> None:
        """Set a buffer: in place if its shape is right, so that whoever shares it sees it."""
        old: Tensor = getattr(self, name)
        if old.shape == value.shape:
            old.copy_(value)
        else:
            setattr(self, name, value.to(old.device))

    @torch.no_grad()
    def unpack(self) -> Tensor:
        """Return the dense weight (n, k), float16, that the packed one stands for.

        Example:
            >>> dense = nn.Linear(layer.k, layer.n, bias=False, dtype=torch.half)
            >>> dense.weight.data = layer.unpack()
        """
        q = layout.unpack_weights(self.B)[: self.k, : self.n]
        group = self.B.shape[0] * layout.TILE_K // self.s.shape[0]
        s = layout.unpermute_scales(self.s).repeat_interleave(group, dim=0)[: self.k, : self.n]
        return ((q.to(torch.half) - layout.ZERO_POINT) * s).t().contiguous()

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Layer:
        # module.float() or .bfloat16() would cast the scales too; the format has them in float16.
        s = self.s
        super()._apply(fn, *args, **kwargs)
        if self.s.dtype != torch.half:
            self.s = s.to(self.s.device)
        return self

    def extra_repr(self) -> str:
        """Return the sizes, for print(model)."""
        group = -1 if self.groupsize == self.k else self.groupsize
        return f"{self.k}, {self.n}, groupsize={group}, bias={self.bias is not None}"


def replace_linear(
    module: nn.Module,
    name_filter: Callable[[str], bool] = lambda name: True,
    groupsize: int = -1,
    name: str = "",
) -> None:
    """Put an unpacked Layer in the place of every nn.Linear below a module; biases are kept.

    Args:
        module: searched with everything below it; changed in place.
        name_filter: takes the dotted name of a linear, says whether to replace it.
        groupsize: of the new layers.
        name: dotted name of module itself, put before the names below it.

    Raises:
        ValueError: groupsize is one that no layer can have.

    Example:
        >>> marlin.replace_linear(model, lambda name: name != "lm_head", groupsize=128)
    """
    _replace_linear(module, name_filter, groupsize, name, {})


def _replace_linear(
    module: nn.Module,
    name_filter: Callable[[str], bool],
    groupsize: int,
    name: str,
    made: dict[nn.Module, Layer],
) -> None:
    for child_name, child in list(module._modules.items()):
        if child is None or isinstance(child, Layer):
            continue
        full_name = f"{name}.{child_name}" if name else child_name
        # nn.MultiheadAttention reads the weight of its NonDynamicallyQuantizableLinear directly.
        if isinstance(child, nn.Linear) and not isinstance(child, NonDynamicallyQuantizableLinear):
            if name_filter(full_name):
                if child not in made:  # a linear that is shared stays shared
                    made[child] = _layer_for(child, groupsize)
                setattr(module, child_name, made[child])
        else:
            _replace_linear(child, name_filter, groupsize, full_name, made)


def _layer_for(linear: nn.Linear, groupsize: int) -> Layer:
    has_bias = linear.bias is not None
    device = linear.weight.device
    layer = Layer(linear.in_features, linear.out_features, groupsize, has_bias, device)
    if layer.bias is not None:
        layer.bias.copy_(linear.bias.detach())
    return layer.train(linear.training)
