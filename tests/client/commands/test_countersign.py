"""A site's operator puts the site's name under a release, or is told why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.journal.chain import public_hex
from fedtune.journal.witness import Head, Receipt
from fedtune.privacy.accounting import epsilon, merge
from fedtune.release.card import render_card
from fedtune.release.manifest import make_manifest
from fedtune.release.signatures import sign, write_signatures
from fedtune.release.verify import verify_release
from tests.client.commands.conftest import study
from tests.support.bench import summary_of

if TYPE_CHECKING:
    from tests.client.commands.conftest import Place

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))


def released(place: Place, *, said: float | None = None) -> Path:
    """Make a release of two rounds that this site and nobody else took part in; `said` is the ε told of it."""
    plan, folder = study(), place.folder / "release"
    place.charge(plan, 1, 2)
    with place.open().journal as journal:
        heads = {"mercy": Receipt.of(Head.of(journal), KEY)}
    event = plan.promise.event(plan.training.local_steps)
    spent = epsilon(merge([event, event]), plan.promise.delta) if said is None else said
    events = [] if said is not None else [one.to_dict() for one in merge([event, event])]
    summary: dict[str, Any] = summary_of(plan)
    summary["sites"] = [{"name": "mercy", "units": 140, "rounds": 2, "epsilon": spent, "events": events}]
    summary["privacy"] |= {"max_epsilon": spent, "statement": f"ε = {spent}"}
    folder.mkdir()
    (folder / "README.md").write_text(render_card(plan, summary, heads=heads), encoding="utf-8")
    manifest = make_manifest(folder, "peft", plan, summary, heads, public_hex(KEY))
    (folder / "release.json").write_bytes(manifest.raw)
    write_signatures(folder, sign(manifest.raw, KEY))
    return folder


def test_a_site_countersigns_what_its_journal_bears_out(ready: Place) -> None:
    folder = released(ready)
    found = ready.json("countersign", str(folder), "--coordinator-key", public_hex(KEY), "--yes")
    assert (found["name"], found["plan_sha256"]) == ("mercy", study().sha256)
    assert ready.kinds()[-1] == "release"
    verdict = verify_release(folder, journals=[ready.journal])
    assert (verdict.findings, verdict.countersigned) == ((), ("mercy",))
    assert "is released (manifest" in ready.done("journal", "show", "--last", "1").out


def test_nothing_is_signed_that_says_too_little(ready: Place) -> None:
    folder = released(ready, said=0.01)
    done = ready.run("countersign", str(folder), "--yes")
    assert "error[release.unsupported-epsilon]" in done.err
    assert "release" not in ready.kinds()
    assert json.loads((folder / "release.signatures.json").read_text())["sites"] == []


@pytest.mark.parametrize("key", ["0" * 64])
def test_nothing_is_signed_that_another_coordinator_has_signed(ready: Place, key: str) -> None:
    done = ready.run("countersign", str(released(ready)), "--coordinator-key", key, "--yes")
    assert "error[release.does-not-hold]" in done.err
    assert "other-coordinator" in done.err
    assert "release" not in ready.kinds()


def test_nobody_is_there_to_agree(ready: Place) -> None:
    done = ready.run("countersign", str(released(ready)))
    assert "error[config.not-confirmed]" in done.err
    assert "the journal bears it out" in done.out
    assert "release" not in ready.kinds()
