"""marlin quantize: compress a model to 4 bits, by rounding to nearest or by GPTQ."""

from __future__ import annotations

import fnmatch
import importlib
import pathlib
import time
from typing import Any

import click
import torch
from torch import nn

from .. import checkpoint
from ..checkpoint.config import QUANTIZATION, read_model_config
from ..checkpoint.errors import first_line
from ..checkpoint.write import WRITTEN
from ..layer import Layer
from .common import CommandError, Size, device_option, emit, json_option, progress, quiet, size


@click.command()
@click.argument("model", metavar="MODEL")
@click.argument("target", metavar="NEW", type=click.Path(path_type=pathlib.Path))
@click.option("--to", "form", type=click.Choice(WRITTEN), default="marlin", show_default=True)
@click.option("--group-size", default=128, show_default=True, help="-1, or a multiple of 16.")
@click.option("--zero-points", is_flag=True, help="Give each group a zero point of its own.")
@click.option("--calibrate", metavar="TEXT",
              help="Compress by GPTQ on this text: a FILE, wikitext2, c4 or redpajama. Needs the "
              "source tree. Without it, weights are rounded to the nearest values.")  # fmt: skip
@click.option("--samples", default=128, show_default=True, help="Of the text, for --calibrate.")
@click.option("--seqlen", default=2048, show_default=True, help="Tokens of a sample.")
@click.option("--skip", multiple=True, metavar="NAME", default=("lm_head",), show_default=True,
              help="Layers to leave as they are; may have * in it.")  # fmt: skip
@click.option(
    "--shard-size", type=Size(), default="2GB", show_default=True, help="Of a file, most."
)
@device_option
@json_option
def quantize(
    model: str,
    target: pathlib.Path,
    form: str,
    group_size: int,
    zero_points: bool,
    calibrate: str | None,
    samples: int,
    seqlen: int,
    skip: tuple[str, ...],
    shard_size: int,
    device: torch.device,
    as_json: bool,
) -> None:
    """Compress a model to 4 bits and save it.

    MODEL is a local folder or the name of a model on the hub.

    \b
    Examples:
      marlin quantize llama llama-int4 --group-size 64
      marlin quantize llama llama-gptq --to gptq --calibrate wikitext2 --samples 64
      marlin quantize llama llama-ct --to compressed-tensors --zero-points
    """
    if group_size != -1 and (group_size <= 0 or group_size % 16):
        raise click.BadParameter(
            f"--group-size is {group_size} but should be -1 or a positive multiple of 16"
        )
    if calibrate is not None and zero_points:
        raise click.UsageError("--calibrate compresses without zero points")
    quiet()
    began = time.perf_counter()
    checkpoint.check_target(target)  # before the work, not after
    if calibrate is None:
        loaded, tokenizer = _load(model)
        count = _round(loaded, group_size, zero_points, skip, device)
    else:
        loaded, tokenizer, count = _gptq(model, group_size, calibrate, samples, seqlen, device)
    checkpoint.save(loaded, tokenizer, target, form, shard_size)
    seconds = time.perf_counter() - began
    total = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    values = {
        "model": model,
        "target": str(target),
        "format": form,
        "group_size": group_size,
        "zero_points": zero_points,
        "method": "nearest" if calibrate is None else "gptq",
        "layers": count,
        "bytes": total,
        "seconds": round(seconds, 3),
    }
    line = f"{target}: {count} layers in 4 bits, {size(total)}, {seconds:.1f} s"
    emit(values, as_json, lambda: iter([line]))


def _load(source: str) -> tuple[Any, Any]:
    """The uncompressed model, on the CPU, and its tokenizer if it has one."""
    import transformers

    auto: Any = transformers.AutoModelForCausalLM
    folder = pathlib.Path(source)
    if folder.is_dir() and any(read_model_config(folder).get(name) for name in QUANTIZATION):
        raise CommandError(f"marlin: {source} is already compressed; marlin convert takes it")
    try:
        model, found = auto.from_pretrained(source, dtype="auto", output_loading_info=True)
    except Exception as error:  # transformers raises a dozen kinds for a missing or broken model
        raise CommandError(
            f"marlin: cannot read the model {source}: {first_line(error)}"
        ) from error
    missing = sorted(found["missing_keys"])
    if missing:  # transformers would leave them random, with a warning
        raise CommandError(f"marlin: {source} has no tensor {missing[0]}, which its config needs")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, ImportError):
        tokenizer = None
    return model.eval(), tokenizer


def _round(
    model: nn.Module,
    group_size: int,
    zero_points: bool,
    skip: tuple[str, ...],
    device: torch.device,
) -> int:
    """Puts layers, rounded to nearest, in the place of linear layers; returns how many."""
    linears = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and not any(fnmatch.fnmatchcase(name, s) for s in skip)
    }
    if not linears:
        raise CommandError("marlin: the model has no linear layer to compress")
    with progress("rounding", len(linears)) as step, torch.no_grad():
        for name, linear in linears.items():
            step(name)
            parent, _, child = name.rpartition(".")
            try:
                layer = Layer.from_linear(linear.to(device), group_size, zero_points, device="cpu")
            except ValueError as error:
                raise CommandError(f"marlin: {name} cannot be compressed: {error}") from error
            setattr(model.get_submodule(parent), child, layer)
    return len(linears)


def _gptq(
    source: str, group_size: int, text: str, num_samples: int, seqlen: int, device: torch.device
) -> tuple[Any, Any, int]:
    """GPTQ, by the scripts of the source tree."""
    try:
        data = importlib.import_module("gptq.data")
        gptq = importlib.import_module("gptq.gptq")
        llama2 = importlib.import_module("gptq.llama2")
    except ImportError as error:
        raise CommandError(
            f"marlin: --calibrate needs the folder gptq/ of the source tree ({first_line(error)}); "
            "run python -m marlin there, or put the source tree into PYTHONPATH"
        ) from error
    try:
        documents = data.load_text(text, data.CALIBRATION)
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        model, tokenizer = llama2.load_model(source, dtype)
        tokens = data.tokenize(tokenizer, documents)
        chosen = data.calibration_samples(tokens, num_samples, seqlen, 0, text)
        options = gptq.Options(groupsize=group_size)
        with progress("GPTQ", len(llama2.linears(model))) as step:
            scales, _ = llama2.compress(
                model, chosen, options, device, on_layer=lambda report: step(report.name)
            )
    except (data.DataError, llama2.ModelError, gptq.HessianError) as error:
        raise CommandError(str(error)) from error
    checkpoint.pack_model(model, scales, group_size)
    return model, tokenizer, len(scales)
