"""Improving a rounded weight under the Hessian of its inputs: loss, refit of the scales, coordinate
descent.

Depends on torch and marlin.quantize, which holds the grid itself. gptq.py is the caller.

Names as in the GPTQ paper: W (n, k) the weight, Q (n, k) its rounded counterpart, H (k, k) = 2/T
sum x x^T over the T calibration inputs x. The loss of a layer is tr((W - Q) H (W - Q)^T), the
squared error of its output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from marlin.quantize import to_fp16_grid


def loss(W: Tensor, Q: Tensor, H: Tensor) -> Tensor:
    """Squared error of the output of every feature.

    Args:
        W: weight (n, k) float32.
        Q: rounded weight (n, k) float32.
        H: Hessian (k, k) float32.

    Returns:
        (n,) float32.
    """
    err = W - Q
    return ((err @ H) * err).sum(dim=1)


def refit_scales(W: Tensor, q: Tensor, scales: Tensor, group_of: Tensor, H: Tensor) -> Tensor:
    """Finds the scales that minimise the loss while the stored values stay: a least-squares problem
    for every feature.

    Args:
        W: weight (n, k) float32.
        q: centred stored values (n, k) float32, -8..7.
        scales: (n, groups) fp16, kept wherever the problem has no positive solution.
        group_of: (k,) int64, the group of each input feature.
        H: Hessian (k, k) float32, positive definite.

    Returns:
        (n, groups) fp16, whose loss is not above that of `scales` for any feature.
    """
    n, num_groups = scales.shape
    # Z_g is q with everything outside group g set to 0, so that Q = sum_g s_g Z_g.
    member = torch.nn.functional.one_hot(group_of, num_groups).to(W.dtype)  # (k, groups)
    M = W.new_empty(n, num_groups, num_groups)
    for g in range(num_groups):
        columns = (group_of == g).nonzero()[:, 0]
        M[:, g] = ((q[:, columns] @ H[columns]) * q) @ member
    b = ((W @ H) * q) @ member
    diagonal = M.diagonal(dim1=1, dim2=2)
    # A group whose values are all 0 has an empty row: a unit diagonal keeps the system solvable.
    diagonal += torch.where(diagonal > 0, 1e-6 * diagonal, torch.ones_like(diagonal))
    fit, info = torch.linalg.solve_ex(M, b)
    usable = (info == 0)[:, None] & torch.isfinite(fit) & (fit > 0) & (scales > 0)
    fit = torch.where(usable, to_fp16_grid(fit.clamp(min=0)), scales)
    better = loss(W, q * fit.float()[:, group_of], H) < loss(W, q * scales.float()[:, group_of], H)
    return torch.where(better[:, None], fit, scales)


def coordinate_descent(
    W: Tensor, q: Tensor, scales: Tensor, group_of: Tensor, H: Tensor, blocksize: int = 128
) -> Tensor:
    """Moves one stored value after another to the grid point that minimises the loss while all
    others stay.

    Args:
        W: weight (n, k) float32.
        q: centred stored values (n, k) float32, -8..7.
        scales: (n, groups) fp16.
        group_of: (k,) int64, the group of each input feature.
        H: Hessian (k, k) float32, diagonal positive.
        blocksize: columns between two updates of the gradient by a matrix product.

    Returns:
        (n, k) float32, centred stored values whose loss is not above that of q for any feature.
    """
    # Transposed, so that what belongs to one column of W is adjacent in memory.
    q, s = q.t().contiguous(), scales.float().t()[group_of]
    err = (W.t() - q * s).contiguous()
    step = (
        reciprocal(s) / H.diagonal()[:, None]
    )  # of q for a unit of gradient; 0 where the scale is 0
    for i1 in range(0, len(q), blocksize):
        i2 = min(i1 + blocksize, len(q))
        gradient = H[i1:i2] @ err  # (block, n), of the loss by Q, halved and negated
        for j in range(i1, i2):
            best = (gradient[j - i1] * step[j]).add_(q[j]).round_().clamp_(-8, 7)
            moved = (best - q[j]).mul_(s[j])
            q[j] = best
            err[j] -= moved
            gradient.addr_(H[j, i1:i2], moved, alpha=-1)
    return q.t().contiguous()


def correct(W: Tensor, H: Tensor, C: Tensor, share: float, percdamp: float) -> Tensor:
    """Moves a weight so that, on the inputs it will meet, it gives what the original gave.

    With x the input after everything before has been rounded and x0 the input of the uncompressed
    model, sum |W x0 - Q x|^2 is least for Q = W + W C H^-1, C = 2/T sum (x0 - x) x^T. Taken whole,
    the correction also fits the noise of the samples.

    Args:
        W: weight (n, k) float32.
        H: Hessian (k, k) float32 of the x.
        C: (k, k) float32, as above.
        share: of the correction to apply, 0..1.
        percdamp: damping of H here, a fraction of its mean diagonal.

    Returns:
        (n, k) float32.
    """
    damped = H.clone()
    damped.diagonal().add_(percdamp * H.diagonal().mean())
    moved, info = torch.linalg.solve_ex(damped, (W @ C).t())
    return W if info else W + share * moved.t()


def reciprocal(s: Tensor) -> Tensor:
    """1 / s, and 0 where s is 0, so that a group without a scale rounds to zeros."""
    return torch.where(s == 0, torch.zeros_like(s), 1 / s)
