"""The vLLM plugin: refused where it cannot work, and, where vllm is, loaded by the real one.

Most of it is optional: it needs vllm, which a developer's environment does not have; docs/vllm.md
says how to make one that does. vLLM reads the checkpoints with its own loader, for its CPU
platform; its own kernels are not called, so they need not be there.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import formats
import pytest
import torch

import marlin
from marlin import checkpoint

ROOT = pathlib.Path(__file__).parent.parent
SIZES: dict[str, Any] = dict(
    hidden_size=128, intermediate_size=256, head_dim=32, attention_bias=True, num_hidden_layers=2
)
HAS_VLLM = importlib.util.find_spec("vllm") is not None


def run(code: str, *paths: pathlib.Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, (*paths, ROOT)))
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


# --------------------------------------------------------------------------------------------------
# Without vllm
# --------------------------------------------------------------------------------------------------


def test_importing_marlin_looks_for_no_vllm() -> None:
    found = run("import marlin, sys; print(sorted(m for m in sys.modules if 'vllm' in m))")
    assert found.stdout == "[]\n", found.stderr


def test_the_entry_point_that_vllm_looks_for_is_in_pyproject_toml() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    places = project["entry-points"]["vllm.general_plugins"]
    assert places == {"marlin": "marlin.integrations.vllm:register"}
    assert "\ndef register() -> None:" in (ROOT / "marlin/integrations/vllm.py").read_text()


def test_a_vllm_that_is_not_known_is_refused_in_one_sentence(tmp_path: pathlib.Path) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("__version__ = '0.2.0'\n")
    found = run("import marlin.integrations.vllm", tmp_path)
    last = found.stderr.strip().splitlines()[-1]
    assert found.returncode == 1
    assert "marlin: this vllm has another interface than the plugin knows" in last
    assert "No module named 'vllm.model_executor'" in last and "0.33" in last


# --------------------------------------------------------------------------------------------------
# With the real one
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plugin() -> Iterator[Any]:
    """The plugin, registered; vLLM has its CPU platform and one rank."""
    if not HAS_VLLM:
        pytest.skip("vllm is not installed")
    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_TARGET_DEVICE", "cpu")
    patch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    patch.setenv("MARLIN_VLLM_FIRST", "1")
    if not torch.accelerator.is_available():  # vLLM empties its cache even so
        patch.setattr(torch.accelerator, "empty_cache", lambda: None)
    import marlin.integrations.vllm as made

    made.register()
    made.register()  # each process may do it again

    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
        initialize_model_parallel(1)
        yield made
    patch.undo()


def served(folder: pathlib.Path, dtype: str = "float16") -> tuple[str, Any]:
    """What vLLM takes a checkpoint for, and the model that its loader makes of it."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    arguments = EngineArgs(model=str(folder), dtype=dtype, enforce_eager=True, max_model_len=64)
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        return config.model_config.quantization, get_model(vllm_config=config)


@torch.no_grad()
def compare(model: Any, folder: pathlib.Path, dtype: torch.dtype) -> None:
    """Each linear layer of vLLM's model gives the bits of marlin.load's, which it joins."""
    expected = marlin.load(folder, dtype=dtype)
    for i, block in enumerate(expected.model.layers):
        theirs = model.model.layers[i]
        for layer, parent, parts in (
            (theirs.self_attn.qkv_proj, block.self_attn, ("q_proj", "k_proj", "v_proj")),
            (theirs.self_attn.o_proj, block.self_attn, ("o_proj",)),
            (theirs.mlp.gate_up_proj, block.mlp, ("gate_proj", "up_proj")),
            (theirs.mlp.down_proj, block.mlp, ("down_proj",)),
        ):
            layers = [getattr(parent, part) for part in parts]
            x = torch.randn(3, layers[0].k, dtype=dtype)
            y = torch.cat([layer(x) for layer in layers], 1)
            assert torch.equal(layer(x)[0], y), (i, parts)


def test_vllm_finds_the_plugin_by_its_entry_point(plugin: Any, tmp_path: pathlib.Path) -> None:
    info = tmp_path / "marlin_int4-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: marlin-int4\nVersion: 0.1.0\n")
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [f"{k} = {v}" for k, v in project["entry-points"]["vllm.general_plugins"].items()]
    (info / "entry_points.txt").write_text("\n".join(["[vllm.general_plugins]", *lines, ""]))
    from vllm.plugins import load_plugins_by_group

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        assert load_plugins_by_group("vllm.general_plugins")["marlin"] is plugin.register


def test_registering_twice_adds_one_kernel_before_the_others(plugin: Any) -> None:
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.platforms import PlatformEnum

    assert get_quantization_config("marlin") is plugin.MarlinConfig
    for platform in (PlatformEnum.CUDA, PlatformEnum.CPU):
        known = plugin.kernels._POSSIBLE_KERNELS[platform]
        assert known.count(plugin.MarlinInt4LinearKernel) == 1 and len(known) > 1
        assert known[0] is plugin.MarlinInt4LinearKernel


def test_another_interface_is_refused_in_one_sentence(
    plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin.check_interface()

    def config(full_weight_shape: Any, partition_weight_shape: Any, has_g_idx: bool) -> None: ...

    monkeypatch.setattr(plugin, "MPLinearLayerConfig", config)
    with pytest.raises(ImportError, match="another interface .*MPLinearLayerConfig.*0.33"):
        plugin.check_interface()


@pytest.mark.parametrize("kind", ["gptq", "gptq-asym", "awq", "ct-asym"])
def test_vllm_loads_a_checkpoint_in_the_marlin_format(
    kind: str, plugin: Any, tmp_path: pathlib.Path
) -> None:
    formats.folder(tmp_path / "source", kind, **SIZES)
    checkpoint.convert(tmp_path / "source", tmp_path / "marlin", "marlin")
    method, model = served(tmp_path / "marlin")
    assert method == "marlin"
    compare(model, tmp_path / "marlin", torch.half)


@pytest.mark.parametrize(
    "kind, dtype",
    [(kind, "float16") for kind in ("gptq", "awq", "ct", "ct-asym")] + [("ct-asym", "bfloat16")],
)
def test_the_kernel_takes_what_vllm_has_read(
    kind: str, dtype: str, plugin: Any, tmp_path: pathlib.Path
) -> None:
    formats.folder(tmp_path / "source", kind, **SIZES)
    if dtype == "bfloat16":
        as_bfloat(tmp_path / "source")
    method, model = served(tmp_path / "source", dtype)
    assert method != "marlin"
    compare(model, tmp_path / "source", getattr(torch, dtype))


def as_bfloat(folder: pathlib.Path) -> None:
    """Gives a checkpoint tensors in bfloat16, so that vLLM has nothing to round."""
    import safetensors.torch

    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors = {k: v.bfloat16() if v.is_floating_point() else v for k, v in tensors.items()}
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_vllm_loads_what_is_written_for_it_without_a_plugin(
    form: str, plugin: Any, tmp_path: pathlib.Path
) -> None:
    formats.folder(tmp_path / "source", "gptq", **SIZES)
    checkpoint.convert(tmp_path / "source", tmp_path / "converted", form)
    method, model = served(tmp_path / "converted")
    assert method == {"gptq": "auto_gptq"}.get(form, form)  # vLLM's own config reads it
    compare(model, tmp_path / "source", torch.half)


# --------------------------------------------------------------------------------------------------
# Parts of layers
# --------------------------------------------------------------------------------------------------


def values(k: int, n: int, group: int, zeros: bool = False) -> marlin.Layer:
    layer = marlin.Layer(k, n, group, zero_points=zeros)
    truth = formats.truth(n, k, group, zeros)
    layer.pack_values(
        torch.from_numpy(truth.q), truth.s, torch.from_numpy(truth.z) if zeros else None
    )
    return layer


def part(plugin: Any, kind: str, whole: marlin.Layer, rank: int, **options: Any) -> Any:
    """vLLM's layer of one rank of two, with its part of the whole layer loaded."""
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear

    group = -1 if whole.groupsize == whole.k else whole.groupsize
    config = plugin.MarlinConfig({"bits": 4, "group_size": group, "sym": whole.z is None})
    options |= dict(bias=False, params_dtype=torch.half, quant_config=config, prefix="a.b")
    with pytest.MonkeyPatch.context() as patch:
        for module in (linear, parameter):
            patch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            patch.setattr(module, "get_tensor_model_parallel_world_size", lambda: 2)
        layer = getattr(linear, kind)(whole.k, whole.n, **options)
    for name, stored in list(layer.named_parameters()):
        stored.weight_loader(stored, whole.state_dict()[name])
    layer.quant_method.process_weights_after_loading(layer)
    return layer


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", [32, 128, -1])
def test_parts_of_the_output_features_are_those_of_the_layer(
    group: int, zeros: bool, plugin: Any
) -> None:
    whole = values(256, 384, group, zeros)
    x = torch.randn(5, 256).half()
    found = [part(plugin, "ColumnParallelLinear", whole, rank)(x)[0] for rank in (0, 1)]
    assert torch.equal(torch.cat(found, 1), whole(x))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", [32, 128, -1])  # 128: one group in each part, of two in the file
def test_parts_of_the_input_features_are_those_of_the_layer(
    group: int, zeros: bool, plugin: Any
) -> None:
    whole = values(256, 192, group, zeros)
    options = dict(input_is_parallel=True, reduce_results=False)
    for rank in (0, 1):
        layer = part(plugin, "RowParallelLinear", whole, rank, **options)
        x = torch.randn(5, 128).half()
        expected = x.double() @ whole.unpack()[:, 128 * rank :][:, :128].double().t()
        error = (layer(x)[0].double() - expected).norm() / expected.norm()
        assert error < 5e-4, (rank, error)  # the kernels' own promise


# --------------------------------------------------------------------------------------------------
# Refused
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "k, parts, whole_k, changes, message",
    [
        (128, [64, 32], 128, {}, r"\[64, 32\] output features.*multiples of 64"),
        (64, [64], 256, {"group_size": 128}, "64 input features.*group size 128"),
        (72, [64], 72, {"group_size": -1}, "72 input features.*multiple of 16"),
        (128, [64], 128, {"desc_act": True}, "act-order"),
    ],
)
def test_layers_that_cannot_be_cut_are_refused(
    k: int, parts: list[int], whole_k: int, changes: dict[str, Any], message: str, plugin: Any
) -> None:
    config = plugin.MarlinConfig({"bits": 4, "group_size": 32} | changes)
    method = plugin.MarlinLinearMethod(config.scheme.default, "model.layers.0.o_proj")
    with pytest.raises(ValueError, match=rf"vllm cannot run model\.layers\.0\.o_proj: .*{message}"):
        method.create_weights(torch.nn.Module(), k, parts, whole_k, sum(parts), torch.half)


def test_joined_layers_that_are_stored_differently_are_refused(plugin: Any) -> None:
    config = plugin.MarlinConfig(
        {"bits": 4, "group_size": 32, "dynamic": {"+:.*k_proj": {"group_size": 64}, "-:.*down": {}}}
    )
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    with pytest.raises(ValueError, match="a.qkv_proj: it joins layers that are stored differently"):
        config.spec("a.qkv_proj")
    assert config.spec("a.o_proj").groupsize == 32
    assert config.spec("a.down_proj") is None


def test_scales_that_float16_would_round_are_refused(plugin: Any) -> None:
    load = plugin._exactly(lambda parameter, loaded: parameter.copy_(loaded), "a.b")
    parameter = torch.zeros(2, dtype=torch.half)
    load(parameter, torch.tensor([0.5, 2**-14], dtype=torch.bfloat16))
    assert parameter.tolist() == [0.5, 2**-14]
    with pytest.raises(ValueError, match="a.b: it has scales in torch.bfloat16 that float16"):
        load(parameter, torch.tensor([0.5, 2**-30], dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "values, user, expected",
    [
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, None, "marlin"),
        ({"quant_method": "gptq", "is_marlin_format": True}, "gptq", "marlin"),
        ({"quant_method": "gptq", "checkpoint_format": "gptq"}, "marlin", None),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "gptq_marlin", None),
    ],
)
def test_checkpoints_that_say_gptq_are_taken_if_they_are_in_the_marlin_format(
    values: dict[str, Any], user: str | None, expected: str | None, plugin: Any
) -> None:
    assert plugin.MarlinConfig.override_quantization_method(values, user) == expected
