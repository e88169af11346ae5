"""How the linear layers of a checkpoint are stored, by its configs, in whichever of the known ways
they say it.

    config, scheme = read(folder)
    scheme.format                        # "marlin", "gptq", "awq" or "compressed-tensors"
    scheme.spec("model.layers.0.mlp.up_proj")   # group size, symmetric, act-order of one layer

Plain JSON, checked field by field: a config may come from anybody. Depends on files.py for the
reading. Called by model.py, and by the readers through Spec.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import CheckpointError
from .files import read_json

CONFIG = "config.json"
BESIDE = ("quantize_config.json", "quant_config.json")  # where older writers put it
# The second is what the first versions of compressed-tensors wrote.
QUANTIZATION = ("quantization_config", "compression_config")
FORMATS = ("marlin", "gptq", "awq", "compressed-tensors")
MAX_RULES = 10_000
MAX_LAYERS = 10_000


@dataclass(frozen=True)
class Spec:
    """How one linear layer is stored.

    Args:
        groupsize: input features that share a scale, -1 for all.
        symmetric: whether every zero point is 8; if not, they are stored.
        act_order: whether a g_idx says which group each input feature is in.
    """

    groupsize: int
    symmetric: bool = True
    act_order: bool = False


@dataclass(frozen=True)
class Rule:
    """One override: what a layer is stored like whose name matches; None for not compressed."""

    matches: Callable[[str], bool]
    spec: Spec | None


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint is stored.

    Args:
        format: one of FORMATS.
        path: the file that says so, for errors.
        default: of the layers that no rule is about; None if they are not compressed.
        rules: the first that matches a name holds.
        zero_offset: what is to be added to a stored zero point (1 in the first GPTQ version).
    """

    format: str
    path: pathlib.Path
    default: Spec | None
    rules: tuple[Rule, ...] = ()
    zero_offset: int = 0

    def spec(self, name: str) -> Spec | None:
        """How the linear layer of this name is stored; None if the config says that it is not."""
        for rule in self.rules:
            if rule.matches(name):
                return rule.spec
        return self.default


def written(
    form: str, stored: str, default: Spec, dynamic: dict[str, Any], lm_head: bool
) -> dict[str, Any]:
    """The quantisation config of files of marlin and gptq.

    Args:
        form: the quant_method.
        stored: the checkpoint_format.
        default: of the layers that `dynamic` says nothing about.
        dynamic: overrides by regular expression, as GPTQModel has them.
        lm_head: whether the output projection is compressed.
    """
    config = {
        "quant_method": form,
        "checkpoint_format": stored,
        "bits": 4,
        "group_size": default.groupsize,
        "sym": default.symmetric,
        "desc_act": default.act_order,
        "lm_head": lm_head,
    }
    return config | ({"dynamic": dynamic} if dynamic else {})


# --------------------------------------------------------------------------------------------------
# Fields
# --------------------------------------------------------------------------------------------------

_MISSING = object()


class Fields:
    """An object of a config whose fields are checked as they are taken.

    Args:
        path: of the file, for errors.
        values: the object.
        place: what the object is called, for errors, with a dot at the end if it has a name.
    """

    def __init__(self, path: pathlib.Path, values: dict[str, Any], place: str = ""):
        self.path, self.values, self.place = path, values, place

    def fail(self, name: str, found: object, expected: str) -> CheckpointError:
        """The error for a field that is not as it should be."""
        shown = repr(found)
        shown = shown if len(shown) <= 100 else shown[:100] + " ..."
        return CheckpointError(
            f"marlin.checkpoint.load: {self.path} has {self.place}{name} {shown}, {expected}"
        )

    def _get(self, names: tuple[str, ...]) -> tuple[str, Any]:
        for name in names:
            if name in self.values:
                return name, self.values[name]
        return names[0], _MISSING

    def flag(self, *names: str, default: bool | None = None) -> bool:
        """A truth value under the first of these names that is there."""
        name, value = self._get(names)
        if value is _MISSING and default is not None:
            return default
        if not isinstance(value, bool):
            raise self.fail(name, self._shown(value), "not true or false")
        return value

    def text(self, *names: str, default: str | None = None) -> str:
        """A text, in lower case; null counts as missing."""
        name, value = self._get(names)
        if (value is _MISSING or value is None) and default is not None:
            return default
        if not isinstance(value, str):
            raise self.fail(name, self._shown(value), "not a text")
        return value.lower()

    def four_bits(self, *names: str, default: int | None = None) -> None:
        """The width of a weight, which must be 4."""
        name, value = self._get(names)
        value = default if value is _MISSING and default is not None else value
        if type(value) is not int or value != 4:
            raise self.fail(name, self._shown(value), "not 4")

    def group_size(self, *names: str, default: int | None = None) -> int:
        """Input features that share a scale: -1 or a positive multiple of 16."""
        name, value = self._get(names)
        if value is _MISSING and default is not None:
            return default
        if type(value) is not int or not (value == -1 or (0 < value < 2**31 and value % 16 == 0)):
            raise self.fail(
                name, self._shown(value), "which is neither -1 nor a positive multiple of 16"
            )
        return value

    def section(self, name: str) -> Fields | None:
        """An object inside of this one; None if it is missing or null."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fail(name, value, "not an object")
        return Fields(self.path, value, f"{self.place}{name}.")

    def texts(self, name: str) -> list[str]:
        """A list of texts; empty if it is missing or null."""
        value = self.values.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.fail(name, value, "not a list of texts")
        if len(value) > MAX_RULES:
            raise self.fail(name, len(value), f"entries, more than {MAX_RULES}")
        return value

    def unused(self, *names: str) -> None:
        """Fields for things that are not supported, which must be missing, null or empty."""
        for name in names:
            if self.values.get(name) not in (None, {}, [], False):
                raise self.fail(name, self.values[name], "which is not supported")

    @staticmethod
    def _shown(value: object) -> object:
        return None if value is _MISSING else value


def _pattern(fields: Fields, name: str, text: str) -> Callable[[str], bool]:
    """A regular expression of a config, as a test of a name's beginning.

    A hostile one can take forever, so those that can are refused: a repeat inside of a repeat, or
    more than four repeats without a limit.
    """
    nested = re.search(r"\([^()]*(?:[*+]|\{\d*,)[^()]*\)(?:[*+]|\{)", text)
    if len(text) > 1000 or nested or len(re.findall(r"(?<!\\)[*+]|\{\d*,\}", text)) > 4:
        raise fields.fail(name, text, "a regular expression that could take forever")
    try:
        compiled = re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise fields.fail(name, text, f"which is no regular expression: {error}") from error
    return lambda layer: len(layer) <= 1000 and compiled.match(layer) is not None


# --------------------------------------------------------------------------------------------------
# Finding it
# --------------------------------------------------------------------------------------------------


def read(folder: pathlib.Path) -> tuple[dict[str, Any], Scheme]:
    """Reads and validates the configs of a checkpoint.

    Args:
        folder: of the checkpoint.

    Returns:
        The model's config without its quantisation, and how its layers are stored.

    Raises:
        CheckpointError: config.json is missing or no JSON object, no file says how the weights are
            stored, or they are stored in a way that is not known.
    """
    config = read_model_config(folder)
    path = folder / CONFIG
    for name in QUANTIZATION:
        if config.get(name) is not None:
            fields = Fields(path, config).section(name)
            assert fields is not None
            break
    else:
        for beside in (folder / name for name in BESIDE):
            if beside.is_file():
                fields = Fields(beside, read_json(beside))
                break
        else:
            raise CheckpointError(
                f"marlin.checkpoint.load: {path} has no quantization_config and there is no "
                f"{BESIDE[0]}, so {folder} is not a compressed model"
            )
    plain = {
        k: v for k, v in config.items() if k not in ("quantization_config", "compression_config")
    }
    return plain, parse(Fields(fields.path, fields.values))


def read_model_config(folder: pathlib.Path) -> dict[str, Any]:
    """Reads config.json and checks what every model's config has.

    Raises:
        CheckpointError: it is missing, no JSON object, or names no model type.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"marlin.checkpoint.load: {folder} is not a checkpoint: it has no {CONFIG}"
        )
    config = read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"marlin.checkpoint.load: {path} names no model_type")
    num_layers = config.get("num_hidden_layers", 1)
    if type(num_layers) is not int or not 0 <= num_layers <= MAX_LAYERS:
        raise Fields(path, config).fail(
            "num_hidden_layers", num_layers, f"not a number of 0..{MAX_LAYERS}"
        )
    return config


def parse(fields: Fields) -> Scheme:
    """Tells how layers are stored from a quantisation config.

    Args:
        fields: the object that is `quantization_config`, or a file of its own.

    Raises:
        CheckpointError: it is of an unknown method, version or width, or a field is wrong.
    """
    method = fields.text("quant_method", "method", default="")
    stored = fields.text("checkpoint_format", "format", default="")
    if "24" in method or stored == "marlin_24" or fields.values.get("is_marlin_24_format") is True:
        raise fields.fail("checkpoint_format", stored or method, "2:4 sparse, which is not read")
    if method == "compressed-tensors":
        return _compressed_tensors(fields)
    if method not in ("", "marlin", "gptq", "awq"):
        raise fields.fail("quant_method", method, f"not one of {', '.join(FORMATS)}")
    if method == "marlin" or stored == "marlin" or fields.flag("is_marlin_format", default=False):
        return _marlin(fields, stored)
    if method == "awq":
        return _awq(fields, stored)
    if method == "gptq" or (not method and "bits" in fields.values):
        return _gptq(fields, stored)
    raise fields.fail("quant_method", None, f"not one of {', '.join(FORMATS)}")


# --------------------------------------------------------------------------------------------------
# The four
# --------------------------------------------------------------------------------------------------


def _marlin(fields: Fields, stored: str) -> Scheme:
    if stored not in ("", "marlin"):
        raise fields.fail("checkpoint_format", stored, "not 'marlin'")
    fields.four_bits("bits", "w_bit", "wbits", default=4)
    spec = Spec(
        fields.group_size("group_size", "q_group_size", "groupsize", default=-1),
        fields.flag("sym", default=True),
        fields.flag("desc_act", default=False),
    )
    return Scheme("marlin", fields.path, spec, _dynamic(fields, spec))


def _gptq(fields: Fields, stored: str) -> Scheme:
    offsets = {"": 1, "gptq": 1, "gptq_v2": 0, "gptq_p": 0}
    if stored not in offsets:
        raise fields.fail("checkpoint_format", stored, "not one of gptq, gptq_v2, marlin")
    packed_as = fields.text("pack_dtype", default="int32")
    if packed_as != "int32":
        raise fields.fail("pack_dtype", packed_as, "not 'int32'")
    fields.four_bits("bits", "wbits")
    spec = Spec(
        fields.group_size("group_size", "groupsize"),
        fields.flag("sym", default=True),
        fields.flag("desc_act", default=False),
    )
    rules = _dynamic(fields, spec)
    return Scheme("gptq", fields.path, spec, rules, zero_offset=offsets[stored])


def _dynamic(fields: Fields, default: Spec) -> tuple[Rule, ...]:
    """GPTQ's overrides: "-:" before a regular expression leaves layers alone, "+:" or nothing
    changes them."""
    dynamic = fields.section("dynamic")
    if dynamic is None:
        return ()
    if len(dynamic.values) > MAX_RULES:
        raise fields.fail("dynamic", len(dynamic.values), f"entries, more than {MAX_RULES}")
    rules = []
    for text in dynamic.values:
        matches = _pattern(fields, "dynamic", text.removeprefix("-:").removeprefix("+:"))
        if text.startswith("-:"):
            rules.append(Rule(matches, None))
            continue
        changed = dynamic.section(text) or Fields(fields.path, {})
        changed.four_bits("bits", default=4)
        spec = Spec(
            changed.group_size("group_size", default=default.groupsize),
            changed.flag("sym", default=default.symmetric),
            changed.flag("desc_act", default=default.act_order),
        )
        rules.append(Rule(matches, spec))
    return tuple(rules)


def _awq(fields: Fields, stored: str) -> Scheme:
    for name, version in (
        ("version", fields.text("version", default="gemm")),
        ("checkpoint_format", stored or "gemm"),
    ):
        if version not in ("gemm", "awq"):
            raise fields.fail(name, version, "not 'gemm', the only AWQ version that is read")
    packed_as = fields.text("pack_dtype", default="int32")
    if packed_as != "int32":
        raise fields.fail("pack_dtype", packed_as, "not 'int32'")
    fields.four_bits("bits", "w_bit")
    zero_point = fields.flag("zero_point", default=not fields.flag("sym", default=False))
    spec = Spec(fields.group_size("group_size", "q_group_size"), not zero_point)
    # Layers that are not compressed have no qweight, so modules_to_not_convert is not needed.
    fields.texts("modules_to_not_convert")
    return Scheme("awq", fields.path, spec, _dynamic(fields, spec))


def _compressed_tensors(fields: Fields) -> Scheme:
    kind = fields.text("format", default="pack-quantized")
    if kind != "pack-quantized" and kind != "mixed-precision":
        raise fields.fail("format", kind, "not 'pack-quantized'")
    status = fields.text("quantization_status", default="compressed")
    if status != "compressed":
        raise fields.fail("quantization_status", status, "not 'compressed'")
    fields.unused("kv_cache_scheme", "transform_config")
    sparsity = fields.section("sparsity_config")
    if sparsity is not None and sparsity.values:
        form = sparsity.text("format", default="dense")
        if form != "dense":
            raise sparsity.fail("format", form, "not 'dense'")
    groups = fields.section("config_groups")
    if groups is None or not groups.values:
        raise fields.fail("config_groups", fields.values.get("config_groups"), "not an object")
    if len(groups.values) > MAX_RULES:
        raise fields.fail("config_groups", len(groups.values), f"entries, more than {MAX_RULES}")
    by_name: list[Rule] = []
    by_pattern: list[Rule] = []
    default: Spec | None = None
    for name in groups.values:
        group = groups.section(name)
        if group is None:
            raise groups.fail(name, None, "not an object")
        spec = _compressed_tensors_group(group)
        for target in group.texts("targets"):
            if target == "Linear":
                default = spec
            else:
                rules = by_pattern if target.startswith("re:") else by_name
                rules.append(Rule(_target(group, "targets", target), spec))
    ignored = [Rule(_target(fields, "ignore", text), None) for text in fields.texts("ignore")]
    ordered = (*ignored, *by_name, *by_pattern)
    return Scheme("compressed-tensors", fields.path, default, ordered)


def _target(fields: Fields, name: str, text: str) -> Callable[[str], bool]:
    """A layer's name, or "re:" and a regular expression."""
    if text.startswith("re:"):
        return _pattern(fields, name, text.removeprefix("re:"))
    return lambda layer: layer == text


def _compressed_tensors_group(group: Fields) -> Spec:
    form = group.text("format", default="pack-quantized")
    if form != "pack-quantized":
        raise group.fail("format", form, "not 'pack-quantized'")
    group.unused("input_activations", "output_activations")
    weights = group.section("weights")
    if weights is None:
        raise group.fail("weights", None, "not an object")
    weights.four_bits("num_bits")
    kind = weights.text("type", default="int")
    if kind != "int":
        raise weights.fail("type", kind, "not 'int'")
    if weights.flag("dynamic", default=False):
        raise weights.fail("dynamic", True, "not false")
    weights.unused("block_structure")
    strategy = weights.text("strategy", default="")
    if strategy == "channel":
        groupsize = -1
    elif strategy == "group":
        groupsize = weights.group_size("group_size")
    else:
        raise weights.fail("strategy", strategy or None, "not 'group' or 'channel'")
    # "static" and "weight" reorder while rounding and leave nothing to be done at run time.
    order = weights.values.get("actorder")
    if isinstance(order, bool):  # as the first versions wrote it
        order = "group" if order else "none"
    else:
        order = weights.text("actorder", default="none")
    if order not in ("none", "static", "weight", "group"):
        raise weights.fail("actorder", order, "not null, 'static', 'weight' or 'group'")
    act_order = order == "group" and strategy == "group"
    return Spec(groupsize, weights.flag("symmetric", default=True), act_order)
