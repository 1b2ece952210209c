"""`fedtune server renew`: the coordinator's own certificates, in time, and without shutting a site out."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fedtune.pki.authority import Authority, Secret, write_coordinator
from fedtune.pki.certificates import AUTHORITY_LIFE, LEAF_LIFE, read_pem
from fedtune_client import enrolment as joining
from fedtune_server.certificate import read_standing
from tests.server.commands.conftest import ADDRESS, key_file
from tests.support.handshakes import client_context, handshake, server_context

if TYPE_CHECKING:
    from tests.server.commands.conftest import Office
    from tests.support.enrolments import Site

SECRET = Secret.key(bytes([7]) * 32)


def reaches(office: Office, site: Site, host: str) -> bool:
    """Whether a site, with what it was granted last, accepts the certificate that the coordinator would show."""
    found = joining.credentials(site.open.vault, office.json("enrol", "list")["federation"])
    own = load_pem_private_key(found.tls_key, None)
    shown = office.place.authority / "coordinator.pem"
    key = load_pem_private_key(shown.read_bytes().partition(b"-----END CERTIFICATE-----\n")[2], None)
    assert isinstance(own, ec.EllipticCurvePrivateKey)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    authority = read_standing(office.place.authority).authority
    pair = (x509.load_pem_x509_certificate(shown.read_bytes()), key)
    server = server_context(office.folder, pair, authority)
    client = client_context(office.folder, (read_pem(found.certificate), own), read_pem(found.authority))
    try:
        return bool(handshake(server, client, host))
    except ssl.SSLError:
        return False


def aged(office: Office, share: float) -> None:
    """Let the coordinator's certificate be as if a share of its life were over."""
    from datetime import UTC, datetime

    authority = Authority.load(office.place.authority, SECRET)
    write_coordinator(office.place.authority, authority, ["fl.example.org"], datetime.now(UTC) - share * LEAF_LIFE)


def test_nothing_that_is_good_is_renewed_and_no_secret_asked_for(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDTUNE_AUTHORITY_KEY_FILE")
    before = office.snapshot()
    found = office.json("renew")
    assert (found["renewed"], found["authority_renewed"]) == (False, False)
    assert office.done("renew").out.startswith("nothing is due: the certificate of fl.example.org is good until ")
    assert office.snapshot() == before


def test_a_certificate_in_its_last_third_is_renewed_and_sites_go_on(office: Office) -> None:
    site = office.site()
    office.enrol(site)
    aged(office, 0.6)
    assert office.json("renew")["renewed"] is False
    aged(office, 0.7)
    assert "due: this coordinator's own: fedtune server renew" in office.done("enrol", "list").out
    done = office.done("renew")
    assert "a coordinator that runs shows it after a restart" in done.out
    assert office.json("enrol", "list")["own"]["renewal_due"] is False
    assert reaches(office, site, "fl.example.org")


@pytest.mark.parametrize("left", [b"", b"no certificate"])
def test_a_certificate_that_is_lost_or_damaged_is_made_anew(office: Office, left: bytes) -> None:
    path = office.place.authority / "coordinator.pem"
    path.write_bytes(left) if left else path.unlink()
    assert office.json("enrol", "list")["own"]["certificate"] is None
    found = office.json("renew")
    assert (found["renewed"], found["hosts"]) == (True, ["fl.example.org"])


def test_one_whose_key_was_seen_is_renewed_at_once(office: Office) -> None:
    before = (office.place.authority / "coordinator.pem").read_bytes()
    assert office.json("renew", "--force")["renewed"] is True
    assert (office.place.authority / "coordinator.pem").read_bytes() != before


def test_a_wrong_secret_renews_nothing(office: Office) -> None:
    before = (office.place.authority / "coordinator.pem").read_bytes()
    other = str(key_file(office.folder / "other.key", 8))
    assert "error[enrolment.wrong-secret]" in office.refused("renew", "--force", "--key-file", other)
    assert (office.place.authority / "coordinator.pem").read_bytes() == before


def test_an_authority_in_its_last_third_is_renewed_with_the_same_key(office: Office) -> None:
    from datetime import UTC, datetime

    site = office.site()
    authority = Authority.load(office.place.authority, SECRET)
    authority.renewed(["fl.example.org"], datetime.now(UTC) - 0.7 * AUTHORITY_LIFE).save(office.place.authority, SECRET)
    office.enrol(site)
    found = office.json("renew")
    assert found["authority_renewed"] is True
    assert read_standing(office.place.authority).authority.public_key() == authority.certificate.public_key()
    assert reaches(office, site, "fl.example.org")
    assert "error" not in office.run("renew").err


class TestAnotherHost:
    def test_one_below_a_host_that_the_authority_names_is_certified_at_once(self, office: Office) -> None:
        site = office.site()
        office.enrol(site)
        found = office.json("renew", "--host", "backup.fl.example.org")
        assert (found["renewed"], found["authority_renewed"], found["waiting"]) == (True, False, {})
        assert reaches(office, site, "backup.fl.example.org")

    def test_one_outside_waits_until_every_site_has_renewed(self, office: Office) -> None:
        site = office.site()
        office.enrol(site)
        found = office.json("renew", "--host", "new.example.net")
        assert (found["renewed"], found["authority_renewed"]) == (False, True)
        assert found["waiting"] == {"new.example.net": ["north"]}
        assert "not certified yet: new.example.net, which north would refuse" in office.done("renew").out
        assert reaches(office, site, "fl.example.org")
        office.renew(site)
        assert office.json("renew")["hosts"] == ["fl.example.org", "new.example.net"]
        assert reaches(office, site, "fl.example.org")
        assert reaches(office, site, "new.example.net")

    def test_without_waiting_a_site_is_shut_out_also_of_the_old_host(self, office: Office) -> None:
        """Why `renew` waits: OpenSSL refuses a certificate for one host outside the constraints that it knows."""
        from datetime import UTC, datetime

        site = office.site()
        office.enrol(site)
        office.json("renew", "--host", "new.example.net")
        authority = Authority.load(office.place.authority, SECRET)
        hosts = ["fl.example.org", "new.example.net"]
        write_coordinator(office.place.authority, authority, hosts, datetime.now(UTC))
        assert not reaches(office, site, "fl.example.org")
        office.renew(site)
        assert reaches(office, site, "fl.example.org")

    def test_an_address_that_was_changed_is_certified_where_nobody_is_enrolled(self, office: Office) -> None:
        text = office.place.facts_file.read_text().replace(ADDRESS, "10.0.0.7:8443")
        office.place.facts_file.write_text(text)
        assert office.json("enrol", "list")["own"]["renewal_due"] is True
        found = office.json("renew")
        assert found["hosts"] == ["fl.example.org", "10.0.0.7"]
        assert "error[enrolment.bad-host]" in office.refused("renew", "--host", "Not_A_Host")
