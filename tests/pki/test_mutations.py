"""Certificates and requests for them with bytes changed at random: refused with a code, whatever the parser says."""

from __future__ import annotations

import base64

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import EnrolmentError
from fedtune.pki import certificates, requests
from fedtune.pki.authority import Authority
from fedtune.pki.keys import new_tls_key
from tests.support.enrolments import FEDERATION, HOSTS, START

AUTHORITY, KEY = Authority.create(FEDERATION, HOSTS, START), new_tls_key()
SITE = AUTHORITY.certify_site("hospital-a", KEY.public_key(), START)
REQUEST = base64.b64decode("".join(requests.certificate_request(KEY).splitlines()[1:-1]))
CHANGES = st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), min_size=1, max_size=4)


def armoured(der: bytes, changes: list[tuple[int, int]], label: str) -> str | None:
    """Return the bytes as PEM with some changed, None where the changes undo each other."""
    changed = bytearray(der)
    for place, bits in changes:
        changed[place % len(der)] ^= bits
    text = base64.b64encode(changed).decode()
    lines = "".join(text[start : start + 64] + "\n" for start in range(0, len(text), 64))
    return None if changed == der else f"-----BEGIN {label}-----\n{lines}-----END {label}-----\n"


@pytest.mark.filterwarnings("ignore:Attribute's length")
@settings(max_examples=300)
@given(CHANGES)
def test_a_changed_certificate_is_refused(changes: list[tuple[int, int]]) -> None:
    for good in (SITE, AUTHORITY.certificate):
        if text := armoured(good.public_bytes(Encoding.DER), changes, "CERTIFICATE"):
            with pytest.raises(EnrolmentError) as refused:
                certificates.check_site(certificates.read_pem(text), AUTHORITY.certificate, "hospital-a", START)
            assert refused.value.code == "enrolment.bad-certificate"
            with pytest.raises(EnrolmentError):
                certificates.check_authority(certificates.read_pem(text), FEDERATION, START)


@settings(max_examples=300)
@given(CHANGES)
def test_a_changed_certificate_request_is_refused(changes: list[tuple[int, int]]) -> None:
    if text := armoured(REQUEST, changes, "CERTIFICATE REQUEST"):
        with pytest.raises(EnrolmentError) as refused:
            requests._tls_key(text)
        assert refused.value.code == "enrolment.bad-key"


def test_the_same_bytes_unchanged_are_taken() -> None:
    certificates.check_site(certificates.read_pem(certificates.pem(SITE)), AUTHORITY.certificate, "hospital-a", START)
    certificates.check_authority(AUTHORITY.certificate, FEDERATION, START)
    assert requests._tls_key(requests.certificate_request(KEY)) == KEY.public_key()
