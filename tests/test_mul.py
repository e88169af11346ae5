"""marlin.mul on every device: right, exact where it can be, and refusing what is wrong before it
writes."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import TOLERANCE, error, make_problem

import marlin

POISON = float("nan")


def product(problem, **options):
    A, s = problem.A, problem.s
    C = torch.full((A.shape[0], s.shape[1]), POISON, dtype=A.dtype, device=A.device)
    marlin.mul(A, problem.B, C, s, problem.workspace, **options)
    return C


@pytest.mark.parametrize("M", [1, 2, 15, 16, 17, 33, 64, 113])
@pytest.mark.parametrize(
    "K, N, group", [(256, 64, -1), (128, 192, 32), (576, 128, 64), (1408, 320, 128)]
)
def test_result_is_that_of_float64(device, M, K, N, group):
    problem = make_problem(M, K, N, group, device=device)
    assert error(product(problem), problem.C) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("M", [1, 17, 64])
def test_cpu_takes_other_dtypes(M, dtype):
    problem = make_problem(M, 576, 192, 64, dtype)
    assert error(product(problem), problem.C) < TOLERANCE[dtype]


@pytest.mark.parametrize("group", [16, 48, 80, 112, 256])
def test_cpu_takes_any_group_of_16s(group):
    problem = make_problem(5, 3 * group, 64, group)
    assert error(product(problem), problem.C) < TOLERANCE[torch.float16]


@pytest.mark.parametrize(
    "M, K, N, group",
    [(1, 1008, 64, -1), (15, 1024, 192, 128), (33, 256, 128, 32), (97, 4096, 64, 64)],
)
def test_integers_come_out_exact(device, M, K, N, group):
    problem = make_problem(M, K, N, group, device=device, integer=True)
    assert torch.equal(product(problem).double(), problem.C)


def test_error_is_at_most_twice_that_of_matmul(device):
    for M, group in itertools.product([1, 16, 65], [-1, 128]):
        problem = make_problem(M, 2048, 256, group, device=device)
        dense = torch.matmul(problem.A, problem.W.half())
        assert error(product(problem), problem.C) < 2 * error(dense, problem.C)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_with_nan_or_inf_spoils_no_other(device, value):
    problem = make_problem(17, 256, 128, 64, device=device)
    clean = product(problem)
    problem.A[5, 77] = value
    C = product(problem)
    others = [row for row in range(17) if row != 5]
    assert torch.equal(C[others], clean[others])
    # 0 * Inf is NaN, so where the weight is 0 the result is NaN; elsewhere the value itself,
    # signed.
    expected = problem.A[5].double() @ problem.W
    assert torch.equal(torch.isnan(C[5]), torch.isnan(expected))
    infinite = torch.isinf(expected)
    assert torch.equal(C[5].double()[infinite], expected[infinite])


def test_overflow_saturates_to_inf(device):
    problem = make_problem(3, 1024, 64, 128, device=device)
    problem.A.fill_(60000.0)
    expected = problem.A.double() @ problem.W
    C = product(problem)
    over = expected.abs() > 66000  # 65520 rounds to Inf; nearer than 1% the sum's rounding decides
    assert over.any()
    assert torch.equal(C[over].double(), torch.sign(expected[over]) * torch.inf)


def test_the_same_call_gives_the_same_bits(device):
    problem = make_problem(33, 2048, 192, 128, device=device)
    first = product(problem)
    assert all(torch.equal(product(problem), first) for _ in range(20))


def test_the_number_of_threads_changes_no_bit():
    before = torch.get_num_threads()
    try:
        for M in (1, 17, 64):
            problem = make_problem(M, 1024, 448, 64)
            results = []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                results.append(product(problem))
            assert all(torch.equal(result, results[0]) for result in results)
    finally:
        torch.set_num_threads(before)


def test_rows_may_be_strided(device):
    problem = make_problem(17, 256, 128, 64, device=device)
    expected = product(problem)
    wide = torch.full((17, 3 * 256), POISON, dtype=torch.half, device=device)
    for start in (0, 8, 264):  # in halves; all 16-byte aligned
        wide.fill_(POISON)
        wide[:, start : start + 256] = problem.A
        problem.A = wide[:, start : start + 256]
        assert torch.equal(product(problem), expected)
        problem.A = problem.A.clone()


def test_any_other_stride_is_copied(device):
    problem = make_problem(17, 256, 128, 64, device=device)
    expected = product(problem)
    A = problem.A
    shifted = torch.empty(17 * 256 + 1, dtype=torch.half, device=device)[1:].view(17, 256).copy_(A)
    for strided in (A.t().contiguous().t(), A.repeat_interleave(2, dim=1)[:, ::2], shifted):
        problem.A = strided
        assert torch.equal(product(problem), expected)
    problem.A = A[:1].expand(17, 256)
    assert torch.equal(product(problem), expected[:1].expand(17, 128))


def test_no_rows_are_fine(device):
    problem = make_problem(0, 256, 128, device=device)
    assert product(problem).shape == (0, 128)


def test_workspace_is_neither_read_nor_written(device):
    problem = make_problem(17, 1024, 256, 128, device=device)
    expected = product(problem)
    for workspace in (
        torch.full((32,), -1, dtype=torch.int32, device=device),
        torch.full((32,), POISON, device=device),
        torch.full((32 * 4,), 7, dtype=torch.uint8, device=device),
    ):
        problem.workspace = workspace
        before = workspace.clone()
        assert torch.equal(product(problem), expected)
        assert torch.equal(workspace.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize(
    "options", [{"thread_k": 64, "thread_n": 256}, {"thread_n": 64}, {"sms": 3}, {"sms": 10**6}]
)
def test_hints_change_the_result_by_rounding_at_most(device, options):
    problem = make_problem(17, 1024, 256, 128, device=device)
    assert error(product(problem, **options), problem.C) < TOLERANCE[torch.float16]


def test_arguments_may_be_positional_as_published(device):
    problem = make_problem(3, 256, 256, 128, device=device)
    C = torch.empty(3, 256, dtype=torch.half, device=device)
    named = torch.empty_like(C)
    # the same wishes: others may pick another kernel, which rounds otherwise
    wishes = {"thread_k": 64, "thread_n": 256, "sms": -1}
    assert marlin.mul(problem.A, problem.B, C, problem.s, problem.workspace, 64, 256, -1) is None
    marlin.mul(problem.A, problem.B, named, problem.s, workspace=problem.workspace, **wishes)
    assert torch.equal(C, named)


def test_other_tensors_in_one_storage_are_no_overlap():
    problem = make_problem(4, 64, 64)
    both = torch.empty(8, 64, dtype=torch.half)
    both[:4] = problem.A
    marlin.mul(both[:4], problem.B, both[4:], problem.s, problem.workspace)
    assert torch.equal(both[4:], product(problem))


def misaligned(t):
    flat = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    return flat[1:].view(t.shape).copy_(t)


# What is done to the arguments of a good call with M=4, K=256, N=128, group 64, and the sentence
# that follows.
WRONG = {
    "A dtype": (lambda a: a.update(A=a["A"].double()), "A is float64 but should be float16"),
    "A integer": (lambda a: a.update(A=a["A"].int()), "A is int32 but should be float16"),
    "A dims": (
        lambda a: a.update(A=a["A"][None]),
        r"A has shape \(1, 4, 256\) but should be \(M, K\)",
    ),
    "A width": (lambda a: a.update(A=a["A"][:, :200]), "A has K=200 but B is packed for K=256"),
    "B dtype": (lambda a: a.update(B=a["B"].float()), "B is float32 but should be int32"),
    "B int64": (lambda a: a.update(B=a["B"].long()), "B is int64 but should be int32"),
    "B dims": (
        lambda a: a.update(B=a["B"].flatten()),
        r"B has shape \(4096,\) but should be \(K / 16, 2 N\)",
    ),
    "B width": (
        lambda a: a.update(B=a["B"][:, :200]),
        r"B has shape \(16, 200\) but .* N a multiple of 64",
    ),
    "B empty": (lambda a: a.update(B=a["B"][:0]), r"B has shape \(0, 256\)"),
    "B stride": (
        lambda a: a.update(B=a["B"].t().contiguous().t()),
        r"B has strides \(1, 16\) but should be contiguous",
    ),
    "s dtype": (lambda a: a.update(s=a["s"].float()), "s is float32 but should be float16"),
    "s dims": (
        lambda a: a.update(s=a["s"].flatten()),
        r"s has shape \(512,\) but should be \(K / group, N\)",
    ),
    "s width": (lambda a: a.update(s=a["s"][:, :64]), "s has N=64 but B is packed for N=128"),
    "s groups": (
        lambda a: a.update(s=a["s"][:3]),
        "s has 3 groups but should have a number that cuts K=256",
    ),
    "s group 8": (
        lambda a: a.update(s=a["s"].repeat(8, 1)),
        "s has 32 groups but .* multiples of 16",
    ),
    "s empty": (lambda a: a.update(s=a["s"][:0]), "s has 0 groups"),
    "s stride": (lambda a: a.update(s=a["s"].t().contiguous().t()), r"s has strides \(1, 4\)"),
    "C dtype": (
        lambda a: a.update(C=a["C"].float()),
        "C is float32 but should be of the dtype of A",
    ),
    "C rows": (
        lambda a: a.update(C=a["C"][:3]),
        r"C has shape \(3, 128\) but should be \(4, 128\)",
    ),
    "C width": (
        lambda a: a.update(C=a["C"][:, :64]),
        r"C has shape \(4, 64\) but should be \(4, 128\)",
    ),
    "C dims": (
        lambda a: a.update(C=a["C"].flatten()),
        r"C has shape \(512,\) but should be \(4, 128\)",
    ),
    "C stride": (lambda a: a.update(C=a["C"].t().contiguous().t()), r"C has strides \(1, 4\)"),
    "C is A": (lambda a: a.update(C=a["A"].flatten()[:512].view(4, 128)), "C shares memory with A"),
    "C is B": (
        lambda a: a.update(C=a["B"].view(torch.half).flatten()[:512].view(4, 128)),
        "C shares memory with B",
    ),
    "C is s": (lambda a: a.update(C=a["s"]), "C shares memory with s"),
    "workspace": (
        lambda a: a.update(workspace=a["workspace"][:15]),
        "workspace has 60 bytes but .* at least 64",
    ),
    "max_par": (lambda a: a.update(max_par=32), "workspace has 64 bytes but .* at least 128"),
    "max_par 0": (lambda a: a.update(max_par=0), "max_par is 0 but should be at least 1"),
    "thread_k": (
        lambda a: a.update(thread_k=32),
        "thread_k is 32 but should be -1, 64, 128 or 256",
    ),
    "thread_n": (lambda a: a.update(thread_n=0), "thread_n is 0 but should be -1, 64, 128 or 256"),
    "sms": (lambda a: a.update(sms=0), "sms is 0 but should be -1 or at least 1"),
}

WRONG_ON_GPU = {
    "A bfloat16": (
        lambda a: a.update(A=a["A"].bfloat16()),
        "A is bfloat16 but should be float16 on a GPU",
    ),
    "B on cpu": (
        lambda a: a.update(B=a["B"].cpu()),
        "B is on cpu but A is on cuda:0: all should be on one device",
    ),
    "s on cpu": (lambda a: a.update(s=a["s"].cpu()), "s is on cpu but A is on cuda:0"),
    "C on cpu": (lambda a: a.update(C=a["C"].cpu()), "C is on cpu but A is on cuda:0"),
    "A on cpu": (lambda a: a.update(A=a["A"].cpu()), "B is on cuda:0 but A is on cpu"),
    "workspace on cpu": (lambda a: a.update(workspace=a["workspace"].cpu()), "workspace is on cpu"),
    "group 16": (
        lambda a: a.update(s=a["s"].repeat(4, 1)),
        "s cuts K=256 into groups of 16 but a GPU takes",
    ),
    "B address": (
        lambda a: a.update(B=misaligned(a["B"])),
        "B starts 4 bytes after a multiple of 16",
    ),
    "s address": (
        lambda a: a.update(s=misaligned(a["s"])),
        "s starts 2 bytes after a multiple of 16",
    ),
    "C address": (
        lambda a: a.update(C=misaligned(a["C"])),
        "C starts 2 bytes after a multiple of 16",
    ),
}

CASES = [pytest.param("cpu", *case, id=name) for name, case in WRONG.items()]
CASES += [
    pytest.param("cuda", *case, id=f"{name} cuda", marks=pytest.mark.gpu)
    for name, case in {**WRONG, **WRONG_ON_GPU}.items()
]


@pytest.mark.parametrize("device, change, message", CASES)
def test_a_wrong_argument_is_named_and_nothing_written(device, change, message):
    problem = make_problem(4, 256, 128, 64, device=device)
    C = torch.full((4, 128), 42.0, dtype=torch.half, device=device)
    arguments = dict(A=problem.A, B=problem.B, C=C, s=problem.s, workspace=problem.workspace)
    change(arguments)
    before = {name: t.clone() for name, t in arguments.items() if isinstance(t, torch.Tensor)}
    for function in (marlin.mul, torch.ops.marlin.mul):
        with pytest.raises(ValueError, match=r"^marlin\.mul: " + message):
            function(**arguments)
    for name, t in before.items():
        assert torch.equal(
            arguments[name].contiguous().view(torch.uint8), t.contiguous().view(torch.uint8)
        )


def test_an_argument_that_is_no_tensor_is_a_type_error():
    problem = make_problem(4, 256, 128, 64)
    with pytest.raises(TypeError):
        marlin.mul(problem.A, None, problem.A, problem.s, problem.workspace)


@pytest.mark.parametrize("name", ["A", "C", "s"])
def test_gradients_are_refused_as_by_out_functions(name):
    problem = make_problem(4, 256, 128, 64)
    C = torch.full((4, 128), 42.0, dtype=torch.half)
    arguments = dict(A=problem.A, B=problem.B, C=C, s=problem.s, workspace=problem.workspace)
    arguments[name].requires_grad_()
    with pytest.raises(RuntimeError, match=f"marlin.mul: {name} requires grad"):
        marlin.mul(**arguments)
    assert bool((C == 42.0).all())
    with torch.no_grad():
        marlin.mul(**arguments)
    assert error(C, problem.C) < TOLERANCE[torch.float16]


def test_writing_into_C_counts_for_autograd():
    problem = make_problem(4, 256, 128, 64)
    C = torch.ones(4, 128, dtype=torch.half)
    before = C._version
    marlin.mul(problem.A, problem.B, C, problem.s, problem.workspace)
    assert C._version > before
    x = torch.ones(4, 128, dtype=torch.half, requires_grad=True)
    y = (x * C).sum()
    with torch.inference_mode():
        marlin.mul(problem.A, problem.B, C, problem.s, problem.workspace)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize(
    "variable, message",
    [
        (
            "MARLIN_BACKEND",
            "MARLIN_BACKEND is 'nonsense' but should be auto, sm80, sm90 or sm90_few",
        ),
        (
            "MARLIN_CPU_ISA",
            "MARLIN_CPU_ISA is 'nonsense' but should be portable, avx2, avx512 or auto",
        ),
    ],
)
def test_a_wrong_environment_variable_is_named(variable, message):
    run = subprocess.run(
        [sys.executable, "-c", "import marlin; marlin._C.cpu_isa()"],
        env={
            **os.environ,
            variable: "nonsense",
            "PYTHONPATH": str(Path(marlin.__file__).parents[1]),
        },
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0 and message in run.stderr
