from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.cli import main
from fedtune.journal import entries as e
from fedtune.journal.chain import public_hex
from tests.support.runs import Done, command
from tests.support.site_journals import WITNESS, Site, data, forge, receipt_at, run_round, twelve, write_receipts


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
def lines(site: Site) -> list[bytes]:
    return twelve(site)


def audit(site: Site, *words: object) -> Done:
    return command("audit", "verify", str(site.path), *(str(word) for word in words))


def audited(site: Site, *words: object) -> dict[str, Any]:
    found: dict[str, Any] = audit(site, "--format", "json", *words).json
    return found


def test_an_intact_journal_is_reported_with_what_was_checked_and_what_was_not(site: Site, lines: list[bytes]) -> None:
    done = audit(site)
    assert (done.code, done.err) == (0, "")
    assert "verdict" in done.out
    assert "intact" in done.out
    assert "hospital" in done.out
    assert "12, the last of 2026-01-01T" in done.out
    assert "believed" in done.out
    assert "no receipt" in done.out
    heads = write_receipts(site.folder / "heads.jsonl", receipt_at(site, lines, 9))
    done = audit(site, "--public-key", site.public, "--witness", heads, "--witness-key", public_hex(WITNESS))
    assert done.code == 0
    assert "believed" not in done.out
    assert "up to record 9" in done.out
    assert "2 records come after it" in done.out


@pytest.mark.parametrize("outcome", ["intact", "torn", "tampered", "rolled-back"])
def test_each_verdict_has_an_exit_code_of_its_own(site: Site, lines: list[bytes], outcome: str) -> None:
    heads = write_receipts(site.folder / "heads.jsonl", receipt_at(site, lines, 7))
    whole = site.path.read_bytes()
    content = {
        "intact": whole,
        "torn": whole[:-1],
        "tampered": whole.replace(b'"round":2', b'"round":3'),
        "rolled-back": b"".join(line + b"\n" for line in lines[:5]),
    }[outcome]
    site.path.write_bytes(content)
    found = audit(site, "--witness", heads)
    expected = {"intact": 0, "torn": 4, "tampered": 5, "rolled-back": 6}[outcome]
    assert (found.code, found.err) == (expected, "")
    assert outcome.replace("-", " ") in found.out
    document = audited(site, "--witness", heads)
    assert (document["outcome"], document["exit_code"]) == (outcome, expected)
    assert site.path.read_bytes() == content


def test_the_first_bad_record_is_named(site: Site, lines: list[bytes]) -> None:
    site.path.write_bytes(site.path.read_bytes().replace(b'"round":2', b'"round":3'))
    assert "first bad record  9" in audit(site).out
    document = audited(site)
    assert (document["bad"], document["records"]) == (9, 9)
    assert "signature" in document["reason"]


def test_a_key_is_given_as_digits_or_as_a_file(site: Site, lines: list[bytes]) -> None:
    file = site.folder / "public.key"
    file.write_text(site.public + "\n")
    for key in (site.public, site.public.upper(), file):
        assert audited(site, "--public-key", key)["key_checked"] is True
    other = public_hex(Ed25519PrivateKey.generate())
    assert audit(site, "--public-key", other).code == 5
    (site.folder / "wrong").write_bytes(b"\xff not a key")
    for wrong in ("abc", "g" * 64, site.folder / "wrong", site.folder, site.folder / "none"):
        done = audit(site, "--public-key", wrong)
        assert (done.code, done.out) == (2, "")
        assert "error[journal.no-key]" in done.err
        assert "hint: " in done.err


def test_what_cannot_be_read_is_one_error_with_code_2(site: Site, lines: list[bytes]) -> None:
    heads = site.folder / "heads.jsonl"
    heads.write_text("{}\n")
    cases = [
        (audit(site, "--witness", heads), "journal.forged-head"),
        (audit(site, "--witness", site.folder / "none"), "journal.unreadable"),
        (audit(site, "--recompute-epsilon", "--delta", "2"), "privacy.delta"),
        (command("audit", "verify", str(site.folder / "none")), "journal.missing"),
        (command("audit", "verify", str(site.folder)), "journal.unreadable"),
        (command("audit", "verify"), "usage"),
    ]
    for done, code in cases:
        assert (done.code, done.out) == (2, "")
        assert f"error[{code}]" in done.err
        assert "Traceback" not in done.err
    error = command("audit", "verify", str(site.folder / "none"), "--format", "json").err
    assert json.loads(error)["error"]["code"] == "journal.missing"


def test_epsilon_is_composed_anew_by_three_accountants(site: Site, lines: list[bytes]) -> None:
    document = audited(site, "--recompute-epsilon", "--delta", "1e-6")
    plan, together = document["spent"]
    assert document["delta"] == 1e-6
    assert (plan["study"], plan["data"], together["plan"]) == ("study", ["claims"], None)
    assert plan["events"][0]["steps"] == 8
    assert plan["epsilon"]["pld"] == pytest.approx(plan["epsilon"]["prv"], abs=0.02)
    assert plan["epsilon"]["pld"] < plan["epsilon"]["rdp"]
    done = audit(site, "--recompute-epsilon")
    assert "δ = 1e-05" in done.out
    assert "σ=1 q=0.1 steps=8" in done.out
    assert "all together" in done.out


def test_a_round_without_privacy_is_infinite_in_text_and_in_json(site: Site) -> None:
    with site.create() as journal:
        run_round(journal, 1, None)
    assert audited(site, "--recompute-epsilon")["spent"][0]["epsilon"] == {"pld": "inf", "rdp": "inf", "prv": "inf"}
    out = audit(site, "--recompute-epsilon").out
    assert "1 rounds NOT PRIVATE" in out
    assert "inf" in out


def test_a_site_that_was_never_charged_has_spent_nothing(site: Site) -> None:
    site.create().close()
    assert audited(site, "--recompute-epsilon")["spent"] == []
    assert "no round was ever charged" in audit(site, "--recompute-epsilon").out


def test_names_in_paths_and_records_are_printed_and_not_acted_on(site: Site) -> None:
    odd = Site(site.folder / "[bold]x\x1b[31m")
    odd.folder.mkdir()
    twelve(odd)
    out = audit(odd).out.replace("\n", "")
    assert r"[bold]x\x1b[31m" in out
    assert "\x1b" not in out


def test_a_running_site_is_not_disturbed(site: Site) -> None:
    with site.create() as journal:
        assert audit(site).code == 0
        journal.append(data("more"))
    assert audited(site)["records"] == 4


def test_a_signed_contradiction_is_told_in_words(site: Site, lines: list[bytes]) -> None:
    site.write(forge(lines, [e.Committed(reserved=3, payload="a" * 64, size=1)], site.key))
    done = audit(site)
    assert done.code == 5
    assert "speaks of reservation 3" in done.out.replace("\n", " ")


def test_the_help_names_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "verify", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("0 intact", "4 torn", "5 tampered", "6 rolled back", "2 the files"):
        assert words in text
