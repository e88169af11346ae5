"""The command line, each command from end to end on a tiny model."""

from __future__ import annotations

import json
import math
import pathlib
import subprocess
import sys
from typing import Any

import formats
import pytest
import test_formats
import tiny_llama
import torch

import marlin
from marlin import checkpoint, cli

pytest.importorskip("transformers")
ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    """Runs a command; returns its standard output, or, if it is to fail, its error."""
    found = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert found == status, captured.err
    assert "Traceback" not in captured.err
    return captured.err if status else captured.out


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """Runs a command with --json: the whole output is one object."""
    values: dict[str, Any] = json.loads(run(capsys, *arguments, "--json"))
    return values


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_llama.folder(
        tmp_path_factory.mktemp("dense") / "llama", max_position_embeddings=128
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(tiny_llama.text())
    return file


# --------------------------------------------------------------------------------------------------
# info and convert
# --------------------------------------------------------------------------------------------------


def test_info_tells_format_groups_sizes_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    folder = test_formats.FIXTURES / "gptq-dynamic"
    values = run_json(capsys, "info", folder, "--device", "cpu")
    assert (values["format"], values["model_type"], len(values["layers"])) == ("gptq", "llama", 6)
    down = next(layer for layer in values["layers"] if layer["name"].endswith("down_proj"))
    assert (down["k"], down["n"], down["group_size"], down["act_order"]) == (96, 64, 32, True)
    assert down["backend"].startswith("cpu ")
    assert sum(kind["count"] for kind in values["kinds"]) == 6
    # B, scales, zero points and g_idx of 18 kB; 4 bits and something a weight
    assert values["compressed_bytes"] == sum(layer["bytes"] for layer in values["layers"])
    assert 4 < values["bits_per_weight"] < 6
    out = run(capsys, "info", folder, "--layers")
    assert "model.layers.0.mlp.down_proj" in out and "act-order" in out


def test_info_says_why_nothing_runs_a_layer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    if marlin._C.has_cuda():
        pytest.skip("this build has CUDA kernels")
    values = run_json(capsys, "info", test_formats.FIXTURES / "awq", "--device", "cuda")
    assert {kind["backend"] for kind in values["kinds"]} == {None}
    assert "no CUDA kernels" in values["kinds"][0]["reason"]


@pytest.mark.parametrize("form", ["marlin", "gptq", "compressed-tensors"])
def test_convert_writes_the_same_model(
    form: str, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    formats.folder(tmp_path / "a", "awq")
    values = run_json(
        capsys, "convert", tmp_path / "a", tmp_path / "b", "--to", form, "--shard-size", "30k"
    )
    assert len(values["files"]) > 1
    before, after = (checkpoint.open_checkpoint(tmp_path / name) for name in "ab")
    assert after.scheme.format == form
    for name in before.linears:
        assert torch.equal(before.record(name).dense(), after.record(name).dense())


def test_what_cannot_be_converted_is_one_sentence_and_status_1(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    formats.folder(tmp_path / "a", "gptq-v2")
    error = run(
        capsys, "convert", tmp_path / "a", tmp_path / "b", "--to", "compressed-tensors", status=1
    )
    assert error.count("\n") == 1 and "has act-order" in error
    error = run(capsys, "info", tmp_path / "nowhere", status=1)
    assert error.count("\n") == 1 and "it has no config.json" in error
    assert not (tmp_path / "b").exists()


def test_a_bit_that_flipped_stops_a_conversion_and_leaves_the_old_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    formats.folder(tmp_path / "a", "gptq")
    run(capsys, "convert", tmp_path / "a", tmp_path / "marlin")
    run(capsys, "convert", tmp_path / "a", tmp_path / "old", "--to", "compressed-tensors")
    file = tmp_path / "marlin" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1000] ^= 16  # in a tensor's values, where only the checksum can notice
    file.write_bytes(data)
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    arguments = ("convert", tmp_path / "marlin", tmp_path / "old", "--to", "gptq")
    error = run(capsys, *arguments, status=1)
    assert error.count("\n") == 1 and str(file) in error and "CRC-32" in error
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"a", "marlin", "old"}


# --------------------------------------------------------------------------------------------------
# quantize and eval
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_points", [False, True])
def test_quantize_then_eval_loses_little(
    zero_points: bool,
    dense: pathlib.Path,
    text: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: pathlib.Path,
) -> None:
    import transformers

    options = ["--zero-points"] if zero_points else []
    values = run_json(
        capsys, "quantize", dense, tmp_path / "b", "--group-size", 32, "--device", "cpu", *options
    )
    assert (values["layers"], values["method"]) == (14, "nearest")
    layers = marlin.load(tmp_path / "b").modules()
    kinds = {m.z is not None for m in layers if isinstance(m, marlin.Layer)}
    assert kinds == {zero_points}
    command = ["--text", text, "--seqlen", 64, "--windows", 3, "--device", "cpu"]
    found = run_json(capsys, "eval", tmp_path / "b", *command)
    assert (found["windows"], found["seqlen"]) == (3, 64)
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    ids = tiny_llama.tokenizer()(text.read_text())["input_ids"][: 3 * 64]
    windows = torch.tensor(ids).view(3, 64)
    with torch.no_grad():
        loss = model(windows, labels=windows).loss
    # A model of random weights: its perplexity is close to the vocabulary, whatever rounds it.
    assert found["perplexity"] == pytest.approx(math.exp(float(loss)), rel=0.05)
    assert "perplexity" in run(capsys, "eval", tmp_path / "b", *command)


def test_quantize_by_gptq_is_better_than_by_rounding(
    dense: pathlib.Path,
    text: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import transformers

    monkeypatch.syspath_prepend(str(ROOT))
    options = ["--group-size", 64, "--device", "cpu"]
    run(capsys, "quantize", dense, tmp_path / "nearest", *options)
    calibration = ["--calibrate", text, "--samples", 8, "--seqlen", 64, "--to", "gptq"]
    values = run_json(capsys, "quantize", dense, tmp_path / "gptq", *options, *calibration)
    assert (values["method"], values["format"], values["layers"]) == ("gptq", "gptq", 14)
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    tokens = torch.tensor(tiny_llama.tokenizer()(text.read_text())["input_ids"][:400])[None]

    def error(folder: str) -> float:
        with torch.no_grad():
            return float(
                (marlin.load(tmp_path / folder)(tokens).logits - model(tokens).logits).norm()
            )

    assert error("gptq") < 0.9 * error("nearest")


def test_quantize_leaves_what_it_is_told_to(
    dense: pathlib.Path, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    target = tmp_path / "b"
    run(capsys, "quantize", dense, target, "--group-size", 16, "--skip", "*.v_proj",
        "--skip", "lm_head", "--to", "compressed-tensors")  # fmt: skip
    read = checkpoint.open_checkpoint(target)
    assert len(read.linears) == 12 and not any("v_proj" in name for name in read.linears)
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.self_attn.v_proj" in config["ignore"] and "lm_head" in config["ignore"]


def test_eval_runs_tasks_of_the_harness(
    dense: pathlib.Path, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    pytest.importorskip("lm_eval")
    run(capsys, "quantize", dense, tmp_path / "b", "--group-size", 32)
    values = run_json(
        capsys, "eval", tmp_path / "b", "--tasks", "capitals", "--device", "cpu",
        "--include-path", ROOT / "examples" / "tasks", "--limit", 4,
    )  # fmt: skip
    assert 0 <= values["results"]["capitals"]["acc"] <= 1
    error = run(capsys, "eval", tmp_path / "b", "--tasks", "nonesuch", status=1)
    assert "the harness has no task 'nonesuch'" in error


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["quantize", "DENSE", "NEW", "--group-size", "100"], "--group-size is 100"),
        (["quantize", "NOWHERE", "NEW"], "cannot read the model"),
        (["quantize", "EMPTY", "NEW"], "has no config.json"),
        (["quantize", "PACKED", "NEW"], "already compressed"),
        (["quantize", "DENSE", "NEW", "--to", "awq"], "'awq' is not one of"),
        (["quantize", "DENSE", "NEW", "--shard-size", "0"], "no size such as"),
        (["quantize", "DENSE", "TEXT"], "is a file"),
        (["quantize", "DENSE", "NEW", "--calibrate", "TEXT", "--zero-points"], "without zero"),
        (["quantize", "DENSE", "NEW", "--calibrate", "NOWHERE"], "neither a text file nor"),
        (["eval", "PACKED"], "either --text or --tasks"),
        (["eval", "WHOLE", "--text", "TEXT", "--seqlen", "90000"], "lower --seqlen"),
        (["eval", "PACKED", "--text", "TEXT", "--seqlen", "64"], "no tokenizer"),
        (["bench", "--shape", "64"], "no shape KxN"),
        (["bench", "--tokens", "1,x"], "positive numbers"),
        (["bench", "--shape", "64x64", "--group-size", "7"], "groupsize is 7"),
        (["info", "PACKED", "--device", "tpu"], "is no device"),
        (["info", "PACKED", "--device", "cuda:99"], "CUDA GPUs"),
        (["fly"], "No such command"),
    ],
)
def test_mistakes_are_explained(
    arguments: list[str],
    words: str,
    dense: pathlib.Path,
    text: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    places = {
        "EMPTY": tmp_path,
        "DENSE": dense,
        "TEXT": text,
        "NEW": tmp_path / "new",
        "NOWHERE": tmp_path / "no",
    }
    places["PACKED"] = test_formats.FIXTURES / "gptq"
    if "WHOLE" in arguments:
        places["WHOLE"] = tmp_path / "whole"
        formats.folder(tmp_path / "whole", "gptq")
    status = cli.main([str(places.get(argument, argument)) for argument in arguments])
    error = capsys.readouterr().err
    assert status in (1, 2) and words in error and "Traceback" not in error
    assert not (tmp_path / "new").exists()


def test_a_package_that_is_missing_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    error = run(capsys, "info", test_formats.FIXTURES / "gptq", status=1)
    assert "this needs the package transformers" in error and error.count("\n") == 1


def test_calibration_without_the_source_tree_says_what_it_needs(
    dense: pathlib.Path,
    text: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("gptq", "gptq.data", "gptq.gptq", "gptq.llama2"):
        monkeypatch.setitem(sys.modules, name, None)  # as in an installed package
    new = tmp_path / "new"
    error = run(capsys, "quantize", dense, new, "--calibrate", text, status=1)
    assert "--calibrate needs the folder gptq/ of the source tree" in error
    assert "PYTHONPATH" in error and error.count("\n") == 1
    assert not new.exists()


# --------------------------------------------------------------------------------------------------
# check and bench
# --------------------------------------------------------------------------------------------------


def test_check_tests_the_products(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = run_json(capsys, "check")
    assert values["ok"] and values["marlin"] == marlin.__version__
    assert all(result["error"] <= 5e-4 for result in values["tests"]["cpu"])
    assert "all is well" in run(capsys, "check")
    right = marlin.Layer.forward
    monkeypatch.setattr(marlin.Layer, "forward", lambda self, x: right(self, x) * 1.01)
    run(capsys, "check", status=1)
    assert cli.main(["check"]) == 1
    assert "problem: cpu: wrong at 256x256, 1 tokens" in capsys.readouterr().out


def test_bench_measures_the_layers_of_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--tokens", "1,4", "--seconds", 0.01, "--device", "cpu"]
    values = run_json(capsys, "bench", test_formats.FIXTURES / "gptq", *options)
    # four shapes: q and o, k and v, gate and up, down
    assert len(values["rows"]) == 4 * 2
    for row in values["rows"]:
        assert row["marlin_us"] > 0 and row["torch_us"] > 0
    out = run(capsys, "bench", "--shape", "128x192", "--group-size", "-1", *options)
    assert "128x192" in out and "speed-up" in out


# --------------------------------------------------------------------------------------------------
# As a program
# --------------------------------------------------------------------------------------------------


def test_python_m_marlin_is_the_command_line(tmp_path: pathlib.Path) -> None:
    def program(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "marlin", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    shown = program("--version")
    assert shown.returncode == 0 and marlin.__version__ in shown.stdout
    failed = program("info", str(tmp_path))
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1
    assert program("info").returncode == 2


@pytest.mark.parametrize("command", ["info", "convert", "quantize", "eval", "bench", "check"])
def test_every_command_has_help_with_examples(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(capsys, command, "--help")
    assert "Examples:" in out and f"marlin {command}" in out and "--json" in out
