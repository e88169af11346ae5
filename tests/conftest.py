"""Fixtures and markers that all tests share; reference.py makes the problems and what they should
give."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import marlin


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the GPU tests, with the reason, on a machine or build that cannot run them."""
    if not marlin._C.has_cuda():
        reason = "this build of marlin has no CUDA kernels"
    elif not torch.cuda.is_available():
        reason = "there is no CUDA GPU"
    else:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Each device that the test's body should hold on."""
    return str(request.param)


@pytest.fixture
def isa() -> Iterator[None]:
    """Put the CPU instruction set back after a test that changes it."""
    before = marlin._C.cpu_isa()
    yield
    marlin._C.set_cpu_isa(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
