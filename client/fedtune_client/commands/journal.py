"""`fedtune client journal`: what the site has written down; shown, checked, handed out."""

import io
import tarfile
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.commands.options import Format, OutputFormat, Verbose
from fedtune.commands.screen import quiet_libraries
from fedtune.errors import JournalError
from fedtune_client.commands.shared import (
    KeyFile,
    Site,
    Yes,
    add,
    folder_of,
    opened,
    show,
    site_disk,
    table,
    viewed,
)
from fedtune_client.commands.unlocking import confirm

if TYPE_CHECKING:
    from fedtune_client.view import SiteView

app = typer.Typer(help="What the site has decided and spent, signed.", no_args_is_help=True)
archives = (".tar", ".tar.gz", ".tgz")
readme = """\
The journal of the site {site}
{underline}

{journal}
    Every decision and every charge of this site, one signed record a line, {records} records, the last of {time}.
    It holds no record of data, no label and no file's content.
public.key
    The key of the last record. Do not believe this copy: ask the site for its key by another way and compare.
{heads}
To check it, with fedtune from a source that you trust:

    fedtune audit verify {journal} --public-key KEY{witness} --recompute-epsilon

Exit code: 0 intact, 4 torn, 5 tampered, 6 rolled back. KEY is what the site told you. The format is simple enough to
be checked without fedtune: docs/site-authority.md in its repository has a short program that needs two libraries.
"""
heads = """\
heads.jsonl
    Heads of the journal that coordinators have countersigned. Ask a coordinator for its own copy: the site could have
    taken lines out of this one, and then a journal that was put back to before them would not show.
"""
no_heads = """\
No coordinator has countersigned this journal yet, so a part cut off at its end would not show.
"""


@app.command("show")
def show_journal(
    *,
    last: Annotated[int | None, typer.Option(metavar="N", min=1, help="Only the last N.", show_default=False)] = None,
    kind: Annotated[str | None, typer.Option(metavar="K", help="Only this kind of record.", show_default=False)] = None,
    site: Site = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Show every record of the journal in words."""
    quiet_libraries(verbose=verbose)
    from fedtune.journal.trail import describe

    _require_kind(kind)
    rows = [row for row in describe(viewed(site).records) if kind in {None, row.kind}]
    rows = rows if last is None else rows[-last:]
    made = table("record", "time (UTC)", "", numbers=("record",))
    for row in rows:
        add(made, row.sequence, row.time[:19].replace("T", " "), row.text)
    document = [{"sequence": row.sequence, "time": row.time, "kind": row.kind, "text": row.text} for row in rows]
    show(output, document, [made] if rows else ["there is no such record"])


@app.command(
    epilog="Exit code: 0 intact; 4 torn, the last record is incomplete; 5 tampered, a record is damaged or forged; "
    "6 rolled back, a witnessed record is missing; 2 the files cannot be read."
)
def verify(*, site: Site = None, output: Format = OutputFormat.text, verbose: Verbose = False) -> None:
    """Check the site's own journal against its public key and receipts; as `fedtune audit verify`, for others."""
    from fedtune.commands.audit import verify as audit
    from fedtune_client.view import find_journal

    folder = folder_of(site)
    key = str(folder.public_key_file) if folder.public_key_file.exists() else None
    heads = folder.heads_file if folder.heads_file.exists() else None
    audit(find_journal(folder), public_key=key, witness=heads, output=output, verbose=verbose)


@app.command()
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A folder to make, or FILE.tar, FILE.tar.gz.")],
    *,
    site: Site = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Write the journal, the public key, the receipts and how to check them to one place; nothing in it is secret.

    It tells purposes, data sets' names, rounded counts and ε to whoever has it.
    """
    quiet_libraries(verbose=verbose)
    if file.exists():
        raise JournalError("exists", f"{file} is there already", hint="export to another path")
    receipts = _receipts(folder_of(site).heads_file)  # before the journal: a later one may be for a later record
    seen = viewed(site)
    contents = _contents(seen, receipts)
    with site_disk(file):
        _write_archive(file, contents, seen) if file.name.endswith(archives) else _write_folder(file, contents)
    document = {"path": str(file), "files": sorted(contents), "records": seen.chain.length, "head": seen.chain.digest}
    lines = [f"{file}: {', '.join(contents)}", f"{seen.chain.length:,} records up to {seen.chain.digest}"]
    show(output, document, [*lines, "hand it out; README.txt says how it is checked"])


@app.command()
def accept_clock(
    *,
    yes: Yes = False,
    site: Site = None,
    key_file: KeyFile = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    """Go on although the clock stands before the journal's last record, because that one's clock was wrong."""
    quiet_libraries(verbose=verbose)
    from fedtune.journal.chain import moment
    from fedtune.journal.journal import SLACK, utc_now
    from fedtune_client import operator

    opened_site = opened(site, key_file)
    now, last = utc_now(), datetime.fromisoformat(opened_site.journal.chain.time)
    document = {"now": moment(now), "last": moment(last), "accepted": False}
    if last - now <= SLACK:
        show(output, document, ["the clock does not stand before the journal: there is nothing to accept"])
        return
    confirm(f"the clock says {moment(now)}, the last record {moment(last)}: is the clock right?", yes=yes)
    operator.accept_clock(opened_site)
    show(output, document | {"accepted": True}, [f"accepted: the journal goes on at {moment(now)}"])


def _require_kind(kind: str | None) -> None:
    from fedtune.journal.entries import KINDS

    if kind is not None and kind not in KINDS:
        near = get_close_matches(kind, KINDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(KINDS)}"
        raise JournalError("no-kind", f"no record is of the kind {kind[:40]!r}", hint=hint)


def _receipts(path: Path) -> bytes:
    """Return the whole lines of the site's receipts."""
    data = path.read_bytes() if path.exists() else b""
    return data[: data.rfind(b"\n") + 1]


def _contents(seen: "SiteView", receipts: bytes) -> dict[str, bytes]:
    """Return the files of an export: whole records alone, and the key that is in force."""
    name = f"{seen.state.site}.journal"
    with seen.path.open("rb") as file:
        found = {name: file.read(seen.size), "public.key": f"{seen.chain.public_key}\n".encode()}
    if receipts:
        found["heads.jsonl"] = receipts
    text = readme.format(
        site=seen.state.site,
        underline="=" * len(f"The journal of the site {seen.state.site}"),
        journal=name,
        records=seen.chain.length,
        time=seen.chain.time,
        heads=heads if receipts else no_heads,
        witness=" --witness heads.jsonl" if receipts else "",
    )
    return found | {"README.txt": text.encode()}


def _write_folder(folder: Path, contents: dict[str, bytes]) -> None:
    from fedtune.run.files import write_whole

    folder.mkdir(parents=True)
    for name, data in contents.items():
        write_whole(folder / name, data)


def _write_archive(path: Path, contents: dict[str, bytes], seen: "SiteView") -> None:
    """Write all files into one archive, in a folder of the site's name; equal journals give equal archives (.tar)."""
    from fedtune.run.files import write_whole

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w" if path.suffix == ".tar" else "w:gz") as archive:
        for name, data in contents.items():
            entry = tarfile.TarInfo(f"{seen.state.site}/{name}")
            entry.size, entry.mtime = len(data), int(datetime.fromisoformat(seen.chain.time).timestamp())
            archive.addfile(entry, io.BytesIO(data))
    write_whole(path, buffer.getvalue())
