from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flwr.supercore.run import Run, RunNotRunningException

from fedtune.errors import TransportError
from fedtune.flower.bundle import build
from fedtune.flower.listener import client_context, server_context
from fedtune.flower.node import _run_goes_on, read_node_key, refuse_large, run_config
from tests.support.certificates import Authority, node_key

RUN = Run.create_empty(run_id=1)


def test_a_supernode_reads_the_plan_and_takes_nothing_else_from_a_bundle() -> None:
    assert run_config(build("{}").content, RUN) == {"plan": "{}"}


def test_a_bundle_that_is_none_ends_no_supernode() -> None:
    assert run_config(b"PK\x05\x06 no archive", RUN) == {}


@pytest.mark.parametrize(
    ("headers", "taken"),
    [
        ({"content-length": "5000000"}, True),
        ({"content-length": "0"}, True),
        ({"content-length": "100000000"}, False),
        ({}, False),
        ({"content-length": "10", "content-encoding": "gzip"}, False),
        ({"content-length": "-1"}, False),
    ],
)
def test_an_answer_that_could_fill_the_memory_is_refused_before_it_is_read(
    headers: dict[str, str], taken: bool
) -> None:
    read = []

    def body() -> object:
        read.append(1)
        yield b""

    response = httpx.Response(200, headers=headers, content=body())
    if taken:
        refuse_large(response)
    else:
        with pytest.raises(httpx.RemoteProtocolError):
            refuse_large(response)
    assert read == []


def test_both_spellings_of_a_node_key_are_read(tmp_path: Path) -> None:
    key = node_key(tmp_path / "openssh")
    (tmp_path / "pkcs8").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    for name in ("openssh", "pkcs8"):
        assert read_node_key(tmp_path / name).private_numbers() == key.private_numbers()


@pytest.mark.parametrize("content", [None, b"", b"no key", "other"])
def test_a_node_key_that_is_none_is_an_error(tmp_path: Path, content: bytes | str | None) -> None:
    if content == "other":
        other = ed25519.Ed25519PrivateKey.generate()
        content = other.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    if isinstance(content, bytes):
        (tmp_path / "key").write_bytes(content)
    with pytest.raises(TransportError) as error:
        read_node_key(tmp_path / "key")
    assert error.value.code == "transport.no-node-key"


@pytest.mark.parametrize("make", [client_context, server_context])
def test_a_certificate_without_its_key_is_an_error(tmp_path: Path, make: type) -> None:
    authority = Authority.make(tmp_path)
    a, b = authority.site("a"), authority.site("b")
    assert make(a.certificate_file, a.key_file, authority.file)
    for certificate, key in [(a.certificate_file, b.key_file), (tmp_path / "missing", a.key_file)]:
        with pytest.raises(TransportError) as error:
            make(certificate, key, authority.file)
        assert error.value.code == "transport.no-certificate"


def test_a_key_with_a_passphrase_is_an_error_and_asks_no_terminal(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.serialization import BestAvailableEncryption

    authority = Authority.make(tmp_path)
    a = authority.site("a")
    sealed = BestAvailableEncryption(b"secret")
    a.key_file.write_bytes(a.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, sealed))
    with pytest.raises(TransportError):
        client_context(a.certificate_file, a.key_file, authority.file)


def test_settings_that_cannot_be_read_end_with_a_code(tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"coordinator": "host:1", "unknown": 1}))
    words = [sys.executable, "-m", "fedtune.flower.node", str(file)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error[transport.settings]" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("status", "error"), [(403, TransportError), (503, httpx.HTTPStatusError)])
def test_a_run_that_ends_while_its_message_is_fetched_is_an_ordinary_error(status: int, error: type[Exception]) -> None:
    response = httpx.Response(status, request=httpx.Request("POST", "https://localhost/v1/fleet/pull-object"))
    with pytest.raises(error), _run_goes_on():
        response.raise_for_status()


def test_flowers_own_error_for_it_is_one_that_nothing_is_cleaned_up_after() -> None:
    assert not issubclass(RunNotRunningException, Exception)
