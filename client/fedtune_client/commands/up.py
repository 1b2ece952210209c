"""`fedtune client up`: the site's node and executor run, until Ctrl-C or SIGTERM."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.commands.options import Format, OutputFormat, Verbose
from fedtune.commands.screen import quiet_libraries
from fedtune_client.commands.papers import Federation
from fedtune_client.commands.shared import KeyFile, Site, folder_of, show, site_disk
from fedtune_client.commands.unlocking import unlock

if TYPE_CHECKING:
    from fedtune.journal.state import SiteState
    from fedtune_client.folder import OpenSite
    from fedtune_client.supervision import Running


def up(
    *,
    federation: Federation = None,
    site: Site = None,
    key_file: KeyFile = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Take part: connect to the coordinator, and answer what policy, consent and budget allow.

    Two processes are kept alive, the node, which asks the coordinator for work, and the executor, which keeps the vault
    and the base model open. The site opens no port to the outside. The vault's passphrase is asked for once; it goes
    to the executor through a pipe and stands in no environment, argument or file.
    """
    quiet_libraries(verbose=verbose)
    from fedtune_client.channel import federation_of
    from fedtune_client.supervision import running

    found, secret = _opened(site, key_file)
    with site_disk(found.folder.path), running(found, federation_of(found.vault, federation), secret) as ours:
        document = _document(found, ours)
        show(output, document, _lines(document))
        _log(found)
        ours.run()


def _opened(site: Path | None, key_file: Path | None) -> tuple["OpenSite", Any]:
    """Open the site with a secret that the executor needs too."""
    from fedtune_client.folder import open_site_folder

    folder = folder_of(site)
    folder.facts()  # a folder that is no site's is said before a passphrase is asked for
    secret = unlock(key_file)
    return open_site_folder(folder, secret), secret


def _log(site: "OpenSite") -> None:
    from fedtune.processes import logs

    os.environ.setdefault(logs.FORMAT, site.facts.service.log_format)
    os.environ[logs.FOLDER] = str(site.folder.logs.absolute())
    logs.setup("client")


def _document(site: "OpenSite", ours: "Running") -> dict[str, Any]:
    from fedtune.pki.certificates import is_due, read_pem
    from fedtune.pki.invitations import key_fingerprint
    from fedtune_client.view import view

    seen, now = view(site.folder), datetime.now(UTC)
    certificate = read_pem(ours.taken.certificate)
    granted = {name for name in site.facts.data if _is_granted(seen.state, name, now)}
    return {
        "site": ours.taken.site,
        "federation": ours.taken.federation,
        "coordinator": ours.taken.address,
        "coordinator_fingerprint": key_fingerprint(ours.taken.coordinator),
        "certificate_expires": f"{certificate.not_valid_after_utc:%Y-%m-%d}",
        "certificate_days": (certificate.not_valid_after_utc - now).days,
        "certificate_due": is_due(certificate, now),
        "policy": None if seen.policy is None else {"name": seen.policy.name, "sha256": seen.policy.sha256},
        "data": {name: name in granted for name in site.facts.data},
        "models": dict(site.facts.models),
        "health": ours.health,
        "pid": os.getpid(),
    }


def _is_granted(state: "SiteState", name: str, now: datetime) -> bool:
    """Whether a data set may serve any purpose."""
    number = state.spending.latest(name)
    purposes = {given.purpose for given in state.grants.values() if given.data == number}
    return number is not None and any(state.grant_in_force(number, purpose, now) is not None for purpose in purposes)


def _lines(found: dict[str, Any]) -> list[str]:
    policy = found["policy"]
    data = [f"{name}{'' if granted else ' (not granted)'}" for name, granted in found["data"].items()]
    due = "; RENEW IT NOW: fedtune client renew" if found["certificate_due"] else ""
    adopt = "no policy is in force, so that every plan is refused: fedtune client policy adopt"
    return [
        f"the site {found['site']} of {found['federation']}",
        f"  coordinator  {found['coordinator']} (fingerprint {found['coordinator_fingerprint']})",
        f"  certificate  good until {found['certificate_expires']}, {found['certificate_days']} days{due}",
        f"  policy       {adopt if policy is None else policy['name'] + ' ' + policy['sha256'][:12]}",
        f"  data sets    {', '.join(data) or 'none: name them in site.yaml'}",
        f"  base models  {', '.join(found['models']) or 'none: name them in site.yaml'}",
        f"  health       {found['health']}",
        "plans that wait: fedtune client asked; logs: fedtune client logs --follow; Ctrl-C ends it",
    ]
