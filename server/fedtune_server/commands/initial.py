"""`fedtune server init`: a coordinator begins."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedtune.commands.options import Format, OutputFormat, Verbose
from fedtune.commands.screen import quiet_libraries
from fedtune_server.commands.shared import Dir, Hosts, KeyFile, day_of, folder_of, show
from fedtune_server.commands.unlocking import unlock

if TYPE_CHECKING:
    from fedtune_server.folder import CoordinatorFolder
    from fedtune_server.initial import Begun, Wish


def init(  # noqa: PLR0913 - a command's options
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the federation is called.")],
    *,
    address: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where sites reach this coordinator.", show_default=False)
    ],
    host: Hosts = None,
    folder: Dir = None,
    key_file: KeyFile = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Make a coordinator: keys, the federation's authority, a certificate for its hosts, and a file to edit.

    A coordinator that is there is refused and left as it is; one whose making was interrupted is finished. The hosts
    are all that this authority will ever certify without sites having to take a newer one.
    """
    quiet_libraries(verbose=verbose)
    from fedtune.pki.authority import AUTHORITY_FILE
    from fedtune_server.initial import Wish, begin, require_unused

    wish, place = Wish.of(name, address, tuple(host or ())), folder_of(folder)
    require_unused(place, wish)
    interrupted = (place.authority / AUTHORITY_FILE).exists()  # then its passphrase is asked for once
    made = begin(place, wish, unlock(key_file, new=not interrupted))
    document = _document(place, wish, made)
    show(output, document, _lines(place, document))


def _document(folder: "CoordinatorFolder", wish: "Wish", made: "Begun") -> dict[str, Any]:
    from fedtune.pki.invitations import key_fingerprint

    return {
        "federation": made.federation,
        "folder": str(folder.path.absolute()),
        "address": wish.address,
        "hosts": list(wish.hosts),
        "public_key": made.public_key,
        "fingerprint": key_fingerprint(made.public_key),
        "certificate_expires": made.certificates.coordinator and day_of(made.certificates.coordinator),
        "authority_expires": day_of(made.certificates.authority),
    }


def _lines(folder: "CoordinatorFolder", made: dict[str, Any]) -> list[str]:
    return [
        f"the federation {made['federation']} is made in {folder.path}:",
        "  coordinator.yaml  where its models are, ports and limits: edit it",
        f"  authority/        what certifies sites, encrypted, until {made['authority_expires']};",
        "                    its passphrase or key file is needed to enrol, never to run",
        f"  the certificate of {', '.join(made['hosts'])} is good until {made['certificate_expires']}",
        "the fingerprint of this coordinator, to read out to sites by telephone:",
        f"  {made['fingerprint']}",
        "back up coordinator.key, coordinator.yaml, authority/ and enrolment/, now and after every enrolment, and",
        "  witness/ and studies/ once studies run; the passphrase or key file apart from them. Without coordinator.key",
        "  or enrolment/ every site has to be invited anew",
        "next: edit coordinator.yaml, then invite a site: fedtune server enrol add SITE",
    ]
