"""The packed format: marlin/layout.py against csrc/layout.h, the drawn table, and itself."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marlin import _C, layout

SHAPES = [(16, 64), (48, 192), (112, 64), (32, 320), (272, 128), (208, 832)]


@pytest.mark.parametrize("K, N", SHAPES)
def test_every_index_is_that_of_layout_h(K, N):
    word, shift, scale, scale_channelwise = _C.layout_tables(K, N)
    word_twin, shift_twin = layout.nibble_index(K, N)
    assert torch.equal(word_twin, word)
    assert torch.equal(shift_twin.expand(K, N), shift)
    assert torch.equal(layout.scale_index(N), scale)
    assert torch.equal(layout.scale_index_channelwise(N), scale_channelwise)


@pytest.mark.parametrize("K, N", SHAPES)
def test_every_nibble_of_B_has_one_owner(K, N):
    word, shift, _, _ = _C.layout_tables(K, N)
    nibbles = (8 * word + shift // 4).flatten().sort().values
    assert torch.equal(nibbles, torch.arange(K * N))


def test_a_word_holds_the_drawn_block():
    # lane 4g + t, word j, of k16 row 1 and chunk 1: the eight elements, least significant nibble
    # first
    K, N, g, t, j = 32, 128, 5, 2, 3
    q = torch.randint(0, 16, (K, N), dtype=torch.uint8)
    w = int(layout.pack_weights(q)[1, 128 + 4 * (4 * g + t) + j]) & 0xFFFFFFFF
    rows = [2 * t, 2 * t + 8, 2 * t, 2 * t + 8, 2 * t + 1, 2 * t + 9, 2 * t + 1, 2 * t + 9]
    columns = [g, g, g + 8, g + 8, g, g, g + 8, g + 8]
    expected = [int(q[16 + k, 64 + 16 * j + n]) for k, n in zip(rows, columns, strict=True)]
    assert [(w >> (4 * i)) & 15 for i in range(8)] == expected


@pytest.mark.parametrize("K, N", SHAPES)
def test_pack_puts_every_value_where_layout_h_says(K, N):
    q = torch.randint(0, 16, (K, N), dtype=torch.uint8)
    word, shift, _, _ = _C.layout_tables(K, N)
    B = layout.pack_weights(q)
    assert B.shape == (K // 16, 2 * N) and B.dtype == torch.int32 and B.is_contiguous()
    assert torch.equal((B.flatten()[word] >> shift) & 15, q.int())


@settings(max_examples=40, deadline=None)
@given(kt=st.integers(1, 140), nt=st.integers(1, 9), seed=st.integers(0, 99), flip=st.booleans())
def test_unpack_is_the_inverse_of_pack(kt, nt, seed, flip):
    generator = torch.Generator().manual_seed(seed)
    K, N = 16 * kt, 64 * nt
    q = torch.randint(0, 16, (K, N), dtype=torch.uint8, generator=generator)
    if flip:  # a transposed view, as Layer.pack gives
        q = q.t().contiguous().t()
    B = layout.pack_weights(q)
    assert torch.equal(layout.unpack_weights(B), q)
    assert torch.equal(layout.pack_weights(layout.unpack_weights(B)), B)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_pack_takes_any_integer_dtype(dtype):
    q = torch.randint(0, 16, (32, 64), dtype=torch.uint8)
    assert torch.equal(layout.pack_weights(q.to(dtype)), layout.pack_weights(q))


@pytest.mark.parametrize("groups, N", [(1, 64), (1, 320), (2, 64), (3, 192), (17, 128)])
def test_scales_are_where_layout_h_says(groups, N):
    s = torch.randn(groups, N).half()
    _, _, scale, scale_channelwise = _C.layout_tables(16, N)
    packed = layout.permute_scales(s)
    assert packed.is_contiguous() and packed.dtype == torch.half
    assert torch.equal(packed[:, scale_channelwise if groups == 1 else scale], s)
    assert torch.equal(layout.unpermute_scales(packed), s)


def test_the_drawn_order_of_groups_is_that_of_group_order():
    g_idx = torch.tensor([1, 0, 1, 0, 0, 0])
    assert layout.group_order(g_idx, 6, 4).tolist() == [1, 3, 4, 5, 0, 2]


@settings(max_examples=30, deadline=None)
@given(k=st.integers(1, 300), group=st.sampled_from([16, 32, 48]), seed=st.integers(0, 99))
def test_columns_in_the_order_of_groups_are_sorted_and_stable(k, group, seed):
    generator = torch.Generator().manual_seed(seed)
    g_idx = (torch.arange(k) // group)[torch.randperm(k, generator=generator)]
    order = layout.group_order(g_idx.int(), k, group)
    assert torch.equal(order.sort().values, torch.arange(k))
    assert torch.equal(g_idx[order], torch.arange(k) // group)
    for g in range(-(-k // group)):
        members = order[group * g : group * (g + 1)]
        assert torch.equal(members, members.sort().values)


@pytest.mark.parametrize("count", [1, 1 << 30])
def test_bytes_do_not_depend_on_how_many_are_packed_at_a_time(count, monkeypatch):
    # three chunks of a CPU, the last short
    q = torch.randint(0, 16, (1040, 1088), dtype=torch.uint8)
    B = layout.pack_weights(q)
    monkeypatch.setattr(layout, "at_a_time", lambda usual, device: count)
    assert torch.equal(layout.pack_weights(q), B)
    assert torch.equal(layout.pack_weights(q.t().contiguous().t()), B)
    assert torch.equal(layout.unpack_weights(B), q)


@pytest.mark.gpu
def test_packing_on_a_gpu_gives_the_same_bytes():
    q = torch.randint(0, 16, (272, 832), dtype=torch.uint8)
    B = layout.pack_weights(q.cuda())
    assert torch.equal(B.cpu(), layout.pack_weights(q))
    assert torch.equal(layout.unpack_weights(B).cpu(), q)


@pytest.mark.parametrize("by_features", [False, True])
def test_packing_a_large_layer_takes_seconds(by_features):
    # The goal is (8192, 28672) in 10 s on 2 cores; an eighth of it in an eighth of the processor
    # time. Processor time, since other programs share the machine; the best of three, since they
    # also slow its memory.
    q = torch.randint(0, 16, (8192, 3584), dtype=torch.uint8)
    if by_features:
        q = q.t().contiguous().t()
    seconds = []
    for _ in range(3):
        start = time.process_time()
        layout.pack_weights(q)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 2 * 10 / 8


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: layout.pack_weights(torch.zeros(15, 64, dtype=torch.uint8)),
            r"q has shape \(15, 64\)",
        ),
        (
            lambda: layout.pack_weights(torch.zeros(16, 65, dtype=torch.uint8)),
            r"q has shape \(16, 65\)",
        ),
        (lambda: layout.pack_weights(torch.zeros(16, dtype=torch.uint8)), r"q has shape \(16,\)"),
        (lambda: layout.pack_weights(torch.zeros(16, 64)), "q is torch.float32"),
        (lambda: layout.pack_weights(torch.full((16, 64), 16)), "outside 0..15"),
        (lambda: layout.pack_weights(torch.full((16, 64), -1)), "outside 0..15"),
        (lambda: layout.pack_weights(torch.full((64, 16), 16).t()), "outside 0..15"),
        (lambda: layout.pack_weights(torch.full((64, 16), -1).t()), "outside 0..15"),
        (lambda: layout.pack_weights(torch.full((64, 16), 128).byte().t()), "outside 0..15"),
        (lambda: layout.unpack_weights(torch.zeros(1, 128)), "B is torch.float32"),
        (lambda: layout.unpack_weights(torch.zeros(1, 64).int()), r"B has shape \(1, 64\)"),
        (lambda: layout.permute_scales(torch.zeros(64)), r"permute_scales: s has shape \(64,\)"),
        (
            lambda: layout.unpermute_scales(torch.zeros(2, 63)),
            r"unpermute_scales: s has shape \(2, 63\)",
        ),
    ],
)
def test_a_wrong_argument_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
