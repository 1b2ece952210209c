"""An authority on disk: who has the folder alone learns no key, and a kill or a full disk leaves one that opens."""

from __future__ import annotations

import errno
import random
import subprocess
from contextlib import suppress
from datetime import timedelta
from itertools import count
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fedtune.errors import EnrolmentError
from fedtune.pki.authority import (
    AUTHORITY_FILE,
    CA_FILE,
    COORDINATOR_FILE,
    Authority,
    Secret,
    coordinator_is_due,
    read_authority,
    write_coordinator,
)
from fedtune.pki.certificates import pem
from fedtune.pki.files import write_private
from fedtune.pki.keys import key_name, new_tls_key
from tests.support.enrolments import FEDERATION, HOSTS, START
from tests.support.failing_calls import Killed, kill_at, refuse_at

KEY = Secret.key(bytes(range(32)))


@pytest.fixture
def authority() -> Authority:
    return Authority.create(FEDERATION, HOSTS, START)


@pytest.mark.parametrize("secret", [KEY, Secret.passphrase("correct horse battery")], ids=["key", "passphrase"])
def test_an_authority_opens_with_what_it_was_saved_with_and_with_nothing_else(
    tmp_path: Path, authority: Authority, secret: Secret
) -> None:
    authority.save(tmp_path, secret)
    again = Authority.load(tmp_path, secret)
    assert (again.certificate, again.key.private_numbers()) == (authority.certificate, authority.key.private_numbers())
    for wrong in (Secret.key(b"\1" * 32), *([] if secret.is_key else [Secret.passphrase("correct horse batterz")])):
        with pytest.raises(EnrolmentError) as refused:
            Authority.load(tmp_path, wrong)
        assert refused.value.code == "enrolment.wrong-secret"


def test_a_passphrase_is_one_whichever_keyboard_spells_it() -> None:
    assert Secret.passphrase("cle\u0301 ouverte longue") == Secret.passphrase("cl\u00e9 ouverte longue")


def test_openssl_opens_it_by_the_documented_derivation(tmp_path: Path, authority: Authority) -> None:
    authority.save(tmp_path, KEY)
    digits = KEY.password(FEDERATION).decode()
    command = ["openssl", "pkey", "-in", str(tmp_path / AUTHORITY_FILE), "-passin", f"pass:{digits}"]
    opened = subprocess.run(command, capture_output=True, check=True).stdout
    assert load_pem_private_key(opened, None).private_numbers() == authority.key.private_numbers()


def test_a_short_passphrase_is_refused_before_anything_is_written(tmp_path: Path, authority: Authority) -> None:
    with pytest.raises(EnrolmentError, match="fewer than 12"):
        authority.save(tmp_path, Secret.passphrase("elevenchars"))
    assert list(tmp_path.iterdir()) == []


def test_no_secret_is_shown(authority: Authority) -> None:
    shown = repr((KEY, authority, Secret.passphrase("correct horse battery")))
    assert "horse" not in shown
    assert "EllipticCurvePrivateKey" not in shown
    assert KEY.data.hex() not in shown


def test_the_certificate_is_read_without_the_secret(tmp_path: Path, authority: Authority) -> None:
    authority.save(tmp_path, KEY)
    assert read_authority(tmp_path) == authority.certificate
    assert (tmp_path / CA_FILE).read_text() == pem(authority.certificate)


def test_files_are_this_users_alone_and_others_are_refused(tmp_path: Path, authority: Authority) -> None:
    authority.save(tmp_path, KEY)
    write_coordinator(tmp_path, authority, HOSTS, START)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    (tmp_path / AUTHORITY_FILE).chmod(0o640)
    with pytest.raises(EnrolmentError) as refused:
        Authority.load(tmp_path, KEY)
    assert refused.value.code == "enrolment.permissions"


def test_a_flipped_bit_never_gives_another_authority(tmp_path: Path, authority: Authority) -> None:
    authority.save(tmp_path, KEY)
    whole, refused = (tmp_path / AUTHORITY_FILE).read_bytes(), 0
    places = random.Random(8).sample(range(len(whole)), 150)
    for place in places:
        raw = bytearray(whole)
        raw[place] ^= 1 << place % 7
        (tmp_path / AUTHORITY_FILE).write_bytes(raw)
        try:  # a line end may become another white space
            assert Authority.load(tmp_path, KEY).key.private_numbers() == authority.key.private_numbers()
        except EnrolmentError as error:
            assert error.code.removeprefix("enrolment.") in {"damaged", "wrong-secret", "bad-certificate"}  # noqa: PT017
            refused += 1
    assert refused > 0.9 * len(places)


def test_a_key_under_the_certificate_of_another_is_refused(tmp_path: Path, authority: Authority) -> None:
    other = tmp_path / "other"
    other.mkdir()
    authority.save(tmp_path, KEY)
    Authority.create(FEDERATION, HOSTS, START).save(other, KEY)
    (certificate, _), (_, key) = (halves(folder / AUTHORITY_FILE) for folder in (tmp_path, other))
    (tmp_path / AUTHORITY_FILE).write_bytes(certificate + key)
    with pytest.raises(EnrolmentError) as refused:
        Authority.load(tmp_path, KEY)
    assert refused.value.code == "enrolment.damaged"


def halves(path: Path) -> tuple[bytes, bytes]:
    certificate, mark, key = path.read_bytes().partition(b"-----BEGIN ENCRYPTED")
    return certificate, mark + key


def test_a_file_is_on_disk_before_it_has_its_name_and_its_name_is_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        made = kill_at(patch, 1000)
        write_private(tmp_path / "file", [b"content"])
    assert [call for call in made if call in {"fsync", "replace"}] == ["fsync", "replace", "fsync"]


def test_a_renewed_authority_has_the_same_key_and_a_longer_life(authority: Authority) -> None:
    renewed = authority.renewed(HOSTS, START + timedelta(days=3000))
    assert key_name(renewed.key.public_key()) == key_name(authority.key.public_key())
    assert renewed.certificate.not_valid_after_utc > authority.certificate.not_valid_after_utc


def test_nothing_outlives_its_authority_and_a_dead_one_issues_nothing(authority: Authority) -> None:
    key = new_tls_key().public_key()
    late = authority.certify_site("hospital-a", key, START + timedelta(days=3600))
    assert late.not_valid_after_utc == authority.certificate.not_valid_after_utc
    with pytest.raises(EnrolmentError) as refused:
        authority.certify_site("hospital-a", key, START + timedelta(days=3653))
    assert refused.value.code == "enrolment.authority-expired"


@pytest.mark.parametrize(
    "host", ["", "*.localhost", "Localhost", "local_host", "-a", "a..b", "1.2.3", "a" * 64, "bank.example", "10.0.0.1"]
)
def test_a_host_that_is_none_or_not_the_authoritys_is_not_certified(authority: Authority, host: str) -> None:
    key = new_tls_key().public_key()
    with pytest.raises(EnrolmentError) as refused:
        authority.certify_coordinator([*HOSTS, host], key, START)
    assert refused.value.code == "enrolment.bad-host"


def test_a_coordinators_certificate_is_due_when_missing_and_in_the_last_third_of_its_life(
    tmp_path: Path, authority: Authority
) -> None:
    assert coordinator_is_due(tmp_path, START)
    write_coordinator(tmp_path, authority, HOSTS, START)
    assert not coordinator_is_due(tmp_path, START + timedelta(days=240))
    assert coordinator_is_due(tmp_path, START + timedelta(days=246))


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "disk-full"])
def test_wherever_saving_ends_the_old_authority_or_the_new_one_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, authority: Authority, *, killed: bool
) -> None:
    renewed = authority.renewed(HOSTS, START + timedelta(days=1))
    for moment in count(1):
        folder = tmp_path / str(moment)
        folder.mkdir()
        authority.save(folder, KEY)
        with monkeypatch.context() as patch:
            made = kill_at(patch, moment) if killed else refuse_at(patch, moment, errno.ENOSPC)
            try:
                renewed.save(folder, KEY)
            except (Killed, EnrolmentError) as failure:
                assert killed or failure.code == "enrolment.disk-full"  # noqa: PT017 - some moments refuse, some do not
        found = Authority.load(folder, KEY)
        assert found.certificate in (authority.certificate, renewed.certificate)
        assert (folder / CA_FILE).read_text() == pem(found.certificate)
        if len(made) < moment:
            break
    assert moment > 6


def test_a_coordinators_key_and_certificate_always_belong_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, authority: Authority
) -> None:
    write_coordinator(tmp_path, authority, HOSTS, START)
    before = (tmp_path / COORDINATOR_FILE).read_bytes()
    for moment in count(1):
        with monkeypatch.context() as patch:
            made = kill_at(patch, moment)
            with suppress(Killed):
                write_coordinator(tmp_path, authority, HOSTS, START)
        if len(made) < moment:
            break
        content = (tmp_path / COORDINATOR_FILE).read_bytes()
        key = load_pem_private_key(content, None).public_key()
        assert b"PRIVATE KEY" in content
        assert content == before or key == read_leaf(content)


def read_leaf(content: bytes) -> object:
    from cryptography import x509

    return x509.load_pem_x509_certificate(content).public_key()
