"""The exchange waits for nodes that are still connecting, and no longer than it must."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from flwr.clientapp import ClientApp

from fedtune.flower.grid import InProcessGrid
from fedtune_server import exchange as exchange_module
from fedtune_server.exchange import Exchange, Traffic

if TYPE_CHECKING:
    from collections.abc import Iterable


class Arriving(InProcessGrid):
    """A grid on which one more node is connected each time somebody looks, as when Flower's engine starts."""

    def __init__(self, nodes: int) -> None:
        super().__init__(ClientApp(), nodes, {})
        self.connected = 0

    def get_node_ids(self) -> Iterable[int]:
        self.connected += 1
        return list(super().get_node_ids())[: self.connected]


def test_nodes_that_connect_one_by_one_all_take_part() -> None:
    assert len(Exchange(Arriving(5), 10.0, Traffic()).nodes(5)) == 5


def test_nodes_that_never_connect_are_not_waited_for_longer_than_the_deadline() -> None:
    began = time.monotonic()
    assert len(Exchange(Arriving(3), 0.2, Traffic()).nodes(4)) == 3
    assert time.monotonic() - began < 5


def test_nor_longer_than_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    assert exchange_module._PATIENCE_SECONDS == 60
    monkeypatch.setattr(exchange_module, "_PATIENCE_SECONDS", 0.1)
    assert len(Exchange(Arriving(3), 3600.0, Traffic()).nodes(4)) == 3
