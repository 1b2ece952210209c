"""The pages for operators and auditors: each is followed from its first line to its last, and its program attacked."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.journal.witness import Head, Receipt
from tests.client.commands.conftest import study
from tests.support.runs import ROOT, command

if TYPE_CHECKING:
    from pathlib import Path

    from tests.client.commands.conftest import Place

OPERATOR, AUTHORITY = (ROOT / "docs" / name for name in ("site-operator.md", "site-authority.md"))
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
EXIT = re.compile(r"#\s*exit code (\d+)$")
Check = Callable[..., tuple[int, Counter[Any]]]


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    yield from FENCE.findall(page.read_text(encoding="utf-8"))


def program() -> str:
    (found,) = (text for kind, text in blocks(AUTHORITY) if kind == "python")
    return found


def follow(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what one line of a page says."""
    expected = EXIT.search(line)
    words = line[: expected.start()].strip() if expected else line
    if words.startswith("export "):
        name, _, value = words.removeprefix("export ").partition("=")
        monkeypatch.setenv(name, value.strip('"'))
    elif words.startswith("fedtune "):
        done = command(*shlex.split(words)[1:])
        assert done.code == (int(expected[1]) if expected else 0), f"{line}\n{done.out}\n{done.err}"
    else:
        subprocess.run(["bash", "-ec", words], check=True)


def test_the_operators_page_is_followed_from_an_empty_folder_to_a_proof(
    empty: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDTUNE_VAULT_KEY_FILE")
    (empty.folder / "vault.key").unlink()
    monkeypatch.chdir(empty.folder)
    for kind, text in blocks(OPERATOR):
        if kind == "yaml":
            name = text.splitlines()[0].removeprefix("# ")
            (empty.folder / name).write_text(text.replace("MODEL_SHA256", study().model.sha256), encoding="utf-8")
            continue
        for line in text.splitlines():
            if "client budget" in line and "--forecast" not in line:
                empty.charge(study(), 1, 2)  # the coordinator's rounds
            follow(line, monkeypatch)
    found = empty.kinds()
    assert found[:5] == ["site-created", "policy-adopted", "data-registered", "consent-given", "plan-approved"]
    assert found[-2:] == ["consent-revoked", "key-rotated"]
    with tarfile.open(empty.folder / "mercy-2026.tar.gz") as archive:
        archive.extractall(empty.folder / "auditor", filter="data")
    monkeypatch.chdir(empty.folder / "auditor" / "mercy")
    key = (empty.folder / "auditor" / "mercy" / "public.key").read_text().strip()
    for kind, text in blocks(AUTHORITY):
        for line in text.splitlines() if kind == "sh" else []:
            follow(line.replace("PUBLIC_KEY", key), monkeypatch)


def test_every_error_that_the_operators_page_explains_exists() -> None:
    codes = re.findall(r"^\| (`[a-z]+\.[a-z-]+`(?:, `[a-z]+\.[a-z-]+`)*) \|", OPERATOR.read_text("utf-8"), re.MULTILINE)
    sources = "\n".join(
        path.read_text(encoding="utf-8") for folder in ("fedtune", "client") for path in (ROOT / folder).rglob("*.py")
    )
    found = [code.strip("`") for row in codes for code in row.split(", ")]
    assert len(found) > 10
    for code in found:
        assert f'"{code.partition(".")[2]}"' in sources, code


@pytest.fixture(scope="module")
def check() -> Check:
    """The page's program, which knows nothing of fedtune."""
    code = program()
    assert len([line for line in code.splitlines() if line.strip()]) <= 50
    names: dict[str, Any] = {"__name__": "check"}
    exec(compile(code, "check.py", "exec"), names)
    found: Check = names["check"]
    return found


@pytest.fixture
def lived(ready: Place) -> Place:
    """A journal with a rotation, charges and an approval."""
    ready.done("approve", "plan.json", "--by", "Ä. Person", "--yes")
    ready.charge(study(), 1, 2)
    ready.done("key", "rotate")
    ready.charge(study(), 3, commit=False)
    return ready


def key_of(place: Place) -> str:
    return (place.site / "public.key").read_text().strip()


def witnessed(place: Place) -> bytes:
    with place.open().journal as journal:
        receipt = Receipt.of(Head.of(journal), Ed25519PrivateKey.generate())
    return json.dumps(receipt.to_dict()).encode() + b"\n"


REFUSES = (ValueError, KeyError, TypeError, InvalidSignature, UnicodeError, IndexError, AttributeError)


def test_the_program_accepts_what_a_site_wrote_and_counts_its_charges(lived: Place, check: Check) -> None:
    old = lived.records()[0]["entry"]["public_key"]
    for key in (old, key_of(lived)):
        count, steps = check(lived.journal.read_bytes(), key, witnessed(lived))
        assert count == len(lived.kinds())
        promise = study().promise
        terms = (2, study().sha256, "patient_id", promise.noise_multiplier, promise.sampling_rate)
        assert steps == {terms: 15}


def test_the_program_runs_alone_and_imports_nothing_of_ours(lived: Place) -> None:
    (lived.folder / "check.py").write_text(program(), encoding="utf-8")
    (lived.folder / "heads.jsonl").write_bytes(witnessed(lived))
    words = [sys.executable, "-P", "check.py", str(lived.journal), key_of(lived), "heads.jsonl"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=lived.folder, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"intact: {len(lived.kinds())} records")
    imported = set(re.findall(r"^(?:import|from) ([\w., ]+)", program(), re.MULTILINE))
    assert "fedtune" not in " ".join(imported)
    lived.journal.write_bytes(lived.journal.read_bytes()[:-5])
    again = subprocess.run(words, capture_output=True, text=True, cwd=lived.folder, check=False)
    assert again.returncode != 0


def test_the_program_finds_every_bit_that_was_flipped(lived: Place, check: Check) -> None:
    data, key = lived.journal.read_bytes(), key_of(lived)
    missed = []
    for place in range(0, len(data), 7):
        changed = bytearray(data)
        changed[place] ^= 1 << (place % 8)
        try:
            check(bytes(changed), key)
            missed.append(place)
        except REFUSES:
            continue
    assert missed == []


def test_the_program_finds_records_removed_swapped_repeated_and_spliced(lived: Place, check: Check) -> None:
    lines, key = lived.journal.read_bytes().splitlines(keepends=True), key_of(lived)
    for at in range(len(lines) - 1):
        for changed in (
            [*lines[:at], *lines[at + 1 :]],
            [*lines[:at], lines[at + 1], lines[at], *lines[at + 2 :]],
            [*lines[: at + 1], *lines[at:]],
        ):
            with pytest.raises(REFUSES):
                check(b"".join(changed), key)
    with pytest.raises(REFUSES):
        check(b"".join(lines), "ab" * 32)


def test_the_program_finds_a_cut_at_a_records_end_by_a_receipt_alone(lived: Place, check: Check) -> None:
    receipts, key = witnessed(lived), lived.records()[0]["entry"]["public_key"]
    lines = lived.journal.read_bytes().splitlines(keepends=True)
    for at in range(1, len(lines)):
        cut = b"".join(lines[:at])
        check(cut, key)  # the control: without a receipt it passes
        with pytest.raises(ValueError, match="rolled back or rewritten"):
            check(cut, key, receipts)


def test_the_program_refuses_a_receipt_that_somebody_else_signed(lived: Place, check: Check) -> None:
    receipt = json.loads(witnessed(lived))
    for place, name in ((receipt, "signature"), (receipt["head"], "signature"), (receipt["head"], "digest")):
        kept, place[name] = place[name], "0" * len(place[name])
        with pytest.raises(REFUSES):
            check(lived.journal.read_bytes(), key_of(lived), json.dumps(receipt).encode())
        place[name] = kept
    check(lived.journal.read_bytes(), key_of(lived), json.dumps(receipt).encode())
