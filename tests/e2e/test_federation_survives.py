"""A real federation survives the deaths of its parts: no round is lost silently, no budget is spent twice.

Real processes over TLS, ended by SIGKILL at random moments of a round. FEDTUNE_KILLS=7 makes seven kills of each of the
six parts; FEDTUNE_LONG=1 adds the coordinator that is away for ten minutes. The table of a long run is in
docs/deployment.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedtune.journal.verify import verify
from tests.support.chaos import PARTS, Arena
from tests.support.runs import ROOT
from tests.support.scenarios import SCENARIOS

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("FEDTUNE_KILLS", "1"))
OWN = ("unshare", "-Urnmpf", "--mount-proc", "--kill-child")  # what is started in it ends with it
LONG = {"coordinator down for 10 min"}


@pytest.mark.timeout(3600)
def test_whatever_is_killed_the_study_goes_on_and_no_committed_round_is_charged_again(
    tmp_path: Path, record_property: Any
) -> None:
    arena = Arena.make(tmp_path, seed=11, federation__rounds=10_000)
    try:
        arena.up()
        for _ in range(KILLS):
            for part in PARTS:
                arena.kill(part)
        record_property("kills", json.dumps(arena.trials))
        record_property("charged again", json.dumps(arena.check_budgets()))
    finally:
        arena.deployment.close()
    lines = [json.loads(line) for line in arena.study.metrics_file.read_text().splitlines()]
    assert [line["round"] for line in lines] == list(range(1, len(lines) + 1))
    assert {code for line in lines for code in line["failed"].values()} == set()  # with quorum 1, every site in each
    assert arena.deployment.lookups == ""
    for name in arena.sites:
        site = arena.deployment.site(name)
        assert verify(site.journal_file(name), receipts=site.heads_file).outcome in {"intact", "torn"}


@pytest.fixture(scope="session")
def may_unshare() -> None:
    tried = subprocess.run([*OWN, "ip", "link"], check=False, capture_output=True)
    if tried.returncode:
        pytest.skip("this machine lets no user make a network namespace of its own")


@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("may_unshare")
@pytest.mark.parametrize("name", [name for name in SCENARIOS if name not in LONG or os.environ.get("FEDTUNE_LONG")])
def test_a_study_outlives(name: str, tmp_path: Path, record_property: Any) -> None:
    command = [*OWN, sys.executable, "-m", "tests.support.scenarios", name, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    record_property(name, json.dumps(told))
    assert told["finished"]
    assert told["rounds"] > 0
    for path in tmp_path.glob("*/*.journal"):
        assert verify(path, receipts=path.parent / "heads.jsonl").outcome == "intact"
