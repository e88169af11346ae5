"""Files that are written here are read by the libraries that made the formats.

Optional: needs compressed-tensors and GPTQModel, which a developer's environment does not have; in
one that has them and tests/fixtures/make.py's versions, run this file alone.
"""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import test_formats
import torch

from marlin import checkpoint


def tokenizer() -> Any:
    """GPTQModel does not read a model without one."""
    import transformers
    from tokenizers import Tokenizer, models

    inner = Tokenizer(models.WordLevel(vocab={"</s>": 0}, unk_token="</s>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", pad_token="</s>"
    )


def expected_weights(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    read = checkpoint.open_checkpoint(folder)
    return {name: read.record(name).dense().half() for name in read.linears}


@pytest.mark.parametrize("name", ["gptq", "gptq-v2", "awq", "ct-group", "ct-asym", "ct-channel"])
def test_compressed_tensors_reads_what_is_converted_for_it(
    name: str, tmp_path: pathlib.Path
) -> None:
    pytest.importorskip("compressed_tensors")
    import transformers

    source = test_formats.FIXTURES / name
    checkpoint.convert(source, tmp_path / "ct", "compressed-tensors")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ct",
        dtype=torch.float16,
        quantization_config=transformers.CompressedTensorsConfig(run_compressed=False),
    )
    for layer, weight in expected_weights(source).items():
        # it multiplies in the type of the scales, which ct-asym has in BF16
        exact = name != "ct-asym"
        found = model.get_submodule(layer).weight
        assert torch.allclose(found, weight, rtol=0 if exact else 2**-8, atol=0), layer


@pytest.mark.parametrize("name", ["gptq", "gptq-act-order", "gptq-v2", "gptq-dynamic", "ct-group"])
def test_gptqmodel_reads_what_is_converted_for_it(name: str, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("gptqmodel")
    from gptqmodel import BACKEND, GPTQModel

    source = test_formats.FIXTURES / name
    checkpoint.convert(source, tmp_path / "gptq", "gptq")
    tokenizer().save_pretrained(tmp_path / "gptq")
    model = GPTQModel.load(
        str(tmp_path / "gptq"), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16
    ).model
    for layer, weight in expected_weights(source).items():
        module = model.get_submodule(layer)
        found = module(torch.eye(module.in_features, dtype=torch.float16)).t()
        assert torch.equal(found, weight), layer
