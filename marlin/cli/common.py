"""What the commands share: output, progress, sizes, devices, the errors that explain themselves.

Depends on click. Called by the other files of this folder.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click
import torch

from ..checkpoint import CheckpointError


class CommandError(Exception):
    """What a command cannot do; the message is one sentence for the user."""


EXPLAINED = (CommandError, CheckpointError)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def device_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --device, by default the GPU if there is one."""
    return click.option(
        "--device",
        help="cpu, cuda, cuda:1 ...; by default a GPU if there is one.",
        callback=_device,
    )(function)


def _device(context: click.Context, parameter: click.Parameter, value: str | None) -> torch.device:
    if value is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(value)
    except RuntimeError:
        raise click.BadParameter(f"{value!r} is no device") from None
    if device.type not in ("cpu", "cuda"):
        raise click.BadParameter(f"{value!r} is neither cpu nor cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise click.BadParameter(f"{value!r}: there are {torch.cuda.device_count()} CUDA GPUs")
    return device


def quiet() -> None:
    """Keeps the bars and advice of other libraries off the terminal."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def emit(values: dict[str, Any], as_json: bool, lines: Callable[[], Iterator[str]]) -> None:
    """Prints what a command found.

    Args:
        values: for --json.
        as_json: whether it was given.
        lines: for people.
    """
    if as_json:
        click.echo(json.dumps(values, indent=2))
        return
    for line in lines():
        click.echo(line)


@contextlib.contextmanager
def progress(label: str, total: int = 1) -> Iterator[Callable[..., None]]:
    """A progress bar on the standard error, if that is a terminal.

    Args:
        label: what is being done.
        total: how many steps there are.

    Returns:
        A function to call before each step with its name, and the number of steps if only now it is
        known.
    """
    stream = sys.stderr
    shown: list[str] = []
    made: Any = click.progressbar(
        length=total,
        label=label,
        file=stream,
        show_pos=True,
        hidden=not stream.isatty(),
        item_show_func=lambda item: shown[-1] if shown else None,
    )
    with made as bar:

        def step(name: str, total: int | None = None) -> None:
            if total is not None:
                bar.length = total
            if shown:
                bar.update(1)
            shown.append(name)
            bar.render_progress()

        yield step
        if shown:
            bar.update(1)


def table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Lines of columns that are as wide as they must be; the first row is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


def size(num_bytes: int) -> str:
    """A number of bytes for people, in powers of 10."""
    value, units = float(num_bytes), iter(("bytes", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while value >= 1000 and unit != "TB":
        value, unit = value / 1000, next(units)
    return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"


class Size(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4
    """A number of bytes on the command line: 500MB, 2GB."""

    name = "SIZE"

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> int:
        """The number."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d{1,9}(?:\.\d+)?) ?([kMGT]?)B?", str(value))
        if not found or float(found[1]) == 0:
            self.fail(f"{value!r} is no size such as 500MB or 2GB", param, context)
        return int(float(found[1]) * 1000 ** " kMGT".index(found[2] or " "))
