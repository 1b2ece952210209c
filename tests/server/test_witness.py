"""The coordinator knows a journal that was put back, forked or exchanged; without its check each goes through."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import JournalError, RunError, WitnessError
from fedtune.journal.witness import Head, Receipt, require_extends
from fedtune_server.coordinator_key import coordinator_key
from fedtune_server.witness import Witness, judge
from tests.support.journals import MemoryJournal

if TYPE_CHECKING:
    from pathlib import Path

KEY = Ed25519PrivateKey.generate()
SITE = MemoryJournal.create("bank-1").write(times=5)
NEWEST = Receipt.of(Head.of(SITE), KEY)
PUT_BACK = MemoryJournal.create("bank-1").write(times=2)
HEADS = {
    "the same record": (Head.of(SITE), ""),
    "a later record": (Head.of(SITE.snapshot().write(times=3)), ""),
    "a later record under a new key": (Head.of(SITE.snapshot().rotate()), ""),
    "another journal": (Head.of(MemoryJournal.create("bank-1").write(times=9)), "witness.other-site"),
    "a changed number": (replace(Head.of(SITE), sequence=6), "witness.forged"),
    "a changed hash": (replace(Head.of(SITE), digest="0" * 64), "witness.forged"),
    "another's key": (replace(Head.of(SITE), public_key=Head.of(PUT_BACK).public_key), "witness.forged"),
    "another's identity": (replace(Head.of(SITE), site=Head.of(PUT_BACK).site), "witness.forged"),
}


def open_witness(folder: Path) -> Witness:
    return Witness(folder, KEY)


def refused(witness: Witness, name: str, journal: MemoryJournal) -> str:
    """Return the code with which a head is not countersigned, or an empty string."""
    try:
        witness.accept(name, Head.of(journal))
    except WitnessError as error:
        return error.code
    return ""


def saved(folder: Path) -> list[str]:
    return (folder / "heads.jsonl").read_text("utf-8").splitlines()


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_is_judged_by_the_newest_receipt(kind: str) -> None:
    head, code = HEADS[kind]
    assert judge(NEWEST, head) == code


@pytest.mark.parametrize("kind", HEADS)
def test_without_a_receipt_only_a_forged_head_is_refused(kind: str) -> None:
    head, code = HEADS[kind]
    assert judge(None, head) == (code if code == "witness.forged" else "")


@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 6))
def test_a_head_follows_another_of_its_journal_unless_it_stands_before_it(common: int, first: int, second: int) -> None:
    trunk = MemoryJournal.create("bank-1").write(times=common)
    newest = Receipt.of(Head.of(trunk.snapshot().write(times=first)), KEY)
    branch = trunk.snapshot().write("another", times=second)
    code = judge(newest, Head.of(branch))
    if second < first:
        assert code == "witness.rolled-back"
    elif second == first > 0:
        assert code == "witness.forked"
    else:  # a longer branch: only the site can tell, and does
        assert code == ""
        if first:
            with pytest.raises(JournalError, match=r"journal\.rolled-back"):
                require_extends(branch, newest)
        else:
            require_extends(branch, newest)


def test_a_countersigned_head_is_what_the_site_can_keep(tmp_path: Path) -> None:
    witness, journal = open_witness(tmp_path), SITE.snapshot()
    receipt = witness.accept("bank-1", Head.of(journal))
    receipt.check()
    assert receipt.witness == witness.public_key
    require_extends(journal.write(times=2), receipt)
    assert witness.accept("bank-1", receipt.head) == receipt
    assert len(saved(tmp_path) if witness.newest("bank-1") else []) == 1


def test_no_receipt_is_handed_out_before_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    witness = open_witness(tmp_path)
    names = [f"bank-{index}" for index in range(5)]
    for name in names:
        witness.accept(name, Head.of(MemoryJournal.create(name)))
    assert not (tmp_path / "heads.jsonl").exists()
    flushed: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (flushed.append(descriptor), fsync(descriptor)))
    newest = {name: witness.newest(name) for name in names}
    assert {json.loads(line)["name"] for line in saved(tmp_path)} == set(names)
    assert len(flushed) == 2  # the file, and once its folder
    assert open_witness(tmp_path).newest("bank-3") == newest["bank-3"]


def test_a_receipt_that_cannot_be_written_is_not_handed_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    witness = open_witness(tmp_path)
    witness.accept("bank-1", Head.of(SITE))

    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunError, match=r"run\.unwritable"):
        witness.newest("bank-1")


def test_the_site_that_was_put_back_is_refused_also_by_the_next_process(tmp_path: Path) -> None:
    before = open_witness(tmp_path)
    old = SITE.snapshot()
    before.accept("bank-1", Head.of(SITE.snapshot().write(times=4)))
    before.save()
    for witness in (before, open_witness(tmp_path)):
        assert refused(witness, "bank-1", old) == "witness.rolled-back"
        assert refused(witness, "bank-1", old.snapshot().write("another", times=4)) == "witness.forked"
    assert refused(open_witness(tmp_path / "elsewhere"), "bank-1", old) == ""  # control: nobody had witnessed more


def test_a_site_that_was_put_back_and_has_outgrown_the_receipt_is_not_countersigned_unasked(tmp_path: Path) -> None:
    witness, old = open_witness(tmp_path), SITE.snapshot()
    known = witness.accept("bank-1", Head.of(SITE.snapshot().write(times=2)))
    outgrown = old.write("another", times=7)
    witness.meet("bank-1", Head.of(outgrown))  # the coordinator cannot tell …
    assert witness.newest("bank-1") == known  # … and so does not take it for the continuation
    with pytest.raises(JournalError, match=r"journal\.rolled-back"):
        require_extends(outgrown, known)
    # control: a coordinator that countersigns whatever comes makes the site forget what it has lost
    forgetful = witness.accept("bank-1", Head.of(outgrown))
    require_extends(outgrown, forgetful)


def test_another_journal_under_a_known_name_is_refused(tmp_path: Path) -> None:
    witness = open_witness(tmp_path)
    witness.accept("bank-1", Head.of(SITE))
    assert refused(witness, "bank-1", MemoryJournal.create("bank-1").write(times=30)) == "witness.other-site"
    assert refused(witness, "bank-2", MemoryJournal.create("bank-2")) == ""


def test_one_journal_is_not_two_sites(tmp_path: Path) -> None:
    witness = open_witness(tmp_path)
    witness.accept("bank-1", Head.of(SITE))
    witness.save()
    for same in (witness, open_witness(tmp_path)):
        assert refused(same, "bank-2", SITE) == "witness.shared-journal"


def test_a_key_may_change_within_a_journal_and_not_with_it(tmp_path: Path) -> None:
    witness, journal = open_witness(tmp_path), SITE.snapshot()
    witness.accept("bank-1", Head.of(journal))
    journal.rotate()
    assert refused(witness, "bank-1", journal) == ""
    assert judge(witness.newest("bank-1"), Head.of(journal)) == ""
    stolen = Ed25519PrivateKey.generate()
    assert refused(witness, "bank-1", replace(journal, signer=stolen)) == "witness.forged"


def test_a_receipt_sent_to_another_site_is_refused_there() -> None:
    with pytest.raises(JournalError, match=r"journal\.other-site"):
        require_extends(MemoryJournal.create("bank-2").write(times=9), NEWEST)
    require_extends(SITE, NEWEST)


@pytest.mark.parametrize("fields", [{"witness": Head.of(SITE).public_key}, {"signature": "0" * 128}])
def test_a_receipt_that_the_witness_has_not_signed_is_refused(fields: dict[str, str]) -> None:
    with pytest.raises(JournalError, match=r"journal\.forged-head"):
        require_extends(SITE, replace(NEWEST, **fields))


def test_an_incomplete_last_receipt_is_cut_wherever_a_kill_left_it(tmp_path: Path) -> None:
    witness, journal = open_witness(tmp_path), SITE.snapshot()
    for _ in range(2):
        witness.accept("bank-1", Head.of(journal.write()))
        witness.save()
    whole = (tmp_path / "heads.jsonl").read_bytes()
    first = whole.index(b"\n") + 1
    for length in [*range(first, len(whole), 11), len(whole) - 2, len(whole) - 1]:
        (tmp_path / "heads.jsonl").write_bytes(whole[:length])
        newest = open_witness(tmp_path).newest("bank-1")
        assert newest is not None
        assert newest.head.sequence == journal.chain.length - 2
        assert (tmp_path / "heads.jsonl").read_bytes() == whole[:first]
    (tmp_path / "heads.jsonl").write_bytes(whole)
    assert open_witness(tmp_path).newest("bank-1") == witness.newest("bank-1")


def test_receipts_that_a_kill_loses_cost_the_site_nothing(tmp_path: Path) -> None:
    witness, journal = open_witness(tmp_path), SITE.snapshot()
    known = witness.accept("bank-1", Head.of(journal))
    witness.save()
    witness.accept("bank-1", Head.of(journal.write()))
    after = open_witness(tmp_path)
    after.meet("bank-1", Head.of(journal))
    assert after.newest("bank-1") == known
    require_extends(journal, known)
    assert refused(after, "bank-1", journal) == ""


def test_receipts_that_were_handed_out_survive_a_sigkill(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        witness, journal = open_witness(tmp_path), SITE.snapshot()
        while True:
            witness.accept("bank-1", Head.of(journal.write()))
            receipt = witness.newest("bank-1")
            assert receipt is not None
            os.write(writing, f"{receipt.head.sequence}\n".encode())
    os.close(writing)
    with os.fdopen(reading, "rb") as told:
        last = [told.readline() for _ in range(25)][-1]
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        last = (told.readlines() or [last])[-1]
    newest = open_witness(tmp_path).newest("bank-1")
    assert newest is not None
    assert newest.head.sequence >= int(last)
    assert refused(open_witness(tmp_path), "bank-1", SITE) == "witness.rolled-back"


@pytest.mark.parametrize(
    "damage", [b"nonsense", b"[]", b"{}", b'{"name":"bank-1"}', b'{"name":"bank-1","receipt":{"head":{}}}']
)
def test_a_damaged_receipt_before_the_last_stops_the_coordinator(tmp_path: Path, damage: bytes) -> None:
    witness = open_witness(tmp_path)
    witness.accept("bank-2", Head.of(MemoryJournal.create("bank-2")))
    witness.save()
    whole = (tmp_path / "heads.jsonl").read_bytes()
    (tmp_path / "heads.jsonl").write_bytes(damage + b"\n" + whole)
    with pytest.raises(WitnessError, match=r"witness\.damaged"):
        open_witness(tmp_path)


def test_a_receipt_that_somebody_edited_stops_the_coordinator(tmp_path: Path) -> None:
    witness = open_witness(tmp_path)
    witness.accept("bank-1", Head.of(SITE))
    witness.save()
    text = (tmp_path / "heads.jsonl").read_text("utf-8")
    (tmp_path / "heads.jsonl").write_text(text.replace('"sequence": 5', '"sequence": 1'))
    with pytest.raises(WitnessError, match=r"witness\.damaged"):
        open_witness(tmp_path)


def test_receipts_of_another_key_are_not_continued(tmp_path: Path) -> None:
    witness = open_witness(tmp_path)
    witness.accept("bank-1", Head.of(SITE))
    witness.save()
    with pytest.raises(WitnessError, match=r"witness\.other-key"):
        Witness(tmp_path, Ed25519PrivateKey.generate())


def test_each_site_can_be_given_its_own_receipts_and_no_others(tmp_path: Path) -> None:
    witness, journals = open_witness(tmp_path), {name: MemoryJournal.create(name) for name in ("bank-1", "bank-2")}
    for _ in range(3):
        for name, journal in journals.items():
            witness.accept(name, Head.of(journal.write()))
    witness.export()
    for name, journal in journals.items():
        lines = (tmp_path / "heads" / f"{name}.jsonl").read_text("utf-8").splitlines()
        receipts = [Receipt.from_dict(json.loads(line)) for line in lines]
        assert [receipt.head.sequence for receipt in receipts] == [1, 2, 3]
        for receipt in receipts:
            require_extends(journal, receipt)


def test_the_coordinators_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "coordinator.key"
    made, umask = coordinator_key(path), os.umask(0)
    os.umask(umask)
    assert coordinator_key(path).private_bytes_raw() == made.private_bytes_raw()
    assert path.stat().st_mode & 0o777 == 0o600
    assert [found.name for found in tmp_path.iterdir()] == ["coordinator.key"]


def test_a_key_file_of_something_else_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "coordinator.key"
    other = X25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for content in (b"", b"nonsense", other):
        path.write_bytes(content)
        with pytest.raises(WitnessError, match=r"witness\.damaged-key"):
            coordinator_key(path)
        assert path.read_bytes() == content
