"""The CPU kernels, each instruction set that the processor runs, against float64 and each other."""

from collections.abc import Iterator

import pytest
import torch
from reference import TOLERANCE, error, make_problem

import marlin
from marlin import layout

ISAS = ["portable", "avx2", "avx512"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]

# (K, N, group). The kernels walk K in blocks of 128 rows: groups below, at and above that, some
# that straddle it, a K that ends inside it, one group for all.
SHAPES = [
    (16, 64, 16),
    (128, 64, 32),
    (272, 128, 16),
    (480, 64, 48),
    (1024, 192, 128),
    (512, 64, 256),
    (544, 128, 272),
    (17 * 16, 64, -1),
    (1024, 128, -1),
]

# Tiles hold 4 to 14 tokens, few tokens go another way than many, tasks end at 256: sizes around.
TOKENS = [1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 13, 15, 17, 19, 21, 25, 29, 33, 61, 257]
FEW_TOKENS = [1, 3, 4, 15, 33]


def use(isa: str) -> None:
    """Choose the instruction set, or skip the test where the processor lacks it."""
    try:
        marlin._C.set_cpu_isa(isa)
    except ValueError as lacking:
        pytest.skip(str(lacking))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread unless a test says otherwise: on a busy machine two wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=ISAS)
def each_isa(request: pytest.FixtureRequest, isa: None) -> Iterator[str]:
    """Each instruction set that the processor runs; the fixture isa puts the old one back."""
    use(request.param)
    yield request.param


def identity_problem(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B, s of a (16, 64) weight whose first row is the scale and the others 0."""
    q = torch.full((16, 64), 8, dtype=torch.uint8)
    q[0] = 9
    scales = torch.full((1, 64), scale).half()
    return layout.pack_weights(q), layout.permute_scales(scales)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K, N, group", SHAPES)
def test_result_is_that_of_float64(each_isa, K, N, group, dtype):
    problem = make_problem(max(TOKENS), K, N, group, dtype)
    for M in TOKENS:
        y = marlin.linear(problem.A[:M], problem.B, problem.s)
        assert error(y, problem.C[:M]) < TOLERANCE[dtype], M


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_that_of_torch(each_isa, dtype):
    problem = make_problem(33, 4096, 64, 128, dtype)
    W = problem.W.float()  # a product of four bits and eleven: exact
    for M in FEW_TOKENS:
        A, C = problem.A[:M], problem.C[:M]
        ours = error(marlin.linear(A, problem.B, problem.s), C)
        theirs = error((A.float() @ W).to(dtype), C)
        assert ours < 2 * theirs, M


@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_come_out_exact(each_isa, dtype):
    problem = make_problem(max(TOKENS), 544, 128, 272, dtype, integer=True)
    for M in TOKENS:
        y = marlin.linear(problem.A[:M], problem.B, problem.s)
        assert torch.equal(y, problem.C[:M].to(dtype)), M


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k, n", [(544, 191), (543, 192), (529, 129), (257, 65), (127, 64), (1, 1)])
def test_nothing_beyond_the_edges_is_read_or_written(each_isa, k, n, dtype):
    problem = make_problem(max(FEW_TOKENS), 544, 192, 32, dtype)
    wide = torch.full((max(FEW_TOKENS), 561), float("nan"), dtype=dtype)
    x = wide[:, 3 : 3 + k]  # a strided view with an odd start, NaN on both sides
    x.copy_(problem.A[:, :k])
    bias = torch.randn(n).to(dtype)
    expected = problem.A[:, :k].double() @ problem.W[:k, :n] + bias.double()
    for M in FEW_TOKENS:
        y = marlin.linear(x[:M], problem.B, problem.s, bias, k, n)
        # Rounding a single value (k = n = 1) costs up to 2^-11 = 4.9e-4 of it, 2^-9 in bfloat16.
        assert error(y, expected[:M]) < TOLERANCE[dtype], M


@pytest.mark.parametrize(
    "M, K, N, group",
    [(1, 544, 704, 32), (13, 512, 320, 128), (33, 272, 64, -1), (515, 256, 192, 64)],
)
def test_bits_do_not_depend_on_the_number_of_threads(each_isa, M, K, N, group):
    problem = make_problem(M, K, N, group, torch.float32)
    alone = marlin.linear(problem.A, problem.B, problem.s)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert torch.equal(marlin.linear(problem.A, problem.B, problem.s), alone), threads


@pytest.mark.parametrize("K, N, group", SHAPES)
def test_each_instruction_set_agrees_with_the_portable_path(each_isa, K, N, group):
    for M in FEW_TOKENS:
        problem = make_problem(M, K, N, group, torch.float32)
        marlin._C.set_cpu_isa("portable")
        portable = marlin.linear(problem.A, problem.B, problem.s)
        marlin._C.set_cpu_isa(each_isa)
        y = marlin.linear(problem.A, problem.B, problem.s)
        assert error(y, portable.double()) < TOLERANCE[torch.float32], M


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", FEW_TOKENS)
def test_nan_and_inf_stay_in_their_row_and_are_those_of_torch(each_isa, M, dtype):
    problem = make_problem(M, 272, 128, 16, dtype)
    clean = marlin.linear(problem.A, problem.B, problem.s)
    for bad in (float("nan"), float("inf"), -float("inf")):
        A = problem.A.clone()
        A[M // 2, 200] = bad
        y = marlin.linear(A, problem.B, problem.s)
        expected = A[M // 2].double() @ problem.W  # Inf times a weight of 0 is NaN
        assert torch.equal(y[M // 2].isnan(), expected.isnan())
        assert torch.equal(y[M // 2].isposinf(), expected.isposinf())
        assert torch.equal(y[M // 2].isneginf(), expected.isneginf())
        others = torch.arange(M) != M // 2
        assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("M", FEW_TOKENS)
def test_float16_overflows_to_infinity(each_isa, M):
    B, s = identity_problem(2.0)
    x = torch.tensor([32752.0, 32768.0, -60000.0, 1.0, 0.0]).half().repeat(7)[:M, None]
    assert torch.equal(marlin.linear(x, B, s, in_features=1), (x.float() * 2).half().expand(M, 64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.3335, 7.3e-5])
def test_every_16_bit_value_is_read_and_rounded_as_torch_does(each_isa, scale, dtype):
    B, s = identity_problem(scale)
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)[:, None]
    y = marlin.linear(x, B, s, in_features=1, out_features=9)  # 9: whole vectors and a rest
    # The product has at most 11 + 11 bits, so that float32 holds it and there is one rounding.
    expected = (x.float() * s[0, 0].float()).to(dtype).expand(-1, 9)
    number = ~x[:, 0].isnan()
    assert torch.equal(y[number], expected[number])
    assert y[~number].isnan().all()


@pytest.mark.parametrize("magnitude", [2.0**-24, 3 * 2.0**-24, 2.0**-14, 1.0, 65504.0])
def test_scales_of_any_size_are_exact(each_isa, magnitude):
    B, s = identity_problem(magnitude)
    for M in FEW_TOKENS:
        x = torch.ones(M, 1)
        assert torch.equal(marlin.linear(x, B, s, in_features=1), torch.full((M, 64), magnitude))


def test_no_tokens_is_no_work(each_isa):
    problem = make_problem(1, 128, 64, 64)
    for dtype in DTYPES:
        y = marlin.linear(torch.empty(0, 128, dtype=dtype), problem.B, problem.s)
        assert y.shape == (0, 64) and y.dtype == dtype


@pytest.mark.parametrize("k", [128, 399])
def test_more_tasks_than_one_slice_holds(each_isa, k):
    # 256 tokens times 640 features: more FP32 sums than a slice keeps in cache, so there are two,
    # which share A in FP32. In features that fit one slice the sums are the same, bit for bit.
    problem = make_problem(256, 400, 640, 80, torch.bfloat16)
    x = problem.A[:, :k]
    y = marlin.linear(x, problem.B, problem.s, None, k)
    assert error(y, x.double() @ problem.W[:k]) < TOLERANCE[torch.bfloat16]
    B, s = problem.B[:, -256:].contiguous(), problem.s[:, -128:].contiguous()
    assert torch.equal(marlin.linear(x, B, s, None, k), y[:, -128:])
