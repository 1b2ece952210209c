from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.errors import JournalError
from fedtune.journal.chain import public_hex
from fedtune.journal.witness import Head, Receipt, require_extends
from tests.support.site_journals import WITNESS, Site, data, receipt_at, receipt_of, rotation, run_round, twelve

OTHER = Ed25519PrivateKey.from_private_bytes(b"\7" * 32)


def code_of(action: Any, *arguments: Any) -> str:
    with pytest.raises(JournalError) as error:
        action(*arguments)
    return error.value.code


def test_a_head_is_the_last_record_and_its_receipt_is_signed_by_both_sides(site: Site) -> None:
    with site.create() as journal:
        receipt = receipt_of(journal)
        assert (receipt.head.sequence, receipt.head.digest) == (2, journal.digest_at(2))
        assert (receipt.head.site, receipt.head.public_key) == (journal.chain.site, site.public)
        assert receipt.witness == public_hex(WITNESS)
        receipt.check()
        require_extends(journal, receipt)
        run_round(journal, 1)
        require_extends(journal, receipt)  # what comes after a witnessed head does not matter


def test_every_changed_field_of_a_head_or_receipt_is_a_forgery(site: Site) -> None:
    with site.create() as journal:
        receipt = receipt_of(journal)
    head = receipt.head
    heads = [
        replace(head, site="0" * 64),
        replace(head, sequence=1),
        replace(head, digest="0" * 64),
        replace(head, public_key=public_hex(OTHER)),
        replace(head, public_key="f" * 64),  # no point of the curve, maybe
        replace(head, signature="0" * 128),
    ]
    for forged in heads:
        assert code_of(forged.check) == "journal.forged-head"
        assert code_of(replace(receipt, head=forged).check) == "journal.forged-head"
        resigned = Receipt.of(forged, WITNESS)  # a witness that does not check what it signs
        assert code_of(resigned.check) == "journal.forged-head"
    assert code_of(replace(receipt, witness=public_hex(OTHER)).check) == "journal.forged-head"
    assert code_of(replace(receipt, signature="0" * 128).check) == "journal.forged-head"


@pytest.mark.parametrize("change", [{"sequence": -1}, {"sequence": "1"}, {"site": "x"}, {"signature": None}, {"x": 1}])
def test_what_does_not_have_a_head_s_fields_is_refused(site: Site, change: dict[str, Any]) -> None:
    with site.create() as journal:
        receipt = receipt_of(journal)
    value = receipt.to_dict()
    assert Receipt.from_dict(value) == receipt
    assert Head.from_dict(value["head"]) == receipt.head
    assert code_of(Head.from_dict, {**value["head"], **change}) == "journal.forged-head"
    assert code_of(Receipt.from_dict, {**value, "head": {**value["head"], **change}}) == "journal.forged-head"
    assert code_of(Receipt.from_dict, []) == "journal.forged-head"


def test_a_journal_that_was_put_back_or_branched_does_not_extend_the_receipt(site: Site) -> None:
    lines = twelve(site)
    receipt = receipt_at(site, lines, 9)
    for kept in range(1, 12):
        site.write(lines[:kept])
        with site.open() as journal:
            if kept > 9:
                require_extends(journal, receipt)
            else:
                assert code_of(require_extends, journal, receipt) == "journal.rolled-back"
    site.write(lines[:8])
    with site.open() as journal:  # a fork: longer than the witnessed head, but not the same
        run_round(journal, 7)
        assert journal.chain.length > 9
        assert code_of(require_extends, journal, receipt) == "journal.rolled-back"


def test_a_receipt_of_another_site_is_no_receipt_of_this_one(site: Site, tmp_path: Any) -> None:
    other = Site(tmp_path / "other", OTHER)
    other.folder.mkdir()
    with other.create() as journal:
        foreign = receipt_of(journal)
    with site.create() as journal:
        assert code_of(require_extends, journal, foreign) == "journal.other-site"


def test_a_rotated_key_leaves_the_site_the_same(site: Site) -> None:
    with site.create() as journal:
        before = receipt_of(journal)
        journal.rotate(OTHER, rotation(site.key, OTHER))
        journal.append(data("more"))
        after = receipt_of(journal)
        assert (after.head.site, after.head.public_key) == (before.head.site, public_hex(OTHER))
        require_extends(journal, before)
        require_extends(journal, after)


def test_a_receipt_becomes_an_entry_that_says_who_confirmed_what(site: Site) -> None:
    with site.create() as journal:
        receipt = receipt_of(journal)
        journal.append(receipt.entry())
        witnessed = journal.state.witnessed
    assert witnessed is not None
    assert (witnessed.sequence, witnessed.digest, witnessed.witness) == (2, receipt.head.digest, public_hex(WITNESS))
