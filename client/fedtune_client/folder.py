"""A site's folder: what is where in it, how one is begun, and how its journal and vault are opened.

    site.yaml       the site's name and where its data sets are
    policy.yaml     what the operator edits; in force once adopted
    NAME.journal    signed and chained; the only file that says what was decided and spent
    public.key      the key that the journal is verified with
    vault/          keys and updates that may have to be sent again, encrypted
    heads.jsonl     heads that coordinators have countersigned
    populations/    keyed pseudonyms of the registered data sets' units
    studies/        what a site keeps of its optimiser, by plan
    asked/          plans that the site was asked to take part in and has not taken part in
    nonces.db       the numbers of messages that were signed and taken
    local.secret    what the site's processes show each other
    node/           Flower's state of the site's node
    logs/, run/     what the processes say; what runs now

Knows no plan and no message.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from fedtune.envelopes.envelope import COORDINATOR
from fedtune.errors import ConfigError, JournalError
from fedtune.journal.chain import public_hex
from fedtune.journal.entries import SiteName
from fedtune.journal.journal import Clock, Journal, utc_now
from fedtune.run.files import make_folder, write_whole
from fedtune_client.facts import FILE_NAME, SiteFacts, read_facts
from fedtune_client.policy.schema import Policy
from fedtune_client.populations import Populations
from fedtune_client.vault import Unlock, Vault, create_signing_key, signing_key

ENVIRONMENT_VARIABLE = "FEDTUNE_SITE"
FEDERATION_VARIABLE = "FEDTUNE_FEDERATION"
PSEUDONYMS = "pseudonym-key"
_FACTS = """\
# Facts of this machine. A plan names a data set; only this file says which file that is.
name: "{name}"
data:
  # claims:
  #   path: claims.csv   # starts at this folder
  #   format: auto       # auto | csv | tsv | json | jsonl | parquet | arrow
# Base models by names of your own; a plan's is found by the hash of its content.
models:
  # encoder: models/encoder   # a folder, or package:NAME of an installed package

# How the client runs; these are the values without a line here.
# device: auto        # auto | cpu | cuda
# threads: 8          # as many as the machine has cores
# runtime_port: 0     # on loopback; 0 takes a free one
# health_port: 0      # on loopback: /health and /ready
# log_format: text    # text | json
# poll: 1.0           # seconds between two questions to the coordinator
"""


@dataclass(frozen=True, slots=True)
class SiteFolder:
    """The places inside a site's folder."""

    path: Path

    @property
    def policy_file(self) -> Path:
        """What the operator edits."""
        return self.path / "policy.yaml"

    @property
    def public_key_file(self) -> Path:
        """The public key, 64 hexadecimal digits."""
        return self.path / "public.key"

    @property
    def vault(self) -> Path:
        """Keys and updates."""
        return self.path / "vault"

    @property
    def heads_file(self) -> Path:
        """Countersigned heads, one JSON a line."""
        return self.path / "heads.jsonl"

    @property
    def nonces(self) -> Path:
        """The memory of signed messages."""
        return self.path / "nonces.db"

    @property
    def secret(self) -> Path:
        """What the site's processes show each other."""
        return self.path / "local.secret"

    @property
    def node(self) -> Path:
        """Flower's state."""
        return self.path / "node"

    @property
    def asked(self) -> Path:
        """Plans that wait for the operator, or that the site refuses."""
        return self.path / "asked"

    @property
    def logs(self) -> Path:
        """One file a process."""
        return self.path / "logs"

    @property
    def run(self) -> Path:
        """What the processes that run now have written down for each other."""
        return self.path / "run"

    @property
    def populations(self) -> Populations:
        """Pseudonyms of the data sets' units."""
        return Populations(self.path / "populations")

    def facts(self) -> SiteFacts:
        """Read `site.yaml`."""
        return read_facts(self.path)

    def journal_file(self, name: str) -> Path:
        """Return the journal of a site of this name."""
        return self.path / f"{name}.journal"

    def study(self, plan: str) -> Path:
        """Return the folder of what is kept between the rounds of a plan."""
        return self.path / "studies" / plan[:16]


@dataclass(frozen=True, slots=True)
class OpenSite:
    """A site's folder with its journal (not held) and its vault open."""

    folder: SiteFolder
    facts: SiteFacts
    journal: Journal
    vault: Vault

    @property
    def pseudonym_key(self) -> bytes:
        """The secret under which units are compared between data sets."""
        return self.vault.get(PSEUDONYMS)


def find_folder(given: Path | None = None) -> SiteFolder:
    """Return the site's folder: the one given, that of FEDTUNE_SITE, or `./site`."""
    return SiteFolder(given or Path(os.environ.get(ENVIRONMENT_VARIABLE) or "site"))


def begun(folder: SiteFolder) -> Path | None:
    """Return the journal of the site that was begun in a folder, None before its first record was whole."""
    for path in sorted(folder.path.glob("*.journal")):
        with path.open("rb") as file:
            if file.readline().endswith(b"\n"):
                return path
    return None


def require_unused(folder: SiteFolder, name: str) -> None:
    """Refuse a name that no site can have (`config.bad-name`) and a folder that holds a site already.

    No site is called as coordinators sign.

    Errors: `journal.exists` for a site that is there; `config.other-site` for one that was begun under another name.
    """
    try:
        TypeAdapter(SiteName).validate_python(name)
    except ValidationError:
        hint = "use letters, digits, dots, hyphens and underscores, at most 64"
        raise ConfigError("bad-name", f"a site cannot be called {name[:80]!r}", hint=hint) from None
    if name == COORDINATOR:
        raise ConfigError("bad-name", f"{name} is how a coordinator signs", hint="choose the organisation's name")
    if (path := begun(folder)) is not None:
        hint = f"fedtune client journal show --site {shlex.quote(str(folder.path))}"
        raise JournalError("exists", f"{folder.path} already holds the site {path.stem}", hint=hint)
    if (folder.path / FILE_NAME).exists() and (other := folder.facts().name) != name:
        hint = f"go on with that one: fedtune client init {other}"
        raise ConfigError("other-site", f"{folder.path} was begun as the site {other}", hint=hint)


def begin(folder: SiteFolder, name: str, unlock: Unlock, clock: Clock = utc_now) -> OpenSite:
    """Make a site: its vault with a signing key, its journal, and files to edit; a kill midway can be taken up again.

    Errors: those of `require_unused`, of the vault and of the journal.
    """
    require_unused(folder, name)
    make_folder(folder.path)
    vault = Vault.open(folder.vault, unlock) if folder.vault.exists() else Vault.create(folder.vault, unlock)
    if not vault.has(PSEUDONYMS):
        vault.put(PSEUDONYMS, os.urandom(32))
    has_key = any(item.startswith("signing-") for item in vault.names())
    key = signing_key(vault) if has_key else create_signing_key(vault)
    for path, text in [
        (folder.path / FILE_NAME, _FACTS.format(name=name)),
        (folder.policy_file, Policy.strict_example()),
        (folder.public_key_file, public_hex(key) + "\n"),
    ]:
        if not path.exists():
            write_whole(path, text.encode())
    journal = Journal.create(folder.journal_file(name), name, key, clock)
    journal.close()
    return OpenSite(folder, folder.facts(), journal, vault)


def open_site_folder(folder: SiteFolder, unlock: Unlock, clock: Clock = utc_now) -> OpenSite:
    """Open a site: every record of its journal is checked.

    Errors: `config.file-missing` where there is no site, those of the vault and of the journal.
    """
    facts = folder.facts()
    vault = Vault.open(folder.vault, unlock)
    path = folder.journal_file(facts.name)
    if not path.exists():
        hint = "restore it from a backup; without it nobody knows what was spent"
        raise ConfigError("no-journal", f"{folder.path} has no journal {path.name}", hint=hint)
    journal = Journal.open(path, partial(signing_key, vault), clock)
    journal.close()
    return OpenSite(folder, facts, journal, vault)
