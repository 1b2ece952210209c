"""A grid must have set the task identity before any Flower message can be made."""

from collections.abc import Callable

import pytest
from flwr.clientapp import ClientApp

from fedtune.flower.grid import InProcessGrid

MakeGrid = Callable[..., InProcessGrid]


@pytest.fixture(autouse=True)
def identity() -> None:
    InProcessGrid(ClientApp(), 1, {})


@pytest.fixture
def make_grid() -> MakeGrid:
    """Return a maker of grids whose sites all run one train function."""

    def make(train: Callable[..., object], nodes: int = 3) -> InProcessGrid:
        app = ClientApp()
        app.train()(train)  # type: ignore[arg-type]
        return InProcessGrid(app, nodes, {"plan": "p"})

    return make
