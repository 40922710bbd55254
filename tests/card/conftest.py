"""Where the tests of this folder run: on a CUDA device, on the CPU with ``--smoke``, and else not at all."""

from __future__ import annotations

import pytest
import torch

from tests.card.both import Place


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--smoke",
        action="store_true",
        help="run the tests for a card on the CPU: what they compare is proven, the card is not",
    )


def _is_smoke(config: pytest.Config) -> bool:
    # Known only where this folder was named on the command line.
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
    """What is compared with the CPU."""
    return Place(torch.device("cpu" if _is_smoke(request.config) else "cuda"))
