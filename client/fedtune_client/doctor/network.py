"""The way to the coordinator: its name, a TLS handshake with both certificates, its clock; and no other way out.

Only the coordinator's name is looked up, and only the coordinator is connected to, as the site's node does it.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import ssl
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

from fedtune.envelopes.envelope import SKEW
from fedtune.errors import TransportError
from fedtune.flower.environment import SWITCHES, flower_environment
from fedtune.flower.listener import client_context
from fedtune.pki.names import split_address
from fedtune_client.doctor.finding import Level, Subject, checked
from fedtune_client.enrolment import Credentials
from fedtune_client.folder import SiteFolder
from fedtune_client.private_folder import private_folder
from fedtune_client.tls_files import write_tls_files

_SECONDS = 10.0
_LIMIT = SKEW / 1000
_CLOCK = "set the clock by a time service (NTP): messages are refused when the clocks are two minutes apart"
Said = Iterator[tuple[Level, str, str]]


@checked("name resolution")
def resolution(subject: Subject) -> Said:
    """Whether the coordinator's name leads to an address."""
    if subject.taken is None:
        return
    host, port = split_address(subject.taken.address)
    if _is_address(host):
        yield "ok", f"{host} is an address: no name is looked up", ""
        return
    try:
        found = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})
    except OSError as error:
        hint = "ask for the name in this network's DNS or in /etc/hosts; an address in the grant needs no name"
        yield "fail", f"{host} cannot be resolved ({error.strerror or error})", hint
        return
    yield "ok", f"{host} is {', '.join(found)}", ""


@checked("coordinator")
def coordinator(subject: Subject) -> Said:
    """Whether the coordinator shows a certificate of the federation and takes the site's, and what its clock says."""
    if subject.taken is None:
        return
    tls = _context(subject.folder, subject.taken)
    before = datetime.now(UTC)
    answer = _asked(subject.taken.address, tls)
    middle = before + (datetime.now(UTC) - before) / 2
    if answer.status_code == httpx.codes.OK:
        yield "ok", f"{subject.taken.address} answers by TLS 1.3 and takes this site's certificate", ""
    elif answer.status_code == httpx.codes.UNAUTHORIZED:
        hint = "ask the coordinator: fedtune server enrol list"
        yield "fail", f"{subject.taken.address} refuses this site's certificate: it was revoked, or has expired", hint
    else:
        yield "fail", f"{subject.taken.address} answers with status {answer.status_code}", "ask the coordinator"
    yield from _clock(answer.headers.get("date", ""), middle)


@checked("ways out")
def ways_out(subject: Subject) -> Said:
    """Whether the site's processes look anything up by themselves, and whether a proxy is in the way."""
    environment = flower_environment(subject.folder.node, os.environ)
    if all(environment.get(name) == value for name, value in SWITCHES.items()):
        yield "ok", "telemetry, update checks, run-time installs and the model hub are off in what `up` starts", ""
    proxies = sorted({name.upper() for name in os.environ if name.lower() in {"https_proxy", "all_proxy"}})
    if not proxies or subject.taken is None:
        return
    host, _ = split_address(subject.taken.address)
    if urllib.request.proxy_bypass_environment(host):  # type: ignore[attr-defined] # undocumented, as httpx's rule
        yield "ok", f"{', '.join(proxies)} is set, and NO_PROXY lets the way to {host} go past it", ""
    else:
        text = f"{', '.join(proxies)} is set: the connection to {host} goes through that proxy"
        yield "warn", text, f"it must pass TLS through as it is; or add {host} to NO_PROXY"


def _context(folder: SiteFolder, taken: Credentials) -> ssl.SSLContext:
    """Return TLS as the node has it; OpenSSL takes keys from files alone."""
    run = folder.run / "doctor"  # the folder of a client that runs is not swept
    with private_folder(run) as place:
        files = write_tls_files(place, taken)
        tls = client_context(files.certificate, files.key, files.authority)
    with suppress(OSError):
        run.rmdir()
    return tls


def _asked(address: str, tls: ssl.SSLContext) -> httpx.Response:
    try:
        with httpx.Client(verify=tls, timeout=_SECONDS, follow_redirects=False) as client:
            return client.get(f"https://{address}/health")
    except httpx.HTTPError as error:
        raise _unreached(address, error) from error


def _unreached(address: str, error: httpx.HTTPError) -> TransportError:
    causes = list(_causes(error))
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
        message = f"what answers at {address} does not have a certificate of this federation for that name"
        return TransportError("other-coordinator", message, hint="telephone the coordinator; a proxy that opens TLS?")
    if any(isinstance(cause, ssl.SSLError) for cause in causes):
        message = f"{address} ends the TLS handshake: it does not take this site's certificate, or speaks no TLS 1.3"
        return TransportError("handshake", message, hint="fedtune client renew; or ask the coordinator")
    hint = "ask whether the coordinator runs, and whether a firewall lets this machine out to that port"
    return TransportError("not-reached", f"{address} is not reached: {type(error).__name__}", hint=hint)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _clock(date: str, here: datetime) -> Said:
    try:
        ahead = (here - parsedate_to_datetime(date)).total_seconds()
    except ValueError:
        yield "warn", "the coordinator does not tell its time, so that the clocks could not be compared", ""
        return
    apart = f"this machine's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the coordinator's"
    if abs(ahead) >= _LIMIT:
        yield "fail", apart, _CLOCK
    elif abs(ahead) >= _LIMIT / 2:
        yield "warn", apart, _CLOCK
    else:
        yield "ok", f"the clocks are at most {abs(ahead) + 1:.0f} s apart", ""


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
