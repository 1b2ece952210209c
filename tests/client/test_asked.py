"""The list of plans that a site was asked for: it holds plans alone, and not more than a person would read."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from fedtune.errors import ConfigError
from fedtune_client import asked
from fedtune_client.folder import SiteFolder
from tests.client.commands.conftest import study

if TYPE_CHECKING:
    from pathlib import Path

    from fedtune.config.plan import StudyPlan


@pytest.fixture
def folder(tmp_path: Path) -> SiteFolder:
    return SiteFolder(tmp_path)


def keep(folder: SiteFolder, plan: StudyPlan, at: int) -> None:
    asked.keep(folder, plan)
    os.utime(folder.asked / f"{plan.sha256[:16]}.json", (at, at))


def test_the_newest_plan_comes_first_and_one_that_is_asked_again_is_new(folder: SiteFolder) -> None:
    plans = [study(name) for name in ("one", "two", "three")]
    for at, plan in enumerate(plans):
        keep(folder, plan, 1000 + at)
    assert [entry.plan.name for entry in asked.all_asked(folder)] == ["three", "two", "one"]
    keep(folder, plans[0], 2000)
    assert [entry.plan.name for entry in asked.all_asked(folder)] == ["one", "three", "two"]
    asked.forget(folder, plans[1])
    asked.forget(folder, plans[1])
    assert [entry.plan.name for entry in asked.all_asked(folder)] == ["one", "three"]


def test_the_oldest_make_room(folder: SiteFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asked, "MOST", 2)
    for at in range(4):
        keep(folder, study(f"plan-{at}"), 1000 + at)
    assert [entry.plan.name for entry in asked.all_asked(folder)] == ["plan-3", "plan-2"]


def test_what_is_no_plan_or_another_than_its_name_says_is_left_out(folder: SiteFolder) -> None:
    plan = study()
    asked.keep(folder, plan)
    (folder.asked / "0123456789abcdef.json").write_text(plan.json_text)
    (folder.asked / "aaaa.json").write_bytes(b"\xff\xfe")
    (folder.asked / "bbbb.json").write_text('{"_target_": "os.system"}')
    assert [entry.plan for entry in asked.all_asked(folder)] == [plan]


def test_a_plan_is_found_by_the_start_of_its_hash(folder: SiteFolder) -> None:
    plan = study()
    asked.keep(folder, plan)
    assert asked.find(folder, plan.sha256[:6]) == asked.find(folder, plan.sha256) == plan
    for start, code in (("0" * 8, "config.no-plan"), ("", "config.two-plans")):
        asked.keep(folder, study("another"))
        with pytest.raises(ConfigError) as refused:
            asked.find(folder, start)
        assert refused.value.code == code


def test_a_site_that_was_never_asked_has_an_empty_list(folder: SiteFolder) -> None:
    assert list(asked.all_asked(folder)) == []
    asked.forget(folder, study())
