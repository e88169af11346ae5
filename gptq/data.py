"""Calibration and evaluation text: a local file, or wikitext2, redpajama, c4 through `datasets`.

llama2.py, eval.py and examples/demo.py are the callers. The two parts of a text never overlap: a
data set that has splits of its own is used by them, any other text is cut by position.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

NAMES = ("wikitext2", "redpajama", "c4")
CALIBRATION, EVALUATION = "calibration", "evaluation"

# Of a text without splits, the last tenth is for evaluation.
EVALUATION_FRACTION = 0.1
# Documents taken from a corpus of web pages: enough for 128 samples of 4096 tokens, seconds to
# tokenise.
MAX_DOCUMENTS = {CALIBRATION: 4000, EVALUATION: 1100}


class DataError(Exception):
    """Text that is missing or too short; the message is one sentence for the user."""


def load_text(source: str, part: str) -> list[str]:
    """Reads the documents of one part of a text.

    Args:
        source: wikitext2, redpajama, c4, or the path of a local text file (UTF-8).
        part: "calibration" or "evaluation".

    Returns:
        Documents; a continuous text (wikitext2, a file) is one document.

    Raises:
        DataError: there is no such file, or `datasets` is missing or cannot fetch it.
    """
    if source in NAMES:
        return _load_corpus(source, part)
    path = pathlib.Path(source)
    if not path.is_file():
        raise DataError(f"gptq: {source} is neither a text file nor one of {', '.join(NAMES)}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"gptq: {source} cannot be read as UTF-8 text: {error}") from error
    return [split_text(text, part)]


def split_text(text: str, part: str) -> str:
    """Cuts a text by position: all but the last tenth to calibrate with, the last tenth, from its
    next line on, to evaluate on."""
    cut = int(len(text) * (1 - EVALUATION_FRACTION))
    newline = text.find("\n", cut)
    cut = cut if newline < 0 else newline + 1
    return text[:cut] if part == CALIBRATION else text[cut:]


def _load_corpus(source: str, part: str) -> list[str]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"gptq: {source} needs the package datasets (pip install datasets); a local text file "
            "does not"
        ) from error
    calibrate = part == CALIBRATION
    try:
        if source == "wikitext2":
            rows = datasets.load_dataset(
                "Salesforce/wikitext", "wikitext-2-raw-v1", split="train" if calibrate else "test"
            )
            return ["\n\n".join(rows["text"])]
        if source == "c4":
            name, file = (
                ("train", "en/c4-train.00000-of-01024.json.gz")
                if calibrate
                else ("validation", "en/c4-validation.00000-of-00008.json.gz")
            )
            rows = datasets.load_dataset("allenai/c4", data_files={name: file}, split=name)
        else:
            # The hub's own conversion: the repository itself is a script, which datasets 4 and
            # later refuse to run.
            rows = datasets.load_dataset(
                "togethercomputer/RedPajama-Data-1T-Sample",
                revision="refs/convert/parquet",
                split="train",
            )
        begin, end = 0, len(rows)
        if source == "redpajama":  # it has one split: the last tenth is for evaluation
            cut = int(len(rows) * (1 - EVALUATION_FRACTION))
            begin, end = (0, cut) if calibrate else (cut, len(rows))
        return list(rows[begin : min(end, begin + MAX_DOCUMENTS[part])]["text"])
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"gptq: {source} could not be fetched through datasets ({reason}); give a local text "
            "file instead"
        ) from error


def tokenize(tokenizer: Any, documents: Sequence[str]) -> list[Tensor]:
    """Documents to tokens, each (length,) int64, without the warning that a text is longer than the
    model's context."""
    return [
        torch.tensor(
            tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"], dtype=torch.int64
        )
        for text in documents
        if text.strip()
    ]


def calibration_samples(
    documents: Sequence[Tensor], nsamples: int, seqlen: int, seed: int = 0, source: str = "the text"
) -> list[Tensor]:
    """Takes samples to calibrate with.

    A continuous text gives windows of seqlen that do not overlap, spread evenly over it. A corpus
    gives random documents, one sample each: a random window of a long one, all of a short one, so
    that the lengths of the samples differ.

    Args:
        documents: tokens of each document (length,) int64.
        nsamples: samples wanted.
        seqlen: tokens of a sample at most.
        seed: of the choice among documents.
        source: named in errors.

    Returns:
        nsamples tensors (1, length) int64.

    Raises:
        DataError: there is too little text.
    """
    if len(documents) == 1:
        tokens = documents[0]
        available = len(tokens) // seqlen
        if available < nsamples:
            raise DataError(
                f"gptq: {source} has {len(tokens)} tokens to calibrate with, but {nsamples} "
                f"samples of {seqlen} need "
                f"{nsamples * seqlen}: give more text, or lower --nsamples or --seqlen"
            )
        starts = [i * (len(tokens) - seqlen) // max(1, nsamples - 1) for i in range(nsamples)]
        return [tokens[start : start + seqlen][None] for start in starts]
    # A handful of tokens tells nothing about a layer, only about the beginning of a text.
    usable = [tokens for tokens in documents if len(tokens) >= min(32, seqlen)]
    if len(usable) < nsamples:
        raise DataError(
            f"gptq: {source} has {len(usable)} documents to calibrate with, but {nsamples} samples "
            "are asked for: "
            "give more text, or lower --nsamples"
        )
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for idx in torch.randperm(len(usable), generator=generator)[:nsamples].tolist():
        tokens = usable[idx]
        start = int(torch.randint(0, max(1, len(tokens) - seqlen + 1), (1,), generator=generator))
        samples.append(tokens[start : start + seqlen][None])
    return samples


def evaluation_windows(
    documents: Sequence[Tensor], seqlen: int, limit: int | None = None, source: str = "the text"
) -> list[Tensor]:
    """Cuts text into full windows to measure perplexity on.

    Args:
        documents: tokens of each document (length,) int64; several are joined.
        seqlen: tokens of a window.
        limit: windows at most.
        source: named in errors.

    Returns:
        Tensors (1, seqlen) int64.

    Raises:
        DataError: there is not one full window.
    """
    tokens = torch.cat(list(documents)) if documents else torch.empty(0, dtype=torch.int64)
    count = len(tokens) // seqlen
    if count == 0:
        raise DataError(
            f"gptq: {source} has {len(tokens)} tokens to evaluate on, but one window needs "
            f"{seqlen}: give more text, or "
            "lower --seqlen"
        )
    count = count if limit is None else min(count, limit)
    return [tokens[i * seqlen : (i + 1) * seqlen][None] for i in range(count)]
