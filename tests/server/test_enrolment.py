"""Who is let in, and who is not, by a coordinator that is attacked, killed, or asked twice."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from fedtune.envelopes.peers import Peers
from fedtune.journal.chain import moment
from fedtune.pki.authority import Authority
from fedtune.pki.certificates import pem
from fedtune.pki.grants import read_grant
from fedtune.pki.invitations import read_invitation
from fedtune.pki.keys import new_node_key, new_tls_key, node_text, read_private_text
from fedtune.pki.lineage import lineage_lines
from fedtune.pki.requests import Claims, Keys, certificate_request, write_request
from fedtune_client import enrolment as joining
from fedtune_client.folder import SiteFolder, open_site_folder
from tests.support.enrolments import FEDERATION, HOSTS, KEY, Coordinator, MakeSite, Now, Site, enrol, refusal


def test_a_site_that_is_invited_and_approved_is_a_member(coordinator: Coordinator, make_site: MakeSite) -> None:
    site = make_site()
    request = site.answer(coordinator.invite("hospital-a"))
    candidate = coordinator.enrolment.examine(request)
    assert (candidate.site, candidate.occasion) == ("hospital-a", "new")
    assert candidate.identity == site.open.journal.chain.site
    assert coordinator.enrolment.members == ()
    site.accept(coordinator.approve(request))
    (member,) = coordinator.enrolment.members
    assert (member.site, member.identity, member.revoked) == ("hospital-a", site.open.journal.chain.site, None)
    assert member.grant.certificate == site.credentials.certificate
    assert coordinator.enrolment.offers == ()
    assert coordinator.enrolment.known()["hospital-a"][0].key == site.open.journal.chain.public_key


def test_another_process_sees_a_decision_at_once(coordinator: Coordinator, make_site: MakeSite) -> None:
    other = coordinator.restarted()
    enrol(coordinator, make_site())
    assert [member.site for member in other.members] == ["hospital-a"]
    coordinator.enrolment.revoke("hospital-a", "left")
    assert other.revocations.is_revoked(name="hospital-a")


class TestInvitations:
    def test_one_enrols_one_journal_once(self, coordinator: Coordinator, make_site: MakeSite) -> None:
        invitation = coordinator.invite("hospital-a")
        first, second = make_site().answer(invitation), make_site(folder="copy").answer(invitation)
        coordinator.approve(first)
        assert refusal(lambda: coordinator.approve(second)) == "invitation-used"
        assert len(coordinator.enrolment.members) == 1

    def test_the_same_request_gets_the_same_grant_again(self, coordinator: Coordinator, make_site: MakeSite) -> None:
        request = make_site().answer(coordinator.invite("hospital-a"))
        grant = coordinator.approve(request)
        coordinator.now.later(days=30)
        assert coordinator.approve(request) == grant
        assert coordinator.enrolment.grant("hospital-a") == grant
        assert coordinator.enrolment.examine(request).occasion == "again"

    def test_one_is_good_in_its_time_alone(self, coordinator: Coordinator, make_site: MakeSite) -> None:
        request = make_site().answer(coordinator.invite("hospital-a", timedelta(days=1)))
        coordinator.now.later(days=1, seconds=1)
        assert refusal(lambda: coordinator.approve(request)) == "expired-invitation"
        coordinator.now.later(seconds=-1)
        coordinator.approve(request)

    def test_one_is_good_for_its_site_alone(self, coordinator: Coordinator, make_site: MakeSite) -> None:
        invitation, site = coordinator.invite("hospital-b"), make_site()
        assert refusal(lambda: site.answer(invitation)) == "other-site"
        dishonest = asked(site, invitation)
        assert refusal(lambda: coordinator.approve(dishonest)) == "other-site"
        coordinator.approve(make_site("hospital-b").answer(invitation))

    def test_a_newer_one_or_a_withdrawal_ends_it(self, coordinator: Coordinator, make_site: MakeSite) -> None:
        first = make_site().answer(coordinator.invite("hospital-a"))
        second = make_site(folder="again").answer(coordinator.invite("hospital-a"))
        assert refusal(lambda: coordinator.approve(first)) == "invitation-withdrawn"
        coordinator.enrolment.withdraw("hospital-a")
        assert refusal(lambda: coordinator.approve(second)) == "invitation-withdrawn"
        assert refusal(lambda: coordinator.enrolment.withdraw("hospital-a")) == "unknown-invitation"

    def test_one_can_be_written_again_byte_for_byte(self, coordinator: Coordinator) -> None:
        invitation = coordinator.invite("hospital-a")
        assert coordinator.restarted().invitation("hospital-a") == invitation

    def test_who_knows_everything_but_the_token_is_refused(
        self, coordinator: Coordinator, make_site: MakeSite, tmp_path: Path
    ) -> None:
        """An attacker makes an invitation of the same id with a token of its own, and lets a site answer that."""
        invitation = coordinator.invite("hospital-a")
        (coordinator.folder / "token-secret").rename(tmp_path / "kept")
        (coordinator.folder / "token-secret").write_bytes(b"\0" * 32)
        (coordinator.folder / "token-secret").chmod(0o600)
        guessed = coordinator.enrolment.invitation("hospital-a")
        (tmp_path / "kept").rename(coordinator.folder / "token-secret")
        assert read_invitation(guessed, coordinator.now()).offer == read_invitation(invitation, coordinator.now()).offer
        site = make_site()
        assert refusal(lambda: coordinator.approve(site.answer(guessed))) == "wrong-token"
        coordinator.approve(make_site(folder="control").answer(invitation))

    def test_a_request_for_another_federation_is_refused(
        self, coordinator: Coordinator, make_site: MakeSite, tmp_path: Path
    ) -> None:
        other = Coordinator(tmp_path / "other", federation="banks-0011223344556677")
        request = make_site().answer(other.invite("hospital-a"))
        assert refusal(lambda: coordinator.approve(request)) == "other-federation"

    def test_one_of_the_same_federation_by_another_coordinator_is_unknown(
        self, coordinator: Coordinator, make_site: MakeSite, tmp_path: Path
    ) -> None:
        request = make_site().answer(Coordinator(tmp_path / "twin").invite("hospital-a"))
        assert refusal(lambda: coordinator.approve(request)) == "unknown-invitation"

    @pytest.mark.parametrize("name", ["", "a/b", "../x", "x" * 65, "a b", "é"])
    def test_a_name_that_no_site_can_have_is_not_invited(self, coordinator: Coordinator, name: str) -> None:
        assert refusal(lambda: coordinator.invite(name)) == "bad-name"


class TestNames:
    def test_a_members_name_is_taken_also_in_other_letters(self, coordinator: Coordinator, make_site: MakeSite) -> None:
        enrol(coordinator, make_site())
        assert refusal(lambda: coordinator.invite("hospital-a")) == "name-taken"
        assert refusal(lambda: coordinator.invite("Hospital-A")) == "name-taken"
        coordinator.invite("hospital-b")

    def test_a_name_stays_with_its_journal_even_after_it_was_revoked(
        self, coordinator: Coordinator, make_site: MakeSite
    ) -> None:
        enrol(coordinator, make_site())
        coordinator.enrolment.revoke("hospital-a", "left")
        another = make_site(folder="another").answer(coordinator.invite("hospital-a"))
        assert refusal(lambda: coordinator.approve(another)) == "other-journal"

    def test_a_copy_of_a_journal_cannot_be_two_sites(self, coordinator: Coordinator, make_site: MakeSite) -> None:
        site = make_site()
        enrol(coordinator, site)
        invitation = coordinator.invite("hospital-b")
        assert refusal(lambda: site.answer(invitation)) == "other-site"
        renamed = asked(site, invitation, site="hospital-b")
        assert refusal(lambda: coordinator.approve(renamed)) == "other-site"

    @pytest.mark.parametrize("shared", ["tls", "node", "both", ""])
    def test_two_sites_do_not_share_a_key(self, coordinator: Coordinator, make_site: MakeSite, shared: str) -> None:
        first, second = make_site(), make_site("hospital-b")
        enrol(coordinator, first)
        theirs = joining.membership(first.open.vault, FEDERATION).granted
        assert theirs is not None
        tls = read_private_text(theirs.tls_key) if shared in {"tls", "both"} else new_tls_key()
        node = read_private_text(theirs.node_key) if shared in {"node", "both"} else new_node_key()
        request = asked(second, coordinator.invite("hospital-b"), Keys(tls, node))
        if shared:
            assert refusal(lambda: coordinator.approve(request)) == "key-taken"
        else:
            coordinator.approve(request)

    def test_a_branch_of_a_sites_keys_does_not_come_back_as_the_site(
        self, coordinator: Coordinator, make_site: MakeSite, tmp_path: Path
    ) -> None:
        site = make_site()
        shutil.copytree(tmp_path / "hospital-a", tmp_path / "stolen")
        thief = reopened(tmp_path / "stolen", coordinator.now)
        site.rotate()
        thief.rotate()
        enrol(coordinator, site)
        coordinator.enrolment.revoke("hospital-a", "stolen")
        invitation = coordinator.invite("hospital-a")
        stolen = thief.answer(invitation)
        assert refusal(lambda: coordinator.approve(stolen)) == "bad-lineage"
        site.rotate()
        coordinator.approve(site.answer(invitation))


class TestRenewal:
    def test_a_site_is_never_without_a_certificate(self, coordinator: Coordinator, make_site: MakeSite) -> None:
        site = make_site()
        enrol(coordinator, site)
        serials = [coordinator.enrolment.members[0].grant.serial]
        for _ in range(3):
            coordinator.now.later(days=250)
            request = site.renew()
            assert coordinator.enrolment.examine(request).occasion == "renewal"
            site.accept(coordinator.approve(request))
            serials.append(coordinator.enrolment.members[0].grant.serial)
            standing = [serial for serial in serials if not coordinator.enrolment.revocations.is_revoked(serial=serial)]
            assert standing == serials[-2:]

    def test_the_nodes_key_stays_unless_another_is_wanted(self, coordinator: Coordinator, make_site: MakeSite) -> None:
        site = make_site()
        enrol(coordinator, site)
        nodes = [coordinator.enrolment.members[0].grant.node_key]
        for new_node in (False, True):
            site.accept(coordinator.approve(site.renew(new_node=new_node)))
            nodes.append(node_text(public_half(site.credentials.node_key)))
            assert nodes[-1] == coordinator.enrolment.members[0].grant.node_key
        assert nodes[0] == nodes[1] != nodes[2]

    def test_a_rotated_key_keeps_the_site_and_retires_the_old_key(
        self, coordinator: Coordinator, make_site: MakeSite
    ) -> None:
        site = make_site()
        enrol(coordinator, site)
        identity, old = coordinator.enrolment.members[0].identity, site.open.journal.chain.public_key
        coordinator.now.later(days=1)
        new = site.rotate()
        coordinator.now.later(hours=1)
        site.accept(coordinator.approve(site.renew()))
        first, second = coordinator.enrolment.known()["hospital-a"]
        assert coordinator.enrolment.members[0].identity == identity
        assert (first.key, second.key, second.until) == (old, new, None)
        rotated_at = (coordinator.now() - timedelta(hours=1)).timestamp() * 1000
        assert first.until == rotated_at
        assert Peers(coordinator.enrolment.known).is_active("hospital-a")

    def test_a_key_that_was_replaced_before_the_enrolment_never_counts(
        self, coordinator: Coordinator, make_site: MakeSite
    ) -> None:
        site = make_site()
        old = site.open.journal.chain.public_key
        site.rotate()
        enrol(coordinator, site)
        assert old not in {key.key for key in coordinator.enrolment.known()["hospital-a"]}

    def test_a_branch_of_the_sites_keys_is_refused(
        self, coordinator: Coordinator, make_site: MakeSite, tmp_path: Path
    ) -> None:
        """A thief of the site's folder rotates too; who comes second is refused."""
        site = make_site()
        enrol(coordinator, site)
        shutil.copytree(tmp_path / "hospital-a", tmp_path / "stolen")
        thief = reopened(tmp_path / "stolen", coordinator.now)
        site.rotate()
        thief.rotate()
        site.accept(coordinator.approve(site.renew()))
        stolen = thief.renew()
        assert refusal(lambda: coordinator.approve(stolen)) == "stale-request"

    def test_an_old_renewal_is_no_use_after_a_newer_one(self, coordinator: Coordinator, make_site: MakeSite) -> None:
        site = make_site()
        enrol(coordinator, site)
        never_sent = site.renew()
        newer = site.renew(new_node=True)
        coordinator.approve(newer)
        assert refusal(lambda: coordinator.approve(never_sent)) == "stale-request"

    def test_a_request_that_was_granted_once_is_no_use_after_the_next(
        self, coordinator: Coordinator, make_site: MakeSite
    ) -> None:
        site = make_site()
        requests = [site.answer(coordinator.invite("hospital-a"))]
        site.accept(coordinator.approve(requests[0]))
        for _ in range(2):
            requests.append(site.renew())
            site.accept(coordinator.approve(requests[-1]))
        codes = [refusal(lambda raw=raw: coordinator.approve(raw)) for raw in requests[:-1]]
        assert codes == ["invitation-used", "stale-request"]

    def test_who_is_not_a_member_renews_nothing(self, coordinator: Coordinator, make_site: MakeSite) -> None:
        site = make_site()
        enrol(coordinator, site)
        request = site.renew()
        coordinator.enrolment.revoke("hospital-a", "left")
        assert refusal(lambda: coordinator.approve(request)) == "not-enrolled"

    def test_with_another_authority_nothing_is_granted(self, coordinator: Coordinator, make_site: MakeSite) -> None:
        site = make_site()
        enrol(coordinator, site)
        other = Authority.create(FEDERATION, HOSTS, coordinator.now())
        assert refusal(lambda: coordinator.enrolment.approve(site.renew(), other)) == "bad-certificate"
        renewed = coordinator.authority.renewed(HOSTS, coordinator.now())
        site.accept(coordinator.enrolment.approve(site.renew(), renewed, address="localhost:9443"))
        assert (site.credentials.authority, site.credentials.address) == (pem(renewed.certificate), "localhost:9443")


def asked(by: Site, invitation: bytes, keys: Keys | None = None, **fields: object) -> bytes:
    """A request as a dishonest site could write it."""
    invited, used = read_invitation(invitation, by.now()), keys or Keys(new_tls_key(), new_node_key())
    with by.open.journal as journal:
        usual = {
            "federation": FEDERATION,
            "site": by.open.facts.name,
            "invitation": invited.offer.id,
            "replaces": None,
            "lineage": lineage_lines(journal.lines()),
            "certificate_request": certificate_request(used.tls),
            "node_key": node_text(used.node.public_key()),
            "issued": moment(by.now()),
        }
        return write_request(Claims.model_validate(usual | fields), used, invited.token, journal.sign)


def public_half(file: bytes) -> ec.EllipticCurvePublicKey:
    """Read a node's key as Flower's SuperNode does."""
    key = load_ssh_private_key(file, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key.public_key()


def reopened(folder: Path, now: Now) -> Site:
    return Site(open_site_folder(SiteFolder(folder), KEY, now), now)


def test_a_grant_is_signed_by_the_coordinator(coordinator: Coordinator, make_site: MakeSite) -> None:
    raw = coordinator.approve(make_site().answer(coordinator.invite("hospital-a")))
    assert read_grant(raw, coordinator.enrolment._state.coordinator).site == "hospital-a"
    assert refusal(lambda: read_grant(raw, "0" * 64)) == "forged"
