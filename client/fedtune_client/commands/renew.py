"""`fedtune client renew`: a site asks for a new certificate before the old one ends, or after its key was rotated."""

from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from fedtune.commands.options import Format, OutputFormat, Verbose
from fedtune.commands.screen import quiet_libraries
from fedtune_client.commands.papers import Federation, Out, place_for_request, write_request
from fedtune_client.commands.shared import KeyFile, Site, opened, show


def renew(  # noqa: PLR0913 - a command's options
    *,
    now: Annotated[bool, typer.Option("--now", help="Also when it is not due.")] = False,
    new_node: Annotated[
        bool, typer.Option("--new-node", help="With a new node key too, as when the old one was seen; implies --now.")
    ] = False,
    federation: Federation = None,
    out: Out = None,
    site: Site = None,
    key_file: KeyFile = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Write a request for a new certificate, when less than a third of the old one's life is left or the key is new.

    The same request is written until it is granted: the coordinator approves it, and `fedtune client join` takes what
    comes back. Until then everything stays as it is.
    """
    quiet_libraries(verbose=verbose)
    from fedtune.pki.certificates import read_pem
    from fedtune_client.channel import federation_of
    from fedtune_client.enrolment import credentials, is_due_for_renewal, request_fingerprint
    from fedtune_client.enrolment import renew as asked_anew

    opened_site, moment = opened(site, key_file), datetime.now(UTC)
    joined = federation_of(opened_site.vault, federation)
    expires = read_pem(credentials(opened_site.vault, joined).certificate).not_valid_after_utc
    due = is_due_for_renewal(opened_site.vault, joined, opened_site.journal.chain.public_key, moment)
    document: dict[str, Any] = {"federation": joined, "due": due, "certificate_expires": f"{expires:%Y-%m-%d}"}
    if not (due or now or new_node):
        lines = [f"nothing is due in {joined}: the certificate is good until {expires:%Y-%m-%d} (--now asks anyway)"]
        show(output, document | {"request": None, "request_fingerprint": None}, lines)
        return
    path = place_for_request(out, opened_site.facts.name)
    request = asked_anew(opened_site, joined, moment, new_node=new_node)
    write_request(path, request)
    mark = request_fingerprint(request)
    lines = [
        f"{path} asks {joined} for a new certificate; it holds no private key. Send it to the coordinator,",
        "  and read this fingerprint of it out by telephone:",
        f"  {mark}",
        "next, with the grant that comes back: fedtune client join GRANT",
    ]
    show(output, document | {"request": str(path), "request_fingerprint": mark}, lines)
