"""choose_config_sm80: a pure function, so that every device's choice is checked on a machine
without a GPU."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marlin import _C

# capability, SMs, shared memory that one CTA may use: 227, 163 and 99 KB (CUDA C++ Programming
# Guide, table of capabilities)
DEVICES = {
    "A100": (80, 108, 166912),
    "A10": (86, 72, 101376),
    "RTX 4060": (89, 24, 101376),
    "L40S": (89, 142, 101376),
    "H100": (90, 132, 232448),
    "H200 slice": (90, 16, 232448),
    "newer": (120, 170, 101376),
}
SHAPES = [(4096, 4096), (4096, 28672), (28672, 8192), (576, 192), (64, 64), (16, 64), (1040, 4160)]
SIZES_M = [1, 7, 8, 9, 15, 16, 17, 33, 64, 65, 128, 129, 256, 1000, 8192, 1 << 20]

devices = pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)


def choose(M, N, K, device, group=-1, **hints):
    return _C.choose_config_sm80(M, N, K, group, *device, **hints)


def check(config, device):
    assert config["tile_idx"] >= 0
    assert config["features"] in (64, 128, 256)
    assert config["tokens"] > 0 and config["tokens"] % 8 == 0
    assert 1 <= config["grid"] <= 4 * device[1]  # a persistent grid: a few CTAs on each SM
    assert config["num_locks"] >= 0 and config["num_partials"] >= 0
    # what is shared between CTAs is counted: locks and scratch come together
    assert (config["num_locks"] > 0) == (config["num_partials"] > 0)


@devices
@pytest.mark.parametrize("K, N", SHAPES)
def test_every_device_has_a_config_for_every_shape(device, K, N):
    for M in SIZES_M:
        check(choose(M, N, K, device), device)


@settings(max_examples=300, deadline=None)
@given(
    M=st.integers(1, 20000),
    chunks=st.integers(1, 1000),
    groups=st.integers(1, 1000),
    group=st.sampled_from([32, 64, 128]),
    device=st.sampled_from(list(DEVICES.values())),
)
def test_any_problem_has_a_config_and_always_the_same(M, chunks, groups, group, device):
    config = choose(M, 64 * chunks, group * groups, device, group)
    check(config, device)
    assert choose(M, 64 * chunks, group * groups, device, group) == config


@devices
def test_scratch_stays_small(device):
    # partial sums of the tiles that stripes cut: at most two for each CTA, whatever the problem
    for M in SIZES_M:
        config = choose(M, 28672, 8192, device)
        assert config["num_partials"] <= 2 * config["grid"] * config["features"] * config["tokens"]


@devices
@pytest.mark.parametrize("num_sms", [1, 3, 10])
def test_a_wish_for_fewer_sms_is_granted(device, num_sms):
    for M in (1, 64, 1000):
        config = choose(M, 4096, 4096, device, num_sms_hint=num_sms)
        assert 1 <= config["grid"] <= 4 * num_sms


@devices
def test_a_wish_for_a_tile_is_granted_or_has_no_config(device):
    granted = 0
    for M in (1, 16, 64, 1000):
        for tile_n in (64, 128, 256):
            config = choose(M, 4096, 4096, device, tile_n=tile_n)
            assert config["tile_idx"] < 0 or config["features"] == tile_n
            granted += config["tile_idx"] >= 0
    assert granted > 0


def test_a_device_with_too_little_shared_memory_has_no_config():
    assert choose(16, 4096, 4096, (80, 108, 4096))["tile_idx"] == -1


@pytest.mark.parametrize(
    "M, N, K, group", [(1, 63, 64, -1), (1, 64, 63, -1), (-1, 64, 64, -1), (1, 64, 64, 48)]
)
def test_sizes_that_the_format_cannot_hold_are_refused(M, N, K, group):
    with pytest.raises(ValueError, match="the sizes do not fit the packed format"):
        choose(M, N, K, DEVICES["A100"], group)
