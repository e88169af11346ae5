"""marlin.can_run: what it says is what happens, and a layer that cannot run somewhere does not go
there."""

import itertools

import pytest
import torch
from torch import nn

import marlin
from marlin import support


@pytest.fixture
def gpu_for_granted(monkeypatch):
    """Let can_run judge the options alone, as if the build, driver and GPU were all fine."""
    monkeypatch.setattr(support, "_wrong_gpu", lambda device: "")


def test_a_cpu_runs_every_layer():
    for dtype, zeros, act_order, group in itertools.product(
        support.LAYER_DTYPES, (False, True), (False, True), (-1, 16, 48, 128, 37)
    ):
        answer = marlin.can_run(37, 11, group, dtype, zeros, act_order)
        assert answer and answer.reason == ""
        assert answer.backend == f"cpu {marlin._C.cpu_isa()}"
        layer = marlin.Layer(37, 11, group, False, dtype, zeros, act_order)
        assert layer(torch.ones(2, 37, dtype=dtype)).shape == (2, 11)


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ((0, 64), "infeatures is 0 and outfeatures 64 but both should be at least 1"),
        ((64, -1), "infeatures is 64 and outfeatures -1"),
        ((64, 64, 24), "groupsize is 24 but should be -1 or a multiple of 16"),
        ((64, 64, 0), "groupsize is 0"),
        ((64, 64, -2), "groupsize is -2"),
    ],
)
def test_the_reason_is_the_sentence_with_which_a_layer_is_refused(arguments, reason):
    answer = marlin.can_run(*arguments)
    assert not answer and answer.backend == "" and answer.reason.startswith(reason)
    with pytest.raises(ValueError) as refused:
        marlin.Layer(*arguments)
    assert answer.reason in str(refused.value)


def test_other_dtypes_and_devices_are_refused():
    assert "dtype is torch.float32" in marlin.can_run(64, 64, dtype=torch.float32).reason
    assert "device is mps" in marlin.can_run(64, 64, device="mps").reason
    assert marlin.can_run(64, 64, device="meta")


@pytest.mark.skipif(marlin._C.has_cuda(), reason="this build has the CUDA kernels")
def test_a_build_without_cuda_says_so():
    answer = marlin.can_run(64, 64, device="cuda")
    assert not answer and answer.reason == "this build of marlin has no CUDA kernels"


OPTIONS = [
    (dict(), ""),
    (dict(groupsize=32), ""),
    (dict(groupsize=16), "no groups of 16"),
    (dict(groupsize=256), "no groups of 256"),
    (dict(dtype=torch.bfloat16), "take no bfloat16 yet"),
    (dict(zero_points=True), "take no zero points yet"),
    (dict(act_order=True), "take no act-order yet"),
]


@pytest.mark.parametrize("options, reason", OPTIONS)
def test_a_layer_is_refused_when_it_is_moved_to_a_gpu_not_at_its_first_call(
    gpu_for_granted, options, reason
):
    answer = marlin.can_run(512, 64, **options, device="cuda")
    assert bool(answer) == (not reason) and reason in answer.reason
    model = nn.Sequential(nn.Linear(512, 512), marlin.Layer(512, 64, **options))
    layer = model[1]
    if reason:
        with pytest.raises(
            ValueError, match=r"^marlin\.Layer: no kernel runs it on cuda.*" + reason
        ):
            layer._check_device(torch.device("cuda"))
    else:
        layer._check_device(torch.device("cuda"))


def test_moving_asks_before_anything_is_moved(monkeypatch):
    layer = marlin.Layer(64, 64, 32, zero_points=True)
    asked = []

    def refuse(*arguments):
        asked.append(arguments)
        return support.Answer("", "for a test")

    monkeypatch.setattr(support, "can_run", refuse)
    with pytest.raises(ValueError, match="no kernel runs it on meta: for a test"):
        nn.Sequential(nn.ReLU(), layer).to("meta")
    assert asked == [(64, 64, 32, torch.float16, True, False, torch.device("meta"))]
    assert not any(buffer.is_meta for buffer in layer.buffers())
    layer.float()  # a cast is no move
    assert len(asked) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("options, reason", OPTIONS)
def test_what_can_run_says_is_what_the_operator_does_on_a_gpu(options, reason):
    layer = marlin.Layer(512, 64, **options)
    assert bool(marlin.can_run(512, 64, **options, device="cuda")) == (not reason)
    tensors = {name: tensor.cuda() for name, tensor in layer.state_dict().items()}
    x = torch.randn(3, 512, device="cuda", dtype=layer.s.dtype)
    if not reason:
        assert bool((marlin.linear(x, **tensors) == 0).all())
        assert bool((layer.cuda()(x) == 0).all())
        return
    with pytest.raises(ValueError, match="^marlin.linear: "):
        marlin.linear(x, **tensors)
    with pytest.raises(ValueError, match=reason):
        layer.cuda()
    with pytest.raises(ValueError, match=reason):
        marlin.Layer(512, 64, **options, device="cuda")
