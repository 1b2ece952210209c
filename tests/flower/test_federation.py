"""A federation of real processes on loopback: SuperLink, SuperNodes, executors; TLS with client certificates."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedtune.flower.bundle import build
from fedtune.flower.submission import RunFacts
from tests.support.federation import Federation, wait_for
from tests.support.toy_apps import CANARY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    made = Federation.make(tmp_path_factory.mktemp("federation"))
    try:
        made.start_link()
        for name in ("a", "b"):
            made.start_node(name)
            made.start_site_executor(name)
        made.start_coordinator_executor()
        yield made
    finally:
        made.close()


def run(federation: Federation, **plan: Any) -> tuple[RunFacts, list[dict[str, Any]]]:
    """Run a plan of the toy apps to its end."""
    out = federation.folder / "out.json"
    out.unlink(missing_ok=True)
    with federation.control() as control:
        number = control.start(build(json.dumps({"nodes": 2, "size": 1000, "out": str(out), **plan})))
        wait_for(lambda: control.run(number).status == "finished", 90)
        facts = control.run(number)
    return facts, json.loads(out.read_text()) if out.exists() else []


def everything_written(federation: Federation) -> bytes:
    files = (path for path in federation.folder.rglob("*") if path.is_file())
    return b"".join(path.read_bytes() for path in files)


def test_a_study_runs_over_tls_and_nothing_is_looked_up_outside(federation: Federation) -> None:
    facts, answers = run(federation, size=3_000_000)  # several of Flower's pieces of 5 MiB
    assert facts.outcome == "completed"
    expected = pytest.approx(2 * 2_999_999 * 3_000_000 / 2, rel=1e-6)
    assert answers == [{"sum": expected, "keys": "plan"}] * 2
    assert not federation.lookups.exists()


@pytest.mark.parametrize(("fail", "reason"), [("code", "data.missing-column"), ("text", "site.internal")])
def test_what_a_site_raises_arrives_as_a_code_and_its_text_nowhere(
    federation: Federation, fail: str, reason: str
) -> None:
    facts, answers = run(federation, fail=fail)
    assert answers == [{"error": 2, "reason": reason}] * 2
    assert facts.outcome == "completed"
    assert CANARY.encode() not in everything_written(federation)


def test_what_the_coordinators_app_raises_ends_the_run_with_a_code(federation: Federation) -> None:
    facts, _ = run(federation, fail="coordinator")
    assert (facts.outcome, facts.details) == ("failed", "coordinator.internal")
    assert CANARY.encode() not in everything_written(federation)


def test_a_run_outlives_a_superlink_that_is_killed(federation: Federation, tmp_path: Path) -> None:
    touched, out = tmp_path / "touched", federation.folder / "out.json"
    out.unlink(missing_ok=True)
    plan = {"nodes": 2, "size": 10, "out": str(out), "fail": "pause", "touch": str(touched)}
    with federation.control() as control:
        number = control.start(build(json.dumps(plan)))
    wait_for(lambda: len(list(touched.parent.glob("touched.*"))) == 2)
    assert federation.end("link", signal.SIGKILL) == -signal.SIGKILL
    federation.start_link()
    with federation.control() as control:
        wait_for(lambda: control.run(number).status == "finished", 90)
        assert control.run(number).outcome == "completed"
    assert len(json.loads(out.read_text())) == 2


def test_a_supernode_that_is_killed_is_heard_of_at_once_and_comes_back(federation: Federation, tmp_path: Path) -> None:
    touched, out = tmp_path / "touched", federation.folder / "out.json"
    out.unlink(missing_ok=True)
    plan = {"nodes": 2, "size": 10, "out": str(out), "fail": "pause", "touch": str(touched)}
    with federation.control() as control:
        number = control.start(build(json.dumps(plan)))
        wait_for(lambda: len(list(touched.parent.glob("touched.*"))) == 2)
        federation.end("a", signal.SIGKILL)
        federation.restart_node("a", federation.authority.site("a"))
        wait_for(lambda: control.run(number).status == "finished", 20)  # by itself, Flower needs a minute
        assert {answer.get("error") for answer in json.loads(out.read_text())} == {5, None}
        wait_for(lambda: [node.status for node in control.nodes()] == ["online"] * 2, 20)
    assert [answer.get("sum") for answer in run(federation)[1]] == [999_000.0] * 2


def test_a_run_that_ends_while_its_message_is_fetched_holds_up_no_later_one(federation: Federation) -> None:
    """Control: without `_run_goes_on` both sites keep the message's task, and wait for its objects for ever."""
    out = federation.folder / "out.json"
    plan = build(json.dumps({"nodes": 2, "size": 25_000_000, "out": str(out)}))  # 100 MB: fetching takes seconds
    with federation.control() as control:
        number = control.start(plan)
        wait_for(lambda: "Receiving: train" in federation.log("a").rsplit("Sending", 1)[-1], 60)
        control.stop(number)
    facts, answers = run(federation)
    assert facts.outcome == "completed"
    assert len(answers) == 2


def test_a_site_that_is_told_to_stop_says_so(federation: Federation, tmp_path: Path) -> None:
    touched, out = tmp_path / "touched", federation.folder / "out.json"
    out.unlink(missing_ok=True)
    plan = {"nodes": 2, "size": 10, "out": str(out), "fail": "slow", "touch": str(touched)}
    with federation.control() as control:
        number = control.start(build(json.dumps(plan)))
        wait_for(lambda: len(list(touched.parent.glob("touched.*"))) == 2)
        for name in ("a", "b"):
            assert federation.end(f"{name}.executor") == 0
        for name in ("a", "b"):
            federation.start_site_executor(name)
        wait_for(lambda: control.run(number).status == "finished", 90)
    reasons = {answer.get("reason") for answer in json.loads(out.read_text())}
    assert "site.stopped" in reasons
