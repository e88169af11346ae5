"""The packed weight format in Python: the twin of csrc/layout.h, where it is drawn.

Depends on torch alone; every function runs on any device. Called by layer.py and the checkpoint
readers. The index maps are the format; packing and unpacking are the same maps as views and
transposes, which need no tables. tests/test_layout.py compares all of it with layout.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE_K = 16  # rows of the weight in one row of B
TILE_N = 64  # features in one chunk
ZERO_POINT = 8  # the stored value that means 0

# On a CPU, see at_a_time:
_CHUNK_ROWS = 32  # rows of B packed at a time: temporaries of some 5 MB per 8192 features
_CHUNK_VALUES = 1 << 20  # values packed at a time where features are adjacent: stays in cache
_ON_GPU = 16  # times as many at a time there: a launch costs microseconds, a cache miss little


def at_a_time(count: int, device: torch.device) -> int:
    """Return how many elements to take at a time where a CPU's caches want `count` of them."""
    return count if device.type == "cpu" else _ON_GPU * count


def nibble_index(K: int, N: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Return where B holds each value of a weight.

    Args:
        K: input features, a multiple of 16.
        N: output features, a multiple of 64.
        device: of the result.

    Returns:
        word (K, N) int64, the index into B counted in int32; shift (K, N) int64, the bits below the
        value in it.

    Example:
        >>> word, shift = nibble_index(16, 64)
        >>> (B.flatten()[word] >> shift) & 15  # q
    """
    k = torch.arange(K, device=device)[:, None]
    n = torch.arange(N, device=device)[None, :]
    k16, n64 = k % TILE_K, n % TILE_N
    j, upper, g = n64 // 16, n64 // 8 % 2, n64 % 8
    far, t, odd = k16 // 8, k16 % 8 // 2, k16 % 2
    lane = 4 * g + t
    word = k // TILE_K * (2 * N) + n // TILE_N * 128 + 4 * lane + j
    shift = 4 * (4 * odd + 2 * upper + far)
    return word, shift


def scale_index(N: int, device: torch.device | str | None = None) -> Tensor:
    """Return the position (N,) int64 of each column in a row of grouped scales; N a multiple of
    64."""
    n = torch.arange(N, device=device)
    c = n % 64
    return n - c + 8 * (c % 8) + c // 8


def scale_index_channelwise(N: int, device: torch.device | str | None = None) -> Tensor:
    """Return the position (N,) int64 of each column in the row of a single group; N a multiple of
    32."""
    n = torch.arange(N, device=device)
    c = n % 32
    return n - c + 8 * (c % 8 // 2) + 2 * (c // 8) + c % 2


def pack_weights(q: Tensor) -> Tensor:
    """Return the packed form B of stored values.

    Args:
        q: (K, N), any integer dtype, values 0..15; K a multiple of 16, N of 64.

    Returns:
        B (K / 16, 2 N), int32, on the device of q.

    Raises:
        ValueError: q has another shape, dtype or a value outside 0..15.

    Example:
        >>> B = pack_weights(torch.randint(0, 16, (256, 128), dtype=torch.uint8))
    """
    if q.dim() != 2 or q.shape[0] % TILE_K or q.shape[1] % TILE_N:
        raise ValueError(
            f"marlin.pack_weights: q has shape {tuple(q.shape)} but should be (K, N) "
            f"with K a multiple of {TILE_K} and N of {TILE_N}"
        )
    if q.is_floating_point() or q.is_complex() or q.dtype == torch.bool:
        raise ValueError(f"marlin.pack_weights: q is {q.dtype} but should be of an integer dtype")
    K, N = q.shape
    B = torch.empty(K // TILE_K, 2 * N, dtype=torch.int32, device=q.device)
    if q.stride(0) == 1:  # a feature's values are adjacent, as in a linear's weight
        features = max(TILE_N, at_a_time(_CHUNK_VALUES, q.device) // K // TILE_N * TILE_N)
        for n in range(0, N, features):
            part = q[:, n : n + features].t()
            words = torch.empty(K // TILE_K, 2 * part.shape[0], dtype=torch.int32, device=q.device)
            _pack_features(part, words)
            B[:, 2 * n : 2 * (n + part.shape[0])] = words
    else:
        num_rows = at_a_time(_CHUNK_ROWS, q.device)
        for row in range(0, K // TILE_K, num_rows):
            rows = q[TILE_K * row : TILE_K * (row + num_rows)]
            _pack_rows(rows, B[row : row + num_rows])
    return B


def _outside() -> ValueError:
    return ValueError("marlin.pack_weights: q has a value outside 0..15")


def _bytes(q: Tensor) -> Tensor:
    """Values as bytes that may be seen as words of 64 bits: contiguous, and at a multiple of 8."""
    q = q.to(torch.uint8).contiguous()
    return q.clone() if q.storage_offset() % 8 else q


def _pack_features(q: Tensor, out: Tensor) -> None:
    """Pack (N, K), values of a feature adjacent, into out (K / 16, 2 N): 16 of them become 8 bytes
    at once, and those are transposed. A transpose of single bytes, which _pack_rows would need,
    takes as long as all of this."""
    if q.dtype != torch.uint8 and (int(q.min()) < 0 or int(q.max()) > 15):
        raise _outside()
    N, K = q.shape
    # The eight bytes of a word are k = 8 far + 2 t + odd, least significant first.
    word = _bytes(q).view(torch.int64).view(N, K // TILE_K, 2)
    if bool((word & -0x0F0F0F0F0F0F0F10).any()):  # the upper half of any byte
        raise _outside()
    both = (word[..., 1] << 4).bitwise_or_(word[..., 0])  # (n, k16 rows): a byte has both far
    g = both.t().contiguous().view(K // TILE_K, N // TILE_K, 2, 8)  # (.., upper, g)
    lower, upper, bytes_ = g[:, :, 0], g[:, :, 1], 0x00FF00FF00FF00FF
    even = (lower & bytes_).bitwise_or_((upper & bytes_) << 8)  # 16 bits for each t
    odd = ((lower >> 8) & bytes_).bitwise_or_(upper & ~bytes_)
    halves = [x.view(torch.int16).view(-1, N // TILE_N, 4, 8, 4) for x in (even, odd)]
    words = torch.stack(halves, -1).view(torch.int32).squeeze(-1)  # (.., chunks, j, g, t)
    out.view(-1, N // TILE_N, 8, 4, 4).copy_(words.permute(0, 1, 3, 4, 2))


def _pack_rows(q: Tensor, out: Tensor) -> None:
    """Pack (K, N), values of a row adjacent, into out (K / 16, 2 N). They stay so until the last
    step: elements are cheap to combine and dear to transpose, and eight neighbours are combined at
    once. See nibble_index for the names."""
    low, high = (int(x) for x in torch.aminmax(q))
    if low < 0 or high > 15:
        raise _outside()
    N = q.shape[1]
    rows = _bytes(q).view(-1, 2, 4, 2, N).view(torch.int64)  # (k16 rows, far, t, odd, n / 8)
    both = (rows[:, 1] << 4).bitwise_or_(rows[:, 0]).view(-1, 4, 2, N // TILE_K, 2)  # (.., upper)
    # Byte i of a word of B is byte g of the i-th of these; g and g + 4 are made at once.
    bytes_g = [both[:, :, odd, :, upper] for odd in range(2) for upper in range(2)]
    words = torch.empty(4, *bytes_g[0].shape, dtype=torch.int64, device=q.device)
    masks = (0x000000FF000000FF, 0x0000FF000000FF00, 0x00FF000000FF0000, -0x00FFFFFF01000000)
    for g in range(4):
        for i, (byte, mask) in enumerate(zip(bytes_g, masks, strict=True)):
            moved = (byte >> 8 * (g - i) if g >= i else byte << 8 * (i - g)).bitwise_and_(mask)
            words[g] = moved if i == 0 else words[g].bitwise_or_(moved)
    by_g = words.view(torch.int32).view(4, -1, 4, N // TILE_N, 4, 2)  # (g % 4, .., t, .., j, g / 4)
    out.view(-1, N // TILE_N, 2, 4, 4, 4).copy_(by_g.permute(1, 3, 5, 0, 2, 4))


def unpack_weights(B: Tensor) -> Tensor:
    """Return the stored values of a packed weight.

    Args:
        B: (K / 16, 2 N), int32.

    Returns:
        q (K, N), uint8, values 0..15, on the device of B.

    Raises:
        ValueError: B has another shape or dtype.

    Example:
        >>> assert torch.equal(unpack_weights(pack_weights(q)), q)
    """
    if B.dtype != torch.int32:
        raise ValueError(f"marlin.unpack_weights: B is {B.dtype} but should be torch.int32")
    if B.dim() != 2 or B.shape[1] % (2 * TILE_N):
        raise ValueError(
            f"marlin.unpack_weights: B has shape {tuple(B.shape)} but should be (K / 16, 2 N) "
            f"with N a multiple of {TILE_N}"
        )
    N = B.shape[1] // 2
    q = torch.empty(B.shape[0] * TILE_K, N, dtype=torch.uint8, device=B.device)
    num_rows = at_a_time(_CHUNK_ROWS, B.device)
    for row in range(0, B.shape[0], num_rows):
        word = B[row : row + num_rows].reshape(-1, N // TILE_N, 8, 4, 4)  # (.., chunks, g, t, j)
        word = (
            word.permute(0, 3, 1, 4, 2).contiguous().view(-1, 4, N // 16, 8)
        )  # (.., t, n / 16, g)
        low = torch.empty(word.shape[0], 4, 2, N // 16, 2, 8, dtype=torch.uint8, device=B.device)
        for odd in range(2):
            for upper in range(2):
                low[:, :, odd, :, upper] = (word >> (16 * odd + 8 * upper)).to(torch.uint8)
        low = low.view(-1, 4, 2, N)
        out = q[TILE_K * row : TILE_K * (row + num_rows)].view(-1, 2, 4, 2, N)
        torch.bitwise_and(low, 15, out=out[:, 0])
        torch.bitwise_right_shift(low, 4, out=out[:, 1])
    return q


def permute_scales(s: Tensor) -> Tensor:
    """Return scales in the order of the packed format; one group is permuted in another way than
    several.

    Args:
        s: (groups, N), any dtype, N a multiple of 64.

    Returns:
        (groups, N) of the same dtype, contiguous.

    Raises:
        ValueError: s has another shape.

    Example:
        >>> layer.s.copy_(permute_scales(scales.t()))
    """
    _check_scales("permute_scales", s)
    if s.shape[0] == 1:
        return s.reshape(-1, 4, 4, 2).transpose(1, 2).reshape(s.shape)
    return s.reshape(-1, 8, 8).transpose(1, 2).reshape(s.shape)


def unpermute_scales(s: Tensor) -> Tensor:
    """Return scales of the packed format in the order of the columns: the inverse of
    permute_scales.

    Args:
        s: (groups, N), any dtype, N a multiple of 64.

    Returns:
        (groups, N) of the same dtype, contiguous.

    Raises:
        ValueError: s has another shape.

    Example:
        >>> assert torch.equal(unpermute_scales(permute_scales(s)), s)
    """
    _check_scales("unpermute_scales", s)
    # Both permutations swap two axes of equal length, so each is its own inverse.
    return permute_scales(s)


def group_order(g_idx: Tensor, k: int, group: int) -> Tensor:
    """Return the input features in the order of their groups: the start of perm (see layout.h).

    Args:
        g_idx: (k), any integer dtype, the group of each input feature.
        k: input features.
        group: members that each group has; the last one may have fewer.

    Returns:
        (k) int64, on the device of g_idx: the features of group 0 in ascending order, those of
        group 1, and so on. perm goes on with k, k + 1, ... as far as the weight was padded.

    Raises:
        ValueError: another shape or dtype, a group out of range, or one with too few or many
            members.

    Example:
        >>> group_order(torch.tensor([1, 0, 1, 0, 0, 0]), 6, 4)
        tensor([1, 3, 4, 5, 0, 2])
    """
    if g_idx.shape != (k,):
        raise ValueError(f"g_idx has shape {tuple(g_idx.shape)} but should be {(k,)}")
    if g_idx.is_floating_point() or g_idx.is_complex() or g_idx.dtype == torch.bool:
        raise ValueError(f"g_idx is {g_idx.dtype} but should be of an integer dtype")
    groups = -(-k // group)
    outside = ((g_idx < 0) | (g_idx >= groups)).nonzero()
    if len(outside):
        at = int(outside[0])
        raise ValueError(
            f"g_idx has {int(g_idx[at])} at {at} but there are {groups} groups, so it should be "
            f"within 0..{groups - 1}"
        )
    members = torch.bincount(g_idx.long(), minlength=groups)
    expected = torch.full_like(members, group)
    expected[-1] = k - (groups - 1) * group
    wrong = (members != expected).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(
            f"g_idx gives group {at} {int(members[at])} input features but should give it "
            f"{int(expected[at])}"
        )
    return torch.argsort(g_idx, stable=True)


def _check_scales(function: str, s: Tensor) -> None:
    if s.dim() != 2 or s.shape[1] % TILE_N:
        raise ValueError(
            f"marlin.{function}: s has shape {tuple(s.shape)} but should be (groups, N) "
            f"with N a multiple of {TILE_N}"
        )
