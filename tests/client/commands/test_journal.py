from __future__ import annotations

import io
import json
import tarfile
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.journal.witness import Head, Receipt
from tests.client.commands.conftest import study
from tests.support.runs import command, run_process

if TYPE_CHECKING:
    from pathlib import Path

    from tests.client.commands.conftest import Place


@pytest.fixture
def lived(ready: Place) -> Place:
    """A site that has approved a plan, trained rounds of it, and has a receipt."""
    ready.done("approve", "plan.json", "--by", "A. Person", "--yes")
    ready.charge(study(), 1, 2)
    with ready.open().journal as journal:
        receipt = Receipt.of(Head.of(journal), Ed25519PrivateKey.generate())
        journal.append(receipt.entry())
    (ready.site / "heads.jsonl").write_text(json.dumps(receipt.to_dict()) + "\n")
    return ready


def secrets(place: Place) -> list[bytes]:
    """What no export may hold: the private key, the vault's key, the pseudonyms' key, in bytes and digits."""
    site = place.open()
    raw = [site.vault.get(name) for name in site.vault.names()] + [place.key.data]
    return [secret for secret in raw for secret in (secret, secret.hex().encode())]


def test_every_record_is_shown_in_words(lived: Place) -> None:
    rows = lived.json("journal", "show")
    assert all(set(row) == {"sequence", "time", "kind", "text"} for row in rows)
    assert [row["kind"] for row in rows] == lived.kinds()
    text = " ".join(lived.done("journal", "show").out.split())
    assert "A. Person agrees to" in text
    assert "20 steps" not in text
    assert "5 steps with noise" in text


def test_the_last_records_and_one_kind_are_shown(lived: Place) -> None:
    assert [row["kind"] for row in lived.json("journal", "show", "--last", "2")] == lived.kinds()[-2:]
    reserves = lived.json("journal", "show", "--kind", "reserve")
    assert [row["kind"] for row in reserves] == ["reserve", "reserve"]
    assert "round 2 of" in lived.json("journal", "show", "--kind", "reserve", "--last", "1")[0]["text"]
    assert "there is no such record" in lived.done("journal", "show", "--kind", "release").out
    done = lived.run("journal", "show", "--kind", "reserved")
    assert "error[journal.no-kind]" in done.err
    assert "did you mean reserve?" in done.err


def test_the_site_checks_its_own_journal(lived: Place) -> None:
    found = lived.json("journal", "verify")
    assert (found["outcome"], found["key_checked"], found["witnessed"]) == ("intact", True, len(lived.kinds()) - 2)
    assert "intact" in lived.done("journal", "verify").out


@pytest.mark.parametrize("name", ["out", "out.tar", "out.tar.gz"])
def test_an_export_verifies_elsewhere_and_holds_no_secret(lived: Place, tmp_path: Path, name: str) -> None:
    found = lived.json("journal", "export", name)
    assert set(found) == {"path", "files", "records", "head"}
    assert found["files"] == ["README.txt", "heads.jsonl", "mercy.journal", "public.key"]
    folder = tmp_path / name
    if name != "out":
        with tarfile.open(tmp_path / name) as archive:
            archive.extractall(tmp_path / "unpacked", filter="data")
        folder = tmp_path / "unpacked" / "mercy"
    key, heads = str(folder / "public.key"), str(folder / "heads.jsonl")
    done = command("audit", "verify", str(folder / "mercy.journal"), "--public-key", key, "--witness", heads)
    assert done.code == 0, done.out
    readme = (folder / "README.txt").read_text()
    assert "fedtune audit verify mercy.journal --public-key KEY --witness heads.jsonl --recompute-epsilon" in readme
    everything = b"".join(path.read_bytes() for path in folder.iterdir())
    assert not [secret for secret in secrets(lived) if secret in everything]
    again = lived.run("journal", "export", name)
    assert "error[journal.exists]" in again.err


def test_an_export_needs_no_secret_and_says_when_nothing_is_witnessed(
    ready: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDTUNE_VAULT_KEY_FILE")
    ready.done("journal", "export", "out")
    assert {path.name for path in (ready.folder / "out").iterdir()} == {"README.txt", "mercy.journal", "public.key"}
    readme = (ready.folder / "out" / "README.txt").read_text()
    assert "No coordinator has countersigned" in readme
    assert "--witness" not in readme


def test_an_export_while_a_record_is_being_written_has_whole_records_alone(ready: Place) -> None:
    whole = ready.journal.read_bytes()
    ready.journal.write_bytes(whole + b'{"body":{"entry":{"by":')
    ready.done("journal", "export", "out")
    assert (ready.folder / "out" / "mercy.journal").read_bytes() == whole


def test_equal_journals_give_equal_archives(ready: Place) -> None:
    for name in ("one.tar", "two.tar"):
        ready.done("journal", "export", name)
    one, two = ((ready.folder / name).read_bytes() for name in ("one.tar", "two.tar"))
    assert one == two
    with tarfile.open(fileobj=io.BytesIO(one)) as archive:
        assert all(entry.isfile() and entry.uid == 0 for entry in archive)


def test_a_view_answers_in_a_process_without_any_secret(ready: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDTUNE_VAULT_KEY_FILE")
    monkeypatch.setenv("FEDTUNE_SITE", str(ready.site))
    done = run_process("client", "journal", "show", "--format", "json", cwd="/")
    assert done.code == 0, done.err
    assert len(json.loads(done.out)) == 4
