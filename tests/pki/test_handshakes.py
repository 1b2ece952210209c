"""What OpenSSL, which knows nothing of our code, makes of our certificates: whom it lets in and whom it does not."""

from __future__ import annotations

import re
import shutil
import ssl
import subprocess
from datetime import timedelta
from ipaddress import ip_address as ip
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedtune.pki import certificates
from fedtune.pki.authority import Authority
from fedtune.pki.certificates import Issuer, pem, serial_of, site_of
from fedtune.pki.keys import new_tls_key
from tests.pki.conftest import Lab
from tests.support.enrolments import FEDERATION, HOSTS
from tests.support.handshakes import Pair

YEAR_AND_MORE = timedelta(days=366)


def test_a_site_is_let_in_and_named(lab: Lab) -> None:
    seen = x509.load_der_x509_certificate(lab.connect(lab.site("Bank.One_2-x")))
    assert site_of(seen, FEDERATION) == "Bank.One_2-x"
    assert site_of(seen, "another-0011223344556677") is None


@pytest.mark.parametrize("host", HOSTS)
def test_a_coordinator_is_known_by_name_and_by_address(lab: Lab, host: str) -> None:
    assert lab.connect(lab.site(), host=host)


def test_who_shows_no_certificate_is_refused(lab: Lab) -> None:
    with pytest.raises(ssl.SSLError):
        lab.connect(None)


def test_a_site_of_a_foreign_authority_is_refused_even_if_it_has_the_same_name(lab: Lab) -> None:
    foreign = Authority.create(FEDERATION, HOSTS, lab.now)
    with pytest.raises(ssl.SSLError):
        lab.connect(lab.site(authority=foreign))


def test_an_expired_site_is_refused(lab: Lab) -> None:
    assert lab.connect(lab.site(ago=timedelta(days=364)))
    with pytest.raises(ssl.SSLError):
        lab.connect(lab.site(ago=YEAR_AND_MORE))


def test_a_clock_that_is_most_of_an_hour_wrong_keeps_nobody_out(lab: Lab) -> None:
    assert lab.connect(lab.site(ago=-timedelta(minutes=55)))
    with pytest.raises(ssl.SSLError):
        lab.connect(lab.site(ago=-timedelta(minutes=65)))


def test_a_servers_certificate_lets_nobody_in_as_a_client(lab: Lab) -> None:
    with pytest.raises(ssl.SSLError, match="certificate purpose"):
        lab.connect(lab.coordinator())


def test_a_site_cannot_stand_in_for_the_coordinator(lab: Lab) -> None:
    with pytest.raises(ssl.SSLError):
        lab.connect(lab.site(), server=lab.site())


def test_a_coordinator_under_another_name_is_refused(lab: Lab) -> None:
    with pytest.raises(ssl.SSLError, match=r"127\.0\.0\.1"):
        lab.connect(lab.site(), server=lab.coordinator("localhost"), host="127.0.0.1")


def test_an_expired_coordinator_is_refused(lab: Lab) -> None:
    with pytest.raises(ssl.SSLError):
        lab.connect(lab.site(), server=lab.coordinator(ago=YEAR_AND_MORE))


def test_a_site_cannot_vouch_for_another(lab: Lab, tmp_path: Path) -> None:
    site, key = lab.site()
    forged = Authority(site, key).certify_site("hospital-b", new_tls_key().public_key(), lab.now)
    assert not openssl_accepts(tmp_path, lab.authority.certificate, forged, between=site)


def test_what_was_issued_before_the_authority_was_renewed_stays_good(lab: Lab) -> None:
    old = lab.site()
    renewed = Lab(lab.folder, lab.authority.renewed(["localhost"], lab.now), lab.now)
    assert renewed.connect(old, server=renewed.coordinator("localhost"))


def issued(lab: Lab, names: list[x509.GeneralName]) -> Pair:
    """What whoever has stolen the authority's key can issue: any names at all."""
    issuer, key = Issuer(lab.authority.certificate, lab.authority.key), new_tls_key()
    subject, alternative = lab.authority.certificate.subject, x509.SubjectAlternativeName(names)
    purpose = ExtendedKeyUsageOID.SERVER_AUTH
    return certificates._issue(issuer, subject, alternative, purpose, key.public_key(), lab.now), key


@pytest.mark.parametrize(
    ("name", "good"),
    [
        (x509.DNSName("localhost"), True),
        (x509.DNSName("fl.localhost"), True),
        (x509.DNSName("bank.example"), False),
        (x509.DNSName("notlocalhost"), False),
        (x509.UniformResourceIdentifier(f"fedtune://{FEDERATION}.internal/hospital-a"), True),
        (x509.UniformResourceIdentifier("fedtune://another-0011223344556677.internal/hospital-a"), False),
    ],
    ids=lambda value: str(getattr(value, "value", value)),
)
def test_an_authority_is_believed_for_its_own_hosts_and_sites_alone(
    lab: Lab, tmp_path: Path, name: x509.GeneralName, good: bool
) -> None:
    certificate, _key = issued(lab, [name])
    assert openssl_accepts(tmp_path, lab.authority.certificate, certificate) is good


def test_an_authority_without_an_address_vouches_for_no_address(lab: Lab, tmp_path: Path) -> None:
    named = Lab(lab.folder, Authority.create(FEDERATION, ["fl.example"], lab.now), lab.now)
    for general, good in [
        (x509.DNSName("fl.example"), True),
        (x509.IPAddress(ip("127.0.0.1")), False),
        (x509.IPAddress(ip("::1")), False),
    ]:
        certificate, _key = issued(named, [general])
        assert openssl_accepts(tmp_path, named.authority.certificate, certificate) is good


def test_openssl_reads_what_each_certificate_may_do(lab: Lab, tmp_path: Path) -> None:
    wanted = {
        pem(lab.authority.certificate): ["CA:TRUE, pathlen:0", "Certificate Sign\n", "Name Constraints: critical"],
        pem(lab.coordinator()[0]): ["CA:FALSE", "Digital Signature\n", "TLS Web Server Authentication\n"],
        pem(lab.site()[0]): ["CA:FALSE", "Digital Signature\n", "TLS Web Client Authentication\n"],
    }
    for text, phrases in wanted.items():
        shown = openssl("x509", "-noout", "-text", given=text)
        assert [phrase for phrase in phrases if phrase not in shown] == []


def test_serial_numbers_are_long_random_and_spelled_as_openssl_spells_them(lab: Lab) -> None:
    made = [lab.site()[0] for _ in range(64)]
    assert len({serial_of(certificate) for certificate in made}) == 64
    assert max(certificate.serial_number.bit_length() for certificate in made) in {157, 158, 159}
    shown = openssl("x509", "-noout", "-serial", given=pem(made[0]))
    assert re.sub(r"\W|serial", "", shown).lower().rjust(40, "0") == serial_of(made[0])


def openssl(*arguments: str, given: str = "") -> str:
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("there is no openssl command here")
    return subprocess.run([program, *arguments], input=given, capture_output=True, text=True, check=True).stdout


def openssl_accepts(
    folder: Path, authority: x509.Certificate, certificate: x509.Certificate, between: x509.Certificate | None = None
) -> bool:
    (folder / "ca.pem").write_text(pem(authority))
    (folder / "leaf.pem").write_text(pem(certificate))
    (folder / "between.pem").write_text(pem(between or authority))
    files = ["-CAfile", f"{folder}/ca.pem", "-untrusted", f"{folder}/between.pem", f"{folder}/leaf.pem"]
    try:
        openssl("verify", "-x509_strict", *files)
    except subprocess.CalledProcessError:
        return False
    return True
