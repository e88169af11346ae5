"""The command line: `marlin` or `python -m marlin`.

    marlin info DIR                       what is in a checkpoint, and what will run it
    marlin convert DIR NEW --to gptq      the same model in another format
    marlin quantize MODEL NEW             compress a model
    marlin eval DIR --text FILE           measure it
    marlin bench, marlin check            is it fast, is it right, here

Exit status: 0 done, 1 an error that the message explains, 2 a wrong command line. With --json a
command prints one JSON object and nothing else on the standard output; progress goes to the
standard error. Depends on click; each command is in a file of its subject beside this one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from .. import __version__
from .common import EXPLAINED
from .compress import quantize
from .files import convert, info
from .machine import bench, check
from .measure import evaluate

__all__ = ["cli", "main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="marlin")
def cli() -> None:
    """Products of 16-bit activations with 4-bit weights: checkpoints, checks and measurements.

    \b
    Examples:
      marlin info llama-awq
      marlin convert llama-awq llama-ct --to compressed-tensors
      marlin quantize llama llama-int4 --group-size 64
      marlin eval llama-int4 --text book.txt
      marlin check
    """


for command in (info, convert, quantize, evaluate, bench, check):
    cli.add_command(command)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: without the program's name; None takes that of the process.

    Returns:
        The exit status. Errors that the user can mend are one sentence on the standard error.
    """
    try:
        result = cli.main(args=argv, prog_name="marlin", standalone_mode=False)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.Abort:
        click.echo("marlin: stopped", err=True)
        return 1
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except EXPLAINED as error:
        click.echo(str(error), err=True)
        return 1
    except ModuleNotFoundError as error:
        if error.name not in ("transformers", "safetensors", "huggingface_hub"):
            raise
        click.echo(
            f"marlin: this needs the package {error.name} (pip install transformers safetensors)",
            err=True,
        )
        return 1
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.stderr.close()
        return 1
    return result if isinstance(result, int) else 0
