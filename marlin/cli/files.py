"""marlin info, marlin convert: what checkpoints hold, and the same in another format."""

from __future__ import annotations

import collections
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import click
import torch

from .. import checkpoint
from ..checkpoint.files import DTYPES, NAMES
from ..checkpoint.model import CODECS, needed
from ..checkpoint.write import WRITTEN
from ..support import can_run
from .common import Size, device_option, emit, json_option, progress, quiet, size, table


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=pathlib.Path))
@click.option("--config", type=click.Path(), help="Folder of config.json, if DIR is a lone file.")
@click.option("--layers", "show_layers", is_flag=True, help="List every layer.")
@device_option
@json_option
def info(
    directory: pathlib.Path,
    config: str | None,
    show_layers: bool,
    device: torch.device,
    as_json: bool,
) -> None:
    """Say what is in a checkpoint, and what will run each layer.

    Configs and headers are read and checked against each other, no weights.

    \b
    Examples:
      marlin info llama-awq
      marlin info llama-gptq --layers --device cpu
      marlin info llama-gptq --json | jq .kinds
    """
    quiet()
    read = checkpoint.open_checkpoint(directory, config=config)
    codec = CODECS[read.scheme.format]
    layers: list[dict[str, Any]] = []
    packed_bytes = 0
    for name, linear in read.linears.items():
        suffixes = needed(codec, read.shards, name, linear)
        entries = {s: read.shards[f"{name}.{s}"] for s in suffixes if f"{name}.{s}" in read.shards}
        num_bytes = sum(entry.num_bytes for entry in entries.values())
        packed_bytes += num_bytes
        scales = next(e for s, e in entries.items() if s in ("s", "scales", "weight_scale"))
        dtype = DTYPES[scales.dtype]
        dtype = torch.float16 if dtype == torch.float32 else dtype
        spec = linear.spec
        answer = can_run(
            linear.k,
            linear.n,
            spec.groupsize,
            dtype,
            not spec.symmetric,
            spec.act_order,
            device,
        )
        layers.append(
            {
                "name": name,
                "k": linear.k,
                "n": linear.n,
                "group_size": spec.groupsize,
                "symmetric": spec.symmetric,
                "act_order": spec.act_order,
                "dtype": NAMES[dtype],
                "bytes": num_bytes,
                "backend": answer.backend or None,
                "reason": answer.reason,
            }
        )
    keys = ("k", "n", "group_size", "symmetric", "act_order", "dtype", "backend", "reason")
    kinds = collections.Counter(tuple(layer[key] for key in keys) for layer in layers)
    total = sum(entry.num_bytes for entry in read.shards.values())
    weights = sum(layer["k"] * layer["n"] for layer in layers)
    values = {
        "directory": str(directory),
        "format": read.scheme.format,
        "model_type": read.config["model_type"],
        "files": [path.name for path in read.shards.files],
        "bytes": total,
        "compressed_bytes": packed_bytes,
        "bits_per_weight": round(8 * packed_bytes / weights, 3),
        "device": str(device),
        "kinds": [dict(zip(keys, kind, strict=True)) | {"count": n} for kind, n in kinds.items()],
        "layers": layers,
    }

    def lines() -> Iterator[str]:
        yield f"{directory}: {read.config['model_type']}, {read.scheme.format}"
        yield (
            f"{size(total)} in {len(read.shards.files)} file(s): {len(layers)} compressed layers "
            f"of {size(packed_bytes)}, {values['bits_per_weight']:.2f} bits a weight; "
            f"{len(read.dense)} other tensors of {size(total - packed_bytes)}"
        )
        yield ""
        rows = [("layers", "k", "n", "group", "zero points", "order", "scales", f"on {device}")]
        if show_layers:
            rows[0] = ("layer", *rows[0][1:])
        listed = (
            [(layer["name"], layer) for layer in layers]
            if show_layers
            else [(str(kind["count"]), kind) for kind in values["kinds"]]
        )
        for first, kind in listed:
            rows.append(
                (
                    first,
                    str(kind["k"]),
                    str(kind["n"]),
                    "all" if kind["group_size"] == -1 else str(kind["group_size"]),
                    "8" if kind["symmetric"] else "own",
                    "act-order" if kind["act_order"] else "plain",
                    kind["dtype"],
                    kind["backend"] or f"none: {kind['reason']}",
                )
            )
        yield from table(rows)

    emit(values, as_json, lines)


@click.command()
@click.argument("source", metavar="DIR", type=click.Path(path_type=pathlib.Path))
@click.argument("target", metavar="NEW", type=click.Path(path_type=pathlib.Path))
@click.option("--to", "form", type=click.Choice(WRITTEN), default="marlin", show_default=True)
@click.option(
    "--shard-size", type=Size(), default="2GB", show_default=True, help="Of a file, most."
)
@click.option("--config", type=click.Path(), help="Folder of config.json, if DIR is a lone file.")
@json_option
def convert(
    source: pathlib.Path,
    target: pathlib.Path,
    form: str,
    shard_size: int,
    config: str | None,
    as_json: bool,
) -> None:
    """Write a checkpoint in another format, bit for bit the same model.

    Reads marlin, gptq, awq (gemm) and compressed-tensors (pack-quantized). gptq and
    compressed-tensors are served by vLLM and SGLang as they are. NEW is replaced only when it is
    complete.

    \b
    Examples:
      marlin convert llama-awq llama-marlin
      marlin convert llama-awq llama-ct --to compressed-tensors --shard-size 4GB
      marlin convert old-marlin.pt llama-gptq --to gptq --config llama
    """
    quiet()
    began = time.perf_counter()
    with progress("converting") as step:
        checkpoint.convert(
            source, target, form, shard_size, lambda name, _, count: step(name, count), config
        )
    files = sorted(path.name for path in target.glob("*.safetensors"))
    total = sum((target / name).stat().st_size for name in files)
    seconds = time.perf_counter() - began
    values: dict[str, Any] = {
        "source": str(source),
        "target": str(target),
        "format": form,
        "files": files,
    }
    values |= {"bytes": total, "seconds": round(seconds, 3)}
    emit(
        values,
        as_json,
        lambda: iter([f"{target}: {form}, {size(total)} in {len(files)} file(s), {seconds:.1f} s"]),
    )
