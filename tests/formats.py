"""Compressed layers in every format, encoded one number at a time.

Slow, and independent of marlin.checkpoint: the readers are tested against these encoders, never the
readers against the writers alone. Called by the tests of checkpoints.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.torch
import tiny_llama
import torch

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Truth:
    """What a layer is: q (n, k), s (n, groups), z (n, groups), the group of each input feature."""

    q: np.ndarray
    s: torch.Tensor
    z: np.ndarray
    g_idx: np.ndarray
    groupsize: int
    bias: torch.Tensor | None = None

    def dense(self) -> torch.Tensor:
        """(n, k) float64."""
        s = self.s.double().numpy()
        return torch.from_numpy((self.q - self.z[:, self.g_idx].astype(int)) * s[:, self.g_idx])


def truth(
    n: int,
    k: int,
    groupsize: int = -1,
    zeros: bool = False,
    act_order: bool = False,
    bias: bool = False,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> Truth:
    """A random layer, with zero points of 0 and 15 among the others."""
    random = np.random.default_rng(seed)
    group = k if groupsize == -1 else groupsize
    groups = -(-k // group)
    z = random.integers(0, 16, (n, groups)) if zeros else np.full((n, groups), 8)
    if zeros:
        z.flat[:: max(1, z.size // 5)] = 0
    g_idx = np.arange(k) // group
    if act_order:
        g_idx = random.permutation(g_idx)
    s = torch.from_numpy(random.uniform(0.001, 0.02, (n, groups))).to(dtype)
    b = torch.from_numpy(random.normal(size=n)).to(dtype) if bias else None
    return Truth(random.integers(0, 16, (n, k)), s, z, g_idx, groupsize, b)


def _words(fields: np.ndarray, order: Sequence[int] = range(8)) -> np.ndarray:
    """(m, 8) values to (m,) words: bits 4 i and up hold column order[i]."""
    words = np.zeros(fields.shape[0], dtype=np.int64)
    for i, column in enumerate(order):
        words += fields[:, column].astype(np.int64) << (4 * i)
    return words


def _int32(words: np.ndarray) -> torch.Tensor:
    return torch.from_numpy((words % 2**32).astype(np.uint32).view(np.int32).copy())


def _rows(values: np.ndarray, order: Sequence[int] = range(8)) -> np.ndarray:
    """(r, c) values to (r, c / 8) words, eight neighbours in a row at a time."""
    r, c = values.shape
    return _words(values.reshape(r * c // 8, 8), order).reshape(r, c // 8)


def gptq(layer: Truth, version: int = 1) -> dict[str, torch.Tensor]:
    """The tensors of GPTQ."""
    zeros = _rows(layer.z.T) - (0x11111111 if version == 1 else 0)
    tensors = {
        "qweight": _int32(_rows(layer.q).T),
        "qzeros": _int32(zeros),
        "scales": layer.s.t().contiguous(),
        "g_idx": torch.from_numpy(layer.g_idx.astype(np.int32)),
    }
    return tensors | ({} if layer.bias is None else {"bias": layer.bias})


def awq(layer: Truth) -> dict[str, torch.Tensor]:
    """The tensors of AWQ, version gemm."""
    tensors = {
        "qweight": _int32(_rows(layer.q.T, AWQ_ORDER)),
        "qzeros": _int32(_rows(layer.z.T, AWQ_ORDER)),
        "scales": layer.s.t().contiguous(),
    }
    return tensors | ({} if layer.bias is None else {"bias": layer.bias})


def compressed_tensors(
    layer: Truth, symmetric: bool = True, act_order: bool = False
) -> dict[str, torch.Tensor]:
    """The tensors of compressed-tensors, pack-quantized."""
    n, k = layer.q.shape
    tensors = {
        "weight_packed": _int32(_rows(np.pad(layer.q, ((0, 0), (0, -k % 8))))),
        "weight_scale": layer.s,
        "weight_shape": torch.tensor([n, k]),
    }
    if not symmetric:
        zeros = np.pad(layer.z.T, ((0, 0), (0, -n % 8)))
        tensors["weight_zero_point"] = _int32(_rows(zeros).T)
    if act_order:
        tensors["weight_g_idx"] = torch.from_numpy(layer.g_idx.astype(np.int32))
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    return tensors | ({} if layer.bias is None else {"bias": layer.bias})


# --------------------------------------------------------------------------------------------------
# Whole checkpoints
# --------------------------------------------------------------------------------------------------

CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False},
    "gptq-asym": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
    | {"desc_act": False, "checkpoint_format": "gptq"},
    "gptq-v2": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
    | {"desc_act": True, "checkpoint_format": "gptq_v2"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    | {"version": "gemm"},
    "ct": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "symmetric": True}
                | {"strategy": "group", "group_size": 32, "dynamic": False},
            }
        },
        "ignore": ["lm_head"],
    },
}
CONFIGS["ct-asym"] = json.loads(json.dumps(CONFIGS["ct"]).replace("true", "false"))


def encode(kind: str, layer: Truth) -> dict[str, torch.Tensor]:
    """The tensors of a layer in one of CONFIGS."""
    if kind.startswith("gptq"):
        return gptq(layer, 2 if kind == "gptq-v2" else 1)
    return awq(layer) if kind == "awq" else compressed_tensors(layer, symmetric=kind == "ct")


def folder(
    where: pathlib.Path, kind: str, config_file: str = "config.json", **changes: Any
) -> tuple[Any, dict[str, Truth]]:
    """Writes a tiny Llama in one of CONFIGS; returns it with dense weights, float32, and its
    layers."""
    model = tiny_llama.model(**changes)
    config = CONFIGS[kind]
    where.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.half() for key, value in model.state_dict().items()}
    tensors.pop("lm_head.weight" if model.config.tie_word_embeddings else "", None)
    layers = {}
    for i, (name, linear) in enumerate(model.model.layers.named_modules(prefix="model.layers")):
        if isinstance(linear, torch.nn.Linear):
            n, k = linear.weight.shape
            zeros = not config.get("sym", kind == "ct")
            layer = truth(n, k, 32, zeros, bool(config.get("desc_act")), seed=i)
            layer.bias = None if linear.bias is None else linear.bias.data.half()
            layers[name] = layer
            del tensors[f"{name}.weight"]
            tensors.pop(f"{name}.bias", None)
            tensors |= {f"{name}.{key}": value for key, value in encode(kind, layer).items()}
            linear.weight.data = layer.dense().float()
    safetensors.torch.save_file(tensors, where / "model.safetensors", {"format": "pt"})
    values = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    if config_file == "config.json":
        values["quantization_config"] = config
    else:
        (where / config_file).write_text(json.dumps(config))
    (where / "config.json").write_text(json.dumps(values, default=str))
    tiny_llama.tokenizer().save_pretrained(where)
    return model, layers
