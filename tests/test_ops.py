"""The operators as torch's tools see them: opcheck, fake tensors, torch.compile, torch.export, and
what a call costs."""

import time

import pytest
import torch
from reference import TOLERANCE, error, make_problem
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import marlin


def linear_cases(device):
    problem = make_problem(6, 256, 128, 64, device=device)
    A, B, s = problem.A, problem.B, problem.s
    bias = torch.randn(128, device=device).half()
    yield (A, B, s), {}
    yield (A.view(2, 3, 256), B, s, bias), {}
    yield (A[:, :200], B, s, None, 200, 100), {}
    yield (A[0], B, s), {"bias": bias[:100].clone(), "out_features": 100}
    yield (A[:0], B, s), {}


@pytest.mark.parametrize("case", range(5))
def test_opcheck_passes_for_linear(device, case):
    arguments, options = list(linear_cases(device))[case]
    opcheck(torch.ops.marlin.linear.default, arguments, options)


@pytest.mark.parametrize("M", [0, 1, 6])
def test_opcheck_passes_for_mul(device, M):
    problem = make_problem(M, 256, 128, 64, device=device)
    C = torch.zeros(M, 128, dtype=torch.half, device=device)
    opcheck(torch.ops.marlin.mul.default, (problem.A, problem.B, C, problem.s, problem.workspace))


def test_schema_says_what_is_written():
    mul = torch.ops.marlin.mul.default._schema
    assert [argument.name for argument in mul.arguments if argument.is_write] == ["C"]
    names = ["A", "B", "C", "s", "workspace", "thread_k", "thread_n", "sms", "max_par"]
    assert [argument.name for argument in mul.arguments] == names
    assert not any(
        argument.is_write for argument in torch.ops.marlin.linear.default._schema.arguments
    )


def test_fake_tensors_have_the_shape_and_dtype_of_real_ones():
    for arguments, options in linear_cases("cpu"):
        real = marlin.linear(*arguments, **options)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            options = {
                k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v
                for k, v in options.items()
            }
            fake = marlin.linear(*fakes, **options)
        assert (
            fake.shape == real.shape and fake.dtype == real.dtype and fake.stride() == real.stride()
        )


def packed_layer(k, n, groupsize, device, bias=True):
    layer = marlin.Layer(k, n, groupsize, bias=bias)
    linear = nn.Linear(k, n)
    groups = layer.s.shape[0]
    layer.pack(linear, linear.weight.abs().amax(dim=1, keepdim=True).expand(n, groups) / 8)
    return layer.to(device)


def small_model(device):
    layers = (
        packed_layer(100, 130, 32, device),
        nn.SiLU(),
        packed_layer(130, 64, -1, device, bias=False),
    )
    return nn.Sequential(*layers)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_model_gives_the_bits_of_the_eager_one(device, backend):
    torch._dynamo.reset()
    model = small_model(device)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for M in (1, 5):
            x = torch.randn(M, 100, device=device).half()
            # inductor rounds SiLU once where eager rounds to float16 in between
            if backend == "inductor":
                assert error(compiled(x), model(x).double()) < 2 * TOLERANCE[torch.float16]
            else:
                assert torch.equal(compiled(x), model(x))


def test_compiled_mul_writes_into_its_argument(device):
    torch._dynamo.reset()
    problem = make_problem(5, 256, 128, 64, device=device)

    def double(A, C):
        marlin.mul(A, problem.B, C, problem.s, problem.workspace)
        return C * 2

    C = torch.zeros(5, 128, dtype=torch.half, device=device)
    result = torch.compile(double, fullgraph=True, backend="aot_eager")(problem.A, C)
    assert error(C, problem.C) < TOLERANCE[torch.float16]
    assert torch.equal(result, C * 2)


def test_one_compilation_serves_any_number_of_tokens(device):
    torch._dynamo.reset()
    layer = packed_layer(100, 130, 32, device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for M in (3, 7, 65):
            x = torch.randn(M, 100, device=device).half()
            assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("strict", [False, True])
def test_exported_model_gives_the_bits_of_the_eager_one(device, strict):
    model = small_model(device)
    x = torch.randn(4, 100, device=device).half()
    tokens = torch.export.Dim("tokens", min=2, max=1024)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: tokens},), strict=strict)
        for M in (4, 33):
            x = torch.randn(M, 100, device=device).half()
            assert torch.equal(program.module()(x), model(x))
    assert "marlin.linear" in str(program.graph)


def test_gradients_by_functional_transforms_are_refused():
    problem = make_problem(6, 256, 128, 64)
    with pytest.raises(
        RuntimeError, match="functorch transforms|no derivative"
    ):  # torch's own sentence, or ours
        torch.func.grad(lambda x: marlin.linear(x, problem.B, problem.s).float().sum())(problem.A)


def test_a_call_costs_little_more_than_torch_matmul():
    # Host time: products of no rows, so that only the call is timed. The goal is 1.5x; the test
    # allows 2x, for other programs share the machine, and takes the best of many short rounds for
    # the same reason.
    problem = make_problem(0, 128, 64)
    C = torch.empty(0, 64, dtype=torch.half)
    W = problem.W.half()
    calls = {
        "matmul": lambda: torch.matmul(problem.A, W),
        "linear": lambda: marlin.linear(problem.A, problem.B, problem.s),
        "mul": lambda: marlin.mul(problem.A, problem.B, C, problem.s, problem.workspace),
    }
    best = dict.fromkeys(calls, float("inf"))
    with torch.no_grad():
        for _ in range(50):
            for name, call in calls.items():
                start = time.perf_counter()
                for _ in range(200):
                    call()
                best[name] = min(best[name], time.perf_counter() - start)
    assert best["linear"] < 2 * best["matmul"] and best["mul"] < 2 * best["matmul"], best
