from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from fedtune.errors import EnrolmentError
from fedtune.journal.entries import SiteName
from fedtune.pki.names import Federation, host, new_federation, site_in, site_uri, split_address
from fedtune.pki.revocation import Revocations
from tests.support.enrolments import FEDERATION

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)


@given(NAMES)
def test_every_sites_name_survives_the_way_into_a_certificate(name: str) -> None:
    assert TypeAdapter(SiteName).validate_python(name) == name
    assert site_in(site_uri(FEDERATION, name), FEDERATION) == name


@given(st.text(max_size=80))
def test_no_other_text_is_a_sites_name(text: str) -> None:
    found = site_in(text, FEDERATION)
    assert found is None or site_uri(FEDERATION, found) == text
    assert site_in(site_uri(FEDERATION, "a") + "/" + text, FEDERATION) is None


def test_federations_of_one_name_are_two() -> None:
    first, second = new_federation("hospitals"), new_federation("hospitals")
    assert first != second
    for name in (first, second, new_federation("x" * 40)):
        assert TypeAdapter(Federation).validate_python(name) == name


@pytest.mark.parametrize("name", ["", "Hospitals", "a b", "-a", "a-", "x" * 41, "a.b", "ä"])
def test_a_name_that_no_host_could_have_is_refused(name: str) -> None:
    with pytest.raises(EnrolmentError) as refused:
        new_federation(name)
    assert refused.value.code == "enrolment.bad-name"


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("fl.hospital.example:8443", ("fl.hospital.example", 8443)),
        ("127.0.0.1:1", ("127.0.0.1", 1)),
        ("[2001:db8::1]:65535", ("2001:db8::1", 65535)),
    ],
)
def test_addresses_are_host_and_port(address: str, found: tuple[str, int]) -> None:
    assert split_address(address) == found


@pytest.mark.parametrize(
    "address",
    [
        "",
        "host",
        "host:0",
        "host:65536",
        "host:08",
        "ho st:1",
        "2001:db8::1:80",
        "[host]:80",
        "[127.0.0.1]:80",
        "a:b:1",
        "x@y:1",
        "https://a:1",
        "256.0.0.1:1",
    ],
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(EnrolmentError) as refused:
        split_address(address)
    assert refused.value.code == "enrolment.bad-host"


@given(st.text(max_size=300))
def test_a_host_is_found_or_refused_with_a_code(text: str) -> None:
    try:
        assert str(host(text)).lower() == str(host(text))
    except EnrolmentError as error:
        assert error.code == "enrolment.bad-host"  # noqa: PT017 - either is right


def test_nothing_is_revoked_by_being_empty() -> None:
    revocations = Revocations().with_site("a", frozenset({"00" + "1" * 38}), frozenset({"2" * 64}))
    assert not revocations.is_revoked()
    assert not revocations.is_revoked(name="b", serial="1" * 40, key="3" * 64)
    assert revocations.is_revoked(name="a")
    assert revocations.is_revoked(serial="1" * 38)
    assert revocations.is_revoked(key="2" * 64)
    assert not revocations.without_name("a").is_revoked(name="a")
    assert revocations.without_name("a").is_revoked(serial="1" * 38)
