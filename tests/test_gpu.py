"""The GPU kernels against float64, and what a caller may do with them. Skipped without a GPU.

Depends on gpu_problems.py. `make gpu-check` runs it; under two minutes on an H200.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpu_problems import (
    DEVICE,
    ERR_LIMIT,
    Weight,
    bits,
    cases_of_all_configs,
    forced,
    mul,
    random_A,
    random_weight,
    relative_error,
    weight_of,
)
from torch import Tensor

import marlin
from marlin import _C

CAN_RUN = torch.cuda.is_available() and _C.has_cuda()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CAN_RUN, reason="needs a CUDA GPU and a build with the CUDA kernels"),
]

# Hopper has a kernel of its own, beside which the other one stays selectable.
BACKENDS = (
    ["auto", "sm80"] if CAN_RUN and torch.cuda.get_device_capability() == (9, 0) else ["auto"]
)


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with forced(request.param):
        yield request.param


TOKENS = [0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 48, 63, 64, 65, 96, 100, 127, 128, 129]
TOKENS += [255, 257, 511, 1000]
SHAPES = [  # (K, N)
    (16, 64),
    (16, 320),
    (32, 128),
    (48, 192),
    (64, 64),
    (64, 4096),
    (80, 576),
    (128, 128),
    (128, 320),
    (256, 64),
    (256, 192),
    (256, 4096),
    (576, 576),
    (1040, 64),
    (1040, 320),
    (1040, 4096),
    (4096, 64),
    (4096, 192),
    (4096, 576),
    (4096, 4096),
]
GROUPS = (-1, 32, 64, 128)
WEIGHTS = [
    (K, N, group)
    for K, N in SHAPES
    for group in GROUPS
    if group == -1 or (group < K and K % group == 0)
]

GUARD = 1024  # float16 elements before and after C: keeps C 16-byte aligned
GUARD_BITS = 0x5A5A


def guarded_mul(A: Tensor, weight: Weight, **hints: int) -> Tensor:
    """marlin.mul into a C of NaN between guards, which it must leave alone."""
    M, N = len(A), weight.dense.shape[1]
    buffer = torch.full((M * N + 2 * GUARD,), GUARD_BITS, dtype=torch.int16, device=DEVICE)
    C = buffer[GUARD : GUARD + M * N].view(torch.half).view(M, N)
    C.fill_(torch.nan)
    marlin.mul(A, weight.B, C, weight.s, weight.workspace, **hints)
    guards = torch.cat([buffer[:GUARD], buffer[GUARD + M * N :]])
    assert (guards == GUARD_BITS).all(), "wrote outside C"
    return C


# --------------------------------------------------------------------------------------------------
# Values
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("K", "N", "group"), WEIGHTS)
def test_mul_is_within_the_promised_error_for_every_number_of_tokens(
    K: int, N: int, group: int
) -> None:
    weight = random_weight(K, N, group)
    half = weight.dense.half()
    for M in TOKENS:
        A = random_A(M, K)
        C = guarded_mul(A, weight)
        if M == 0:
            continue
        exact = A.double() @ weight.dense
        err = relative_error(C, exact)
        # A kernel may or may not round the weights to FP16: 2e-4 more, and with few elements the
        # norm is no average.
        assert err <= (ERR_LIMIT if M * N >= 1024 else 1.4 * ERR_LIMIT), f"M={M}"
        # Both round once to FP16; 2x is promised.
        assert err <= 2 * relative_error(A @ half, exact), f"M={M}"


@pytest.mark.parametrize("group", [-1, 32, 64, 128])
@pytest.mark.parametrize("M", [1, 15, 16, 17, 33, 64, 101, 257])
def test_whole_numbers_come_out_exactly(M: int, group: int) -> None:
    K, N = 1024, 320
    generator = torch.Generator().manual_seed(M)
    q = torch.randint(0, 16, (K, N), generator=generator, dtype=torch.uint8)
    s = torch.randint(1, 3, (1 if group == -1 else K // group, N), generator=generator).half()
    A = torch.randint(-1, 2, (M, K), generator=generator).half()
    weight = weight_of(q.to(DEVICE), s.to(DEVICE))
    exact = A.double().to(DEVICE) @ weight.dense
    assert exact.abs().max() <= 2048  # what FP16 holds exactly
    assert torch.equal(mul(A.to(DEVICE), weight).double(), exact)


@pytest.mark.parametrize("sms", [-1, 8])
@pytest.mark.parametrize("group", [-1, 32, 64, 128])
@pytest.mark.parametrize("M", [16, 20, 48, 64, 100])
@pytest.mark.parametrize(
    ("rows", "scales"),
    [
        (slice(0, 1), [2.0**-5, -3.0, 0.04, 10.0]),
        (slice(-1, None), [0.0, 2.0**-5, -3.0, 2.0**-12]),
        (slice(None), [n * 2.0**-24 for n in (203, -157, 349, -229)]),
    ],
    ids=["large", "last", "tiny"],
)
def test_large_and_tiny_scales_are_right_and_change_no_other_feature(
    rows: slice, scales: list[float], M: int, group: int, sms: int
) -> None:
    # Scales from 2^-11 to 2^-5 have a way of their own, for tiles that have no others. Its operands
    # are eighths of weights: of these tiny, odd multiples of FP16's least step they would be off by
    # 0.1% and more in each feature's norm. On 8 SMs a CTA has tiles of both kinds.
    K, N = 2048, 4096
    generator = torch.Generator().manual_seed(M)
    q = torch.randint(0, 16, (K, N), generator=generator, dtype=torch.uint8).to(DEVICE)
    s = 0.002 + 0.01 * torch.rand(1 if group == -1 else K // group, N, generator=generator)
    s = s.half().to(DEVICE)
    s[:, 70] = 0.0312  # still below 2^-5
    s[:, 71] = 2.0**-11
    A = random_A(M, K)
    weight = weight_of(q, s)
    C = mul(A, weight, sms=sms)
    assert relative_error(C, A.double() @ weight.dense) <= ERR_LIMIT
    changed = [5, 64, 2049, 4095]
    s[rows, changed] = torch.tensor(scales, device=DEVICE).half()
    changed_weight = weight_of(q, s)
    weight.s.copy_(changed_weight.s)  # in place: nothing of what they were is remembered
    C_changed = mul(A, weight, sms=sms)
    exact = A.double() @ changed_weight.dense
    for n in changed:
        if exact[:, n].any():
            assert relative_error(C_changed[:, n], exact[:, n]) <= ERR_LIMIT
        else:
            assert not C_changed[:, n].any()
    others = torch.ones(N, dtype=torch.bool, device=DEVICE)
    others[changed] = False
    assert torch.equal(bits(C_changed[:, others]), bits(C[:, others]))
    assert torch.equal(bits(mul(A, weight, sms=sms)), bits(C_changed))


@pytest.mark.parametrize(("M", "K", "N"), [(16, 4096, 6144), (32, 4096, 6144), (48, 8192, 8192)])
def test_thousands_of_launches_in_a_row_have_the_same_bits(M: int, K: int, N: int) -> None:
    # Data that come late, as they do once in some thousand launches, are waited for.
    weights = [random_weight(K, N, 128, seed=seed) for seed in range(4)]
    A = random_A(M, K)
    expected = [bits(mul(A, weight)) for weight in weights]
    C = [torch.full((M, N), torch.nan, dtype=torch.half, device=DEVICE) for _ in weights]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(20):
                weight = weights[i % 4]
                marlin.mul(A, weight.B, C[i % 4], weight.s, weight.workspace)
        for _ in range(20):
            for _ in range(50):
                graph.replay()
            stream.synchronize()
            for result, bits_of_one in zip(C, expected, strict=True):
                assert torch.equal(bits(result), bits_of_one)


@pytest.mark.parametrize("M", [1, 8, 17, 64, 200])
def test_nan_and_inf_stay_in_their_row(M: int) -> None:
    weight = random_weight(1040, 320)
    A = random_A(M, 1040)
    clean = mul(A, weight)
    for row in {0, M // 2, M - 1}:
        for value in (torch.nan, torch.inf):
            bad = A.clone()
            bad[row, 1039] = value
            C = mul(bad, weight)
            assert not C[row].isfinite().any()
            others = torch.arange(M, device=DEVICE) != row
            assert torch.equal(bits(C[others]), bits(clean[others]))


@pytest.mark.parametrize("M", [1, 33, 128])
def test_what_float16_cannot_hold_becomes_inf(M: int) -> None:
    q = torch.full((256, 64), 15, dtype=torch.uint8, device=DEVICE)
    weight = weight_of(q, torch.ones(2, 64, dtype=torch.half, device=DEVICE))
    A = torch.full((M, 256), 100.0, dtype=torch.half, device=DEVICE)
    A[M // 2] = -100.0
    C = mul(A, weight)
    assert C.isinf().all()
    assert (C[M // 2] < 0).all()


def test_cancelling_sums_beyond_float16_are_exact() -> None:
    # Sums of up to 2048 * 7 * 64 do not fit into float16, their total does: partial sums, within
    # a CTA or across CTAs, must be kept in FP32.
    K, N = 4096, 64
    q = torch.full((K, N), 15, dtype=torch.uint8, device=DEVICE)
    weight = weight_of(q, torch.ones(1, N, dtype=torch.half, device=DEVICE))
    A = torch.full((16, K), 64.0, dtype=torch.half, device=DEVICE)
    A[:, K // 2 :] = -64.0
    A[:, -1] = -63.0
    assert torch.equal(mul(A, weight), torch.full((16, N), 7.0, device=DEVICE).half())


def test_cpu_and_gpu_agree() -> None:
    for M, K, N, group in [(1, 256, 128, 64), (17, 1040, 192, -1), (65, 512, 320, 128)]:
        weight = random_weight(K, N, group)
        A = random_A(M, K)
        C = torch.empty(M, N, dtype=torch.half)
        marlin.mul(A.cpu(), weight.B.cpu(), C, weight.s.cpu(), weight.workspace.cpu())
        # Each is within ERR_LIMIT of the exact product.
        assert relative_error(mul(A, weight), C.double().to(DEVICE)) <= 2 * ERR_LIMIT


def test_every_configuration_is_right() -> None:
    for kind, case in cases_of_all_configs().items():
        A = random_A(case.M, case.K)
        weight = random_weight(case.K, case.N, case.group)
        with forced(case.backend, case.tile_idx):
            C = guarded_mul(A, weight, sms=case.sms)
        err = relative_error(C, A.double() @ weight.dense)
        assert err <= ERR_LIMIT, f"{kind}: {case}"


@pytest.mark.parametrize("thread_n", [-1, 64, 128, 256])
@pytest.mark.parametrize("sms", [-1, 1, 7, 132, 100_000])
def test_hints_do_not_change_what_is_computed(thread_n: int, sms: int) -> None:
    for K, N, group in [(1040, 320, -1), (2048, 576, 64), (128, 64, 32)]:
        weight = random_weight(K, N, group)
        for M in (1, 16, 33, 64, 200, 1000):
            A = random_A(M, K)
            C = guarded_mul(A, weight, thread_n=thread_n, sms=sms)
            err = relative_error(C, A.double() @ weight.dense)
            assert err <= ERR_LIMIT, f"K={K} N={N} M={M}"


# --------------------------------------------------------------------------------------------------
# Tails, strides, large sizes
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_features", [1, 7, 33, 250, 255, 256])
@pytest.mark.parametrize("out_features", [1, 63, 65, 190, 192])
def test_linear_of_a_padded_weight_ignores_the_padding(in_features: int, out_features: int) -> None:
    weight = random_weight(256, 192, 32)
    bias = random_A(1, out_features, seed=2)[0]
    for M in (1, 9, 64, 130):
        x = random_A(M, in_features)
        y = marlin.linear(
            x, weight.B, weight.s, bias, in_features=in_features, out_features=out_features
        )
        product = x.double() @ weight.dense[:in_features, :out_features]
        assert y.shape == (M, out_features)
        assert relative_error(y, product + bias.double()) <= ERR_LIMIT


def test_what_lies_beyond_the_columns_of_a_strided_x_is_not_read_as_values() -> None:
    weight = random_weight(256, 192, 32)
    for in_features in (248, 250):
        wide = torch.full((33, 264), torch.nan, dtype=torch.half, device=DEVICE)
        x = wide[:, :in_features]
        x.copy_(random_A(33, in_features))
        y = marlin.linear(x, weight.B, weight.s, in_features=in_features)
        assert relative_error(y, x.double() @ weight.dense[:in_features]) <= ERR_LIMIT


def test_linear_keeps_leading_dimensions_and_adds_the_bias() -> None:
    weight = random_weight(256, 192, 64)
    bias = random_A(1, 192, seed=2)[0]
    for sizes in [(256,), (3, 256), (2, 5, 256), (2, 1, 3, 256), (0, 256), (4, 0, 256)]:
        x = random_A(7, 7 * 256).flatten()[: torch.Size(sizes).numel()].view(sizes)
        y = marlin.linear(x, weight.B, weight.s, bias)
        assert y.shape == (*sizes[:-1], 192)
        exact = x.double() @ weight.dense + bias.double()
        assert y.numel() == 0 or relative_error(y, exact) <= ERR_LIMIT


@pytest.mark.parametrize("M", [1, 17, 128])
def test_strided_transposed_and_misaligned_A_give_the_bits_of_a_plain_one(M: int) -> None:
    K = 512
    weight = random_weight(K, 192, 128)
    A = random_A(M, K)
    expected = bits(mul(A, weight))
    wide = torch.full((M, 3 * K), torch.nan, dtype=torch.half, device=DEVICE)
    wide[:, K : 2 * K] = A
    odd = torch.full((M, K + 3), torch.nan, dtype=torch.half, device=DEVICE)
    odd[:, 1 : K + 1] = A
    every_second = torch.full((2 * M, K), torch.nan, dtype=torch.half, device=DEVICE)
    every_second[::2] = A
    views = [wide[:, K : 2 * K], odd[:, 1 : K + 1], every_second[::2], A.t().contiguous().t()]
    for view in views:
        assert torch.equal(bits(mul(view, weight)), expected)
    repeated = A[:1].expand(M, K)
    assert torch.equal(bits(mul(repeated, weight)), bits(mul(A[:1].repeat(M, 1), weight)))


def needs_memory(gigabytes: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory")


def check_rows(A: Tensor, C: Tensor, weight: Weight) -> None:
    M = len(A)
    generator = torch.Generator().manual_seed(0)
    some = torch.randint(0, M, (300,), generator=generator).tolist()
    rows = torch.tensor([0, 1, M // 2, M - 2, M - 1, *some], device=DEVICE)
    assert relative_error(C[rows], A[rows].double() @ weight.dense) <= ERR_LIMIT
    for m in range(0, M, 8192):
        assert C[m : m + 8192].isfinite().all()


def test_offsets_into_C_beyond_2_to_the_31_are_right() -> None:
    needs_memory(12)
    weight = random_weight(64, 32768, 32)
    A = torch.randn(70_000, 64, device=DEVICE).half()
    check_rows(A, mul(A, weight), weight)


def test_offsets_into_A_beyond_2_to_the_31_are_right() -> None:
    needs_memory(12)
    weight = random_weight(4096, 64, 128)
    A = torch.empty(540_000, 4096, dtype=torch.half, device=DEVICE).normal_()
    check_rows(A, mul(A, weight), weight)


def test_offsets_into_B_beyond_2_to_the_31_bytes_are_right() -> None:
    needs_memory(16)
    K, N, M = 65_536, 131_072, 3
    B = torch.randint(-(2**31), 2**31, (K // 16, 2 * N), dtype=torch.int32, device=DEVICE)
    s = torch.full((1, N), 0.01, dtype=torch.half, device=DEVICE)
    A = random_A(M, K)
    C = torch.full((M, N), torch.nan, dtype=torch.half, device=DEVICE)
    workspace = torch.zeros(N // 128 * 16, dtype=torch.int32, device=DEVICE)
    marlin.mul(A, B, C, s, workspace)
    assert C.isfinite().all()
    for n in (0, N // 2, N - 64):
        q = marlin.unpack_weights(B[:, 2 * n : 2 * n + 128].contiguous())
        dense = ((q.half() - 8) * s[0, 0]).double()
        assert relative_error(C[:, n : n + 64], A.double() @ dense) <= ERR_LIMIT


# --------------------------------------------------------------------------------------------------
# Repeatability, streams, graphs
# --------------------------------------------------------------------------------------------------

REPEATED = [
    (1, 4096, 4096, 128),
    (8, 4096, 576, 64),
    (16, 8192, 1024, 128),
    (17, 1040, 320, -1),
    (33, 4096, 192, 32),
    (64, 4096, 4096, 128),
    (100, 2048, 576, 64),
    (129, 4096, 1024, 128),
    (300, 1024, 4096, -1),
    (20, 4096, 6144, 128),
    (24, 8192, 8192, 128),
    (32, 4096, 4096, 64),
    (48, 14336, 4096, 128),
    (64, 8192, 1024, 32),
    (96, 4096, 6144, 128),
    (128, 8192, 8192, 128),
    (128, 4096, 28672, 128),
    (200, 14336, 1024, -1),
    (256, 4096, 6144, 128),
    (1000, 2048, 4096, 64),
]


@pytest.mark.parametrize(("M", "K", "N", "group"), REPEATED)
def test_250_repeats_have_the_same_bits(M: int, K: int, N: int, group: int) -> None:
    weight = random_weight(K, N, group)
    A = random_A(M, K)
    expected = bits(mul(A, weight))
    num_different = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(250):
        num_different += (bits(mul(A, weight)) != expected).sum()
    assert num_different.item() == 0


@pytest.mark.parametrize("M", [1, 8, 16, 17, 64, 130, 512])
def test_a_call_that_overlaps_its_predecessor_sees_what_it_wrote_and_spoils_nothing(
    M: int, backend: str
) -> None:
    # Each product reads what the one before wrote, and writes what the one before read. A quarter
    # of the usual scales: twelve products on end stay finite.
    weights = [random_weight(2048, 2048, 128, seed=seed) for seed in range(4)]
    scales = [weight.s / 4 for weight in weights]
    start = random_A(M, 2048)

    def chain(rounds: int) -> Tensor:
        x, y = start.clone(), torch.full_like(start, torch.nan)
        for i in range(rounds):
            weight = weights[i % 4]
            marlin.mul(x, weight.B, y, scales[i % 4], weight.workspace)
            x, y = y, x
        return x

    with forced(backend, overlap=False):
        x = chain(12)
    assert x.isfinite().all()
    assert x.std() > 0
    expected = bits(x)
    for _ in range(50):
        assert torch.equal(bits(chain(12)), expected)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        chain(1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            x = chain(12)
        for _ in range(50):
            graph.replay()
            assert torch.equal(bits(x), expected)


def test_streams_at_once_have_the_same_bits_as_one() -> None:
    problems = [(random_A(M, K, seed=M), random_weight(K, N, g)) for M, K, N, g in REPEATED]
    expected = [bits(mul(A, weight)) for A, weight in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    num_different = []
    for i, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            count = torch.zeros((), dtype=torch.int64, device=DEVICE)
            for repeat in range(60):
                j = (repeat + i) % len(problems)
                count += (bits(mul(*problems[j])) != expected[j]).sum()
            num_different.append(count)
    torch.cuda.synchronize()
    assert [count.item() for count in num_different] == [0] * len(streams)


def captured(
    stream: torch.cuda.Stream, A: Tensor, weight: Weight
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of three calls, the last into the C that is returned."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        mul(A, weight)  # loads the kernel
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        mul(A, weight)
        marlin.linear(A, weight.B, weight.s)
        C = mul(A, weight)
    return graph, C


@pytest.mark.parametrize(("M", "K", "N", "group"), REPEATED)
def test_a_captured_graph_replays_on_new_activations(M: int, K: int, N: int, group: int) -> None:
    weight = random_weight(K, N, group)
    A = random_A(M, K)
    graph, C = captured(torch.cuda.Stream(), A, weight)
    for seed in (2, 3, 4):
        A.copy_(random_A(M, K, seed=seed))
        C.fill_(torch.nan)
        graph.replay()
        eager = mul(A, weight)
        assert torch.equal(bits(C), bits(eager))
        assert relative_error(C, A.double() @ weight.dense) <= ERR_LIMIT


def test_graphs_of_one_stream_replay_at_once_on_two_beside_eager_calls() -> None:
    stream = torch.cuda.Stream()
    problems = [
        (random_A(M, K, seed=M), random_weight(K, N, g))
        for M, K, N, g in [(16, 8192, 1024, 128), (17, 4096, 320, 64)]
    ]
    expected = [bits(mul(A, weight)) for A, weight in problems]
    graphs = [captured(stream, A, weight) for A, weight in problems]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    num_different = [torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in range(3)]
    torch.cuda.synchronize()
    for _ in range(100):
        for i in range(2):
            with torch.cuda.stream(streams[i]):
                graphs[i][0].replay()
                num_different[i] += (bits(graphs[i][1]) != expected[i]).sum()
        num_different[2] += (bits(mul(*problems[0])) != expected[0]).sum()
    torch.cuda.synchronize()
    assert [count.item() for count in num_different] == [0, 0, 0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_the_second_gpu_works_while_the_first_is_current() -> None:
    weight = random_weight(1024, 320, 128)
    A = random_A(17, 1024)
    with torch.cuda.device(0):
        B, s, workspace = (t.to("cuda:1") for t in (weight.B, weight.s, weight.workspace))
        C = torch.full((17, 320), torch.nan, dtype=torch.half, device="cuda:1")
        marlin.mul(A.to("cuda:1"), B, C, s, workspace)
    assert torch.equal(bits(C.to(DEVICE)), bits(mul(A, weight)))


# --------------------------------------------------------------------------------------------------
# Arguments
# --------------------------------------------------------------------------------------------------


def test_a_workspace_of_garbage_does_no_harm_and_is_left_alone() -> None:
    for M, K, N, group in REPEATED:
        weight = random_weight(K, N, group)
        A = random_A(M, K)
        expected = mul(A, weight)
        garbage = torch.randint(-(2**31), 2**31, (N // 128 * 16,), dtype=torch.int32, device=DEVICE)
        before = garbage.clone()
        C = torch.full((M, N), torch.nan, dtype=torch.half, device=DEVICE)
        marlin.mul(A, weight.B, C, weight.s, garbage)
        assert torch.equal(bits(C), bits(expected))
        assert torch.equal(garbage, before)


def wrong_arguments() -> dict[str, dict[str, Tensor]]:
    """Arguments of marlin.mul that it must refuse, by what is wrong."""
    weight = random_weight(256, 128, 64)
    wide = torch.full((8, 256), torch.nan, dtype=torch.half, device=DEVICE)
    shifted_B = torch.zeros(16 * 256 + 1, dtype=torch.int32, device=DEVICE)[1:].view(16, 256)
    shifted_C = torch.full((8 * 128 + 1,), torch.nan, dtype=torch.half, device=DEVICE)[1:]
    return {
        "A float32": {"A": random_A(8, 256).float()},
        "A bfloat16": {"A": random_A(8, 256).bfloat16()},
        "A on the CPU": {"A": random_A(8, 256).cpu()},
        "A with other K": {"A": random_A(8, 240)},
        "A with three dimensions": {"A": random_A(8, 256)[None]},
        "B on the CPU": {"B": weight.B.cpu()},
        "B int64": {"B": weight.B.long()},
        "B strided": {"B": weight.B.t().contiguous().t()},
        "B misaligned": {"B": shifted_B},
        "C float32": {"C": torch.full((8, 128), torch.nan, device=DEVICE)},
        "C strided": {"C": wide[:, :128]},
        "C too small": {"C": wide[:7, :].reshape(-1)[: 7 * 128].view(7, 128)},
        "C misaligned": {"C": shifted_C.view(8, 128)},
        "C on the CPU": {"C": torch.full((8, 128), torch.nan, dtype=torch.half)},
        "s float32": {"s": weight.s.float()},
        "s of groups of 16": {"s": weight.s.repeat(4, 1)},
        "s with other N": {"s": weight.s[:, :64].contiguous()},
        "workspace too small": {"workspace": weight.workspace[:8]},
        "workspace on the CPU": {"workspace": weight.workspace.cpu()},
    }


def test_wrong_arguments_are_refused_and_nothing_is_written() -> None:
    weight = random_weight(256, 128, 64)
    for wrong, some in wrong_arguments().items():
        arguments = {
            "A": random_A(8, 256),
            "B": weight.B,
            "C": torch.full((8, 128), torch.nan, dtype=torch.half, device=DEVICE),
            "s": weight.s,
            "workspace": weight.workspace,
        } | some
        with pytest.raises((ValueError, RuntimeError), match=r"marlin\.mul: "):
            marlin.mul(**arguments)
            pytest.fail(f"{wrong} was accepted")
        torch.cuda.synchronize()
        assert arguments["C"].isnan().all(), wrong


# --------------------------------------------------------------------------------------------------
# Layers, torch.compile
# --------------------------------------------------------------------------------------------------


def packed_layer(k: int, n: int, groupsize: int, device: str, bias: bool = True) -> marlin.Layer:
    generator = torch.Generator().manual_seed(k + n)
    dense = torch.nn.Linear(k, n, bias=bias)
    dense.weight.data = torch.randn(n, k, generator=generator) / k**0.5
    if bias:
        dense.bias.data = torch.randn(n, generator=generator)
    layer = marlin.Layer(k, n, groupsize, bias=bias)
    groups = layer.s.shape[0]
    padded = torch.nn.functional.pad(dense.weight.data, (0, layer.B.shape[0] * 16 - k))
    scales = padded.view(n, groups, -1).abs().amax(-1) / 8
    layer, dense = layer.to(device), dense.to(device)
    layer.pack(dense, scales.to(device))
    return layer


@pytest.mark.parametrize(
    ("k", "n", "groupsize"),
    [(576, 192, 64), (576, 576, 128), (192, 576, -1), (100, 33, -1), (1000, 77, 32)],
)
def test_a_layer_packed_on_either_device_computes_its_unpacked_weight(
    k: int, n: int, groupsize: int
) -> None:
    layer = packed_layer(k, n, groupsize, DEVICE)
    twin = packed_layer(k, n, groupsize, "cpu")
    assert torch.equal(layer.B.cpu(), twin.B)
    assert torch.equal(layer.s.cpu(), twin.s)
    x = random_A(3, 5 * k).view(3, 5, k)
    exact = x.double() @ layer.unpack().double().t() + layer.bias.double()
    assert relative_error(layer(x), exact) <= ERR_LIMIT
    moved = twin.to(DEVICE)
    assert torch.equal(bits(moved(x)), bits(layer(x)))


def test_layers_compiled_into_cuda_graphs_have_the_bits_of_eager_ones() -> None:
    torch._dynamo.reset()
    layers = [packed_layer(576, 192, 64, DEVICE), packed_layer(192, 33, -1, DEVICE)]
    model = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1])
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    with torch.inference_mode():
        for M in (1, 16, 16, 16):  # the graph replays from its third call on
            x = random_A(M, 576, seed=M)
            assert torch.equal(bits(compiled(x).clone()), bits(model(x)))
