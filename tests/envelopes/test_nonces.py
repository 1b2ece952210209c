"""What a memory says was swapped is on disk, whoever else writes to it and whenever it is killed."""

from __future__ import annotations

import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedtune.envelopes.nonces import Change, FileNonces, MemoryNonces, Nonces
from fedtune.envelopes.streams import Stream
from fedtune.errors import EnvelopeError
from tests.support.parties import NOON, STUDY, refused

STREAM = Stream("coordinator", "bank-1", STUDY, "request")
OTHER = Stream("coordinator", "bank-2", STUDY, "request")


@pytest.fixture(params=["file", "memory"])
def memory(request: pytest.FixtureRequest, tmp_path: Path) -> Nonces:
    return FileNonces(tmp_path / "nonces.db", lambda: NOON) if request.param == "file" else MemoryNonces(lambda: NOON)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[FileNonces]:
    found = FileNonces(tmp_path / "nonces.db")
    yield found
    found.close()


def test_a_stream_is_what_was_swapped_last(memory: Nonces) -> None:
    assert memory.read("receiver", STREAM) is None
    assert memory.swap([Change("receiver", STREAM, None, b"one")])
    assert memory.swap([Change("receiver", STREAM, b"one", b"two")])
    assert memory.read("receiver", STREAM) == b"two"


def test_nothing_changes_where_a_state_is_not_the_old_one(memory: Nonces) -> None:
    memory.swap([Change("receiver", STREAM, None, b"one")])
    for old in (None, b"zero"):
        assert not memory.swap([Change("receiver", OTHER, None, b"x"), Change("receiver", STREAM, old, b"two")])
    assert memory.read("receiver", STREAM) == b"one"
    assert memory.read("receiver", OTHER) is None


def test_every_part_of_a_stream_tells_it_from_others(memory: Nonces) -> None:
    streams = [
        STREAM,
        OTHER,
        Stream("coordinator", "bank-1", "b" * 64, "request"),
        Stream("coordinator", "bank-1", STUDY, "answer"),
        Stream("bank-1", "coordinator", STUDY, "request"),
    ]
    roles = ("sender", "receiver")
    for role in roles:
        assert memory.swap([Change(role, stream, None, f"{role}{at}".encode()) for at, stream in enumerate(streams)])
    assert [memory.read(role, stream) for role in roles for stream in streams] == [
        f"{role}{at}".encode() for role in roles for at in range(len(streams))
    ]


def test_a_file_is_there_for_the_next_process_and_knows_when_it_began(tmp_path: Path) -> None:
    first = FileNonces(tmp_path / "n.db", lambda: NOON)
    first.swap([Change("receiver", STREAM, None, b"one")])
    first.close()
    again = FileNonces(tmp_path / "n.db", lambda: NOON + 5)
    assert (again.began, again.read("receiver", STREAM)) == (NOON, b"one")
    assert (tmp_path / "n.db").stat().st_mode & 0o777 == 0o600


def test_two_that_share_a_file_never_both_win(file: FileNonces) -> None:
    def compete(mine: FileNonces) -> list[int]:
        old = [None, *(str(at).encode() for at in range(40))]
        return [at for at in range(40) if mine.swap([Change("receiver", STREAM, old[at], str(at).encode())])]

    with ThreadPoolExecutor(2) as pool:
        wins = [at for won in pool.map(compete, [file, FileNonces(file.path)]) for at in won]
    assert len(wins) == len(set(wins))
    assert wins


def test_a_file_stays_small_however_many_messages_a_stream_carries(file: FileNonces) -> None:
    sizes, old = [], None
    for at in range(1200):
        new = f"{at:0500d}".encode()
        assert file.swap([Change("receiver", STREAM, old, new)])
        old = new
        if at in {300, 1199}:
            file._database.execute("pragma wal_checkpoint(truncate)")
            sizes.append(file.path.stat().st_size)
    assert sizes[0] == sizes[1] < 50_000


CHILD = """
import sys
from pathlib import Path
from fedtune.envelopes.nonces import Change, FileNonces
from fedtune.envelopes.streams import Stream
memory, stream = FileNonces(Path(sys.argv[1])), Stream("coordinator", "bank-1", "a" * 64, "request")
while True:
    old = memory.read("receiver", stream)
    new = str(int(old or 0) + 1).encode()
    assert memory.swap([Change("receiver", stream, old, new)])
    print(new.decode(), flush=True)
"""


def test_what_a_killed_process_was_told_is_kept(tmp_path: Path) -> None:
    path, before = tmp_path / "n.db", 0
    for lines in (1, 7, 30):
        with subprocess.Popen([sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            told = [int(child.stdout.readline()) for _ in range(lines)]
            child.send_signal(signal.SIGKILL)
            told += [int(line) for line in child.stdout.read().split()]
        memory = FileNonces(path)
        kept = int(memory.read("receiver", STREAM) or 0)
        memory.close()
        assert before < told[-1] <= kept <= told[-1] + 1  # the last may be on disk and not told
        before = kept


def test_a_full_disk_takes_nothing_and_says_so(file: FileNonces) -> None:
    file._database.execute("pragma max_page_count = 6")
    assert file.swap([Change("receiver", STREAM, None, b"one")])
    large = Change("receiver", STREAM, b"one", bytes(10**6))
    assert refused(lambda: file.swap([large])) == "envelope.disk-full"
    assert file.swap([Change("receiver", STREAM, b"one", b"two")])
    assert file.read("receiver", STREAM) == b"two"


def test_a_file_that_may_not_be_written_is_an_error(tmp_path: Path) -> None:
    assert refused(lambda: FileNonces(tmp_path / "no" / "n.db")) == "envelope.unwritable-memory"
    (tmp_path / "folder").mkdir()
    assert refused(lambda: FileNonces(tmp_path / "folder")) == "envelope.unwritable-memory"


def test_a_failing_write_is_an_error_and_the_state_stays(file: FileNonces) -> None:
    file.swap([Change("receiver", STREAM, None, b"one")])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (Path(f"{file.path}-wal").stat().st_size, before[1]))
        change = Change("receiver", STREAM, b"one", bytes(100_000))
        assert refused(lambda: file.swap([change])) in {"envelope.unwritable-memory", "envelope.disk-full"}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert file.read("receiver", STREAM) == b"one"
    assert file.swap([Change("receiver", STREAM, b"one", b"two")])


def test_a_change_that_cannot_be_written_leaves_no_transaction_open(file: FileNonces) -> None:
    good, bad = Change("receiver", STREAM, None, b"one"), Change("receiver", OTHER, None, object())  # type: ignore[arg-type]
    with pytest.raises(EnvelopeError):
        file.swap([good, bad])
    assert file.swap([good])


def test_a_damaged_file_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "n.db"
    path.write_bytes(b"not a database, " * 100)
    assert refused(lambda: FileNonces(path)) == "envelope.damaged-memory"


@pytest.mark.parametrize(
    "statement", ["create table streams (other text)", "create table began as select 'x' as moment"]
)
def test_another_programs_file_is_not_taken_for_ours(tmp_path: Path, statement: str) -> None:
    database = sqlite3.connect(tmp_path / "n.db")
    database.execute(statement)
    database.commit()
    database.close()
    assert refused(lambda: FileNonces(tmp_path / "n.db").read("receiver", STREAM)) == "envelope.damaged-memory"
