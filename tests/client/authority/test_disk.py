"""Disks that are full, fail or may not be written to: a code, no free round, and the next start goes on."""

from __future__ import annotations

import builtins
import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from fedtune.training import local
from fedtune_client import operator
from fedtune_client.folder import open_site_folder
from tests.support.sites import KEY, RealSite

AREAS = ("journal.", "vault.", "run.")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that noise is drawn."""
    found: list[int] = []
    add_noise = local.add_noise

    def counting(*arguments: Any) -> Any:
        found.append(1)
        return add_noise(*arguments)

    monkeypatch.setattr(local, "add_noise", counting)
    return found


@contextmanager
def failing(name: str, number: int, code: int, written: int = 0) -> Iterator[list[int]]:
    """Let the `number`-th call of `os.name` fail, a write after it has taken `written` bytes; list the calls."""
    calls: list[int] = []
    real = getattr(os, name)

    def call(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            if written:
                real(arguments[0], arguments[1][:written])
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, name, call)
        yield calls


def sweep(site: RealSite, drawn: list[int], fault: Callable[[int], Any], *, restarting: bool) -> list[str]:
    """Let each such call of a round fail in turn, then ask again, of a new process or not; return the codes."""
    codes: list[str] = []
    for number in range(1, 40):
        with fault(number) as calls:
            reply = site.ask("train", 1, site.study.another(number)).content["fedtune"]
        assert site.charged >= len(drawn), number
        if len(calls) < number:
            assert reply["kind"] == "update"
            return codes
        if reply["kind"] == "refusal":
            codes.append(str(reply["code"]))
            assert codes[-1].startswith(AREAS)
        charged = site.charged
        if restarting:
            site.restart()
        site.update(1, site.study.another(number))
        assert charged <= site.charged <= charged + 1
        assert site.charged >= len(drawn)
    raise AssertionError("a round calls it more often than this test tries")


@pytest.mark.parametrize("restarting", [False, True])
@pytest.mark.parametrize(("code", "slug"), [(errno.EIO, "journal.not-durable"), (errno.ENOSPC, "journal.disk-full")])
def test_a_flush_that_fails_anywhere_in_a_round_costs_at_most_that_round(
    site: RealSite, drawn: list[int], code: int, slug: str, restarting: bool
) -> None:
    codes = sweep(site, drawn, lambda number: failing("fsync", number, code), restarting=restarting)
    assert slug in codes
    assert len(codes) >= 4  # RESERVE, the vault's file and folder, COMMIT, Sent


@pytest.mark.parametrize("restarting", [False, True])
@pytest.mark.parametrize("written", [0, 1, 200])
def test_a_disk_that_fills_up_anywhere_in_a_round_costs_at_most_that_round(
    site: RealSite, drawn: list[int], written: int, restarting: bool
) -> None:
    codes = sweep(site, drawn, lambda number: failing("write", number, errno.ENOSPC, written), restarting=restarting)
    assert set(codes) == {"journal.disk-full"}
    assert len(codes) >= 3  # RESERVE, COMMIT, Sent


def test_a_part_that_cannot_be_taken_back_is_cut_by_the_next_round(site: RealSite, drawn: list[int]) -> None:
    site.update(1)
    size = site.journal.stat().st_size
    with failing("write", 1, errno.ENOSPC, written=200), failing("ftruncate", 1, errno.EIO):
        assert site.refusal(2) == "journal.disk-full"
    assert site.journal.stat().st_size == size + 200
    site.update(2)
    assert site.charged == len(drawn) == 2


def test_a_file_that_may_not_grow_is_a_code(site: RealSite, drawn: list[int]) -> None:
    """The kernel's own limit: it takes a part of the record, then refuses."""
    site.update(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = site.journal.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, hard))
    try:
        assert site.refusal(2) == "journal.unwritable"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(drawn) == 1
    assert site.journal.stat().st_size == size  # the part was taken back
    site.restart().update(2)


def read_only(site: RealSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse every opening for writing in the site's folder, as a file system mounted read-only does, for root too."""
    opened, opened_file = os.open, builtins.open

    def refuse(path: Any) -> None:
        if str(path).startswith(str(site.path)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def open_(path: Any, flags: int, *others: Any, **named: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            refuse(path)
        return opened(path, flags, *others, **named)

    def open_file(path: Any, mode: str = "r", *others: Any, **named: Any) -> Any:
        if set(mode) & set("wax+"):
            refuse(path)
        return opened_file(path, mode, *others, **named)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(builtins, "open", open_file)


@pytest.mark.parametrize("running", [False, True])
def test_a_folder_that_is_read_only_is_a_code(
    site: RealSite, drawn: list[int], monkeypatch: pytest.MonkeyPatch, running: bool
) -> None:
    if running:
        site.update(1)
    charged, trained = site.charged, len(drawn)
    with monkeypatch.context() as patched:
        read_only(site, patched)
        assert site.refusal(2).startswith(("journal.unwritable", "vault.unwritable"))
    assert (site.charged, len(drawn)) == (charged, trained)
    site.restart().update(2)


def test_a_clock_set_back_a_year_charges_nothing_and_trains_nothing(site: RealSite, drawn: list[int]) -> None:
    ahead = open_site_folder(site.folder, KEY, lambda: datetime.now(UTC) + timedelta(days=365))
    operator.rotate_key(ahead)
    site.restart()
    assert {site.refusal(1), site.refusal(1)} == {"journal.clock-back"}
    assert (site.charged, len(drawn)) == (0, 0)
    operator.accept_clock(site.open())
    site.update(1)
    assert site.charged == 1
