"""The exchange waits for nodes that are still connecting, and no longer than it must."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.clientapp import ClientApp

from fedtune.flower.grid import InProcessGrid
from fedtune_server import exchange as exchange_module
from fedtune_server.exchange import Exchange, Traffic
from fedtune_server.witness import Witness

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


class Arriving(InProcessGrid):
    """A grid on which one more node is connected each time somebody looks, as when Flower's engine starts."""

    def __init__(self, nodes: int) -> None:
        super().__init__(ClientApp(), nodes, {})
        self.connected = 0

    def get_node_ids(self) -> Iterable[int]:
        self.connected += 1
        return list(super().get_node_ids())[: self.connected]


def exchange(nodes: int, deadline: float, folder: Path) -> Exchange:
    return Exchange(Arriving(nodes), deadline, Traffic(), Witness(folder, Ed25519PrivateKey.generate()))


def test_nodes_that_connect_one_by_one_all_take_part(tmp_path: Path) -> None:
    assert len(exchange(5, 10.0, tmp_path).nodes(5)) == 5


def test_nodes_that_never_connect_are_not_waited_for_longer_than_the_deadline(tmp_path: Path) -> None:
    began = time.monotonic()
    assert len(exchange(3, 0.2, tmp_path).nodes(4)) == 3
    assert time.monotonic() - began < 5


def test_nor_longer_than_a_minute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert exchange_module._PATIENCE_SECONDS == 60
    monkeypatch.setattr(exchange_module, "_PATIENCE_SECONDS", 0.1)
    assert len(exchange(3, 3600.0, tmp_path).nodes(4)) == 3
