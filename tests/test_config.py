"""choose_config_sm80, _sm90 and _sm90_few: pure functions, so that every device's choice is
checked on a machine without a GPU."""

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
    assert config["features"] in (64, 96, 128, 256)
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


# --------------------------------------------------------------------------------------------------
# Hopper's own kernel
# --------------------------------------------------------------------------------------------------

HOPPER = DEVICES["H100"]


def choose_sm90(M, N, K, device=HOPPER, group=-1, **hints):
    return _C.choose_config_sm90(M, N, K, group, *device, **hints)


def has_whole_tiles_only(config, M, N, num_sms):
    """Each cluster the same number of tiles of C, and no more than on all multiprocessors."""
    for ctas, width in (1, 1), (2, 1), (2, 2):  # CTAs of a cluster, its tiles side by side
        tiles = -(-N // (config["features"] * width)) * -(-M // config["tokens"])
        per_cluster = -(-tiles // (num_sms // ctas))
        if config["stripes"] == 0 and tiles * ctas == per_cluster * config["grid"]:
            return True
    return False


@settings(max_examples=300, deadline=None)
@given(
    M=st.integers(1, 20000),
    chunks=st.integers(1, 1000),
    groups=st.integers(1, 1000),
    group=st.sampled_from([-1, 32, 64, 128, 256]),
    num_sms=st.integers(2, 160),
)
def test_hopper_has_a_config_for_any_problem_and_always_the_same(M, chunks, groups, group, num_sms):
    device, K = (90, num_sms, 232448), groups * max(group, 16)
    config = choose_sm90(M, 64 * chunks, K, device, group)
    assert config["tile_idx"] >= 0
    assert config["features"] % 64 == 0 and config["tokens"] % 8 == 0
    assert config["grid"] <= num_sms
    if config["grid"] < num_sms - 1:  # clusters of two leave an odd one out
        assert has_whole_tiles_only(config, M, 64 * chunks, num_sms)
    assert 0 <= config["stripes"] <= config["grid"]
    # locks and scratch are there for the clusters that share tiles, and for these only
    assert (config["stripes"] > 0) == (config["num_locks"] > 0) == (config["num_partials"] > 0)
    # at most two tiles for each CTA, and up to four times as many places as sums: the two blocks of
    # 16 tokens are kept as if each of four teams in each of two CTAs had one
    assert config["num_partials"] <= 8 * config["grid"] * config["features"] * config["tokens"]
    assert choose_sm90(M, 64 * chunks, K, device, group) == config


def test_hopper_deals_whole_tiles_out_evenly_where_memory_decides():
    config = choose_sm90(48, 57344, 4096, group=128)
    tiles = 57344 // config["features"]
    assert config["stripes"] == 0 and config["grid"] < HOPPER[1] and tiles % config["grid"] == 0


@pytest.mark.parametrize(
    "device", [(80, 108, 166912), (89, 142, 101376), (100, 148, 232448), (90, 132, 101376)]
)
def test_the_kernel_for_hopper_takes_hopper_only(device):
    assert choose_sm90(64, 4096, 4096, device)["tile_idx"] == -1


@pytest.mark.parametrize("group", [48, 96, 160])
def test_the_kernel_for_hopper_leaves_groups_that_cross_its_stages_to_the_other(group):
    assert choose_sm90(64, 4096, 48 * 160, group=group)["tile_idx"] == -1
    assert choose(64, 4096, 48 * 160, HOPPER, group=group if group % 32 == 0 else 32)


def test_every_tile_of_hopper_can_be_asked_for():
    found = [choose_sm90(64, 4096, 4096, tile_idx=i)["tile_idx"] for i in range(64)]
    num_tiles = found.index(-1)
    assert found == list(range(num_tiles)) + [-1] * (64 - num_tiles)


def test_a_wish_for_fewer_sms_is_granted_on_hopper():
    for wish in (2, 3, 10):
        for M in (1, 64, 1000):
            config = choose_sm90(M, 4096, 4096, num_sms_hint=wish)
            assert config["grid"] in (wish - wish % 2, wish) or (
                config["grid"] < wish and has_whole_tiles_only(config, M, 4096, wish)
            )


# --------------------------------------------------------------------------------------------------
# Hopper's kernel for few tokens
# --------------------------------------------------------------------------------------------------


def choose_few(M, N, K, device=HOPPER, group=-1, **hints):
    return _C.choose_config_sm90_few(M, N, K, group, *device, **hints)


@settings(max_examples=300, deadline=None)
@given(
    M=st.integers(1, 16),
    chunks=st.integers(1, 1000),
    groups=st.integers(1, 200),
    group=st.sampled_from([-1, 32, 64, 96, 128, 256]),
    num_sms=st.integers(1, 160),
)
def test_few_tokens_have_a_config_and_always_the_same(M, chunks, groups, group, num_sms):
    device, K = (90, num_sms, 232448), 128 + groups * max(group, 16) // 128 * 128
    group = group if group > 0 and K % group == 0 else -1
    N, stages = 64 * chunks, -(-K // 64)
    config = choose_few(M, N, K, device, group)
    assert config["tile_idx"] >= 0
    assert config["features"] == 64 and config["tokens"] >= M
    assert 1 <= config["grid"] <= min(2 * num_sms, chunks * stages)  # at most two on each SM
    # words are there for CTAs that share tiles, and for these only: two parts and a counter each
    part = config["features"] * config["tokens"]
    shared = chunks % config["grid"] != 0
    assert config["num_locks"] == (config["grid"] * (2 * part + 1) if shared else 0)
    assert config["num_partials"] == 0
    assert choose_few(M, N, K, device, group) == config


@pytest.mark.parametrize(
    ("M", "N", "K", "device", "group"),
    [
        (17, 4096, 4096, HOPPER, -1),  # too many tokens
        (1, 4096, 4096, DEVICES["A100"], -1),
        (1, 4096, 4096, (90, 132, 49152), -1),  # too little shared memory
        (1, 4096, 64, HOPPER, -1),  # a single stage: no number to divide by
        (1, 64 << 11, 64 << 11, HOPPER, -1),  # too many for the division by multiplication
        (1, 4096, 48 * 160, HOPPER, 48),  # a group crosses the half of a stage
    ],
)
def test_the_kernel_for_few_tokens_leaves_to_others_what_it_cannot_do(M, N, K, device, group):
    assert choose_few(M, N, K, device, group)["tile_idx"] == -1


def test_a_division_by_multiplication_is_exact_up_to_the_largest_size_that_is_taken():
    # the kernel divides a stage's place in the line by the stages of a tile: umulhi(place, magic)
    for chunks, stages in [(1, 2), (896, 128), (128, 448), (1, 65535), (4095, 1024), (2, 46340)]:
        assert choose_few(1, 64 * chunks, 64 * stages)["tile_idx"] >= 0
        magic = -(-(2**32) // stages)
        for tile in {0, chunks // 2, chunks - 1}:
            for place in (tile * stages, tile * stages + stages - 1):
                assert place * magic >> 32 == tile


def test_every_tile_for_few_tokens_can_be_asked_for():
    found = [choose_few(1, 4096, 4096, tile_idx=i)["tile_idx"] for i in range(64)]
    num_tiles = found.index(-1)
    assert found == list(range(num_tiles)) + [-1] * (64 - num_tiles)


def test_a_wish_for_fewer_ctas_is_granted_for_few_tokens():
    for wish in (1, 2, 3, 10):
        for M in (1, 8):
            assert choose_few(M, 4096, 4096, num_sms_hint=wish)["grid"] <= wish
