"""Compresses a Llama to 4 bits with GPTQ, and measures perplexity before and after.

    python gptq/llama2.py MODEL
        perplexity of the uncompressed model
    python gptq/llama2.py MODEL --wbits 4 --groupsize 128 --save DIR
        compress, report the error of every layer, perplexity, save

Depends on transformers, gptq.py, data.py, and, to save, marlin.checkpoint. eval.py and
examples/demo.py use its parts. One decoder layer at a time is on the computing device; everything
else stays in main memory.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import logging
import math
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

ROOT = str(pathlib.Path(__file__).resolve().parents[1])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

from gptq import data, gptq  # noqa: E402
from marlin import checkpoint, quantize  # noqa: E402

log = logging.getLogger("gptq")

# Model types whose decoder layers are built so: linear layers that share their inputs, in order.
ARCHITECTURES = ("llama", "mistral", "qwen2")
STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
LOGITS_CHUNK = 512  # tokens whose logits are held at once: 512 x 128k words of float32 are 256 MB


class ModelError(Exception):
    """A model that is missing or not of a known kind; the message is one sentence for the user."""


# --------------------------------------------------------------------------------------------------
# Reading a model
# --------------------------------------------------------------------------------------------------


def load_model(source: str, dtype: torch.dtype = torch.float16) -> tuple[nn.Module, Any]:
    """Reads a model and its tokenizer.

    Args:
        source: a folder, a GGUF file, or the name of a model on the hub.
        dtype: of the weights in main memory. GGUF weights are rounded to FP16 first: they are "the
            FP16 model".

    Returns:
        The model, on the CPU, in evaluation mode, and its tokenizer.

    Raises:
        ModelError: there is no such model, or it cannot be read.
    """
    import transformers

    path = pathlib.Path(source)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"gptq: {source} is not a model folder: it has no config.json")
    if path.is_file() and path.suffix != ".gguf":
        raise ModelError(
            f"gptq: {source} is a file but not a GGUF file; MODEL is a folder, a GGUF file, or a "
            "hub name"
        )
    try:
        if path.is_file():
            return _load_gguf(path, dtype)
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except ModelError:
        raise
    except Exception as error:  # transformers raises a dozen kinds for a missing or broken model
        raise ModelError(f"gptq: cannot read the model {source}: {_first_line(error)}") from error
    if getattr(model.config, "quantization_config", None) is not None:
        raise ModelError(f"gptq: {source} is already quantised; give the uncompressed model")
    missing = sorted(found["missing_keys"])
    if missing:  # transformers would leave them random, with a warning
        raise ModelError(f"gptq: {source} has no tensor {missing[0]}, which its config needs")
    return model.eval(), tokenizer


def _load_gguf(path: pathlib.Path, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    import transformers

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(dtype=torch.float32, **where)
    # transformers 5 calls the result quantised though its weights are plain, and then neither casts
    # nor saves it: move the weights into a model that never heard of GGUF.
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    state = {name: tensor.half().to(dtype) for name, tensor in loaded.state_dict().items()}
    model = type(loaded)._from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.load_state_dict(state)
    if loaded.generation_config is not None:
        model.generation_config = loaded.generation_config
    return model.eval(), tokenizer


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def check_architecture(config: Any, seqlen: int) -> None:
    """Refuses a model whose decoder layers this file does not know how to walk through.

    Raises:
        ModelError: with the model's type and those that are known.
    """
    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"gptq: model type {kind!r} is not known; known are {', '.join(ARCHITECTURES)}"
        )
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and seqlen > window:
        raise ModelError(
            f"gptq: samples of {seqlen} tokens exceed the model's attention window of {window}"
        )


# --------------------------------------------------------------------------------------------------
# Walking through the layers
# --------------------------------------------------------------------------------------------------


class _CaughtError(Exception):
    """Ends a forward pass at the first decoder layer."""


class _Catcher(nn.Module):
    """Stands in for the first decoder layer and keeps what it is called with."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.caught: tuple[Tensor, dict[str, Any]] | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.caught = (hidden_states, kwargs)
        raise _CaughtError


def embed(model: Any, samples: Sequence[Tensor]) -> list[tuple[Tensor, dict[str, Any]]]:
    """What the first decoder layer is called with for every sample: hidden states (1, length,
    hidden), and keywords."""
    layers = model.model.layers
    catcher = _Catcher(layers[0])
    layers[0] = catcher
    inputs = []
    try:
        for sample in samples:
            try:
                model.model(sample.to(model.model.embed_tokens.weight.device), use_cache=False)
            except _CaughtError:
                assert catcher.caught is not None
                inputs.append(catcher.caught)
    finally:
        layers[0] = catcher.inner
    return inputs


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_to(item, device) for item in value)
    return value


@torch.no_grad()
def perplexity(
    model: Any, windows: Sequence[Tensor], device: torch.device | str = "cpu", label: str = ""
) -> float:
    """Measures perplexity, one decoder layer at a time on the device.

    Args:
        model: a causal language model of a known architecture, dense or with Marlin layers.
        windows: (1, length) int64 each; a window's first token is not predicted.
        device: that computes.
        label: of the progress bar.

    Returns:
        exp of the mean negative log likelihood of a token.
    """
    device = torch.device(device)
    inputs = embed(model, windows)
    hidden = [x for x, _ in inputs]
    for layer in tqdm(model.model.layers, desc=f"perplexity {label}".strip(), unit="layer"):
        home = next(layer.parameters()).device
        layer.to(device)
        for i, (_, kwargs) in enumerate(inputs):
            out = layer(hidden[i].to(device), **_to(kwargs, device))
            hidden[i] = (out[0] if isinstance(out, tuple) else out).to(hidden[i].device)
        layer.to(home)
    total, count = 0.0, 0
    norm, head = copy.deepcopy(model.model.norm).to(device), copy.deepcopy(model.lm_head).to(device)
    for x, window in zip(hidden, windows, strict=True):
        x, target = norm(x[0, :-1].to(device)), window[0, 1:].to(device)
        for part, wanted in zip(x.split(LOGITS_CHUNK), target.split(LOGITS_CHUNK), strict=True):
            total += nn.functional.cross_entropy(head(part).float(), wanted, reduction="sum").item()
            count += len(wanted)
    return math.exp(total / count)


# --------------------------------------------------------------------------------------------------
# Compressing
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class LayerReport:
    """One compressed linear layer: its name, its squared output error relative to its squared
    output, its damping."""

    name: str
    error: float
    percdamp: float


def linears(model: Any) -> dict[str, nn.Linear]:
    """The linear layers that are compressed: those of the decoder layers, by their names in the
    model."""
    return {
        f"model.layers.{i}.{name}": module
        for i, layer in enumerate(model.model.layers)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }


@torch.no_grad()
def round_model(model: Any, groupsize: int, rule: str = "search") -> dict[str, Tensor]:
    """Rounds every linear layer to nearest, in place.

    Args:
        model: of a known architecture.
        groupsize: input features that share a scale, -1 for all.
        rule: of quantize.RULES.

    Returns:
        The scales of each layer by name, (n, groups) fp16.
    """
    scales = {}
    for name, linear in tqdm(linears(model).items(), desc="round to nearest", unit="linear"):
        W = linear.weight.data
        s = quantize.scales_for(W, groupsize, rule)
        q = quantize.round_to_nearest(W, s, groupsize)
        linear.weight.data = quantize.dequantize(q, s, groupsize).to(W.dtype)
        scales[name] = s.cpu()
    return scales


@torch.no_grad()
def compress(
    model: Any,
    samples: Sequence[Tensor],
    options: gptq.Options = gptq.DEFAULTS,
    device: torch.device | str = "cpu",
    on_layer: Callable[[LayerReport], None] | None = None,
) -> tuple[dict[str, Tensor], list[LayerReport]]:
    """Compresses every linear layer of the decoder with GPTQ, in place.

    A decoder layer is walked through once, in four stages: q/k/v, o, gate/up, down. Each is rounded
    under the Hessian of inputs that have passed everything before it already rounded. With
    options.correction the uncompressed model's inputs walk along, which doubles the time.

    Args:
        model: on the CPU; its type is one of ARCHITECTURES.
        samples: (1, length) int64 each, of any lengths.
        options: see gptq.Options.
        device: that computes.
        on_layer: called with the report of every linear layer.

    Returns:
        The scales of each layer by name, (n, groups) fp16, and the reports. The weights are on the
        grid of these scales, so marlin.Layer.pack recovers the stored values exactly.

    Raises:
        ModelError: an architecture that is not known.
        gptq.HessianError: NaN or infinite values in the model or on the way through it.
    """
    device = torch.device(device)
    check_architecture(model.config, max(sample.shape[1] for sample in samples))
    scales: dict[str, Tensor] = {}
    reports: list[LayerReport] = []

    correcting = options.correction > 0

    def stage(
        prefix: str, modules: dict[str, nn.Linear], inputs: list[Tensor], originals: list[Tensor]
    ) -> None:
        """Rounds linear layers that share their inputs, so their Hessian, as one tall weight."""
        first = next(iter(modules.values()))
        hessian = gptq.Hessian(first.in_features, device, correcting)
        for n, x in enumerate(inputs):
            hessian.add(x.to(device), originals[n].to(device) if correcting else None)
        W = torch.cat([module.weight.data for module in modules.values()]).float()
        names = "/".join(modules)
        result = gptq.gptq(W, hessian.H, options, f"{prefix}.{names}", hessian.C)
        Q = quantize.dequantize(result.q, result.scales, options.groupsize)
        signal = ((W @ hessian.H) * W).sum(dim=1)
        begin = 0
        for name, module in modules.items():
            rows = slice(begin, begin + module.out_features)
            begin = rows.stop
            module.weight.data = Q[rows].to(module.weight.dtype)
            scales[f"{prefix}.{name}"] = result.scales[rows].cpu()
            error = float(result.loss[rows].sum() / signal[rows].sum().clamp(min=1e-30))
            reports.append(LayerReport(f"{prefix}.{name}", error, result.percdamp))
            if on_layer is not None:
                on_layer(reports[-1])

    def stages(layer: Any, hidden: list[Tensor]) -> Iterator[list[Tensor]]:
        """Walks through a decoder layer once, and stops where linear layers get their inputs: those
        of q/k/v, o, gate/up, down; then the layer's output. Weights are read when they are used, so
        whoever rounds them between two stops sends the next ones rounded values."""
        attn, mlp, through = layer.self_attn, layer.mlp, nn.Identity()
        x = [layer.input_layernorm(h.to(device)).to(home) for h in hidden]
        yield x
        o_proj, attn.o_proj = attn.o_proj, through  # returns what o_proj would have been given
        x = [
            attn(hidden_states=a.to(device), **_to(kwargs, device))[0].to(home)
            for a, (_, kwargs) in zip(x, inputs, strict=True)
        ]
        attn.o_proj = o_proj
        yield x
        hidden = [h + o_proj(a.to(device)).to(home) for h, a in zip(hidden, x, strict=True)]
        x = [layer.post_attention_layernorm(h.to(device)).to(home) for h in hidden]
        yield x
        down_proj, mlp.down_proj = mlp.down_proj, through
        x = [mlp(a.to(device)).to(home) for a in x]
        mlp.down_proj = down_proj
        yield x
        yield [h + down_proj(a.to(device)).to(home) for h, a in zip(hidden, x, strict=True)]

    inputs = embed(model, samples)
    hidden = [x for x, _ in inputs]
    home = hidden[0].device
    uncompressed = hidden
    for i, layer in enumerate(tqdm(model.model.layers, desc="GPTQ", unit="layer")):
        layer.to(device)
        originals: list[list[Tensor]] = [[], [], [], []]
        if correcting:
            *originals, uncompressed = stages(layer, uncompressed)
        walk = stages(layer, hidden)
        for names, original in zip(STAGES, originals, strict=True):
            modules = {name: layer.get_submodule(name) for name in names}
            stage(f"model.layers.{i}", modules, next(walk), original)
        hidden = next(walk)
        layer.to(home)
    return scales, reports


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    defaults = gptq.DEFAULTS
    parser = argparse.ArgumentParser(
        prog="gptq/llama2.py", description="Perplexity and GPTQ compression of a Llama."
    )
    parser.add_argument("model", metavar="MODEL", help="folder, GGUF file, or hub name")
    parser.add_argument(
        "--wbits", type=int, choices=(4, 16), default=16, help="4 compresses; 16 (default) does not"
    )
    parser.add_argument(
        "--groupsize", type=int, default=128, help="input features that share a scale; -1 for all"
    )
    parser.add_argument("--save", metavar="DIR", help="folder for the Marlin checkpoint")
    parser.add_argument(
        "--dataset",
        default="wikitext2",
        help="wikitext2, redpajama, c4, or a text FILE to calibrate with",
    )
    parser.add_argument(
        "--eval-dataset",
        help="text to measure perplexity on (default: wikitext2, or the end of FILE)",
    )
    parser.add_argument("--nsamples", type=int, default=128, help="calibration samples")
    parser.add_argument(
        "--seqlen", type=int, default=2048, help="tokens of a sample and of a window"
    )
    parser.add_argument("--eval-windows", type=int, help="windows of the perplexity at most")
    parser.add_argument(
        "--percdamp", type=float, default=defaults.percdamp, help="damping, of H's mean diagonal"
    )
    parser.add_argument(
        "--act-order",
        action=argparse.BooleanOptionalAction,
        default=defaults.act_order,
        help="round columns in the order of falling activations; groups stay what they are",
    )
    parser.add_argument(
        "--static-groups",
        action=argparse.BooleanOptionalAction,
        default=defaults.static_groups,
        help="choose scales before the first column is rounded (always with --act-order)",
    )
    parser.add_argument(
        "--rule", choices=quantize.RULES, default=defaults.rule, help="for the scale of a group"
    )
    parser.add_argument(
        "--passes",
        type=int,
        default=defaults.passes,
        help="refits of the scales, each with a descent",
    )
    parser.add_argument(
        "--correction",
        type=float,
        default=defaults.correction,
        help="share of the error of earlier layers that a layer makes up for",
    )
    parser.add_argument(
        "--nearest", action="store_true", help="round to nearest, without calibration"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the choice of calibration documents"
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="that computes"
    )
    args = parser.parse_args(argv)
    if args.groupsize != -1 and (args.groupsize <= 0 or args.groupsize % 16):
        parser.error(
            f"--groupsize is {args.groupsize} but should be -1 or a positive multiple of 16"
        )
    for name in ("nsamples", "seqlen"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)} but should be at least 1")
    if args.seqlen < 2:
        parser.error(
            "--seqlen is 1 but should be at least 2: the first token of a window is not predicted"
        )
    if args.percdamp < 0:
        parser.error(f"--percdamp is {args.percdamp} but should not be negative")
    if not 0 <= args.correction <= 1:
        parser.error(f"--correction is {args.correction} but should lie in 0..1")
    if args.passes < 0:
        parser.error(f"--passes is {args.passes} but should not be negative")
    if args.save and args.wbits != 4:
        parser.error("--save needs --wbits 4")
    return args


def run(args: argparse.Namespace) -> None:
    """Does what the command line asks for.

    Raises:
        ModelError, data.DataError, gptq.HessianError, checkpoint.CheckpointError: one sentence.
    """
    on_gpu = torch.device(args.device).type == "cuda"
    # Everything that can be missing is looked for before the work, not after.
    eval_source = args.eval_dataset or (
        args.dataset if args.dataset not in data.NAMES else "wikitext2"
    )
    eval_text = data.load_text(eval_source, data.EVALUATION)
    calibrate = args.wbits == 4 and not args.nearest
    text = data.load_text(args.dataset, data.CALIBRATION) if calibrate else []
    if args.save:
        checkpoint.check_target(args.save)
    model, tokenizer = load_model(args.model, torch.float16 if on_gpu else torch.float32)
    check_architecture(model.config, args.seqlen)
    windows = data.evaluation_windows(
        data.tokenize(tokenizer, eval_text), args.seqlen, args.eval_windows, eval_source
    )
    if args.wbits == 16:
        print(
            f"perplexity of {args.model} on {eval_source}: "
            f"{perplexity(model, windows, args.device):.3f}"
        )
        return
    if not calibrate:
        scales = round_model(model, args.groupsize, args.rule)
    else:
        documents = data.tokenize(tokenizer, text)
        samples = data.calibration_samples(
            documents, args.nsamples, args.seqlen, args.seed, args.dataset
        )
        options = gptq.Options(
            groupsize=args.groupsize,
            percdamp=args.percdamp,
            act_order=args.act_order,
            static_groups=args.static_groups,
            rule=args.rule,
            passes=args.passes,
            correction=args.correction,
        )
        scales, _ = compress(
            model,
            samples,
            options,
            args.device,
            on_layer=lambda r: tqdm.write(
                f"{r.name:40s} relative squared error {r.error:.3e}", file=sys.stdout
            ),
        )
    print(
        f"perplexity of {args.model} in 4 bits on {eval_source}: "
        f"{perplexity(model, windows, args.device):.3f}"
    )
    if args.save:
        checkpoint.pack_model(model, scales, args.groupsize)
        checkpoint.save(model, tokenizer, args.save)
        print(f"saved to {args.save}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; an error that the user can mend is one sentence and exit status 1."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        run(args)
    except (
        ModelError,
        data.DataError,
        gptq.HessianError,
        checkpoint.CheckpointError,
    ) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
