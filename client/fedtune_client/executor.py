"""A site's resident process: it answers the messages of the site's node, and keeps vault and base model open.

    python -m fedtune_client.executor SETTINGS.json

The vault is opened at once, so that a wrong passphrase is found before a study asks; records and models are not before
they are needed. What opens it is read from the pipe that the settings name, or from FEDTUNE_VAULT_KEY_FILE, _KEY or
_PASSPHRASE; afterwards the environment does not hold it any more. While the process works it touches `ready`, every few
seconds, which holds {"pid"}. SIGTERM ends it; a message that is being worked on is answered `site.stopped`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from pydantic import Field

from fedtune.commands.screen import quiet_libraries
from fedtune.config.machine import ENVIRONMENT_VARIABLE as MACHINE
from fedtune.config.schema import Section
from fedtune.flower import program
from fedtune.flower.environment import enter, log_plainly
from fedtune.processes.heartbeat import beat
from fedtune.run.files import write_whole
from fedtune_client.folder import ENVIRONMENT_VARIABLE as SITE
from fedtune_client.folder import FEDERATION_VARIABLE
from fedtune_client.secret_pipe import receive


class SiteExecutorSettings(Section):
    """Which site answers, for which federation, and the runtime API of its node; `unlock` is a pipe with its secret."""

    site: Path
    federation: str
    port: int = Field(ge=1, lt=2**16)
    secret: Path
    ready: Path
    unlock: Path | None = None
    poll: float = Field(0.2, gt=0, le=30)


def serve(settings: SiteExecutorSettings) -> None:
    """Serve until a signal ends it (SystemExit). Errors: those of the vault, the journal and `serve_site`."""
    enter(settings.site / "node" / "executor")
    quiet_libraries(verbose=False)
    log_plainly()
    settings.ready.unlink(missing_ok=True)
    os.environ.update({SITE: str(settings.site), FEDERATION_VARIABLE: settings.federation})
    os.environ.pop(MACHINE, None)  # a simulation's; with it, messages would need no envelope
    if settings.unlock is not None:
        os.environ.update(receive(settings.unlock))
    from fedtune.flower.executor import ExecutorSettings, serve_site
    from fedtune_client.app import app
    from fedtune_client.channel import open_channel
    from fedtune_client.site import open_resident

    open_channel(open_resident().site).endpoint()
    for name in [name for name in os.environ if name.startswith("FEDTUNE_VAULT_")]:
        del os.environ[name]
    write_whole(settings.ready, json.dumps({"pid": os.getpid()}).encode() + b"\n")
    beat(settings.ready)
    try:
        serve_site(ExecutorSettings(settings.port, settings.secret, settings.poll), app)
    finally:
        settings.ready.unlink(missing_ok=True)


def main(words: list[str]) -> int:
    """Serve by a settings file."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    return program.run(SiteExecutorSettings, serve, words, role="executor")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
