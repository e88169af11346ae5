"""Makes transformers know of Marlin checkpoints, as soon as it is imported and not before.

Importing transformers takes seconds, which `import marlin` should not cost those who do not use it.
So if it is not there yet, a finder waits for the module with its table of methods, lets the others
find it, and registers once it has run. Depends on nothing; marlin/__init__.py calls install.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Sequence
from types import ModuleType

TABLE = "transformers.quantizers.auto"
METHOD = "marlin"
log = logging.getLogger("marlin")


def install() -> None:
    """Registers the method with transformers: now if that has been imported, else when it is."""
    if TABLE in sys.modules:
        register(sys.modules[TABLE])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def register(table: ModuleType) -> None:
    """Registers the method; again does nothing.

    Args:
        table: the module transformers.quantizers.auto.
    """
    if METHOD in table.AUTO_QUANTIZER_MAPPING:
        return
    from .transformers import MarlinConfig, MarlinQuantizer

    table.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = MarlinConfig
    table.AUTO_QUANTIZER_MAPPING[METHOD] = MarlinQuantizer


class _Loader(importlib.abc.Loader):
    """Runs a module as its own loader would, then registers."""

    def __init__(self, inner: importlib.abc.Loader):
        self.inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        try:
            register(module)
        except Exception as error:  # importing transformers must not fail for our sake
            log.warning("marlin: not registered with this transformers: %s", error)


class _Finder(importlib.abc.MetaPathFinder):
    """Waits for one module."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != TABLE:
            return None
        sys.meta_path.remove(self)  # so that the others are asked
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec
