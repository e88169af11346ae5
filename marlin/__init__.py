"""Products of 16-bit activations with 4-bit weights, and the layers built on them.

Depends on torch and on the extension module marlin._C, which setup.py builds.
"""

import torch  # noqa: F401  # first: _C needs its libraries

try:
    from . import _C
except ImportError as error:
    if "_C" not in str(error):
        raise
    raise ImportError(
        "marlin: the extension marlin._C is not built; run pip install --no-build-isolation . "
        "or, to run from the source tree, python setup.py build_ext --inplace"
    ) from error

from . import checkpoint, quantize
from .checkpoint import load
from .integrations.register import install as _install
from .layer import Layer, Values, replace_linear
from .layout import pack_weights, permute_scales, unpack_weights, unpermute_scales
from .ops import linear, mul
from .support import can_run

__version__ = "0.1.0"

_install()

__all__ = [
    "Layer",
    "Values",
    "_C",
    "__version__",
    "can_run",
    "checkpoint",
    "linear",
    "load",
    "mul",
    "pack_weights",
    "permute_scales",
    "quantize",
    "replace_linear",
    "unpack_weights",
    "unpermute_scales",
]
