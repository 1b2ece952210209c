"""A coordinator that is killed, or whose disk is full, breaks or was changed: it goes on, or says what is wrong."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.errors import EnrolmentError
from fedtune.pki.invitations import read_invitation
from fedtune_server.enrolment import REVOKED_FILE, Enrolment
from fedtune_server.enrolment_log import Log, Withdrawn
from tests.support.enrolments import ADDRESS, FEDERATION, START, Coordinator, MakeSite, Site, enrol, refusal
from tests.support.failing_calls import Killed, kill_at, refuse_at


@dataclass(slots=True)
class Story:
    """A federation in the middle of things, so that every act can be done to it."""

    coordinator: Coordinator
    member: Site
    renewal: bytes
    first: bytes

    @classmethod
    def begin(cls, folder: Path) -> Story:
        coordinator = Coordinator(folder / "coordinator")
        member = Site.make(folder / "member", "member", coordinator.now)
        enrol(coordinator, member)
        member.accept(coordinator.approve(member.renew()))
        newcomer = Site.make(folder / "newcomer", "newcomer", coordinator.now)
        return cls(coordinator, member, member.renew(), newcomer.answer(coordinator.invite("newcomer")))


ACTS: dict[str, Callable[[Enrolment, Story], object]] = {
    "invite": lambda e, s: e.invite("third", ADDRESS, s.coordinator.authority.certificate),
    "invite-again": lambda e, s: e.invite("newcomer", ADDRESS, s.coordinator.authority.certificate),
    "approve": lambda e, s: e.approve(s.first, s.coordinator.authority),
    "renew": lambda e, s: e.approve(s.renewal, s.coordinator.authority),
    "revoke": lambda e, _: e.revoke("member", "left"),
    "revoke-certificate": lambda e, _: e.revoke_certificate(e.members[0].grant.serial, "lost"),
    "withdraw": lambda e, _: e.withdraw("newcomer"),
}


def summary(enrolment: Enrolment) -> object:
    """What can be told of an enrolment but for random numbers and times."""
    members = tuple((m.site, m.revoked, len(m.serials), len(m.grants)) for m in enrolment.members)
    revoked = enrolment.revocations
    return members, tuple(o.site for o in enrolment.offers), revoked.names, len(revoked.serials), len(revoked.keys)


@pytest.mark.parametrize("failure", ["killed", "disk-full"])
@pytest.mark.parametrize("act", ACTS)
def test_wherever_a_decision_ends_it_was_made_or_not_and_the_next_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str, failure: str
) -> None:
    story = Story.begin(tmp_path / "story")
    enrolment, coordinator = story.coordinator.enrolment, story.coordinator
    before, prepared = summary(enrolment), tmp_path / "prepared"
    shutil.copytree(coordinator.folder, prepared)
    ACTS[act](enrolment, story)
    after = summary(enrolment)
    seen = set()
    for moment in count(1):
        folder = tmp_path / f"{moment}"
        shutil.copytree(prepared, folder)
        enrolment = Enrolment.open(folder, coordinator.key, coordinator.now)
        with monkeypatch.context() as patch:
            made = kill_at(patch, moment) if failure == "killed" else refuse_at(patch, moment)
            try:
                ACTS[act](enrolment, story)
            except (Killed, EnrolmentError) as error:
                assert failure == "killed" or error.code == "enrolment.disk-full"  # noqa: PT017 - some moments refuse
        again = Enrolment.open(folder, coordinator.key, coordinator.now)
        found = summary(again)
        assert found in (before, after) or (act == "invite-again" and not again.offers)  # withdrawn, not invited yet
        assert (folder / REVOKED_FILE).read_text() == again.revocations.to_text()
        seen.add(found)
        if found == before or act in {"approve", "renew"}:
            ACTS[act](again, story)
            assert summary(again) == after
        if len(made) < moment:
            break
    assert {before, after} <= seen
    assert moment > 5


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_decision_that_could_not_be_flushed_is_not_in_the_log(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    log, entry = Log(coordinator.folder / "enrolment.log"), Withdrawn(invitation="0" * 32)
    before = log.path.read_bytes()
    for moment in count(1):
        with monkeypatch.context() as patch:
            made = refuse_at(patch, moment, number)
            with suppress(EnrolmentError):
                log.append([entry], START)
        if len(made) < moment:
            break
        assert made[-1] == "ftruncate" or "write" not in made
        assert log.path.read_bytes() == before
    assert len(log.path.read_bytes()) > len(before)


def test_a_grant_that_was_decided_and_never_written_is_the_same_after_a_kill(
    coordinator: Coordinator, make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site()
    request = site.answer(coordinator.invite("hospital-a"))
    with monkeypatch.context() as patch:
        patch.setattr(Enrolment, "_grant", killed)
        with pytest.raises(Killed):
            coordinator.approve(request)
    again = coordinator.restarted()
    grant = again.approve(request, coordinator.authority)
    assert len(again.members[0].serials) == 1
    site.accept(grant)


def killed(*_: object) -> bytes:
    raise Killed


@pytest.mark.parametrize("failure", ["killed", "disk-full"])
def test_wherever_the_founding_ends_it_is_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    key = Ed25519PrivateKey.generate()
    for moment in count(1):
        folder = tmp_path / str(moment)
        with monkeypatch.context() as patch:
            made = kill_at(patch, moment) if failure == "killed" else refuse_at(patch, moment)
            with suppress(Killed, EnrolmentError):
                Enrolment.found(folder, FEDERATION, key)
        assert Enrolment.found(folder, FEDERATION, key).federation == FEDERATION
        assert Enrolment.open(folder, key).federation == FEDERATION
        if len(made) < moment:
            break
    assert moment > 9


class TestTheFolder:
    def test_another_federation_or_another_key_is_refused(self, coordinator: Coordinator) -> None:
        other = Ed25519PrivateKey.generate()
        found = [("banks-0011223344556677", coordinator.key), (FEDERATION, other)]
        assert {refusal(lambda pair=pair: Enrolment.found(coordinator.folder, *pair)) for pair in found} == {"exists"}
        assert refusal(lambda: Enrolment.open(coordinator.folder, other)) == "other-coordinator"

    def test_where_nothing_is_nothing_is_made(self, tmp_path: Path) -> None:
        assert refusal(lambda: Enrolment.open(tmp_path / "x", Ed25519PrivateKey.generate())) == "missing"
        assert list(tmp_path.iterdir()) == []

    def test_a_changed_removed_or_swapped_line_is_noticed(self, coordinator: Coordinator, make_site: MakeSite) -> None:
        enrol(coordinator, make_site())
        coordinator.enrolment.revoke("hospital-a", "left")
        path = coordinator.folder / "enrolment.log"
        lines = path.read_bytes().splitlines(keepends=True)
        assert len(lines) == 4
        damages = [lines[:1] + lines[2:], lines[1:], [lines[0], lines[2], lines[1], lines[3]], [*lines, lines[3]]]
        damages += [[*lines[:n], lines[n].replace(b"hospital-a", b"hospital-b", 1), *lines[n + 1 :]] for n in (1, 2)]
        damages += [[*lines, b"\n"], [b"\n", *lines], [*lines[:3], b"{}\n"], [*lines[:3], b"[]\n"], [*lines, b"7\n"]]
        for damage in damages:
            path.write_bytes(b"".join(damage))
            assert refusal(coordinator.restarted) == "damaged"
        path.write_bytes(b"".join([*lines, lines[3][:-9]]))
        assert coordinator.restarted().revocations.is_revoked(name="hospital-a")
        assert path.read_bytes() == b"".join(lines)

    def test_files_are_this_users_alone_and_the_log_holds_no_secret(
        self, coordinator: Coordinator, make_site: MakeSite
    ) -> None:
        site = make_site()
        invitation = coordinator.invite("hospital-a")
        site.accept(coordinator.approve(site.answer(invitation)))
        assert {path.stat().st_mode & 0o777 for path in coordinator.folder.iterdir()} == {0o600}
        content = b"".join(path.read_bytes() for path in coordinator.folder.iterdir())
        assert read_invitation(invitation, coordinator.now()).token.encode() not in content
        assert b"PRIVATE" not in content

    def test_a_lost_token_secret_is_named(self, coordinator: Coordinator) -> None:
        (coordinator.folder / "token-secret").unlink()
        assert refusal(lambda: coordinator.invite("hospital-a")) == "damaged"
