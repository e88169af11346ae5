"""The tables of README.md and docs/checkpoints.md are what docs/tables.py makes of the code."""

from __future__ import annotations

import importlib.util
import pathlib
import re
from typing import Any

import pytest

from marlin import support
from marlin.checkpoint import write

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tables() -> Any:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "page, names", [("README.md", "run read write"), ("docs/checkpoints.md", "read write")]
)
def test_the_tables_say_what_the_code_does(page: str, names: str, tables: Any) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert re.findall(r"<!-- table (\w+) -->", text) == names.split()
    assert tables.filled(text) == text, f"{page} is stale: run python docs/tables.py"


def test_the_tables_follow_the_code(tables: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tables.run_table(), tables.write_table()
    monkeypatch.setattr(support, "GPU_GROUPS", (32,))
    monkeypatch.setattr(write, "WRITTEN", ("marlin", "gptq"))
    assert "| one, 32 |" in tables.run_table() != before[0]
    assert "| compressed-tensors | no |" in tables.write_table() != before[1]


def test_every_format_and_kernel_file_has_a_row(tables: Any) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for form in tables.FORMATS:
        assert text.count(f"\n| {form} |") == 2, form
    for kernel in (ROOT / "csrc").glob("marlin_*.cu"):
        assert f"`csrc/{kernel.name}`" in text
