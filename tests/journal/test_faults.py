"""Disks that fail, fill up or lie, and files that change under a running site: the budget is never under-counted."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from fedtune.errors import FedtuneError
from fedtune.journal.ledger import Ledger
from fedtune.journal.verify import verify
from tests.support.site_journals import EVENT, OPEN, SEEDED, Site, charge, run_round, twelve


def refused(action: Callable[[], object]) -> str:
    with pytest.raises(FedtuneError) as error:
        action()
    assert error.value.hint, error.value.code
    return error.value.code


def rounds_on_disk(site: Site) -> int:
    """How many rounds the journal charges, read by somebody else."""
    return sum(event.steps for event in verify(site.path).state.spending.spent(1).events) // EVENT.steps


@contextmanager
def failing(name: str, error: int, *, calls: int = 1, part: int | None = None) -> Iterator[None]:
    """Let a system call of the journal fail `calls` times; a write may take a `part` (bytes) before it fails."""
    real, left = getattr(os, name), [calls]

    def broken(*arguments: object) -> object:
        if left[0] <= 0:
            return real(*arguments)
        left[0] -= 1
        if part is not None:
            real(arguments[0], arguments[1][:part])  # type: ignore[index]
        raise OSError(error, os.strerror(error))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, name, broken)
        yield


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (("fsync", errno.EIO, None), "journal.not-durable"),
        (("write", errno.EIO, None), "journal.not-durable"),
        (("write", errno.ENOSPC, None), "journal.disk-full"),
        (("write", errno.ENOSPC, 100), "journal.disk-full"),
        (("write", errno.EDQUOT, 0), "journal.disk-full"),
        (("write", errno.EROFS, None), "journal.unwritable"),
        (("write", errno.EIO, 300), "journal.not-durable"),
        (("fsync", errno.ENOSPC, None), "journal.disk-full"),
    ],
)
@pytest.mark.parametrize("undo", ["works", "fails"])
@pytest.mark.parametrize("again_by", ["the same", "another"])
def test_a_failing_disk_charges_nothing_that_was_trained_and_forgets_nothing_that_was(
    site: Site, fault: tuple[str, int, int | None], code: str, undo: str, again_by: str
) -> None:
    name, error, part = fault
    journal = site.create()
    run_round(journal, 1)
    durable = rounds_on_disk(site)
    ledger = Ledger(journal)
    with failing(name, error, part=part), failing("ftruncate", errno.EIO, calls=undo == "fails"):
        assert refused(lambda: ledger.reserve(charge(2), [OPEN])) == code
    for _ in range(2):  # nobody knows what the disk holds, so nothing is charged before it was read again
        assert refused(lambda: ledger.reserve(charge(3), [OPEN])) in {"journal.closed", "journal.not-durable"}
    with journal if again_by == "the same" else site.open() as again:
        charged = sum(event.steps for event in again.state.spending.spent(1).events) // EVENT.steps
        assert durable <= charged <= durable + 1
        run_round(again, 2)
    assert verify(site.path).outcome == "intact"


def test_a_write_that_takes_one_byte_at_a_time_is_finished(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with site.create() as journal:
        write = os.write
        monkeypatch.setattr(os, "write", lambda file, text: write(file, text[:1]))
        run_round(journal, 1)
    assert verify(site.path).outcome == "intact"
    assert rounds_on_disk(site) == 1


def test_a_disk_that_is_really_full_leaves_what_was_written_before(site: Site) -> None:
    """The kernel refuses: a file may not grow above a limit (as on a full disk, a part is written first)."""
    journal = site.create()
    run_round(journal, 1)
    before, limits = site.path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 200, limits[1]))
    try:
        assert refused(lambda: run_round(journal, 2)) == "journal.unwritable"  # EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert site.path.read_bytes() == before
    with site.open() as again:
        run_round(again, 2)


def test_a_folder_that_cannot_be_written_is_said_so_and_nothing_is_charged(site: Site) -> None:
    twelve(site)
    before = site.path.read_bytes()
    for error in (errno.EROFS, errno.EACCES):
        with failing("open", error):
            assert refused(site.open) == "journal.unwritable"
    assert site.path.read_bytes() == before
    other = Site(site.folder / "new")
    assert refused(other.create) == "journal.missing"  # no folder
    other.folder.mkdir()
    with failing("open", errno.EROFS):
        assert refused(other.create) == "journal.unwritable"


def test_a_create_that_fails_lets_go_of_the_file(site: Site) -> None:
    with failing("fsync", errno.EIO):
        assert refused(site.create) == "journal.not-durable"
    site.create().close()


def test_what_a_killed_process_wrote_and_did_not_flush_is_flushed_before_it_counts(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    with site.create() as journal:
        run_round(journal, 1, SEEDED)
    flushed: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (fsync(file), flushed.append(os.fstat(file).st_size))[0])
    with site.open() as journal:
        assert flushed == [site.path.stat().st_size]
        Ledger(journal).reserve(charge(1, SEEDED), [OPEN])  # which is answered from what was read
        assert len(flushed) == 1
    with failing("fsync", errno.EIO):
        assert refused(site.open) == "journal.not-durable"


def test_a_journal_that_is_exchanged_while_it_is_held_takes_no_charge(site: Site) -> None:
    lines = twelve(site)
    with site.open() as journal:
        old = site.folder / "old"
        old.write_bytes(b"".join(line + b"\n" for line in lines[:5]))
        old.replace(site.path)
        assert refused(lambda: run_round(journal, 3)) == "journal.tampered"
    for change in ("cut", "longer", "gone"):
        site.write(lines)
        with site.open() as journal:
            if change == "cut":
                os.truncate(site.path, 3000)
            elif change == "longer":
                site.path.write_bytes(site.path.read_bytes() + lines[3])
            else:
                site.path.unlink()
            code = refused(lambda: run_round(journal, 3))
            assert code == ("journal.missing" if change == "gone" else "journal.tampered")


def test_a_journal_that_is_exchanged_between_two_holds_is_refused(site: Site) -> None:
    lines = twelve(site)
    journal = site.open()
    journal.close()
    for attack in (lines[:5], [*lines[:11], lines[10]], []):
        site.write(attack)
        assert refused(journal.__enter__) == "journal.tampered"
    site.write(lines)
    with journal:
        run_round(journal, 3)
