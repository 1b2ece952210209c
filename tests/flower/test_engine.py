from __future__ import annotations

import importlib.util
import tomllib
from typing import TYPE_CHECKING

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedtune.errors import ConfigError
from fedtune.flower.engine import _write_app, check_backend, run

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def test_an_unknown_backend_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError) as caught:
        check_backend("spark")
    assert caught.value.code == "config.unknown-backend"
    assert "inprocess, ray" in caught.value.message
    assert caught.value.hint == "run.backend=inprocess"


def test_ray_without_ray_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else find(name))
    with pytest.raises(ConfigError) as caught:
        check_backend("ray")
    assert caught.value.code == "config.missing-extra"
    assert "fedtune[ray]" in caught.value.hint
    check_backend("inprocess")


def test_in_process_both_halves_see_the_same_run_configuration() -> None:
    seen: list[Mapping[str, object]] = []
    server, client = ServerApp(), ClientApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        seen.append(dict(context.run_config))
        return Message(RecordDict(), reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        seen.append(dict(context.run_config))
        nodes = list(grid.get_node_ids())
        assert len(nodes) == 2
        list(grid.send_and_receive([grid.create_message(RecordDict(), "train", node, "1") for node in nodes]))

    run("inprocess", server, client, 2, {"plan": "text"})
    assert seen == [{"plan": "text"}] * 3


def test_an_error_of_the_coordinator_is_not_swallowed() -> None:
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        raise ConfigError("bad-plan", "no")

    with pytest.raises(ConfigError, match="bad-plan"):
        run("inprocess", server, ClientApp(), 1, {})


def test_a_plan_of_any_characters_reaches_the_sites_of_the_ray_engine_unchanged(tmp_path: Path) -> None:
    plan = '{"name":"é 😀 \\u0000 \x7f \\\\ \'\'\' \\""}'
    _write_app(tmp_path, {"plan": plan})
    written = tomllib.loads((tmp_path / "pyproject.toml").read_text("utf-8"))
    assert written["tool"]["flwr"]["app"]["config"] == {"plan": plan}
