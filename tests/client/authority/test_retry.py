"""A round that is asked for again: the stored bytes come back, and whatever is trained anew is charged anew."""

from __future__ import annotations

import pytest

from fedtune.journal.ledger import Ledger
from tests.client.authority.conftest import MakeSite, MakeStudy
from tests.support.opens import opened_files
from tests.support.sites import RealSite, content_of


def stored(site: RealSite) -> list[str]:
    return [name for name in site.open().vault.names() if name.startswith("training-")]


def test_a_round_asked_for_twice_gives_the_same_bytes_and_is_charged_once(site: RealSite) -> None:
    first, again = (content_of(site.ask(number=1).content) for _ in range(2))
    restarted = content_of(site.restart().ask(number=1).content)
    assert first == again == restarted
    assert site.charged == len(site.entries("commit")) == 1
    assert [entry["again"] for entry in site.entries("update-sent")] == [False, True, True]


def test_an_update_tells_all_that_was_spent_when_it_was_made_and_no_less(site: RealSite) -> None:
    site.update(1)
    site.update(1, site.study.another(1))
    (event,) = site.update(2).events
    assert event.steps == site.charged == 3


def test_another_adapter_for_the_same_round_is_another_charge(site: RealSite) -> None:
    first = content_of(site.ask(number=1).content)
    other = content_of(site.ask("train", 1, site.study.another(1)).content)
    assert first["arrays"] != other["arrays"]
    assert site.charged == 2
    assert content_of(site.ask(number=1).content) == first
    assert site.charged == 2


def test_a_budget_that_is_used_up_ends_the_study_before_a_record_is_read(
    make_a_site: MakeSite, make_other_study: MakeStudy
) -> None:
    """Two rounds are planned; a coordinator that asks thrice for the first gets the third answer to nothing."""
    site = make_a_site(study=make_other_study())
    first = content_of(site.ask(number=1).content)
    site.update(1, site.study.another(1))
    with opened_files() as opened:
        assert site.restart().refusal(1, site.study.another(2)) == "ledger.over-cap"
        assert site.refusal(2) == "ledger.over-cap"
        assert content_of(site.ask(number=1).content) == first  # what is committed is spent already
    assert site.charged == 2
    assert str(site.data) not in opened


def test_a_stored_update_that_was_lost_is_trained_and_charged_anew(site: RealSite) -> None:
    first = content_of(site.ask(number=1).content)
    vault = site.open().vault
    for name in stored(site):
        vault.remove(name)
    again = content_of(site.ask(number=1).content)
    assert again["arrays"] != first["arrays"]
    assert site.charged == 2
    assert content_of(site.ask(number=1).content) == again


def test_updates_of_old_rounds_are_dropped(site: RealSite) -> None:
    for number in range(1, 6):
        site.update(number)
    assert [int(name.rsplit("-", 1)[1]) for name in stored(site)] == [
        entry["reserved"] for entry in site.entries("commit")
    ][-3:]
    site.update(1)
    assert site.charged == 6


def test_what_was_stored_and_never_committed_takes_no_update_s_place(
    site: RealSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        site.update(number)

    def fail(*arguments: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "commit", fail)
        assert [site.refusal(3) for _ in range(4)] == ["site.internal"] * 4
    assert len(stored(site)) == 6
    site.update(3)
    assert len(stored(site)) == 3
    charged = site.charged
    for number in (1, 2, 3):
        site.update(number)
    assert site.charged == charged == 7


def test_a_stored_update_that_was_changed_is_never_sent(site: RealSite) -> None:
    site.update(1)
    (item,) = (site.path / "vault").glob("items-*/training-*.sealed")
    content = bytearray(item.read_bytes())
    content[len(content) // 2] ^= 1
    item.write_bytes(content)
    assert site.refusal(1) == "vault.damaged"
    assert site.charged == 1


def test_an_update_put_in_another_s_place_is_never_sent(site: RealSite) -> None:
    site.update(1)
    site.update(2)
    one, two = sorted((site.path / "vault").glob("items-*/training-*.sealed"))
    two.write_bytes(one.read_bytes())
    assert site.refusal(2) == "vault.damaged"
    vault = site.open().vault
    vault.put(two.name.removesuffix(".sealed"), vault.get(one.name.removesuffix(".sealed")))  # by whoever has the key
    assert site.refusal(2) == "ledger.not-committed"


def test_noisy_metrics_are_stored_and_charged_as_updates_are(
    make_a_site: MakeSite, make_other_study: MakeStudy
) -> None:
    site = make_a_site(study=make_other_study(evaluation__site_metrics="noisy"))
    first, again = (content_of(site.ask("evaluate", 1).content) for _ in range(2))
    assert first == again
    assert [entry["purpose"] for entry in site.entries("reserve")] == ["metrics"]
    other = content_of(site.ask("evaluate", 1, site.study.another(1)).content)
    assert other["arrays"] != first["arrays"]
    assert site.charged == 2


def test_a_vault_whose_key_is_another_answers_nothing(site: RealSite, monkeypatch: pytest.MonkeyPatch) -> None:
    site.update(1)
    monkeypatch.setattr("tests.support.sites.SERVICE_KEY", bytes(32).hex())
    assert site.restart().refusal(1) == "vault.wrong-key"
    assert site.charged == 1


def test_a_round_that_ended_before_its_commit_starts_again_from_where_it_started(
    make_a_site: MakeSite, make_other_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its optimiser's state is on disk already, and is that of no round."""
    keys = {"training__optimizer": "adamw", "training__optimizer_state": "keep", "training__learning_rate": 0.01}
    site = make_a_site(study=make_other_study(federation__rounds=4, **keys))
    site.update(1)
    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "commit", None)
        assert site.refusal(2) == "site.internal"
    second = content_of(site.restart().ask(number=2).content)
    starts = [entry["input"] for entry in site.entries("reserve")]
    assert len(starts) == 3
    assert starts[1] == starts[2] != starts[0]
    site.update(3)
    assert content_of(site.restart().ask(number=2).content) == second
    assert site.charged == 4
