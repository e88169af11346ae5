"""marlin.Layer and replace_linear: packing, padding, state dicts, and a caller written for the
published Marlin."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import TOLERANCE, error
from torch import nn

import marlin
from marlin import layout


def quantised_linear(n, k, groupsize, bias=False, device="cpu"):
    """Return a float16 linear whose weight 4 bits hold exactly, and its scales (n, groups).

    The scales are powers of two, so that float16 holds their products with -8..7: the layer's only
    error is rounding.
    """
    group = k if groupsize == -1 else groupsize
    groups = -(-k // group)
    scales = 0.5 ** torch.randint(5, 9, (n, groups)).half()
    q = torch.randint(0, 16, (n, k))
    linear = nn.Linear(k, n, bias=bias, dtype=torch.half)
    linear.weight.data = (q - 8).half() * scales.repeat_interleave(group, dim=1)[:, :k]
    return linear.to(device), scales.to(device)


SIZES = [
    (256, 256, 128),
    (256, 192, -1),
    (576, 192, 32),
    (576, 192, 64),
    (576, 192, 128),
    (100, 64, 128),
    (100, 70, -1),
]
SIZES += [(17, 1, 16), (1, 1, -1), (31, 127, 32), (130, 65, 128), (128, 64, 128)]


@pytest.mark.parametrize("k, n, groupsize", SIZES)
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_layer_computes_the_linear(device, k, n, groupsize, bias):
    if device == "cuda" and groupsize == 16:
        pytest.skip("a GPU takes no groups of 16")
    linear, scales = quantised_linear(n, k, groupsize, bias, device)
    layer = marlin.Layer(k, n, groupsize, bias=bias, device=device)
    layer.pack(linear, scales)
    assert torch.equal(layer.unpack(), linear.weight)
    x = torch.randn(3, 5, k, device=device).half()
    y = layer(x)
    expected = x.double() @ linear.weight.double().t() + (linear.bias.double() if bias else 0)
    assert y.shape == (3, 5, n)
    assert error(y, expected) < TOLERANCE[torch.float16]


@settings(max_examples=40, deadline=None)
@given(
    k=st.integers(1, 400),
    n=st.integers(1, 200),
    groupsize=st.sampled_from([-1, 16, 32, 48, 64, 128]),
)
def test_unpack_gives_back_what_was_packed_for_any_size(k, n, groupsize):
    linear, scales = quantised_linear(n, k, groupsize)
    layer = marlin.Layer(k, n, groupsize)
    layer.pack(linear, scales)
    assert torch.equal(layer.unpack(), linear.weight)
    x = torch.randn(2, k)
    W = linear.weight.detach().double().t()
    # float32: each of up to 400 additions rounds by 2^-24 of the partial sum at most, which is
    # below |x| |W|
    assert bool(
        ((layer(x) - x.double() @ W).abs() <= 400 * 2**-24 * (x.double().abs() @ W.abs())).all()
    )


def test_weights_are_rounded_to_the_nearest_value_and_clamped():
    layer = marlin.Layer(16, 64, -1)
    linear = nn.Linear(16, 64, bias=False)
    linear.weight.data = torch.linspace(-12, 12, 16 * 64).view(64, 16)
    layer.pack(linear, torch.ones(64, 1))
    expected = linear.weight.data.round().clamp(-8, 7)
    assert torch.equal(layer.unpack().float(), expected)


def test_a_scale_of_zero_stores_zeros():
    linear, scales = quantised_linear(64, 64, 32)
    scales[5, 1] = 0
    layer = marlin.Layer(64, 64, 32)
    layer.pack(linear, scales)
    dense = layer.unpack()
    assert bool((dense[5, 32:] == 0).all())
    assert torch.equal(dense[5, :32], linear.weight[5, :32])
    assert bool((layout.unpack_weights(layer.B)[32:, 5] == 8).all())


def test_a_new_layer_holds_zeros_and_its_bias():
    layer = marlin.Layer(70, 30, 32, bias=True)
    assert bool((layer(torch.randn(3, 70)) == 0).all())
    layer.bias.fill_(2.0)
    assert bool((layer(torch.randn(3, 70)) == 2.0).all())


def test_buffers_are_the_published_ones():
    layer = marlin.Layer(256, 512, 128)
    assert {name: (tuple(t.shape), t.dtype) for name, t in layer.state_dict().items()} == {
        "B": ((16, 1024), torch.int32),
        "s": ((2, 512), torch.float16),
    }
    assert (layer.k, layer.n, layer.groupsize) == (256, 512, 128)
    assert marlin.Layer(256, 512).groupsize == 256
    assert layer.workspace.numel() >= 512 // 128 * 16
    assert set(marlin.Layer(256, 512, bias=True).state_dict()) == {"B", "s", "bias"}
    assert list(layer.parameters()) == []


def test_a_script_for_the_published_api_runs_unchanged(device):
    m, k, n, groupsize = 17, 512, 256, 128
    linear = nn.Linear(k, n)
    reference, scales = quantised_linear(n, k, groupsize)
    linear.weight.data = reference.weight.data.to(device)
    s = scales.t().to(device)  # (groups, n)

    layer = marlin.Layer(256, 256, groupsize=-1)
    layer.n, layer.k = n, k
    layer.groupsize = groupsize
    layer.B = torch.empty((k // 16, n * 16 // 8), dtype=torch.int, device=device)
    layer.s = torch.empty((k // groupsize, n), dtype=torch.half, device=device)
    layer.pack(linear, s.t())
    A = torch.randn((m, k), dtype=torch.half, device=device)
    C = torch.zeros((m, n), dtype=torch.half, device=device)
    workspace = torch.zeros(n // 128 * 16, device=device)
    marlin.mul(A, layer.B, C, layer.s, workspace, 128, 128, -1)
    assert error(C, A.double() @ linear.weight.double().t()) < TOLERANCE[torch.float16]

    # and what the published Layer.forward does
    C = torch.empty(A.shape[:-1] + (layer.s.shape[1],), dtype=A.dtype, device=A.device)
    views = A.view((-1, A.shape[-1])), C.view((-1, C.shape[-1]))
    marlin.mul(views[0], layer.B, views[1], layer.s, layer.workspace.new_zeros(32, device=device))
    assert error(C, A.double() @ linear.weight.double().t()) < TOLERANCE[torch.float16]


def test_pack_makes_buffers_for_the_attributes_of_the_moment():
    linear, scales = quantised_linear(130, 96, 32)
    layer = marlin.Layer(256, 256)
    layer.k, layer.n, layer.groupsize = 96, 130, 32
    layer.pack(linear, scales)
    assert layer.B.shape == (6, 2 * 192) and layer.s.shape == (3, 192)
    assert torch.equal(layer.unpack(), linear.weight)
    layer.groupsize = -1  # as the published attribute never was, but callers write it
    linear, scales = quantised_linear(130, 96, -1)
    layer.pack(linear, scales)
    assert torch.equal(layer.unpack(), linear.weight)


def test_the_bias_of_a_linear_is_left_alone_by_a_layer_without():
    linear, scales = quantised_linear(64, 64, -1, bias=True)
    layer = marlin.Layer(64, 64)
    layer.pack(linear, scales)
    assert layer.bias is None


def test_state_dict_round_trip_keeps_every_bit():
    linear, scales = quantised_linear(130, 100, 32, bias=True)
    layer = marlin.Layer(100, 130, 32, bias=True)
    layer.pack(linear, scales)
    other = marlin.Layer(100, 130, 32, bias=True)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 100)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_a_state_dict_of_another_shape_is_refused_by_torch():
    layer = marlin.Layer(128, 128, 64)
    with pytest.raises(RuntimeError, match="size mismatch for B"):
        layer.load_state_dict(marlin.Layer(128, 64, 64).state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for s"):
        layer.load_state_dict(marlin.Layer(128, 128, 32).state_dict())
    with pytest.raises(RuntimeError, match='Missing key.*"B"'):
        layer.load_state_dict({"s": layer.s})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_casting_a_model_leaves_the_scales_alone(dtype):
    linear, scales = quantised_linear(64, 64, 32, bias=True)
    layer = marlin.Layer(64, 64, 32, bias=True)
    layer.pack(linear, scales)
    before = layer.s.clone()
    layer.to(dtype)
    assert layer.s.dtype == torch.float16 and torch.equal(layer.s, before)
    assert layer.bias.dtype == dtype
    if dtype != torch.float64:
        assert layer(torch.randn(2, 64, dtype=dtype)).dtype == dtype


def test_a_float16_bias_serves_any_dtype():
    layer = marlin.Layer(64, 64, 32, bias=True)
    layer.bias.fill_(1.5)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert bool((layer(torch.randn(2, 64, dtype=dtype)) == 1.5).all())


def test_a_layer_is_made_on_meta_and_filled_later():
    layer = marlin.Layer(100, 130, 32, bias=True, device="meta")
    assert all(t.is_meta for t in layer.buffers())
    layer.to_empty(device="cpu")
    source = marlin.Layer(100, 130, 32, bias=True)
    linear, scales = quantised_linear(130, 100, 32, bias=True)
    source.pack(linear, scales)
    layer.load_state_dict(source.state_dict())
    x = torch.randn(3, 100)
    assert torch.equal(layer(x), source(x))


WRONG_SIZES = [
    (0, 64, -1, "infeatures is 0"),
    (64, -1, -1, "outfeatures -1"),
    (64, 64, 0, "groupsize is 0"),
]
WRONG_SIZES += [(64, 64, 24, "groupsize is 24"), (64, 64, -2, "groupsize is -2")]


@pytest.mark.parametrize("k, n, groupsize, message", WRONG_SIZES)
def test_a_size_that_no_layer_has_is_named(k, n, groupsize, message):
    with pytest.raises(ValueError, match=message):
        marlin.Layer(k, n, groupsize)


def weight_with(value):
    linear, scales = quantised_linear(64, 96, 32)
    linear.weight.data[63, 95] = value
    return linear, scales


def scales_with(value):
    linear, scales = quantised_linear(64, 96, 32)
    scales = scales.float()
    scales[63, 2] = value
    return linear, scales


WRONG_PACKS = {
    "weight shape": (
        lambda: quantised_linear(96, 64, 32),
        r"linear.weight has shape \(96, 64\) but should be \(64, 96\)",
    ),
    "scales shape": (
        lambda: quantised_linear(64, 96, 16),
        r"scales has shape \(64, 6\) but should be \(64, 3\)",
    ),
    "scales turned": (
        lambda: (weight_with(0)[0], weight_with(0)[1].t()),
        r"scales has shape \(3, 64\)",
    ),
    "weight nan": (lambda: weight_with(float("nan")), "linear.weight has NaN or Inf"),
    "weight inf": (lambda: weight_with(-float("inf")), "linear.weight has NaN or Inf"),
    "scale nan": (lambda: scales_with(float("nan")), "scales as float16 has NaN or Inf"),
    "scale too large": (lambda: scales_with(1e5), "scales as float16 has NaN or Inf"),
}


@pytest.mark.parametrize("make, message", WRONG_PACKS.values(), ids=WRONG_PACKS)
def test_a_wrong_pack_is_refused_and_changes_nothing(make, message):
    layer = marlin.Layer(96, 64, 32)
    layer.pack(*quantised_linear(64, 96, 32))
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=message):
        layer.pack(*make())
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


def test_pack_asks_for_a_bias_that_the_layer_has():
    layer = marlin.Layer(64, 64, bias=True)
    with pytest.raises(ValueError, match="linear.bias is None but this layer has a bias"):
        layer.pack(*quantised_linear(64, 64, -1))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(100, 64)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU()) for _ in range(2)]
        )
        self.tied = self.first
        self.attention = nn.MultiheadAttention(64, 2)
        self.lm_head = nn.Linear(64, 10)


def test_replace_linear_swaps_what_the_filter_takes():
    model = Model()
    names = []

    def take(name):
        names.append(name)
        return name != "lm_head"

    bias = model.first.bias.detach().clone()
    marlin.replace_linear(model, take, groupsize=32)
    assert sorted(names) == ["blocks.0.0", "blocks.1.0", "first", "lm_head", "tied"]
    assert isinstance(model.first, marlin.Layer) and isinstance(model.blocks[1][0], marlin.Layer)
    assert model.tied is model.first
    assert type(model.lm_head) is nn.Linear
    assert torch.equal(model.first.bias, bias.half()) and model.blocks[0][0].bias is None
    assert (model.first.k, model.first.n, model.first.groupsize) == (100, 64, 32)
    # multi-head attention reads the weight of its projection itself
    x = torch.randn(3, 1, 64)
    assert model.attention(x, x, x)[0].shape == x.shape


def test_replace_linear_puts_its_name_before_the_others():
    names = []
    marlin.replace_linear(Model(), lambda name: names.append(name) or False, name="model.layers")
    assert "model.layers.blocks.0.0" in names
    assert all(name.startswith("model.layers.") for name in names)


def test_replaced_model_computes_after_packing():
    model = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 32))
    dense = copy.deepcopy(model).half()
    scales = {}
    for name, linear in dense.named_children():
        if isinstance(linear, nn.Linear):
            linear.weight.data, scales[name] = (lambda pair: (pair[0].weight.data, pair[1]))(
                quantised_linear(linear.out_features, linear.in_features, 32)
            )
    marlin.replace_linear(model, groupsize=32)
    for name, layer in model.named_children():
        if isinstance(layer, marlin.Layer):
            layer.pack(dense.get_submodule(name), scales[name])
    x = torch.randn(5, 96)
    assert error(model(x), dense.double()(x.double())) < 2 * TOLERANCE[torch.float16]  # two layers


def test_print_shows_the_sizes():
    assert repr(marlin.Layer(576, 192, 64, bias=True)) == "Layer(576, 192, groupsize=64, bias=True)"
    assert repr(marlin.Layer(576, 192)) == "Layer(576, 192, groupsize=-1, bias=False)"
