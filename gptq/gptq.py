"""GPTQ: rounds the weight of a linear layer so that its output, not the weight, changes least.

Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers", 2022 (arXiv:2210.17323); names as there: W, H, Hinv, Q, err. Depends on
torch, marlin.quantize and quant.py; llama2.py is the caller. docs/compression.md tells what each
addition to the published algorithm is worth.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator

import torch
from torch import Tensor

from gptq import quant
from marlin import quantize

log = logging.getLogger("gptq")

# A Hessian that ten times the damping, that often, cannot make positive definite is no Hessian
# (NaN, or infinite inputs).
MAX_DAMPING_STEPS = 8


class HessianError(ValueError):
    """Calibration inputs that no damping makes usable; the message is one sentence for the user."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How to round.

    Args:
        groupsize: input features that share a scale, -1 for all.
        percdamp: damping, a fraction of the mean diagonal of H.
        act_order: columns in the order of falling diagonal of H; their groups stay what they are.
        static_groups: scales are chosen before the first column is rounded, as always with
            act_order, and not when a group is entered.
        rule: of quantize.RULES.
        passes: rounds of scale refit and coordinate descent afterwards.
        correction: share of the error of the layers before that a layer makes up for, 0..1.
        blocksize: columns of a lazy batch.
    """

    groupsize: int = 128
    percdamp: float = 0.01
    act_order: bool = True
    static_groups: bool = False
    rule: str = "search"
    passes: int = 1
    correction: float = 0.5
    blocksize: int = 128


DEFAULTS = Options()


@dataclasses.dataclass
class Result:
    """q (n, k) uint8 0..15, scales (n, groups) fp16, loss (n,): the squared error of every output
    feature."""

    q: Tensor
    scales: Tensor
    loss: Tensor
    percdamp: float


class Hessian:
    """Gathers H = 2/T sum x x^T over calibration inputs x of any lengths, one call a sample; and
    C = 2/T sum (x0 - x) x^T where the inputs x0 of the uncompressed model are given too."""

    def __init__(self, k: int, device: torch.device | str = "cpu", with_original: bool = False):
        self.H = torch.zeros(k, k, device=device)
        self.C = torch.zeros(k, k, device=device) if with_original else None
        self.num_tokens = 0

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        """Adds a sample: x and original (..., k), float of any precision."""
        x = x.reshape(-1, x.shape[-1]).float()
        if not len(x):
            return
        total = self.num_tokens + len(x)
        self.H.mul_(self.num_tokens / total).addmm_(x.t(), x, alpha=2.0 / total)
        if self.C is not None and original is not None:
            change = original.reshape(x.shape).float() - x
            self.C.mul_(self.num_tokens / total).addmm_(change.t(), x, alpha=2.0 / total)
        self.num_tokens = total


def damped_inverse(H: Tensor, percdamp: float, name: str = "layer") -> tuple[Tensor, Tensor, float]:
    """Damps H until it is positive definite, and inverts it.

    Args:
        H: (k, k) float32, symmetric, diagonal positive.
        percdamp: first damping, a fraction of the mean diagonal; ten times more at every failure,
            logged.
        name: of the layer, for the log.

    Returns:
        H damped (k, k); Hinv (k, k), the upper Cholesky factor of the inverse; the damping that it
        took.

    Raises:
        HessianError: no damping makes it positive definite.
    """
    mean = H.diagonal().mean()
    for _ in range(MAX_DAMPING_STEPS):
        damped = H.clone()
        damped.diagonal().add_(percdamp * mean)
        L, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            Hinv, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
            if not failed and torch.isfinite(Hinv).all():
                return damped, Hinv, percdamp
        following = max(10 * percdamp, 1e-4)
        log.warning(
            "%s: the Hessian is not positive definite with damping %g, trying %g",
            name,
            percdamp,
            following,
        )
        percdamp = following
    raise HessianError(
        f"gptq: the Hessian of {name} is not positive definite even with damping {percdamp:g}: its "
        "calibration inputs "
        "hold NaN or infinite values"
    )


def gptq(
    W: Tensor,
    H: Tensor,
    options: Options = DEFAULTS,
    name: str = "layer",
    C: Tensor | None = None,
) -> Result:
    """Rounds a weight to 4 bits under the Hessian of its inputs.

    Args:
        W: weight (n, k), float.
        H: (k, k) float32 on the same device, as Hessian gathers it.
        options: see Options.
        name: of the layer, for messages.
        C: (k, k) float32, as Hessian gathers it, for options.correction; None corrects nothing.

    Returns:
        A Result; its scales are exactly what is stored, and q was rounded to them. Its loss is that
        against the corrected weight.

    Raises:
        ValueError: H does not fit W, or (HessianError) cannot be made positive definite.

    Example:
        >>> hessian = Hessian(128)
        >>> hessian.add(torch.randn(1000, 128))
        >>> result = gptq(torch.randn(64, 128), hessian.H, Options(groupsize=64))
    """
    k = W.shape[1]
    if H.shape != (k, k):
        raise ValueError(f"gptq: H of {name} is {tuple(H.shape)} but W has {k} input features")
    W = W.float()
    # A dead input was zero in every sample: its column is rounded to nearest, and no other column
    # hears of it.
    dead = H.diagonal() == 0
    if dead.any():
        log.info("%s: %d of %d inputs were never active", name, int(dead.sum()), k)
        H = H + torch.diag(dead.to(H.dtype) * H.diagonal().mean().clamp(min=1e-8))
    if C is not None and options.correction > 0:
        # 5%: what a sample says about the inputs' small directions is mostly noise.
        W = quant.correct(W, H, C, options.correction, max(0.05, options.percdamp))
    group_of = torch.arange(k, device=W.device) // (
        k if options.groupsize == -1 else options.groupsize
    )
    order = (
        torch.argsort(H.diagonal(), descending=True)
        if options.act_order
        else group_of.argsort(stable=True)
    )

    H_ordered, Hinv, percdamp = damped_inverse(H[order][:, order], options.percdamp, name)
    importance = torch.empty_like(H.diagonal())
    importance[order] = H_ordered.diagonal()
    scales = quantize.scales_for(W, options.groupsize, options.rule, importance)
    entered = not (options.static_groups or options.act_order)
    W_ordered, group_of = W[:, order], group_of[order]
    with _one_thread(W.device):
        q, scales = _round_columns(W_ordered, Hinv, scales, group_of, importance, options, entered)
    for _ in range(options.passes):
        scales = quant.refit_scales(W_ordered, q, scales, group_of, H_ordered)
        with _one_thread(W.device):
            q = quant.coordinate_descent(
                W_ordered, q, scales, group_of, H_ordered, options.blocksize
            )

    Q = torch.empty_like(W)
    Q[:, order] = q
    q_stored = (Q + quantize.ZERO_POINT).to(torch.uint8)
    final = quant.loss(W, quantize.dequantize(q_stored, scales, options.groupsize), H)
    return Result(q_stored, scales, final, percdamp)


@contextlib.contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """Runs the column loops of a CPU on one thread: their operations are a few microseconds long,
    and to wake a second thread for each made them 10 times slower on a machine with other work."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _round_columns(
    W: Tensor,
    Hinv: Tensor,
    scales: Tensor,
    group_of: Tensor,
    importance: Tensor,
    options: Options,
    entered: bool,
) -> tuple[Tensor, Tensor]:
    """The algorithm of the paper: columns in turn, each one's error carried to those that follow.

    W (n, k), Hinv (k, k) upper, scales (n, groups) fp16, group_of (k,), all in processing order.
    With `entered`, the scales of a group are chosen anew from the updated weights when its first
    column comes up. Returns q (n, k) float32 centred, and the scales.
    """
    # Transposed, so that what belongs to one column of W is adjacent in memory.
    W = W.t().contiguous()
    s = scales.float().t().contiguous()  # (groups, n)
    inverse = quant.reciprocal(s)
    q = torch.empty_like(W)
    k = len(W)
    groups = group_of.tolist()
    for i1 in range(0, k, options.blocksize):
        i2 = min(i1 + options.blocksize, k)
        err = torch.zeros(i2 - i1, W.shape[1], device=W.device)
        for j in range(i1, i2):
            g = groups[j]
            if entered and (j == 0 or groups[j - 1] != g):
                members = slice(j, j + groups.count(g))
                ahead = W[members].clone()
                if members.stop > i2:  # the lazy batch has not reached the rest of the group yet
                    ahead[i2 - j :] -= Hinv[i1:j, i2 : members.stop].t() @ err[: j - i1]
                chosen = quantize.scales_for(ahead.t(), -1, options.rule, importance[members])
                s[g] = chosen[:, 0].float()
                inverse[g] = quant.reciprocal(s[g])
            q[j] = (W[j] * inverse[g]).round_().clamp_(-8, 7)
            err[j - i1] = (W[j] - q[j] * s[g]) / Hinv[j, j]
            W[j:i2].addr_(Hinv[j, j:i2], err[j - i1], alpha=-1)
        W[i2:].addmm_(Hinv[i1:i2, i2:].t(), err, alpha=-1)
    return q.t().contiguous(), s.t().half()
