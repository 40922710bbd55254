"""Run the tests of this folder on a CUDA device, or on the CPU with ``--smoke``; otherwise skip them."""

from __future__ import annotations

import pytest
import torch

from tests.card.both import Place


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--smoke",
        action="store_true",
        help="run the tests for a GPU on the CPU: this tests the comparisons, not the GPU",
    )


def _is_smoke(config: pytest.Config) -> bool:
    # The option exists only where this folder was named on the command line.
    return bool(config.getoption("--smoke", default=False))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or _is_smoke(config):
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; make test-card ARGS=--smoke runs it on the CPU")
    for item in items:
        if item.get_closest_marker("card"):
            item.add_marker(skip)


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Place:
    """The device that is compared with the CPU."""
    return Place(torch.device("cpu" if _is_smoke(request.config) else "cuda"))
