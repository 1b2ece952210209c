"""Takes secrets out of text before it is logged: keys, tokens, passphrases, and long hexadecimal numbers.

A net under the code, which does not log secrets in the first place: libraries print requests, settings and their
environment when something fails. It knows what secrets look like and not what they are; a record's text is no secret to
it, which is why traces are not logged at all (see `fedtune.processes.log_lines`).
"""

from __future__ import annotations

import re

_HIDDEN = "[hidden]"
_KEY = "[private key]"
_SHOWN = 12  # digits of a hash that a person compares; of a secret of 256 bits they leave 208
_LINE = r"(?:\r?\n|\\n)"

_PRIVATE_KEY = re.compile(
    r"-----BEGIN (?P<kind>[A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?)-----.*?(?:-----END (?P=kind)-----|\Z)", re.DOTALL
)
_OPENSSH_KEY = re.compile(rf"b3BlbnNzaC1rZXktdjE[A-Za-z0-9+/=]*(?:{_LINE}[A-Za-z0-9+/=]{{16,}})*")
_BEARER = re.compile(r"(?i)\b(bearer|basic|digest)(\s+)[\w.~+/=-]{8,}")
_HEADER = re.compile(
    r"(?i)\b((?:proxy-)?authorization|fedtune-local|(?:set-)?cookie|x-api-key|flwr-[a-z-]*(?:token|signature))"
    r"""(['"]?\s*[:=,]\s*(?:b?['"])?)(?:(?:bearer|basic|digest)\s+)?[^\s'",;)\]}]+"""
)
_NAME = r"(?:FEDTUNE_VAULT_\w+|(?:[\w-]*[_-])?(?:passphrase|password|passwd|secret|token|api[_-]?key|access[_-]?key))"
_VALUE = r"""(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^\s,;)\]}]+)"""
# Without quotes nobody knows where a passphrase of several words ends.
_PHRASE = re.compile(r"""(?i)(?<![\w-])((?:FEDTUNE_VAULT_\w+|[\w-]*pass(?:phrase|word))\s*=\s*)(?!['"])[^\r\n]+""")
_ASSIGNED = re.compile(rf"""(?i)(?<![\w-])({_NAME}['"]?\s*=\s*){_VALUE}""")
_ENTRY = re.compile(rf"""(?i)(?<=['"])({_NAME}['"]\s*:\s*)(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')""")
_YAML = re.compile(rf"(?i)(?<![\w-])({_NAME}:\s+)(?=\S*\d)[\w.~+/=-]{{16,}}")
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")
_HEX = re.compile(r"(?<![0-9a-fA-F])([0-9a-fA-F]{12})[0-9a-fA-F]{52,}")


def redact(text: str) -> str:
    """Return text without what looks like a secret.

    Hidden are private keys (PEM, OpenSSH), values of authorisation headers and of names such as `…_token=` or
    `FEDTUNE_VAULT_…=`, tokens of the Hugging Face Hub, and all but 12 digits of hexadecimal numbers with 64 or more:
    a secret looks like a hash.
    """
    text = _PRIVATE_KEY.sub(_KEY, text)
    text = _OPENSSH_KEY.sub(_KEY, text)
    text = _HEADER.sub(rf"\1\2{_HIDDEN}", text)
    text = _BEARER.sub(rf"\1\2{_HIDDEN}", text)
    for pattern in (_PHRASE, _ASSIGNED, _ENTRY, _YAML):
        text = pattern.sub(rf"\1{_HIDDEN}", text)
    return _HEX.sub(r"\1…", _HUB_TOKEN.sub(_HIDDEN, text))
