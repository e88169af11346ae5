"""The two products, marlin.mul and marlin.linear, and what torch.compile has to know of them.

Depends on marlin._C (csrc/bindings.cpp), which registers and checks the operators.
Called by users and by layer.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _C


def mul(
    A: Tensor,
    B: Tensor,
    C: Tensor,
    s: Tensor,
    workspace: Tensor,
    thread_k: int = -1,
    thread_n: int = -1,
    sms: int = -1,
    max_par: int = 16,
) -> None:
    """Write ``A @ dequant(B)`` into C; arguments are those of the published Marlin.

    Args:
        A: activations (M, K), float16 (on a CPU also bfloat16, float32); rows may be strided.
        B: packed weights (K / 16, 2 N), int32, contiguous.
        C: output (M, N), dtype of A, contiguous; shares no memory with A, B or s.
        s: scales (K / group, N), float16, permuted as ``marlin.layout`` does, contiguous.
        workspace: at least N / 128 * max_par int32 in bytes, any dtype; checked, never used.
        thread_k: a hint, -1, 64, 128 or 256; not used.
        thread_n: a hint, -1, 64, 128 or 256: features of a CTA's tile.
        sms: a hint, -1 or the number of SMs to use.
        max_par: sets the size that workspace should have.

    Raises:
        ValueError: an argument is wrong; nothing was written.
        RuntimeError: the device cannot run it, or a gradient would be needed.

    Example:
        >>> C = torch.empty(A.shape[0], layer.n, dtype=A.dtype)
        >>> marlin.mul(A, layer.B, C, layer.s, layer.workspace)
    """
    if torch.compiler.is_compiling():
        torch.ops.marlin.mul(A, B, C, s, workspace, thread_k, thread_n, sms, max_par)
    else:
        _C.mul(A, B, C, s, workspace, thread_k, thread_n, sms, max_par)


def linear(
    x: Tensor,
    B: Tensor,
    s: Tensor,
    bias: Tensor | None = None,
    in_features: int | None = None,
    out_features: int | None = None,
    z: Tensor | None = None,
    perm: Tensor | None = None,
) -> Tensor:
    """Return ``x @ dequant(B) + bias``.

    Args:
        x: activations (..., in_features), float16 (on a CPU also bfloat16, float32).
        B: packed weights (K / 16, 2 N), int32, contiguous.
        s: scales (K / group, N), float16 (on a CPU also bfloat16), permuted as ``marlin.layout``
            does, contiguous.
        bias: (out_features), dtype of x, or None.
        in_features: columns of x, if fewer than K because the weight was padded; default K.
        out_features: columns of the result, if fewer than N; default N.
        z: zero points, shape, dtype and order of s, contiguous; None: all are 8. CPU only.
        perm: (K) int32, row k of the weight multiplies column perm[k] of x, zeros if that is not
            below in_features; None: column k. CPU only.

    Returns:
        (..., out_features), dtype of x.

    Raises:
        ValueError: an argument is wrong.
        RuntimeError: the device cannot run it.

    Example:
        >>> y = marlin.linear(torch.randn(3, 5, 256), layer.B, layer.s)
    """
    if torch.compiler.is_compiling():
        y: Tensor = torch.ops.marlin.linear(x, B, s, bias, in_features, out_features, z, perm)
    else:
        y = _C.linear(x, B, s, bias, in_features, out_features, z, perm)
    return y


def set_cpu_isa(name: str) -> None:
    """Choose the instruction set of the CPU backend, for tests and comparisons.

    Args:
        name: portable, avx2, avx512, or auto for the best that the processor runs.

    Raises:
        ValueError: another name, or one that the processor does not run.

    Example:
        >>> marlin.ops.set_cpu_isa("portable")
    """
    _C.set_cpu_isa(name)


@torch.library.register_fake("marlin::mul")
def _mul_fake(
    A: Tensor,
    B: Tensor,
    C: Tensor,
    s: Tensor,
    workspace: Tensor,
    thread_k: int = -1,
    thread_n: int = -1,
    sms: int = -1,
    max_par: int = 16,
) -> None:
    return None


@torch.library.register_fake("marlin::linear")
def _linear_fake(
    x: Tensor,
    B: Tensor,
    s: Tensor,
    bias: Tensor | None = None,
    in_features: int | None = None,
    out_features: int | None = None,
    z: Tensor | None = None,
    perm: Tensor | None = None,
) -> Tensor:
    N = B.shape[1] // 2 if out_features is None else out_features
    return x.new_empty((*x.shape[:-1], N))
