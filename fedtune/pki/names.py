"""Names: of a federation, of a site in a certificate, of the hosts where a coordinator is reached. Pure."""

from __future__ import annotations

import ipaddress
import re
import secrets
from typing import Annotated, Final

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from fedtune.errors import EnrolmentError
from fedtune.journal.entries import SiteName

SCHEME: Final = "fedtune"
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_HOST = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*\Z")
_ADDRESS = re.compile(r"(?P<host>[a-z0-9.-]+|\[[0-9a-f:.]+\]):(?P<port>[1-9][0-9]{0,4})")
_FEDERATION = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?")
_LAST_PORT = 65535

Federation = Annotated[str, Field(pattern=r"^[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?-[0-9a-f]{16}$")]
IP = ipaddress.IPv4Address | ipaddress.IPv6Address


def new_federation(name: str) -> str:
    """Return a name that no other federation has: the one given and 64 random bits.

    What is signed for one federation names it, so it is no use in another of the same name. Error:
    `enrolment.bad-name`.
    """
    if not _FEDERATION.fullmatch(name):
        hint = "use at most 40 lower-case letters, digits and hyphens, as in a host name"
        raise EnrolmentError("bad-name", f"a federation cannot be called {name[:60]!r}", hint=hint)
    return f"{name}-{secrets.token_hex(8)}"


def check_site_name(name: str) -> str:
    """Return a site's name, or refuse it: `enrolment.bad-name`."""
    try:
        return TypeAdapter[str](SiteName).validate_python(name)
    except ValidationError:
        hint = "use letters, digits, dots, hyphens and underscores, at most 64"
        raise EnrolmentError("bad-name", f"a site cannot be called {name[:80]!r}", hint=hint) from None


def domain_of(federation: str) -> str:
    """Return the host part of its sites' names; `.internal` is reserved for private use and resolved by nobody."""
    return f"{federation}.internal"


def site_uri(federation: str, site: str) -> str:
    """Return how a certificate names a site: `fedtune://FEDERATION.internal/SITE`."""
    return f"{SCHEME}://{domain_of(federation)}/{site}"


def site_in(uri: str, federation: str) -> str | None:
    """Return the site that a URI names in this federation, None for anything else."""
    prefix = site_uri(federation, "")
    name = uri.removeprefix(prefix)
    try:
        return TypeAdapter[str](SiteName).validate_python(name) if uri.startswith(prefix) else None
    except ValidationError:
        return None


def host(text: str) -> str | IP:
    """Return a host name or an IP address. Error: `enrolment.bad-host`."""
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        pass
    if not _HOST.match(text) or text.rpartition(".")[2].isdigit():
        hint = "write a lower-case name such as fl.hospital.example, without wildcards, or an IP address"
        raise EnrolmentError("bad-host", f"{text[:80]!r} is no host name", hint=hint)
    return text


def split_address(text: str) -> tuple[str, int]:
    """Return host and port of `HOST:PORT`, an IPv6 address in brackets. Error: `enrolment.bad-host`."""
    found = _ADDRESS.fullmatch(text)
    if not found or int(found["port"]) > _LAST_PORT:
        hint = "write HOST:PORT, for example fl.hospital.example:8443 or [2001:db8::1]:8443"
        raise EnrolmentError("bad-host", f"{text[:80]!r} is no address", hint=hint)
    name = found["host"].strip("[]")
    if isinstance(host(name), ipaddress.IPv6Address) != (found["host"] != name):
        raise EnrolmentError("bad-host", f"{text[:80]!r} is no address", hint="only IPv6 addresses stand in brackets")
    return name, int(found["port"])


def _checked(text: str) -> str:
    try:
        split_address(text)
    except EnrolmentError as error:
        raise ValueError(error.message) from error
    return text


Address = Annotated[str, Field(max_length=300), AfterValidator(_checked)]
