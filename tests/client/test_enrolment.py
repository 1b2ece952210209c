"""A site that joins: what it believes, what it keeps, and that a kill anywhere leaves something to go on with."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import count
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedtune.errors import EnrolmentError, FedtuneError
from fedtune.pki import certificates, documents
from fedtune.pki.authority import Authority
from fedtune.pki.certificates import pem, serial_of
from fedtune.pki.grants import read_grant
from fedtune.pki.invitations import read_invitation
from fedtune.pki.keys import node_text
from fedtune_client import enrolment as joining
from fedtune_client.folder import SiteFolder, open_site_folder
from tests.support.enrolments import ADDRESS, FEDERATION, HOSTS, KEY, Coordinator, Now, Site, enrol
from tests.support.failing_calls import Killed, kill_at, refuse_at


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    return Coordinator(tmp_path / "coordinator")


@pytest.fixture
def site(tmp_path: Path, coordinator: Coordinator) -> Site:
    return Site.make(tmp_path / "site", "hospital-a", coordinator.now)


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(EnrolmentError) as refused:
        act()
    assert refused.value.hint
    return refused.value.code.removeprefix("enrolment.")


def test_what_a_site_has_after_it_joined_fits_together(coordinator: Coordinator, site: Site) -> None:
    enrol(coordinator, site)
    found = site.credentials
    assert (found.federation, found.site, found.address) == (FEDERATION, "hospital-a", ADDRESS)
    assert found.authority == pem(coordinator.authority.certificate)
    assert found.coordinator == coordinator.key.public_key().public_bytes_raw().hex()
    certificate = x509.load_pem_x509_certificate(found.certificate.encode())
    assert load_pem_private_key(found.tls_key, None).public_key() == certificate.public_key()
    node = load_ssh_private_key(found.node_key, None).public_key()
    assert node_text(node) == coordinator.enrolment.members[0].grant.node_key  # type: ignore[arg-type]
    assert joining.federations(site.open.vault) == (FEDERATION,)


def test_no_private_key_leaves_the_vault(coordinator: Coordinator, site: Site, tmp_path: Path) -> None:
    enrol(coordinator, site)
    found = site.credentials
    granted = joining.membership(site.open.vault, FEDERATION).granted
    assert granted is not None
    secrets = [bytes.fromhex(text)[-40:-8] for text in (granted.tls_key, granted.node_key)]
    on_disk = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for secret in [*secrets, *(secret.hex().encode() for secret in secrets)]:
        assert secret not in on_disk
    shown = repr((found, granted, joining.membership(site.open.vault, FEDERATION)))
    assert granted.tls_key not in shown
    assert "PRIVATE" not in shown


def test_the_operator_compares_what_the_coordinator_sees(coordinator: Coordinator, site: Site) -> None:
    request = site.answer(coordinator.invite("hospital-a"))
    assert joining.request_fingerprint(request) == coordinator.enrolment.examine(request).fingerprint


class TestAnswering:
    def test_the_same_invitation_gets_the_same_answer(self, coordinator: Coordinator, site: Site) -> None:
        invitation = coordinator.invite("hospital-a")
        assert site.answer(invitation) == site.answer(invitation)

    def test_a_key_that_was_rotated_meanwhile_answers_anew(self, coordinator: Coordinator, site: Site) -> None:
        invitation = coordinator.invite("hospital-a")
        before = site.answer(invitation)
        site.rotate()
        after = site.answer(invitation)
        assert before != after == site.answer(invitation)
        grant = coordinator.approve(before)
        assert refusal(lambda: site.accept(grant)) == "other-request"

    def test_one_that_was_used_is_not_answered_again(self, coordinator: Coordinator, site: Site) -> None:
        invitation = coordinator.invite("hospital-a")
        site.accept(coordinator.approve(site.answer(invitation)))
        assert refusal(lambda: site.answer(invitation)) == "invitation-used"
        renewal = site.renew()
        assert refusal(lambda: site.answer(invitation)) == "invitation-used"
        assert site.renew() == renewal

    def test_one_for_another_site_or_too_late_is_not_answered(self, coordinator: Coordinator, site: Site) -> None:
        assert refusal(lambda: site.answer(coordinator.invite("hospital-b"))) == "other-site"
        invitation = coordinator.invite("hospital-a")
        coordinator.now.later(days=15)
        assert refusal(lambda: site.answer(invitation)) == "expired-invitation"
        assert joining.federations(site.open.vault) == ()

    def test_a_federation_that_was_joined_keeps_its_coordinator(
        self, coordinator: Coordinator, site: Site, tmp_path: Path
    ) -> None:
        enrol(coordinator, site)
        twin = Coordinator(tmp_path / "twin")
        assert refusal(lambda: site.answer(twin.invite("hospital-a"))) == "other-coordinator"
        usurper = Coordinator(tmp_path / "usurper", key=coordinator.key)  # the signing key, but another authority
        assert refusal(lambda: site.answer(usurper.invite("hospital-a"))) == "other-coordinator"

    def test_two_federations_are_two_memberships(self, coordinator: Coordinator, site: Site, tmp_path: Path) -> None:
        banks = Coordinator(tmp_path / "banks", coordinator.now, "banks-0011223344556677")
        enrol(coordinator, site)
        site.accept(banks.approve(site.answer(banks.invite("hospital-a"))), banks.federation)
        assert joining.federations(site.open.vault) == (banks.federation, FEDERATION)
        first, second = (joining.credentials(site.open.vault, name) for name in joining.federations(site.open.vault))
        assert first.certificate != second.certificate
        assert coordinator.enrolment.members[0].identity == banks.enrolment.members[0].identity


class TestAccepting:
    def test_a_grant_that_is_kept_already_changes_nothing(self, coordinator: Coordinator, site: Site) -> None:
        grant = coordinator.approve(site.answer(coordinator.invite("hospital-a")))
        site.accept(grant)
        kept = joining.membership(site.open.vault, FEDERATION)
        site.accept(grant)
        assert joining.membership(site.open.vault, FEDERATION) == kept

    def test_one_of_before_a_renewal_does_not_come_back(self, coordinator: Coordinator, site: Site) -> None:
        old = coordinator.approve(site.answer(coordinator.invite("hospital-a")))
        site.accept(old)
        site.accept(coordinator.approve(site.renew()))
        assert refusal(lambda: site.accept(old)) == "other-request"

    def test_one_for_another_site_is_refused(self, coordinator: Coordinator, site: Site, tmp_path: Path) -> None:
        other = Site.make(tmp_path / "other", "hospital-b", coordinator.now)
        theirs = coordinator.approve(other.answer(coordinator.invite("hospital-b")))
        site.answer(coordinator.invite("hospital-a"))
        assert refusal(lambda: site.accept(theirs)) == "other-request"

    def test_one_that_the_coordinator_did_not_sign_is_refused(self, coordinator: Coordinator, site: Site) -> None:
        raw = coordinator.approve(site.answer(coordinator.invite("hospital-a")))
        grant = read_grant(raw, coordinator.enrolment._state.coordinator)
        forged = documents.write(grant, lambda statement: Ed25519PrivateKey.generate().sign(statement).hex())
        assert refusal(lambda: site.accept(forged)) == "forged"
        site.accept(raw)

    @pytest.mark.parametrize(
        ("field", "code"),
        [
            ("site", "other-site"),
            ("identity", "other-site"),
            ("key", "other-site"),
            ("node_key", "other-site"),
            ("federation", "other-site"),
            ("certificate", "other-site"),
            ("serial", "other-site"),
            ("authority", "bad-certificate"),
            ("foreign", "bad-certificate"),
            ("usurped", "bad-certificate"),
            ("purpose", "bad-certificate"),
            ("server", "bad-certificate"),
            ("renamed", "bad-certificate"),
            ("expired", "certificate-expired"),
            ("request", "other-request"),
        ],
    )
    def test_a_coordinator_that_signs_something_wrong_is_refused(
        self, coordinator: Coordinator, site: Site, field: str, code: str
    ) -> None:
        """Control: with nothing changed the very same signature is accepted."""
        raw = coordinator.approve(site.answer(coordinator.invite("hospital-a")))
        good = read_grant(raw, coordinator.enrolment._state.coordinator)
        wrong = good.model_copy(update=wrong_fields(field, coordinator, site))

        def signed(grant: documents.Document) -> bytes:
            return documents.write(grant, lambda statement: coordinator.key.sign(statement).hex())

        assert refusal(lambda: site.accept(signed(wrong))) == code
        site.accept(signed(good))

    def test_nothing_is_accepted_that_was_not_asked_for(self, coordinator: Coordinator, site: Site) -> None:
        assert refusal(lambda: site.accept(b"{}\n")) == "not-enrolled"
        site.answer(coordinator.invite("hospital-a"))
        assert refusal(lambda: site.accept(b"{}\n")) == "malformed"


def wrong_fields(field: str, coordinator: Coordinator, site: Site) -> dict[str, str]:
    """What a wrong grant says instead."""
    authority, foreign = coordinator.authority, Authority.create(FEDERATION, HOSTS, coordinator.now())
    pending = joining.membership(site.open.vault, FEDERATION).pending
    assert pending is not None
    mine, now = pending.keys.tls.public_key(), coordinator.now()
    plain = {
        "site": "hospital-b",
        "identity": "0" * 64,
        "key": "0" * 64,
        "node_key": node_text(foreign.key.public_key()),
        "federation": "banks-0011223344556677",
        "serial": "0" * 40,
        "request": "0" * 64,
        "authority": pem(foreign.certificate),
    }
    issued = {
        "certificate": lambda: authority.certify_site("hospital-a", foreign.key.public_key(), now),
        "foreign": lambda: foreign.certify_site("hospital-a", mine, now),
        "server": lambda: authority.certify_coordinator(HOSTS, mine, now),
        "renamed": lambda: authority.certify_site("hospital-b", mine, now),
        "purpose": lambda: for_a_server(authority, "hospital-a", mine, now),
        "expired": lambda: authority.certify_site("hospital-a", mine, now - timedelta(days=366)),
    }
    if field == "usurped":  # whoever has the coordinator's signing key alone makes another authority
        made = foreign.certify_site("hospital-a", mine, now)
        return {"authority": pem(foreign.certificate), "certificate": pem(made), "serial": serial_of(made)}
    return {field: plain[field]} if field in plain else {"certificate": pem(issued[field]())}


def for_a_server(authority: Authority, site: str, key: ec.EllipticCurvePublicKey, now: datetime) -> x509.Certificate:
    """A certificate with a site's name for the other end of a connection."""
    issuer, name = certificates.Issuer(authority.certificate, authority.key), certificates.site_uri(FEDERATION, site)
    alternative = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(name)])
    subject, purpose = authority.certificate.subject, ExtendedKeyUsageOID.SERVER_AUTH
    return certificates._issue(issuer, subject, alternative, purpose, key, now)


class TestRenewing:
    def test_it_is_due_late_in_a_certificates_life_or_with_another_key(
        self, coordinator: Coordinator, site: Site
    ) -> None:
        enrol(coordinator, site)

        def is_due(**later: float) -> bool:
            key, now = site.open.journal.chain.public_key, coordinator.now() + timedelta(**later)
            return joining.is_due_for_renewal(site.open.vault, FEDERATION, key, now)

        assert not is_due(days=240)
        assert is_due(days=246)
        site.rotate()
        assert is_due()
        site.accept(coordinator.approve(site.renew()))
        assert not is_due()

    def test_one_that_waits_is_asked_for_with_the_same_bytes(self, coordinator: Coordinator, site: Site) -> None:
        enrol(coordinator, site)
        request = site.renew()
        coordinator.now.later(days=1)
        assert site.renew() == request
        site.accept(coordinator.approve(request))
        assert site.renew() != request

    def test_the_site_works_with_what_it_has_until_the_grant_comes(self, coordinator: Coordinator, site: Site) -> None:
        enrol(coordinator, site)
        before = site.credentials.certificate
        request = site.renew()
        assert site.credentials.certificate == before
        site.accept(coordinator.approve(request))
        assert site.credentials.certificate != before

    def test_before_the_first_grant_there_is_nothing_to_renew(self, coordinator: Coordinator, site: Site) -> None:
        assert refusal(site.renew) == "not-enrolled"
        site.answer(coordinator.invite("hospital-a"))
        assert refusal(site.renew) == "not-enrolled"
        assert refusal(lambda: site.credentials) == "not-enrolled"


@dataclass(slots=True)
class Story:
    """A site in the middle of joining."""

    coordinator: Coordinator
    site: Site
    invitation: bytes
    waiting: bytes

    def reopened(self, folder: Path) -> Site:
        return Site(open_site_folder(SiteFolder(folder), KEY, self.coordinator.now), self.coordinator.now)


def joined(site: Site, story: Story) -> None:
    """Go through the whole exchange, from wherever a site stands."""
    if story.waiting:
        site.accept(story.waiting)
    else:
        site.accept(story.coordinator.approve(site.answer(story.invitation)))


@pytest.mark.parametrize("failure", ["killed", "disk-full"])
@pytest.mark.parametrize("act", ["answer", "accept"])
def test_wherever_a_step_ends_it_is_taken_again_and_the_site_joins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, coordinator: Coordinator, site: Site, act: str, failure: str
) -> None:
    story = Story(coordinator, site, coordinator.invite("hospital-a"), b"")
    if act == "accept":
        story.waiting = coordinator.approve(site.answer(story.invitation))
    kept, coordinators = tmp_path / "kept", tmp_path / "kept-coordinator"
    shutil.copytree(tmp_path / "site", kept)
    shutil.copytree(coordinator.folder, coordinators)
    for moment in count(1):
        folder = tmp_path / str(moment)
        shutil.copytree(kept, folder)
        shutil.rmtree(coordinator.folder)
        shutil.copytree(coordinators, coordinator.folder)
        attempt = story.reopened(folder)
        with monkeypatch.context() as patch:
            made = kill_at(patch, moment) if failure == "killed" else refuse_at(patch, moment, errno.ENOSPC)
            try:
                attempt.accept(story.waiting) if story.waiting else attempt.answer(story.invitation)
            except (Killed, FedtuneError) as error:
                assert failure == "killed" or error.code.endswith(".disk-full")  # noqa: PT017 - some moments refuse
        again = story.reopened(folder)
        joined(again, story)
        assert again.credentials.certificate == coordinator.enrolment.members[0].grant.certificate
        if len(made) < moment:
            break
    assert moment > 4


def test_an_invitation_says_who_invites_before_anything_is_kept(coordinator: Coordinator, site: Site) -> None:
    invitation = read_invitation(coordinator.invite("hospital-a"), Now()())
    assert len(invitation.fingerprint.split()) == 8
    assert joining.federations(site.open.vault) == ()
