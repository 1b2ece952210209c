"""Who was let in and is not any longer: a revocation holds from that moment on, in papers, envelopes and handshakes."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fedtune.envelopes.peers import Peers
from fedtune.errors import EnvelopeError
from fedtune.flower.peer import Peer
from fedtune.flower.peer import Revocations as GateRevocations
from fedtune.pki.certificates import read_pem
from fedtune.pki.keys import new_tls_key, read_private_text
from fedtune_client import enrolment as joining
from fedtune_server.enrolment import REVOKED_FILE
from tests.support.enrolments import FEDERATION, HOSTS, Coordinator, MakeSite, Now, Site, enrol, refusal
from tests.support.handshakes import client_context, handshake, server_context


class TestRevocation:
    def test_it_holds_for_everything_the_site_ever_had(self, coordinator: Coordinator, make_site: MakeSite) -> None:
        site, bystander = make_site(), make_site("hospital-b")
        enrol(coordinator, site)
        enrol(coordinator, bystander)
        site.rotate()
        site.accept(coordinator.approve(site.renew(new_node=True)))
        before, member = coordinator.enrolment.revocations, coordinator.enrolment.members[0]
        coordinator.enrolment.revoke("hospital-a", "contract ended")
        after = coordinator.enrolment.revocations
        assert len(member.serials) == 2
        assert len(member.key_names) == 6
        for revocations, wanted in ((before, False), (after, True)):
            assert revocations.is_revoked(name="hospital-a") is wanted
            assert {revocations.is_revoked(serial=serial) for serial in member.serials} == {wanted}
            assert {revocations.is_revoked(key=key) for key in member.key_names} == {wanted}
        assert not after.is_revoked(name="hospital-b")
        assert not any(after.is_revoked(key=key) for key in coordinator.enrolment.members[1].key_names)

    def test_envelopes_of_a_revoked_site_are_refused_at_once(
        self, coordinator: Coordinator, make_site: MakeSite
    ) -> None:
        site = make_site()
        enrol(coordinator, site)
        peers, key = Peers(coordinator.restarted().known), site.open.journal.chain.public_key
        assert peers.standing("hospital-a", key).until is None
        coordinator.enrolment.revoke("hospital-a", "contract ended")
        with pytest.raises(EnvelopeError, match="revoked"):
            peers.standing("hospital-a", key)

    def test_a_site_comes_back_with_an_invitation_and_new_keys_as_the_same_site(
        self, coordinator: Coordinator, make_site: MakeSite
    ) -> None:
        site = make_site()
        enrol(coordinator, site)
        old = coordinator.enrolment.members[0]
        coordinator.enrolment.revoke("hospital-a", "contract ended")
        invitation = coordinator.invite("hospital-a")
        unchanged = site.answer(invitation)
        assert refusal(lambda: coordinator.approve(unchanged)) == "revoked-key"
        site.rotate()
        request = site.answer(invitation)
        assert coordinator.enrolment.examine(request).occasion == "return"
        site.accept(coordinator.approve(request))
        (member,) = coordinator.enrolment.members
        assert (member.identity, member.revoked, len(member.grants)) == (old.identity, None, 1)
        revocations = coordinator.enrolment.revocations
        assert not revocations.is_revoked(name="hospital-a", serial=member.grant.serial, key=member.grant.key)
        assert all(revocations.is_revoked(serial=serial) for serial in old.serials)
        assert [key.revoked for key in coordinator.enrolment.known()["hospital-a"]] == [True, False]
        assert refusal(lambda: coordinator.approve(unchanged)) == "invitation-used"

    def test_one_certificate_can_be_revoked_and_replaced(self, coordinator: Coordinator, make_site: MakeSite) -> None:
        site = make_site()
        enrol(coordinator, site)
        lost = coordinator.enrolment.members[0].grant.serial
        coordinator.enrolment.revoke_certificate(lost, "its key was in a backup")
        assert coordinator.enrolment.revocations.is_revoked(serial=lost)
        assert not coordinator.enrolment.revocations.is_revoked(name="hospital-a")
        site.accept(coordinator.approve(site.renew()))
        assert not coordinator.enrolment.revocations.is_revoked(serial=coordinator.enrolment.members[0].grant.serial)
        assert refusal(lambda: coordinator.enrolment.revoke_certificate("0" * 40, "")) == "unknown-certificate"

    def test_a_request_whose_certificate_was_revoked_is_not_granted_again(
        self, coordinator: Coordinator, make_site: MakeSite
    ) -> None:
        request = make_site().answer(coordinator.invite("hospital-a"))
        coordinator.approve(request)
        coordinator.enrolment.revoke_certificate(coordinator.enrolment.members[0].grant.serial, "lost")
        assert refusal(lambda: coordinator.approve(request)) == "invitation-used"

    def test_who_is_not_enrolled_cannot_be_revoked(self, coordinator: Coordinator, make_site: MakeSite) -> None:
        assert refusal(lambda: coordinator.enrolment.revoke("hospital-a", "")) == "not-enrolled"
        enrol(coordinator, make_site())
        coordinator.enrolment.revoke("hospital-a", "")
        assert refusal(lambda: coordinator.enrolment.revoke("hospital-a", "")) == "not-enrolled"


def test_over_tls_a_member_is_let_in_and_refused_from_the_moment_it_is_revoked(tmp_path: Path) -> None:
    """OpenSSL takes the certificate; the gate looks it up in the file that is written with the decision."""
    coordinator = Coordinator(tmp_path / "coordinator", Now(datetime.now(UTC)))
    site, authority, key = (
        Site.make(tmp_path / "site", "hospital-a", coordinator.now),
        coordinator.authority,
        new_tls_key(),
    )
    enrol(coordinator, site)
    server = (authority.certify_coordinator(HOSTS, key.public_key(), coordinator.now()), key)
    granted = joining.membership(site.open.vault, FEDERATION).granted
    assert granted is not None
    client = (read_pem(site.credentials.certificate), read_private_text(granted.tls_key))
    gate = GateRevocations(coordinator.folder / REVOKED_FILE)
    listener = server_context(tmp_path, server, authority.certificate)
    caller = client_context(tmp_path, client, read_pem(site.credentials.authority))
    seen = Peer.from_der(handshake(listener, caller))
    assert seen.name == f"fedtune://{FEDERATION}.internal/hospital-a"
    assert not gate.any_of(seen.serial, seen.key)
    coordinator.enrolment.revoke("hospital-a", "contract ended")
    again = Peer.from_der(handshake(listener, caller))
    assert gate.any_of(again.serial)
    assert gate.any_of(again.key)
    with pytest.raises(ssl.SSLError):
        handshake(listener, client_context(tmp_path, None, authority.certificate))
