"""Consent that ends while a study runs: at the next round, with a record of it; never in the middle of one."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from fedtune_client import operator
from tests.client.authority.conftest import MakeSite, MakeStudy
from tests.support.sites import RealSite, point_at
from tests.support.tiny import bank_csv


def in_training(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> None:
    """Do something while the next round is in training."""
    from fedtune_client import app

    train = app.train_round

    def acting(*arguments: Any) -> Any:
        monkeypatch.setattr(app, "train_round", train)
        act()
        return train(*arguments)

    monkeypatch.setattr(app, "train_round", acting)


def test_a_grant_revoked_in_training_lets_that_round_end_and_no_other_begin(
    site: RealSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    (grant,) = site.open().journal.state.grants
    in_training(monkeypatch, lambda: operator.revoke(site.open(), grant, "patients asked"))
    site.update(1)
    assert site.refusal(2) == "consent.not-granted"
    kinds = [entry["kind"] for entry in site.entries()][-5:]
    assert kinds == ["plan-accepted", "reserve", "consent-revoked", "commit", "update-sent"]
    (revoked,) = site.entries("consent-revoked")
    assert (revoked["grant"], revoked["reason"]) == (grant, "patients asked")


def test_an_update_made_under_a_grant_is_not_sent_again_once_the_grant_is_revoked(site: RealSite) -> None:
    site.update(1)
    operator.revoke(site.open(), *site.open().journal.state.grants, "asked to")
    assert site.refusal(1) == "consent.not-granted"
    assert len(site.entries("update-sent")) == 1


def test_a_policy_adopted_in_training_lets_that_round_end_and_refuses_the_next(
    site: RealSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_training(monkeypatch, lambda: site.adopt(adapter__max_rank=1))
    site.update(1)
    assert site.refusal(2) == "policy.rank"


def test_a_grant_that_expires_ends_the_study(make_a_site: MakeSite) -> None:
    site = make_a_site(granted=False)
    site.grant(expires=datetime.now(UTC) + timedelta(seconds=2))
    site.update(1)
    (given,) = site.entries("consent-given")
    time.sleep(max(0.0, (datetime.fromisoformat(given["expires"]) - datetime.now(UTC)).total_seconds()) + 0.01)
    assert site.refusal(2) == "consent.not-granted"
    site.grant()
    site.update(2)


def test_a_new_grant_for_the_same_content_goes_on_with_the_same_budget(site: RealSite) -> None:
    site.update(1)
    (first,) = site.open().journal.state.grants
    operator.revoke(site.open(), first, "a better one follows")
    second = site.grant()
    assert [event.steps for event in site.update(2).events] == [2]
    assert [entry["grant"] for entry in site.entries("reserve")] == [first, second]
    assert len(site.entries("data-registered")) == 1


def test_a_grant_s_own_epsilon_bounds_what_is_spent_under_it(
    make_a_site: MakeSite, make_other_study: MakeStudy
) -> None:
    """Two rounds cost what the plan promises; under a grant for a little less the study does not begin."""
    study = make_other_study()
    site = make_a_site(study=study, granted=False)
    site.grant(epsilon=study.plan.promise.epsilon * 0.999)
    assert site.refusal() == "ledger.over-cap"
    site.grant(epsilon=study.plan.promise.epsilon)
    site.update(1)
    site.update(2)
    assert site.refusal(1, study.another(1)) == "ledger.over-cap"


def test_records_read_before_another_content_was_granted_are_not_trained_on(
    site: RealSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between reading and RESERVE the operator takes patients out of the file and grants what is left."""
    from fedtune_client.authority import Authority

    reserve = Authority.reserve

    def replaced(*arguments: Any) -> Any:
        monkeypatch.setattr(Authority, "reserve", reserve)
        bank_csv(site.data, rows=40, labels=3, patients=9)
        site.grant()
        return reserve(*arguments)

    monkeypatch.setattr(Authority, "reserve", replaced)
    assert site.refusal(1) == "consent.other-data"
    assert site.charged == 0
    site.update(1)


def test_a_file_that_changes_between_two_rounds_is_refused_until_it_is_granted(site: RealSite) -> None:
    site.update(1)
    with site.data.open("a") as file:
        file.write("my card number 1,card,patient-000\n")
    assert site.refusal(2) == "consent.other-data"
    assert site.charged == 1
    site.grant()
    assert [event.steps for event in site.update(2).events] == [2]


def test_a_file_that_changes_in_training_is_not_seen_by_that_round(
    site: RealSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_training(monkeypatch, lambda: bank_csv(site.data, rows=30, labels=3, patients=14, seed=9))
    site.update(1)
    assert site.refusal(2) == "consent.other-data"


def test_a_file_that_is_taken_away_is_an_error_with_a_code(site: RealSite) -> None:
    site.update(1)
    point_at(site, site.path / "elsewhere.csv")
    assert site.restart().refusal(2) == "data.missing-file"
    assert site.charged == 1
