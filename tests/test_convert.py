"""Whole checkpoints: loaded from every format, converted into every format that is written."""

from __future__ import annotations

import gc
import json
import pathlib
import shutil
import weakref
from typing import Any

import formats
import pytest
import safetensors
import safetensors.torch
import test_formats
import tiny_llama
import torch

import marlin
from marlin import checkpoint
from marlin.checkpoint import files

pytest.importorskip("transformers")
GATE = "model.layers.1.mlp.gate_proj"
SOURCES = [*formats.CONFIGS]
TARGETS = ["marlin", "gptq", "compressed-tensors"]


@torch.no_grad()
def logits(model: Any, vocab: int = 257, num_tokens: int = 33) -> torch.Tensor:
    result: torch.Tensor = model(torch.arange(num_tokens)[None] * 7 % vocab).logits[0]
    return result


def records(folder: pathlib.Path) -> dict[str, checkpoint.Record]:
    read = checkpoint.open_checkpoint(folder)
    return {name: read.record(name) for name in read.linears}


def dense_tensors(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    read = checkpoint.open_checkpoint(folder)
    return {name: read.shards.read(name) for name in read.dense}


# --------------------------------------------------------------------------------------------------
# Loading
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("tied, bias", [(True, False), (False, True)])
def test_a_loaded_model_computes_what_the_dense_one_does(
    kind: str, tied: bool, bias: bool, tmp_path: pathlib.Path
) -> None:
    changes: dict[str, Any] = dict(tie_word_embeddings=tied, attention_bias=bias)
    dense, layers = formats.folder(tmp_path / "model", kind, **changes)
    loaded = marlin.load(tmp_path / "model")
    for name, layer in layers.items():
        module = loaded.get_submodule(name)
        assert isinstance(module, marlin.Layer)
        assert torch.equal(module.unpack(), layer.dense().half()), name
    # Both multiply in float32, in another order; biases are rounded to FP16, which holds them.
    assert torch.allclose(logits(loaded), logits(dense), atol=1e-3)


@pytest.mark.parametrize("name", test_formats.MADE)
def test_logits_are_those_that_the_writing_library_computes(name: str) -> None:
    _, expected = test_formats.expected_of(name)
    loaded = marlin.load(test_formats.FIXTURES / name)
    found = logits(loaded, vocab=29, num_tokens=8)
    # The library rounds each dense weight to its 16 bits before it multiplies, by 2**-11 in FP16
    # and 2**-8 in BF16 at most; Marlin layers multiply by the exact product. Measured 3e-4, 2e-3.
    limit = 5e-3 if name == "ct-asym" else 1e-3
    assert (found - expected).norm() < limit * expected.norm()


@pytest.mark.parametrize("file", ["quantize_config.json", "quant_config.json"])
def test_a_config_beside_config_json_is_found(file: str, tmp_path: pathlib.Path) -> None:
    dense, _ = formats.folder(tmp_path, "gptq", file)
    assert torch.allclose(logits(marlin.load(tmp_path)), logits(dense), atol=1e-3)


@pytest.mark.parametrize("file", ["gptq_model-4bit-32g.safetensors", "pytorch_model.bin", "m.pt"])
def test_weights_under_the_names_of_old_writers_are_found(
    file: str, tmp_path: pathlib.Path
) -> None:
    dense, _ = formats.folder(tmp_path, "gptq")
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    if file.endswith(".safetensors"):
        safetensors.torch.save_file(tensors, tmp_path / file)
    else:
        torch.save(tensors, tmp_path / file)
    assert torch.allclose(logits(marlin.load(tmp_path)), logits(dense), atol=1e-3)


def test_layers_are_read_one_at_a_time(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is unpacked, 8 bits a weight, is never more than a layer."""
    formats.folder(tmp_path, "gptq")
    read, alive = checkpoint.Checkpoint.record, []

    def counted(self: Any, name: str, device: Any = "cpu") -> checkpoint.Record:
        gc.collect()
        assert not any(record() is not None for record in alive)
        record = read(self, name, device)
        alive.append(weakref.ref(record.q.untyped_storage()))
        return record

    monkeypatch.setattr(checkpoint.Checkpoint, "record", counted)
    marlin.load(tmp_path)
    assert len(alive) == 14


def test_an_old_marlin_file_is_read_with_the_config_of_its_model(tmp_path: pathlib.Path) -> None:
    """A torch.save'd state dict, as the first Marlin wrote it, and nothing else."""
    formats.folder(tmp_path / "gptq", "gptq")
    loaded = marlin.load(tmp_path / "gptq")
    state = {
        key: value.half() if value.is_floating_point() else value
        for key, value in loaded.state_dict().items()
    }
    state[f"{GATE}.workspace"] = torch.zeros(16, dtype=torch.int32)
    torch.save(state, tmp_path / "model.pt")
    tiny_llama.model().config.save_pretrained(tmp_path / "base")
    again = marlin.load(tmp_path / "model.pt", config=tmp_path / "base")
    assert torch.equal(logits(again), logits(loaded))
    with pytest.raises(checkpoint.CheckpointError, match=r"without a config\.json beside it"):
        marlin.load(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "marlin", "bits": 4, "group_size": 32},
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"}
        | {"desc_act": False, "sym": True},
        {"bits": 4, "group_size": 32, "is_marlin_format": True, "desc_act": False},
        {"w_bit": 4, "q_group_size": 32, "quant_method": "marlin"},
    ],
)
@pytest.mark.parametrize("file", ["config.json", "quantize_config.json", "quant_config.json"])
def test_marlin_is_recognised_in_every_spelling(
    config: dict[str, Any], file: str, tmp_path: pathlib.Path
) -> None:
    formats.folder(tmp_path / "gptq", "gptq")
    checkpoint.convert(tmp_path / "gptq", tmp_path / "marlin")
    values = json.loads((tmp_path / "marlin" / "config.json").read_text())
    del values["quantization_config"]
    if file == "config.json":
        values["quantization_config"] = config
    else:
        (tmp_path / "marlin" / file).write_text(json.dumps(config))
    (tmp_path / "marlin" / "config.json").write_text(json.dumps(values))
    read = checkpoint.open_checkpoint(tmp_path / "marlin")
    assert read.scheme.format == "marlin" and len(read.linears) == 14


def test_biases_of_zeros_that_the_model_does_not_have_are_dropped(tmp_path: pathlib.Path) -> None:
    dense, _ = formats.folder(tmp_path, "gptq")
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors[f"{GATE}.bias"] = torch.zeros(176, dtype=torch.float16)
    tensors["model.layers.0.mlp.down_proj.bias"] = torch.ones(64, dtype=torch.float16)
    safetensors.torch.save_file(tensors, file)
    loaded = marlin.load(tmp_path)
    assert loaded.get_submodule(GATE).bias is None
    dense.model.layers[0].mlp.down_proj.bias = torch.nn.Parameter(torch.ones(64))
    assert torch.allclose(logits(loaded), logits(dense), atol=1e-3)


def test_tensors_that_the_models_class_says_to_ignore_are_ignored(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    dense, _ = formats.folder(tmp_path, "gptq")
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    layer = {key: tensor.clone() for key, tensor in tensors.items() if GATE in key}
    extra = {f"mtp.0.{key.rpartition('.')[2]}": tensor for key, tensor in layer.items()}
    safetensors.torch.save_file(tensors | extra, file)
    with pytest.raises(checkpoint.CheckpointError, match=r"has no linear layer mtp\.0"):
        marlin.load(tmp_path)
    ignored = [r"^mtp\."]
    model_class = transformers.LlamaForCausalLM
    monkeypatch.setattr(model_class, "_keys_to_ignore_on_load_unexpected", ignored)
    assert torch.allclose(logits(marlin.load(tmp_path)), logits(dense), atol=1e-3)


def test_buffers_of_integers_stay_integers(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    formats.folder(tmp_path, "gptq")
    made = transformers.LlamaModel.__init__

    def with_buffer(self: Any, config: Any) -> None:
        made(self, config)
        self.register_buffer("steps", torch.zeros(3, dtype=torch.int64))

    monkeypatch.setattr(transformers.LlamaModel, "__init__", with_buffer)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file) | {"model.steps": torch.tensor([1, 2, 1 << 40])}
    safetensors.torch.save_file(tensors, file)
    assert marlin.load(tmp_path).model.steps.tolist() == [1, 2, 1 << 40]


def test_a_name_of_the_hub_is_fetched_without_code(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def fetch(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(test_formats.FIXTURES / "gptq")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert len(checkpoint.open_checkpoint("somebody/llama-gptq").linears) == 7
    assert asked[0][0] == "somebody/llama-gptq"
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in asked[0][1])
    loaded = marlin.load("somebody/llama-gptq")
    assert torch.equal(logits(loaded, 29), logits(marlin.load(test_formats.FIXTURES / "gptq"), 29))


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fetch(*args: Any, **kwargs: Any) -> str:
        raise ConnectionError("no route to host\nand a page of more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(checkpoint.CheckpointError) as error:
        marlin.load("somebody/llama-gptq")
    assert str(error.value) == (
        "marlin.checkpoint.load: somebody/llama-gptq is no folder here, and could not be fetched "
        "from the hub: no route to host"
    )


# --------------------------------------------------------------------------------------------------
# Converting
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", SOURCES)
def test_every_format_goes_into_every_other_bit_for_bit(
    kind: str, target: str, tmp_path: pathlib.Path
) -> None:
    _, layers = formats.folder(tmp_path / "a", kind, attention_bias=True)
    if kind == "gptq-v2" and target == "compressed-tensors":
        with pytest.raises(checkpoint.CheckpointError, match="has act-order"):
            checkpoint.convert(tmp_path / "a", tmp_path / "b", target)
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
        return
    checkpoint.convert(tmp_path / "a", tmp_path / "b", target)
    before, after = records(tmp_path / "a"), records(tmp_path / "b")
    assert set(before) == set(after) == set(layers)
    for name, layer in layers.items():
        test_formats.same(before[name], layer)
        test_formats.equal(before[name].simplified(), after[name].simplified())
    kept = dense_tensors(tmp_path / "a")
    for name, tensor in dense_tensors(tmp_path / "b").items():
        assert torch.equal(tensor, kept[name]) and tensor.dtype == kept[name].dtype
    assert {"tokenizer.json", "config.json"} <= {p.name for p in (tmp_path / "b").iterdir()}
    if target == "gptq":
        version = checkpoint.open_checkpoint(tmp_path / "b").scheme.zero_offset
        assert version == (1 if kind in ("gptq", "ct") else 0)
    # and back: the same tensors as at first, by whoever wrote them
    back = {"marlin": "gptq", "gptq": "gptq", "compressed-tensors": "gptq"}[target]
    checkpoint.convert(tmp_path / "b", tmp_path / "c", back)
    for name, record in records(tmp_path / "c").items():
        test_formats.equal(record.simplified(), before[name].simplified())


@pytest.mark.parametrize("name", test_formats.MADE)
def test_checkpoints_of_the_libraries_convert_bit_for_bit(
    name: str, tmp_path: pathlib.Path
) -> None:
    before = records(test_formats.FIXTURES / name)
    for target in TARGETS:
        ordered = any(record.g_idx is not None for record in before.values())
        if target == "compressed-tensors" and ordered:
            continue
        checkpoint.convert(test_formats.FIXTURES / name, tmp_path / target, target)
        for layer, record in records(tmp_path / target).items():
            test_formats.equal(record.simplified(), before[layer].simplified())


def test_layers_of_several_kinds_keep_theirs(tmp_path: pathlib.Path) -> None:
    """GPTQModel's overrides: one layer not compressed, one of another group size."""
    source = test_formats.FIXTURES / "gptq-dynamic"
    before = {name: record.simplified().groupsize for name, record in records(source).items()}
    assert set(before.values()) == {32, -1} and not any("v_proj" in name for name in before)
    for target in ("marlin", "gptq"):
        checkpoint.convert(source, tmp_path / target, target)
        after = records(tmp_path / target)
        assert {name: record.simplified().groupsize for name, record in after.items()} == before
        config = json.loads((tmp_path / target / "config.json").read_text())["quantization_config"]
        assert config["dynamic"][r"-:^model\.layers\.0\.self_attn\.v_proj$"] == {}
    assert config == json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())


@pytest.mark.parametrize("form", TARGETS)
def test_a_layer_of_two_names_is_saved_and_loaded_under_both(
    form: str, tmp_path: pathlib.Path
) -> None:
    formats.folder(tmp_path / "a", "gptq")
    model = marlin.load(tmp_path / "a")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    checkpoint.save(model, None, tmp_path / "b", form)
    assert torch.equal(logits(marlin.load(tmp_path / "b")), logits(model))
    stored = records(tmp_path / "b")
    assert len(stored) == 14
    test_formats.equal(stored[GATE].simplified(), stored[GATE.replace("1", "0")].simplified())


def test_shards_hold_what_one_file_does(tmp_path: pathlib.Path) -> None:
    formats.folder(tmp_path / "a", "ct")
    checkpoint.convert(tmp_path / "a", tmp_path / "one", "gptq")
    checkpoint.convert(tmp_path / "a", tmp_path / "many", "gptq", shard_bytes=20_000)
    shards = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors" and len(shards) > 3
    index = json.loads((tmp_path / "many" / files.INDEX).read_text())
    assert set(index["weight_map"].values()) == set(shards)
    one = safetensors.torch.load_file(tmp_path / "one" / "model.safetensors")
    many: dict[str, torch.Tensor] = {}
    for shard in shards:
        part = safetensors.torch.load_file(tmp_path / "many" / shard)
        assert len(part) == 1 or sum(t.nbytes for t in part.values()) <= 20_000
        many |= part
    assert {k: t.shape for k, t in many.items()} == {k: t.shape for k, t in one.items()}
    assert all(torch.equal(many[key], one[key]) for key in one)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.values())
    assert torch.equal(
        logits(marlin.load(tmp_path / "many")), logits(marlin.load(tmp_path / "one"))
    )


@pytest.mark.parametrize("target", TARGETS)
def test_a_model_on_layers_is_saved_in_every_format(target: str, tmp_path: pathlib.Path) -> None:
    formats.folder(tmp_path / "a", "gptq", attention_bias=True)
    model = marlin.load(tmp_path / "a")
    checkpoint.save(model, tiny_llama.tokenizer(), tmp_path / "b", target)
    after = records(tmp_path / "b")
    for name, record in records(tmp_path / "a").items():
        test_formats.equal(record, after[name])
    assert torch.equal(logits(marlin.load(tmp_path / "b")), logits(model))


def test_tensors_that_share_memory_are_saved_each_by_itself(tmp_path: pathlib.Path) -> None:
    formats.folder(tmp_path / "a", "gptq")
    model = marlin.load(tmp_path / "a")
    model.model.layers[1].input_layernorm.weight = model.model.layers[0].input_layernorm.weight
    checkpoint.save(model, None, tmp_path / "b")
    assert torch.equal(logits(marlin.load(tmp_path / "b")), logits(model))


def test_a_checkpoint_may_be_converted_onto_itself(tmp_path: pathlib.Path) -> None:
    formats.folder(tmp_path / "a", "awq")
    before = records(tmp_path / "a")
    checkpoint.convert(tmp_path / "a", tmp_path / "a", "compressed-tensors")
    assert checkpoint.open_checkpoint(tmp_path / "a").scheme.format == "compressed-tensors"
    for name, record in records(tmp_path / "a").items():
        test_formats.equal(record, before[name])
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_code_beside_a_checkpoint_is_not_copied(tmp_path: pathlib.Path) -> None:
    formats.folder(tmp_path / "a", "gptq")
    (tmp_path / "a" / "modeling_llama.py").write_text("print('hello')")
    (tmp_path / "a" / "recipe.yaml").write_text("!!python/object:os.system")
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ x }}")
    checkpoint.convert(tmp_path / "a", tmp_path / "b", "gptq")
    names = {path.name for path in (tmp_path / "b").iterdir()}
    assert "chat_template.jinja" in names
    assert not names & {"modeling_llama.py", "recipe.yaml"}


def test_links_are_followed_as_a_cache_of_the_hub_has_them_and_no_further(
    tmp_path: pathlib.Path,
) -> None:
    """hub/blobs/..., and hub/snapshots/NAME/... with links to them."""
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "1a2b", tmp_path / "hub" / "blobs"
    formats.folder(snapshot, "gptq")
    blobs.mkdir()
    for path in list(snapshot.iterdir()):
        path.rename(blobs / f"blob-{path.name}")
        path.symlink_to(f"../../blobs/blob-{path.name}")
    (tmp_path / "secret").write_text("private")
    (snapshot / "merges.txt").symlink_to(tmp_path / "secret")
    checkpoint.convert(snapshot, tmp_path / "new", "gptq")
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert "tokenizer.json" in names and "merges.txt" not in names
    assert not any(path.is_symlink() for path in (tmp_path / "new").iterdir())


def test_a_failure_on_the_way_leaves_the_old_folder(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last layer of the source is damaged; all before it has been written by then."""
    formats.folder(tmp_path / "a", "gptq")
    formats.folder(tmp_path / "b", "ct")
    file = tmp_path / "a" / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["model.layers.1.mlp.down_proj.scales"][0, 0] = float("nan")
    safetensors.torch.save_file(tensors, file)
    before = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    with pytest.raises(checkpoint.CheckpointError, match=r"down_proj\.scales of nan at \[0, 0\]"):
        checkpoint.convert(tmp_path / "a", tmp_path / "b", "marlin", shard_bytes=10_000)
    assert {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_bits_that_flipped_in_a_file_of_ours_are_noticed(tmp_path: pathlib.Path) -> None:
    formats.folder(tmp_path / "a", "gptq")
    checkpoint.convert(tmp_path / "a", tmp_path / "b")
    entry = checkpoint.open_checkpoint(tmp_path / "b").shards[f"{GATE}.B"]
    data = bytearray(entry.file.read_bytes())
    data[entry.begin + 100] ^= 4
    entry.file.write_bytes(data)
    with pytest.raises(checkpoint.CheckpointError, match=rf"damaged in {GATE}\.B: its CRC-32"):
        marlin.load(tmp_path / "b")
    shutil.rmtree(tmp_path / "b")
