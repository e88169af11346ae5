"""Every combination of a layer's options on the CPU against float64: dtype, zero points, act-order,
bias, groups; and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import TOLERANCE

import marlin

DTYPES = [torch.float16, torch.bfloat16]
ZEROS = [None, "integer", "float"]
GROUPS = [-1, 16, 32, 48, 64, 128, 256]
ISAS = ["portable", "avx2", "avx512"]


def available_isas():
    """Return the instruction sets that this processor runs."""
    return ISAS[: ISAS.index(marlin._C.cpu_isa()) + 1]


def random_values(k, n, groupsize, dtype, zeros=None, act_order=False):
    """Return random values of a layer, and its weight (n, k) in float64."""
    group = k if groupsize == -1 else groupsize
    groups = -(-k // group)
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    scales = ((torch.rand(n, groups) + 0.5) * 0.01).to(dtype)
    z = None
    if zeros == "integer":
        z = torch.randint(0, 16, (n, groups), dtype=torch.uint8)
    elif zeros == "float":
        z = (torch.rand(n, groups) * 15).to(dtype)
    g_idx = torch.arange(k) // group
    if act_order:
        g_idx = g_idx[torch.randperm(k)]
    zero = 8 if z is None else z.double()[:, g_idx]
    W = (q.double() - zero) * scales.double()[:, g_idx]
    return marlin.Values(q, scales, z, g_idx if act_order else None), W


def make_layer(k, n, groupsize, dtype, zeros=None, act_order=False, bias=False):
    """Return a packed layer, its weight (n, k) and bias in float64."""
    values, W = random_values(k, n, groupsize, dtype, zeros, act_order)
    layer = marlin.Layer(k, n, groupsize, bias, dtype, zeros is not None, act_order)
    b = torch.randn(n).to(dtype) if bias else None
    layer.pack_values(*values, bias=b)
    return layer, values, W, torch.zeros(n).double() if b is None else b.double()


def rows_of(M, k, dtype, gap):
    """Return random activations (M, k) whose rows lie k + gap elements apart, NaN between them."""
    wide = torch.full((M, k + gap), float("nan"), dtype=dtype)
    wide[:, :k] = torch.randn(M, k)
    return wide[:, :k]


@pytest.mark.parametrize("groupsize", GROUPS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_layer_is_that_of_float64(dtype, zeros, act_order, bias, groupsize, data):
    k = data.draw(st.integers(1, 600), "k")
    n = data.draw(st.integers(1, 200), "n")
    M = data.draw(st.sampled_from([0, 1, 2, 4, 5, 10, 11, 15, 33]), "M")
    gap = data.draw(st.integers(0, 9), "gap")
    x_dtype = data.draw(st.sampled_from([dtype, dtype, torch.float32]), "dtype of x")
    marlin._C.set_cpu_isa(data.draw(st.sampled_from(available_isas()), "isa"))
    try:
        layer, values, W, b = make_layer(k, n, groupsize, dtype, zeros, act_order, bias)
        x = rows_of(M, k, x_dtype, gap)
        y = layer(x)
        assert y.shape == (M, n) and y.dtype == x_dtype
        if M:
            expected = x.double() @ W.t() + b
            # Where terms cancel, what is lost is to be compared with their size: a float32 sum of
            # k <= 600 loses about sqrt(600) * 2^-24 of it.
            terms = x.double().abs() @ W.abs().t() + b.abs()
            limit = TOLERANCE[x_dtype] * expected.norm() + 25 * 2**-24 * terms.norm()
            assert (y.double() - expected).norm() <= limit
        assert torch.equal(layer.unpack(), W.float().to(dtype))
        q, s, z, g_idx = layer.unpack_values()
        assert torch.equal(q, values.q) and torch.equal(s, values.scales)
        assert z is None if zeros is None else torch.equal(z, values.zeros.to(dtype))
        assert g_idx is None if not act_order else torch.equal(g_idx.long(), values.g_idx)
    finally:
        marlin._C.set_cpu_isa("auto")
