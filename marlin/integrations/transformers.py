"""Marlin checkpoints in transformers (4.57 and 5): from_pretrained and save_pretrained.

    import marlin                                             # registers quant_method "marlin"
    model = AutoModelForCausalLM.from_pretrained("llama-marlin")

    config = marlin.integrations.transformers.config_for("llama-awq")     # or GPTQ, ...
    model = AutoModelForCausalLM.from_pretrained("llama-awq", config=config)

Depends on transformers and marlin.checkpoint, and needs none of gptqmodel, autoawq, optimum and
compressed-tensors. register.py imports this file when transformers is there; users import it for
config_for. What transformers does not do with a quantised model is done here: the shape and type of
every tensor is checked by the headers of the files before the model is filled.
"""

from __future__ import annotations

import pathlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint import CheckpointError
from ..checkpoint import marlin as marlin_format
from ..checkpoint.config import Fields, Scheme, parse
from ..checkpoint.files import DTYPES, Entry, Shards, open_file, open_folder
from ..checkpoint.model import CODECS, check_rest, find, find_linears, needed
from ..checkpoint.record import Linear
from ..checkpoint.write import layers_config
from ..layer import Layer

METHOD = "marlin"
SOURCE = "stored_as"  # key of the quantisation config of a checkpoint in another format


class MarlinConfig(QuantizationConfigMixin):
    """The quantisation config of a checkpoint whose layers go onto marlin.Layer.

    Args:
        values: as config.json has them, see marlin.checkpoint; `stored_as` holds those of a
            checkpoint in another format.
    """

    def __init__(self, **values: Any) -> None:
        values["quant_method"] = METHOD
        self.__dict__.update(values)

    def scheme(self, path: pathlib.Path) -> Scheme:
        """How the layers are stored; path is named in errors."""
        values = self.to_dict()
        return parse(Fields(path, values.get(SOURCE) or values))


class _Stored(nn.Module):
    """Holds the tensors of a layer of another format until all of them have been read."""

    def __init__(self, shards: Shards, name: str, linear: Linear, codec: Any):
        super().__init__()
        self.linear, self.name = linear, name
        for suffix in needed(codec, shards, name, linear):
            entry = shards.get(f"{name}.{suffix}")
            if entry is not None:
                empty = torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
                self.register_buffer(suffix, empty)

    def layer(self, scheme: Scheme, shards: Shards) -> Layer:
        """The layer, on the device that the tensors are on.

        Raises:
            CheckpointError: the values are damaged or not what the config says.
        """
        _read_floats_again(self, self.name, shards)
        tensors: dict[str, Tensor] = {f"{self.name}.{k}": t for k, t in self.named_buffers()}
        entries = {key: shards[key] for key in tensors}
        device = next(iter(tensors.values())).device
        read = CODECS[scheme.format].read
        record = read(Shards(entries, tensors), self.name, self.linear, scheme, device)
        return marlin_format.layer_of(record.without_idle_bias(self.linear.bias).simplified())


def _read_floats_again(module: nn.Module, name: str, shards: Shards) -> None:
    """Puts right what transformers 4.57 casts to the dtype of the model: scales in float16 are not
    what they were after a visit to bfloat16, nor the other way round."""
    for suffix, buffer in list(module.named_buffers()):
        entry = shards.get(f"{name}.{suffix}")
        if entry is not None and buffer.dtype != DTYPES[entry.dtype]:
            setattr(module, suffix, shards.read(f"{name}.{suffix}", buffer.device))


class MarlinQuantizer(HfQuantizer):
    """What transformers asks about a Marlin checkpoint while it loads and saves one."""

    requires_calibration = True  # it loads what is compressed, and compresses nothing

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuses what no kernel runs on.

        Raises:
            ValueError: a device_map with another device than CPU and CUDA ones.
        """
        device_map = kwargs.get("device_map")
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        for place in places:
            if str(place) in ("disk", "mps", "xpu"):
                raise ValueError(
                    f"marlin: device_map has {place!r}, but layers run on cpu and cuda"
                )

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        """The dtype of activations: float16 unless another is asked for."""
        return torch.float16 if dtype is None else dtype

    update_torch_dtype = update_dtype  # its name before 4.56

    def param_element_size(self, model: Any, param_name: str, *args: Any) -> float:
        """Bytes of an element, for device maps; the packed tensors count as they are."""
        tensor = args[0] if args else model.get_parameter_or_buffer(param_name)
        return float(tensor.element_size())

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Puts empty layers, on meta, where the files have compressed ones."""
        shards = self.shards = _shards(model, kwargs.get("checkpoint_files"))
        given: Any = self.quantization_config
        self.stored = given.scheme(shards.files[0].parent / "config.json")
        linears = find_linears(model, shards, self.stored)
        check_rest(model, shards, self.stored, linears)
        for name, linear in linears.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, self._empty(shards, name, linear))

    def _empty(self, shards: Shards, name: str, linear: Linear) -> nn.Module:
        """What the tensors of a layer are read into."""
        if self.stored.format != "marlin":
            return _Stored(shards, name, linear, CODECS[self.stored.format])
        bias = f"{name}.bias" in shards
        dtype = DTYPES[shards[f"{name}.s"].dtype]
        return marlin_format.new_layer(linear.k, linear.n, linear.spec, bias, dtype, "meta")

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Repacks what came in another format, one layer at a time, and checks the rest."""
        for name, module in list(model.named_modules()):
            if isinstance(module, _Stored):
                parent, _, child = name.rpartition(".")
                layer = module.layer(self.stored, self.shards)
                setattr(model.get_submodule(parent), child, layer)
            elif isinstance(module, Layer):
                # transformers makes buffers that are not in the files anew, without a value
                module.workspace = torch.zeros_like(module.workspace, device=module.B.device)
                _read_floats_again(module, name, self.shards)
                marlin_format.check_layer(module, name, self.shards[f"{name}.B"].file)
        self.quantization_config = MarlinConfig(**layers_config(model))
        model.config.quantization_config = self.quantization_config
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether save_pretrained works: it writes the layers' buffers."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the compressed weights can be trained."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether torch.compile takes the model."""
        return True


def _shards(model: Any, files: list[str] | None) -> Shards:
    """The tensors of the files that transformers is about to read.

    Args:
        model: whose config says where it comes from.
        files: the files, which transformers 4.57 does not tell.
    """
    if files is None:
        commit = getattr(model.config, "_commit_hash", None)
        shards = open_folder(find(model.config.name_or_path, commit))
    else:
        entries: dict[str, Entry] = {}
        for file in files:
            entries |= open_file(pathlib.Path(file))
        shards = Shards(entries)
    for path in shards.files:
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"marlin: {path} is not a safetensors file; marlin.load reads old files"
            )
    if not shards:
        raise CheckpointError(f"marlin: {model.config.name_or_path} has no tensors")
    return shards


def config_for(directory: str, **kwargs: Any) -> Any:
    """The config with which from_pretrained puts a checkpoint of another format onto Marlin layers.

    Args:
        directory: a folder with a GPTQ, AWQ or compressed-tensors checkpoint, or its name on the
            hub.
        kwargs: for AutoConfig.from_pretrained.

    Returns:
        A transformers config, to be given to from_pretrained.

    Raises:
        CheckpointError: it is not compressed, or in a way that is not known.

    Example:
        >>> config = config_for("llama-awq")
        >>> model = AutoModelForCausalLM.from_pretrained("llama-awq", config=config)
    """
    config: Any = AutoConfig.from_pretrained(directory, **kwargs)
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        raise CheckpointError(f"marlin: the config.json of {directory} has no quantization_config")
    stored = dict(stored) if isinstance(stored, dict) else stored.to_dict()
    parse(Fields(pathlib.Path(directory) / "config.json", stored))
    if stored.get("quant_method") != METHOD:
        config.quantization_config = {"quant_method": METHOD, SOURCE: stored}
    return config
