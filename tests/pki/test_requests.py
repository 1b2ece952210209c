"""Proofs of possession: a request says nothing of keys that its sender does not hold, in no combination."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.errors import EnrolmentError
from fedtune.journal.chain import moment, public_hex, rotation_statement
from fedtune.journal.entries import ClockSet, KeyRotated
from fedtune.journal.journal import Journal
from fedtune.pki.keys import new_node_key, new_tls_key, node_text
from fedtune.pki.lineage import Lineage, lineage_lines
from fedtune.pki.requests import (
    Applicant,
    Claims,
    Keys,
    certificate_request,
    check_request,
    read_request,
    write_request,
)
from tests.support.enrolments import FEDERATION, START

MINE, THEIRS = Keys(new_tls_key(), new_node_key()), Keys(new_tls_key(), new_node_key())


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal.create(tmp_path / "a.journal", "hospital-a", Ed25519PrivateKey.generate(), lambda: START)


def claims(journal: Journal, keys: Keys, **fields: object) -> Claims:
    usual = {
        "federation": FEDERATION,
        "site": "hospital-a",
        "invitation": "0" * 32,
        "replaces": None,
        "lineage": lineage_lines(journal.lines()),
        "certificate_request": certificate_request(keys.tls),
        "node_key": node_text(keys.node.public_key()),
        "issued": moment(START),
    }
    return Claims.model_validate(usual | fields)


def judged(journal: Journal, of: Keys, by: Keys, **fields: object) -> Applicant:
    """Read and check a request for the public keys `of`, proved with the private keys `by`."""
    return check_request(*read_request(write_request(claims(journal, of, **fields), by, "1" * 64, journal.sign)))


def test_a_site_that_holds_its_keys_is_an_applicant(journal: Journal) -> None:
    applicant = judged(journal, MINE, MINE)
    assert applicant.lineage.key == journal.chain.public_key
    assert applicant.lineage.identity == journal.chain.site
    assert (applicant.tls_key, applicant.node_key) == (MINE.tls.public_key(), MINE.node.public_key())


@pytest.mark.parametrize("stolen", ["tls", "node"])
def test_a_public_key_of_somebody_else_is_refused(journal: Journal, stolen: str) -> None:
    of = replace(MINE, **{stolen: getattr(THEIRS, stolen)})
    with pytest.raises(EnrolmentError) as refused:
        judged(journal, of, MINE)
    assert refused.value.code == "enrolment.no-proof"


def test_a_request_is_signed_by_the_key_that_its_lineage_ends_with(journal: Journal) -> None:
    attacker = Ed25519PrivateKey.generate()
    raw = write_request(claims(journal, MINE), MINE, "1" * 64, lambda statement: attacker.sign(statement).hex())
    with pytest.raises(EnrolmentError) as refused:
        read_request(raw)
    assert refused.value.code == "enrolment.forged"


def test_a_site_asks_by_the_name_that_its_journal_has(journal: Journal) -> None:
    with pytest.raises(EnrolmentError) as refused:
        judged(journal, MINE, MINE, site="hospital-b")
    assert refused.value.code == "enrolment.other-site"


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1(), ec.SECP256K1()], ids=lambda curve: curve.name)
def test_a_tls_key_on_another_curve_is_refused(journal: Journal, curve: ec.EllipticCurve) -> None:
    other = certificate_request(ec.generate_private_key(curve))
    with pytest.raises(EnrolmentError) as refused:
        judged(journal, MINE, MINE, certificate_request=other)
    assert refused.value.code == "enrolment.bad-key"


@pytest.mark.parametrize("text", ["", "ssh-ed25519 AAAA", "comment", "p256"])
def test_what_is_not_a_nodes_key_as_openssh_spells_it_is_refused(journal: Journal, text: str) -> None:
    good = node_text(MINE.node.public_key())
    bad = {"comment": f"{good} me@host", "p256": node_text(MINE.tls.public_key())}.get(text, text)
    with pytest.raises(EnrolmentError) as refused:
        judged(journal, MINE, MINE, node_key=bad)
    assert refused.value.code == "enrolment.bad-key"


def test_a_key_that_was_replaced_does_not_come_back(journal: Journal) -> None:
    first = rotated(journal)
    rotated(journal)
    rotated(journal, first)
    with pytest.raises(EnrolmentError) as refused:
        Lineage.of(lineage_lines(journal.lines()))
    assert refused.value.code == "enrolment.bad-lineage"


def rotated(journal: Journal, back_to: Ed25519PrivateKey | None = None) -> Ed25519PrivateKey:
    key, old = back_to or Ed25519PrivateKey.generate(), journal.chain.public_key
    journal.rotate(key, KeyRotated(public_key=public_hex(key), proof=key.sign(rotation_statement(old)).hex()))
    return key


def test_a_lineage_leads_from_the_first_key_to_the_one_in_force(journal: Journal) -> None:
    keys = [journal.chain.public_key, *(public_hex(rotated(journal)) for _ in range(3))]
    lineage = Lineage.of(lineage_lines(journal.lines()))
    assert (lineage.identity, lineage.keys, len(lineage.ends)) == (journal.chain.site, tuple(keys), 3)
    assert lineage.extends(tuple(keys[:2]))
    assert not lineage.extends(tuple(reversed(keys[:2])))


def test_a_lineage_with_a_line_left_out_swapped_repeated_or_of_another_journal_is_refused(
    journal: Journal, tmp_path: Path
) -> None:
    for _ in range(3):
        rotated(journal)
    journal.append(ClockSet(before=journal.chain.time))
    lines = lineage_lines(journal.lines())
    other = Journal.create(tmp_path / "b.journal", "hospital-a", Ed25519PrivateKey.generate(), lambda: START)
    rotated(other)
    stolen = lineage_lines(other.lines())
    for bad in [
        (),
        lines[1:],
        (lines[0], lines[2]),
        (lines[0], lines[2], lines[1], lines[3]),
        (*lines[:2], lines[1]),
        (lines[0], lines[0]),
        (lines[0], stolen[1]),
        (stolen[0], *lines[1:]),
        (*lines, "{}"),
        (*lines, "é\udcff"),
        (*lines, next(line.decode() for line in journal.lines() if b'"clock-set"' in line)),
    ]:
        with pytest.raises(EnrolmentError) as refused:
            Lineage.of(bad)
        assert refused.value.code == "enrolment.bad-lineage"
    assert Lineage.of(lines[:-1]).key == Lineage.of(lines).keys[-2]
