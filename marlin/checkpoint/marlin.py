"""The Marlin checkpoint: a model folder as transformers writes it, whose compressed layers are
stored as B and s.

    config.json           the model's config, with quantization_config = {"quant_method": "marlin",
                          "bits": 4, "group_size": 128 or -1, "sym": true, "desc_act": false,
                          "checkpoint_format": "marlin", "lm_head": false}
    model.safetensors     <layer>.B, <layer>.s (and <layer>.bias) for each compressed layer,
                          <name>.weight for the rest
    tokenizer files, generation_config.json

A checkpoint is written into a folder beside its place and renamed once it is complete and on disk,
so that a full disk or a crash leaves the old one as it was. What is read is checked against the
config, tensor by tensor, before any of it is used.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import logging
import os
import pathlib
import shutil
import uuid
from typing import Any

import torch
from torch import Tensor, nn

from ..layer import Layer

log = logging.getLogger("marlin")

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message is one sentence."""


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
# Writing
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


def save(model: Any, tokenizer: Any, directory: str | os.PathLike[str]) -> None:
    """Writes a checkpoint; one that is already there is replaced only when the new one is complete.

    Args:
        model: a transformers model with Marlin layers.
        tokenizer: of the model, or None.
        directory: where; see check_target.

    Raises:
        CheckpointError: the model has no Marlin layer, or layers of several group sizes; or writing
            failed, for instance because the disk is full. What was in `directory` is then
            unchanged.

    Example:
        >>> marlin.replace_linear(model.model.layers, groupsize=128)  # then pack each layer
        >>> marlin.checkpoint.save(model, tokenizer, "llama-marlin")
    """
    target = check_target(directory)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Layer)}
    if not layers:
        raise CheckpointError("marlin.checkpoint.save: the model has no marlin.Layer")
    groupsize = _common_groupsize(layers)
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
        _write(model, tokenizer, aside, _quantization_config(groupsize, layers))
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


def _common_groupsize(layers: dict[str, Layer]) -> int:
    """The group size that makes every layer what it is: -1 where each has one group."""
    sizes = {layer.groupsize for layer in layers.values() if layer.groupsize != layer.k} or {-1}
    groupsize = min(sizes)
    misfits = [
        n
        for n, layer in layers.items()
        if layer.groupsize == layer.k and groupsize not in (-1, layer.k)
    ]
    if len(sizes) > 1 or misfits:
        found = sorted(sizes | {-1 for _ in misfits})
        raise CheckpointError(
            f"marlin.checkpoint.save: the layers have group sizes {found}, but only one fits"
        )
    return groupsize


def _quantization_config(groupsize: int, layers: dict[str, Layer]) -> dict[str, Any]:
    return {
        "quant_method": "marlin",
        "bits": 4,
        "group_size": groupsize,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "marlin",
        "lm_head": "lm_head" in layers,
    }


def _write(model: Any, tokenizer: Any, folder: pathlib.Path, quantization: dict[str, Any]) -> None:
    """Writes all files of a checkpoint into an empty folder."""
    import safetensors.torch

    layers = {name for name, module in model.named_modules() if isinstance(module, Layer)}
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[int, int]] = set()
    for key, tensor in model.state_dict().items():
        if key.rpartition(".")[2] == "workspace" and key.rpartition(".")[0] in layers:
            continue  # scratch of the published class
        storage = (tensor.untyped_storage().data_ptr(), tensor.storage_offset())
        if storage in seen and tensor.numel() and key == "lm_head.weight":
            continue  # tied to the embedding, and tied again when it is loaded
        seen.add(storage)
        tensor = tensor.detach().cpu()
        tensors[key] = (tensor.half() if tensor.dtype == torch.float32 else tensor).contiguous()
    config = copy.deepcopy(model.config).to_dict()
    config["quantization_config"] = quantization
    config["dtype"] = "float16"
    config.pop("torch_dtype", None)
    config["architectures"] = [type(model).__name__]
    (folder / CONFIG).write_text(
        json.dumps(config, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8"
    )
    safetensors.torch.save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


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


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


def load(
    directory: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Any:
    """Builds a transformers model on Marlin layers from a checkpoint.

    Args:
        directory: a folder that `save` wrote.
        device: where the model goes.
        dtype: of activations and of the weights that are not compressed; None is FP16 on a GPU and
            float32 on a CPU, which is what each computes fastest.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: a file is missing, damaged, or disagrees with the config; names file,
            tensor, what is expected and what was found.

    Example:
        >>> model = marlin.checkpoint.load("llama-marlin", device="cuda")
        >>> tokenizer = transformers.AutoTokenizer.from_pretrained("llama-marlin")
    """
    folder, device = pathlib.Path(directory), torch.device(device)
    if dtype is None:
        dtype = torch.float16 if device.type == "cuda" else torch.float32
    config, quantization = read_config(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"marlin.checkpoint.load: {folder} has no {WEIGHTS}")
    shapes = _read_header(path)
    model = _build(config, folder, dtype)
    _place_layers(model, shapes, int(quantization["group_size"]), path)
    expected = _expected(model)
    _check_tensors(shapes, expected, path)
    _fill(model, path, set(shapes), device, dtype)
    return model.eval()


def read_config(folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads and validates config.json as plain JSON.

    Args:
        folder: of the checkpoint.

    Returns:
        The model's config without its quantisation, and the quantisation's.

    Raises:
        CheckpointError: it is missing, no JSON object, or not that of a Marlin checkpoint.
    """
    path = folder / CONFIG
    prefix = "marlin.checkpoint.load:"
    if not path.is_file():
        raise CheckpointError(f"{prefix} {folder} is not a checkpoint: it has no {CONFIG}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{prefix} {path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{prefix} {path} holds a {type(config).__name__} but should hold an object"
        )
    quantization = config.pop("quantization_config", None)
    if not isinstance(quantization, dict):
        raise CheckpointError(
            f"{prefix} {path} has no quantization_config, so it is not a Marlin checkpoint"
        )
    if quantization.get("quant_method") != "marlin":
        raise CheckpointError(
            f"{prefix} {path} has quant_method {quantization.get('quant_method')!r}, not 'marlin'"
        )
    if quantization.get("bits") != 4:
        raise CheckpointError(f"{prefix} {path} has bits {quantization.get('bits')!r}, not 4")
    group_size = quantization.get("group_size")
    if type(group_size) is not int or (group_size != -1 and (group_size <= 0 or group_size % 16)):
        raise CheckpointError(
            f"{prefix} {path} has group_size {group_size!r}, which is neither -1 nor a positive "
            "multiple of 16"
        )
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{prefix} {path} names no model_type")
    return config, quantization


def _read_header(path: pathlib.Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """The shape and type of every tensor in a safetensors file, none of which is read."""
    import safetensors

    try:
        with safetensors.safe_open(str(path), "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            return {key: (tuple(s.get_shape()), s.get_dtype()) for key, s in slices.items()}
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"marlin.checkpoint.load: {path} is not an intact safetensors file: {error}"
        ) from error


def _build(config: dict[str, Any], folder: pathlib.Path, dtype: torch.dtype) -> Any:
    """The model of a config, on meta: no memory, no initialisation."""
    import transformers

    kind = config["model_type"]
    auto: Any = transformers.AutoModelForCausalLM
    try:
        parsed = transformers.AutoConfig.for_model(**config)
        with torch.device("meta"):
            return auto.from_config(parsed, dtype=dtype, attn_implementation="sdpa")
    except Exception as error:  # what a wrong config raises depends on the version of transformers
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(
            f"marlin.checkpoint.load: {folder / CONFIG} does not describe a model (model_type "
            f"{kind!r}): {reason}"
        ) from error


def _place_layers(
    model: nn.Module, shapes: dict[str, Any], groupsize: int, path: pathlib.Path
) -> None:
    """Puts a Marlin layer, on meta, wherever the file has a B."""
    modules = dict(model.named_modules())
    for key in [key for key in shapes if key.endswith(".B")]:
        name = key.removesuffix(".B")
        parent, _, child = name.rpartition(".")
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise CheckpointError(
                f"marlin.checkpoint.load: {path} has {key}, but the model of {CONFIG} has no "
                f"linear layer {name}"
            )
        with torch.device("meta"):
            layer = Layer(
                linear.in_features, linear.out_features, groupsize, bias=linear.bias is not None
            )
        setattr(modules[parent], child, layer)


SAFETENSORS_TYPES = {
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}
FLOATS = ("F16", "BF16", "F32")


def _expected(model: nn.Module) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Shape and allowed types of every tensor that a model needs."""
    in_layers = {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, Layer)
        for key in module.state_dict()
    }
    expected = {}
    for key, tensor in model.state_dict().items():
        types = (
            (SAFETENSORS_TYPES[tensor.dtype],)
            if key in in_layers and not key.endswith(".bias")
            else FLOATS
        )
        expected[key] = (tuple(tensor.shape), types)
    return {
        key: value
        for key, value in expected.items()
        if not (key in in_layers and key.endswith(".workspace"))
        and not (key == "lm_head.weight" and _is_tied(model))
    }


def _is_tied(model: Any) -> bool:
    return bool(getattr(model.config, "tie_word_embeddings", False))


def _check_tensors(
    shapes: dict[str, tuple[tuple[int, ...], str]],
    expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]],
    path: pathlib.Path,
) -> None:
    prefix = f"marlin.checkpoint.load: {path}"
    for key, (shape, types) in expected.items():
        if key not in shapes:
            raise CheckpointError(f"{prefix} has no tensor {key}, {list(shape)} {types[0]}")
        found_shape, found_type = shapes[key]
        if found_shape != shape:
            raise CheckpointError(
                f"{prefix} has {key} of shape {list(found_shape)}, but {CONFIG} needs {list(shape)}"
            )
        if found_type not in types:
            raise CheckpointError(
                f"{prefix} has {key} of type {found_type}, but it should be {' or '.join(types)}"
            )
    for key in sorted(set(shapes) - set(expected)):
        # Old files carry the scratch of their layers, or a copy of the embedding.
        if key != "lm_head.weight" and not key.endswith(".workspace"):
            raise CheckpointError(
                f"{prefix} has a tensor {key} that the model of {CONFIG} has no place for"
            )


def _fill(
    model: Any, path: pathlib.Path, keys: set[str], device: torch.device, dtype: torch.dtype
) -> None:
    """Gives every tensor of a model on meta its storage and value."""
    import safetensors

    with safetensors.safe_open(str(path), "pt", device=str(device)) as file:
        for name, module in model.named_modules():
            packed = isinstance(module, Layer)
            for own in (module._parameters, module._buffers):
                for child, tensor in list(own.items()):
                    key = f"{name}.{child}" if name else child
                    if tensor is None or key not in keys or not tensor.is_meta:
                        continue
                    value = file.get_tensor(key)
                    if not packed:
                        value = value.to(dtype)
                    own[child] = (
                        nn.Parameter(value, requires_grad=False)
                        if own is module._parameters
                        else value
                    )
    if _is_tied(model):
        model.tie_weights()
    for name, module in model.named_modules():
        stale = [
            child
            for child, buffer in module._buffers.items()
            if buffer is not None and buffer.is_meta
        ]
        if stale:
            _remake(module, name, stale, model.config, device)
    lost = [name for name, tensor in _all_tensors(model) if tensor.is_meta]
    if lost:
        raise CheckpointError(f"marlin.checkpoint.load: {path} leaves {lost[0]} without a value")


def _all_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _remake(
    module: nn.Module, name: str, stale: list[str], config: Any, device: torch.device
) -> None:
    """Computes buffers that no checkpoint holds (rotary frequencies) as the module's own
    constructor does."""
    if isinstance(module, Layer):  # the scratch of the published class
        for child in stale:
            module._buffers[child] = torch.zeros_like(getattr(module, child), device=device)
        return
    constructor: Any = type(module)
    with contextlib.suppress(TypeError):
        fresh = constructor(config=config)
        for child in stale:
            module._buffers[child] = getattr(fresh, child).to(device)
