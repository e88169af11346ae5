"""Checkpoints of compressed models: safetensors, plain JSON, no pickle.

    model = marlin.checkpoint.load(directory)          # a transformers model on marlin.Layer
    marlin.checkpoint.save(model, tokenizer, directory)

Depends on safetensors, and on transformers when a model is built.
"""

from .marlin import CheckpointError, check_target, load, pack_model, save

__all__ = ["CheckpointError", "check_target", "load", "pack_model", "save"]
