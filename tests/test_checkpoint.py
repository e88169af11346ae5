"""Marlin checkpoints: written whole or not at all, and checked before they are believed."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import tiny_llama
import torch

import marlin
from marlin import checkpoint, quantize
from marlin.checkpoint import write as marlin_checkpoint

pytest.importorskip("transformers")
ROOT = pathlib.Path(__file__).resolve().parents[1]
GATE = "model.layers.1.mlp.gate_proj"


def compressed(groupsize: int = 64, **changes: Any) -> tuple[Any, Any]:
    """A dense model on the 4-bit grid, and the same model on Marlin layers."""
    dense, packed = tiny_llama.model(**changes), tiny_llama.model(**changes)
    scales = {}
    for name, linear in dense.model.layers.named_modules(prefix="model.layers"):
        if isinstance(linear, torch.nn.Linear):
            s = quantize.scales_for(linear.weight, groupsize)
            q = quantize.round_to_nearest(linear.weight, s, groupsize)
            linear.weight.data = quantize.dequantize(q, s, groupsize)
            packed.get_submodule(name).weight.data = linear.weight.data.clone()
            scales[name] = s
    checkpoint.pack_model(packed, scales, groupsize)
    return dense, packed


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    where = tmp_path_factory.mktemp("saved") / "model"
    checkpoint.save(compressed()[1], tiny_llama.tokenizer(), where)
    return where


@pytest.fixture
def copy(saved: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(saved, tmp_path / "copy"))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(33)[None] * 7 % 257
    result: torch.Tensor = model(tokens).logits
    return result


# --------------------------------------------------------------------------------------------------
# Round trip
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groupsize", [-1, 16, 64, 128])
@pytest.mark.parametrize("tied, bias", [(True, False), (False, True)])
def test_a_loaded_model_computes_what_the_dense_one_does(
    groupsize: int, tied: bool, bias: bool, tmp_path: pathlib.Path
) -> None:
    dense, packed = compressed(groupsize, tie_word_embeddings=tied, attention_bias=bias)
    checkpoint.save(packed, tiny_llama.tokenizer(), tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model")
    layers = [module for module in loaded.modules() if isinstance(module, marlin.Layer)]
    assert len(layers) == 14
    same_storage = loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert same_storage == tied
    # Both multiply in float32; sums in another order, and biases rounded to FP16, which holds them.
    assert torch.allclose(logits(loaded), logits(dense), atol=1e-3)
    for (name, a), (_, b) in zip(
        packed.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert torch.equal(a.to(b.dtype), b), name


def test_buffers_that_are_not_in_the_file_are_those_of_a_new_model(saved: pathlib.Path) -> None:
    loaded, new = checkpoint.load(saved), tiny_llama.model()
    assert torch.equal(loaded.model.rotary_emb.inv_freq, new.model.rotary_emb.inv_freq)
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_is_that_of_activations_while_scales_stay_fp16(
    saved: pathlib.Path, dtype: torch.dtype
) -> None:
    loaded = checkpoint.load(saved, dtype=dtype)
    assert loaded.model.embed_tokens.weight.dtype == dtype
    assert loaded.get_submodule(GATE).s.dtype == torch.float16
    assert logits(loaded).dtype == dtype


def test_the_folder_has_plain_json_the_tokenizer_and_no_second_embedding(
    saved: pathlib.Path,
) -> None:
    import transformers

    config = json.loads((saved / "config.json").read_text())
    quantization = config["quantization_config"]
    assert (quantization["quant_method"], quantization["bits"]) == ("marlin", 4)
    assert quantization["group_size"] == 64
    tensors = safetensors.torch.load_file(saved / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert {key.rpartition(".")[2] for key in tensors if GATE in key} == {"B", "s"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    assert tokenizer("bridge")["input_ids"] == tiny_llama.tokenizer()("bridge")["input_ids"]
    assert not any(file.suffix in (".bin", ".pt", ".pkl") for file in saved.iterdir())


def test_layers_keep_their_groupsize_where_one_group_is_the_whole_layer(
    tmp_path: pathlib.Path,
) -> None:
    # At group 64 the layers with 64 inputs have a single group, that with 176 has three.
    checkpoint.save(compressed(64)[1], None, tmp_path / "a")
    assert (
        checkpoint.load(tmp_path / "a").get_submodule("model.layers.0.mlp.down_proj").groupsize
        == 64
    )
    checkpoint.save(compressed(-1)[1], None, tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["quantization_config"]["group_size"] == -1


# --------------------------------------------------------------------------------------------------
# Writing that fails
# --------------------------------------------------------------------------------------------------


def snapshot(folder: pathlib.Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(
    copy: pathlib.Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    before = snapshot(copy)

    def fails(tensors: object, filename: str, metadata: object) -> None:
        pathlib.Path(filename).write_bytes(b"half of it")
        raise OSError(code, os.strerror(code), filename)

    monkeypatch.setattr(safetensors.torch, "save_file", fails)
    with pytest.raises(checkpoint.CheckpointError, match=os.strerror(code)) as caught:
        checkpoint.save(compressed()[1], tiny_llama.tokenizer(), copy)
    assert "\n" not in str(caught.value)
    assert snapshot(copy) == before
    assert list(copy.parent.iterdir()) == [copy]


def test_a_failing_fsync_leaves_the_old_checkpoint(
    copy: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(copy)

    def fails(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(checkpoint.CheckpointError, match="No space left"):
        checkpoint.save(compressed()[1], None, copy)
    assert snapshot(copy) == before
    assert list(copy.parent.iterdir()) == [copy]


def test_if_the_new_folder_cannot_take_its_place_the_old_one_returns(
    copy: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rename = snapshot(copy), os.rename

    def fails(source: pathlib.Path, target: pathlib.Path) -> None:
        if str(source).endswith(".tmp"):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(checkpoint.CheckpointError, match="Permission denied"):
        checkpoint.save(compressed()[1], None, copy)
    assert snapshot(copy) == before
    assert list(copy.parent.iterdir()) == [copy]


def test_the_script_says_disk_trouble_in_one_sentence_and_exits_with_1(copy: pathlib.Path) -> None:
    """A real write that the system refuses: files may not grow beyond 20 kB."""
    model = tiny_llama.folder(copy.parent / "dense")
    (copy.parent / "text.txt").write_text(tiny_llama.text())
    before = snapshot(copy)
    limited = (
        "import resource, sys; import gptq.llama2 as script;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        "sys.exit(script.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", limited, str(model), "--wbits", "4", "--groupsize", "64"]
    command += ["--dataset", str(copy.parent / "text.txt"), "--nearest", "--seqlen", "64"]
    command += ["--device", "cpu", "--save", str(copy)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert snapshot(copy) == before


def test_a_new_checkpoint_replaces_an_old_one(copy: pathlib.Path) -> None:
    (copy / "stale.txt").write_text("of the old one")
    dense, packed = compressed(16)
    checkpoint.save(packed, tiny_llama.tokenizer(), copy)
    assert torch.allclose(logits(checkpoint.load(copy)), logits(dense), atol=1e-3)
    assert not (copy / "stale.txt").exists()
    assert list(copy.parent.iterdir()) == [copy]


def test_a_folder_that_is_no_model_is_not_replaced(tmp_path: pathlib.Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(checkpoint.CheckpointError, match="not a model folder"):
        checkpoint.save(compressed()[1], None, tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="is a file"):
        checkpoint.save(compressed()[1], None, tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_models_that_the_format_cannot_describe_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(checkpoint.CheckpointError, match=r"no marlin\.Layer"):
        checkpoint.save(tiny_llama.model(), None, tmp_path / "a")
    with pytest.raises(checkpoint.CheckpointError, match="format is 'awq' but should be one of"):
        checkpoint.save(compressed(16)[1], None, tmp_path / "a", format="awq")
    assert not (tmp_path / "a").exists()


def test_layers_may_have_different_group_sizes(tmp_path: pathlib.Path) -> None:
    mixed = compressed(16)[1]
    other = marlin.Layer(64, 176, 32)
    linear = torch.nn.Linear(64, 176)
    other.pack(linear, quantize.scales_for(linear.weight, 32))
    mixed.model.layers[1].mlp.up_proj = other
    checkpoint.save(mixed, None, tmp_path / "a")
    loaded = checkpoint.load(tmp_path / "a")
    assert loaded.model.layers[1].mlp.up_proj.groupsize == 32
    assert loaded.model.layers[0].mlp.up_proj.groupsize == 16
    assert torch.equal(logits(loaded), logits(mixed))


def test_pack_model_refuses_a_name_that_is_no_linear_layer() -> None:
    with pytest.raises(ValueError, match="is a LlamaMLP, not a linear layer"):
        checkpoint.pack_model(tiny_llama.model(), {"model.layers.0.mlp": torch.ones(1, 1)}, 64)


# --------------------------------------------------------------------------------------------------
# Reading what is damaged or disagrees
# --------------------------------------------------------------------------------------------------


def edit_tensors(folder: pathlib.Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file)


def edit_config(folder: pathlib.Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda t: t.update({f"{GATE}.B": t[f"{GATE}.B"][:-1]}),
            [f"{GATE}.B", "[3, 384]", "[4, 384]"],
        ),
        (lambda t: t.update({f"{GATE}.s": t[f"{GATE}.s"].float()}), [f"{GATE}.s", "F32", "F16"]),
        (lambda t: t.update({f"{GATE}.B": t[f"{GATE}.B"].long()}), [f"{GATE}.B", "I64", "I32"]),
        (lambda t: t.pop(f"{GATE}.s"), [f"no tensor {GATE}.s", "[1, 192] F16"]),
        (lambda t: t.pop(f"{GATE}.B"), [f"no tensor {GATE}.weight", "[176, 64]"]),
        (lambda t: t.pop("model.norm.weight"), ["no tensor model.norm.weight"]),
        (lambda t: t.update({"extra.weight": torch.ones(1)}), ["extra.weight", "no place"]),
        (lambda t: t.update({"model.norm.B": torch.ones(1)}), ["model.norm.B", "no linear layer"]),
    ],
)
def test_a_tensor_that_disagrees_with_the_config_is_named(
    copy: pathlib.Path,
    change: Callable[[dict[str, torch.Tensor]], object],
    words: list[str],
) -> None:
    edit_tensors(copy, change)
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.load(copy)
    message = str(caught.value)
    assert "\n" not in message
    for word in [str(copy / "model.safetensors"), *words]:
        assert word in message


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c.update(intermediate_size=256), "but config.json needs [4, 512]"),
        (lambda c: c.update(num_hidden_layers=3), "no tensor model.layers.2"),
        (lambda c: c.update(num_hidden_layers=1), "no linear layer model.layers.1"),
        (lambda c: c.update(tie_word_embeddings=False), "no tensor lm_head.weight"),
        (lambda c: c.update(model_type="perceptron"), "'perceptron'"),
        (lambda c: c.update(hidden_size="wide"), "does not describe a model"),
        (lambda c: c.pop("model_type"), "names no model_type"),
        (lambda c: c.pop("quantization_config"), "no quantization_config"),
        (lambda c: c["quantization_config"].update(quant_method="fp8"), "'fp8', not one of marlin"),
        (lambda c: c["quantization_config"].update(bits=8), "bits 8, not 4"),
        (lambda c: c["quantization_config"].update(group_size=100), "group_size 100"),
        (lambda c: c["quantization_config"].update(group_size="64"), "group_size '64'"),
        (lambda c: c["quantization_config"].update(group_size=32), "needs"),
    ],
)
def test_a_config_that_disagrees_is_one_sentence(
    copy: pathlib.Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    edit_config(copy, change)
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.load(copy)
    assert "\n" not in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_file_cut_short_is_not_believed(copy: pathlib.Path, keep: int) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(checkpoint.CheckpointError, match=r"model\.safetensors is not an intact"):
        checkpoint.load(copy)


def test_a_pickle_in_the_place_of_safetensors_is_not_unpickled(copy: pathlib.Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(copy / "unpickled"),))

    torch.save({"bomb": Bomb()}, copy / "model.safetensors")
    with pytest.raises(checkpoint.CheckpointError, match="not an intact safetensors file"):
        checkpoint.load(copy)
    assert not (copy / "unpickled").exists()


@pytest.mark.parametrize("text, words", [("{", "not JSON"), ("[]", "holds a list")])
def test_a_config_that_is_no_json_object_is_refused(
    copy: pathlib.Path, text: str, words: str
) -> None:
    (copy / "config.json").write_text(text)
    with pytest.raises(checkpoint.CheckpointError, match=words):
        checkpoint.load(copy)


def test_missing_files_are_named(copy: pathlib.Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"has no model\.safetensors"):
        checkpoint.load(copy)
    (copy / "config.json").unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"it has no config\.json"):
        checkpoint.load(copy)
    with pytest.raises(checkpoint.CheckpointError, match=r"it has no config\.json"):
        checkpoint.load(copy / "nowhere")


def test_scratch_of_the_published_class_in_a_file_is_ignored(copy: pathlib.Path) -> None:
    expected = logits(checkpoint.load(copy))
    edit_tensors(copy, lambda t: t.update({f"{GATE}.workspace": torch.ones(16)}))
    assert torch.equal(logits(checkpoint.load(copy)), expected)


def test_writing_reports_errors_that_safetensors_words_itself() -> None:
    error = RuntimeError("Error while serializing: I/O error: No space (os error 28)")
    assert marlin_checkpoint._is_write_error(error)
    assert marlin_checkpoint._reason(error) == os.strerror(errno.ENOSPC)
