"""Whoever has public keys finds out what was changed; what a coordinator lies about, the sites' journals show."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.errors import ReleaseError
from fedtune.journal.chain import public_hex
from fedtune.journal.journal import Journal
from fedtune.journal.ledger import Ledger
from fedtune.journal.witness import Head, Receipt
from fedtune.release.card import render_card
from fedtune.release.countersign import countersign
from fedtune.release.manifest import Manifest, describe, read_manifest
from fedtune.release.signatures import SiteSignature, countersigned, read_signatures, sign, write_signatures
from fedtune.release.verify import verify_release
from fedtune.training.local import event_of_round
from tests.support.bench import Bench
from tests.support.ledgers import charge_of
from tests.support.releases import Ended, make_ended


@pytest.fixture(scope="session")
def ended(pooled: Bench, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    return make_ended(tmp_path_factory.mktemp("ended") / "run", pooled)


@pytest.fixture
def folder(ended: Ended, tmp_path: Path) -> Path:
    return ended.release(tmp_path / "release").folder


def codes(folder: Path, **words: Any) -> list[str]:
    return [finding.code for finding in verify_release(folder, **words).findings]


def resigned(folder: Path, key: Ed25519PrivateKey, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and sign it again, as only the coordinator can."""
    manifest, _ = read_manifest(folder)
    values = manifest.model_dump(mode="json")
    change(values)
    made = Manifest.model_validate(values)
    (folder / "release.json").write_bytes(made.raw)
    write_signatures(folder, sign(made.raw, key))


def test_nothing_is_found_in_what_was_released(ended: Ended, folder: Path) -> None:
    verdict = verify_release(
        folder,
        coordinator_key=ended.public,
        base=Path(ended.bench.machine.model_folder),
        journals=ended.journals.values(),
    )
    assert verdict.findings == ()
    assert (verdict.key_checked, verdict.base_checked) == (True, True)
    assert verdict.journals == ("site-0", "site-1")
    assert verify_release(folder).holds


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapter_config.json", "fedtune.json", "head.safetensors"]
)
def test_a_file_that_was_changed_is_named(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    (found,) = verify_release(folder).findings
    assert (found.code, found.subject) == ("tampered-file", name)


def test_missing_and_additional_files_are_named(folder: Path) -> None:
    (folder / "head.safetensors").rename(folder / "tail.safetensors")
    (folder / "deeper").mkdir()
    (folder / "deeper" / "code.py").write_text("print()")
    (folder / "gone").symlink_to(folder / "nowhere")
    found = {(finding.code, finding.subject) for finding in verify_release(folder).findings}
    assert found == {
        ("missing-file", "head.safetensors"),
        ("extra-file", "tail.safetensors"),
        ("extra-file", "deeper/code.py"),
        ("extra-file", "gone"),
    }


def test_a_card_that_was_changed_is_found_twice(folder: Path) -> None:
    card = folder / "README.md"
    text = card.read_text()
    row = next(line for line in text.splitlines() if line.startswith("| site-0 |"))
    card.write_text(text.replace(row, row.replace(row.split("|")[3].strip(), "0.100")))
    assert codes(folder) == ["tampered-file", "card"]


def test_a_folder_without_manifest_is_no_release(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ReleaseError, match="no release") as caught:
        verify_release(tmp_path)
    assert caught.value.code == "release.no-manifest"
    (folder / "release.signatures.json").unlink()
    assert codes(folder) == ["signature"]


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b'{"format":"fedtune release 1"}', b"[" * 100_000])
def test_what_is_no_manifest_is_a_finding(folder: Path, content: bytes) -> None:
    (folder / "release.json").write_bytes(content)
    assert codes(folder) == ["manifest"]


def test_another_spelling_of_the_same_manifest_is_refused(folder: Path) -> None:
    values = json.loads((folder / "release.json").read_text())
    (folder / "release.json").write_text(json.dumps(values, indent=1))
    assert codes(folder) == ["manifest"]


# --- signatures -----------------------------------------------------------------------------------------------------


def test_a_manifest_that_somebody_else_has_signed_is_not_the_coordinators(ended: Ended, folder: Path) -> None:
    other = Ed25519PrivateKey.generate()
    resigned(folder, other, lambda values: values.update(study="another"))
    assert codes(folder) == ["signature"]
    resigned(folder, other, lambda values: values.update(coordinator=public_hex(other)))
    assert codes(folder) == ["forged-head"] * 2  # the heads are still countersigned by the coordinator
    assert "other-coordinator" in codes(folder, coordinator_key=ended.public)


def test_a_signature_of_another_release_does_not_hold(ended: Ended, folder: Path, tmp_path: Path) -> None:
    other = ended.release(tmp_path / "other").folder
    resigned(other, ended.coordinator, lambda values: values.update(created="2020-01-01T00:00:00Z"))
    shutil.copy(other / "release.signatures.json", folder)
    assert codes(folder) == ["signature"]


# --- plan and base --------------------------------------------------------------------------------------------------


def test_a_plan_that_is_not_the_one_named_is_found(ended: Ended, folder: Path) -> None:
    resigned(folder, ended.coordinator, lambda values: values.update(plan_sha256="0" * 64))
    assert "plan" in codes(folder)


def test_a_wrong_base_is_found_by_its_content(ended: Ended, folder: Path, tmp_path: Path) -> None:
    base = shutil.copytree(ended.bench.machine.model_folder, tmp_path / "base")
    assert codes(folder, base=base) == []
    config = base / "config.json"
    config.write_text(config.read_text().replace("0.02", "0.03"))
    assert codes(folder, base=base) == ["wrong-base"]
    with pytest.raises(ReleaseError, match="not a folder"):
        verify_release(folder, base=tmp_path / "none")


# --- heads ----------------------------------------------------------------------------------------------------------


def test_a_missing_head_is_found_for_its_site(ended: Ended, folder: Path) -> None:
    resigned(folder, ended.coordinator, lambda values: values["sites"][1].update(receipt=None))
    (found,) = verify_release(folder).findings
    assert (found.code, found.subject) == ("missing-head", "site-1")


def test_a_head_that_the_site_has_not_signed_is_forged(ended: Ended, folder: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        head = Receipt.from_dict(values["sites"][0]["receipt"]).head
        forged = Receipt.of(replace(head, digest="a" * 64), ended.coordinator)
        values["sites"][0]["receipt"] = forged.to_dict()

    resigned(folder, ended.coordinator, change)
    assert codes(folder) == ["forged-head"]


def test_one_journal_cannot_stand_for_two_sites(ended: Ended, folder: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        values["sites"][1]["receipt"] = values["sites"][0]["receipt"]

    resigned(folder, ended.coordinator, change)
    assert codes(folder) == ["forged-head"]


def test_a_journal_that_was_put_back_to_before_the_head_does_not_bear_it_out(ended: Ended, folder: Path) -> None:
    path = ended.journals["site-0"]
    older = path.with_name("older.journal")
    older.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert codes(folder, journals=[older]) == ["head"]


def test_a_journal_that_was_changed_is_named(ended: Ended, folder: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed.journal"
    lines = ended.journals["site-0"].read_bytes().splitlines(keepends=True)
    changed.write_bytes(b"".join([*lines[:3], lines[3].replace(b'"round":1', b'"round":2'), *lines[4:]]))
    assert codes(folder, journals=[changed]) == ["journal"]


def test_a_journal_of_nobody_in_the_release_is_named(folder: Path, tmp_path: Path) -> None:
    with Journal.create(tmp_path / "x.journal", "x", Ed25519PrivateKey.generate()):
        pass
    assert codes(folder, journals=[tmp_path / "x.journal"]) == ["journal"]


# --- ε --------------------------------------------------------------------------------------------------------------


def lie(ended: Ended, folder: Path, epsilon: float, *, with_events: bool = True) -> None:
    """Say that the first site has spent less, in manifest and card, and sign it all."""
    study = ended.open()
    summary = json.loads(json.dumps(study.summary))
    for site in summary["sites"]:
        site["epsilon"] = epsilon
    summary["privacy"] |= {"max_epsilon": epsilon, "statement": f"(ε = {epsilon})-differential privacy"}
    (folder / "README.md").write_text(render_card(study.plan, summary, heads=study.heads))

    def change(values: dict[str, Any]) -> None:
        values["privacy"] = summary["privacy"]
        for site in values["sites"]:
            site["epsilon"] = epsilon
            site["events"] = site["events"] if with_events else []
        values["files"] = {name: facts.model_dump() for name, facts in describe(folder).items()}

    resigned(folder, ended.coordinator, change)


def test_an_epsilon_that_is_not_that_of_the_events_is_found_without_journals(ended: Ended, folder: Path) -> None:
    lie(ended, folder, 0.25)
    assert codes(folder) == ["epsilon", "epsilon"]


def test_an_epsilon_that_journals_do_not_support_is_found_with_them_alone(ended: Ended, folder: Path) -> None:
    lie(ended, folder, 0.25, with_events=False)
    assert codes(folder) == []
    (found,) = verify_release(folder, journals=[ended.journals["site-1"]]).findings
    assert (found.code, found.subject) == ("epsilon", "site-1")
    assert "0.25 is said" in found.text


def test_a_card_that_says_less_than_its_manifest_is_found(ended: Ended, folder: Path) -> None:
    honest, _ = read_manifest(folder)
    lie(ended, folder, 0.25)

    def change(values: dict[str, Any]) -> None:
        values.update(sites=honest.model_dump(mode="json")["sites"], privacy=honest.privacy)

    resigned(folder, ended.coordinator, change)
    found = verify_release(folder).findings
    assert {finding.code for finding in found} == {"card"}
    assert any("0.250" in finding.text for finding in found)
    assert any("ε = 0.25" in finding.text for finding in found)


def test_charges_that_the_coordinator_never_heard_of_are_found(pooled: Bench, tmp_path: Path) -> None:
    """A round whose reply was lost is charged all the same; a release that leaves it out says too little."""
    ended = make_ended(tmp_path / "run", pooled)
    with ended.journal("site-0") as journal:
        Ledger(journal).reserve(charge_of(pooled.plan, 3, event_of_round(pooled.plan)), ())
    folder = ended.release(tmp_path / "release").folder
    assert codes(folder) == []
    assert codes(folder, journals=ended.journals.values()) == ["epsilon"]


def test_a_study_without_privacy_is_released_as_that(pooled: Bench, tmp_path: Path) -> None:
    ended = make_ended(tmp_path / "run", pooled.plan_with(privacy__mode="off"))
    folder = ended.release(tmp_path / "release").folder
    assert codes(folder, journals=ended.journals.values()) == []
    card = folder / "README.md"
    card.write_text(card.read_text().replace("NOT PRIVATE", "private"))
    assert codes(folder) == ["tampered-file", "card"]


# --- countersignatures ----------------------------------------------------------------------------------------------


def test_a_site_signs_what_its_journal_bears_out_and_says_so_in_it(ended: Ended, folder: Path) -> None:
    with ended.journal("site-0") as journal:
        signed = countersign(folder, journal, ended.public)
    verdict = verify_release(folder, journals=ended.journals.values())
    assert (verdict.findings, verdict.countersigned) == ((), ("site-0",))
    with ended.journal("site-0") as journal:
        assert journal.state.released[ended.bench.plan.sha256]
        before = journal.chain.length
        assert countersign(folder, journal) == signed
        assert journal.chain.length == before


def test_a_site_does_not_sign_less_than_it_has_spent(ended: Ended, folder: Path) -> None:
    lie(ended, folder, 0.25, with_events=False)
    with ended.journal("site-0") as journal, pytest.raises(ReleaseError, match="charged") as caught:
        countersign(folder, journal)
    assert caught.value.code == "release.unsupported-epsilon"
    assert read_signatures(folder).sites == ()


def test_a_site_does_not_sign_a_head_that_is_not_its_own(ended: Ended, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.journal"
    lines = ended.journals["site-0"].read_bytes().splitlines(keepends=True)
    copy.write_bytes(b"".join(lines[:3]))
    with Journal.open(copy, ended.keys["site-0"]) as journal, pytest.raises(ReleaseError) as caught:
        countersign(folder, journal)
    assert caught.value.code == "release.not-own-head"
    with (
        Journal.create(tmp_path / "x.journal", "x", Ed25519PrivateKey.generate()) as journal,
        pytest.raises(ReleaseError) as other,
    ):
        countersign(folder, journal)
    assert other.value.code == "release.other-site"


def test_a_site_does_not_sign_what_does_not_hold(ended: Ended, folder: Path) -> None:
    (folder / "fedtune.json").write_text("{}")
    with ended.journal("site-0") as journal, pytest.raises(ReleaseError) as caught:
        countersign(folder, journal)
    assert caught.value.code == "release.does-not-hold"
    with ended.journal("site-0") as journal, pytest.raises(ReleaseError, match="other-coordinator"):
        countersign(folder, journal, "0" * 64)


def test_a_countersignature_holds_for_its_site_and_its_release_alone(ended: Ended, folder: Path) -> None:
    manifest, raw = read_manifest(folder)
    signatures = read_signatures(folder)
    key = ended.keys["site-0"]
    for name, signer, message in [
        ("site-0", key, raw + b" "),
        ("site-1", key, raw),
        ("site-0", Ed25519PrivateKey.generate(), raw),
        ("nobody", key, raw),
    ]:
        site = manifest.site(name) or manifest.sites[0]
        head = site.witnessed()
        assert head is not None
        statement = countersigned(message, name, head.head.site)
        signature = signer.sign(statement).hex()
        one = SiteSignature(name=name, site=head.head.site, key=public_hex(signer), signature=signature)
        write_signatures(folder, signatures.with_site(one))
        assert codes(folder) == ["countersignature"]


def test_a_rotated_key_countersigns_where_the_journal_shows_the_rotation(pooled: Bench, tmp_path: Path) -> None:
    from tests.support.site_journals import rotation

    ended = make_ended(tmp_path / "run", pooled)
    folder = ended.release(tmp_path / "release").folder
    new = Ed25519PrivateKey.generate()
    with ended.journal("site-0") as journal:
        journal.rotate(new, rotation(ended.keys["site-0"], new))
        countersign(folder, journal)
    assert codes(folder) == ["countersignature"]
    assert codes(folder, journals=[ended.journals["site-0"]]) == []


# --- refused before anything is written -----------------------------------------------------------------------------


def test_an_export_takes_no_place_that_is_taken(ended: Ended, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    with pytest.raises(ReleaseError, match="there already"):
        ended.release(tmp_path / "there")
    assert (tmp_path / "there" / "file").read_text() == "mine"


def test_an_export_that_fails_leaves_nothing(ended: Ended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedtune.release.export.write_signatures", full)
    with pytest.raises(ReleaseError) as caught:
        ended.release(tmp_path / "out")
    assert caught.value.code == "release.disk-full"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "change", "code"),
    [
        ("summary.json", None, "release.unfinished"),
        ("coordinator.key", None, "release.no-key"),
        ("coordinator.key", b"no key", "release.no-key"),
        ("heads.jsonl", b'{"name":1}\n', "release.damaged-heads"),
        ("adapter/fedtune.json", b"{}", "release.no-adapter"),
        ("adapter/fedtune.json", b'{"plan_sha256":"0"}', "release.other-adapter"),
        ("adapter/adapter_config.json", b'{"peft_type":"LORA","use_dora":true}', "release.not-canonical"),
    ],
)
def test_a_run_that_cannot_be_released_says_why(
    ended: Ended, tmp_path: Path, file: str, change: bytes | None, code: str
) -> None:
    run = shutil.copytree(ended.run, tmp_path / "run")
    (run / file).unlink() if change is None else (run / file).write_bytes(change)
    with pytest.raises(ReleaseError) as caught:
        replace(ended, run=run).release(tmp_path / "out")
    assert caught.value.code == code
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_coordinators_folder_has_key_and_heads_above_the_study(ended: Ended, tmp_path: Path) -> None:
    study = tmp_path / "coordinator" / "studies" / "study-1"
    shutil.copytree(ended.run, study)
    (tmp_path / "coordinator" / "witness").mkdir()
    (study / "coordinator.key").rename(tmp_path / "coordinator" / "coordinator.key")
    (study / "heads.jsonl").rename(tmp_path / "coordinator" / "witness" / "heads.jsonl")
    folder = replace(ended, run=study).release(tmp_path / "release").folder
    assert codes(folder, coordinator_key=ended.public) == []


def test_a_newer_head_of_another_study_does_no_harm(ended: Ended, folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(ended.run, tmp_path / "run")
    with ended.journal("site-0") as journal:
        receipt = Receipt.of(Head.of(journal), ended.coordinator)
    with (run / "heads.jsonl").open("a") as file:
        file.write(json.dumps({"name": "site-0", "receipt": receipt.to_dict()}) + "\n")
        file.write(json.dumps({"name": "stranger", "receipt": receipt.to_dict()}) + "\n")
    again = replace(ended, run=run).release(tmp_path / "again").folder
    assert codes(again, journals=ended.journals.values()) == []
