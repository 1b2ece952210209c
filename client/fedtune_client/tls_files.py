"""A site's credentials as the files that TLS and Flower's node take, in a folder that only this user enters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedtune_client.enrolment import Credentials
from fedtune_client.vault.files import write_private


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths of PEM files; `node_key` is in OpenSSH's form. Neither key is encrypted."""

    authority: Path
    certificate: Path
    key: Path
    node_key: Path


def write_tls_files(folder: Path, taken: Credentials) -> TlsFiles:
    """Write what a site takes part with; each file is whole or absent, and this user's alone."""
    files = TlsFiles(*(folder / name for name in ("authority.pem", "site.pem", "site.key", "node.key")))
    contents = (taken.authority.encode(), taken.certificate.encode(), taken.tls_key, taken.node_key)
    for path, content in zip((files.authority, files.certificate, files.key, files.node_key), contents, strict=True):
        write_private(path, [content])
    return files
