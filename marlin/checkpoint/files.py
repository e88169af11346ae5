"""The tensors of a model folder: safetensors in one file or in shards, or an old pickle of them.

    shards = files.open_folder(folder)
    shards["lm_head.weight"].shape      # known from the headers, nothing is read
    shards.read("lm_head.weight")       # reads these bytes and no others

Depends on torch alone. Headers are parsed here, not by the safetensors package, so that an error
can say which tensor is wrong and what was expected of it, and so that tensors are read with plain
reads: a mapped file counts as memory of the process, and one that is cut short while it is mapped
ends the process. What a header claims is checked against the size of the file before anything is
allocated.
Called by the readers and by `marlin info`.
"""

from __future__ import annotations

import json
import math
import pathlib
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError, first_line

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth")
CHECKSUMS = "marlin_crc32"  # key of the metadata under which a file of ours keeps its sums

MAX_HEADER_BYTES = 100_000_000  # as in the safetensors library
MAX_JSON_BYTES = 100_000_000
MAX_NAME = 1000  # characters of a tensor's name
MAX_DIMS = 8

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where a tensor is and what it looks like."""

    file: pathlib.Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it: "F16", "I32"
    begin: int = 0  # in bytes from the start of the file
    crc32: int | None = None

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{list(self.shape)} {self.dtype}"


class Shards(Mapping[str, Entry]):
    """The tensors of a checkpoint by name. Nothing is held open or in memory between two reads."""

    def __init__(self, entries: dict[str, Entry], pickled: dict[str, Tensor] | None = None):
        self._entries = entries
        self._pickled = pickled

    def __getitem__(self, key: str) -> Entry:
        return self._entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def files(self) -> list[pathlib.Path]:
        """The files that the tensors are in, each once, in order."""
        return list(dict.fromkeys(entry.file for entry in self._entries.values()))

    def read(self, key: str, device: torch.device | str = "cpu") -> Tensor:
        """Reads one tensor.

        Args:
            key: its name.
            device: where it goes.

        Returns:
            A tensor of its own, contiguous, that shares nothing with the file.

        Raises:
            CheckpointError: the file has become shorter, or the bytes are not those that were
                written.
        """
        entry = self._entries[key]
        if self._pickled is not None:
            return self._pickled[key].detach().to(device, copy=True).contiguous()
        raw = torch.empty(entry.num_bytes, dtype=torch.uint8)
        try:
            with open(entry.file, "rb") as file:
                file.seek(entry.begin)
                found = file.readinto(raw.numpy().data) if entry.num_bytes else 0
        except OSError as error:
            raise CheckpointError(
                f"marlin.checkpoint.load: {entry.file} cannot be read: {error.strerror}"
            ) from error
        if found != entry.num_bytes:
            raise CheckpointError(
                f"marlin.checkpoint.load: {entry.file} ends within {key}: {entry.num_bytes} bytes "
                f"expected, {found} found"
            )
        if entry.crc32 is not None and (crc := zlib.crc32(raw.numpy().data)) != entry.crc32:
            raise CheckpointError(
                f"marlin.checkpoint.load: {entry.file} is damaged in {key}: its CRC-32 should be "
                f"{entry.crc32:08x} but is {crc:08x}"
            )
        return raw.view(DTYPES[entry.dtype]).view(entry.shape).to(device)


# --------------------------------------------------------------------------------------------------
# Which files
# --------------------------------------------------------------------------------------------------


def open_folder(folder: pathlib.Path) -> Shards:
    """Finds the weights of a model folder and reads their headers.

    Looked for in this order: model.safetensors.index.json, model.safetensors, the only other
    *.safetensors, the only *.bin, *.pt or *.pth.

    Args:
        folder: of the checkpoint; or one file of weights.

    Returns:
        Its tensors.

    Raises:
        CheckpointError: there are none, or it cannot be told which; a file or the index is damaged
            or points outside of the folder.
    """
    if folder.is_file():
        return open_file(folder)
    if (folder / INDEX).is_file():
        return _open_index(folder / INDEX)
    if (folder / WEIGHTS).is_file():
        return open_file(folder / WEIGHTS)
    try:
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise CheckpointError(
            f"marlin.checkpoint.load: {folder} cannot be read: {error.strerror}"
        ) from error
    for suffixes in ((".safetensors",), PICKLES):
        found = [name for name in names if name.endswith(suffixes)]
        found = [name for name in found if name != "training_args.bin"]
        if len(found) == 1:
            return open_file(folder / found[0])
        if found:
            raise CheckpointError(
                f"marlin.checkpoint.load: {folder} has {len(found)} files of weights ({found[0]}, "
                f"{found[1]} ...) but no {INDEX} that says which tensor is in which"
            )
    raise CheckpointError(f"marlin.checkpoint.load: {folder} has no {WEIGHTS}")


def open_file(path: pathlib.Path) -> Shards:
    """Reads the header of one file.

    Args:
        path: a safetensors file; or, by its ending, a pickle, which is unpickled with
            weights_only=True: tensors and plain containers, no code.

    Raises:
        CheckpointError: it is damaged or holds something else than tensors.
    """
    if path.suffix in PICKLES:
        return _open_pickle(path)
    return Shards(_read_header(path))


def _open_index(path: pathlib.Path) -> Shards:
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            f"marlin.checkpoint.load: {path} has weight_map of type "
            f"{type(weight_map).__name__}, but it should be an object"
        )
    headers: dict[str, dict[str, Entry]] = {}
    entries: dict[str, Entry] = {}
    for key, name in weight_map.items():
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\:\0]+\.safetensors", name):
            raise CheckpointError(
                f"marlin.checkpoint.load: {path} puts {key[:MAX_NAME]} into {str(name)[:200]!r}, "
                "which is not the name of a safetensors file beside it"
            )
        if name not in headers:
            shard = path.parent / name
            if not shard.is_file():
                raise CheckpointError(
                    f"marlin.checkpoint.load: {path} puts {key} into {name}, but there is no such "
                    "file"
                )
            headers[name] = _read_header(shard)
        if key not in headers[name]:
            raise CheckpointError(
                f"marlin.checkpoint.load: {path.parent / name} has no tensor {key[:MAX_NAME]}, "
                f"which {INDEX} puts into it"
            )
        entries[key] = headers[name][key]
    return Shards(entries)


# --------------------------------------------------------------------------------------------------
# JSON
# --------------------------------------------------------------------------------------------------


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        CheckpointError: the file is missing, longer than 100 MB, no JSON, no object, or has a key
            twice.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(
                f"marlin.checkpoint.load: {path} has {size} bytes, but {MAX_JSON_BYTES} are the "
                "limit"
            )
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"marlin.checkpoint.load: {path} cannot be read: {error.strerror}"
        ) from error
    return _parse_object(text, f"marlin.checkpoint.load: {path} is not JSON", str(path))


def _parse_object(text: bytes, complaint: str, place: str) -> dict[str, Any]:
    """Parses a JSON object, the text of which nobody vouches for."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [key for key, _ in pairs]
            twice = next(key for key in names if names.count(key) > 1)
            raise ValueError(f"{twice[:MAX_NAME]!r} is there twice")
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError too
        raise CheckpointError(f"{complaint}: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"marlin.checkpoint.load: {place} holds a {type(value).__name__} but should hold an "
            "object"
        )
    return value


# --------------------------------------------------------------------------------------------------
# Safetensors
# --------------------------------------------------------------------------------------------------


def _read_header(path: pathlib.Path) -> dict[str, Entry]:
    """Shape, type and place of every tensor in a safetensors file, none of which is read.

    The file is a little-endian 64-bit length, as many bytes of JSON, and the tensors' bytes, which
    the JSON's offsets must cover without a gap or an overlap.
    """
    complaint = f"marlin.checkpoint.load: {path} is not an intact safetensors file"
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{complaint}: it has {size} bytes, but its header should have {length}"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{complaint}: {error.strerror}") from error
    header = _parse_object(text, f"{complaint}: its header is not JSON", f"the header of {path}")
    metadata = header.pop("__metadata__", {})
    sums = _checksums(metadata, complaint)
    entries = {}
    for key, value in header.items():
        if len(key) > MAX_NAME or not key.isprintable():
            raise CheckpointError(f"{complaint}: it has a tensor with the name {key[:50]!r} ...")
        entries[key] = _entry(path, key, value, 8 + length, sums.get(key), complaint)
    end = 8 + length
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].num_bytes)):
        if entry.begin != end:
            raise CheckpointError(
                f"{complaint}: {key} should begin at byte {end} of the file but begins at "
                f"{entry.begin}"
            )
        end += entry.num_bytes
    if end != size:
        raise CheckpointError(
            f"{complaint}: its tensors end at byte {end}, but the file has {size} bytes"
        )
    return entries


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _entry(
    path: pathlib.Path, key: str, value: object, base: int, crc32: int | None, complaint: str
) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{complaint}: {key} should have dtype, shape and data_offsets but has "
            f"{', '.join(sorted(value)) if isinstance(value, dict) else value!r}"[:1000]
        )
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{complaint}: {key} has dtype {str(dtype)[:50]!r}, which is unknown")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(map(_is_size, shape)):
        raise CheckpointError(f"{complaint}: {key} has shape {str(shape)[:100]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise CheckpointError(f"{complaint}: {key} has data_offsets {str(offsets)[:100]}")
    entry = Entry(path, tuple(shape), dtype, base + offsets[0], crc32)
    if offsets[1] - offsets[0] != entry.num_bytes:
        raise CheckpointError(
            f"{complaint}: {key} is {entry}, {entry.num_bytes} bytes, but its data_offsets "
            f"{offsets} hold {offsets[1] - offsets[0]}"
        )
    return entry


def _checksums(metadata: object, complaint: str) -> dict[str, int]:
    """The CRC-32 of tensors by name, which files that are written here carry."""
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{complaint}: its metadata is no object")
    text = metadata.get(CHECKSUMS)
    if text is None:
        return {}
    place = f"{complaint}: {CHECKSUMS} of its metadata is not JSON"
    sums = _parse_object(str(text).encode(), place, CHECKSUMS)
    if not all(type(crc) is int and 0 <= crc < 2**32 for crc in sums.values()):
        raise CheckpointError(f"{complaint}: {CHECKSUMS} of its metadata holds no CRC-32")
    return sums


# --------------------------------------------------------------------------------------------------
# Pickles of tensors
# --------------------------------------------------------------------------------------------------


def _open_pickle(path: pathlib.Path) -> Shards:
    """The tensors of a torch.save'd state dict. Only weights_only=True, whatever it says."""
    prefix = f"marlin.checkpoint.load: {path}"
    size = path.stat().st_size
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files of torch before 1.6 cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises whatever the bytes lead it to
        raise CheckpointError(
            f"{prefix} is not a torch file of tensors alone: {first_line(error)}"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise CheckpointError(f"{prefix} holds a {type(state).__name__} but should hold tensors")
    entries = {}
    for key, tensor in state.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{prefix} holds {str(key)[:100]!r} of type {type(tensor).__name__} but should "
                "hold tensors"
            )
        dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not dense or tensor.dtype not in NAMES or not tensor.is_contiguous():
            raise CheckpointError(f"{prefix} holds {key}, which is not a plain tensor")
        if tensor.numel() * tensor.itemsize > size:
            raise CheckpointError(
                f"{prefix} has {size} bytes, but its tensor {key} claims "
                f"{tensor.numel() * tensor.itemsize}"
            )
        entries[key] = Entry(path, tuple(tensor.shape), NAMES[tensor.dtype])
    return Shards(entries, dict(state))
