"""Checkpoints that are damaged, lie, or mean harm: one sentence, nothing written, nothing run."""

from __future__ import annotations

import json
import os
import pathlib
import random
import shutil
import struct
from collections.abc import Callable
from typing import Any

import formats
import pytest
import safetensors.torch
import test_formats
import tiny_llama
import torch

import marlin
from marlin import checkpoint
from marlin.checkpoint import files

pytest.importorskip("transformers")
GATE = "model.layers.1.mlp.gate_proj"
Change = Callable[[dict[str, Any]], object]


def fails(folder: pathlib.Path, *words: str, read: bool = True) -> str:
    """Loading and converting end in the same sentence, which has these words."""
    target = folder.parent / "target"
    target.mkdir(exist_ok=True)
    (target / "config.json").write_text("{}")
    with pytest.raises(checkpoint.CheckpointError) as caught:
        if read:
            marlin.load(folder)
        else:
            checkpoint.open_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    for word in words:
        assert word in message, message
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.convert(folder, target, "gptq")
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert not [path for path in folder.parent.iterdir() if path.name.endswith(".tmp")]
    return message


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    where = {kind: tmp_path_factory.mktemp("made") / kind for kind in formats.CONFIGS}
    for kind, folder in where.items():
        formats.folder(folder, kind)
    return where


@pytest.fixture
def copy(made: dict[str, pathlib.Path], tmp_path: pathlib.Path) -> Callable[[str], pathlib.Path]:
    return lambda kind: pathlib.Path(shutil.copytree(made[kind], tmp_path / "copy"))


def edit_tensors(folder: pathlib.Path, change: Change) -> None:
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file({k: t.contiguous() for k, t in tensors.items()}, file)


def edit_config(folder: pathlib.Path, change: Change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


# --------------------------------------------------------------------------------------------------
# Tensors
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, change, words",
    [
        ("gptq", lambda t: t.update({f"{GATE}.qweight": t[f"{GATE}.qweight"][1:]}),
         [f"{GATE}.qweight", "[7, 176]", "[8, 176]"]),
        ("gptq", lambda t: t.update({f"{GATE}.qzeros": t[f"{GATE}.qzeros"].long()}),
         [f"{GATE}.qzeros", "I64", "I32"]),
        ("gptq", lambda t: t.pop(f"{GATE}.scales"), [f"no tensor {GATE}.scales", "[2, 176]"]),
        ("gptq", lambda t: t.pop(f"{GATE}.qweight"), [f"no tensor {GATE}.weight"]),
        ("gptq-v2", lambda t: t.pop(f"{GATE}.g_idx"), [f"no tensor {GATE}.g_idx", "[64]"]),
        ("gptq", lambda t: t[f"{GATE}.qzeros"].__setitem__((1, 3), 0x77778777),
         [f"{GATE}.qzeros", "zero point 9 at [1, 27]", "should be 8 since sym is true"]),
        ("gptq", lambda t: t[f"{GATE}.qzeros"].fill_(-0x77777778),
         [f"{GATE}.qzeros", "zero point 9", "gptq_v2"]),
        ("gptq", lambda t: t[f"{GATE}.g_idx"].__setitem__(5, 1),
         [f"{GATE}.g_idx", "31 input features in group 0", "should have 32"]),
        ("gptq", lambda t: t[f"{GATE}.g_idx"].copy_(t[f"{GATE}.g_idx"].flip(0)),
         [f"{GATE}.g_idx", "not i // 32", "desc_act is false"]),
        ("gptq-v2", lambda t: t[f"{GATE}.g_idx"].__setitem__(5, 2),
         [f"{GATE}.g_idx", "a group 2", "0..1"]),
        ("gptq-v2", lambda t: t[f"{GATE}.g_idx"].__setitem__(5, -1),
         [f"{GATE}.g_idx", "a group -1", "0..1"]),
        ("gptq", lambda t: t[f"{GATE}.scales"].__setitem__((1, 2), float("inf")),
         [f"{GATE}.scales of inf at [1, 2]", "finite"]),
        ("gptq", lambda t: t.update({f"{GATE}.scales": t[f"{GATE}.scales"].float() * 1.0001}),
         [f"{GATE}.scales in F32", "neither F16 nor BF16"]),
        ("gptq", lambda t: t.update({f"{GATE}.bias": torch.full((176,), torch.nan).half()}),
         [f"{GATE}.bias with NaN or Inf"]),
        ("awq", lambda t: t.update({f"{GATE}.qzeros": t[f"{GATE}.qzeros"][:1]}),
         [f"{GATE}.qzeros", "[1, 22]", "[2, 22]"]),
        ("awq", lambda t: t.update({f"{GATE}.g_idx": torch.zeros(64, dtype=torch.int32)}),
         [f"{GATE}.g_idx", "no place"]),
        ("ct", lambda t: t[f"{GATE}.weight_shape"].fill_(64), ["weight_shape of [64, 64]",
                                                              "needs [176, 64]"]),
        ("ct-asym", lambda t: t.pop(f"{GATE}.weight_zero_point"),
         [f"no tensor {GATE}.weight_zero_point", "[22, 2] I32"]),
        ("ct", lambda t: t.update({f"{GATE}.weight_zero_point": torch.zeros(22, 2).int()}),
         [f"{GATE}.weight_zero_point", "no place"]),
        ("ct", lambda t: t.update({"lm_head.weight_packed": torch.zeros(257, 8).int()}),
         ["lm_head.weight_packed", "says that lm_head is not compressed"]),
        ("ct-asym", lambda t: t.update(
            {f"{GATE}.weight_zero_point": torch.full((176, 2), 9, dtype=torch.int8)}),
         [f"{GATE}.weight_zero_point with a zero point 9", "-8..7"]),
    ],
)  # fmt: skip
def test_a_tensor_that_is_not_what_the_config_says_is_named(
    copy: Callable[[str], pathlib.Path], kind: str, change: Change, words: list[str]
) -> None:
    folder = copy(kind)
    edit_tensors(folder, change)
    fails(folder, str(folder), *words)


def test_a_permutation_that_is_none_is_named(
    copy: Callable[[str], pathlib.Path], tmp_path: pathlib.Path
) -> None:
    """The kernel gathers by it without looking."""
    checkpoint.convert(copy("gptq-v2"), tmp_path / "marlin")
    edit_tensors(tmp_path / "marlin", lambda t: t[f"{GATE}.perm"].__setitem__(0, 1 << 30))
    fails(tmp_path / "marlin", f"{GATE}.perm", "a permutation of 0..63")


# --------------------------------------------------------------------------------------------------
# Configs
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, change, words",
    [
        ("gptq", {"bits": 8}, "bits 8, not 4"),
        ("gptq", {"bits": "4"}, "bits '4', not 4"),
        ("gptq", {"bits": True}, "bits True, not 4"),
        ("gptq", {"group_size": 24}, "group_size 24"),
        ("gptq", {"group_size": 0}, "group_size 0"),
        ("gptq", {"group_size": 1 << 40}, "group_size 1099511627776"),
        ("gptq", {"group_size": None}, "group_size None"),
        ("gptq", {"sym": "yes"}, "sym 'yes', not true or false"),
        ("gptq", {"desc_act": 1}, "desc_act 1, not true or false"),
        ("gptq", {"checkpoint_format": "bitblas"}, "'bitblas', not one of gptq, gptq_v2, marlin"),
        ("gptq", {"checkpoint_format": "marlin_24"}, "2:4 sparse"),
        ("gptq", {"quant_method": "gptq_marlin_24"}, "2:4 sparse"),
        ("gptq", {"quant_method": "bitsandbytes"}, "'bitsandbytes', not one of"),
        ("gptq", {"quant_method": ["gptq"]}, "not a text"),
        ("gptq", {"pack_dtype": "int16"}, "'int16', not 'int32'"),
        ("gptq", {"dynamic": ["-:.*"]}, "not an object"),
        ("gptq", {"dynamic": {"+:.*gate.*": {"bits": 8}}}, "dynamic.+:.*gate.*.bits 8, not 4"),
        ("gptq", {"dynamic": {"(": {}}}, "no regular expression"),
        ("gptq", {"dynamic": {"-:(a+)+$": {}}}, "could take forever"),
        ("gptq", {"dynamic": {"-:.*.*.*.*.*x": {}}}, "could take forever"),
        ("gptq", {"dynamic": {f"-:.*{GATE[-9:]}": {}}}, f"says that {GATE[:13]}0.mlp.gate_proj is"),
        ("awq", {"version": "gemv"}, "version 'gemv', not 'gemm'"),
        ("awq", {"version": "GEMV_FAST"}, "version 'gemv_fast', not 'gemm'"),
        ("awq", {"checkpoint_format": "llm-awq"}, "'llm-awq', not 'gemm'"),
        ("awq", {"zero_point": False}, "says that there are none"),
        ("awq", {"bits": 3}, "bits 3, not 4"),
        ("ct", {"format": "float-quantized"}, "'float-quantized', not 'pack-quantized'"),
        ("ct", {"quantization_status": "frozen"}, "'frozen', not 'compressed'"),
        ("ct", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme {'num_bits': 8}, which"),
        ("ct", {"transform_config": {"r": 1}}, "transform_config {'r': 1}, which is not supported"),
        ("ct", {"sparsity_config": {"format": "sparse-24"}}, "'sparse-24', not 'dense'"),
        ("ct", {"config_groups": {}}, "config_groups {}, not an object"),
        ("ct", {"config_groups": {"g": {"targets": ["Linear"]}}}, "config_groups.g.weights None"),
        ("ct", {"ignore": "lm_head"}, "ignore 'lm_head', not a list of texts"),
        ("ct", {"ignore": [f"re:.*{GATE[-9:]}"]}, "gate_proj is not compressed"),
    ],
)  # fmt: skip
def test_a_quantisation_config_that_is_not_understood_is_one_sentence(
    copy: Callable[[str], pathlib.Path], kind: str, change: dict[str, Any], words: str
) -> None:
    folder = copy(kind)
    edit_config(folder, lambda c: c["quantization_config"].update(change))
    fails(folder, str(folder / "config.json"), words)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_bits": 8}, "weights.num_bits 8, not 4"),
        ({"type": "float"}, "weights.type 'float', not 'int'"),
        ({"strategy": "tensor"}, "weights.strategy 'tensor', not 'group' or 'channel'"),
        ({"dynamic": True}, "weights.dynamic True, not false"),
        ({"actorder": "sometimes"}, "weights.actorder 'sometimes'"),
        ({"group_size": 64}, "weight_scale of shape [64, 2], but config.json needs [64, 1]"),
        ({"block_structure": "2:4"}, "block_structure '2:4', which is not supported"),
    ],
)
def test_the_weights_of_a_group_are_checked(
    copy: Callable[[str], pathlib.Path], change: dict[str, Any], words: str
) -> None:
    folder = copy("ct")
    edit_config(
        folder,
        lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(change),
    )
    fails(folder, words)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_hidden_layers": 9_000_000_000}, "num_hidden_layers 9000000000, not a number of"),
        ({"num_hidden_layers": 5000}, "num_hidden_layers 5000, but the files hold"),
        ({"num_local_experts": 10**9}, "num_local_experts 1000000000, but the files hold"),
        ({"text_config": {"num_experts": 10**9}}, "text_config.num_experts 1000000000"),
        ({"hidden_size": 1 << 62}, "config.json"),
        ({"vocab_size": -1}, "config.json"),
        ({"architectures": 5, "model_type": "../llama"}, "'../llama'"),
    ],
)
def test_a_model_config_cannot_ask_for_the_moon(
    copy: Callable[[str], pathlib.Path], change: dict[str, Any], words: str
) -> None:
    folder = copy("gptq")
    edit_config(folder, lambda c: c.update(change))
    fails(folder, words)


def test_a_model_config_cannot_name_code_to_run(
    copy: Callable[[str], pathlib.Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was fetched")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", never)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", never)
    folder = copy("gptq")
    (folder / "modeling.py").write_text("raise SystemExit('this ran')")
    edit_config(
        folder,
        lambda c: c.update(
            auto_map={"AutoModelForCausalLM": "modeling.Model", "AutoConfig": "modeling.Config"},
            attn_implementation="somebody/kernels",
            _attn_implementation="somebody/kernels",
            trust_remote_code=True,
            rope_scaling=None,
            sub_config={"attn_implementation": "somebody/kernels"},
        ),
    )
    marlin.load(folder)


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def shards_of(folder: pathlib.Path) -> dict[str, Any]:
    """Cuts the one file of a checkpoint in two; returns the index."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in halves.items():
        safetensors.torch.save_file({key: tensors[key] for key in keys}, folder / file)
    index = {"weight_map": {key: file for file, keys in halves.items() for key in keys}}
    (folder / files.INDEX).write_text(json.dumps(index))
    return index


def test_a_checkpoint_in_shards_is_read(copy: Callable[[str], pathlib.Path]) -> None:
    folder = copy("gptq")
    whole = marlin.load(folder).state_dict()
    shards_of(folder)
    for key, tensor in marlin.load(folder).state_dict().items():
        assert torch.equal(tensor, whole[key]), key


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/etc/passwd", "x/a.safetensors", "..", "a\\a.safetensors", "",
             "C:a.safetensors", "a.bin", 5, None, "a.safetensors\0"],
)  # fmt: skip
def test_the_index_cannot_point_outside_of_the_folder(
    copy: Callable[[str], pathlib.Path], name: Any
) -> None:
    folder = copy("gptq")
    index = shards_of(folder)
    shutil.copy(folder / "a.safetensors", folder.parent / "a.safetensors")
    index["weight_map"][f"{GATE}.scales"] = name
    (folder / files.INDEX).write_text(json.dumps(index))
    fails(folder, files.INDEX, f"{GATE}.scales", "not the name of a safetensors file beside it")


def test_shards_that_disagree_with_the_index_are_named(
    copy: Callable[[str], pathlib.Path], tmp_path: pathlib.Path
) -> None:
    folder = copy("gptq")
    index = shards_of(folder)
    other = index["weight_map"] | {f"{GATE}.scales": "c.safetensors"}
    (folder / files.INDEX).write_text(json.dumps({"weight_map": other}))
    fails(folder, f"{GATE}.scales into c.safetensors", "no such file")
    swapped = {key: "a.safetensors" for key in index["weight_map"]}
    (folder / files.INDEX).write_text(json.dumps({"weight_map": swapped}))
    fails(folder, "a.safetensors has no tensor", "which model.safetensors.index.json puts into it")
    (folder / files.INDEX).write_text(json.dumps({"weight_map": []}))
    fails(folder, "weight_map of type list")
    (folder / files.INDEX).unlink()
    fails(folder, "has 2 files of weights (a.safetensors, b.safetensors ...)")


def test_links_that_go_in_circles_are_an_error(copy: Callable[[str], pathlib.Path]) -> None:
    folder = copy("gptq")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")
    fails(folder, "has no model.safetensors")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": ' * 100_000, "1" * 10_000, "\xff", '{"a": 1, "a": 2}']
)
@pytest.mark.parametrize("file", ["config.json", files.INDEX])
def test_json_that_is_none_or_too_deep_is_an_error(
    copy: Callable[[str], pathlib.Path], file: str, text: str
) -> None:
    folder = copy("gptq")
    (folder / file).write_bytes(text.encode("latin1"))
    fails(folder, str(folder / file))


def header_of(file: pathlib.Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(file: pathlib.Path, header: Any, rest: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + rest)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"dtype": "I4"}, "dtype 'I4', which is unknown"),
        ({"dtype": None}, "dtype 'None'"),
        ({"shape": [2, 177]}, "[2, 177] F16, 708 bytes, but its data_offsets"),
        ({"shape": [-2, -176]}, "has shape [-2, -176]"),
        ({"shape": [1 << 62, 1 << 62]}, "bytes, but its data_offsets"),
        ({"shape": [2.0, 176]}, "has shape [2.0, 176]"),
        ({"shape": [True, 352]}, "has shape [True, 352]"),
        ({"shape": [1] * 100}, "has shape"),
        ({"shape": "2"}, "has shape 2"),
        ({"data_offsets": [0, 704]}, "should begin at byte"),
        ({"data_offsets": [704, 0]}, "hold -704"),
        ({"data_offsets": [0]}, "data_offsets [0]"),
        ({"data_offsets": [-704, 0]}, "data_offsets [-704, 0]"),
        ({"extra": 1}, "should have dtype, shape and data_offsets"),
    ],
)
def test_a_header_that_lies_is_not_believed(
    copy: Callable[[str], pathlib.Path], change: dict[str, Any], words: str
) -> None:
    folder = copy("gptq")
    file = folder / "model.safetensors"
    header, rest = header_of(file)
    header[f"{GATE}.scales"].update(change)
    write_header(file, header, rest)
    fails(folder, "is not an intact safetensors file", words)


def test_a_header_longer_than_its_file_is_not_allocated(
    copy: Callable[[str], pathlib.Path],
) -> None:
    folder = copy("gptq")
    file = folder / "model.safetensors"
    data = file.read_bytes()
    for length in (len(data), 1 << 40, (1 << 64) - 1):
        file.write_bytes(struct.pack("<Q", length) + data[8:])
        fails(folder, "its header should have", read=False)


def test_names_are_bounded(copy: Callable[[str], pathlib.Path]) -> None:
    folder = copy("gptq")
    header, rest = header_of(folder / "model.safetensors")
    for name in ("x" * 2000, "a\nb"):
        empty = {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}
        write_header(folder / "model.safetensors", header | {name: empty}, rest)
        fails(folder, "it has a tensor with the name")


def test_a_pickle_is_read_as_tensors_alone(tmp_path: pathlib.Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "unpickled"),))

    folder = tmp_path / "folder"
    tiny_llama.model().config.save_pretrained(folder)
    edit_config(folder, lambda c: c.update(quantization_config=formats.CONFIGS["gptq"]))
    for held, words in (
        ({"a": Bomb()}, "not a torch file of tensors alone"),
        (["a"], "holds a list but should hold tensors"),
        ({"a": 5}, "holds 'a' of type int but should hold tensors"),
        ({"a": torch.zeros(1).expand(1 << 40)}, "a, which is not a plain tensor"),
        ({"a": torch.zeros(3).to_sparse()}, "a, which is not a plain tensor"),
        ({"a": torch.zeros(3, dtype=torch.complex64)}, "a, which is not a plain tensor"),
    ):
        torch.save(held, folder / "model.pt")
        fails(folder, words, read=False)
    (folder / "model.pt").write_bytes(b"PK\x03\x04 and so on")
    fails(folder, "not a torch file of tensors alone", read=False)
    assert not (tmp_path / "unpickled").exists()


# --------------------------------------------------------------------------------------------------
# Every region of a header and of a config
# --------------------------------------------------------------------------------------------------


def outcome(folder: pathlib.Path) -> str:
    """What becomes of a checkpoint: "loads", or the error. Anything else is a failure."""
    try:
        read = checkpoint.open_checkpoint(folder)
        for name in read.linears:
            read.record(name)
        for key in read.dense:
            read.shards.read(key)
    except checkpoint.CheckpointError as error:
        message = str(error)
        assert "\n" not in message and "marlin" in message and len(message) < 1500
        return message
    return "loads"


def mutations(data: bytes, begin: int, end: int, step: int) -> list[bytes]:
    """Copies of the bytes with each region of `step` bytes changed in several ways."""
    dice = random.Random(0)
    found = []
    for at in range(begin, end, step):
        i = dice.randrange(at, min(at + step, end))
        flipped = data[i] ^ (1 << dice.randrange(8))
        found.append(data[:i] + bytes([flipped]) + data[i + 1 :])
        other = dice.choice(b'{}[]",:0123456789\\ \x00\xff-e.n')
        found.append(data[:i] + bytes([other]) + data[i + 1 :])
        found.append(data[:at] + data[min(at + step, end) :])  # cut out, all that follows moves
        found.append(data[:at])  # cut short
    return found


@pytest.mark.parametrize("name", ["gptq-dynamic", "ct-asym"])
def test_no_change_to_a_header_is_anything_but_an_error_or_harmless(
    name: str, tmp_path: pathlib.Path
) -> None:
    folder = pathlib.Path(shutil.copytree(test_formats.FIXTURES / name, tmp_path / "copy"))
    file = folder / "model.safetensors"
    data = file.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    loads = 0
    cases = [*mutations(data, 0, 8, 1), *mutations(data, 8, end, 24)]
    for changed in cases:
        file.write_bytes(changed)
        loads += outcome(folder) == "loads"
    # What survives is a change of a blank, of the metadata, or F16 for BF16 and back.
    assert loads < 0.1 * len(cases)
    file.write_bytes(data)
    assert outcome(folder) == "loads"


@pytest.mark.parametrize("name", ["gptq-dynamic", "ct-asym"])
def test_no_change_to_a_config_is_anything_but_an_error_or_harmless(
    name: str, tmp_path: pathlib.Path
) -> None:
    folder = pathlib.Path(shutil.copytree(test_formats.FIXTURES / name, tmp_path / "copy"))
    data = (folder / "config.json").read_bytes()
    errors = 0
    cases = mutations(data, 0, len(data), 12)
    for changed in cases:
        (folder / "config.json").write_bytes(changed)
        errors += outcome(folder) != "loads"
    assert errors > len(cases) / 2  # each cut, most of the rest; not what a model may well be
