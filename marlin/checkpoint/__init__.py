"""Checkpoints of compressed models: read in four formats, written in three, and no pickle that can
run code.

    model = marlin.load(directory)                       # a transformers model on marlin.Layer
    marlin.checkpoint.save(model, tokenizer, directory)
    marlin.checkpoint.convert(directory, other, "gptq")

config.py and files.py read what a folder holds; record.py is a layer in no format; marlin.py,
gptq.py, awq.py and compressed_tensors.py turn it into tensors and back; model.py loads, write.py
saves and converts. Depends on safetensors to write, and on transformers when a model is built.
"""

from .errors import CheckpointError
from .model import Checkpoint, load, open_checkpoint
from .record import Record
from .write import check_target, convert, pack_model, save

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Record",
    "check_target",
    "convert",
    "load",
    "open_checkpoint",
    "pack_model",
    "save",
]
