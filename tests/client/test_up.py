"""`fedtune client up` against a SuperLink by TLS: it answers, keeps its secrets, and outlives its own processes."""

from __future__ import annotations

import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtune.flower.messages import Update, decode_update
from fedtune.flower.sealed import open_answer
from tests.support.federation import wait_for
from tests.support.live import Live, environment_of, gone, kill
from tests.support.sites import SERVICE_KEY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    made = Live.make(tmp_path_factory.mktemp("live"))
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def up(live: Live) -> Live:
    """The site as it runs; it is started where the test before has ended it."""
    if live.site_process is None or live.site_process.poll() is not None:
        live.up()
    return live


def private_folder(live: Live) -> Path:
    return Path((live.run_folder / "private").read_text())


def trained(live: Live, number: int) -> bool:
    reply = live.ask(live.resident.seal(number))
    assert not reply.has_error(), reply.error
    plan = live.resident.study.plan.sha256
    return isinstance(decode_update(open_answer(live.resident.end, reply.content, "mercy", plan).content, plan), Update)


def test_a_round_is_trained_and_answered_by_two_processes_that_look_nothing_up(up: Live) -> None:
    assert trained(up, 1)
    assert up.resident.site.charged == 1
    assert not (up.folder / "lookups").exists()
    assert "the site mercy of " in up.log
    assert "executor: " in up.log  # its lines are shown among those of `up`


def test_neither_process_has_the_vaults_secret_in_its_environment_or_on_disk(up: Live) -> None:
    for name in ("node", "executor"):
        found = environment_of(up.pid(name))
        assert not [key for key in found if "VAULT" in key or key == "FEDTUNE_MACHINE"]
        assert SERVICE_KEY not in "".join(found.values())
    folder = private_folder(up)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = [path for path in folder.iterdir() if path.is_file()]
    assert {"site.key", "node.key"} <= {path.name for path in files}
    assert SERVICE_KEY.encode() not in b"".join(path.read_bytes() for path in files)
    on_disk = b"".join(path.read_bytes() for path in up.resident.site.path.rglob("*") if path.is_file())
    assert (folder / "site.key").read_bytes() not in on_disk
    assert SERVICE_KEY.encode() not in on_disk


def test_a_message_without_an_envelope_is_answered_with_a_code_and_charges_nothing(up: Live) -> None:
    before = up.resident.site.journal.read_bytes()
    reply = up.ask(up.resident.instruction())
    assert reply.has_error()
    assert reply.error.reason == "envelope.missing"
    assert up.resident.site.journal.read_bytes() == before


def test_an_executor_that_is_killed_is_started_again_and_unlocks_the_vault(up: Live) -> None:
    before = up.pid("executor")
    kill(before)
    wait_for(lambda: up.ready() and up.pid("executor") != before, 60)
    assert trained(up, 2)


def test_one_up_runs_a_folder(up: Live) -> None:
    second = up.start_up()
    assert second.wait(60) == 2
    assert "error[process.running]" in up.log
    assert up.ready()


def test_told_to_stop_it_ends_both_processes_and_leaves_no_key(up: Live) -> None:
    children, folder, process = [up.pid(name) for name in ("node", "executor")], private_folder(up), up.site_process
    assert process is not None
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert all(gone(pid) for pid in children)
    assert not folder.exists()
    assert [path.name for path in up.run_folder.iterdir()] == ["lock"]


def test_killed_itself_its_processes_end_and_the_next_one_removes_what_it_left(live: Live) -> None:
    process = live.up()
    children, folder = [live.pid(name) for name in ("node", "executor")], private_folder(live)
    kill(process.pid)
    process.wait()
    wait_for(lambda: all(gone(pid) for pid in children), 30)
    assert folder.exists()
    following = live.up()
    assert not folder.exists()
    assert trained(live, 2)
    following.terminate()
    assert following.wait(30) == 0


def test_a_vault_that_does_not_open_is_said_before_anything_is_started(live: Live) -> None:
    process = live.start_up(FEDTUNE_VAULT_KEY="00" * 32)
    assert process.wait(60) == 2
    assert "error[vault.wrong-key]" in live.log
