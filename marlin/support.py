"""Which kernel runs a layer, and if none does, why: asked before anything is launched or moved.

Depends on marlin._C for what was built and which GPUs the kernels are for. layer.py asks when a
layer is made on a device or moved to one; users ask through marlin.can_run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import _C, layout

LAYER_DTYPES = (torch.float16, torch.bfloat16)

MIN_CAPABILITY = (8, 0)
GPU_GROUPS = (32, 64, 128)  # and one group for all


@dataclass(frozen=True)
class Answer:
    """Whether a kernel runs a layer: true or false as a condition.

    backend is the kernel's name, "" if there is none; reason is why there is none, "" if there is.
    """

    backend: str
    reason: str

    def __bool__(self) -> bool:
        return not self.reason


def can_run(
    infeatures: int,
    outfeatures: int,
    groupsize: int = -1,
    dtype: torch.dtype = torch.float16,
    zero_points: bool = False,
    act_order: bool = False,
    device: torch.device | str = "cpu",
) -> Answer:
    """Say whether a layer would run on a device, without making or launching anything.

    Args:
        infeatures: k, at least 1.
        outfeatures: n, at least 1.
        groupsize: input features that share a scale; -1 for all.
        dtype: of scales, activations and output.
        zero_points: whether groups have zero points.
        act_order: whether the members of a group lie anywhere among the input features.
        device: "cpu", "cuda", "cuda:1"; on "meta" all layers can be.

    Returns:
        Something true, with the backend's name, or something false, with the reason in a sentence.

    Example:
        >>> answer = marlin.can_run(4096, 4096, 128, torch.bfloat16, device="cuda")
        >>> print(answer.backend if answer else answer.reason)
    """
    device = torch.device(device)
    reason = _wrong_shape(infeatures, outfeatures, groupsize)
    if not reason and dtype not in LAYER_DTYPES:
        reason = f"dtype is {dtype} but should be float16 or bfloat16"
    if reason:
        return Answer("", reason)
    if device.type == "meta":
        return Answer("meta", "")
    if device.type == "cpu":
        return Answer(f"cpu {_C.cpu_isa()}", "")
    if device.type != "cuda":
        return Answer("", f"device is {device} but there are kernels for cpu and cuda only")
    group = infeatures if groupsize == -1 else groupsize
    reason = _wrong_gpu(device) or _not_on_gpu(infeatures, group, dtype, zero_points, act_order)
    return Answer("" if reason else "cuda", reason)


def _wrong_shape(infeatures: int, outfeatures: int, groupsize: int) -> str:
    if infeatures < 1 or outfeatures < 1:
        return (
            f"infeatures is {infeatures} and outfeatures {outfeatures} but both should be at least "
            "1"
        )
    if groupsize not in (-1, infeatures) and (groupsize < 1 or groupsize % layout.TILE_K):
        return f"groupsize is {groupsize} but should be -1 or a multiple of {layout.TILE_K}"
    return ""


def _wrong_gpu(device: torch.device) -> str:
    if not _C.has_cuda():
        return "this build of marlin has no CUDA kernels"
    if not torch.cuda.is_available():
        return "there is no CUDA GPU"
    if device.index is not None and device.index >= torch.cuda.device_count():
        return f"device is {device} but there are {torch.cuda.device_count()} GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability "
            f"{capability[0]}.{capability[1]} but should have 8.0 (Ampere) or newer"
        )
    return ""


def _not_on_gpu(
    infeatures: int, group: int, dtype: torch.dtype, zero_points: bool, act_order: bool
) -> str:
    """What the checks of csrc/bindings.cpp would refuse on a GPU; a test compares the two."""
    if dtype != torch.float16:
        return f"the CUDA kernels take no {str(dtype).removeprefix('torch.')} yet"
    if zero_points:
        return "the CUDA kernels take no zero points yet"
    if act_order:
        return "the CUDA kernels take no act-order yet"
    if group != infeatures and group not in GPU_GROUPS:
        return f"the CUDA kernels take groups of 32, 64, 128 or one group, but no groups of {group}"
    return ""
