"""Marlin checkpoints in transformers: loaded, saved, run, and what can go wrong there."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import formats
import pytest
import safetensors.torch
import test_formats
import torch

import marlin
from marlin import checkpoint

transformers = pytest.importorskip("transformers")
ROOT = pathlib.Path(__file__).resolve().parents[1]
GATE = "model.layers.1.mlp.gate_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """A checkpoint of each kind, and the Marlin one that it converts into."""
    where = {kind: tmp_path_factory.mktemp("made") / kind for kind in formats.CONFIGS}
    for kind, folder in list(where.items()):
        formats.folder(folder, kind, attention_bias=True)
        where[f"{kind} to marlin"] = folder.parent / "marlin"
        checkpoint.convert(folder, where[f"{kind} to marlin"])
    return where


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(torch.arange(33)[None] * 7 % 257).logits[0]
    return result


def from_pretrained(folder: pathlib.Path, **kwargs: Any) -> Any:
    kwargs = {"dtype": torch.float32} | kwargs
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs)


@pytest.mark.parametrize("kind", [*formats.CONFIGS])
def test_from_pretrained_gives_the_model_that_load_gives(
    kind: str, made: dict[str, pathlib.Path]
) -> None:
    folder = made[f"{kind} to marlin"]
    model, expected = from_pretrained(folder), marlin.load(folder)
    layers = [module for module in model.modules() if isinstance(module, marlin.Layer)]
    assert len(layers) == 14 and not any(t.is_meta for t in model.state_dict().values())
    for key, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("kind", [*formats.CONFIGS])
def test_other_formats_load_onto_layers_through_an_explicit_config(
    kind: str, made: dict[str, pathlib.Path]
) -> None:
    from marlin.integrations.transformers import config_for

    model = from_pretrained(made[kind], config=config_for(str(made[kind])))
    expected = marlin.load(made[kind])
    for key, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("kind", ["gptq to marlin", "gptq-v2 to marlin", "awq"])
def test_save_pretrained_writes_what_everything_reads(
    kind: str, made: dict[str, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    from marlin.integrations.transformers import config_for

    model = from_pretrained(made[kind], config=config_for(str(made[kind])), dtype=torch.float16)
    model.save_pretrained(tmp_path / "saved")
    assert logits(from_pretrained(tmp_path / "saved", dtype=torch.float16)).equal(logits(model))
    assert checkpoint.open_checkpoint(tmp_path / "saved").scheme.format == "marlin"
    again, first = (
        marlin.load(tmp_path / "saved").state_dict(),
        marlin.load(made[kind]).state_dict(),
    )
    assert all(torch.equal(again[key], first[key]) for key in first)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "marlin" and "stored_as" not in config


def test_scales_keep_their_type_whatever_the_model_is_cast_to(
    made: dict[str, pathlib.Path],
) -> None:
    """transformers casts buffers to the type of those on meta."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        layer = from_pretrained(made["gptq to marlin"], dtype=dtype).get_submodule(GATE)
        assert layer.s.dtype == torch.float16 and layer.B.dtype == torch.int32
        assert torch.equal(layer.s, marlin.load(made["gptq to marlin"]).get_submodule(GATE).s)


def test_bf16_scales_come_back_bit_for_bit(tmp_path: pathlib.Path) -> None:
    checkpoint.convert(test_formats.FIXTURES / "ct-asym", tmp_path / "marlin")
    model = from_pretrained(tmp_path / "marlin", dtype=torch.bfloat16)
    expected = marlin.load(tmp_path / "marlin").state_dict()
    layers = [module for module in model.modules() if isinstance(module, marlin.Layer)]
    assert {layer.s.dtype for layer in layers} == {torch.bfloat16}
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor.to(expected[key].dtype), expected[key]), key


def test_scratch_is_zero_though_transformers_makes_it_anew(
    made: dict[str, pathlib.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers that are not in the files come from torch.empty_like: here, one full of garbage."""
    real = torch.empty_like

    def garbage(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        made = real(tensor, *args, **kwargs)
        return made.fill_(7) if not made.is_meta and made.dtype == torch.int32 else made

    monkeypatch.setattr(torch, "empty_like", garbage)
    model = from_pretrained(made["gptq to marlin"])
    assert all(not m.workspace.any() for m in model.modules() if isinstance(m, marlin.Layer))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.update({f"{GATE}.B": t[f"{GATE}.B"][:-1]}), [f"{GATE}.B", "[3, 384]"]),
        (lambda t: t.update({f"{GATE}.s": t[f"{GATE}.s"].float()}), [f"{GATE}.s", "F32"]),
        (lambda t: t.pop(f"{GATE}.s"), [f"no tensor {GATE}.s"]),
        (lambda t: t.pop(f"{GATE}.B"), [f"no tensor {GATE}.weight"]),
        (lambda t: t[f"{GATE}.s"].fill_(float("nan")), [f"{GATE}.s", "NaN"]),
        (lambda t: t[f"{GATE}.perm"].fill_(1 << 20), [f"{GATE}.perm", "permutation"]),
    ],
)
def test_what_is_wrong_is_an_error_and_no_random_layer(
    change: Any, words: list[str], made: dict[str, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    """transformers checks no shapes of a quantised model, and makes up what is missing."""
    folder = pathlib.Path(shutil.copytree(made["gptq-v2 to marlin"], tmp_path / "copy"))
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(checkpoint.CheckpointError) as caught:
        from_pretrained(folder)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_method_is_known_whichever_is_imported_first(made: dict[str, pathlib.Path]) -> None:
    """An unknown method is only a warning, and a model with random layers."""
    check = (
        f"m = transformers.AutoModelForCausalLM.from_pretrained({str(made['gptq to marlin'])!r});"
        f"assert isinstance(m.get_submodule({GATE!r}), marlin.Layer);"
        "import importlib, marlin.integrations.register as r; r.install(); r.install();"
        "importlib.reload(r).install()"
    )
    for imports in ("import marlin, sys; assert 'transformers' not in sys.modules;"
                    "import transformers;",
                    "import transformers; from transformers import AutoModelForCausalLM;"
                    "import marlin;"):  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", imports + check], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert "Unknown quantization type" not in done.stderr


def test_a_checkpoint_that_is_not_compressed_has_no_config_for_layers(
    tmp_path: pathlib.Path,
) -> None:
    import tiny_llama

    from marlin.integrations.transformers import config_for

    tiny_llama.folder(tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="has no quantization_config"):
        config_for(str(tmp_path))


# --------------------------------------------------------------------------------------------------
# Generating
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(model: Any, **settings: Any) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(
        torch.arange(5)[None] * 3 + 1, max_new_tokens=8, do_sample=False, **settings
    )
    return tokens


@pytest.mark.parametrize("kind", ["gptq to marlin", "gptq-v2 to marlin"])
def test_generate_says_what_the_dense_model_says(
    kind: str, made: dict[str, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    dense, _ = formats.folder(tmp_path, kind.removesuffix(" to marlin"), attention_bias=True)
    model = from_pretrained(made[kind])
    expected = generate(dense)
    assert torch.equal(generate(model), expected)
    assert torch.equal(generate(model, cache_implementation="static"), expected)


@pytest.mark.parametrize("kind", ["gptq to marlin", "gptq-v2 to marlin"])
def test_a_model_compiles_without_a_graph_break(kind: str, made: dict[str, pathlib.Path]) -> None:
    model = from_pretrained(made[kind])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    tokens = torch.arange(33)[None] * 7 % 257
    with torch.no_grad():
        found = compiled(tokens, use_cache=False).logits[0]
    assert torch.allclose(found, logits(model), atol=1e-5)  # the same sums, in another order
