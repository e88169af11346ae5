"""Problems for the tests and their float64 results, made without the code under test but for
packing.

Depends on marlin.layout, which test_layout.py checks against csrc/layout.h.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from marlin import layout

# DESIGN: rounding the output to float16 alone is 2.8e-4 norm-wise, rounding the weights up to 2e-4
# more; bfloat16 has three bits less. float32: a dot product of a few thousand terms, each exact to
# 2^-24.
TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 2e-6}


@dataclass
class Problem:
    """A random product: W (K, N) float64 is what B and s stand for, C (M, N) float64 is A @ W."""

    A: Tensor
    B: Tensor
    s: Tensor
    W: Tensor
    C: Tensor
    workspace: Tensor


def make_problem(
    M: int,
    K: int,
    N: int,
    group: int = -1,
    dtype: torch.dtype = torch.float16,
    device: str = "cpu",
    integer: bool = False,
) -> Problem:
    """Return a problem; integer ones have scales of 1 and results below 2048, which float16 holds
    exactly."""
    group = K if group == -1 else group
    groups = K // group
    if integer:
        # |A W| <= 8 K would be too much: only 128 entries of a row are not 0, so |C| <= 128 * 2 * 7
        # < 2048.
        q = torch.randint(1, 16, (K, N), dtype=torch.uint8)
        scales = torch.ones(groups, N, dtype=torch.float16)
        A = torch.randint(-2, 3, (M, K)) * (torch.rand(M, K).argsort(dim=1) < 128)
    else:
        q = torch.randint(0, 16, (K, N), dtype=torch.uint8)
        scales = ((torch.rand(groups, N) + 0.5) * 0.01).half()
        A = torch.randn(M, K)
    A = A.to(dtype)
    W = (q.double() - 8) * scales.double().repeat_interleave(group, dim=0)
    return Problem(
        A.to(device),
        layout.pack_weights(q).to(device),
        layout.permute_scales(scales).to(device),
        W.to(device),
        (A.double() @ W).to(device),
        torch.zeros(max(N // 128, 1) * 16, dtype=torch.int32, device=device),
    )


def error(result: Tensor, expected: Tensor) -> float:
    """Return the norm-wise relative error."""
    return ((result.double() - expected).norm() / expected.norm()).item()
