"""A site that cannot train leaves its code in the round's line and in the summary, and the round goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.config.compose import compose
from fedtune.errors import FederationError
from fedtune.simulation.resolve import resolve
from fedtune.simulation.runner import simulate
from tests.support.runs import Study, command, events, metric_lines
from tests.support.watching import At


def block(run: Path, site: str) -> None:
    """Put a file where the site's folder must be, so that it cannot write down what it spends."""
    (run / "sites" / site).write_text("in the way")


def test_a_site_that_cannot_write_is_named_and_counted_and_the_others_go_on(study: Study, tmp_path: Path) -> None:
    run = tmp_path / "run"
    resolved = resolve(compose(study.words(f"run.dir={run}")))
    summary = simulate(resolved.plan, resolved.machine, At("study_started", lambda: swap(run / "sites" / "site-002")))
    assert [line["failed"] for line in metric_lines(run)] == [{"site-002": "journal.unwritable"}] * 2
    sites = {site["name"]: site for site in summary["sites"]}
    assert (sites["site-002"]["rounds"], sites["site-002"]["failures"]) == (0, {"journal.unwritable": 6})
    assert (sites["site-001"]["rounds"], sites["site-001"]["failures"]) == (2, {})
    assert sites["site-002"]["epsilon"] == 0
    assert {place: len(charged) for place, charged in events(run).items()} == {"aside": 0, "site-001": 2, "site-003": 2}


def test_no_round_ends_without_its_quorum_and_the_run_continues_when_sites_are_back(
    study: Study, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    resolved = resolve(compose(study.words(f"run.dir={run}", "federation.quorum=1.0")))
    with pytest.raises(FederationError) as caught:
        simulate(resolved.plan, resolved.machine, At("round_done 1", lambda: swap(run / "sites" / "site-003")))
    assert caught.value.code == "federation.no-quorum"
    assert "site-003: journal.unwritable" in caught.value.message
    (run / "sites" / "site-003").unlink()
    (run / "sites" / "aside").rename(run / "sites" / "site-003")
    done = command("simulate", "--resume", str(run), "--format", "json")
    assert done.code == 0, done.err
    assert {site["rounds"] for site in done.json["sites"]} == {2}
    assert done.json["privacy"]["max_epsilon"] <= 8


def swap(folder: Path) -> None:
    folder.rename(folder.with_name("aside"))
    folder.write_text("in the way")
