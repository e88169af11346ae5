"""A linear layer with 4-bit weights, and the swap of a model's nn.Linear for it.

Depends on ops.py, layout.py, quantize.py and support.py. Called by users, gptq/ and the checkpoint
readers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from . import layout, ops, quantize, support

_ZERO_WORD = int.from_bytes(bytes([0x11 * layout.ZERO_POINT] * 4), "little", signed=True)
_PACK_FEATURES = 1024  # features packed at a time: bounds the float32 temporaries


def _check_finite(caller: str, name: str, values: Tensor, first_row: int = 0) -> None:
    low, high = torch.aminmax(values.float())  # NaN if any is; a pass less than isfinite
    if not torch.isfinite(torch.stack((low, high))).all():
        row, column = (~torch.isfinite(values)).nonzero()[0].tolist()
        raise ValueError(
            f"marlin.Layer.{caller}: {name} has NaN or Inf, {values[row, column].item()} at "
            f"({first_row + row}, {column}), but should be finite"
        )


def _check_grid(
    caller: str,
    name: str,
    values: Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Return scales or zero points as the layer holds them: what it multiplies by divides too."""
    where = f"marlin.Layer.{caller}: {name}"
    if values.shape != shape:
        raise ValueError(f"{where} has shape {tuple(values.shape)} but should be {shape}")
    dtypes = {dtype, torch.float32, torch.float64}
    if name == "zeros" and not values.is_floating_point() and not values.is_complex():
        low, high = (int(value) for value in torch.aminmax(values))
        if low < 0 or high > 15:
            value = low if low < 0 else high
            raise ValueError(f"{where} has {value} but integers should be within 0..15")
    elif values.dtype not in dtypes:
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(f"{where} is {values.dtype} but should be {kind}, as the layer, or wider")
    values = values.detach().to(device, dtype)
    _check_finite(caller, f"{name} as {str(dtype).removeprefix('torch.')}", values)
    return values


class _Grid(NamedTuple):
    """Scales and zero points (n, groups) as stored; order (k): the input features by group."""

    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


class Values(NamedTuple):
    """What a layer stores, in the order of the model: weight[n, k] = (q - zeros) * scales."""

    q: Tensor  # (n, k) uint8, 0..15
    scales: Tensor  # (n, groups), dtype of the layer
    zeros: Tensor | None  # (n, groups), dtype of the layer; None: all are 8
    g_idx: Tensor | None  # (k,) int32, the group of each input feature; None: k // groupsize


class Layer(nn.Module):
    """``y = x @ W.t() + bias`` with W in 4 bits.

    The buffers are those of the published Marlin: ``B`` (K / 16, 2 N) int32 and ``s`` (K / group,
    N) dtype, here with an optional ``bias`` (n) dtype. K and N are infeatures and outfeatures
    rounded up to what the format can hold: K to a multiple of the group (of 16 for one group), N to
    a multiple of 64. What is added weighs nothing. Two buffers exist only if asked for: ``z``
    (K / group, N) dtype, the zero points, and ``perm`` (K) int32, the columns of x in the order of
    the groups.

    The attributes ``k``, ``n`` and ``groupsize`` are the sizes without padding; ``groupsize`` is k
    for a single group. A new layer holds zeros. On a CPU it takes x in float16, bfloat16 and
    float32; ``can_run`` says what a GPU takes. ``s`` and ``z`` keep their dtype whatever the module
    is cast to.

    Args:
        infeatures: k, at least 1.
        outfeatures: n, at least 1.
        groupsize: input features that share a scale: -1 for all, or a multiple of 16 (a GPU takes
            32, 64, 128).
        bias: whether to add a bias.
        dtype: of scales, zero points and bias, float16 or bfloat16.
        zero_points: whether each group has a zero point, rather than 8.
        act_order: whether the members of a group lie anywhere among the input features (GPTQ's
            ``g_idx``), rather than next to each other.
        device: of the buffers.

    Raises:
        ValueError: a size, dtype or device that no layer can have.

    Example:
        >>> layer = marlin.Layer(576, 192, groupsize=64)
        >>> layer.pack(linear, scales)
        >>> y = layer(x)
    """

    B: Tensor
    s: Tensor
    z: Tensor | None
    perm: Tensor | None
    bias: Tensor | None
    workspace: Tensor

    def __init__(
        self,
        infeatures: int,
        outfeatures: int,
        groupsize: int = -1,
        bias: bool = False,
        dtype: torch.dtype = torch.float16,
        zero_points: bool = False,
        act_order: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if infeatures < 1 or outfeatures < 1:
            raise ValueError(
                f"marlin.Layer: infeatures is {infeatures} and outfeatures {outfeatures} "
                "but both should be at least 1"
            )
        if dtype not in support.LAYER_DTYPES:
            raise ValueError(f"marlin.Layer: dtype is {dtype} but should be float16 or bfloat16")
        self.k = infeatures
        self.n = outfeatures
        self.groupsize = infeatures if groupsize == -1 else groupsize
        K, N, group = self._packed_sizes()
        B = torch.full((K // 16, 2 * N), _ZERO_WORD, dtype=torch.int32, device=device)
        s = torch.zeros(K // group, N, dtype=dtype, device=device)
        zeros = torch.full_like(s, layout.ZERO_POINT) if zero_points else None
        perm = torch.arange(K, dtype=torch.int32, device=device) if act_order else None
        no_bias = torch.zeros(outfeatures, dtype=dtype, device=device) if bias else None
        self.register_buffer("B", B)
        self.register_buffer("s", s)
        self.register_buffer("z", zeros)
        self.register_buffer("perm", perm)
        self.register_buffer("bias", no_bias)
        # For callers who hand it to marlin.mul, which asks for it but does not use it.
        workspace = torch.zeros(N // 128 * 16, dtype=torch.int32, device=device)
        self.register_buffer("workspace", workspace, persistent=False)
        self._check_device(self.B.device)

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

    def _check_device(self, device: torch.device) -> None:
        """Refuse a device that no kernel runs this layer on."""
        group = -1 if self.groupsize == self.k else self.groupsize
        answer = support.can_run(
            self.k, self.n, group, self.s.dtype, self.z is not None, self.perm is not None, device
        )
        if not answer:
            raise ValueError(f"marlin.Layer: no kernel runs it on {device}: {answer.reason}")

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., n) of the dtype of x for x (..., k)."""
        bias = self.bias
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        return ops.linear(x, self.B, self.s, bias, self.k, self.n, self.z, self.perm)

    # ----------------------------------------------------------------------------------------------
    # Packing
    # ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def pack(
        self,
        linear: nn.Linear,
        scales: Tensor,
        zeros: Tensor | None = None,
        g_idx: Tensor | None = None,
    ) -> None:
        """Quantise a weight on a given grid, ``q = round(w / s + z)`` within 0..15, and store it.

        Goes by ``k``, ``n`` and ``groupsize`` as they are now; the buffers keep their device. The
        bias is taken over if this layer has one, else left alone.

        Args:
            linear: its weight is (n, k), any float dtype.
            scales: (n, groups), groups = k / groupsize rounded up; a scale of 0 stores zeros.
            zeros: (n, groups), integers 0..15 or any finite floats, if the layer has zero points.
            g_idx: (k), any integer dtype, the group of each input feature, if the layer has
                act-order. Each group has groupsize members, only the last one may have fewer.

        Raises:
            ValueError: a wrong shape, dtype or value, or NaN or Inf in the weight, scales or zeros;
                the layer is as before.

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
        if self.bias is not None and linear.bias is None:
            raise ValueError("marlin.Layer.pack: linear.bias is None but this layer has a bias")
        grid = self._grid("pack", scales, zeros, g_idx, weight.device)

        def values(some: slice) -> Tensor:
            part = weight[some]
            if len(part):
                _check_finite("pack", "linear.weight", part, some.start)
            w = torch.zeros(some.stop - some.start, K, device=weight.device)
            n = len(part)
            w[:n, : self.k] = part if grid.order is None else part[:, grid.order]
            w = w.view(len(w), -1, group)
            s = grid.scales[some].float()[:, :, None]
            w[:n] /= s.masked_fill(s == 0, torch.inf)  # w / inf is a stored zero
            if grid.zeros is None:
                w = w.round_().add_(layout.ZERO_POINT)
            else:
                w[:n] = w[:n].add_(grid.zeros[some].float()[:, :, None]).round_()
                w[n:] = layout.ZERO_POINT  # padding
            w = w.clamp_(0, 15).to(torch.uint8).view(-1, K)
            w[:, self.k :] = layout.ZERO_POINT
            return w

        bias = linear.bias.detach() if self.bias is not None else None
        self._pack(values, grid, bias)

    @torch.no_grad()
    def pack_values(
        self,
        q: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        g_idx: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        """Store a weight that is quantised already, as checkpoints hold it.

        Goes by ``k``, ``n`` and ``groupsize`` as they are now; the buffers keep their device.

        Args:
            q: (n, k) uint8 or any integer dtype, 0..15, input features in the order of the model.
            scales: (n, groups), groups = k / groupsize rounded up.
            zeros: (n, groups), integers 0..15 or any finite floats, if the layer has zero points.
            g_idx: (k), any integer dtype, the group of each input feature, if the layer has
                act-order; a layer without takes one that says k // groupsize. Each group has
                groupsize members, only the last one may have fewer.
            bias: (n), if the layer has a bias.

        Raises:
            ValueError: a wrong shape, dtype or value; the layer is as before.

        Example:
            >>> layer = marlin.Layer(128, 64, 32, zero_points=True)
            >>> q = torch.randint(0, 16, (64, 128), dtype=torch.uint8)
            >>> layer.pack_values(q, torch.rand(64, 4), torch.randint(0, 16, (64, 4)))
        """
        K, _, _ = self._packed_sizes()
        if q.shape != (self.n, self.k):
            raise ValueError(
                f"marlin.Layer.pack_values: q has shape {tuple(q.shape)} "
                f"but should be {(self.n, self.k)}"
            )
        if q.is_floating_point() or q.is_complex() or q.dtype == torch.bool:
            raise ValueError(
                f"marlin.Layer.pack_values: q is {q.dtype} but should be of an integer dtype"
            )
        # a transposed view, as checkpoints give, is read as it lies in memory: 8 times as fast
        low, high = (int(value) for value in torch.aminmax(q if q.is_contiguous() else q.t()))
        if low < 0 or high > 15:
            value = low if low < 0 else high
            raise ValueError(f"marlin.Layer.pack_values: q has {value} but should be within 0..15")
        if (bias is None) != (self.bias is None):
            state = "None but this layer has a" if bias is None else "given but this layer has no"
            raise ValueError(f"marlin.Layer.pack_values: bias is {state} bias")
        if bias is not None and bias.shape != (self.n,):
            raise ValueError(
                f"marlin.Layer.pack_values: bias has shape {tuple(bias.shape)} "
                f"but should be {(self.n,)}"
            )
        grid = self._grid("pack_values", scales, zeros, g_idx, q.device)

        def values(some: slice) -> Tensor:
            part = q[some].to(torch.uint8)
            by_rows = part.stride(0) == 1  # the transpose of (k, n): stays so, see pack_weights
            part, features, columns = (part.t(), 1, 0) if by_rows else (part, 0, 1)
            if grid.order is not None:
                part = part.index_select(columns, grid.order)
            missing = [0, 0]
            missing[features], missing[columns] = some.stop - some.start, K
            missing = [size - has for size, has in zip(missing, part.shape, strict=True)]
            if any(missing):
                padding = (0, missing[1], 0, missing[0])
                part = nn.functional.pad(part, padding, value=layout.ZERO_POINT)
            return part.t() if by_rows else part

        self._pack(values, grid, bias)

    def _grid(
        self,
        caller: str,
        scales: Tensor,
        zeros: Tensor | None,
        g_idx: Tensor | None,
        device: torch.device,
    ) -> _Grid:
        """Check what pack and pack_values are given; the result is on the device of the weight."""
        K, _, group = self._packed_sizes()
        shape = (self.n, K // group)
        scales = _check_grid(caller, "scales", scales, shape, self.s.dtype, device)
        if (zeros is None) != (self.z is None):
            state = "None but this layer has" if zeros is None else "given but this layer has no"
            raise ValueError(f"marlin.Layer.{caller}: zeros is {state} zero points")
        if zeros is not None:
            zeros = _check_grid(caller, "zeros", zeros, shape, self.s.dtype, device)
        if g_idx is None:
            if self.perm is not None:
                raise ValueError(
                    f"marlin.Layer.{caller}: g_idx is None but this layer has act-order"
                )
            return _Grid(scales, zeros, None)
        try:
            order = layout.group_order(g_idx, self.k, group)
        except ValueError as error:
            raise ValueError(f"marlin.Layer.{caller}: {error}") from None
        if self.perm is not None:
            return _Grid(scales, zeros, order.to(device))
        if not torch.equal(order, torch.arange(self.k, device=order.device)):
            raise ValueError(
                f"marlin.Layer.{caller}: g_idx is not k // {group} but this layer has no act-order"
            )
        return _Grid(scales, zeros, None)

    def _pack(self, values: Callable[[slice], Tensor], grid: _Grid, bias: Tensor | None) -> None:
        """Fill the buffers; values gives (features, K) stored values in the order of the groups,
        padded."""
        K, N, group = self._packed_sizes()
        B = torch.empty(K // 16, 2 * N, dtype=torch.int32, device=self.B.device)
        for n in range(0, N, _PACK_FEATURES):
            some = slice(n, min(n + _PACK_FEATURES, N))
            B[:, 2 * n : 2 * some.stop] = layout.pack_weights(values(some).t())
        self._store("B", B)
        self._store("s", self._permuted(grid.scales, 0))
        if grid.zeros is not None:
            self._store("z", self._permuted(grid.zeros, layout.ZERO_POINT))
        if grid.order is not None:
            padding = torch.arange(self.k, K, device=grid.order.device)
            self._store("perm", torch.cat((grid.order, padding)).to(torch.int32))
        if bias is not None and self.bias is not None:
            self._store("bias", bias.detach().to(self.bias.dtype))

    def _permuted(self, values: Tensor, padding: int) -> Tensor:
        """Bring (n, groups) into the form of s and z."""
        K, N, group = self._packed_sizes()
        rows = values.new_full((K // group, N), padding)
        rows[:, : self.n] = values.t()
        return layout.permute_scales(rows)

    def _store(self, name: str, value: Tensor) -> None:
        """Set a buffer: in place if its shape is right, so that whoever shares it sees it."""
        old: Tensor = getattr(self, name)
        if old.shape == value.shape:
            old.copy_(value)
        else:
            setattr(self, name, value.to(old.device))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        groupsize: int = 128,
        zero_points: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Layer:
        """Return a layer that holds a linear, rounded to the nearest values of a searched grid.

        Args:
            linear: its weight is (n, k), any float dtype.
            groupsize: input features that share a scale; -1 for all.
            zero_points: whether groups get zero points, for weights that are not symmetric.
            dtype: of the layer; by default that of the weight if that is float16 or bfloat16, else
                float16.
            device: of the layer; by default that of the weight.

        Raises:
            ValueError: a group size or dtype that no layer can have, or NaN or Inf in the weight.

        Example:
            >>> layer = marlin.Layer.from_linear(nn.Linear(576, 192), groupsize=64)
        """
        weight = linear.weight.detach()
        if dtype is None:
            dtype = weight.dtype if weight.dtype in support.LAYER_DTYPES else torch.float16
        n, k = weight.shape
        layer = cls(
            k,
            n,
            groupsize,
            linear.bias is not None,
            dtype,
            zero_points,
            device=weight.device if device is None else device,
        )
        _check_finite("from_linear", "linear.weight", weight)
        if zero_points:
            scales, zeros = quantize.grid_for(weight, groupsize, dtype)
            layer.pack(linear, scales, zeros)
        else:
            layer.pack(linear, quantize.scales_for(weight, groupsize, dtype=dtype))
        return layer.train(linear.training)

    # ----------------------------------------------------------------------------------------------
    # Unpacking
    # ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def unpack(self) -> Tensor:
        """Return the dense weight (n, k), dtype of the layer, that the packed one stands for.

        Example:
            >>> dense = nn.Linear(layer.k, layer.n, bias=False, dtype=torch.half)
            >>> dense.weight.data = layer.unpack()
        """
        q, scales, zeros, g_idx = self.unpack_values()
        if g_idx is None:
            group = self.B.shape[0] * layout.TILE_K // self.s.shape[0]
            g_idx = torch.arange(self.k, device=q.device) // group
        dense = torch.empty(q.shape, dtype=scales.dtype, device=q.device)
        for n in range(0, self.n, _PACK_FEATURES):
            some = slice(n, n + _PACK_FEATURES)
            zero = layout.ZERO_POINT if zeros is None else zeros[some].float()[:, g_idx]
            dense[some] = (q[some].float() - zero) * scales[some].float()[:, g_idx]
        return dense

    @torch.no_grad()
    def unpack_values(self) -> Values:
        """Return what was packed: the stored values, scales, zero points and groups.

        Returns:
            q (n, k) uint8; scales and zeros (n, groups), dtype of the layer; g_idx (k) int32; zeros
            and g_idx None if the layer has none. On the device of the layer.

        Raises:
            ValueError: perm is no permutation, so it was not this class that packed.

        Example:
            >>> other.pack_values(*layer.unpack_values())
        """
        rows = layout.unpack_weights(self.B)  # (K, N), in the order of the groups
        scales = layout.unpermute_scales(self.s)[:, : self.n].t().contiguous()
        zeros = None
        if self.z is not None:
            zeros = layout.unpermute_scales(self.z)[:, : self.n].t().contiguous()
        if self.perm is None:
            return Values(rows[: self.k, : self.n].t().contiguous(), scales, zeros, None)
        K = self.perm.shape[0]
        perm = self.perm.long()
        if not torch.equal(perm.sort().values, torch.arange(K, device=perm.device)):
            raise ValueError(f"marlin.Layer.unpack_values: perm is no permutation of 0..{K - 1}")
        row_of = torch.empty_like(perm)  # of the weight, for each column of x
        row_of[perm] = torch.arange(K, device=perm.device)
        g_idx = (row_of[: self.k] // (K // self.s.shape[0])).to(torch.int32)
        q = rows.index_select(0, row_of[: self.k])[:, : self.n].t().contiguous()
        return Values(q, scales, zeros, g_idx)

    # ----------------------------------------------------------------------------------------------
    # As a module
    # ----------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Layer:
        target = fn(self.s.new_empty(0)).device
        if target != self.s.device:
            self._check_device(target)
        # module.float() or .bfloat16() would cast the scales too.
        kept = {name: getattr(self, name) for name in ("s", "z") if getattr(self, name) is not None}
        super()._apply(fn, *args, **kwargs)
        for name, old in kept.items():
            new = getattr(self, name)
            if new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        return self

    def extra_repr(self) -> str:
        """Return the sizes and options, for print(model)."""
        group = -1 if self.groupsize == self.k else self.groupsize
        text = f"{self.k}, {self.n}, groupsize={group}, bias={self.bias is not None}"
        if self.s.dtype != torch.float16:
            text += f", dtype={self.s.dtype}"
        if self.z is not None:
            text += ", zero_points=True"
        if self.perm is not None:
            text += ", act_order=True"
        return text


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
    layer = Layer(linear.in_features, linear.out_features, groupsize, has_bias, device=device)
    if layer.bias is not None:
        layer.bias.copy_(linear.bias.detach())
    return layer.train(linear.training)
