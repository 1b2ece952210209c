"""`fedtune client consent`: which data set may serve which purpose, up to which ε, until when."""

import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedtune.commands.options import Format, OutputFormat, Verbose
from fedtune.commands.screen import quiet_libraries
from fedtune.errors import ConsentError
from fedtune_client.commands.shared import KeyFile, Site, add, number, opened, show, table, viewed

if TYPE_CHECKING:
    from fedtune.journal.entries import ConsentGiven
    from fedtune_client.view import SiteView

app = typer.Typer(help="Which data may serve which purpose, how much of it, and until when.", no_args_is_help=True)
days = re.compile(r"([1-9][0-9]{0,4})d")
day = re.compile(r"\d{4}-\d\d-\d\d")


@app.command()
def grant(  # noqa: PLR0913 - a command's options
    data: Annotated[str, typer.Argument(metavar="DATA", help="A data set, by its name in site.yaml.")],
    *,
    purpose: Annotated[str, typer.Option(metavar="P", help="What for; a plan's study.purpose must be the same.")],
    epsilon: Annotated[
        float | None, typer.Option(metavar="E", help="At most so much of its budget.", show_default=False)
    ] = None,
    expires: Annotated[
        str | None,
        typer.Option(metavar="WHEN", help="2027-01-31 (that day included, UTC), or 90d from now.", show_default=False),
    ] = None,
    site: Site = None,
    key_file: KeyFile = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Let a data set, as it is now, serve a purpose.

    The file is read whole, to know whose records it holds; another content needs another grant, and its budget goes on.
    """
    quiet_libraries(verbose=verbose)
    from fedtune.journal.chain import moment
    from fedtune_client import operator

    until = None if expires is None else _moment(expires)
    if epsilon is not None and not (0 < epsilon < float("inf")):
        raise ConsentError(
            "bad-epsilon", f"--epsilon {epsilon:g} is no budget", hint="a number above 0, or leave it out"
        )
    opened_site = opened(site, key_file)
    given = operator.grant(opened_site, data, purpose, epsilon, until)
    with opened_site.journal as journal:
        state = journal.state
        registered = state.grants[given].data
        entry, members = state.spending.data[registered], state.spending.accounts()[state.spending.account(registered)]
    shared = sorted({state.spending.data[member].name for member in members} - {data})
    document = {
        "grant": given,
        "data": data,
        "registration": registered,
        "fingerprint": entry.fingerprint,
        "unit": entry.unit,
        "units": entry.units,
        "purpose": purpose,
        "epsilon": epsilon,
        "expires": None if until is None else moment(until),
        "shares_budget_with": shared,
    }
    show(output, document, _granted(document))


@app.command()
def revoke(
    grant_number: Annotated[int, typer.Argument(metavar="GRANT", help="Its number in `fedtune client consent list`.")],
    *,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why; it stands in the journal.")] = "no reason given",
    site: Site = None,
    key_file: KeyFile = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """End a grant at once: a round that is in training ends, none begins. What was sent is not called back."""
    quiet_libraries(verbose=verbose)
    from fedtune_client import operator

    if len(reason) > 1000:  # noqa: PLR2004 - what a record holds
        raise ConsentError("long-reason", f"the reason has {len(reason)} characters, a record holds 1000")
    operator.revoke(opened(site, key_file), grant_number, reason)
    show(
        output,
        {"grant": grant_number, "reason": reason},
        [f"grant {grant_number} is revoked: no round begins under it"],
    )


@app.command("list")
def list_grants(
    *,
    read_data: Annotated[
        bool, typer.Option("--read-data", help="Read the files too, and compare them with what was granted.")
    ] = False,
    site: Site = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """List every grant with its state: in force, expired, revoked, or for another content than the data set has now."""
    quiet_libraries(verbose=verbose)
    seen = viewed(site)
    now = datetime.now(UTC)
    held = _fingerprints(seen) if read_data else {}
    document = [_row(seen, at, given, now, held) for at, given in seen.state.grants.items()]
    made = table("grant", "data", "purpose", "ε at most", "ε spent", "expires", "state", numbers=("grant",))
    for row in document:
        add(made, *_cells(row))
    none = ["nothing was ever granted: fedtune client consent grant DATA --purpose PURPOSE"]
    show(output, document, [made] if document else none)


def _moment(text: str) -> datetime:
    """Read an expiry: so many days from now, or the end of a day in UTC."""
    try:
        if found := days.fullmatch(text):
            return datetime.now(UTC) + timedelta(days=int(found[1]))
        if day.fullmatch(text):
            return datetime.fromisoformat(text).replace(tzinfo=UTC) + timedelta(days=1)
    except (ValueError, OverflowError):
        pass
    hint = "write a day, 2027-01-31, or a number of days, 90d"
    raise ConsentError("bad-expiry", f"--expires {text[:40]!r} is no moment", hint=hint)


def _granted(document: dict[str, Any]) -> list[str]:
    most = "as far as the policy allows" if document["epsilon"] is None else f"up to ε = {document['epsilon']:g}"
    until = "without an end" if document["expires"] is None else f"until {document['expires']}"
    units = f"about {document['units']:,} units of {document['unit']}, content {document['fingerprint'][:12]}…"
    lines = [
        f"grant {document['grant']}: {document['data']} ({units}) may serve {document['purpose']}, {most}, {until}"
    ]
    if document["shares_budget_with"]:
        lines.append(
            f"it shares its budget with {', '.join(document['shares_budget_with'])}: they may hold the same people"
        )
    return [*lines, "next: fedtune client approve PLAN; see fedtune client budget"]


def _row(
    seen: "SiteView", at: int, given: "ConsentGiven", now: datetime, held: dict[str, str | None]
) -> dict[str, Any]:
    state = seen.state
    data = state.spending.data[given.data]
    revoked = state.revoked.get(at)
    return {
        "grant": at,
        "data": data.name,
        "registration": given.data,
        "fingerprint": given.fingerprint,
        "purpose": given.purpose,
        "epsilon": given.epsilon,
        "spent": number(_spent(seen, at)),
        "given": seen.records[at].time,
        "expires": given.expires,
        "state": _state(seen, at, now, held),
        "reason": None if revoked is None else revoked.reason,
    }


def _state(seen: "SiteView", at: int, now: datetime, held: dict[str, str | None]) -> str:
    given, spending = seen.state.grants[at], seen.state.spending
    name = spending.data[given.data].name
    if at in seen.state.revoked:
        return "revoked"
    if given.expires is not None and datetime.fromisoformat(given.expires) <= now:
        return "expired"
    if given.data != spending.latest(name) or held.get(name, given.fingerprint) != given.fingerprint:
        return "other content now"
    return "in force"


def _spent(seen: "SiteView", at: int) -> float | None:
    """Return ε of what was charged under a grant, at the policy's δ; None where units do not compose."""
    from fedtune.errors import PrivacyError
    from fedtune.journal.recompute import USUAL_DELTA

    policy = seen.policy
    delta = USUAL_DELTA if policy is None else policy.privacy.delta
    try:
        return seen.state.spending.spent(seen.state.grants[at].data, grant=at).epsilon(delta)
    except PrivacyError:
        return None


def _fingerprints(seen: "SiteView") -> dict[str, str | None]:
    """Return what the files of the granted data sets hold now; None for one that cannot be read."""
    from fedtune.data.fingerprint import fingerprint
    from fedtune.errors import FedtuneError
    from fedtune_client.facts import open_table

    facts, found = seen.folder.facts(), dict[str, str | None]()
    for name in {seen.state.spending.data[given.data].name for given in seen.state.grants.values()}:
        try:
            read = open_table(facts, name).table
            found[name] = fingerprint(read, read.names)
        except FedtuneError:
            found[name] = None
    return found


def _cells(row: dict[str, Any]) -> list[str]:
    from fedtune.display import epsilon_text

    most = "-" if row["epsilon"] is None else f"{row['epsilon']:g}"
    spent = row["spent"] if row["spent"] is None else float(row["spent"])
    state = row["state"] if row["reason"] is None else f"{row['state']}: {row['reason']}"
    until = "never" if row["expires"] is None else row["expires"][:16].replace("T", " ") + " UTC"
    return [str(row["grant"]), row["data"], row["purpose"], most, epsilon_text(spent), until, state]
