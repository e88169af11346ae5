"""Marlin checkpoints in the lm-evaluation-harness (0.4.x): the model type "marlin".

Importing this module registers it. gptq/eval.py is the caller; in a script of your own:

    import marlin.integrations.lm_eval
    lm_eval.simple_evaluate(model="marlin", model_args="pretrained=DIR", tasks=["hellaswag"])
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from .. import checkpoint


@register_model("marlin")
class MarlinLM(HFLM):
    """The harness's own model class around a model that marlin.checkpoint.load builds.

    Args:
        pretrained: folder of the checkpoint.
        tokenizer: folder or hub name of another tokenizer than the checkpoint's.
        device: "cpu", "cuda", "cuda:1"; a GPU that is not there becomes the CPU, as in the harness.
        dtype: of the activations: "float16", "bfloat16", "float32"; "auto" is what checkpoint.load
            takes for the device.
        kwargs: as of HFLM, e.g. batch_size, max_length, add_bos_token.

    Raises:
        marlin.checkpoint.CheckpointError: the checkpoint cannot be read.
    """

    def __init__(
        self,
        pretrained: str,
        tokenizer: str | None = None,
        device: str | None = None,
        dtype: str | torch.dtype = "auto",
        **kwargs: Any,
    ) -> None:
        if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if isinstance(dtype, str):
            named = None if dtype == "auto" else getattr(torch, dtype, None)
            if dtype != "auto" and not isinstance(named, torch.dtype):
                raise ValueError(
                    f"marlin.integrations.lm_eval: dtype is {dtype!r}, which torch does not have"
                )
        else:
            named = dtype
        model = checkpoint.load(pretrained, device, named)
        super().__init__(
            pretrained=model,
            tokenizer=transformers.AutoTokenizer.from_pretrained(tokenizer or pretrained),
            **kwargs,
        )
