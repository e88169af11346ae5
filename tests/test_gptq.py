"""The algorithm, the calibration text, and the scripts: gptq/."""

from __future__ import annotations

import json
import logging
import pathlib
import sys
import types
from typing import Any

import pytest
import tiny_llama
import torch

from gptq import data, gptq, quant
from marlin import quantize

ROOT = pathlib.Path(__file__).resolve().parents[1]


def problem(n: int, k: int, num_tokens: int = 600) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the Hessian of correlated inputs of very different sizes."""
    x = torch.randn(num_tokens, k) @ torch.randn(k, k) / k**0.5 + torch.randn(num_tokens, k)
    hessian = gptq.Hessian(k)
    hessian.add(x * torch.rand(k).square())
    return torch.randn(n, k), hessian.H


def total_loss(W: torch.Tensor, result: gptq.Result, H: torch.Tensor, groupsize: int) -> float:
    Q = quantize.dequantize(result.q, result.scales, groupsize)
    return float(quant.loss(W, Q, H).sum())


# --------------------------------------------------------------------------------------------------
# The algorithm
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n, k, groupsize", [(1, 64, 16), (17, 131, 64), (33, 96, -1), (64, 192, 32)]
)
@pytest.mark.parametrize("act_order", [True, False])
def test_loses_less_than_rounding_to_nearest(
    n: int, k: int, groupsize: int, act_order: bool
) -> None:
    W, H = problem(n, k)
    options = gptq.Options(groupsize, act_order=act_order, passes=0)
    s = quantize.scales_for(W, groupsize)
    nearest = quantize.dequantize(quantize.round_to_nearest(W, s, groupsize), s, groupsize)
    result = gptq.gptq(W, H, options)
    # Measured 0.3 to 0.7 of the loss of rounding to nearest, 0.87 for a single row.
    limit = 0.75 if n > 1 else 1.0
    assert total_loss(W, result, H, groupsize) < limit * float(quant.loss(W, nearest, H).sum())
    assert result.q.dtype == torch.uint8 and int(result.q.max()) <= 15
    assert result.scales.dtype == torch.float16


def test_agrees_with_the_textbook_elimination_of_one_weight_at_a_time() -> None:
    """Optimal Brain Quantization in float64: the inverse Hessian loses a row at each step."""
    W, H = problem(15, 33)
    damped = H.double() + 0.01 * H.diagonal().mean() * torch.eye(33)
    s = quantize.scales_for(W, -1, "max/8")
    left, inverse, q = W.double().clone(), torch.linalg.inv(damped), torch.empty(15, 33)
    for j in range(33):
        q[:, j] = (left[:, j] / s[:, 0].double()).round().clamp(-8, 7)
        err = (left[:, j] - q[:, j] * s[:, 0]) / inverse[j, j]
        left = left - err[:, None] * inverse[j]
        inverse = inverse - inverse[:, j, None] * inverse[j] / inverse[j, j]
        inverse[j, j] = 1  # eliminated: never read again, but must not divide by 0
    result = gptq.gptq(
        W, H, gptq.Options(-1, act_order=False, static_groups=True, rule="max/8", passes=0)
    )
    # float32 against float64 may round a near-tie the other way; the rest of its row then differs.
    same_rows = (result.q.float() - 8 == q).all(dim=1)
    assert same_rows.sum() >= 14


@pytest.mark.parametrize("act_order, static", [(True, True), (False, True), (False, False)])
def test_lazy_batches_of_any_size_give_the_same_result(act_order: bool, static: bool) -> None:
    W, H = problem(17, 131)

    def run(blocksize: int) -> gptq.Result:
        options = gptq.Options(
            32, act_order=act_order, static_groups=static, passes=0, blocksize=blocksize
        )
        return gptq.gptq(W, H, options)

    reference = run(1)
    for blocksize in (7, 32, 128, 1000):
        result = run(blocksize)
        # The sums are the same in another order; a near-tie may fall the other way.
        assert (result.q == reference.q).float().mean() > 0.97
        assert (result.scales == reference.scales).float().mean() > 0.97
        assert result.loss.sum() == pytest.approx(float(reference.loss.sum()), rel=0.02)


@pytest.mark.parametrize("act_order", [True, False])
def test_the_reported_loss_is_that_of_the_stored_values_and_scales(act_order: bool) -> None:
    W, H = problem(17, 131)
    result = gptq.gptq(W, H, gptq.Options(64, act_order=act_order))
    assert float(result.loss.sum()) == pytest.approx(total_loss(W, result, H, 64), rel=1e-5)


def test_passes_of_refit_and_descent_lower_the_loss() -> None:
    W, H = problem(33, 192)
    losses = [
        total_loss(W, gptq.gptq(W, H, gptq.Options(64, passes=passes)), H, 64)
        for passes in (0, 1, 3)
    ]
    assert losses[1] < 0.98 * losses[0]
    assert losses[2] <= losses[1]


def test_refit_finds_the_scales_that_made_a_weight() -> None:
    _, H = problem(1, 96)
    group_of = torch.arange(96) // 32
    q = torch.randint(-8, 8, (15, 96)).float()
    s = (torch.rand(15, 3) + 0.5).half()
    W = q * s.float()[:, group_of]
    found = quant.refit_scales(W, q, (1.3 * s.float()).half(), group_of, H)
    # Conditioning of H in float32, then a rounding to FP16 (2^-11).
    assert torch.allclose(found.float(), s.float(), rtol=2e-3)


def test_refit_never_raises_the_loss_of_a_feature() -> None:
    W, H = problem(33, 131)
    group_of = torch.arange(131) // 16
    s = quantize.scales_for(W, 16)
    q = quantize.round_to_nearest(W, s, 16).float() - 8
    before = quant.loss(W, q * s.float()[:, group_of], H)
    after = quant.loss(W, q * quant.refit_scales(W, q, s, group_of, H).float()[:, group_of], H)
    assert (after <= before).all() and after.sum() < before.sum()


def test_descent_under_a_diagonal_hessian_is_rounding_to_nearest() -> None:
    W = torch.randn(15, 33)
    s = quantize.scales_for(W, 16)
    group_of = torch.arange(33) // 16
    start = torch.randint(-8, 8, (15, 33)).float()
    q = quant.coordinate_descent(W, start, s, group_of, torch.diag(torch.rand(33) + 0.1), 7)
    assert torch.equal(q + 8, quantize.round_to_nearest(W, s, 16).float())


def test_hessian_of_samples_of_different_lengths_is_that_of_all_tokens() -> None:
    samples = [torch.randn(1, length, 33).half() for length in (1, 17, 0, 131)]
    hessian = gptq.Hessian(33)
    for x in samples:
        hessian.add(x)
    tokens = torch.cat(samples, dim=1)[0].double()
    expected = 2 / 149 * tokens.T @ tokens
    assert hessian.num_tokens == 149
    assert torch.allclose(hessian.H.double(), expected, atol=1e-5)  # float32 sums of 149 terms


def test_a_hessian_that_is_not_positive_definite_gets_more_damping_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    W, H = problem(15, 33)
    H = H - 0.3 * H.diagonal().mean() * torch.eye(33)
    H.diagonal().clamp_(min=1e-3)
    with caplog.at_level(logging.WARNING, "gptq"):
        result = gptq.gptq(W, H, gptq.Options(-1, percdamp=0.01), "a layer")
    assert result.percdamp > 0.01
    assert "a layer: the Hessian is not positive definite with damping 0.01" in caplog.text


def test_nan_in_the_calibration_inputs_is_an_error_that_names_the_layer() -> None:
    W, H = problem(15, 33)
    H[3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"Hessian of layer 7 .* NaN"):
        gptq.gptq(W, H, gptq.Options(-1), "layer 7")


@pytest.mark.parametrize("act_order", [True, False])
def test_inputs_that_were_never_active_are_rounded_to_nearest(act_order: bool) -> None:
    W, H = problem(15, 64)
    dead = torch.tensor([0, 5, 63])
    H[dead] = 0
    H[:, dead] = 0
    result = gptq.gptq(W, H, gptq.Options(32, act_order=act_order, passes=1))
    nearest = quantize.round_to_nearest(W, result.scales, 32)
    assert torch.equal(result.q[:, dead], nearest[:, dead])


def test_the_whole_correction_is_the_best_weight_for_the_inputs_it_meets() -> None:
    """Against torch's own least squares: the weight that maps x to W x0."""
    W, x0 = torch.randn(7, 17), torch.randn(400, 17)
    x = x0 + 0.3 * torch.randn(400, 17)
    hessian = gptq.Hessian(17, with_original=True)
    for rows in (slice(0, 100), slice(100, 101), slice(101, 400)):
        hessian.add(x[rows], x0[rows])
    assert hessian.C is not None
    expected = torch.linalg.lstsq(x, x0 @ W.T).solution.T
    # Well conditioned; float32 sums over 400 tokens.
    assert torch.allclose(quant.correct(W, hessian.H, hessian.C, 1.0, 0.0), expected, atol=1e-4)
    half = quant.correct(W, hessian.H, hessian.C, 0.5, 0.0)
    assert torch.allclose(half, (W + expected) / 2, atol=1e-4)


def test_a_hessian_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="W has 33 input features"):
        gptq.gptq(torch.ones(2, 33), torch.eye(32))


# --------------------------------------------------------------------------------------------------
# Text
# --------------------------------------------------------------------------------------------------


def test_the_two_parts_of_a_file_never_overlap(tmp_path: pathlib.Path) -> None:
    text = tiny_llama.text()
    (tmp_path / "text.txt").write_text(text)
    parts = [
        data.load_text(str(tmp_path / "text.txt"), part)[0]
        for part in (data.CALIBRATION, data.EVALUATION)
    ]
    assert "".join(parts) == text
    assert 0.08 < len(parts[1]) / len(text) < 0.12


def test_samples_of_one_text_do_not_overlap_and_reach_its_end() -> None:
    samples = data.calibration_samples([torch.arange(1000)], 7, 131)
    starts = [int(sample[0, 0]) for sample in samples]
    assert all(b - a >= 131 for a, b in zip(starts, starts[1:], strict=False))
    assert int(samples[-1][0, -1]) == 999
    assert all(sample.shape == (1, 131) for sample in samples)


def test_samples_of_documents_have_different_lengths_and_do_not_repeat() -> None:
    documents = [torch.full((length,), length) for length in range(20, 140)]
    samples = data.calibration_samples(documents, 50, 64, seed=3)
    lengths = {sample.shape[1] for sample in samples}
    assert len({int(sample[0, 0]) for sample in samples}) == 50
    assert max(lengths) == 64 and len(lengths) > 5 and min(lengths) >= 32


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: data.load_text("no-such-file.txt", data.CALIBRATION), "neither a text file nor"),
        (lambda: data.calibration_samples([torch.arange(99)], 2, 50), "99 tokens .* need 100"),
        (lambda: data.calibration_samples([torch.arange(99)] * 3, 4, 50), "3 documents"),
        (lambda: data.evaluation_windows([torch.arange(99)], 100), "99 tokens .* needs 100"),
        (lambda: data.evaluation_windows([], 100), "0 tokens"),
    ],
)
def test_too_little_text_is_one_sentence_with_the_numbers(call, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(data.DataError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_utf8_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "x").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(data.DataError, match="UTF-8"):
        data.load_text(str(tmp_path / "x"), data.CALIBRATION)


class _Rows:
    """What tests need of a data set: a length, a slice, a column."""

    def __init__(self, texts: list[str]):
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, key: slice | str) -> object:
        return {"text": self.texts[key]} if isinstance(key, slice) else self.texts


def fake_datasets(monkeypatch: pytest.MonkeyPatch, load: object) -> None:
    module = types.ModuleType("datasets")
    module.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_corpora_come_from_their_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(*args: object, **kwargs: object) -> _Rows:
        calls.append((args, kwargs))
        return _Rows([f"document {i}" for i in range(5000)])

    fake_datasets(monkeypatch, load)
    for source in data.NAMES:
        calibration, evaluation = (
            data.load_text(source, part) for part in (data.CALIBRATION, data.EVALUATION)
        )
        splits = [kwargs["split"] for _, kwargs in calls[-2:]]
        if source == "redpajama":  # one split, cut by position
            assert not set(calibration) & set(evaluation)
        else:
            assert splits[0] == "train" and splits[1] in ("test", "validation")
        assert len(calibration) == (1 if source == "wikitext2" else 4000)


def test_a_corpus_that_cannot_be_fetched_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to the hub\nand much more")

    fake_datasets(monkeypatch, load)
    with pytest.raises(
        data.DataError, match="c4 could not be fetched .*no route to the hub.;"
    ) as caught:
        data.load_text("c4", data.CALIBRATION)
    assert "\n" not in str(caught.value)


def test_without_datasets_a_corpus_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(data.DataError, match="pip install datasets"):
        data.load_text("wikitext2", data.CALIBRATION)


# --------------------------------------------------------------------------------------------------
# llama2.py
# --------------------------------------------------------------------------------------------------

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    where = tiny_llama.folder(tmp_path_factory.mktemp("tiny"))
    (where / "text.txt").write_text(tiny_llama.text())
    return where


def samples_of(lengths: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randint(0, 256, (1, length)) for length in lengths]


def test_perplexity_is_that_of_the_model_itself() -> None:
    from gptq import llama2

    model, windows = tiny_llama.model(), samples_of((64, 64, 64))
    with torch.no_grad():
        losses = [float(model(window, labels=window).loss) for window in windows]
    expected = torch.tensor(losses).mean().exp()
    # The same float32 arithmetic, summed in another order.
    assert llama2.perplexity(model, windows) == pytest.approx(float(expected), rel=1e-4)


def test_compressing_changes_the_output_less_than_rounding_to_nearest() -> None:
    from gptq import llama2

    samples, held_out = samples_of((64,) * 12), samples_of((128,))[0]
    original = tiny_llama.model()

    def change(compressed: Any) -> float:
        with torch.no_grad():
            return float((compressed(held_out).logits - original(held_out).logits).norm())

    nearest = tiny_llama.model()
    llama2.round_model(nearest, 64)
    for correction in (0.0, 0.5):
        by_gptq = tiny_llama.model()
        llama2.compress(by_gptq, samples, gptq.Options(64, correction=correction))
        assert 0 < change(by_gptq) < change(nearest)


@pytest.mark.parametrize("groupsize", [-1, 64, 128])
def test_compressed_weights_lie_on_the_grid_of_the_returned_scales(groupsize: int) -> None:
    from gptq import llama2

    model = tiny_llama.model(attention_bias=True)
    before = {name: linear.bias for name, linear in llama2.linears(model).items()}
    scales, reports = llama2.compress(model, samples_of((33, 1, 17, 64)), gptq.Options(groupsize))
    linears = llama2.linears(model)
    assert set(scales) == set(linears) == {report.name for report in reports}
    for name, linear in linears.items():
        q = quantize.round_to_nearest(linear.weight, scales[name], groupsize)
        assert torch.equal(quantize.dequantize(q, scales[name], groupsize), linear.weight)
        assert linear.bias is before[name]
    assert all(0 < report.error < 0.1 for report in reports)


def test_an_unknown_architecture_is_one_sentence() -> None:
    from transformers import GPT2Config

    from gptq import llama2

    with pytest.raises(llama2.ModelError, match="model type 'gpt2' is not known; known are llama"):
        llama2.check_architecture(GPT2Config(), 128)


def test_samples_longer_than_a_sliding_window_are_refused() -> None:
    from transformers import MistralConfig

    from gptq import llama2

    with pytest.raises(llama2.ModelError, match="attention window of 64"):
        llama2.check_architecture(MistralConfig(sliding_window=64), 65)
    llama2.check_architecture(MistralConfig(sliding_window=64), 64)


def run_llama2(folder: pathlib.Path, *options: str) -> int:
    from gptq import llama2

    text = str(folder / "text.txt")
    return llama2.main(
        [str(folder), "--dataset", text, "--seqlen", "64", "--device", "cpu", *options]
    )


def test_the_command_line_compresses_reports_saves_and_measures(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import marlin.checkpoint
    from gptq import llama2

    assert run_llama2(folder) == 0
    assert "perplexity of" in capsys.readouterr().out
    target = tmp_path / "compressed"
    arguments = ("--wbits", "4", "--groupsize", "64", "--nsamples", "4", "--save", str(target))
    assert run_llama2(folder, *arguments) == 0
    out = capsys.readouterr().out
    assert out.count("relative squared error") == 14
    printed = float(out.split("text.txt: ")[1].split()[0])
    model = marlin.checkpoint.load(target)
    tokens = data.tokenize(
        tiny_llama.tokenizer(), data.load_text(str(folder / "text.txt"), data.EVALUATION)
    )
    reloaded = llama2.perplexity(model, data.evaluation_windows(tokens, 64))
    # Three printed decimals of a number near 257, and the FP16 rounding of layer outputs.
    assert reloaded == pytest.approx(printed, rel=1e-3)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model": "nowhere"}, "cannot read the model"),
        ({"model": "empty"}, "is not a model folder: it has no config.json"),
        ({"model": "text.txt"}, "is a file but not a GGUF file"),
        ({"dataset": "nothing.txt"}, "neither a text file nor one of wikitext2"),
        ({"nsamples": "100000"}, "samples of 64 need 6400000"),
        ({"save": "text.txt"}, "is a file, but a checkpoint is a folder"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence_and_status_1(
    folder: pathlib.Path,
    change: dict[str, str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from gptq import llama2

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (folder / "empty").mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    options = {"model": ".", "dataset": "text.txt", "nsamples": "2"} | change
    model = options.pop("model")
    command = [word for key, value in options.items() for word in (f"--{key}", value)]
    assert llama2.main([model, "--wbits", "4", "--seqlen", "64", "--device", "cpu", *command]) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in message


@pytest.mark.parametrize("damage", ["a tensor is missing", "the file is cut short", "it is NaN"])
def test_a_damaged_model_is_one_sentence_and_status_1(
    tmp_path: pathlib.Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import safetensors.torch

    folder = tiny_llama.folder(tmp_path / "model")
    (folder / "text.txt").write_text(tiny_llama.text())
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    key = "model.layers.1.self_attn.o_proj.weight"
    if damage == "a tensor is missing":
        del tensors[key]
    if damage == "it is NaN":
        tensors["model.layers.0.self_attn.v_proj.weight"][3, 4] = torch.nan
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    if damage == "the file is cut short":
        file.write_bytes(file.read_bytes()[:-100])
    arguments = ("--wbits", "4", "--groupsize", "64", "--nsamples", "2")
    assert run_llama2(folder, *arguments, "--save", str(tmp_path / "int4")) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("gptq: ")
    words = {"a tensor is missing": key, "the file is cut short": "cannot read", "it is NaN": "NaN"}
    assert words[damage] in message
    assert not (tmp_path / "int4").exists()


# --------------------------------------------------------------------------------------------------
# eval.py
# --------------------------------------------------------------------------------------------------


def test_the_marlin_option_becomes_the_harness_s_own() -> None:
    from gptq import eval as gptq_eval

    line = "--model hf --model_args pretrained=X,dtype=float32 --tasks a,b --limit 3"
    assert gptq_eval.rewrite(line.split()) == (line.split(), None)
    rest, folder = gptq_eval.rewrite([*line.split(), "--marlin_checkpoint", "D"])
    assert folder == "D"
    expected = "--model marlin --model_args pretrained=D,dtype=float32 --tasks a,b --limit 3"
    assert rest == expected.split()


def test_the_harness_scores_a_compressed_model_on_local_tasks(
    folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    from gptq import eval as gptq_eval

    monkeypatch.chdir(ROOT)  # the tasks name their data from here
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    arguments = ("--wbits", "4", "--groupsize", "64", "--nsamples", "4")
    assert run_llama2(folder, *arguments, "--save", str(tmp_path / "int4")) == 0
    command = f"--model hf --model_args pretrained={folder},dtype=float32 --device cpu --limit 6"
    command += f" --tasks capitals,prose --include_path examples/tasks --output_path {tmp_path}"
    command += f" --marlin_checkpoint {tmp_path / 'int4'}"
    assert gptq_eval.main(command.split()) == 0
    (file,) = tmp_path.rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    assert 0 <= results["capitals"]["acc,none"] <= 1
    # A random model of 257 tokens, one a byte, knows next to nothing about the next one.
    assert results["prose"]["byte_perplexity,none"] == pytest.approx(257, rel=0.1)


def test_a_broken_checkpoint_is_one_sentence_from_the_harness_too(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    from gptq import eval as gptq_eval
    from marlin.integrations.lm_eval import MarlinLM

    # The harness builds the model after it has indexed its thousands of tasks: skip those 20 s.
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: MarlinLM(str(tmp_path)))
    monkeypatch.setattr(sys, "argv", ["pytest"])
    assert gptq_eval.main(["--tasks", "capitals", "--marlin_checkpoint", str(tmp_path)]) == 1
    assert "it has no config.json" in capsys.readouterr().err
