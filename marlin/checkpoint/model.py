"""Reads a checkpoint in any of the known formats onto marlin.Layer.

    model = marlin.load(folder)     # a transformers model

The model is built on meta from its config; every tensor is checked against it by the headers of the
files; then the layers are read, repacked and put in their places, one at a time. Depends on
transformers to build the model. Called by users, the lm-eval model type and the command line.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..layer import Layer
from . import awq, compressed_tensors, gptq, marlin
from .config import CONFIG, Fields, Scheme, Spec, read, read_model_config
from .errors import CheckpointError, first_line
from .files import NAMES, Shards, open_folder
from .record import FLOATS, Linear, Record, check_entries, check_entry, where

CODECS: dict[str, ModuleType] = {
    "marlin": marlin,
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed_tensors,
}
MAX_PARTS = 1000  # layers, experts, ... that a config may claim if there are fewer tensors


@dataclass
class Checkpoint:
    """A checkpoint whose headers and configs have been read and agree.

    Args:
        folder: of it.
        config: of the model, without the quantisation.
        scheme: how its layers are stored.
        shards: its tensors.
        model: the transformers model on meta, with its own linear layers.
        linears: the compressed layers by name, in the model's order.
        dense: the other tensors that the model needs, by name.
    """

    folder: pathlib.Path
    config: dict[str, Any]
    scheme: Scheme
    shards: Shards
    model: Any
    linears: dict[str, Linear]
    dense: list[str]

    def record(self, name: str, device: torch.device | str = "cpu") -> Record:
        """Reads a compressed layer.

        Args:
            name: in the model.
            device: where it goes, and where it is unpacked.

        Raises:
            CheckpointError: its values are damaged or not what the config says.
        """
        linear = self.linears[name]
        codec = CODECS[self.scheme.format]
        record: Record = codec.read(self.shards, name, linear, self.scheme, device)
        return record.without_idle_bias(linear.bias)

    def layer(self, name: str, device: torch.device | str = "cpu") -> Layer:
        """Reads a compressed layer into a layer.

        Args:
            name: in the model.
            device: where it goes, and where it is repacked.

        Raises:
            CheckpointError: its values are damaged or not what the config says, or no kernel runs
                it on the device.
        """
        if self.scheme.format == "marlin":
            return marlin.read_layer(self.shards, name, self.linears[name], device)
        return marlin.layer_of(self.record(name, device).simplified())


def load(
    directory: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    config: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Any:
    """Builds a transformers model on Marlin layers from a checkpoint in any known format.

    Args:
        directory: a folder with a Marlin, GPTQ, AWQ (gemm) or compressed-tensors (pack-quantized)
            checkpoint; a file of weights; or the name of a repository on the hub.
        device: where the model goes. The layers are repacked there.
        dtype: of activations and of the weights that are not compressed; None is FP16 on a GPU and
            float32 on a CPU, which is what each computes fastest.
        config: the folder whose config.json describes the model, if `directory` is a file of
            weights without one beside it (as the first Marlin checkpoints are).
        progress: called with the name of each layer before it is read.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: a file is missing, damaged, or disagrees with the config; names file,
            tensor, what is expected and what was found.

    Example:
        >>> model = marlin.load("llama-gptq", device="cuda")
        >>> tokenizer = transformers.AutoTokenizer.from_pretrained("llama-gptq")
    """
    device = torch.device(device)
    if dtype is None:
        dtype = torch.float16 if device.type == "cuda" else torch.float32
    checkpoint = open_checkpoint(directory, dtype, config)
    model = checkpoint.model
    for name in checkpoint.linears:
        if progress is not None:
            progress(name)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, checkpoint.layer(name, device))
    _fill(checkpoint, device, dtype)
    return model.eval()


def open_checkpoint(
    directory: str | os.PathLike[str],
    dtype: torch.dtype = torch.float16,
    config: str | os.PathLike[str] | None = None,
) -> Checkpoint:
    """Reads the configs and headers of a checkpoint and checks them against each other.

    Args:
        directory: as in `load`.
        dtype: of the model on meta.
        config: as in `load`.

    Raises:
        CheckpointError: as in `load`, but for the values of tensors, which are not read.
    """
    path = find(directory)
    folder = path if config is None else pathlib.Path(config)
    if path.is_file() and config is None:
        folder = path.parent
    shards = None
    if path.is_file() and not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"marlin.checkpoint.load: {path} is a file of weights without a {CONFIG} beside it; "
            "give the folder of the model's config as well"
        )
    if path.is_file() and config is not None:
        shards = open_folder(path)
        model_config, scheme = _guess(folder, shards)
    else:
        model_config, scheme = read(folder)
    shards = open_folder(path) if shards is None else shards
    _check_claims(Fields(folder / CONFIG, model_config), len(shards))
    model = _build(model_config, folder, dtype)
    linears = find_linears(model, shards, scheme)
    dense = check_rest(model, shards, scheme, linears)
    return Checkpoint(folder, model_config, scheme, shards, model, linears, dense)


def find(directory: str | os.PathLike[str], revision: str | None = None) -> pathlib.Path:
    """The local folder or file of a checkpoint; a repository of the hub is fetched.

    Args:
        directory: a folder, a file, or the name of a repository.
        revision: of the repository; None is the newest.

    Raises:
        CheckpointError: it is neither there nor on the hub.
    """
    path = pathlib.Path(directory)
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(directory)):
        return path
    try:
        import huggingface_hub

        return pathlib.Path(
            huggingface_hub.snapshot_download(
                str(directory),
                revision=revision,
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"],
            )
        )
    except Exception as error:  # from the network, the hub, or a missing package
        raise CheckpointError(
            f"marlin.checkpoint.load: {directory} is no folder here, and could not be fetched from "
            f"the hub: {first_line(error)}"
        ) from error


def _guess(folder: pathlib.Path, shards: Shards) -> tuple[dict[str, Any], Scheme]:
    """The scheme of a file of weights that comes without a config of its own: the first Marlin
    checkpoints, whose group size only their shapes tell."""
    config = read_model_config(folder)
    config.pop("quantization_config", None)
    sizes = set()
    for key in shards:
        if not key.endswith(".B"):
            continue
        scales = key.removesuffix("B") + "s"
        if scales not in shards or len(shards[key].shape) != 2 or len(shards[scales].shape) != 2:
            raise CheckpointError(
                f"marlin.checkpoint.load: {shards[key].file} has {key} but no matrix {scales}"
            )
        K, groups = 16 * shards[key].shape[0], shards[scales].shape[0]
        sizes.add(-1 if groups == 1 else K // max(groups, 1))
    sizes = sizes if len(sizes) < 2 else sizes - {-1}
    if len(sizes) != 1:
        raise CheckpointError(
            f"marlin.checkpoint.load: {where(shards)} comes without a quantisation config, and its "
            f"tensors are those of {'several group sizes' if sizes else 'no Marlin checkpoint'}"
        )
    return config, Scheme("marlin", folder / CONFIG, Spec(sizes.pop()))


def _check_claims(fields: Fields, num_tensors: int) -> None:
    """Refuses a config with more layers than there can be: building them would take forever."""
    limit = max(MAX_PARTS, num_tensors)
    for name, value in fields.values.items():
        if isinstance(value, dict):
            _check_claims(Fields(fields.path, value, f"{fields.place}{name}."), num_tensors)
        elif type(value) is int and value > limit and re.search("layer|expert|block", name):
            raise fields.fail(name, value, f"but the files hold {num_tensors} tensors")


# --------------------------------------------------------------------------------------------------
# The model, and what it needs
# --------------------------------------------------------------------------------------------------


def _build(config: dict[str, Any], folder: pathlib.Path, dtype: torch.dtype) -> Any:
    """The model of a config, on meta: no memory, no initialisation."""
    import transformers

    kind = config["model_type"]
    auto: Any = transformers.AutoModelForCausalLM
    try:
        parsed = transformers.AutoConfig.for_model(**_without_code(config))
        with torch.device("meta"):
            return auto.from_config(parsed, dtype=dtype, attn_implementation="sdpa")
    except Exception as error:  # what a wrong config raises depends on the version of transformers
        raise CheckpointError(
            f"marlin.checkpoint.load: {folder / CONFIG} does not describe a model (model_type "
            f"{kind!r}): {first_line(error)}"
        ) from error


def _without_code(config: dict[str, Any]) -> dict[str, Any]:
    """A config without what could make transformers fetch and run something."""
    return {
        key: _without_code(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if not key.startswith("_") and key not in ("auto_map", "trust_remote_code")
        if not key.endswith("_implementation")
    }


def _unexpected(model: Any, key: str) -> bool:
    """Whether the model's class says that files may have this tensor, and that it is not read."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, key) for pattern in patterns)


def find_linears(model: nn.Module, shards: Shards, scheme: Scheme) -> dict[str, Linear]:
    """The compressed layers, whose headers are as they should be."""
    codec = CODECS[scheme.format]
    suffix = f".{codec.MARK}"
    modules = dict(model.named_modules())
    marked = {
        key.removesuffix(suffix): key
        for key in shards
        if key.endswith(suffix) and not _unexpected(model, key)
    }
    linears = {}
    for name, key in marked.items():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise CheckpointError(
                f"marlin.checkpoint.load: {shards[key].file} has {key}, but the model of {CONFIG} "
                f"has no linear layer {name}"
            )
        spec = scheme.spec(name)
        if spec is None:
            raise CheckpointError(
                f"marlin.checkpoint.load: {shards[key].file} has {key}, but {scheme.path} says "
                f"that {name} is not compressed"
            )
        linears[name] = Linear(
            linear.in_features, linear.out_features, spec, linear.bias is not None
        )
    ordered = {name: linears[name] for name in modules if name in linears}
    for name, found in ordered.items():
        check_entries(shards, name, needed(codec, shards, name, found))
    if not ordered:
        raise CheckpointError(
            f"marlin.checkpoint.load: {where(shards)} has no tensor *{suffix}, but "
            f"{scheme.path} says that it is a {scheme.format} checkpoint"
        )
    return ordered


def needed(codec: ModuleType, shards: Shards, name: str, linear: Linear) -> dict[str, Any]:
    """What the tensors of a compressed layer should be."""
    expected = getattr(codec, "expected_of", None)
    arguments = (name, linear.k, linear.n, linear.spec)
    found = dict(expected(shards, *arguments) if expected else codec.expected(*arguments))
    shape, types, _ = found["bias"]
    return found | {"bias": (shape, types, linear.bias)}


def check_rest(model: Any, shards: Shards, scheme: Scheme, linears: dict[str, Linear]) -> list[str]:
    """Checks the tensors that are not compressed; returns the names of those that are needed."""
    codec = CODECS[scheme.format]
    packed = {f"{name}." for name in linears}
    dense = []
    for key, tensor in model.state_dict().items():
        if f"{key.rpartition('.')[0]}." in packed:
            continue
        if key == "lm_head.weight" and is_tied(model):
            continue
        if key not in shards:
            raise CheckpointError(
                f"marlin.checkpoint.load: {where(shards)} has no tensor {key}, "
                f"{list(tensor.shape)} F16"
            )
        types = FLOATS if tensor.is_floating_point() else (NAMES[tensor.dtype],)
        check_entry(key, shards[key], tuple(tensor.shape), types)
        dense.append(key)
    wanted = set(dense)
    for name, linear in linears.items():
        wanted |= {f"{name}.{suffix}" for suffix in needed(codec, shards, name, linear)}
    ignored = re.compile(
        # scratch of old layers, a copy of the embedding, buffers that are computed
        r"(^|\.)(workspace|rotary_emb\.inv_freq|masked_bias)$|^lm_head\.weight$"
    )
    for key in sorted(set(shards) - wanted):
        known = ignored.search(key) or _unexpected(model, key)
        if not known or (key == "lm_head.weight" and "lm_head" in linears):
            raise CheckpointError(
                f"marlin.checkpoint.load: {shards[key].file} has a tensor {key} that the model of "
                f"{CONFIG} has no place for"
            )
    return dense


def is_tied(model: Any) -> bool:
    """Whether a model's output projection is its embedding."""
    return bool(getattr(model.config, "tie_word_embeddings", False))


# --------------------------------------------------------------------------------------------------
# What is not compressed
# --------------------------------------------------------------------------------------------------


def _fill(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    """Gives every tensor that is still on meta its storage and value."""
    model = checkpoint.model
    for key in checkpoint.dense:
        parent, _, child = key.rpartition(".")
        module = model.get_submodule(parent)
        value = checkpoint.shards.read(key, device)
        value = value.to(dtype) if value.is_floating_point() else value
        if child in module._parameters:
            module._parameters[child] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[child] = value
    if is_tied(model) and "lm_head" not in checkpoint.linears:
        model.tie_weights()
    for module in model.modules():
        if isinstance(module, Layer):
            continue
        buffers = module._buffers.items()
        stale = [child for child, buffer in buffers if buffer is not None and buffer.is_meta]
        if stale:
            _remake(module, stale, model.config, device)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise CheckpointError(
                f"marlin.checkpoint.load: {checkpoint.folder} leaves {name} without a value"
            )


def _remake(module: nn.Module, stale: list[str], config: Any, device: torch.device) -> None:
    """Computes buffers that no checkpoint holds (rotary frequencies) as the module's own
    constructor does."""
    constructor: Any = type(module)
    with contextlib.suppress(TypeError):
        fresh = constructor(config=config)
        for child in stale:
            module._buffers[child] = getattr(fresh, child).to(device)
