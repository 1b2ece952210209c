from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from hypothesis import given
from hypothesis import strategies as st

from fedtune.processes.redaction import redact

SECRET = "5f1e" * 16
OPAQUE = "s3cr3t-Value.with~signs_0123"


def key_texts() -> list[str]:
    keys = [Ed25519PrivateKey.generate(), generate_private_key(SECP256R1())]
    locks: list[KeySerializationEncryption] = [NoEncryption(), BestAvailableEncryption(b"x")]
    forms = [(key, PrivateFormat.PKCS8, lock) for key in keys for lock in locks]
    forms += [(key, PrivateFormat.OpenSSH, NoEncryption()) for key in keys]
    forms += [(keys[1], PrivateFormat.TraditionalOpenSSL, NoEncryption())]
    return [key.private_bytes(Encoding.PEM, form, lock).decode() for key, form, lock in forms]


@pytest.mark.parametrize("text", key_texts())
@pytest.mark.parametrize("shape", ["{}", "read {} from a file", "cut: {}"])
def test_no_line_of_a_private_key_is_left(text: str, shape: str) -> None:
    written = text[:-40] if shape.startswith("cut") else text
    found = redact(shape.format(written)) + redact(repr(shape.format(written)))
    assert not [line for line in text.splitlines() if "-----" not in line and line in found]
    assert "[private key]" in found


def test_an_openssh_key_without_its_frame_is_hidden() -> None:
    body = "".join(key_texts()[4].splitlines()[1:-1])
    assert redact(f"key={body};") == redact("key=[private key];")


@pytest.mark.parametrize(
    "text",
    [
        f"authorization: Bearer {OPAQUE}",
        f"Authorization: Basic {OPAQUE}",
        f"{{'Authorization': 'Bearer {OPAQUE}'}}",
        f"(b'authorization', b'Bearer {OPAQUE}')",
        f"[(b'fedtune-local', b'{OPAQUE}')]",
        f"fedtune-local: {OPAQUE}",
        f"flwr-task-token={OPAQUE}",
        f"cookie: {OPAQUE}",
        f"sent bearer {OPAQUE}",
        f"FEDTUNE_VAULT_PASSPHRASE={OPAQUE}",
        f"FEDTUNE_VAULT_KEY_FILE={OPAQUE}",
        f"environ({{'FEDTUNE_VAULT_PASSPHRASE': '{OPAQUE}'}})",
        f"PASSPHRASE='{OPAQUE} and more'",
        f"FEDTUNE_VAULT_PASSPHRASE={OPAQUE} and more",
        f'passphrase = "{OPAQUE}"',
        f"HF_TOKEN={OPAQUE}",
        f'{{"token": "{OPAQUE}", "site": "a"}}',
        f"token: {OPAQUE}",
        f"--api-key={OPAQUE}",
        "from_pretrained(token=hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345)",
        "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345",
    ],
)
def test_values_of_secrets_are_hidden(text: str) -> None:
    found = redact(text)
    assert "[hidden]" in found
    assert OPAQUE not in found
    assert "and more" not in found
    assert "AbCdEfGh" not in found


@pytest.mark.parametrize("text", [SECRET, f"0x{SECRET}", f"b'{SECRET}'", f"{SECRET}{SECRET}", SECRET.upper()])
def test_of_a_long_hexadecimal_number_twelve_digits_are_left(text: str) -> None:
    found = redact(f"it is {text}.")
    assert "5F1E5F1E5F1E…" in found.upper()
    assert "5F1E5F1E5F1E5" not in found.upper()


@pytest.mark.parametrize(
    "text",
    [
        "round 3 of 10: 5 of 5 sites answered in 12.5 s",
        "max_tokens=512, tokens: 128, tokenizer=bert",
        "the secret cannot be read: make it anew",
        "transport.open-secret: /var/site/local.secret can be read by others",
        "commit 5f1e5f1e5f1e5f1e5f1e5f1e5f1e5f1e5f1e5f1e",
        "a basic test of the bearer of news",
        "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----",
        "authorisation is needed; the token has expired",
        "self_hf_model loaded",
    ],
)
def test_ordinary_lines_stay_as_they_are(text: str) -> None:
    assert redact(text) == text


pieces = st.lists(
    st.sampled_from(
        [
            *("token=", "Authorization: ", "Bearer ", "fedtune-local", "hf_AAAAbbbb1234", SECRET, "[hidden]"),
            *("-----BEGIN PRIVATE KEY-----", "-----END PRIVATE KEY-----"),
            *("'", '"', " ", "\n", ":", "=", "b", "x", "\\n"),
        ]
    ),
    max_size=12,
).map("".join)


@given(before=pieces, after=pieces, times=st.integers(1, 3))
def test_a_secret_is_hidden_whatever_stands_around_it(before: str, after: str, times: int) -> None:
    found = f"{before} authorization: Bearer {OPAQUE} {after}"
    for _ in range(times):
        found = redact(found)
    assert OPAQUE not in found
    assert SECRET not in found


def test_a_long_line_takes_no_longer_than_its_length_asks_for() -> None:
    for piece in ("token", "a-", "Bearer ", "-----BEGIN PRIVATE KEY-----", "f", "passphrase='", "b3BlbnNzaC1rZXktdjE"):
        redact(piece * 20_000)
