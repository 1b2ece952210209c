from __future__ import annotations

import json
import math
import os
import threading
import time
import tracemalloc
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.errors import JournalError
from fedtune.journal import entries as e
from fedtune.journal import verify as module
from fedtune.journal.chain import Record, public_hex
from fedtune.journal.recompute import recompute
from fedtune.journal.slim import Marks, slim_state
from fedtune.journal.verify import verify
from tests.support.site_journals import (
    EVENT,
    WITNESS,
    Site,
    data,
    forge,
    grant,
    receipt_at,
    rotation,
    run_round,
    twelve,
    write_receipts,
)

OTHER = Ed25519PrivateKey.from_private_bytes(b"\6" * 32)


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(JournalError) as error:
        verify(path, **options)
    return error.value.code


def test_a_verdict_says_what_was_read(site: Site) -> None:
    lines = twelve(site)
    verdict = verify(site.path)
    with site.open() as journal:
        assert (verdict.head, verdict.time, verdict.site) == (
            journal.chain.digest,
            journal.chain.time,
            journal.chain.site,
        )
    assert (verdict.outcome, verdict.reason, verdict.records, verdict.bad) == ("intact", "", len(lines), None)
    assert (verdict.key_checked, verdict.witnessed, verdict.unwitnessed, verdict.torn_bytes) == (False, None, 12, 0)
    assert [(key.since, key.public_key) for key in verdict.keys] == [(0, site.public)]
    assert verify(site.path, public_key=site.public).key_checked


def test_reading_a_journal_changes_nothing(site: Site) -> None:
    twelve(site)
    os.chmod(site.path, 0o400)  # noqa: PTH101 - not even its owner may write
    site.path.write_bytes(site.path.read_bytes()[:-5])
    before = (site.path.read_bytes(), site.path.stat().st_mtime_ns, sorted(site.folder.iterdir()))
    assert verify(site.path).outcome == "torn"
    assert (site.path.read_bytes(), site.path.stat().st_mtime_ns, sorted(site.folder.iterdir())) == before


def test_the_length_of_a_torn_tail_and_a_lacking_line_end_are_told(site: Site) -> None:
    whole = site.write(twelve(site)).read_bytes()
    site.path.write_bytes(whole + b'{"body":')
    verdict = verify(site.path)
    assert (verdict.outcome, verdict.records, verdict.torn_bytes) == ("torn", 12, 8)
    site.path.write_bytes(whole[:-1])
    verdict = verify(site.path)
    assert (verdict.outcome, verdict.records, verdict.torn_bytes) == ("torn", 12, 0)
    assert "line end" in verdict.reason


def test_the_worst_that_holds_is_the_verdict(site: Site) -> None:
    lines = twelve(site)
    heads = write_receipts(site.folder / "heads.jsonl", receipt_at(site, lines, 9))
    whole = b"".join(line + b"\n" for line in lines)
    damaged = whole.replace(b'"round":1', b'"round":3')
    cases = {
        "tampered": (damaged[:-1000], heads),  # tampered, cut and torn
        "rolled-back": (whole[:-1400], heads),  # cut and torn
        "torn": (whole[:-10], heads),  # after the newest witnessed record
        "intact": (whole, heads),
    }
    for outcome, (content, receipts) in cases.items():
        site.path.write_bytes(content)
        assert verify(site.path, receipts=receipts).outcome == outcome


def test_what_follows_the_newest_witnessed_record_is_counted(site: Site) -> None:
    lines = twelve(site)
    heads = site.folder / "heads.jsonl"
    for sequence in (0, 5, 11):
        write_receipts(heads, receipt_at(site, lines, 0), receipt_at(site, lines, sequence))
        verdict = verify(site.path, receipts=heads)
        assert (verdict.outcome, verdict.witnessed, verdict.unwitnessed) == ("intact", sequence, 11 - sequence)
        assert verdict.witnesses == (public_hex(WITNESS),)
    heads.write_text("")
    assert verify(site.path, receipts=heads).witnessed is None


def test_only_the_receipts_of_the_witness_asked_for_count(site: Site) -> None:
    lines = twelve(site)
    mine, fake = receipt_at(site, lines, 9), receipt_at(site, lines, 11, OTHER)
    heads = write_receipts(site.folder / "heads.jsonl", mine, fake)
    verdict = verify(site.path, receipts=heads, witness_key=public_hex(WITNESS))
    assert (verdict.witnessed, verdict.witnesses, verdict.ignored) == (9, (public_hex(WITNESS),), 1)
    assert verify(site.path, receipts=heads).witnessed == 11


def test_a_torn_last_receipt_is_ignored_and_any_other_damage_is_not(site: Site) -> None:
    lines = twelve(site)
    receipt = receipt_at(site, lines, 9)
    heads = write_receipts(site.folder / "heads.jsonl", receipt)
    text = heads.read_text()
    heads.write_text(text + text[:200])
    assert verify(site.path, receipts=heads).witnessed == 9
    heads.write_text(text.strip())  # copied by hand, without a line end
    assert verify(site.path, receipts=heads).witnessed == 9
    unsigned = json.loads(text)
    unsigned["head"]["sequence"] = 8
    for damage in (text[:200] + "\n" + text, "{}\n", "\n", json.dumps(unsigned) + "\n", "[" * 9000 + "\n", "x" * 9999):
        heads.write_text(damage)
        assert refused(site.path, receipts=heads) == "journal.forged-head"
    assert refused(site.path, receipts=site.folder / "none") == "journal.unreadable"
    assert refused(site.path, receipts=site.folder) == "journal.unreadable"


def test_receipts_that_cannot_be_used_do_not_hide_that_a_journal_is_tampered(site: Site) -> None:
    lines = twelve(site)
    heads = site.folder / "heads.jsonl"
    heads.write_text("{}\n")
    site.path.write_bytes(b"".join(line + b"\n" for line in lines).replace(b'"round":1', b'"round":3'))
    assert verify(site.path, receipts=heads).outcome == "tampered"
    write_receipts(heads, receipt_at(site, lines, 4), receipt_at(site, lines, 11))
    verdict = verify(site.path, receipts=heads)
    assert (verdict.outcome, verdict.bad, verdict.witnessed) == ("tampered", 5, 4)


def test_what_is_no_journal_is_an_error_and_not_a_verdict(site: Site) -> None:
    assert refused(site.path) == "journal.missing"
    assert refused(site.folder) == "journal.unreadable"
    site.path.write_bytes(b"")
    assert refused(site.path) == "journal.missing"
    os.mkfifo(site.folder / "pipe")
    assert refused(site.folder / "pipe") == "journal.unreadable"
    site.path.write_bytes(b"claim,text\n1,x\n")
    assert verify(site.path).outcome == "tampered"


def test_a_line_without_an_end_does_not_fill_the_memory(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST", 2000)
    lines = twelve(site)
    assert verify(site.path).outcome == "intact"
    site.path.write_bytes(b"".join(line + b"\n" for line in lines) + b'{"body":' + b"x" * 100_000)
    verdict = verify(site.path)
    assert (verdict.outcome, verdict.bad) == ("tampered", 12)


def test_a_record_in_the_making_is_waited_for(site: Site) -> None:
    lines = twelve(site)
    site.path.write_bytes(b"".join(line + b"\n" for line in lines[:-1]) + lines[-1][:50])

    def finish() -> None:
        time.sleep(0.05)
        with site.path.open("ab") as file:
            file.write(lines[-1][50:] + b"\n")

    writer = threading.Thread(target=finish)
    writer.start()
    verdict = verify(site.path, patience=1.0)
    writer.join()
    assert (verdict.outcome, verdict.records) == ("intact", 12)


def test_a_head_that_is_witnessed_while_the_journal_is_read_proves_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = twelve(site)
    heads = write_receipts(site.folder / "heads.jsonl", receipt_at(site, lines, 9))
    later = json.dumps(receipt_at(site, lines, 11).to_dict()) + "\n"
    site.write(lines[:10])
    read = module._lines

    def grown(path: Path, patience: float) -> Any:
        yield from read(path, patience)
        site.write(lines)  # the site writes on, and its coordinator witnesses that
        with heads.open("a") as file:
            file.write(later)

    monkeypatch.setattr(module, "_lines", grown)
    verdict = verify(site.path, receipts=heads)
    assert (verdict.outcome, verdict.records, verdict.witnessed) == ("intact", 10, 9)


def test_any_key_that_the_site_ever_had_vouches_for_it_and_no_other(site: Site) -> None:
    keys = [site.key, *(Ed25519PrivateKey.generate() for _ in range(3))]
    with site.create() as journal:
        for old, new in pairwise(keys):
            journal.rotate(new, rotation(old, new))
            run_round(journal, journal.chain.length)
    for key in keys:
        verdict = verify(site.path, public_key=public_hex(key))
        assert verdict.outcome == "intact"
    assert [key.public_key for key in verdict.keys] == [public_hex(key) for key in keys]
    assert [key.since for key in verdict.keys] == [0, 4, 8, 12]
    verdict = verify(site.path, public_key=public_hex(OTHER))
    assert (verdict.outcome, verdict.records, verdict.bad) == ("tampered", 0, 0)
    assert public_hex(OTHER) in verdict.reason


def test_heads_from_after_a_rotation_that_was_cut_away_show_the_roll_back(site: Site) -> None:
    lines = twelve(site)
    rotated = forge(lines, [rotation(site.key, OTHER), data("more")], site.key)[:13]
    later = Site(site.folder, OTHER)
    heads = write_receipts(site.folder / "heads.jsonl", receipt_at(later, rotated, 12))
    site.write(lines)
    assert verify(site.path, public_key=site.public, receipts=heads).outcome == "rolled-back"


def test_a_verifier_needs_little_memory_for_a_reservation() -> None:
    event = {**EVENT.to_dict()}
    state = slim_state()
    state.spending.register(1, data("claims"))
    state.grants[2] = grant(1)
    tracemalloc.start()
    for number in range(3, 6003, 2):
        entry = e.Reserved(
            plan="a" * 64, round=number, purpose="training", input=f"{number:064x}", data=1, grant=2, event=event
        )
        state.apply(Record(number, "", entry, ""))
        state.apply(Record(number + 1, "", e.Committed(reserved=number, payload="b" * 64, size=1), ""))
    ours = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, "*/fedtune/journal/*")])
    tracemalloc.stop()
    assert sum(trace.size for trace in ours.traces) < 6000 * 8
    assert sum(event.steps for event in state.spending.spent(1).events) == 3000 * EVENT.steps


def test_marks_are_a_set_of_numbers() -> None:
    marks, numbers = Marks(), {0, 7, 8, 1000, 40_000}
    for number in numbers:
        marks[number] = object()
    assert set(marks) == numbers
    assert len(marks) == 5
    assert [number in marks for number in (0, 1, 7, 999, 1000, 50_000, -1)] == [1, 0, 1, 0, 1, 0, 0]
    assert (marks.get(7), marks.get(6), marks.get(6, 0)) == (1, None, 0)
    assert "7" not in marks


def test_a_slim_state_has_the_same_spending_as_a_whole_one(site: Site) -> None:
    with site.create() as journal:
        journal.append(data("scans"), grant(3, "scans"))
        for number in range(5):
            run_round(journal, number, plan=f"{number % 2:064x}")
        run_round(journal, 9, None, data=3, grant=4)
        whole = journal.state
    slim = verify(site.path).state
    assert slim.spending.accounts() == whole.spending.accounts()
    for number in (1, 3):
        assert slim.spending.spent(number) == whole.spending.spent(number)
        assert slim.spending.plans(number) == whole.spending.plans(number)
    assert set(slim.committed) == set(whole.committed)


def test_epsilon_is_composed_anew_for_each_plan_and_for_the_whole_account(site: Site) -> None:
    with site.create() as journal:
        journal.append(e.PlanAccepted(plan="a" * 64, name="first", policy="b" * 64))
        for number in range(3):
            run_round(journal, number, plan="a" * 64)
        run_round(journal, 1, plan="b" * 64)
        spending = journal.state.spending.spent(1)
    first, second, together = recompute(verify(site.path).state, 1e-5)
    assert (first.study, second.study, together.plan) == ("first", "", None)
    assert (first.events[0].steps, second.events[0].steps, together.events[0].steps) == (12, 4, 16)
    assert together.pld == spending.epsilon(1e-5)
    assert first.data == ("claims",)
    for found in (first, second, together):
        assert found.pld is not None
        assert found.rdp is not None
        assert found.prv is not None
        assert found.pld == pytest.approx(found.prv, abs=0.02)
        assert found.pld < found.rdp


def test_rounds_without_privacy_are_infinite_and_different_units_are_not_added_up(site: Site) -> None:
    with site.create() as journal:
        run_round(journal, 1, None)
        (only, _) = recompute(journal.state, 1e-5)
        assert (only.pld, only.rdp, only.prv, only.not_private) == (math.inf, math.inf, math.inf, 1)
        journal.append(data("scans"), grant(6, "scans"), data("visits"), grant(8, "visits"))
        run_round(journal, 2, plan="a" * 64, data=6, grant=7)
        run_round(journal, 3, replace(EVENT, unit="patient"), plan="b" * 64, data=8, grant=9)
        assert [part.problem for part in recompute(journal.state, 1e-5)] == [""] * 6
        journal.append(data("both", joins=(6, 8)))
    found = list(recompute(verify(site.path).state, 1e-5))
    assert [part.problem for part in found[:4]] == [""] * 4
    assert "patient, record" in found[4].problem
    assert (found[4].pld, found[4].rdp, found[4].prv) == (None, None, None)
