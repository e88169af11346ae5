"""marlin.linear on every device: any leading dimensions, dtypes, bias, padded layers, and what it
refuses."""

import pytest
import torch
from reference import TOLERANCE, error, make_problem

import marlin


@pytest.mark.parametrize("shape", [(), (1,), (15,), (3, 5), (2, 1, 17), (0,), (3, 0)])
def test_leading_dimensions_are_kept(device, shape):
    problem = make_problem(64, 256, 192, 64, device=device)
    rows = torch.Size(shape).numel()
    x = problem.A[:rows].reshape(*shape, 256)
    y = marlin.linear(x, problem.B, problem.s)
    assert y.shape == (*shape, 192) and y.dtype == x.dtype and y.is_contiguous()
    if rows:
        assert error(y.reshape(rows, 192), problem.C[:rows]) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("M", [1, 7, 33, 113])
@pytest.mark.parametrize("with_bias", [False, True])
def test_result_is_that_of_float64_in_every_dtype(dtype, M, with_bias):
    problem = make_problem(M, 1088, 128, 64, dtype)
    bias = torch.randn(128, dtype=dtype) if with_bias else None
    y = marlin.linear(problem.A, problem.B, problem.s, bias)
    expected = problem.C if bias is None else problem.C + bias.double()
    assert y.dtype == dtype and error(y, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("M", [1, 17, 64])
def test_bias_is_added_once(device, M):
    problem = make_problem(M, 1024, 256, 128, device=device, integer=True)
    bias = torch.arange(256, device=device).half()
    y = marlin.linear(problem.A, problem.B, problem.s, bias)
    assert torch.equal(y.double(), problem.C + bias.double())


@pytest.mark.parametrize(
    "k, n", [(256, 192), (255, 191), (249, 1), (129, 65), (1, 192), (200, 130)]
)
@pytest.mark.parametrize("M", [1, 5, 33])
def test_missing_columns_count_as_zeros(device, k, n, M):
    problem = make_problem(M, 256, 192, 64, device=device)
    x = problem.A[:, :k].contiguous()
    bias = torch.randn(n, device=device).half()
    y = marlin.linear(x, problem.B, problem.s, bias, k, n)
    expected = x.double() @ problem.W[:k, :n] + bias.double()
    assert y.shape == (M, n)
    # One weight row alone can make results near zero, where half a unit of float16 in each of n
    # values is all there is.
    assert error(y, expected) < TOLERANCE[torch.float16]


def test_columns_past_the_end_of_x_are_not_read(device):
    problem = make_problem(17, 256, 64, 64, device=device)
    wide = torch.full((17, 256), float("nan"), dtype=torch.half, device=device)
    for k in (200, 203):
        wide[:, :k] = problem.A[:, :k]
        y = marlin.linear(wide[:, :k], problem.B, problem.s, in_features=k)
        assert error(y, problem.A[:, :k].double() @ problem.W[:k]) < TOLERANCE[torch.float16]
        wide.fill_(float("nan"))


def test_any_strides_of_x_are_fine(device):
    problem = make_problem(30, 256, 64, 64, device=device)
    x = problem.A.view(5, 6, 256)
    expected = marlin.linear(x, problem.B, problem.s)
    strided = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(marlin.linear(strided, problem.B, problem.s), expected)
    assert torch.equal(
        marlin.linear(x.transpose(0, 1), problem.B, problem.s), expected.transpose(0, 1)
    )
    one = x[0, 0].expand(3, 4, 256)
    # another number of tokens may be summed in another order
    of_copies = marlin.linear(one.contiguous(), problem.B, problem.s)
    assert torch.equal(marlin.linear(one, problem.B, problem.s), of_copies)


def test_torch_ops_give_the_same(device):
    problem = make_problem(5, 256, 192, 64, device=device)
    bias = torch.randn(100, device=device).half()
    arguments = (problem.A, problem.B, problem.s, bias, None, 100)
    assert torch.equal(torch.ops.marlin.linear(*arguments), marlin.linear(*arguments))
    direct = torch.empty(5, 192, dtype=torch.half, device=device)
    marlin.mul(problem.A, problem.B, direct, problem.s, problem.workspace)
    assert torch.equal(direct, marlin.linear(problem.A, problem.B, problem.s))


# What is done to the arguments of a good call with x (2, 3, 256), N=128, group 64, bias, and the
# sentence that follows.
WRONG = {
    "x dtype": (lambda a: a.update(x=a["x"].double()), "x is float64 but should be float16"),
    "x scalar": (lambda a: a.update(x=a["x"][0, 0, 0]), "x has no dimensions"),
    "x width": (lambda a: a.update(x=a["x"][..., :255]), "x has K=255 but B is packed for K=256"),
    "x padded width": (
        lambda a: a.update(in_features=200),
        "x has K=256 but B is packed for K=200",
    ),
    "B dtype": (lambda a: a.update(B=a["B"].short()), "B is int16 but should be int32"),
    "B width": (lambda a: a.update(B=a["B"][:, :64]), r"B has shape \(16, 64\)"),
    "s width": (lambda a: a.update(s=a["s"][:, :64]), "s has N=64 but B is packed for N=128"),
    "s groups": (lambda a: a.update(s=a["s"].repeat(2, 1)[:5]), "s has 5 groups"),
    "bias dtype": (
        lambda a: a.update(bias=a["bias"].float()),
        "bias is float32 but should be of the dtype of x",
    ),
    "bias width": (
        lambda a: a.update(bias=a["bias"][:64]),
        r"bias has shape \(64,\) but should be \(128,\)",
    ),
    "bias dims": (
        lambda a: a.update(bias=a["bias"][None]),
        r"bias has shape \(1, 128\) but should be \(128,\)",
    ),
    "bias stride": (lambda a: a.update(bias=a["bias"].repeat(2)[::2]), r"bias has strides \(2,\)"),
    "in_features 0": (
        lambda a: a.update(in_features=0),
        "in_features is 0 but should be 1 to K=256",
    ),
    "in_features": (
        lambda a: a.update(in_features=257),
        "in_features is 257 but should be 1 to K=256",
    ),
    "out_features 0": (
        lambda a: a.update(out_features=0),
        "out_features is 0 but should be 1 to N=128",
    ),
    "out_features": (
        lambda a: a.update(out_features=129),
        "out_features is 129 but should be 1 to N=128",
    ),
}
WRONG_ON_GPU = {
    "x float32": (
        lambda a: a.update(x=a["x"].float()),
        "x is float32 but should be float16 on a GPU",
    ),
    "B on cpu": (lambda a: a.update(B=a["B"].cpu()), "B is on cpu but x is on cuda:0"),
    "bias on cpu": (lambda a: a.update(bias=a["bias"].cpu()), "bias is on cpu but x is on cuda:0"),
}
CASES = [pytest.param("cpu", *case, id=name) for name, case in WRONG.items()]
CASES += [
    pytest.param("cuda", *case, id=f"{name} cuda", marks=pytest.mark.gpu)
    for name, case in {**WRONG, **WRONG_ON_GPU}.items()
]


@pytest.mark.parametrize("device, change, message", CASES)
def test_a_wrong_argument_is_named(device, change, message):
    problem = make_problem(6, 256, 128, 64, device=device)
    bias = torch.zeros(128, dtype=torch.half, device=device)
    arguments = dict(x=problem.A.view(2, 3, 256), B=problem.B, s=problem.s, bias=bias)
    change(arguments)
    for function in (marlin.linear, torch.ops.marlin.linear):
        with pytest.raises(ValueError, match=r"^marlin\.linear: " + message):
            function(**arguments)


def test_a_model_that_trains_something_before_it_runs_forward():
    problem = make_problem(4, 256, 128, 64)
    expected = marlin.linear(problem.A, problem.B, problem.s)
    x = problem.A.clone().requires_grad_()
    y = marlin.linear(x, problem.B, problem.s)
    assert torch.equal(y, expected) and y.requires_grad
    with pytest.raises(NotImplementedError, match="marlin.linear: has no derivative"):
        y.float().sum().backward()
    with torch.no_grad():
        assert not marlin.linear(x, problem.B, problem.s).requires_grad
    with torch.inference_mode():
        assert torch.equal(marlin.linear(x, problem.B, problem.s), expected)
