"""`fedtune client`: what a site's operator does, one module a noun.

Views (`asked`, `budget`, `consent list`, `logs`, `policy check|show`, `journal show|verify|export`) need no secret and
write nothing; what is decided is one signed record and needs the vault. All of it works while a client runs.
"""

import typer

from fedtune_client.commands import (
    approval,
    asked,
    budget,
    consent,
    countersign,
    doctor,
    initial,
    join,
    journal,
    key,
    logs,
    personal,
    policy,
    renew,
    up,
    vault,
)

app = typer.Typer(
    help="Decide what a site takes part in, and see what it has spent.",
    epilog="Exit code: 0 done; 1 doctor has found what is to be mended; 2 refused, with the reason; 7 the plan would "
    "be refused (policy check, budget --forecast); 130 Ctrl-C; `journal verify` has the codes of `fedtune audit "
    "verify`. --site, or FEDTUNE_SITE, or ./site is the site's folder. The vault is unlocked by --key-file, "
    "FEDTUNE_VAULT_KEY_FILE, FEDTUNE_VAULT_KEY, FEDTUNE_VAULT_PASSPHRASE or at the terminal; the first of them that is "
    "set is used.",
    no_args_is_help=True,
)


@app.callback()
def group() -> None:
    """Decide what a site takes part in, and see what it has spent."""


app.command("init")(initial.init)
app.command("join")(join.join)
app.command("doctor")(doctor.doctor)
app.command("up")(up.up)
app.command("logs")(logs.logs)
app.command("renew")(renew.renew)
app.command("asked")(asked.asked)
app.add_typer(policy.app, name="policy")
app.add_typer(consent.app, name="consent")
app.command("budget")(budget.budget)
app.command("approve")(approval.approve)
app.command("adapter")(personal.adapter)
app.command("countersign")(countersign.countersign)
app.add_typer(journal.app, name="journal")
app.add_typer(key.app, name="key")
app.add_typer(vault.app, name="vault")
