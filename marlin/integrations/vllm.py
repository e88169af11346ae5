"""Marlin layers in vLLM: checkpoints in the marlin format, and a kernel for those in other formats.

vLLM finds `register` by the entry point group vllm.general_plugins and calls it in each of its
processes. It adds

    the quantisation method "marlin"     checkpoints that this library writes, and published ones
    MarlinInt4LinearKernel               a mixed-precision kernel for GPTQ, AWQ, compressed-tensors

The kernel is asked after vLLM's own; MARLIN_VLLM_FIRST=1 puts it before them. Depends on vllm,
which nothing else here imports; importing this file with a vllm whose interface it does not know
fails in one sentence, which vLLM logs before it goes on without the plugin. docs/vllm.md says what
has run.
"""

from __future__ import annotations

import inspect
import logging
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import layout
from ..checkpoint.config import BESIDE, CONFIG, Fields, Spec, parse
from ..checkpoint.record import unpack_first, unpack_last
from ..layer import Layer
from ..ops import linear
from ..support import can_run

KNOWN = "0.32 and 0.33"  # the versions that tests/test_vllm.py has run against

try:
    import vllm
    from vllm.model_executor.kernels import linear as kernels
    from vllm.model_executor.kernels.linear import MPLinearKernel, MPLinearLayerConfig
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.linear import (
        LinearBase,
        LinearMethodBase,
        UnquantizedLinearMethod,
        register_weight_loader_v2_supported_method,
    )
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.models.utils import WeightsMapper
    from vllm.model_executor.parameter import (
        ChannelQuantScaleParameter,
        GroupQuantScaleParameter,
        PackedvLLMParameter,
    )
    from vllm.platforms import PlatformEnum, current_platform
    from vllm.scalar_type import scalar_types
except ImportError as error:
    raise ImportError(
        f"marlin: this vllm has another interface than the plugin knows ({error}); it is made for "
        f"vllm {KNOWN}, and VLLM_PLUGINS can leave it out"
    ) from error

METHOD = "marlin"
FIRST = "MARLIN_VLLM_FIRST"
WORD = 8  # weights in an int32
log = logging.getLogger("marlin")


def check_interface() -> None:
    """Makes sure that what this file overrides and calls is as it was written for.

    Raises:
        ImportError: it is not.
    """
    needed = {
        "MPLinearLayerConfig": (
            MPLinearLayerConfig,
            "full_weight_shape partition_weight_shape weight_type act_type group_size zero_points",
        ),
        "MPLinearKernel": (MPLinearKernel, "c w_q_param_name w_s_param_name w_zp_param_name"),
        "LinearMethodBase.create_weights": (
            LinearMethodBase.create_weights,
            "input_size_per_partition output_partition_sizes input_size output_size params_dtype",
        ),
        "override_quantization_method": (
            QuantizationConfig.override_quantization_method,
            "hf_quant_cfg user_quant hf_config",
        ),
        "register_linear_kernel": (kernels.register_linear_kernel, "kernel_class platform"),
    }
    wrong = [name for name, (call, names) in needed.items() if not _takes(call, names.split())]
    wrong += [
        f"{parent.__name__}.{name}"
        for parent, child in (
            (QuantizationConfig, MarlinConfig),
            (LinearMethodBase, MarlinLinearMethod),
            (MPLinearKernel, MarlinInt4LinearKernel),
        )
        for name in getattr(child, "__abstractmethods__", ())
    ]
    if not hasattr(QuantizationConfig, "get_checkpoint_weight_mapper"):
        wrong.append("get_checkpoint_weight_mapper")
    if not isinstance(getattr(kernels, "_POSSIBLE_KERNELS", None), dict):
        wrong.append("_POSSIBLE_KERNELS")
    if wrong:
        raise ImportError(
            f"marlin: vllm {vllm.__version__} has another interface than the plugin knows "
            f"({', '.join(sorted(wrong))}); it is made for vllm {KNOWN}, and VLLM_PLUGINS can "
            "leave it out"
        )


def _takes(call: Any, names: Sequence[str]) -> bool:
    """Whether a function or class has these parameters, and no others that must be given."""
    found = inspect.signature(call).parameters
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = {n for n, p in found.items() if p.default is p.empty and p.kind in named}
    return set(names) <= set(found) and needed <= {*names, "self", "layer"}


def register() -> None:
    """Adds the quantisation method and the kernel to vLLM; again does nothing new."""
    register_quantization_config(METHOD)(MarlinConfig)
    for platform in (PlatformEnum.CUDA, PlatformEnum.CPU):
        known = kernels._POSSIBLE_KERNELS.get(platform, [])
        if MarlinInt4LinearKernel not in known:
            kernels.register_linear_kernel(MarlinInt4LinearKernel, platform, "mp")
        if os.environ.get(FIRST) == "1":
            known = kernels._POSSIBLE_KERNELS[platform]
            known.sort(key=lambda kernel: kernel is not MarlinInt4LinearKernel)  # keeps the others


def _refuse(name: str, why: str) -> ValueError:
    return ValueError(f"marlin: vllm cannot run {name or 'a layer'}: {why}")


# --------------------------------------------------------------------------------------------------
# Checkpoints in the marlin format
# --------------------------------------------------------------------------------------------------


class MarlinConfig(QuantizationConfig):
    """The quantisation config of a checkpoint in the marlin format.

    Args:
        values: as config.json or quantize_config.json has them.

    Raises:
        marlin.checkpoint.CheckpointError: a field is wrong.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__()
        fields = Fields(pathlib.Path(CONFIG), {"quant_method": METHOD} | values)
        self.scheme = parse(fields)
        self.lm_head = fields.flag("lm_head", default=False)

    def __repr__(self) -> str:
        return f"MarlinConfig({self.scheme.default}, {len(self.scheme.rules)} rules)"

    @classmethod
    def get_name(cls) -> str:
        """The name that config.json and --quantization use."""
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Types of activations that the kernels of this platform take."""
        device = current_platform.device_type
        taken = [d for d in (torch.half, torch.bfloat16) if _on(device, 64, 64, -1, d)]
        return taken or [torch.half]  # create_weights says why there is none

    @classmethod
    def get_min_capability(cls) -> int:
        """The oldest GPUs that the kernels run on: Ampere."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Where the config is looked for if config.json does not have it."""
        return list(BESIDE)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MarlinConfig:
        """Reads the config of a checkpoint."""
        return cls(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claims checkpoints that say gptq and are in the marlin format: AutoGPTQ's."""
        stored = hf_quant_cfg.get("checkpoint_format") == METHOD
        stored = stored or hf_quant_cfg.get("is_marlin_format") is True
        return METHOD if stored and user_quant in (None, METHOD, "gptq") else None

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Leaves out the scratch memory that old writers saved with the layers."""
        return WeightsMapper(orig_to_new_suffix={".workspace": None})

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """What stores and computes a layer.

        Raises:
            ValueError: the layer is one of experts, or joins layers that are stored differently.
        """
        if isinstance(layer, RoutedExperts):
            raise _refuse(prefix, "the marlin format has no layers of experts")
        if not isinstance(layer, LinearBase) and not (
            isinstance(layer, ParallelLMHead) and self.lm_head
        ):
            return None
        spec = self.spec(prefix)
        if spec is None:
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        return MarlinLinearMethod(spec, prefix)

    def spec(self, prefix: str) -> Spec | None:
        """How a layer is stored, which may be several of the checkpoint joined by vLLM; None if it
        is not compressed.

        Raises:
            ValueError: those are not stored alike.
        """
        before, _, child = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(child, [child])
        names = [f"{before}.{part}" if before else part for part in parts]
        specs = {name: self.scheme.spec(name) for name in names}
        if len(set(specs.values())) > 1:
            raise _refuse(prefix, f"it joins layers that are stored differently: {specs}")
        return specs[names[0]]


def _on(device: str, k: int, n: int, group: int, dtype: torch.dtype, zeros: bool = False) -> Any:
    return can_run(k, n, group, dtype, zeros, False, device)


@register_weight_loader_v2_supported_method
class MarlinLinearMethod(LinearMethodBase):
    """A linear layer whose tensors are those of a checkpoint in the marlin format, cut for tensor
    parallelism: B in tiles of 16 x 64, s in runs of 64 columns.

    Args:
        spec: how the layer is stored.
        name: of the layer, for errors.
    """

    def __init__(self, spec: Spec, name: str) -> None:
        self.spec, self.name = spec, name
        self.sizes, self.reorder = (0, 0), False

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Makes the parameters B, s and z that the checkpoint is loaded into.

        Raises:
            ValueError: sizes that cannot be cut or joined, or a layer that no kernel runs.
        """
        K, N = input_size_per_partition, sum(output_partition_sizes)
        spec = self.spec
        group = input_size if spec.groupsize == -1 else spec.groupsize
        if spec.act_order:
            raise _refuse(self.name, "it has act-order, which is not cut for vllm yet")
        if any(size % layout.TILE_N for size in output_partition_sizes):
            raise _refuse(
                self.name,
                f"its parts have {output_partition_sizes} output features, but they should be "
                f"multiples of {layout.TILE_N}",
            )
        if K % layout.TILE_K or (group != input_size and K % group):
            raise _refuse(
                self.name,
                f"its part has {K} input features, but they should be a multiple of "
                f"{layout.TILE_K} and of the group size {spec.groupsize}",
            )
        own = -1 if group == input_size else group
        answer = _on(current_platform.device_type, K, N, own, params_dtype, not spec.symmetric)
        if not answer:
            raise _refuse(self.name, answer.reason)
        self.sizes = (K, N)
        # one group of a part, of several in the file: the kernel takes s in the order of one group
        self.reorder = group != input_size and K == group
        loader = extra_weight_attrs.get("weight_loader")
        B = PackedvLLMParameter(
            data=torch.empty(K // 16, 2 * N, dtype=torch.int32),
            input_dim=0,
            output_dim=1,
            packed_dim=1,
            packed_factor=WORD,
            marlin_tile_size=16,
            weight_loader=loader,
        )
        layer.register_parameter("B", B)
        for name in ("s",) if spec.symmetric else ("s", "z"):
            layer.register_parameter(name, self._grid(name, K, N, group, input_size, loader))

    def _grid(self, name: str, K: int, N: int, group: int, input_size: int, loader: Any) -> Any:
        """The parameter of scales or zero points; one group of all is on each rank whole."""
        arguments: dict[str, Any] = {"output_dim": 1, "weight_loader": _exactly(loader, self.name)}
        if group == input_size:
            data = torch.empty(1, N, dtype=torch.half)
            return ChannelQuantScaleParameter(data=data, **arguments)
        data = torch.empty(K // group, N, dtype=torch.half)
        return GroupQuantScaleParameter(data=data, input_dim=0, **arguments)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Puts scales in order where a part has one of several groups."""
        for name in ("B", "s") if self.spec.symmetric else ("B", "s", "z"):
            value = getattr(layer, name).data
            _replace(layer, name, _as_one_group(value) if name != "B" and self.reorder else value)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Returns (..., N) of the type of x for x (..., K)."""
        K, N = self.sizes
        packed: Any = layer
        z = None if self.spec.symmetric else packed.z
        return linear(x, packed.B, packed.s, bias, K, N, z)


def _as_one_group(s: Tensor) -> Tensor:
    """Scales (1, N) in the order of several groups, in that of one."""
    grouped = s.expand(2, -1).contiguous()  # two groups are ordered as any number but one is
    return layout.permute_scales(layout.unpermute_scales(grouped)[:1].contiguous())


def _exactly(loader: Callable[..., None] | None, name: str) -> Callable[..., None] | None:
    """A loader that refuses scales which float16 would round."""
    if loader is None:
        return None

    def load(parameter: Tensor, loaded: Tensor, *args: Any, **kwargs: Any) -> None:
        halves = loaded.half()
        if loaded.dtype != torch.half and not torch.equal(halves.to(loaded.dtype), loaded):
            raise _refuse(name, f"it has scales in {loaded.dtype} that float16 does not hold")
        loader(parameter, halves, *args, **kwargs)

    return load


# --------------------------------------------------------------------------------------------------
# Checkpoints in other formats
# --------------------------------------------------------------------------------------------------


class MarlinInt4LinearKernel(MPLinearKernel):
    """The kernel for checkpoints that vLLM reads itself: GPTQ, AWQ, compressed-tensors."""

    @classmethod
    def get_min_capability(cls) -> int:
        """The oldest GPUs that it runs on; vLLM's CPU platform has no capability."""
        return 80

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Whether it takes such a layer, and if not, why."""
        expected = scalar_types.uint4 if c.zero_points else scalar_types.uint4b8
        if c.weight_type != expected:
            return False, f"weights are {c.weight_type}, but marlin takes {expected}"
        K, N = c.partition_weight_shape
        if K % WORD or (c.group_size not in (-1, c.full_weight_shape[0]) and K % c.group_size):
            return False, f"{K} input features are no multiple of the group size {c.group_size}"
        if N % WORD:
            return False, f"{N} output features are no multiple of {WORD}"
        group = -1 if c.group_size == c.full_weight_shape[0] else c.group_size
        answer = _on(current_platform.device_type, K, N, group, c.act_type, c.zero_points)
        return bool(answer), answer.reason or None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Puts the packed forms in the places of the parameters as vLLM read them."""
        c = self.config
        K, N = c.partition_weight_shape
        stored, scales, zeros = self._get_weight_params(layer)
        scales = _by_output(scales)
        q = unpack_first(_by_output(stored).t().contiguous())[:K].t()
        group = -1 if scales.shape[1] == 1 else c.group_size
        packed = Layer(K, N, group, False, scales.dtype, c.zero_points, device=q.device)
        unpacked = None
        if c.zero_points:  # stored as words along the output features, whichever comes first
            unpacked = unpack_last(_by_output(zeros).t().contiguous(), N).t().contiguous()
        packed.pack_values(q, scales.contiguous(), unpacked)
        _replace(layer, self.w_q_name, packed.B)
        _replace(layer, self.w_s_name, packed.s)
        if packed.z is not None and self.w_zp_name is not None:
            _replace(layer, self.w_zp_name, packed.z)

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Returns (..., N) of the type of x for x (..., K)."""
        K, N = self.config.partition_weight_shape
        B, s, z = self._get_weight_params(layer)
        return linear(x, B, s, bias, K, N, z if self.config.zero_points else None)


def _by_output(parameter: Any) -> Tensor:
    """A parameter with its output features in the first dimension."""
    data: Tensor = parameter.data
    return data if parameter.output_dim == 0 else data.t()


def _replace(layer: nn.Module, name: str, value: Tensor) -> None:
    delattr(layer, name)
    layer.register_parameter(name, nn.Parameter(value, requires_grad=False))


check_interface()
