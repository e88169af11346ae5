"""The 4-bit grid: choose scales, round weights to it, and back.

Depends on torch alone. Layer.pack, the checkpoint code and gptq/ are the callers.

A weight w (n, k) is cut along k into groups that share a scale; the last group may be shorter. The
stored value q = round(w / s) + 8 lies in 0..15, so a group reaches from -8 s to 7 s; with a zero
point z in the place of 8, from -z s to (15 - z) s. Every scale that leaves this module is exactly
an FP16 (or BF16) number: what is searched, rounded to and stored is one and the same grid.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = [
    "RULES",
    "dequantize",
    "grid_for",
    "num_groups",
    "round_to_nearest",
    "scales_for",
    "to_fp16_grid",
    "to_grid",
]

ZERO_POINT = 8  # the stored value that means 0
Q_MAX = 15
RULES = ("search", "max/8", "max/7")

# Shrink factors of the clip search. On Gaussian and on trained weights, none below half of the full
# reach was ever best, and steps of 0.5% instead of 2% lowered the squared error by only 4e-4 of it.
SHRINK_FACTORS = tuple(1.0 - 0.02 * i for i in range(26))

# Elements of w that a search works on at once; it holds four float32 temporaries of that size.
SEARCH_CHUNK = 1 << 22


def num_groups(k: int, groupsize: int) -> int:
    """Counts the groups of a row.

    Args:
        k: input features.
        groupsize: input features that share a scale; -1 means all of them.

    Returns:
        The number of groups, the last of which may be shorter.
    """
    return 1 if groupsize == -1 else -(-k // groupsize)


def _check(w: Tensor, groupsize: int, caller: str) -> None:
    if w.dim() != 2:
        raise ValueError(
            f"marlin.quantize.{caller}: w has {w.dim()} dimensions but should have 2, (n, k)"
        )
    if groupsize != -1 and groupsize <= 0:
        raise ValueError(
            f"marlin.quantize.{caller}: groupsize is {groupsize} but should be positive, or -1 for "
            "one group"
        )


def _grouped(x: Tensor, groupsize: int) -> Tensor:
    """(n, k) -> (n, groups, group), the last group filled up with zeros."""
    n, k = x.shape
    group = k if groupsize == -1 else groupsize
    missing = num_groups(k, groupsize) * group - k
    return torch.nn.functional.pad(x, (0, missing)).view(n, num_groups(k, groupsize), group)


def _spread(scales: Tensor, k: int, groupsize: int) -> Tensor:
    """(n, groups) -> (n, k) float32: each weight's own scale, 1 where the scale is 0."""
    s = scales.float()
    s = torch.where(s == 0, torch.ones_like(s), s)
    return s.repeat_interleave(k if groupsize == -1 else groupsize, dim=1)[:, :k]


def to_grid(scales: Tensor, dtype: torch.dtype = torch.float16) -> Tensor:
    """Rounds scales to a 16-bit dtype, kept finite and, where they were not zero, not zero.

    Args:
        scales: any shape, float; not negative.
        dtype: float16 or bfloat16.

    Returns:
        The same shape, dtype.
    """
    rounded = scales.clamp(max=torch.finfo(dtype).max).to(dtype)
    # The smallest FP16 above 0; of BF16 the smallest that is not subnormal.
    smallest = 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny
    lost = (rounded == 0) & (scales > 0)
    return torch.where(lost, torch.full_like(rounded, smallest), rounded)


def to_fp16_grid(scales: Tensor) -> Tensor:
    """Rounds scales to FP16 as to_grid does.

    Args:
        scales: any shape, float; not negative.

    Returns:
        The same shape, fp16.
    """
    return to_grid(scales)


def scales_for(
    w: Tensor,
    groupsize: int = -1,
    rule: str = "search",
    importance: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Chooses the scale of every group.

    Args:
        w: weight (n, k), float.
        groupsize: input features that share a scale; -1 means all.
        rule: "max/8" (the largest weight may be clipped by one step if it is positive), "max/7"
            (nothing is clipped), or "search": of these two and 26 shrunken reaches the one with
            the least squared error after rounding, then fitted to the rounded values by least
            squares where that lowers the error.
        importance: (k,) float, not negative: how much the squared error of each input feature
            counts in the search; for GPTQ the diagonal of the Hessian.
        dtype: of the scales, float16 or bfloat16.

    Returns:
        (n, groups) dtype, positive, or 0 for a group of zeros.

    Raises:
        ValueError: a rule, shape or group size that does not exist.

    Example:
        >>> w = torch.randn(64, 128)
        >>> s = scales_for(w, 64)
        >>> w_rounded = dequantize(round_to_nearest(w, s, 64), s, 64)
    """
    _check(w, groupsize, "scales_for")
    if rule not in RULES:
        raise ValueError(
            f"marlin.quantize.scales_for: rule is {rule!r} but should be one of {RULES}"
        )
    if importance is not None and importance.shape != (w.shape[1],):
        raise ValueError(
            f"marlin.quantize.scales_for: importance is {tuple(importance.shape)} but w needs "
            f"({w.shape[1]},)"
        )
    x = _grouped(w.float(), groupsize)
    if rule != "search":
        return to_grid(x.abs().amax(dim=2) / (8 if rule == "max/8" else 7), dtype)
    if importance is None:
        importance = torch.ones(w.shape[1], device=w.device)
    h = _grouped(importance.float()[None], groupsize)[0]  # (groups, group)
    # A group without importance (its inputs were always zero) is searched as if all its features
    # counted alike.
    h = torch.where(h.sum(dim=1, keepdim=True) > 0, h, torch.ones_like(h))
    step = max(1, SEARCH_CHUNK // max(1, w.shape[1]))
    parts = [_search(x[n : n + step], h, dtype) for n in range(0, len(x), step)]
    return torch.cat(parts) if parts else x.new_zeros(x.shape[:2]).to(dtype)


def _search(x: Tensor, h: Tensor, dtype: torch.dtype) -> Tensor:
    """The clip search on rows x (n, groups, group) with importance h (groups, group) -> (n, groups)
    dtype."""

    def rounded(s: Tensor) -> Tensor:
        return (x / torch.where(s > 0, s, torch.ones_like(s))).round_().clamp_(-8, 7)

    def error(q: Tensor, s: Tensor) -> Tensor:
        return torch.einsum("ngi,gi->ng", (q * s).sub_(x).square_(), h)

    def choose(candidates: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        best, best_err = to_grid(reach, dtype), torch.full_like(reach, torch.inf)
        for candidate in candidates:
            s = to_grid(candidate.clamp(min=0), dtype)
            err = error(rounded(s.float()[..., None]), s.float()[..., None])
            better = (err < best_err) & (s > 0)
            best, best_err = torch.where(better, s, best), torch.where(better, err, best_err)
        return best, best_err

    # The reach is lopsided: the smallest scale that clips nothing is the larger of these two.
    reach = torch.maximum(x.amax(dim=2) / 7, -x.amin(dim=2) / 8).clamp(min=0)
    largest = x.abs().amax(dim=2)
    best, best_err = choose([largest / 8, largest / 7, *(reach * f for f in SHRINK_FACTORS)])
    q = rounded(torch.where(best > 0, best, torch.ones_like(best)).float()[..., None])
    fit = torch.einsum("ngi,ngi,gi->ng", q, x, h) / torch.einsum("ngi,gi->ng", q * q, h).clamp(
        min=1e-30
    )
    fitted, fitted_err = choose([fit])
    return torch.where(fitted_err < best_err, fitted, best)


def grid_for(
    w: Tensor, groupsize: int = -1, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor]:
    """Chooses the scale and the zero point of every group, of the full range of its weights (0
    included) and 25 shrunken ones that with the least squared error after rounding.

    Args:
        w: weight (n, k), float.
        groupsize: input features that share a scale; -1 means all.
        dtype: of the scales, float16 or bfloat16.

    Returns:
        scales (n, groups) dtype, positive, or 0 for a group of zeros; zeros (n, groups) uint8,
        0..15.

    Raises:
        ValueError: a shape or group size that does not exist.

    Example:
        >>> s, z = grid_for(torch.rand(64, 128), 64)
    """
    _check(w, groupsize, "grid_for")
    x = _grouped(w.float(), groupsize)
    step = max(1, SEARCH_CHUNK // max(1, w.shape[1]))
    parts = [_search_range(x[n : n + step], dtype) for n in range(0, len(x), step)]
    if not parts:
        return x.new_zeros(x.shape[:2]).to(dtype), x.new_zeros(x.shape[:2]).to(torch.uint8)
    return torch.cat([s for s, _ in parts]), torch.cat([z for _, z in parts])


def _search_range(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The range search on rows x (n, groups, group) -> scales (n, groups) dtype, zeros uint8."""
    low, high = x.amin(dim=2).clamp(max=0), x.amax(dim=2).clamp(min=0)
    best_s = torch.zeros_like(low, dtype=dtype)
    best_z = torch.full_like(low, ZERO_POINT)
    best_err = x.square().sum(dim=2)
    for factor in SHRINK_FACTORS:
        s = to_grid((high - low) * factor / Q_MAX, dtype)
        step = torch.where(s > 0, s, torch.ones_like(s)).float()
        z = (-low * factor / step).round_().clamp_(0, Q_MAX)
        q = (x / step[..., None]).round_().add_(z[..., None]).clamp_(0, Q_MAX)
        err = (q - z[..., None]).mul_(step[..., None]).sub_(x).square_().sum(dim=2)
        better = (err < best_err) & (s > 0)
        best_s, best_z = torch.where(better, s, best_s), torch.where(better, z, best_z)
        best_err = torch.where(better, err, best_err)
    return best_s, best_z.to(torch.uint8)


def round_to_nearest(w: Tensor, scales: Tensor, groupsize: int = -1) -> Tensor:
    """Rounds a weight to the grid.

    Args:
        w: weight (n, k), float.
        scales: (n, groups), as scales_for returns them.
        groupsize: input features that share a scale; -1 means all.

    Returns:
        (n, k) uint8, the stored values 0..15; 8 wherever the scale is 0.

    Raises:
        ValueError: scales of another shape.

    Example:
        >>> q = round_to_nearest(torch.ones(64, 128), torch.full((64, 1), 0.5).half())
        >>> int(q[0, 0])
        10
    """
    _check(w, groupsize, "round_to_nearest")
    _check_scales(w, scales, groupsize, "round_to_nearest")
    k = w.shape[1]
    empty = (scales == 0).repeat_interleave(k if groupsize == -1 else groupsize, dim=1)[:, :k]
    q = (w.float() / _spread(scales, k, groupsize)).round_().add_(ZERO_POINT).clamp_(0, Q_MAX)
    return q.masked_fill_(empty, ZERO_POINT).to(torch.uint8)


def dequantize(q: Tensor, scales: Tensor, groupsize: int = -1) -> Tensor:
    """Turns stored values back into weights.

    Args:
        q: (n, k) uint8, 0..15.
        scales: (n, groups) fp16 or float32.
        groupsize: input features that share a scale; -1 means all.

    Returns:
        (n, k) float32: (q - 8) * s. Rounding it to FP16 gives what the kernels multiply with.

    Raises:
        ValueError: scales of another shape.

    Example:
        >>> dequantize(torch.tensor([[10]], dtype=torch.uint8), torch.tensor([[0.5]]).half())
        tensor([[1.]])
    """
    _check(q, groupsize, "dequantize")
    _check_scales(q, scales, groupsize, "dequantize")
    s = scales.float().repeat_interleave(q.shape[1] if groupsize == -1 else groupsize, dim=1)
    return (q.float() - ZERO_POINT) * s[:, : q.shape[1]]


def _check_scales(w: Tensor, scales: Tensor, groupsize: int, caller: str) -> None:
    expected = (w.shape[0], num_groups(w.shape[1], groupsize))
    if tuple(scales.shape) != expected:
        raise ValueError(
            f"marlin.quantize.{caller}: scales are {tuple(scales.shape)} but a weight "
            f"{tuple(w.shape)} in groups of "
            f"{groupsize} needs {expected}"
        )
