"""Every combination of a layer's options on the CPU against float64: dtype, zero points, act-order,
bias, groups; and what is refused."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import TOLERANCE, error

import marlin
from marlin import layout

DTYPES = [torch.float16, torch.bfloat16]
ZEROS = [None, "integer", "float"]
GROUPS = [-1, 16, 32, 48, 64, 128, 256]
ISAS = ["portable", "avx2", "avx512"]


def available_isas():
    """Return the instruction sets that this processor runs."""
    return ISAS[: ISAS.index(marlin._C.cpu_isa()) + 1]


@pytest.fixture(autouse=True)
def _one_thread():
    """Use one thread unless a test says otherwise: on a busy machine two wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@pytest.fixture(params=ISAS)
def each_isa(request, isa):
    """Each instruction set that the processor runs; the fixture isa puts the old one back."""
    if request.param not in available_isas():
        pytest.skip(f"this processor does not run {request.param}")
    marlin._C.set_cpu_isa(request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("M", [1, 3, 4, 10, 15])
def test_nan_and_inf_stay_in_their_row_and_are_those_of_torch(each_isa, M, dtype):
    layer_dtype = torch.float16 if dtype == torch.float32 else dtype
    layer, _, W, _ = make_layer(272, 130, 32, layer_dtype, "integer", act_order=True)
    x = torch.randn(M, 272).to(dtype)
    clean = layer(x)
    for bad in (float("nan"), float("inf"), -float("inf")):
        spoilt = x.clone()
        spoilt[M // 2, 200] = bad
        y = layer(spoilt)
        expected = spoilt[M // 2].double() @ W.t()  # Inf times a weight of 0 is NaN
        assert torch.equal(y[M // 2].isnan(), expected.isnan())
        assert torch.equal(y[M // 2].isposinf(), expected.isposinf())
        assert torch.equal(y[M // 2].isneginf(), expected.isneginf())
        others = torch.arange(M) != M // 2
        assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("M", [1, 15])
def test_values_near_the_end_of_float32_do_not_overflow_in_between(each_isa, M):
    # Each weight is 0 or 1, but q - 8 and 8 - z are up to 7: added one by one they are over 2^128.
    layer = marlin.Layer(32, 64, 16, dtype=torch.bfloat16, zero_points=True)
    q = torch.full((64, 32), 15, dtype=torch.uint8)
    zeros = torch.full((64, 2), 15, dtype=torch.uint8)
    zeros[0, 0] = 14
    layer.pack_values(q, torch.ones(64, 2), zeros)
    x = torch.zeros(M, 32, dtype=torch.bfloat16)
    x[:, 3] = 2.0**127
    expected = torch.zeros(M, 64, dtype=torch.bfloat16)
    expected[:, 0] = 2.0**127
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("M, k", [(1, 300), (7, 512), (33, 272), (515, 129)])
def test_bits_do_not_depend_on_the_number_of_threads(each_isa, M, k):
    layer, _, _, _ = make_layer(k, 700, 32, torch.float16, "float", act_order=True)
    x = torch.randn(M, k)
    alone = layer(x)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert torch.equal(layer(x), alone), threads


@pytest.mark.parametrize("act_order", [False, True])
def test_integers_come_out_exact(each_isa, act_order):
    # |C| <= 64 * 15 = 960, which both dtypes' float32 sums hold, and float16 too.
    layer = marlin.Layer(64, 100, 16, zero_points=True, act_order=act_order)
    values, _ = random_values(64, 100, 16, torch.float16, "integer", act_order)
    ones = torch.ones_like(values.scales)
    layer.pack_values(values.q, ones, values.zeros, values.g_idx)
    for M in (1, 5, 10, 11, 40):
        x = torch.randint(-1, 2, (M, 64)).half()
        group_of = torch.arange(64) // 16 if values.g_idx is None else values.g_idx
        W = values.q.double() - values.zeros.double()[:, group_of]
        assert torch.equal(layer(x).double(), x.double() @ W.t())


def test_act_order_of_a_long_weight_with_many_tokens(each_isa):
    # More columns than one block of tokens may hold in float32 at once, so the blocks are smaller.
    k, M = 40000, 130
    layer, _, W, _ = make_layer(k, 64, 160, torch.float16, None, act_order=True)
    x = torch.randn(M, k).half()
    y = layer(x)
    expected = x.double() @ W.t()
    assert (y.double() - expected).norm() <= TOLERANCE[torch.float16] * expected.norm()


def test_a_perm_that_points_nowhere_reads_zeros(each_isa):
    layer, _, W, _ = make_layer(64, 64, 32, torch.float16)
    x = torch.randn(3, 64).half()
    perm = torch.arange(64, dtype=torch.int32)
    perm[5], perm[6], perm[7] = -1, 64, 2**31 - 1
    W = W.clone()
    W[:, 5:8] = 0
    y = marlin.linear(x, layer.B, layer.s, perm=perm)
    expected = x.double() @ W.t()
    assert (y.double() - expected).norm() <= TOLERANCE[torch.float16] * expected.norm()


# --------------------------------------------------------------------------------------------------
# Packing
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k, n, groupsize", [(100, 70, 32), (256, 64, -1), (130, 1030, 128)])
def test_pack_rounds_to_the_nearest_value_of_the_grid(k, n, groupsize, dtype, zeros, act_order):
    layer, values, W, _ = make_layer(k, n, groupsize, dtype, zeros, act_order)
    linear = torch.nn.Linear(k, n, bias=False)
    spread = values.scales.float()[:, torch.arange(k) // (k if groupsize == -1 else groupsize)]
    if values.g_idx is not None:
        spread = values.scales.float()[:, values.g_idx]
    linear.weight.data = W.float() + 0.4 * spread * (torch.rand(n, k) * 2 - 1)
    other = marlin.Layer(k, n, groupsize, False, dtype, zeros is not None, act_order)
    other.pack(linear, values.scales, values.zeros, values.g_idx)
    for name, buffer in layer.state_dict().items():
        assert torch.equal(other.state_dict()[name], buffer), name


@pytest.mark.parametrize("zeros", ZEROS)
def test_a_scale_of_zero_stores_zeros(zeros):
    layer = marlin.Layer(64, 64, 32, zero_points=zeros is not None)
    values, _ = random_values(64, 64, 32, torch.float16, zeros)
    values.scales[5, 1] = 0
    linear = torch.nn.Linear(64, 64)
    layer.pack(linear, values.scales, values.zeros)
    assert bool((layer.unpack()[5, 32:] == 0).all())


def test_state_dict_has_the_options_and_nothing_else():
    assert set(marlin.Layer(64, 64, 32, True).state_dict()) == {"B", "s", "bias"}
    full = marlin.Layer(100, 64, 32, True, torch.bfloat16, zero_points=True, act_order=True)
    assert {name: (tuple(t.shape), t.dtype) for name, t in full.state_dict().items()} == {
        "B": ((8, 128), torch.int32),
        "s": ((4, 64), torch.bfloat16),
        "z": ((4, 64), torch.bfloat16),
        "perm": ((128,), torch.int32),
        "bias": ((64,), torch.bfloat16),
    }
    assert bool((full(torch.randn(3, 100)) == 0).all())
    text = "Layer(100, 64, groupsize=32, bias=True, dtype=torch.bfloat16"
    assert repr(full) == text + ", zero_points=True, act_order=True)"


def test_state_dict_round_trip_keeps_every_bit():
    layer, _, _, _ = make_layer(100, 130, 32, torch.bfloat16, "float", True, True)
    other = marlin.Layer(100, 130, 32, True, torch.bfloat16, True, True, device="meta")
    other.to_empty(device="cpu").load_state_dict(layer.state_dict())
    x = torch.randn(3, 100)
    assert torch.equal(other(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer_dtype", DTYPES)
def test_casting_a_model_leaves_scales_and_zero_points_alone(layer_dtype, dtype):
    layer, _, _, _ = make_layer(64, 64, 32, layer_dtype, "float", True, True)
    s, z = layer.s.clone(), layer.z.clone()
    layer.to(dtype)
    assert torch.equal(layer.s, s) and torch.equal(layer.z, z)
    assert layer.bias.dtype == dtype
    assert layer(torch.randn(2, 64, dtype=dtype)).dtype == dtype


def test_perm_lists_the_columns_of_each_group_then_the_padding():
    g_idx = torch.tensor([1, 0] * 16 + [0, 1, 1])  # 17 columns of group 0, 18 of group 1
    layer = marlin.Layer(35, 64, 32, act_order=True)
    q = torch.randint(0, 16, (64, 35), dtype=torch.uint8)
    with pytest.raises(ValueError, match="gives group 0 17 input features but should give it 32"):
        layer.pack_values(q, torch.ones(64, 2), g_idx=g_idx)
    g_idx = torch.zeros(35, dtype=torch.int32)
    g_idx[[4, 2, 30]] = 1
    layer.pack_values(q, torch.ones(64, 2), g_idx=g_idx)
    first = [i for i in range(35) if i not in (2, 4, 30)]
    assert layer.perm.tolist() == [*first, 2, 4, 30, *range(35, 64)]
    assert torch.equal(layout.unpack_weights(layer.B)[:35], q.t()[layer.perm[:35].long()])


def test_a_trivial_g_idx_needs_no_act_order():
    values, _ = random_values(100, 64, 32, torch.float16)
    layer = marlin.Layer(100, 64, 32)
    layer.pack_values(values.q, values.scales, g_idx=torch.arange(100) // 32)
    assert torch.equal(layer.unpack_values().q, values.q) and layer.perm is None


WRONG_VALUES = {
    "q shape": (
        dict(q=torch.zeros(64, 95).byte()),
        r"q has shape \(64, 95\) but should be \(64, 96\)",
    ),
    "q dtype": (
        dict(q=torch.zeros(64, 96)),
        "q is torch.float32 but should be of an integer dtype",
    ),
    "q 16": (dict(q=torch.full((64, 96), 16)), "q has 16 but should be within 0..15"),
    "q -1": (dict(q=torch.full((64, 96), -1)), "q has -1 but should be within 0..15"),
    "scales shape": (
        dict(scales=torch.ones(64, 4)),
        r"scales has shape \(64, 4\) but should be \(64, 3\)",
    ),
    "scales nan": (
        dict(scales=torch.full((64, 3), torch.nan)),
        r"scales as float16 has NaN or Inf, nan at \(0, 0\)",
    ),
    "scales inf": (
        dict(scales=torch.full((64, 3), 1e5)),
        r"scales as float16 has NaN or Inf, inf at \(0, 0\)",
    ),
    "scales bf16": (
        dict(scales=torch.ones(64, 3).bfloat16()),
        "scales is torch.bfloat16 but should be float16",
    ),
    "scales int": (
        dict(scales=torch.ones(64, 3).int()),
        "scales is torch.int32 but should be float16",
    ),
    "zeros missing": (dict(zeros=None), "zeros is None but this layer has zero points"),
    "zeros shape": (
        dict(zeros=torch.ones(3, 64)),
        r"zeros has shape \(3, 64\) but should be \(64, 3\)",
    ),
    "zeros 16": (
        dict(zeros=torch.full((64, 3), 16)),
        "zeros has 16 but integers should be within 0..15",
    ),
    "zeros -1": (
        dict(zeros=torch.full((64, 3), -1)),
        "zeros has -1 but integers should be within 0..15",
    ),
    "zeros nan": (
        dict(zeros=torch.full((64, 3), torch.nan)),
        "zeros as float16 has NaN or Inf, nan at",
    ),
    "zeros bf16": (
        dict(zeros=torch.ones(64, 3).bfloat16()),
        "zeros is torch.bfloat16 but should be float16",
    ),
    "g_idx missing": (dict(g_idx=None), "g_idx is None but this layer has act-order"),
    "g_idx shape": (
        dict(g_idx=torch.arange(95) // 32),
        r"g_idx has shape \(95,\) but should be \(96,\)",
    ),
    "g_idx dtype": (
        dict(g_idx=torch.zeros(96)),
        "g_idx is torch.float32 but should be of an integer",
    ),
    "g_idx 3": (dict(g_idx=torch.arange(96) // 31), "g_idx has 3 at 93 but there are 3 groups"),
    "g_idx -1": (
        dict(g_idx=torch.arange(96) // 32 - 1),
        "g_idx has -1 at 0 but there are 3 groups",
    ),
    "g_idx uneven": (
        dict(g_idx=torch.arange(96) // 33),
        "g_idx gives group 0 33 input features but should give it 32",
    ),
    "bias missing": (dict(bias=None), "bias is None but this layer has a bias"),
    "bias shape": (dict(bias=torch.zeros(63)), r"bias has shape \(63,\) but should be \(64,\)"),
}


@pytest.mark.parametrize("change, message", WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_wrong_values_are_refused_and_change_nothing(change, message):
    layer, values, _, bias = make_layer(96, 64, 32, torch.float16, "integer", True, True)
    before = copy.deepcopy(layer.state_dict())
    arguments = values._asdict() | dict(bias=bias.half()) | change
    with pytest.raises(ValueError, match=r"^marlin\.Layer\.pack_values: " + message):
        layer.pack_values(**arguments)
    if not {"q", "bias"} & set(change):
        linear = torch.nn.Linear(96, 64)
        del arguments["q"], arguments["bias"]
        with pytest.raises(ValueError, match=r"^marlin\.Layer\.pack: " + message):
            layer.pack(linear, **arguments)
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(zeros=torch.zeros(64, 3)), "zeros is given but this layer has no zero points"),
        (dict(g_idx=torch.arange(96).flip(0) // 32), r"g_idx is not k // 32 but this layer has no"),
        (dict(bias=torch.zeros(64)), "bias is given but this layer has no bias"),
    ],
)
def test_what_a_plain_layer_cannot_hold_is_refused(change, message):
    layer = marlin.Layer(96, 64, 32)
    q = torch.zeros(64, 96, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        layer.pack_values(q, torch.ones(64, 3), **change)


def test_a_perm_that_is_none_is_not_unpacked():
    layer, _, _, _ = make_layer(96, 64, 32, torch.float16, act_order=True)
    layer.perm[3] = 5
    with pytest.raises(ValueError, match="perm is no permutation of 0..95"):
        layer.unpack_values()


def test_a_dtype_that_no_layer_has_is_named():
    with pytest.raises(
        ValueError, match="dtype is torch.float32 but should be float16 or bfloat16"
    ):
        marlin.Layer(64, 64, dtype=torch.float32)


# --------------------------------------------------------------------------------------------------
# from_linear
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k, n, groupsize", [(200, 70, 64), (96, 64, -1)])
def test_from_linear_is_close_to_the_linear(k, n, groupsize, dtype, zero_points):
    linear = torch.nn.Linear(k, n).to(dtype)
    layer = marlin.Layer.from_linear(linear, groupsize, zero_points)
    assert layer.s.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float16)
    assert (layer.z is not None) == zero_points and layer.training == linear.training
    W = linear.weight.detach().double()
    # Uniform weights in 15 steps: the error of a step is uniform too, 1 / 15 = 0.067 of them; a
    # few weights a group hit the ends exactly, so it is a little less.
    assert 0.03 < (layer.unpack().double() - W).norm() / W.norm() < 0.07
    x = torch.randn(5, k).to(dtype)
    expected = x.double() @ layer.unpack().double().t() + linear.bias.double()
    y = layer(x).double()
    tolerance = 2e-3 if dtype == torch.bfloat16 else 5e-4
    assert (y - expected).norm() <= 2 * tolerance * expected.norm()


def test_zero_points_pay_for_weights_that_are_not_symmetric():
    linear = torch.nn.Linear(128, 64, bias=False)
    linear.weight.data = torch.rand(64, 128)
    W = linear.weight.detach()
    plain = (marlin.Layer.from_linear(linear, 32).unpack() - W).norm()
    shifted = (marlin.Layer.from_linear(linear, 32, zero_points=True).unpack() - W).norm()
    assert shifted < 0.6 * plain  # 15 steps instead of 7 for the same range


def test_from_linear_refuses_weights_that_are_not_finite():
    linear = torch.nn.Linear(64, 64)
    linear.weight.data[3, 5] = torch.inf
    with pytest.raises(ValueError, match=r"linear.weight has NaN or Inf, inf at \(3, 5\)"):
        marlin.Layer.from_linear(linear, 32)
    with pytest.raises(ValueError, match=r"linear.weight has NaN or Inf, inf at \(3, 5\)"):
        marlin.Layer(64, 64).pack(linear, torch.ones(64, 1))


# --------------------------------------------------------------------------------------------------
# The operator
# --------------------------------------------------------------------------------------------------

WRONG_TENSORS = {
    "z dtype": (
        lambda a: a.update(z=a["z"].float()),
        "z is float32 but should be of the dtype of s, float16",
    ),
    "z shape": (
        lambda a: a.update(z=a["z"][:1]),
        r"z has shape \(1, 128\) but should be that of s, \(4, 128\)",
    ),
    "z stride": (lambda a: a.update(z=a["z"].t().contiguous().t()), "z has strides"),
    "perm dtype": (lambda a: a.update(perm=a["perm"].long()), "perm is int64 but should be int32"),
    "perm shape": (
        lambda a: a.update(perm=a["perm"][:255]),
        r"perm has shape \(255,\) but should be \(256,\)",
    ),
    "perm dims": (lambda a: a.update(perm=a["perm"][None]), r"perm has shape \(1, 256\)"),
    "s dtype": (
        lambda a: a.update(s=a["s"].float()),
        "s is float32 but should be float16 or bfloat16",
    ),
}


@pytest.mark.parametrize("change, message", WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_a_wrong_tensor_is_named(change, message):
    layer, _, _, _ = make_layer(256, 128, 64, torch.float16, "integer", True)
    arguments = dict(x=torch.randn(3, 256), B=layer.B, s=layer.s, z=layer.z, perm=layer.perm)
    change(arguments)
    for function in (marlin.linear, torch.ops.marlin.linear):
        with pytest.raises(ValueError, match=r"^marlin\.linear: " + message):
            function(**arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_passes(dtype):
    layer, _, _, _ = make_layer(100, 70, 32, dtype, "float", True, True)
    x = torch.randn(6, 100).to(dtype)
    arguments = (x, layer.B, layer.s, layer.bias, 100, 70, layer.z, layer.perm)
    torch.library.opcheck(torch.ops.marlin.linear.default, arguments)


def test_compiled_and_exported_layers_give_the_bits_of_the_eager_one():
    torch._dynamo.reset()
    layer, _, _, _ = make_layer(100, 70, 32, torch.bfloat16, "float", True, True)
    x = torch.randn(4, 100).bfloat16()
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), layer(x))
        program = torch.export.export(layer, (x,))
        assert torch.equal(program.module()(x), layer(x))


@pytest.mark.parametrize("zeros", [0, 15, "float"])
@pytest.mark.parametrize(
    "dtype, mean",
    [(torch.float32, 0), *((dtype, mean) for dtype in DTYPES for mean in (0, 30))],
)
def test_error_is_at_most_twice_that_of_torch(each_isa, dtype, mean, zeros):
    # Few tokens go by sums of x, which cancel against the others: worst for zero points far from 8
    # and activations far from 0.
    layer_dtype = torch.float16 if dtype == torch.float32 else dtype
    values, W = random_values(4096, 64, 128, layer_dtype, "float" if zeros == "float" else None)
    if zeros != "float":
        values = values._replace(zeros=torch.full(values.scales.shape, zeros))
        W = (values.q.double() - zeros) * values.scales.double().repeat_interleave(128, dim=1)
    layer = marlin.Layer(4096, 64, 128, dtype=layer_dtype, zero_points=True)
    layer.pack_values(*values)
    for M in (1, 4, 8, 20):
        x = (mean + torch.randn(M, 4096)).to(dtype)
        expected = x.double() @ W.t()
        ours = error(layer(x), expected)
        theirs = error((x.float() @ W.float().t()).to(dtype), expected)
        assert ours < 2 * theirs, M
