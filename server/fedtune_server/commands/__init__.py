"""`fedtune server`: what a coordinator's operator does, one module a noun.

Commands talk to a coordinator that runs through its files alone, so they work while it is down as well.
"""

import typer

from fedtune_server.commands import enrol, initial, logs, renewal, status, submit, up, wishes

app = typer.Typer(
    help="Coordinate a federation: enrol sites, run studies.",
    epilog="Exit code: 0 done; 2 refused, with the reason; 130 Ctrl-C. --dir, or FEDTUNE_COORDINATOR, or ./coordinator "
    "is the coordinator's folder. The authority is unlocked by --key-file, FEDTUNE_AUTHORITY_KEY_FILE, "
    "FEDTUNE_AUTHORITY_PASSPHRASE or at the terminal; the first of them that is set is used.",
    no_args_is_help=True,
)


@app.callback()
def group() -> None:
    """Coordinate a federation: enrol sites, run studies."""


app.command("init")(initial.init)
app.command("renew")(renewal.renew)
app.add_typer(enrol.app, name="enrol")
app.command("up")(up.up)
app.command("submit")(submit.submit)
app.command("status")(status.status)
app.command("stop")(wishes.stop)
app.command("resume")(wishes.resume)
app.command("logs")(logs.logs)
