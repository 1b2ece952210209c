"""`fedtune client countersign`: put the site's name under a release, if the site's own journal bears it out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.commands.options import Format, OutputFormat, Verbose
from fedtune.commands.screen import quiet_libraries
from fedtune_client.commands.shared import KeyFile, Site, Yes, opened, show, tell
from fedtune_client.commands.unlocking import confirm

if TYPE_CHECKING:
    from fedtune.release.manifest import Manifest, SiteFacts


def countersign(  # noqa: PLR0913 - a command's options
    release: Annotated[Path, typer.Argument(metavar="DIR", help="A release, as the coordinator has signed it.")],
    *,
    coordinator_key: Annotated[
        str | None,
        typer.Option(metavar="HEX|FILE", help="The coordinator's public key, as you were told it.", show_default=False),
    ] = None,
    yes: Yes = False,
    site: Site = None,
    key_file: KeyFile = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Check what a release says of this site against its journal, and add the site's signature to the release.

    Refused where a file was changed, the head is not the journal's, or the journal was charged more ε than is said. The
    journal gets one record with the manifest's hash.
    """
    quiet_libraries(verbose=verbose)
    from fedtune.commands.audit import read_key
    from fedtune.release.countersign import countersign as sign
    from fedtune.release.countersign import require_supported
    from fedtune.release.manifest import read_manifest

    key = read_key(coordinator_key)
    manifest, _ = read_manifest(release)
    found = opened(site, key_file)
    with found.journal as journal:
        facts = require_supported(manifest, journal)
    tell(output, *_said(manifest, facts))
    confirm("does the site put its name under this release?", yes=yes)
    signed = sign(release, found.journal, key)
    document = {"release": str(release), "plan_sha256": manifest.plan_sha256, **signed.model_dump(mode="json")}
    show(output, document, [f"{signed.name} has countersigned {release}", "next: hand the folder back"])


def _said(manifest: "Manifest", facts: "SiteFacts") -> list[str]:
    from fedtune.display import epsilon_text

    spent = "NOT PRIVATE" if facts.spent is None else f"ε = {epsilon_text(facts.spent)} at δ = {facts.delta:g}"
    return [
        f"the release of {manifest.study} (plan {manifest.plan_sha256}) by the coordinator {manifest.coordinator}",
        f"  says of {facts.name}: {spent}; the journal bears it out",
    ]
