"""marlin eval: perplexity of a text, or tasks of the lm-evaluation-harness."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator
from typing import Any

import click
import torch
from torch import Tensor

from .. import checkpoint
from ..checkpoint.errors import first_line
from .common import CommandError, device_option, emit, json_option, progress, quiet, table


@torch.no_grad()
def perplexity(model: Any, windows: list[Tensor], device: torch.device) -> float:
    """exp of the mean negative log likelihood of a token, each window's first not predicted.

    Args:
        model: a causal language model on the device.
        windows: (1, length) int64 each.
        device: that computes.
    """
    total, count = 0.0, 0
    with progress("measuring", len(windows)) as step:
        for i, window in enumerate(windows):
            step(f"window {i + 1}")
            logits = model(window.to(device)).logits[0, :-1].float()
            target = window[0, 1:].to(device)
            total += torch.nn.functional.cross_entropy(logits, target, reduction="sum").item()
            count += len(target)
    return math.exp(total / count)


@click.command("eval")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=pathlib.Path))
@click.option("--text", type=click.Path(exists=True, dir_okay=False, path_type=pathlib.Path),
              help="Measure perplexity on this file (UTF-8).")  # fmt: skip
@click.option("--seqlen", default=2048, show_default=True, help="Tokens of a window of the text.")
@click.option("--windows", type=int, help="Windows at most.")
@click.option("--tasks", help="Tasks of the lm-evaluation-harness, with commas between them.")
@click.option("--include-path", type=click.Path(exists=True), help="Folder with more tasks.")
@click.option("--limit", type=float, help="Documents of a task at most.")
@click.option("--batch-size", default=1, show_default=True)
@device_option
@json_option
def evaluate(
    directory: pathlib.Path,
    text: pathlib.Path | None,
    seqlen: int,
    windows: int | None,
    tasks: str | None,
    include_path: str | None,
    limit: float | None,
    batch_size: int,
    device: torch.device,
    as_json: bool,
) -> None:
    """Measure a checkpoint: perplexity of a text, or tasks of the lm-evaluation-harness.

    \b
    Examples:
      marlin eval llama-int4 --text book.txt --seqlen 1024
      marlin eval llama-int4 --tasks arc_easy,hellaswag --limit 100
    """
    if (text is None) == (tasks is None):
        raise click.UsageError("give either --text or --tasks")
    if seqlen < 2:
        raise click.BadParameter("--seqlen should be at least 2")
    quiet()
    if tasks is not None:
        results = _harness(directory, tasks, include_path, limit, batch_size, device)
        emit(
            {"directory": str(directory), "results": results},
            as_json,
            lambda: _result_lines(results),
        )
        return
    assert text is not None
    import transformers

    tokenizer_of: Any = transformers.AutoTokenizer
    try:
        tokenizer = tokenizer_of.from_pretrained(directory)
    except (OSError, ValueError, ImportError) as error:
        raise CommandError(
            f"marlin: {directory} has no tokenizer that can be read: {first_line(error)}"
        ) from error
    try:
        read = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CommandError(f"marlin: {text} is not UTF-8 text: {error}") from error
    tokens = torch.tensor(tokenizer(read, verbose=False)["input_ids"], dtype=torch.int64)
    count = len(tokens) // seqlen
    if count == 0:
        raise CommandError(
            f"marlin: {text} has {len(tokens)} tokens, but a window needs {seqlen}; lower --seqlen"
        )
    count = count if windows is None else min(count, windows)
    cut = [tokens[i * seqlen : (i + 1) * seqlen][None] for i in range(count)]
    found = perplexity(checkpoint.load(directory, device), cut, device)
    values: dict[str, Any] = {
        "directory": str(directory),
        "text": str(text),
        "windows": count,
        "seqlen": seqlen,
    }
    values["perplexity"] = found
    line = f"perplexity {found:.4f} on {text}, {count} window(s) of {seqlen} tokens"
    emit(values, as_json, lambda: iter([line]))


def _harness(
    directory: pathlib.Path,
    tasks: str,
    include_path: str | None,
    limit: float | None,
    batch_size: int,
    device: torch.device,
) -> dict[str, dict[str, Any]]:
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager

        from ..integrations.lm_eval import MarlinLM
    except ImportError as error:
        raise CommandError(
            f"marlin: --tasks needs the package lm_eval (pip install lm_eval==0.4.13): {error}"
        ) from error
    manager = TaskManager(include_path=include_path)
    names = [name for name in tasks.split(",") if name]
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise CommandError(f"marlin: the harness has no task {unknown[0]!r}")
    model = MarlinLM(str(directory), device=str(device), batch_size=batch_size)
    results = lm_eval.simple_evaluate(
        model=model, tasks=names, limit=limit, task_manager=manager, bootstrap_iters=0
    )
    return {
        task: {
            metric.removesuffix(",none"): value
            for metric, value in found.items()
            if isinstance(value, int | float)
        }
        for task, found in results["results"].items()
    }


def _result_lines(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    rows = [("task", "metric", "value")]
    for task, found in results.items():
        rows += [(task, metric, f"{value:.4f}") for metric, value in found.items()]
    yield from table(rows)
