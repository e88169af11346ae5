"""The four formats: what is read is what the format's document says, and what is written reads
back bit for bit."""

from __future__ import annotations

import hashlib
import json
import pathlib
from typing import Any

import formats
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import marlin
from marlin import checkpoint
from marlin.checkpoint import awq, compressed_tensors, gptq
from marlin.checkpoint import marlin as marlin_format
from marlin.checkpoint.config import Scheme, Spec
from marlin.checkpoint.files import NAMES, Entry, Shards
from marlin.checkpoint.record import (
    Linear,
    Record,
    check_entries,
    pack_first,
    pack_last,
    unpack_first,
    unpack_last,
)

FIXTURES = pathlib.Path(__file__).resolve().parent / "fixtures"
SCHEMES = {
    "gptq": (gptq, Scheme("gptq", pathlib.Path("config.json"), None, zero_offset=1)),
    "gptq-v2": (gptq, Scheme("gptq", pathlib.Path("config.json"), None, zero_offset=0)),
    "awq": (awq, Scheme("awq", pathlib.Path("config.json"), None)),
    "ct": (compressed_tensors, Scheme("compressed-tensors", pathlib.Path("config.json"), None)),
    "marlin": (marlin_format, Scheme("marlin", pathlib.Path("config.json"), None)),
}


def in_memory(tensors: dict[str, torch.Tensor]) -> Shards:
    file = pathlib.Path("model.safetensors")
    entries = {k: Entry(file, tuple(t.shape), NAMES[t.dtype]) for k, t in tensors.items()}
    return Shards(entries, tensors)


def read(kind: str, tensors: dict[str, torch.Tensor], n: int, k: int, spec: Spec) -> Record:
    """Reads the tensors of the layer "x" as a checkpoint's are: headers first."""
    codec, scheme = SCHEMES[kind]
    shards = in_memory({f"x.{key}": tensor for key, tensor in tensors.items()})
    check_entries(shards, "x", codec.expected("x", k, n, spec))
    result: Record = codec.read(shards, "x", Linear(k, n, spec, False), scheme, "cpu")
    return result


def same(record: Record, layer: formats.Truth) -> None:
    assert torch.equal(record.q, torch.from_numpy(layer.q.astype(np.uint8)))
    assert torch.equal(record.scales, layer.s) and record.scales.dtype == layer.s.dtype
    zeros = record.zeros if record.zeros is not None else torch.full(layer.z.shape, 8)
    assert np.array_equal(zeros.numpy().astype(int), layer.z)
    plain = np.arange(record.k) // (record.k if layer.groupsize == -1 else layer.groupsize)
    order = plain if record.g_idx is None else record.g_idx.numpy()
    assert np.array_equal(order, layer.g_idx)
    if layer.bias is None:
        assert record.bias is None
    else:
        assert record.bias is not None and torch.equal(record.bias, layer.bias)
    assert record.groupsize == layer.groupsize


def equal(a: Record, b: Record) -> None:
    for name in ("q", "scales", "zeros", "g_idx", "bias"):
        ours, theirs = getattr(a, name), getattr(b, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
    assert a.groupsize == b.groupsize


# Sizes: of one word, odd multiples of one, a last group that is shorter.
SIZES = [(8, 16, -1), (8, 16, 16), (24, 40, -1), (136, 176, 16), (64, 176, 64), (40, 512, 128)]


# --------------------------------------------------------------------------------------------------
# Reading, against encoders that place one number at a time
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, k, groupsize", SIZES)
@pytest.mark.parametrize("kind", ["gptq", "gptq-v2"])
@pytest.mark.parametrize("zeros, act_order", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gptq_is_read(
    kind: str, n: int, k: int, groupsize: int, zeros: bool, act_order: bool, dtype: torch.dtype
) -> None:
    layer = formats.truth(n, k, groupsize, zeros, act_order, bias=zeros, dtype=dtype)
    tensors = formats.gptq(layer, 2 if kind == "gptq-v2" else 1)
    record = read(kind, tensors, n, k, Spec(groupsize, not zeros, act_order))
    same(record, layer)
    assert torch.equal(record.dense().double(), layer.dense())


@pytest.mark.parametrize("n, k, groupsize", [*SIZES, (8, 17, -1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_awq_is_read(n: int, k: int, groupsize: int, dtype: torch.dtype) -> None:
    layer = formats.truth(n, k, groupsize, True, bias=True, dtype=dtype)
    same(read("awq", formats.awq(layer), n, k, Spec(groupsize, False)), layer)


@pytest.mark.parametrize("n, k, groupsize", [*SIZES, (1, 1, -1), (17, 33, 16), (15, 131, 64)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_compressed_tensors_is_read(
    n: int, k: int, groupsize: int, symmetric: bool, act_order: bool
) -> None:
    layer = formats.truth(n, k, groupsize, not symmetric, act_order)
    tensors = formats.compressed_tensors(layer, symmetric, act_order)
    same(read("ct", tensors, n, k, Spec(groupsize, symmetric, act_order)), layer)


def test_zero_points_of_the_first_compressed_tensors_are_read() -> None:
    layer = formats.truth(24, 64, 16, zeros=True)
    tensors = formats.compressed_tensors(layer, symmetric=False)
    tensors["weight_zero_point"] = torch.from_numpy((layer.z - 8).astype(np.int8))
    codec, scheme = SCHEMES["ct"]
    shards = in_memory({f"x.{key}": tensor for key, tensor in tensors.items()})
    spec = Spec(16, symmetric=False)
    check_entries(shards, "x", codec.expected_of(shards, "x", 64, 24, spec))
    same(codec.read(shards, "x", Linear(64, 24, spec, False), scheme, "cpu"), layer)


def test_a_first_version_zero_point_of_0_borrows_from_its_neighbour() -> None:
    layer = formats.truth(8, 16, zeros=True)
    layer.z[:, 0] = [0, 3, 0, 0, 15, 8, 0, 1]
    same(read("gptq", formats.gptq(layer), 8, 16, Spec(-1, False)), layer)


@pytest.mark.parametrize("size", [1, 7, 8, 15, 33])
def test_nibbles_go_into_words_and_come_out(size: int) -> None:
    q = torch.randint(0, 16, (3, size), dtype=torch.uint8)
    assert torch.equal(unpack_last(pack_last(q), size), q)
    tall = torch.randint(0, 16, (8 * size, 5), dtype=torch.uint8)
    assert torch.equal(unpack_first(pack_first(tall)), tall)


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, k, groupsize", SIZES)
@pytest.mark.parametrize("zeros", [False, True])
def test_what_is_written_is_what_the_encoders_write(
    n: int, k: int, groupsize: int, zeros: bool
) -> None:
    layer = formats.truth(n, k, groupsize, zeros, bias=True)
    record = read("gptq", formats.gptq(layer), n, k, Spec(groupsize, not zeros))
    for written, expected in (
        (gptq.write("x", record), formats.gptq(layer)),
        (gptq.write("x", record, 2), formats.gptq(layer, 2)),
        (compressed_tensors.write("x", record), formats.compressed_tensors(layer, not zeros)),
    ):
        assert set(written) == {f"x.{key}" for key in expected}
        for key, tensor in expected.items():
            assert torch.equal(written[f"x.{key}"], tensor), key
            assert written[f"x.{key}"].is_contiguous() and written[f"x.{key}"].dtype == tensor.dtype


def test_act_order_is_written_by_gptq_and_refused_by_compressed_tensors() -> None:
    layer = formats.truth(24, 64, 16, True, act_order=True)
    record = read("gptq", formats.gptq(layer), 24, 64, Spec(16, False, True))
    assert torch.equal(gptq.write("x", record)["x.g_idx"], formats.gptq(layer)["g_idx"])
    with pytest.raises(checkpoint.CheckpointError, match="x has act-order .* write gptq or marlin"):
        compressed_tensors.write("x", record)


def test_sizes_that_gptq_and_awq_do_not_have_are_refused() -> None:
    record = Record(torch.zeros(17, 33, dtype=torch.uint8), torch.ones(17, 1).half())
    with pytest.raises(checkpoint.CheckpointError, match="x is 33 x 17|x is 17 x 33"):
        gptq.write("x", record)
    with pytest.raises(checkpoint.CheckpointError, match="x has 17 output features"):
        awq.expected("x", 33, 17, Spec(-1))


# --------------------------------------------------------------------------------------------------
# Files of the libraries
# --------------------------------------------------------------------------------------------------

MADE = sorted(path.name for path in FIXTURES.iterdir() if (path / "config.json").is_file())


def expected_of(name: str) -> tuple[dict[str, str], torch.Tensor]:
    """What the library that wrote a fixture computes: sums of the dense weights, logits."""
    with safetensors.safe_open(FIXTURES / name / "expected.safetensors", "pt") as file:
        return json.loads(file.metadata()["sha256"]), file.get_tensor("logits")


def test_there_is_a_fixture_of_every_kind() -> None:
    assert {"gptq", "gptq-act-order", "gptq-v2", "gptq-dynamic", "awq"} <= set(MADE)
    assert {"ct-group", "ct-asym", "ct-channel", "ct-act-order"} <= set(MADE)


@pytest.mark.parametrize("name", MADE)
def test_dense_weights_are_those_that_the_writing_library_computes(name: str) -> None:
    sums, _ = expected_of(name)
    read = checkpoint.open_checkpoint(FIXTURES / name)
    assert set(read.linears) == set(sums)
    for layer, expected in sums.items():
        # An exact product rounded once, to the type of the model: the same whoever computes it.
        dtype = torch.bfloat16 if name == "ct-asym" else torch.float16
        dense = read.record(layer).dense().to(dtype).half().contiguous() + 0.0
        assert hashlib.sha256(dense.numpy().tobytes()).hexdigest() == expected, layer


@pytest.mark.parametrize("name", MADE)
def test_each_tensor_goes_where_its_layer_is_to_be(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cpu", 0)  # another name of the default, which tells the two apart
    asked: dict[str, Any] = {}
    read = Shards.read

    def watched(self: Shards, key: str, where: torch.device | str = "cpu") -> torch.Tensor:
        asked[key] = where
        return read(self, key, where)

    monkeypatch.setattr(Shards, "read", watched)
    opened = checkpoint.open_checkpoint(FIXTURES / name)
    for linear in opened.linears:
        opened.layer(linear, device)
    elsewhere = {key.rpartition(".")[2] for key, where in asked.items() if where is not device}
    assert len(asked) > len(opened.linears) and elsewhere <= {"weight_shape"}


class OnTheCPU(TorchDispatchMode):
    """Collects the operations with a result on the CPU that is not tiny."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type == "cpu" and result.numel() > 64:
            self.names.add(func._schema.name)
        return result


@pytest.mark.gpu
@pytest.mark.parametrize("name", MADE)
def test_a_gpu_repacks_to_the_bytes_of_the_cpu_and_without_it(name: str) -> None:
    opened = checkpoint.open_checkpoint(FIXTURES / name)
    for linear in opened.linears:
        there = opened.layer(linear)
        options = (there.s.dtype, there.z is not None, there.perm is not None)
        group = -1 if there.groupsize == there.k else there.groupsize
        if not marlin.can_run(there.k, there.n, group, *options, device="cuda"):
            pytest.skip(f"no kernel runs the layers of {name} on this GPU")
        with OnTheCPU() as seen:
            here = opened.layer(linear, "cuda")
        assert seen.names <= {"aten::empty", "aten::view", "aten::detach"}  # the bytes of a file
        for key, value in there.state_dict().items():
            assert torch.equal(here.state_dict()[key].cpu(), value), key
