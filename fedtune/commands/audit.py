"""`fedtune audit verify`: what a site's journal is worth, for whoever has the file and the public key."""

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer

from fedtune.commands.options import Format, OutputFormat, Verbose
from fedtune.commands.screen import quiet_libraries, screen
from fedtune.errors import JournalError

if TYPE_CHECKING:
    from fedtune.journal.recompute import Composition
    from fedtune.journal.verify import Verdict

app = typer.Typer(help="Check what a site has written down, without trusting the site.", no_args_is_help=True)
exit_codes = {"intact": 0, "torn": 4, "tampered": 5, "rolled-back": 6}
patience = 0.3  # seconds to wait for a record that a running site is just writing


@app.callback()
def group() -> None:
    """Check what a site has written down, without trusting the site."""


@app.command(
    epilog="Exit code: 0 intact; 4 torn, the last record is incomplete; 5 tampered, a record is damaged or forged; "
    "6 rolled back, a witnessed record is missing; 2 the files cannot be read or are not what they should be."
)
def verify(  # noqa: PLR0913 - a command's options
    journal: Annotated[Path, typer.Argument(metavar="FILE", help="A site's journal.", show_default=False)],
    *,
    public_key: Annotated[
        str | None,
        typer.Option(metavar="HEX|FILE", help="The site's public key, as you were told it.", show_default=False),
    ] = None,
    witness: Annotated[
        Path | None,
        typer.Option(metavar="HEADS", help="Receipts (heads.jsonl) that a coordinator kept.", show_default=False),
    ] = None,
    witness_key: Annotated[
        str | None,
        typer.Option(metavar="HEX|FILE", help="Count only this coordinator's receipts.", show_default=False),
    ] = None,
    recompute_epsilon: Annotated[
        bool, typer.Option("--recompute-epsilon", help="Compose all charges anew, by PLD, RDP and PRV.")
    ] = False,
    delta: Annotated[float, typer.Option(metavar="D", help="δ for --recompute-epsilon.")] = 1e-5,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Check every record of a journal: signatures, order, and that no witnessed record is missing.

    Needs no secret and no lock, writes nothing, and may run while the site does.
    """
    quiet_libraries(verbose=verbose)
    from fedtune.journal.recompute import recompute
    from fedtune.journal.verify import verify as verify_journal

    verdict = verify_journal(
        journal,
        public_key=read_key(public_key),
        receipts=witness,
        witness_key=read_key(witness_key),
        patience=patience,
    )
    compositions = list(recompute(verdict.state, delta)) if recompute_epsilon else None
    if output is OutputFormat.json:
        click.echo(json.dumps(_document(verdict, compositions, delta), ensure_ascii=False))
    else:
        _print(journal, verdict)
        if compositions is not None:
            _print_epsilon(compositions, delta)
    raise typer.Exit(exit_codes[verdict.outcome])


def read_key(given: str | None) -> str | None:
    """Return a key from its 64 hexadecimal digits or from a file that holds them."""
    if given is None:
        return None
    text = given.strip().lower()
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        try:
            text = Path(given).read_text(encoding="ascii").strip().lower()
        except (OSError, ValueError):
            text = ""
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        hint = "give the key itself or a file with it: SITE/public.key"
        raise JournalError("no-key", f"{given} is no public key of 64 hexadecimal digits", hint=hint)
    return text


def _document(verdict: "Verdict", compositions: "list[Composition] | None", delta: float) -> dict[str, Any]:
    document: dict[str, Any] = {
        name: getattr(verdict, name)
        for name in ("outcome", "reason", "records", "bad", "torn_bytes", "head", "time", "site", "key_checked")
    }
    document |= {
        "exit_code": exit_codes[verdict.outcome],
        "name": verdict.state.site,
        "keys": [asdict(key) for key in verdict.keys],
        "witnessed": verdict.witnessed,
        "unwitnessed": verdict.unwitnessed,
        "witnesses": list(verdict.witnesses),
        "receipts_ignored": verdict.ignored,
    }
    if compositions is not None:
        document |= {"delta": delta, "spent": [_spent(composition) for composition in compositions]}
    return document


def _spent(composition: "Composition") -> dict[str, Any]:
    """ε as a number, `inf` as text (JSON has no ∞), null where it was not computed."""
    values = {name: getattr(composition, name) for name in ("account", "plan", "study", "not_private", "problem")}
    epsilons = {name: _number(getattr(composition, name)) for name in ("pld", "rdp", "prv")}
    events = [event.to_dict() for event in composition.events]
    return {**values, "data": list(composition.data), "events": events, "epsilon": epsilons}


def _number(value: float | None) -> float | str | None:
    return "inf" if value is not None and math.isinf(value) else value


def _print(journal: Path, verdict: "Verdict") -> None:
    from rich.table import Table

    from fedtune.display import printable

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _rows(journal, verdict):
        table.add_row(name, printable(text))
    screen().print(table, markup=False)


def _rows(journal: Path, verdict: "Verdict") -> list[tuple[str, str]]:
    outcome = verdict.outcome.replace("-", " ")
    rows = [("journal", str(journal)), ("verdict", f"{outcome}: {verdict.reason}" if verdict.reason else outcome)]
    if verdict.bad is not None:
        rows.append(("first bad record", f"{verdict.bad}; what follows is about the {verdict.bad:,} before it"))
    if not verdict.records:
        return rows
    rows += [
        ("site", f"{verdict.state.site} (identity {verdict.site})"),
        ("records", f"{verdict.records:,}, the last of {verdict.time}"),
        ("head", verdict.head),
        *_key_rows(verdict),
        ("witnessed", _witnessed(verdict)),
    ]
    return rows


def _key_rows(verdict: "Verdict") -> list[tuple[str, str]]:
    rows = [("key", f"{key.public_key} from record {key.since} on") for key in verdict.keys]
    if not verdict.key_checked:
        rows.append(("", "believed: compare it with what the site told you, or give --public-key"))
    return rows


def _witnessed(verdict: "Verdict") -> str:
    if verdict.witnessed is None:
        found = "no receipt of the witness asked for" if verdict.ignored else "no receipt"
        return f"{found}: a cut at a record's end, or a history written anew with the site's key, would not show"
    known = ", ".join(f"{key[:16]}…" for key in verdict.witnesses)
    return f"up to record {verdict.witnessed} by {known}; {verdict.unwitnessed:,} records come after it"


def _print_epsilon(compositions: "list[Composition]", delta: float) -> None:
    from rich import box
    from rich.table import Table

    from fedtune.display import epsilon_text, printable

    table = Table(title=f"spent, composed anew at δ = {delta:g}", title_justify="left", box=box.SIMPLE)
    for name in ("data", "study", "events", "ε (PLD)", "ε (RDP)", "ε (PRV)"):
        table.add_column(name, justify="right" if name.startswith("ε") else "left", overflow="fold")
    for found in compositions:
        data = ", ".join(found.data)
        study = "all together" if found.plan is None else f"{found.study} {found.plan[:12]}…".strip()
        events = "\n".join(_events(found))
        epsilons = [epsilon_text(value) for value in (found.pld, found.rdp, found.prv)]
        table.add_row(printable(data), printable(study), printable(events), *epsilons)
    console = screen()
    if not compositions:
        console.print("spent: no round was ever charged", markup=False)
        return
    console.print(table, markup=False)
    console.print("An event is σ, q and steps; ε by PRV is computed up to 50. Rounds reserved and never sent count.")


def _events(found: "Composition") -> list[str]:
    lines = [
        f"σ={event.noise_multiplier:.6g} q={event.sampling_rate:.6g} steps={event.steps} C={event.clip_norm:g} "
        f"{event.sampler} {event.noise} {event.unit}"
        for event in found.events
    ]
    if found.not_private:
        lines.append(f"{found.not_private} rounds NOT PRIVATE")
    return lines + ([found.problem] if found.problem else [])
