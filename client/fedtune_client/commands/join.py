"""`fedtune client join`: a site keeps what the coordinator has granted."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from fedtune.commands.options import Format, OutputFormat, Verbose
from fedtune.commands.screen import quiet_libraries
from fedtune_client.commands.papers import Federation, read_paper
from fedtune_client.commands.shared import KeyFile, Site, opened, show


def join(
    grant: Annotated[Path, typer.Argument(metavar="GRANT", help="What the coordinator has sent.", show_default=False)],
    *,
    federation: Federation = None,
    site: Site = None,
    key_file: KeyFile = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Keep the grant that answers this site's request, the first one or a renewal; the same grant again is harmless.

    It is believed only if the coordinator that was invited by has signed it, for the keys of the newest request.
    """
    quiet_libraries(verbose=verbose)
    from fedtune.pki.certificates import read_pem
    from fedtune_client.channel import begin_memory, federation_of
    from fedtune_client.enrolment import accept

    raw, now = read_paper(grant, "grant"), datetime.now(UTC)
    opened_site = opened(site, key_file)
    kept = accept(opened_site, raw, federation_of(opened_site.vault, federation), now)
    begin_memory(opened_site.folder)
    expires = read_pem(kept.certificate).not_valid_after_utc
    document: dict[str, Any] = {
        "federation": kept.federation,
        "site": kept.site,
        "coordinator": kept.address,
        "certificate_expires": f"{expires:%Y-%m-%d}",
        "serial": kept.serial,
    }
    lines = [
        f"{kept.site} takes part in {kept.federation}, whose coordinator is at {kept.address}",
        f"its certificate is good until {expires:%Y-%m-%d}",
        "next: fedtune client doctor, then: fedtune client up",
    ]
    show(output, document, lines)
