"""TLS handshakes in memory, by OpenSSL and its strict checks: what a peer of ours would make of a certificate."""

from __future__ import annotations

import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fedtune.pki.certificates import pem
from fedtune.pki.keys import pem_key

STRICT = ssl.VERIFY_X509_STRICT
Pair = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]


def server_context(folder: Path, pair: Pair, authority: x509.Certificate) -> ssl.SSLContext:
    """A listener that wants client certificates of an authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    return _loaded(context, folder, pair, authority)


def client_context(folder: Path, pair: Pair | None, authority: x509.Certificate) -> ssl.SSLContext:
    """A client that checks the server's name and authority."""
    return _loaded(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), folder, pair, authority)


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, host: str = "localhost") -> bytes:
    """Return the client's certificate (DER) as the server sees it, or raise what either side refuses with."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.wrap_bio(to_client, to_server, server_hostname=host)
    far = server.wrap_bio(to_server, to_client, server_side=True)
    waiting = [near, far]
    for _ in range(10):
        for side in list(waiting):
            try:
                side.do_handshake()
                waiting.remove(side)
            except ssl.SSLWantReadError:
                pass
        if not waiting:
            return far.getpeercert(binary_form=True) or b""
    raise AssertionError("the handshake does not end")


def _loaded(context: ssl.SSLContext, folder: Path, pair: Pair | None, authority: x509.Certificate) -> ssl.SSLContext:
    context.verify_flags |= STRICT
    context.load_verify_locations(cadata=pem(authority))
    if pair is not None:
        path = folder / "pair.pem"
        path.write_bytes(pem(pair[0]).encode() + pem_key(pair[1]))
        context.load_cert_chain(path)
    return context
