"""The three kinds of certificate (X.509, RFC 5280): how each is made, and a check that it is exactly that.

    authority    self-signed, P-384; signs certificates and nothing else, none of them an authority (path length 0);
                 name constraints: sites of its federation and the coordinator's hosts
    coordinator  P-256, for TLS servers; names the hosts where it is reached
    site         P-256, for TLS clients; names one site, `fedtune://FEDERATION.internal/SITE`

Each begins `SKEW` before it is made, so that a machine whose clock is behind accepts it, and none outlives its
authority. Serial numbers are 159 random bits. Knows no file and no revocation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedtune.errors import EnrolmentError
from fedtune.pki.names import domain_of, host, site_in, site_uri

SKEW = timedelta(hours=1)
AUTHORITY_LIFE = timedelta(days=3652)
LEAF_LIFE = timedelta(days=365)
UNREADABLE = (  # what the parser raises for bytes that are no certificate, or no request for one
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
_LAZY = ("subject", "issuer", "extensions", "not_valid_before_utc", "not_valid_after_utc", "signature_hash_algorithm")
_USES = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
_MORE_USES = ("key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
E = TypeVar("E", bound=x509.ExtensionType)
_EVERY_IP = (IPv4Network("0.0.0.0/0"), IPv6Network("::/0"))


@dataclass(frozen=True, slots=True)
class Issuer:
    """An authority's certificate and key, as far as a signature needs them."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def authority_certificate(
    federation: str, hosts: Iterable[str], key: ec.EllipticCurvePrivateKey, now: datetime
) -> x509.Certificate:
    """Sign an authority by itself; `hosts` are all names and addresses that its coordinator can ever have.

    A host name stands for the names below it too. Error: `enrolment.bad-host`.
    """
    name = _subject(federation, "fedtune authority")
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = _builder(name, key.public_key(), now, now + AUTHORITY_LIFE)
    for extension, critical in [
        (x509.BasicConstraints(ca=True, path_length=0), True),
        (_key_usage("key_cert_sign"), True),
        (x509.ExtendedKeyUsage(both), False),
        (_constraints(federation, hosts), True),
    ]:
        builder = builder.add_extension(extension, critical)
    return builder.issuer_name(name).sign(key, SHA384())


def coordinator_certificate(
    issuer: Issuer, hosts: Iterable[str], public_key: ec.EllipticCurvePublicKey, now: datetime
) -> x509.Certificate:
    """Certify a coordinator's TLS key for the hosts where it is reached.

    Errors: `enrolment.bad-host` also for a host outside the authority's constraints, `enrolment.authority-expired`.
    """
    names = [_general_name(text) for text in hosts]
    if not names:
        raise EnrolmentError("bad-host", "a coordinator has at least one host", hint="name where sites reach it")
    for general in names:
        _require_permitted(issuer.certificate, general)
    alternative = x509.SubjectAlternativeName(names)
    subject = _subject(federation_of(issuer.certificate), "fedtune coordinator")
    return _issue(issuer, subject, alternative, ExtendedKeyUsageOID.SERVER_AUTH, public_key, now)


def site_certificate(
    issuer: Issuer, site: str, public_key: ec.EllipticCurvePublicKey, now: datetime
) -> x509.Certificate:
    """Certify a site's TLS key for its name. Error: `enrolment.authority-expired`."""
    federation = federation_of(issuer.certificate)
    alternative = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(site_uri(federation, site))])
    subject = _subject(federation, "fedtune site", site)
    return _issue(issuer, subject, alternative, ExtendedKeyUsageOID.CLIENT_AUTH, public_key, now)


def check_authority(certificate: x509.Certificate, federation: str, now: datetime) -> None:
    """Refuse what is not the authority of a federation, now: `enrolment.bad-certificate`, `.certificate-expired`."""
    constraints, basic = _extension(certificate, x509.NameConstraints), _extension(certificate, x509.BasicConstraints)
    uri = x509.UniformResourceIdentifier(domain_of(federation))
    _require(basic == x509.BasicConstraints(ca=True, path_length=0), "basic constraints")
    _require(
        _extension(certificate, x509.BasicConstraints) == x509.BasicConstraints(ca=True, path_length=0),
        "basic constraints",
    )
    _require(_extension(certificate, x509.KeyUsage) == _key_usage("key_cert_sign"), "key usage")
    _require(constraints is not None and uri in (constraints.permitted_subtrees or ()), "name constraints")
    _require(federation_of(certificate) == federation, "federation")
    check_signed(certificate, certificate)
    check_time(certificate, now)


def check_site(certificate: x509.Certificate, authority: x509.Certificate, site: str, now: datetime) -> None:
    """Refuse what is not the certificate of a site by this authority, now; the errors of `check_authority`."""
    purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
    basic = _extension(certificate, x509.BasicConstraints)
    _require(basic == x509.BasicConstraints(ca=False, path_length=None), "basic constraints")
    _require(
        _extension(certificate, x509.BasicConstraints) == x509.BasicConstraints(ca=False, path_length=None),
        "basic constraints",
    )
    _require(_extension(certificate, x509.KeyUsage) == _key_usage("digital_signature"), "key usage")
    _require(_extension(certificate, x509.ExtendedKeyUsage) == purpose, "extended key usage")
    _require(site_of(certificate, federation_of(authority)) == site, "name")
    check_signed(certificate, authority)
    check_time(certificate, now)


def check_signed(certificate: x509.Certificate, authority: x509.Certificate) -> None:
    """Refuse a certificate that an authority has not signed: `enrolment.bad-certificate`."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, *UNREADABLE) as error:
        raise bad_certificate("another authority signed it") from error


def check_time(certificate: x509.Certificate, now: datetime) -> None:
    """Refuse a certificate that is not valid at a moment, give or take `SKEW`: `enrolment.certificate-expired`."""
    if not certificate.not_valid_before_utc - SKEW <= now <= certificate.not_valid_after_utc + SKEW:
        span = f"{certificate.not_valid_before_utc:%Y-%m-%d} to {certificate.not_valid_after_utc:%Y-%m-%d}"
        hint = "compare the clock of this machine, then renew the certificate"
        raise EnrolmentError("certificate-expired", f"a certificate is valid from {span} only", hint=hint)


def is_due(certificate: x509.Certificate, now: datetime) -> bool:
    """Whether less than a third of a certificate's life is left: time to renew it."""
    left = certificate.not_valid_after_utc - now
    return left * 3 < certificate.not_valid_after_utc - certificate.not_valid_before_utc


def federation_of(certificate: x509.Certificate) -> str:
    """Return the federation that a certificate's subject names, an empty text where it names none."""
    names = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    return str(names[0].value) if len(names) == 1 else ""


def site_of(certificate: x509.Certificate, federation: str) -> str | None:
    """Return the one site of a federation that a certificate names, None for any other.

    It believes the certificate: ask only one that was verified, as a TLS handshake does.
    """
    alternative = _extension(certificate, x509.SubjectAlternativeName)
    names = list(alternative) if alternative is not None else []
    if len(names) != 1 or not isinstance(names[0], x509.UniformResourceIdentifier):
        return None
    return site_in(names[0].value, federation)


def serial_of(certificate: x509.Certificate) -> str:
    """Return a certificate's serial number in 40 hexadecimal digits."""
    return f"{certificate.serial_number:040x}"


def pem(certificate: x509.Certificate) -> str:
    """Spell a certificate."""
    return certificate.public_bytes(Encoding.PEM).decode()


def read_pem(text: str) -> x509.Certificate:
    """Return the certificate of a text; what `pem` does not write is `enrolment.bad-certificate`."""
    try:
        certificate = x509.load_pem_x509_certificate(text.encode())
        spelled = pem(certificate)
        for name in _LAZY:
            getattr(certificate, name)
        certificate.public_key()
    except UNREADABLE as error:
        raise bad_certificate("it cannot be read") from error
    _require(spelled == text, "spelling")
    return certificate


def bad_certificate(problem: str) -> EnrolmentError:
    """Return the error for a certificate that is not what it should be."""
    hint = "ask the coordinator for a new one"
    return EnrolmentError("bad-certificate", f"a certificate is not one of this federation's: {problem}", hint=hint)


def _issue(
    issuer: Issuer,
    subject: x509.Name,
    names: x509.SubjectAlternativeName,
    purpose: x509.ObjectIdentifier,
    public_key: ec.EllipticCurvePublicKey,
    now: datetime,
) -> x509.Certificate:
    end = min(now + LEAF_LIFE, issuer.certificate.not_valid_after_utc)
    if end <= now:
        hint = "renew the authority first; its key and the sites' certificates stay"
        raise EnrolmentError("authority-expired", "the federation's authority has expired", hint=hint)
    key_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key())
    builder = _builder(subject, public_key, now, end)
    for extension, critical in [
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_key_usage("digital_signature"), True),
        (x509.ExtendedKeyUsage([purpose]), False),
        (names, False),
        (key_id, False),
    ]:
        builder = builder.add_extension(extension, critical)
    return builder.issuer_name(issuer.certificate.subject).sign(issuer.key, SHA384())


def _builder(
    subject: x509.Name, public_key: ec.EllipticCurvePublicKey, now: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _subject(federation: str, role: str, site: str = "") -> x509.Name:
    """Name a holder; the role has a space in it, so no verifier takes it for a host name."""
    names = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation)]
    if site:
        names.append(x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, site))
    return x509.Name([*names, x509.NameAttribute(NameOID.COMMON_NAME, role)])


def _key_usage(use: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{name: name == use for name in (*_USES, *_MORE_USES)})


def _general_name(text: str) -> x509.GeneralName:
    name = host(text)
    return x509.DNSName(name) if isinstance(name, str) else x509.IPAddress(name)


def _constraints(federation: str, hosts: Iterable[str]) -> x509.NameConstraints:
    """Permit the federation's sites and the hosts; a kind of name of which none is permitted is excluded."""
    names = [host(text) for text in hosts]
    domains = [x509.DNSName(name) for name in names if isinstance(name, str)]
    networks = [x509.IPAddress(ip_network(name)) for name in names if not isinstance(name, str)]
    uri = x509.UniformResourceIdentifier(domain_of(federation))
    excluded: list[x509.GeneralName] = [] if domains else [x509.DNSName("")]
    if not networks:
        excluded.extend(x509.IPAddress(network) for network in _EVERY_IP)
    return x509.NameConstraints([uri, *domains, *networks], excluded or None)


def _require_permitted(authority: x509.Certificate, name: x509.GeneralName) -> None:
    constraints = _extension(authority, x509.NameConstraints)
    if any(_covers(permitted, name) for permitted in (constraints.permitted_subtrees if constraints else None) or ()):
        return
    hint = "choose a host that was named when the federation was made, or make another federation"
    raise EnrolmentError("bad-host", f"the authority may not certify the host {name.value}", hint=hint)


def _covers(permitted: x509.GeneralName, name: x509.GeneralName) -> bool:
    if isinstance(name, x509.DNSName) and isinstance(permitted, x509.DNSName):
        return f".{name.value}".endswith(f".{permitted.value}")
    if isinstance(name, x509.IPAddress) and isinstance(permitted, x509.IPAddress):
        return ip_network(name.value) == permitted.value
    return False


def _extension(certificate: x509.Certificate, kind: type[E]) -> E | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise bad_certificate(f"its {what} is not as it should be")
