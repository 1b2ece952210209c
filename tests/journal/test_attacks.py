"""Whoever has the disk, and whoever also has the key, against the verifier and against `Journal.open`.

Every attack is made on a journal of twelve records with two rounds. The controls are attacks that a chain cannot see.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.errors import JournalError
from fedtune.journal import entries as e
from fedtune.journal.chain import Chain
from fedtune.journal.journal import Journal
from fedtune.journal.verify import verify
from tests.support.site_journals import (
    EVENT,
    PLAN,
    Site,
    data,
    entries_of,
    forge,
    receipt_at,
    rotation,
    run_round,
    twelve,
    write_receipts,
)

Figure = Callable[[str], None]
THIEF = Ed25519PrivateKey.from_private_bytes(b"\1" * 32)
ROUNDS = 2


@pytest.fixture
def lines(site: Site) -> list[bytes]:
    return twelve(site)


@pytest.fixture
def heads(site: Site, lines: list[bytes]) -> Path:
    """The receipts that the coordinator has kept: after the first round and after the second."""
    return write_receipts(site.folder / "heads.jsonl", receipt_at(site, lines, 7), receipt_at(site, lines, 11))


def outcome(site: Site, heads: Path | None = None) -> str:
    try:
        return verify(site.path, public_key=site.public, receipts=heads).outcome
    except JournalError as error:
        return error.code


def opened(site: Site) -> tuple[str, int]:
    """What `Journal.open` says, and how many rounds it then charges."""
    try:
        with site.open() as journal:
            spent = journal.state.spending.spent(1) if 1 in journal.state.spending.data else None
            return "opened", sum(event.steps for event in spent.events) // EVENT.steps if spent else 0
    except JournalError as error:
        return error.code, ROUNDS


def flipped(whole: bytes, bits: Iterable[int]) -> Iterable[bytes]:
    """Yield the bytes with one bit changed in each byte, for each of these bits."""
    for bit in bits:
        for place in range(len(whole)):
            yield whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :]


def test_a_journal_as_it_was_written_is_intact_with_and_without_receipts(site: Site, heads: Path) -> None:
    assert len(site.lines()) == 12
    assert (outcome(site), outcome(site, heads), opened(site)) == ("intact", "intact", ("opened", ROUNDS))


@pytest.mark.parametrize("count", [6, pytest.param(12, marks=pytest.mark.slow)], ids=["6 records", "12 records"])
def test_every_truncation_is_torn_inside_a_record_and_shown_by_a_receipt_at_its_end(
    site: Site, lines: list[bytes], heads: Path, figure: Figure, count: int
) -> None:
    lines = lines[:count]
    whole = site.write(lines).read_bytes()
    ends = {sum(len(line) + 1 for line in lines[:kept]) for kept in range(count)}
    alone: Counter[tuple[bool, str]] = Counter()
    witnessed: Counter[str] = Counter()
    for size in range(len(whole)):
        site.path.write_bytes(whole[:size])
        alone[size in ends, outcome(site)] += 1
        if size in ends or size % 40 == 0:
            witnessed[outcome(site, heads)] += 1
    inside = len(whole) - len(ends)
    assert alone == {(False, "torn"): inside, (True, "intact"): count - 1, (True, "journal.missing"): 1}  # the control
    assert set(witnessed) == {"rolled-back"}
    figure(f"truncation inside a record: {inside} of {inside} are torn, 0 missed")
    figure(f"truncation with receipts: {witnessed.total()} of {witnessed.total()} are rolled back, 0 missed")
    figure(f"control, truncation at a record's end without receipts: {count - 1} of {count - 1} pass")


def test_every_flipped_bit_is_found_where_it_is(lines: list[bytes], figure: Figure) -> None:
    """One bit of each byte of each record, given to the chain that has accepted the records before it."""
    chain, found = Chain(), 0
    for line in lines:
        for attack in flipped(line, (0,)):
            with pytest.raises(JournalError) as error:
                chain.accept(attack)
            assert error.value.code == "journal.tampered"
            found += 1
        chain, _ = chain.accept(line)
    figure(f"bit flips (1 bit of each byte of each record): {found} of {found} are refused, 0 missed")


@pytest.mark.parametrize(
    ("bits", "stride"), [((0,), 17), pytest.param(range(8), 1, marks=pytest.mark.slow)], ids=["sample", "every bit"]
)
def test_every_flipped_bit_makes_a_file_tampered(
    site: Site, lines: list[bytes], figure: Figure, bits: Sequence[int], stride: int
) -> None:
    whole = site.path.read_bytes()
    ends = [place for place, byte in enumerate(whole) if byte == ord("\n")]  # where two records meet
    attacks = list(flipped(whole, bits))
    chosen = {*range(0, len(attacks), stride), *ends}
    found: Counter[str] = Counter()
    for place in chosen:
        site.path.write_bytes(attacks[place])
        found[outcome(site)] += 1
    assert found == {"tampered": len(chosen)}
    figure(f"bit flips in the file ({len(bits)} of each byte): {len(chosen)} of {len(chosen)} are tampered, 0 missed")


def test_a_damaged_journal_never_opens_with_less_than_it_charged(
    site: Site, lines: list[bytes], figure: Figure
) -> None:
    whole = site.path.read_bytes()
    found: Counter[str] = Counter()
    for attack in list(flipped(whole, (3,)))[::11]:
        site.path.write_bytes(attack)
        code, rounds = opened(site)
        found[code] += 1
        assert rounds == ROUNDS
        assert site.path.read_bytes() == attack, "the evidence was changed"
    assert set(found) == {"journal.tampered"}
    figure(f"bit flips against opening: {found.total()} of {found.total()} refused, 0 under-counts")


def test_opening_cuts_a_torn_tail_and_keeps_every_whole_record(site: Site, lines: list[bytes], figure: Figure) -> None:
    whole = site.path.read_bytes()
    cuts = range(len(lines[0]) + 1, len(whole), 29)
    for size in cuts:
        site.path.write_bytes(whole[:size])
        left = whole[:size].split(b"\n")
        kept = left[:-1] + ([left[-1]] if left[-1] in lines else [])  # a record that lacks its line end is whole
        reserved = sum(b'"kind":"reserve"' in line for line in kept)
        assert opened(site) == ("opened", reserved)
        assert site.path.read_bytes() == b"".join(line + b"\n" for line in kept)
    figure(f"truncations against opening: {len(cuts)} of {len(cuts)} keep the charge of every whole record")


def rearranged(lines: list[bytes]) -> dict[str, list[bytes]]:
    attacks = {f"record {n} removed": lines[:n] + lines[n + 1 :] for n in range(11)}
    attacks |= {f"record {n} doubled": lines[: n + 1] + lines[n:] for n in range(12)}
    for one in range(12):
        for other in range(one + 1, 12):
            swapped = list(lines)
            swapped[one], swapped[other] = swapped[other], swapped[one]
            attacks[f"records {one} and {other} swapped"] = swapped
    return attacks


def test_removed_doubled_and_swapped_records_are_found(site: Site, lines: list[bytes], figure: Figure) -> None:
    attacks = rearranged(lines)
    for name, attack in attacks.items():
        site.write(attack)
        assert outcome(site) == "tampered", name
        assert opened(site) == ("journal.tampered", ROUNDS), name
    figure(f"records removed, doubled, swapped: {len(attacks)} of {len(attacks)} are tampered, 0 missed")


def test_a_tail_that_another_key_has_signed_is_found(site: Site, lines: list[bytes], figure: Figure) -> None:
    entries = entries_of(lines)
    for kept in range(12):
        site.write(forge(lines[:kept], entries[kept:], THIEF))
        verdict = verify(site.path, public_key=site.public)
        assert (verdict.outcome, verdict.bad, verdict.records) == ("tampered", kept, kept)
        assert opened(site) == ("journal.tampered", ROUNDS)
    figure("tail replaced and signed by another key: 12 of 12 are tampered, 0 missed")


def test_a_tail_rewritten_with_the_site_s_own_key_is_seen_by_receipts_alone(
    site: Site, lines: list[bytes], heads: Path, figure: Figure
) -> None:
    for kept in range(12):
        rewritten = [line for line in entries_of(lines)[kept:] if not isinstance(line, e.HeadWitnessed)]
        changed = [replace_epsilon(entry) for entry in rewritten if getattr(entry, "round", 0) < 2]
        consistent = [entry for entry in changed if getattr(entry, "reserved", kept) <= 8]
        site.write(forge(lines[:kept], [*consistent, e.PlanApproved(plan=PLAN, by="insider")], site.key))
        assert outcome(site) == "intact", "the control: a chain cannot see it"
        assert outcome(site, heads) == "rolled-back"
    figure("tail rewritten with the site's own key: 12 of 12 are rolled back by receipts; control: 12 pass without")


def replace_epsilon(entry: e.Entry) -> e.Entry:
    return entry.model_copy(update={"epsilon": 1000.0}) if isinstance(entry, e.ConsentGiven) else entry


def test_an_old_copy_that_was_put_back_is_seen_by_receipts_alone(
    site: Site, lines: list[bytes], heads: Path, figure: Figure
) -> None:
    for kept in range(1, 12):
        site.write(lines[:kept])
        assert outcome(site) == "intact", "the control: a chain cannot see it"
        assert outcome(site, heads) == "rolled-back"
    site.write(lines[:6])
    with site.open() as journal:  # the site goes on from the old copy, as if nothing had been spent since
        run_round(journal, 3)
        run_round(journal, 4)
    assert outcome(site, heads) == "rolled-back"
    figure("old copy put back: 12 of 12 are rolled back by receipts; control: 12 pass without")


def test_records_of_another_site_s_journal_do_not_fit(tmp_path: Path, figure: Figure) -> None:
    shared = Ed25519PrivateKey.generate()  # the worst case: both sites have one key
    sites = [Site(tmp_path / name, key) for name, key in [("a", shared), ("b", shared), ("c", THIEF)]]
    journals = []
    for number, site in enumerate(sites):
        site.folder.mkdir()
        site.clock.now = site.clock.now.replace(day=1 + number)
        journals.append(twelve(site))
    mine, attacks = journals[0], 0
    for other in journals[1:]:
        for place in range(12):
            for spliced in (mine[:place] + other[place:], mine[:place] + other[place : place + 1] + mine[place + 1 :]):
                sites[0].write(spliced)
                attacks += 1
                whole = spliced == other  # another journal with the same key is another site's, and intact
                expected = "intact" if whole and other is journals[1] else "tampered"
                assert outcome(sites[0]) == expected
    figure(f"records of another site: {attacks - 1} of {attacks - 1} are tampered, 0 missed")


def test_the_receipts_of_a_site_whose_journal_was_exchanged_for_another_are_refused(
    site: Site, heads: Path, tmp_path: Path
) -> None:
    other = Site(tmp_path / "other", THIEF)
    other.folder.mkdir()
    twelve(other)
    with pytest.raises(JournalError, match="another site"):
        verify(other.path, receipts=heads)


def test_a_journal_that_begins_anew_with_the_site_s_own_key_is_seen_by_receipts(site: Site, heads: Path) -> None:
    site.path.unlink()
    anew = Site(site.folder, site.key)
    anew.clock.now = site.clock.now
    twelve(anew)
    assert outcome(site) == "intact", "the control: a chain cannot see it"
    verdict = verify(site.path, receipts=heads)
    assert verdict.outcome == "rolled-back"
    assert "first record" in verdict.reason


def test_a_first_record_that_another_key_has_signed_is_found_by_the_key_that_was_told(
    site: Site, lines: list[bytes], heads: Path
) -> None:
    first = e.SiteCreated(site="hospital", public_key=THIEF.public_key().public_bytes_raw().hex())
    rest = [entry for entry in entries_of(lines)[1:] if not isinstance(entry, e.HeadWitnessed)]
    site.write(forge([], [first, *rest[:7]], THIEF))
    verdict = verify(site.path, public_key=site.public)
    assert (verdict.outcome, verdict.bad, verdict.records, verdict.state.site) == ("tampered", 0, 0, "")
    believed = verify(site.path)
    assert (believed.outcome, believed.key_checked) == ("intact", False)  # the control
    assert outcome(Site(site.folder, THIEF), heads) == "journal.other-site"
    assert opened(site) == ("journal.other-key", ROUNDS)


def test_a_first_record_that_names_another_key_than_its_signer_is_refused(site: Site, lines: list[bytes]) -> None:
    first = e.SiteCreated(site="hospital", public_key=THIEF.public_key().public_bytes_raw().hex())
    site.write(forge([], [first], site.key))
    assert outcome(site) == "tampered"


def test_a_key_is_not_rotated_by_somebody_who_does_not_hold_both(site: Site, lines: list[bytes]) -> None:
    honest, other = rotation(site.key, THIEF), Ed25519PrivateKey.generate()
    attacks = [
        (honest, THIEF),  # the thief's key puts itself in force
        (rotation(other, THIEF), site.key),  # a proof over another old key
        (honest.model_copy(update={"public_key": other.public_key().public_bytes_raw().hex()}), site.key),  # not its
        (honest.model_copy(update={"proof": "0" * 128}), site.key),
    ]
    for entry, signer in attacks:
        site.write(forge(lines, [entry], signer))
        verdict = verify(site.path, public_key=site.public)
        assert (verdict.outcome, verdict.bad) == ("tampered", 12)
        assert opened(site) == ("journal.tampered", ROUNDS)
    site.write(forge(lines, [honest], site.key))
    assert outcome(site) == "intact", "the control: an honest rotation"


def test_an_old_key_signs_nothing_after_a_rotation(site: Site, lines: list[bytes]) -> None:
    rotated = forge(lines, [rotation(site.key, THIEF)], site.key)
    site.write(forge(rotated, [data("more")], site.key))
    assert outcome(site) == "tampered"
    site.write(forge(rotated, [data("more")], THIEF))
    assert outcome(site) == "intact", "the control: the new key signs"


def test_a_signed_record_that_contradicts_the_others_is_found(site: Site, lines: list[bytes], figure: Figure) -> None:
    reserve = next(entry for entry in entries_of(lines) if isinstance(entry, e.Reserved))
    revoke = e.ConsentRevoked(grant=2, reason="stop")
    witnessed = next(entry for entry in entries_of(lines) if isinstance(entry, e.HeadWitnessed))
    attacks: list[list[e.Entry]] = [
        [e.Committed(reserved=4, payload="a" * 64, size=1)],  # of no reservation
        [e.Committed(reserved=5, payload="a" * 64, size=1)],  # twice
        [e.Sent(reserved=2, again=False)],
        [e.ConsentGiven(data=9, fingerprint="a" * 64, purpose="research", epsilon=1.0, expires=None)],
        [e.ConsentGiven(data=1, fingerprint="a" * 64, purpose="research", epsilon=1.0, expires=None)],
        [e.ConsentRevoked(grant=1, reason="")],
        [e.RecordsConsented(data=2, source="a" * 64, units=1)],
        [data("more", joins=(0,))],
        [reserve.model_copy(update={"data": 3})],
        [reserve.model_copy(update={"grant": 1})],
        [data("more"), reserve.model_copy(update={"data": 12})],  # under the grant of other data
        [revoke, reserve],  # a round after consent was withdrawn
        [witnessed.model_copy(update={"digest": "a" * 64})],
        [witnessed.model_copy(update={"witness": site.public})],  # that nobody has countersigned
        [witnessed.model_copy(update={"signature": "0" * 128})],
        [witnessed.model_copy(update={"head_signature": "0" * 128})],
        [e.SiteCreated(site="again", public_key=site.public)],
    ]
    for entries in attacks:
        site.write(forge(lines, entries, site.key))
        verdict = verify(site.path, public_key=site.public)
        assert (verdict.outcome, verdict.bad) == ("tampered", 11 + len(entries)), entries
    site.write(forge(lines, [reserve, revoke], site.key))
    assert outcome(site) == "intact", "the control: the round was before consent was withdrawn"
    figure(f"signed records that contradict others: {len(attacks)} of {len(attacks)} are tampered, 0 missed")


def test_bytes_after_the_last_record_are_found(site: Site, lines: list[bytes]) -> None:
    whole = site.path.read_bytes()
    for attack in (whole + b"\n", whole + lines[0] + b"\n", whole[:-1] + b" \n", whole[:-1] + b"x", whole + b"{}\n"):
        site.path.write_bytes(attack)
        assert outcome(site) == "tampered"
        assert opened(site) == ("journal.tampered", ROUNDS)
    for torn in (whole + b"x", whole + lines[3][:100], whole + bytes(4096)):
        site.path.write_bytes(torn)
        assert outcome(site) == "torn", "the control: what an interrupted write can leave"
        assert opened(site) == ("opened", ROUNDS)


def test_an_intact_journal_moved_to_another_name_stays_the_same_site(site: Site, heads: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved.journal"
    shutil.move(site.path, moved)
    verdict = verify(moved, receipts=heads)
    assert (verdict.outcome, verdict.unwitnessed) == ("intact", 0)
    assert verdict.site == hashlib.sha256(moved.read_bytes().split(b"\n")[0]).hexdigest()


def test_a_site_opens_a_rolled_back_journal_and_refuses_the_newest_receipt(site: Site, lines: list[bytes]) -> None:
    from fedtune.journal.witness import require_extends

    receipt = receipt_at(site, lines, 11)
    with site.open() as journal:
        require_extends(journal, receipt)
    site.write(lines[:6])
    with Journal.open(site.path, site.key, site.clock) as journal, pytest.raises(JournalError) as refused:
        require_extends(journal, receipt)
    assert refused.value.code == "journal.rolled-back"
