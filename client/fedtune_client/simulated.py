"""The authority of a simulated site: the code of a real one, with a policy and a grant that say yes to its one plan.

Its key file lies beside its vault, so a simulation protects nothing from whoever has the run folder; it exercises what
a real site does. Every step of opening can be killed and is taken up again.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

from fedtune.config.plan import StudyPlan
from fedtune.errors import ConsentError
from fedtune.journal.entries import ConsentGiven, DataRegistered, Entry, PolicyAdopted
from fedtune.journal.journal import Journal
from fedtune.privacy.plan import public_count
from fedtune.run.files import make_folder
from fedtune.simulation.sites import SiteData
from fedtune_client.authority import Authority
from fedtune_client.policy.limits import simulation_policy
from fedtune_client.policy.schema import Policy
from fedtune_client.updates import digest
from fedtune_client.vault import Key, Vault, create_signing_key, signing_key
from fedtune_client.vault.files import write_private


def open_simulated(folder: Path, plan: StudyPlan, data: SiteData) -> Authority:
    """Return the authority of a simulated site, begun in `folder` if it is not there.

    Error: `consent.other-data` when the site was begun with other records.
    """
    authority = _opened(folder, data.name, os.getpid())
    with authority.journal:
        _ensure(authority.journal, plan, data)
    return authority


@lru_cache(maxsize=4096)
def _opened(folder: Path, name: str, _process: int) -> Authority:
    """Open a site once a process: what it has read of its journal it need not read again."""
    make_folder(folder)
    vault = _vault(folder)
    path = folder / f"{name}.journal"
    if path.exists() and b"\n" in path.read_bytes():
        journal = Journal.open(path, signing_key(vault))
    else:
        key = signing_key(vault) if vault.names() else create_signing_key(vault)
        journal = Journal.create(path, name, key)
    journal.close()
    return Authority(journal, vault, folder / "heads.jsonl")


def _vault(folder: Path) -> Vault:
    key_file = folder / "vault.key"
    if not (folder / "vault" / "vault.json").exists():
        write_private(key_file, [os.urandom(32).hex().encode()])
        return Vault.create(folder / "vault", Key.from_file(key_file))
    return Vault.open(folder / "vault", Key.from_file(key_file))


def _ensure(journal: Journal, plan: StudyPlan, data: SiteData) -> None:
    """Adopt, register and grant what is not yet in the journal."""
    state = journal.state
    known = state.spending.latest(plan.data.name)
    if known is not None and state.spending.data[known].fingerprint != data.data_sha256:
        raise ConsentError("other-data", "the records are not those that the study began with", hint="start a new run")
    missing: list[Entry] = []
    if state.policy is None:
        missing.append(_adopted(simulation_policy(plan)))
    if known is None:
        known = journal.chain.length + len(missing)
        missing.append(_registered(plan, data))
    if not state.grants:
        missing.append(
            ConsentGiven(data=known, fingerprint=data.data_sha256, purpose=plan.purpose, epsilon=None, expires=None)
        )
    if missing:
        journal.append(*missing)


def _adopted(policy: Policy) -> PolicyAdopted:
    return PolicyAdopted(sha256=policy.sha256, policy=policy.model_dump(mode="json"))


def _registered(plan: StudyPlan, data: SiteData) -> DataRegistered:
    return DataRegistered(
        name=plan.data.name,
        fingerprint=data.data_sha256,
        unit=plan.promise.unit,
        units=public_count(data.units.count),
        population=digest(data.data_sha256.encode()),
        joins=(),
    )
