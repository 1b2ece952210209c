"""A data set that a site does not give is not opened: not once, whatever is asked for and whoever asks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from fedtune.flower.messages import Refusal, decode_update
from fedtune_client import operator
from fedtune_client.folder import open_site_folder
from tests.client.authority.conftest import MakeSite, MakeStudy
from tests.support.opens import opened_files
from tests.support.sites import KEY, RealSite

Change = Callable[[RealSite], object]
DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


def closed_now(site: RealSite) -> None:
    far = DAYS[(datetime.now(UTC).weekday() + 3) % 7]
    hours = {"timezone": "UTC", "spans": [{"days": [far], "opens": "00:00", "closes": "24:00"}]}
    site.adopt(opening_hours=hours)


def revoked(site: RealSite) -> None:
    (grant,) = site.open().journal.state.grants
    operator.revoke(site.open(), grant, "asked to")


def expired(site: RealSite) -> None:
    revoked(site)
    site.grant(expires=datetime.now(UTC) + timedelta(seconds=0.2))
    time.sleep(0.25)


def expired_and_the_clock_set_back(site: RealSite) -> None:
    """A grant that ended last year by the journal's clock does not come back with the old time."""
    revoked(site)
    site.grant(expires=datetime.now(UTC) + timedelta(hours=1))
    ahead = open_site_folder(site.folder, KEY, lambda: datetime.now(UTC) + timedelta(days=365))
    operator.approve(ahead, site.study.plan, "somebody")


REFUSALS: dict[str, tuple[str, Change]] = {
    "outside the policy": ("policy.rounds", lambda site: site.adopt(training__max_rounds=1)),
    "not approved": ("policy.not-approved", lambda site: site.adopt(require_approval=True)),
    "another purpose": ("policy.purpose", lambda site: site.adopt(data__claims__purposes=["care"])),
    "secure aggregation wanted": (
        "policy.secure-aggregation",
        lambda site: site.adopt(federation__require_secure_aggregation=True),
    ),
    "closed": ("policy.closed", closed_now),
    "revoked": ("consent.not-granted", revoked),
    "expired": ("consent.not-granted", expired),
    "expired, and the clock set back": ("consent.not-granted", expired_and_the_clock_set_back),
    "over the grant": ("ledger.over-cap", lambda site: (revoked(site), site.grant(epsilon=0.01))),
    "over the lifetime": ("policy.lifetime-epsilon", lambda site: site.adopt(data__claims__lifetime_epsilon=0.01)),
}


@pytest.fixture
def asked(make_a_site: MakeSite, make_other_study: MakeStudy) -> RealSite:
    """A site whose study asks for every kind of answer."""
    return make_a_site(study=make_other_study(evaluation__site_metrics="clear"))


def answers(site: RealSite) -> list[str]:
    """The codes with which a site answers each kind of message, "" where it does as it is told."""
    found = []
    for kind in ("query.describe", "train", "evaluate"):
        reply = site.ask(kind, 0 if kind == "query.describe" else 1).content
        if reply["fedtune"]["kind"] != "refusal":
            found.append("")
            continue
        refusal = decode_update(reply, site.study.plan.sha256)
        assert isinstance(refusal, Refusal)
        found.append(refusal.code)
    return found


def test_control_a_granted_data_set_is_opened(asked: RealSite) -> None:
    with opened_files() as opened:
        assert answers(asked) == ["", "", ""]
    assert opened.count(str(asked.data)) == 1  # and kept while nothing changes


@pytest.mark.parametrize("why", REFUSALS)
def test_a_refused_study_opens_no_data(asked: RealSite, why: str) -> None:
    code, change = REFUSALS[why]
    if code == "consent.not-granted" and why != "revoked":
        asked.update(1)
    change(asked)
    asked.restart()
    data = asked.data.read_bytes()
    with opened_files() as opened:
        assert set(answers(asked)) == {code}
    assert str(asked.data) not in opened
    asked.data.unlink()
    os.mkfifo(asked.data)  # whoever opens this waits for ever
    assert set(answers(asked.restart())) == {code}
    asked.data.unlink()
    asked.data.write_bytes(data)


@pytest.mark.parametrize("why", ["outside the policy", "not approved", "closed", "revoked"])
def test_a_study_that_is_refused_after_its_first_round_opens_no_data_again(asked: RealSite, why: str) -> None:
    asked.update(1)
    code, change = REFUSALS[why]
    change(asked)
    os.utime(asked.data)  # a change of the file does not make a refused site read it anew
    with opened_files() as opened:
        assert asked.refusal(2) == code
    assert str(asked.data) not in opened
    assert asked.charged == 1


def test_without_any_grant_no_data_is_opened(make_a_site: MakeSite) -> None:
    site = make_a_site(granted=False)
    with opened_files() as opened:
        assert site.refusal() == "consent.unknown-data"
    assert str(site.data) not in opened


def test_a_data_set_that_the_policy_does_not_name_is_not_opened(
    make_a_site: MakeSite, make_other_study: MakeStudy
) -> None:
    site = make_a_site()
    with opened_files() as opened:
        assert site.refusal(study=make_other_study(data__name="letters")) == "policy.refused"
    assert str(site.data) not in opened
    (refused,) = site.entries("plan-refused")
    assert {"policy.data-set", "consent.unknown-data"} <= set(refused["reasons"])


@pytest.mark.parametrize("number", [0, -1, 3, 10**9])
def test_a_round_that_the_plan_does_not_have_opens_no_data(
    make_a_site: MakeSite, make_other_study: MakeStudy, number: int
) -> None:
    site = make_a_site(study=make_other_study())
    with opened_files() as opened:
        assert site.refusal(number) == "message.wrong-round"
    assert str(site.data) not in opened
    assert site.charged == 0


def test_an_adapter_that_the_plan_does_not_send_opens_no_data(site: RealSite) -> None:
    name = next(iter(site.study.download))
    with opened_files() as opened:
        assert site.refusal(1, {**site.study.download, name: np.full((1, 1), np.nan, np.float32)}) in {
            "message.wrong-shape",
            "aggregation.not-finite",
        }
    assert str(site.data) not in opened
    assert site.charged == 0
