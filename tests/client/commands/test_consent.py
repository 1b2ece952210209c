from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from fedtune.journal import journal as journals
from fedtune.journal.ledger import Ledger
from tests.client.commands.conftest import study, write_claims

if TYPE_CHECKING:
    from tests.client.commands.conftest import Place

LISTED = {
    "grant",
    "data",
    "registration",
    "fingerprint",
    "purpose",
    "epsilon",
    "spent",
    "given",
    "expires",
    "state",
    "reason",
}


@pytest.fixture
def adopted(begun: Place) -> Place:
    begun.done("policy", "adopt", "--yes")
    return begun


def grant(place: Place, *words: str) -> int:
    number: int = place.json("consent", "grant", "claims", "--purpose", "research", *words)["grant"]
    return number


def states(place: Place, *words: str) -> dict[int, str]:
    return {row["grant"]: row["state"] for row in place.json("consent", "list", *words)}


def test_a_grant_says_what_is_granted(adopted: Place) -> None:
    found = adopted.json("consent", "grant", "claims", "--purpose", "research", "--epsilon", "3", "--expires", "90d")
    assert set(found) == {
        "grant",
        "data",
        "registration",
        "fingerprint",
        "unit",
        "units",
        "purpose",
        "epsilon",
        "expires",
        "shares_budget_with",
    }
    assert (found["units"], found["unit"], found["epsilon"]) == (140, "patient_id", 3.0)
    ends = datetime.fromisoformat(found["expires"])
    assert timedelta(days=89) < ends - datetime.now(UTC) <= timedelta(days=90)
    assert adopted.kinds()[-2:] == ["data-registered", "consent-given"]
    (listed,) = adopted.json("consent", "list")
    assert set(listed) == LISTED
    assert (listed["state"], listed["spent"], listed["epsilon"]) == ("in force", 0.0, 3.0)


def test_the_day_of_an_expiry_is_still_granted(adopted: Place) -> None:
    found = adopted.json("consent", "grant", "claims", "--purpose", "research", "--expires", "2999-01-31")
    assert found["expires"] == "2999-02-01T00:00:00.000000Z"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["claims", "--purpose", "marketing"], "consent.outside-policy"),
        (["loans", "--purpose", "research"], "consent.outside-policy"),
        (["claims", "--purpose", "research", "--epsilon", "9"], "consent.outside-policy"),
        (["claims", "--purpose", "research", "--epsilon", "0"], "consent.bad-epsilon"),
        (["claims", "--purpose", "research", "--epsilon", "nan"], "consent.bad-epsilon"),
        (["claims", "--purpose", "research", "--expires", "soon"], "consent.bad-expiry"),
        (["claims", "--purpose", "research", "--expires", "2026-02-31"], "consent.bad-expiry"),
        (["claims", "--purpose", "research", "--expires", "9999999d"], "consent.bad-expiry"),
        (["claims", "--purpose", "research", "--expires", "2020-01-01"], "consent.expired"),
    ],
)
def test_what_cannot_be_granted_is_refused_with_its_reason(adopted: Place, words: list[str], code: str) -> None:
    done = adopted.run("consent", "grant", *words)
    assert done.code == 2
    assert f"error[{code}]" in done.err
    assert "hint: " in done.err
    assert adopted.kinds() == ["site-created", "policy-adopted"]


def test_a_data_set_that_site_yaml_does_not_have_is_named_with_the_file_to_edit(adopted: Place) -> None:
    (adopted.site / "site.yaml").write_text("name: mercy\n")
    done = adopted.run("consent", "grant", "claims", "--purpose", "research")
    assert "error[consent.unknown-data]" in done.err
    assert "site.yaml" in done.err


def test_a_list_tells_the_state_of_each_grant(adopted: Place) -> None:
    first, second = grant(adopted), grant(adopted, "--epsilon", "3")
    adopted.done("consent", "revoke", str(first), "--reason", "two patients asked")
    assert states(adopted) == {first: "revoked", second: "in force"}
    assert "revoked: two patients asked" in " ".join(adopted.done("consent", "list").out.split())
    write_claims(adopted.folder / "claims.csv", rows=301)
    assert states(adopted) == {first: "revoked", second: "in force"}, "the file is not read unless that is asked"
    assert states(adopted, "--read-data") == {first: "revoked", second: "other content now"}
    third = grant(adopted)
    assert states(adopted, "--read-data") == {first: "revoked", second: "other content now", third: "in force"}
    (adopted.folder / "claims.csv").unlink()
    assert states(adopted, "--read-data")[third] == "other content now"


def test_a_grant_that_is_over_is_listed_as_expired(adopted: Place) -> None:
    number = grant(adopted, "--expires", "1d")
    site = adopted.open()
    with site.journal as journal:
        given = journal.state.grants[number]
        journal.append(given.model_copy(update={"expires": "2020-01-01T00:00:00Z"}))
    assert states(adopted) == {number: "in force", number + 1: "expired"}


def test_a_second_file_of_the_same_patients_is_said_to_share_the_budget(begun: Place) -> None:
    tree = {"purposes": ["research"], "units": ["patient_id"], "columns": "any", "lifetime_epsilon": 2.0}
    begun.policy(data__letters={**tree, "consent": "none"}, data__strangers={**tree, "consent": "none"})
    facts = begun.site / "site.yaml"
    facts.write_text(facts.read_text() + "  letters:\n    path: ../letters.csv\n  strangers:\n    path: ../far.csv\n")
    write_claims(begun.folder / "letters.csv", rows=120)
    write_claims(begun.folder / "far.csv", rows=120, start=100_000)
    begun.done("policy", "adopt", "--yes")
    grant(begun)
    shared = begun.json("consent", "grant", "letters", "--purpose", "research")
    alone = begun.json("consent", "grant", "strangers", "--purpose", "research")
    assert (shared["shares_budget_with"], alone["shares_budget_with"]) == (["claims"], [])
    accounts = begun.json("budget")["accounts"]
    assert [[data["name"] for data in account["data"]] for account in accounts] == [
        ["claims", "letters"],
        ["strangers"],
    ]


def test_what_is_not_in_force_cannot_be_revoked(adopted: Place) -> None:
    number = grant(adopted)
    adopted.done("consent", "revoke", str(number))
    for wrong in (str(number), "99"):
        done = adopted.run("consent", "revoke", wrong)
        assert "error[consent.no-grant]" in done.err
        assert "hint: fedtune client consent list" in done.err


def test_consent_is_revoked_while_a_client_trains(ready: Place) -> None:
    client = ready.open()  # as a client that runs: it holds the journal for each record, not for the round
    ledger = Ledger(client.journal)
    with client.journal:
        reservation = ready.reserve(ledger, study(), 1)
    (number,) = states(ready)
    ready.done("consent", "revoke", str(number))
    with client.journal as journal:
        ledger.sent(ledger.commit(reservation, "d" * 64, 10))
        assert number in journal.state.revoked
    assert ready.kinds()[-4:] == ["reserve", "consent-revoked", "commit", "update-sent"]


def test_while_another_process_writes_views_answer_and_decisions_wait(
    ready: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journals, "PATIENCE", 0.05)
    with ready.open().journal:
        assert ready.json("budget")["records"] == 4
        assert list(states(ready)) == [3]
        done = ready.run("consent", "revoke", "3")
        assert done.code == 2
        assert "error[journal.in-use]" in done.err
    ready.done("consent", "revoke", "3")


def test_a_clock_set_back_stops_decisions_until_a_person_confirms_it(ready: Place) -> None:
    site = ready.open()
    ahead = journals.Journal(ready.journal, site.journal._keys, lambda: datetime.now(UTC) + timedelta(days=365))
    with ahead as journal:
        journal.append(*journal.state.grants.values())
    done = ready.run("consent", "revoke", "3")
    assert "error[journal.clock-back]" in done.err
    assert "fedtune client journal accept-clock" in done.err
    assert "error[config.not-confirmed]" in ready.run("journal", "accept-clock").err
    found = ready.json("journal", "accept-clock", "--yes")
    assert (set(found), found["accepted"]) == ({"now", "last", "accepted"}, True)
    ready.done("consent", "revoke", "3")
    assert ready.json("journal", "accept-clock", "--yes")["accepted"] is False
