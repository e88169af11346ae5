"""Writes checkpoints: marlin, gptq and compressed-tensors, in shards of safetensors.

    save(model, tokenizer, folder)                       # a model on marlin.Layer
    convert("llama-awq", "llama-marlin", format="marlin")   # a checkpoint, layer by layer

    config.json               the model's config, with the quantization_config of the format
    quantize_config.json      the same once more, for readers of gptq that look there
    model.safetensors         or model-0000x-of-0000y.safetensors and model.safetensors.index.json
    tokenizer files, generation_config.json

A checkpoint is written into a folder beside its place and renamed once it is complete and on disk,
so that a full disk or a crash leaves the old one as it was. Each file carries the CRC-32 of its
tensors, which model.py verifies. Depends on safetensors, and on model.py to read what is converted.
"""

from __future__ import annotations

import collections
import copy
import errno
import json
import logging
import os
import pathlib
import re
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..layer import Layer
from . import compressed_tensors, gptq, marlin
from .config import CONFIG, Spec
from .errors import CheckpointError
from .files import CHECKSUMS, INDEX, WEIGHTS
from .model import Checkpoint, open_checkpoint
from .record import Record

log = logging.getLogger("marlin")

WRITTEN = ("marlin", "gptq", "compressed-tensors")
SHARD_BYTES = 2 << 30  # of tensors in a file, all of which are in memory until it is written
# What is copied from a checkpoint to its conversion beside the weights and configs: data, no code.
COPIED = re.compile(
    r"(tokenizer.*|special_tokens_map|added_tokens|generation_config|vocab|preprocessor_config"
    r"|chat_template)\.(json|jinja|txt|model)|merges\.txt|.*\.(model|jinja|tiktoken)"
    r"|(LICENSE|NOTICE|USE_POLICY).*"
)


# --------------------------------------------------------------------------------------------------
# Packing
# --------------------------------------------------------------------------------------------------


def pack_model(model: nn.Module, scales: dict[str, Tensor], groupsize: int) -> None:
    """Replaces linear layers by packed Marlin layers, in place.

    Args:
        model: whose linear layers named in `scales` have weights on the 4-bit grid of these scales.
        scales: (n, groups) fp16 for each layer's name.
        groupsize: input features that share a scale, -1 for all.

    Raises:
        ValueError: a name that is no linear layer of the model.
    """
    for name, s in scales.items():
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise ValueError(
                f"marlin.checkpoint.pack_model: {name} is a {type(linear).__name__}, not a linear "
                "layer"
            )
        layer = Layer(
            linear.in_features, linear.out_features, groupsize, bias=linear.bias is not None
        )
        layer = layer.to(linear.weight.device)
        layer.pack(linear, s.to(linear.weight.device))
        setattr(model.get_submodule(parent), child, layer)


# --------------------------------------------------------------------------------------------------
# Saving and converting
# --------------------------------------------------------------------------------------------------


def check_target(directory: str | os.PathLike[str]) -> pathlib.Path:
    """Makes sure that a checkpoint may take this place.

    Args:
        directory: where a checkpoint is to be: nothing, an empty folder, or a model folder, which
            will be replaced.

    Returns:
        Its absolute path.

    Raises:
        CheckpointError: it is a file, or a folder that holds something else.
    """
    target = pathlib.Path(directory).absolute()
    if target.exists() and not target.is_dir():
        raise CheckpointError(
            f"marlin.checkpoint.save: {directory} is a file, but a checkpoint is a folder"
        )
    if target.is_dir() and any(target.iterdir()) and not (target / CONFIG).is_file():
        raise CheckpointError(
            f"marlin.checkpoint.save: {directory} is not empty and not a model folder (no "
            f"{CONFIG}), so it is not replaced"
        )
    return target


def save(
    model: Any,
    tokenizer: Any,
    directory: str | os.PathLike[str],
    format: str = "marlin",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a checkpoint; one that is already there is replaced only when the new one is complete.

    Args:
        model: a transformers model with Marlin layers.
        tokenizer: of the model, or None.
        directory: where; see check_target.
        format: marlin, gptq or compressed-tensors.
        shard_bytes: tensors in a file at most, unless a single one is larger.

    Raises:
        CheckpointError: the model has no Marlin layer, or one that the format cannot hold; or
            writing failed, for instance because the disk is full. What was in `directory` is then
            unchanged.

    Example:
        >>> marlin.replace_linear(model.model.layers, groupsize=128)  # then pack each layer
        >>> marlin.checkpoint.save(model, tokenizer, "llama-marlin")
    """
    check_format(format)
    layers = _layers(model)
    if not layers:
        raise CheckpointError("marlin.checkpoint.save: the model has no marlin.Layer")
    symmetric = all(layer.z is None for layer in layers.values())
    config = copy.deepcopy(model.config).to_dict()
    config.pop("torch_dtype", None)
    config["architectures"] = [type(model).__name__]

    def tensors(specs: dict[str, Spec]) -> Iterator[tuple[str, Tensor]]:
        yield from _dense_tensors(model, set(layers), config)
        for name, layer in layers.items():
            record = marlin.record_of(layer)
            specs[name] = _spec(record)
            yield from tensors_of(format, name, record, symmetric).items()

    def extras(folder: pathlib.Path) -> None:
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    dense = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    sizes = {name: layer.k for name, layer in layers.items()}
    _write_folder(directory, config, format, tensors, dense, sizes, extras, shard_bytes)


def convert(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    format: str = "marlin",
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[str, int, int], None] | None = None,
    config: str | os.PathLike[str] | None = None,
) -> None:
    """Writes a checkpoint in another format, bit for bit the same model.

    Args:
        source: a checkpoint in any format that `load` reads.
        directory: where; see check_target. May be `source` itself.
        format: marlin, gptq or compressed-tensors.
        shard_bytes: tensors in a file at most, unless a single one is larger. That much and a layer
            are in memory.
        progress: called before each layer with its name, its number from 0, and how many there are.
        config: as in `load`.

    Raises:
        CheckpointError: the source cannot be read, the format cannot hold it, or writing failed;
            what was in `directory` is then unchanged.

    Example:
        >>> marlin.checkpoint.convert("llama-awq", "llama-ct", "compressed-tensors")
    """
    check_format(format)
    check_target(directory)
    read = open_checkpoint(source, config=config)
    count = len(read.linears)
    symmetric = all(linear.spec.symmetric for linear in read.linears.values())

    def tensors(specs: dict[str, Spec]) -> Iterator[tuple[str, Tensor]]:
        for key in read.dense:
            yield key, read.shards.read(key)
        for i, name in enumerate(read.linears):
            if progress is not None:
                progress(name, i, count)
            record = read.record(name)
            specs[name] = _spec(record)
            yield from tensors_of(format, name, record, symmetric).items()

    dense = [
        name
        for name, module in read.model.named_modules()
        if type(module) is nn.Linear and name not in read.linears
    ]
    sizes = {name: linear.k for name, linear in read.linears.items()}
    _write_folder(
        directory,
        read.config,
        format,
        tensors,
        dense,
        sizes,
        lambda folder: _copy_extras(read, folder),
        shard_bytes,
    )


def _layers(model: nn.Module) -> dict[str, Layer]:
    """The Marlin layers by name; one that has several names, a shared one, under each of them."""
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if isinstance(module, Layer)}


def check_format(format: str) -> None:
    """Makes sure that a format can be written.

    Raises:
        CheckpointError: it cannot.
    """
    if format not in WRITTEN:
        raise CheckpointError(
            f"marlin.checkpoint: format is {format!r} but should be one of {', '.join(WRITTEN)}"
        )


def tensors_of(format: str, name: str, record: Record, symmetric: bool) -> dict[str, Tensor]:
    """The tensors of a layer; symmetric is whether all layers of the checkpoint are."""
    if format == "gptq":
        return gptq.write(name, record, version=1 if symmetric else 2)
    if format == "marlin":
        return marlin.write(name, record)
    return compressed_tensors.write(name, record)


def _dense_tensors(
    model: Any, layers: set[str], config: dict[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """What is not in a Marlin layer, in 16 bits; sets the config's dtype to match."""
    config["dtype"] = "float16"
    seen: set[tuple[int, int]] = set()
    for key, tensor in model.state_dict().items():
        if key.rpartition(".")[0] in layers:
            continue
        storage = (tensor.untyped_storage().data_ptr(), tensor.storage_offset())
        if storage in seen and tensor.numel() and key == "lm_head.weight":
            continue  # tied to the embedding, and tied again when it is loaded
        seen.add(storage)
        if tensor.dtype == torch.bfloat16:
            config["dtype"] = "bfloat16"
        yield key, tensor.half() if tensor.dtype == torch.float32 else tensor


def _copy_extras(read: Checkpoint, folder: pathlib.Path) -> None:
    """Copies tokenizer files and the like. A link is followed within the folder and into the store
    beside it that a cache of the hub has, so that nobody's repository can name a private file."""
    home = read.folder.resolve()
    for path in sorted(read.folder.iterdir()):
        if not COPIED.fullmatch(path.name) or not path.is_file():
            continue
        real = path.resolve()
        if real.is_relative_to(home) or real.parent == home.parent.parent / "blobs":
            shutil.copyfile(real, folder / path.name)
        else:
            log.warning("marlin: %s is not copied: it is a link to another place", path)


# --------------------------------------------------------------------------------------------------
# What the config says of the layers
# --------------------------------------------------------------------------------------------------


def _spec(record: Record) -> Spec:
    return Spec(record.groupsize, record.zeros is None, record.g_idx is not None)


def quantization_config(
    format: str, specs: dict[str, Spec], dense: list[str], sizes: dict[str, int]
) -> dict[str, Any]:
    """What config.json says of the compressed layers.

    Args:
        format: that they are written in.
        specs: of each compressed layer by name.
        dense: names of the linear layers that are not compressed.
        sizes: input features of each compressed layer.
    """
    specs = dict(specs)

    def with_size(name: str, size: int) -> bool:  # one group is one group, by either name
        own = specs[name].groupsize
        return own == size or (own == -1 and sizes[name] == size)

    found = sorted({spec.groupsize for spec in specs.values()})
    groupsize = max(found, key=lambda size: sum(with_size(name, size) for name in specs))
    for name, spec in specs.items():
        if with_size(name, groupsize):
            specs[name] = Spec(groupsize, spec.symmetric, spec.act_order)
    if format == "compressed-tensors":
        kinds: dict[Spec, list[str]] = collections.defaultdict(list)
        for name, spec in specs.items():
            kinds[spec].append(name)
        most = max(kinds, key=lambda spec: len(kinds[spec]))
        # A name goes before the class of a layer, so the largest kind needs no names.
        groups = {spec: None if spec == most else names for spec, names in kinds.items()}
        return compressed_tensors.configuration(groups, dense)
    if format == "gptq":  # it stores zero points and g_idx in any case
        symmetric = all(spec.symmetric for spec in specs.values())
        act_order = any(spec.act_order for spec in specs.values())
        specs = {name: Spec(spec.groupsize, symmetric, act_order) for name, spec in specs.items()}
    of_size = [spec for spec in specs.values() if spec.groupsize == groupsize]
    default = collections.Counter(of_size).most_common(1)[0][0]
    dynamic: dict[str, Any] = {}
    for name, spec in specs.items():
        changes = {
            "group_size": (spec.groupsize, default.groupsize),
            "sym": (spec.symmetric, default.symmetric),
            "desc_act": (spec.act_order, default.act_order),
        }
        changed = {key: own for key, (own, usual) in changes.items() if own != usual}
        if changed:
            dynamic[f"+:^{re.escape(name)}$"] = changed
    dynamic |= {f"-:^{re.escape(name)}$": {} for name in dense if name != "lm_head"}
    if format == "gptq":
        return gptq.configuration(default, dynamic, "lm_head" in specs)
    return marlin.configuration(default, dynamic, "lm_head" in specs)


def layers_config(model: nn.Module) -> dict[str, Any]:
    """What config.json says, in the Marlin format, of the layers of a model.

    Args:
        model: with Marlin layers.
    """
    layers = _layers(model)
    specs = {
        name: Spec(
            -1 if layer.groupsize == layer.k else layer.groupsize,
            layer.z is None,
            layer.perm is not None,
        )
        for name, layer in layers.items()
    }
    dense = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    return quantization_config("marlin", specs, dense, {n: layer.k for n, layer in layers.items()})


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def _write_folder(
    directory: str | os.PathLike[str],
    config: dict[str, Any],
    format: str,
    tensors: Callable[[dict[str, Spec]], Iterator[tuple[str, Tensor]]],
    dense: list[str],
    sizes: dict[str, int],
    extras: Callable[[pathlib.Path], None],
    shard_bytes: int,
) -> None:
    """Writes all files of a checkpoint aside, and puts them in their place when they are on disk.

    Args:
        tensors: yields the tensors, and fills in the spec of each compressed layer.
        extras: writes the files that are neither weights nor config.
    """
    target = check_target(directory)
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    specs: dict[str, Spec] = {}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
        _write_shards(aside, tensors(specs), shard_bytes)
        quantization = quantization_config(format, specs, dense, sizes)
        _write_json(aside / CONFIG, config | {"quantization_config": quantization})
        if format == "gptq":
            _write_json(aside / "quantize_config.json", quantization)
        extras(aside)
        _sync(aside)
        _replace(aside, target)
    except Exception as error:
        if isinstance(error, CheckpointError) or not _is_write_error(error):
            raise
        raise CheckpointError(
            f"marlin.checkpoint.save: writing {directory} failed ({_reason(error)}); what was "
            "there before is unchanged"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, sort_keys=True, default=str)
    path.write_text(text + "\n", encoding="utf-8")


def _write_shards(
    folder: pathlib.Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int
) -> None:
    """Writes tensors as they come; how many files there are is known, and they are named, at the
    end."""
    import safetensors.torch

    held: dict[str, Tensor] = {}
    held_bytes = total_bytes = 0
    shards: list[list[str]] = []
    storages: set[int] = set()

    def flush() -> None:
        nonlocal held, held_bytes
        sums = {key: _crc32(tensor) for key, tensor in held.items()}
        metadata = {"format": "pt", CHECKSUMS: json.dumps(sums)}
        safetensors.torch.save_file(held, str(folder / f"part-{len(shards)}"), metadata=metadata)
        shards.append(list(held))
        held, held_bytes = {}, 0
        storages.clear()

    for key, value in tensors:
        tensor = value.detach().cpu().contiguous()
        num_bytes = tensor.numel() * tensor.itemsize
        if held and held_bytes + num_bytes > shard_bytes:
            flush()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()  # safetensors refuses tensors that share memory
        storages.add(tensor.untyped_storage().data_ptr())
        held[key] = tensor
        held_bytes += num_bytes
        total_bytes += num_bytes
    flush()
    if len(shards) == 1:
        (folder / "part-0").rename(folder / WEIGHTS)
        return
    weight_map: dict[str, str] = {}
    for i, keys in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"part-{i}").rename(folder / name)
        weight_map |= dict.fromkeys(keys, name)
    _write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def _crc32(tensor: Tensor) -> int:
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _sync(folder: pathlib.Path) -> None:
    """Waits until the files and the folder are on disk, and not only in the page cache, where a
    full disk can hide."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _replace(aside: pathlib.Path, target: pathlib.Path) -> None:
    """Puts a complete folder in its place. A folder cannot be renamed over another that is not
    empty, so the old one steps aside first and comes back if the second rename fails."""
    retired = None
    if target.exists():
        retired = aside.with_suffix(".old")
        os.rename(target, retired)
    try:
        os.rename(aside, target)
    except BaseException:  # an interrupt too
        if retired is not None:
            os.rename(retired, target)
        raise
    if retired is not None:
        shutil.rmtree(retired, ignore_errors=True)


def _is_write_error(error: BaseException) -> bool:
    # safetensors and tokenizers report a full disk as errors of their own.
    return (
        isinstance(error, OSError)
        or type(error).__name__ == "SafetensorError"
        or "os error" in str(error)
    )


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    text = str(error)
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES):
        if f"(os error {code})" in text or f"code: {code}," in text:
            return os.strerror(code)
    return next(iter(text.splitlines()), type(error).__name__)
