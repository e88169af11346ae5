"""The 4-bit grid: marlin/quantize.py."""

from __future__ import annotations

import pytest
import torch

from marlin import quantize

SHAPES = [(1, 16, 16), (3, 17, 16), (15, 33, -1), (17, 131, 64), (33, 576, 128), (64, 128, 64)]


def weight(n: int, k: int) -> torch.Tensor:
    return torch.randn(n, k) * torch.rand(n, 1)


def rounded(w: torch.Tensor, scales: torch.Tensor, groupsize: int) -> torch.Tensor:
    return quantize.dequantize(quantize.round_to_nearest(w, scales, groupsize), scales, groupsize)


@pytest.mark.parametrize("n, k, groupsize", SHAPES)
@pytest.mark.parametrize("rule", quantize.RULES)
def test_scales_are_positive_fp16_one_a_group(n: int, k: int, groupsize: int, rule: str) -> None:
    s = quantize.scales_for(weight(n, k), groupsize, rule)
    assert s.shape == (n, quantize.num_groups(k, groupsize))
    assert s.dtype == torch.float16
    assert (s > 0).all() and torch.isfinite(s).all()


@pytest.mark.parametrize("n, k, groupsize", SHAPES)
def test_search_is_never_worse_than_the_fixed_rules(n: int, k: int, groupsize: int) -> None:
    w = weight(n, k)

    def error(rule: str) -> torch.Tensor:
        return (rounded(w, quantize.scales_for(w, groupsize, rule), groupsize) - w).square()

    best = error("search").sum()
    # Both rules are among the candidates; the sums are in float32, in another order.
    assert best <= (1 + 1e-5) * error("max/8").sum()
    assert best <= (1 + 1e-5) * error("max/7").sum()


def test_search_minimises_the_weighted_error_when_inputs_differ() -> None:
    w, importance = weight(64, 128), torch.rand(128) ** 8

    def error(s: torch.Tensor) -> torch.Tensor:
        return ((rounded(w, s, 64) - w).square() * importance).sum()

    plain, weighted = (quantize.scales_for(w, 64, importance=h) for h in (None, importance))
    assert error(weighted) < 0.95 * error(plain)


@pytest.mark.parametrize("n, k, groupsize", SHAPES)
def test_weights_on_the_grid_come_back_exactly(n: int, k: int, groupsize: int) -> None:
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    s = (torch.rand(n, quantize.num_groups(k, groupsize)) + 0.01).half()
    w = quantize.dequantize(q, s, groupsize)
    assert torch.equal(quantize.round_to_nearest(w, s, groupsize), q)
    # Also from FP16, as a dense model stores it: half a step is 1/16 of the reach, FP16's 2^-11.
    assert torch.equal(quantize.round_to_nearest(w.half(), s, groupsize), q)


def test_a_short_last_group_is_rounded_as_if_it_stood_alone() -> None:
    w = weight(5, 100)
    s = quantize.scales_for(w, 64)
    assert torch.equal(s[:, 1:], quantize.scales_for(w[:, 64:], -1))
    assert torch.equal(rounded(w, s, 64)[:, 64:], rounded(w[:, 64:], s[:, 1:], -1))


@pytest.mark.parametrize("rule", quantize.RULES)
def test_a_group_of_zeros_has_scale_zero_and_stores_eights(rule: str) -> None:
    w = weight(4, 64)
    w[:, 16:32] = 0
    s = quantize.scales_for(w, 16, rule)
    assert (s[:, 1] == 0).all() and (s[:, [0, 2, 3]] > 0).all()
    assert (quantize.round_to_nearest(w, s, 16)[:, 16:32] == 8).all()
    assert (rounded(w, s, 16)[:, 16:32] == 0).all()


def test_max7_clips_nothing_and_max8_at_most_one_step() -> None:
    w = weight(33, 131)
    for rule, steps in (("max/7", 0.5), ("max/8", 1.0)):
        s = quantize.scales_for(w, -1, rule)
        # The scale itself is rounded to FP16: 2^-11 of 8 steps.
        assert ((rounded(w, s, -1) - w).abs() <= (steps + 8 * 2**-11) * s.float()).all()


@pytest.mark.parametrize("size", [1e-9, 1e7])
def test_scales_stay_finite_and_not_zero_at_the_ends_of_fp16(size: float) -> None:
    for rule in quantize.RULES:
        s = quantize.scales_for(torch.randn(3, 33) * size, -1, rule)
        assert torch.isfinite(s).all() and (s > 0).all()


def asymmetric(w: torch.Tensor, s: torch.Tensor, z: torch.Tensor, groupsize: int) -> torch.Tensor:
    """Round w (n, k) to the grid of s and z (n, groups)."""
    n, k = w.shape
    group = torch.arange(k) // (k if groupsize == -1 else groupsize)
    step, zero = s.float()[:, group], z.float()[:, group]
    q = (w / torch.where(step > 0, step, 1) + zero).round().clamp(0, 15)
    return (q - zero) * step


@pytest.mark.parametrize("n, k, groupsize", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_searched_range_is_never_worse_than_the_full_one(
    n: int, k: int, groupsize: int, dtype: torch.dtype
) -> None:
    w = weight(n, k) + torch.rand(n, 1)
    s, z = quantize.grid_for(w, groupsize, dtype)
    assert s.shape == z.shape == (n, quantize.num_groups(k, groupsize))
    assert s.dtype == dtype and z.dtype == torch.uint8 and int(z.max()) <= 15
    error = (asymmetric(w, s, z, groupsize) - w).square().sum()
    padded = torch.nn.functional.pad(w, (0, -k % (k if groupsize == -1 else groupsize)))
    groups = padded.view(n, s.shape[1], -1)
    low, high = groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)
    full = ((high - low) / 15).to(dtype)
    zero = (-low / full.float()).round().clamp(0, 15)
    # The full range is a candidate; the sums are in float32, in another order.
    assert error <= (1 + 1e-5) * (asymmetric(w, full, zero, groupsize) - w).square().sum()


def test_the_range_of_weights_of_one_sign_starts_at_zero() -> None:
    s, z = quantize.grid_for(torch.rand(4, 64) + 0.5, 32)
    assert (z == 0).all() and (s > 0).all()
    s, z = quantize.grid_for(-torch.rand(4, 64) - 0.5, 32)
    assert (z == 15).all() and (s > 0).all()
    s, z = quantize.grid_for(torch.zeros(4, 64), 32)
    assert (z == 8).all() and (s == 0).all()


@pytest.mark.parametrize("n, k, groupsize", SHAPES)
def test_bf16_scales_are_searched_as_bf16(n: int, k: int, groupsize: int) -> None:
    w = weight(n, k)
    s = quantize.scales_for(w, groupsize, dtype=torch.bfloat16)
    assert s.dtype == torch.bfloat16 and (s > 0).all()
    error = (rounded(w, s, groupsize) - w).square().sum()
    for rule in ("max/8", "max/7"):
        fixed = quantize.scales_for(w, groupsize, rule, dtype=torch.bfloat16)
        assert error <= (1 + 1e-5) * (rounded(w, fixed, groupsize) - w).square().sum()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_grid_keeps_scales_finite_and_not_zero(dtype: torch.dtype) -> None:
    ends = torch.tensor([0.0, 1e-44, 1e-9, 1.0, 1e7, 3.4e38])
    grid = quantize.to_grid(ends, dtype)
    assert grid.dtype == dtype and torch.isfinite(grid).all()
    assert (grid == 0).tolist() == [True] + 5 * [False]


def test_no_rows_give_no_scales() -> None:
    assert quantize.scales_for(torch.empty(0, 64), 16).shape == (0, 4)
    assert [t.shape for t in quantize.grid_for(torch.empty(0, 64), 16)] == [(0, 4), (0, 4)]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda w: quantize.scales_for(w[0]), "w has 1 dimensions"),
        (lambda w: quantize.scales_for(w, 0), "groupsize is 0"),
        (lambda w: quantize.scales_for(w, 16, "best"), "rule is 'best'"),
        (lambda w: quantize.scales_for(w, importance=torch.ones(5)), r"needs \(64,\)"),
        (lambda w: quantize.grid_for(w[0]), "grid_for: w has 1 dimensions"),
        (lambda w: quantize.grid_for(w, 0), "groupsize is 0"),
        (lambda w: quantize.round_to_nearest(w, torch.ones(4, 3), 16), r"needs \(4, 4\)"),
        (lambda w: quantize.dequantize(w, torch.ones(3, 4), 16), r"needs \(4, 4\)"),
    ],
)
def test_wrong_arguments_are_named(call, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=words):
        call(torch.ones(4, 64))
