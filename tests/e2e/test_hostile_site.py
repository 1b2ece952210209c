"""One of five sites signs every kind of bad reply, over TLS and from its own process; the others' work is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.server.test_rounds import HONEST, TWISTS
from tests.support.chaos import Arena

pytestmark = pytest.mark.slow
LIAR = "south"
SITES = ("east", "mercy", "north", LIAR, "west")


def expected(kind: str) -> str:
    """The code of a bad reply between machines, where the header of its envelope says what it is as well."""
    belied = {"wrong round", "another's name", "other plan"}
    return "envelope.contradiction" if kind in belied else TWISTS[kind][1]


def run(folder: Path, rounds: int, bad_replies: int) -> tuple[Arena, list[dict[str, str]]]:
    keys = {"federation__rounds": rounds, "federation__quorum": 0.8, "federation__bad_replies": bad_replies}
    arena = Arena.make(folder, seed=1, sites=SITES, **keys)
    try:
        arena.deployment.server_up()
        for name in SITES:
            arena.deployment.client_up(name, "tests.support.hostile_site" if name == LIAR else "")
        arena.deployment.finished(arena.study, 600)
    finally:
        arena.deployment.close()
    lines = [json.loads(line) for line in arena.study.metrics_file.read_text().splitlines()]
    return arena, [line["failed"] for line in lines]


@pytest.mark.timeout(900)
def test_every_bad_reply_is_refused_and_named_and_the_other_four_count_in_every_round(tmp_path: Path) -> None:
    arena, failed = run(tmp_path, len(TWISTS) + 1, 1000)
    assert failed == [*({LIAR: expected(kind)} for kind in TWISTS), {}]
    summary = arena.study.summary()
    assert summary is not None
    assert {site["name"]: site["rounds"] for site in summary["sites"]} == {
        name: 1 if name == LIAR else len(TWISTS) + 1 for name in SITES
    }
    assert arena.deployment.lookups == ""


@pytest.mark.timeout(600)
def test_by_default_the_first_of_them_ends_the_sites_part(tmp_path: Path) -> None:
    first = expected(next(kind for kind in TWISTS if kind not in HONEST))
    arena, failed = run(tmp_path, 3, 1)
    assert failed == [{LIAR: first}, {}, {}]
    summary = arena.study.summary()
    assert summary is not None
    assert {site["name"]: site["quarantine"] for site in summary["sites"]}[LIAR] == first
    assert "is not asked any more" in arena.deployment.log("server")
