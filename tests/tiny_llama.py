"""A random Llama of a few thousand weights, a tokenizer of bytes, and a text to go with them."""

from __future__ import annotations

import pathlib
from typing import Any

import torch


def text(num_words: int = 4000) -> str:
    """Words that repeat in a fixed irregular order, a line of 12 each."""
    words = "the weight of a bridge is what it carries first and every group has one scale".split()
    chosen = [words[(i * i + 3 * i // 2) % len(words)] for i in range(num_words)]
    return "\n".join(" ".join(chosen[i : i + 12]) for i in range(0, num_words, 12))


def tokenizer() -> Any:
    """A tokenizer whose 256 tokens are the bytes, and one that ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)} | {"</s>": len(letters)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return fast


def model(**changes: Any) -> Any:
    """The model, float32; changes go into its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = dict(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=256,
    )
    torch.manual_seed(1)
    made = LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):  # they start as zeros, which would hide a lost bias
            torch.nn.init.normal_(parameter, std=0.05)
        parameter.data = parameter.data.half().float()  # FP16 can hold it
    return made


def folder(where: pathlib.Path, **changes: Any) -> pathlib.Path:
    """The model and its tokenizer, saved."""
    model(**changes).half().save_pretrained(where)
    tokenizer().save_pretrained(where)
    return where
