"""One compressed linear layer, in no format: what every reader makes and every writer takes.

Depends on torch alone. A record's values are exactly those of the file: reading, converting and
writing move bits and round nothing. Called by the formats' modules, model.py and write.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .config import Spec
from .errors import CheckpointError
from .files import Entry, Shards

ZERO_POINT = 8  # the zero point of a symmetric layer
HALVES = ("F16", "BF16")
FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Record:
    """A layer whose weight is ``(q - zero) * scale`` of each weight's group.

    Args:
        q: (n, k) uint8, 0..15; may be a transposed view.
        scales: (n, groups) float16 or bfloat16, finite.
        zeros: (n, groups) uint8, 0..15; None if all are 8. Layers that were packed with zero points
            between the integers have them in the type of the scales; only marlin stores those.
        g_idx: (k,) int32, the group of each input feature, every group but the last of the same
            size; None if feature i is in group i // groupsize.
        bias: (n,) float, or None.
        groupsize: input features that share a scale; -1 for a single group.
    """

    q: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    g_idx: Tensor | None = None
    bias: Tensor | None = None
    groupsize: int = -1

    @property
    def n(self) -> int:
        """Output features."""
        return self.q.shape[0]

    @property
    def k(self) -> int:
        """Input features."""
        return self.q.shape[1]

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return self.scales.shape[1]

    def dense(self) -> Tensor:
        """The weight (n, k) float32, exactly: 4-bit times 11-bit numbers fit into 24 bits."""
        order = self.g_idx
        if order is None:
            order = plain_order(self.k, self.groupsize, self.q.device)
        idx = order.long()
        zeros = ZERO_POINT if self.zeros is None else self.zeros.float()[:, idx]
        return (self.q.float() - zeros) * self.scales.float()[:, idx]

    def simplified(self) -> Record:
        """The same layer without zero points that are all 8, without an order that is none, and
        with -1 for a group of all.

        Not for the readers to do to zero points: layers that a checkpoint stores alike are to be
        written alike.
        """
        zeros, g_idx = self.zeros, self.g_idx
        if zeros is not None and bool((zeros == ZERO_POINT).all()):
            zeros = None
        if g_idx is not None and torch.equal(
            g_idx, plain_order(self.k, self.groupsize, g_idx.device)
        ):
            g_idx = None
        groupsize = -1 if self.groupsize == self.k else self.groupsize
        return replace(self, zeros=zeros, g_idx=g_idx, groupsize=groupsize)

    def without_idle_bias(self, wanted: bool) -> Record:
        """The same layer without a bias of zeros that its model has no use for: some writers give
        one to every layer."""
        idle = self.bias is not None and not wanted and not bool(self.bias.any())
        return replace(self, bias=None) if idle else self


@dataclass(frozen=True)
class Linear:
    """A compressed linear layer of a checkpoint: its sizes, how it is stored, and whether the
    model's own layer has a bias."""

    k: int
    n: int
    spec: Spec
    bias: bool


def integer_zeros(name: str, record: Record, format: str) -> Tensor | None:
    """The zero points of a layer that is to be written in a format of integers.

    Raises:
        CheckpointError: they lie between the integers.
    """
    if record.zeros is not None and record.zeros.is_floating_point():
        raise CheckpointError(
            f"marlin.checkpoint: {name} has zero points that are no integers of 0..15, which "
            f"{format} does not store; write marlin instead"
        )
    return record.zeros


def named(name: str, record: Record, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a layer by their names in a file, with the record's bias if it has one."""
    if record.bias is not None:
        tensors = {**tensors, "bias": record.bias}
    return {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}


def num_groups(k: int, groupsize: int) -> int:
    """Groups of k input features, the last of which may be shorter."""
    return 1 if groupsize == -1 else -(-k // groupsize)


def plain_order(k: int, groupsize: int, device: torch.device | str) -> Tensor:
    """The g_idx (k,) int32 of a layer without act-order."""
    group = k if groupsize == -1 else groupsize
    return torch.arange(k, dtype=torch.int32, device=device) // group


# --------------------------------------------------------------------------------------------------
# Nibbles in words
# --------------------------------------------------------------------------------------------------


def unpack_last(words: Tensor, size: int) -> Tensor:
    """The nibbles of words, least significant first, along the last dimension.

    Args:
        words: (..., w) int32.
        size: nibbles to keep of each row, at most 8 w.

    Returns:
        (..., size) uint8.

    Example:
        >>> unpack_last(torch.tensor([0x76543210], dtype=torch.int32), 8)
        tensor([0, 1, 2, 3, 4, 5, 6, 7], dtype=torch.uint8)
    """
    both = words.contiguous().view(torch.uint8)  # two nibbles a byte, the lower one first
    out = torch.empty(*both.shape, 2, dtype=torch.uint8, device=words.device)
    torch.bitwise_and(both, 15, out=out[..., 0])
    torch.bitwise_right_shift(both, 4, out=out[..., 1])
    return out.flatten(-2)[..., :size]


def pack_last(q: Tensor) -> Tensor:
    """Puts nibbles into words, least significant first, along the last dimension.

    Args:
        q: (..., size) uint8, 0..15; what is missing of the last word is 0.

    Returns:
        (..., size / 8 rounded up) int32.
    """
    q = torch.nn.functional.pad(q, (0, -q.shape[-1] % 8)).contiguous()
    pairs = q.unflatten(-1, (-1, 2))
    words: Tensor = (pairs[..., 0] | (pairs[..., 1] << 4)).view(torch.int32)
    return words


def unpack_first(words: Tensor) -> Tensor:
    """The nibbles of words along the first dimension: (w, n) int32 to (8 w, n) uint8."""
    w, n = words.shape
    both = words.contiguous().view(torch.uint8).view(w, n, 4).transpose(1, 2)
    out = torch.empty(w, 4, 2, n, dtype=torch.uint8, device=words.device)
    # A byte is two weights: transposing before taking them apart moves half as many elements.
    both = both.contiguous()
    torch.bitwise_and(both, 15, out=out[:, :, 0])
    torch.bitwise_right_shift(both, 4, out=out[:, :, 1])
    return out.view(8 * w, n)


def pack_first(q: Tensor) -> Tensor:
    """Puts nibbles into words along the first dimension: (8 w, n) uint8 to (w, n) int32."""
    pairs = q.contiguous().view(-1, 4, 2, q.shape[1])
    both = pairs[:, :, 0] | (pairs[:, :, 1] << 4)  # (w, 4, n)
    words: Tensor = both.transpose(1, 2).contiguous().view(torch.int32)
    return words.squeeze(-1)


# --------------------------------------------------------------------------------------------------
# What a reader expects, and checks
# --------------------------------------------------------------------------------------------------

# Of a tensor: its shape, the types it may have, and whether it must be there.
Expected = Mapping[str, tuple[tuple[int, ...], tuple[str, ...], bool]]


def check_entries(shards: Shards, name: str, expected: Expected) -> None:
    """Compares what the headers say of a layer's tensors with what its reader needs.

    Raises:
        CheckpointError: a tensor is missing, or of another shape or type.
    """
    for suffix, (shape, types, required) in expected.items():
        key = f"{name}.{suffix}"
        if key not in shards:
            if required:
                raise CheckpointError(
                    f"marlin.checkpoint.load: {where(shards)} has no tensor {key}, {list(shape)} "
                    f"{types[0]}"
                )
            continue
        check_entry(key, shards[key], shape, types)


def check_entry(key: str, entry: Entry, shape: tuple[int, ...], types: tuple[str, ...]) -> None:
    """Compares what a header says of a tensor with what is needed.

    Raises:
        CheckpointError: it is of another shape or type.
    """
    prefix = f"marlin.checkpoint.load: {entry.file} has {key}"
    if entry.shape != shape:
        raise CheckpointError(
            f"{prefix} of shape {list(entry.shape)}, but config.json needs {list(shape)}"
        )
    if entry.dtype not in types:
        raise CheckpointError(
            f"{prefix} of type {entry.dtype}, but it should be {' or '.join(types)}"
        )


def where(shards: Shards) -> str:
    """The file of weights, or the folder if there are several."""
    files = shards.files
    if not files:
        return "an empty file of weights"
    return str(files[0] if len(files) == 1 else files[0].parent)


def read_scales(shards: Shards, key: str, device: torch.device | str) -> Tensor:
    """Reads scales, in the order of the file.

    Returns:
        float16 or bfloat16. Scales in float32 become float16 if that holds every one exactly.

    Raises:
        CheckpointError: NaN, Inf, or a float32 that would have to be rounded.
    """
    scales = shards.read(key, device)
    file = shards[key].file
    if not bool(torch.isfinite(scales).all()):
        at = torch.nonzero(~torch.isfinite(scales))[0].tolist()
        raise CheckpointError(
            f"marlin.checkpoint.load: {file} has {key} of {scales[tuple(at)].item()} at {at}, but "
            "a scale should be finite"
        )
    if scales.dtype == torch.float32:
        for dtype in (torch.float16, torch.bfloat16):
            rounded = scales.to(dtype)
            if torch.equal(rounded.float(), scales):
                return rounded
        raise CheckpointError(
            f"marlin.checkpoint.load: {file} has {key} in F32 with values that neither F16 nor "
            "BF16 holds"
        )
    return scales


def check_order(shards: Shards, key: str, g_idx: Tensor, groupsize: int) -> None:
    """Makes sure that each group has as many input features as the group size says.

    Args:
        g_idx: (k,) int32 as read.
        groupsize: -1 for a single group.

    Raises:
        CheckpointError: a group that does not exist, or has too many or too few.
    """
    k = g_idx.shape[0]
    groups, group = num_groups(k, groupsize), k if groupsize == -1 else groupsize
    prefix = f"marlin.checkpoint.load: {shards[key].file} has {key}"
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        bad = low if low < 0 else high
        raise CheckpointError(f"{prefix} with a group {bad}, but it should be of 0..{groups - 1}")
    found = torch.bincount(g_idx.long(), minlength=groups).cpu()
    expected = torch.full((groups,), group)
    expected[-1] = k - (groups - 1) * group
    if not torch.equal(found, expected):
        at = int(torch.nonzero(found != expected)[0])
        raise CheckpointError(
            f"{prefix} with {int(found[at])} input features in group {at}, but it should have "
            f"{int(expected[at])}"
        )


def check_symmetric(shards: Shards, key: str, zeros: Tensor, claim: str, hint: str = "") -> None:
    """Makes sure that zero points are those of a symmetric layer.

    Args:
        zeros: (groups, n) or (n, groups), 0..15.
        claim: what the config says, e.g. "sym is true".
        hint: appended to the error.

    Raises:
        CheckpointError: one is not 8.
    """
    wrong = torch.nonzero(zeros != ZERO_POINT)
    if len(wrong):
        at = wrong[0].tolist()
        raise CheckpointError(
            f"marlin.checkpoint.load: {shards[key].file} has {key} with a zero point "
            f"{int(zeros[tuple(at)])} at {at}, but it should be {ZERO_POINT} since {claim}{hint}"
        )


def read_bias(shards: Shards, name: str, device: torch.device | str) -> Tensor | None:
    """Reads the bias of a layer if there is one.

    Raises:
        CheckpointError: NaN or Inf.
    """
    key = f"{name}.bias"
    if key not in shards:
        return None
    bias = shards.read(key, device)
    if not bool(torch.isfinite(bias).all()):
        raise CheckpointError(
            f"marlin.checkpoint.load: {shards[key].file} has {key} with NaN or Inf, but a bias "
            "should be finite"
        )
    return bias
