"""A site's way to its coordinator: a message is taken out of its signed envelope, and the answer goes back in another.

Nothing of a message is read before its envelope was verified and written down as taken; nothing at all is opened for a
message that has none. Whatever is answered to a message that was taken is signed, refusals too. A message that was not
taken gets Flower's error with a code, unsigned: whoever sent it has not shown that it is the coordinator, so nothing is
signed on its word, and an error cannot be taken for an answer (docs/adr/0020). In a simulation messages never leave the
process, and have no envelopes. Knows no plan and no record.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from flwr.app import Message, RecordDict

from fedtune.config.machine import ENVIRONMENT_VARIABLE as MACHINE
from fedtune.envelopes.endpoint import Endpoint
from fedtune.envelopes.envelope import COORDINATOR
from fedtune.envelopes.nonces import FileNonces, Nonces
from fedtune.envelopes.peers import PeerKey, Peers
from fedtune.errors import EnrolmentError, EnvelopeError
from fedtune.flower.failures import refused
from fedtune.flower.messages import refusal_of
from fedtune.flower.sealed import ENVELOPE, Opened, open_request, seal_answer
from fedtune_client.enrolment import Granted, federations, membership
from fedtune_client.folder import ENVIRONMENT_VARIABLE as SITE
from fedtune_client.folder import FEDERATION_VARIABLE, OpenSite, SiteFolder
from fedtune_client.vault import Vault, signing_key

logger = logging.getLogger("fedtune.site")


def is_resident() -> bool:
    """Whether this process is a real site's: FEDTUNE_SITE names its folder, and no simulation has named its machine.

    The client that `fedtune client up` starts drops FEDTUNE_MACHINE, so that no variable takes its envelopes away.
    """
    return bool(os.environ.get(SITE)) and MACHINE not in os.environ


def answered(
    message: Message, study: str, open_site: Callable[[], OpenSite], answer: Callable[[RecordDict], RecordDict]
) -> Message:
    """Return the reply to a message of a study (its plan's SHA-256); `answer` acts on content that may be believed."""
    if not is_resident():
        return Message(answer(message.content), reply_to=message)
    try:
        _require_envelope(message.content)
        channel = open_channel(open_site())
        request = channel.take(message.content, study, message.metadata.message_type)
        return Message(channel.seal(request, answer(request.content)), reply_to=message)
    except Exception as error:
        code = refusal_of(error).code
        logger.warning("refused, and answered unsigned", extra={"study": study[:16], "code": code})
        logger.debug("its cause", exc_info=True)
        return refused(message, code)


@dataclass(frozen=True, slots=True)
class Channel:
    """A site's end of one federation; keys are looked up at each message, so that a renewed grant holds at once."""

    vault: Vault
    federation: str
    nonces: Nonces

    def take(self, content: RecordDict, study: str, kind: str) -> Opened:
        """Take a request of the coordinator. Errors: those of `open_request`, `enrolment.not-enrolled`."""
        return open_request(self.endpoint(), content, COORDINATOR, study, kind.rpartition(".")[2])

    def seal(self, request: Opened, reply: RecordDict) -> RecordDict:
        """Return the answer to a request in its envelope."""
        return seal_answer(self.endpoint(), request, reply)

    def endpoint(self) -> Endpoint:
        """Return the end that signs with the key that the coordinator has granted, and knows the coordinator alone.

        After a rotation that is the old key until the renewal was granted: the coordinator knows no other.
        """
        known = membership(self.vault, self.federation)
        grant = require_granted(known.granted, self.federation).grant
        if grant.site == COORDINATOR:
            hint = "ask the coordinator to invite the site by another name"
            raise EnrolmentError("bad-name", f"a site cannot be called {COORDINATOR}", hint=hint)
        peers = Peers(lambda: {COORDINATOR: (PeerKey(known.offer.coordinator),)})
        key = signing_key(self.vault, grant.key)
        return Endpoint(grant.site, self.federation, key, peers, self.nonces)


def open_channel(site: OpenSite) -> Channel:
    """Return the channel of FEDTUNE_FEDERATION, or of the only federation joined. Errors: those of `federation_of`."""
    federation = federation_of(site.vault, os.environ.get(FEDERATION_VARIABLE))
    return Channel(site.vault, federation, _memory(site.folder.nonces.absolute(), os.getpid()))


def begin_memory(folder: SiteFolder) -> None:
    """Begin the memory of messages: what is signed before there is one is refused, so it begins when a site joins."""
    _memory(folder.nonces.absolute(), os.getpid())


def federation_of(vault: Vault, given: str | None = None) -> str:
    """Return the federation that is meant: the one given, else the only one that the site knows.

    Errors: `enrolment.not-enrolled`, `enrolment.which-federation`.
    """
    known = federations(vault)
    if given:
        return membership(vault, given).offer.federation
    if not known:
        hint = "answer a coordinator's invitation: fedtune client init --invitation FILE"
        raise EnrolmentError("not-enrolled", "this site has joined no federation", hint=hint)
    if len(known) > 1:
        hint = f"name one with --federation or {FEDERATION_VARIABLE}"
        raise EnrolmentError("which-federation", f"the site knows several: {', '.join(known)}", hint=hint)
    return known[0]


def require_granted(granted: Granted | None, federation: str) -> Granted:
    """Return what was granted. Error: `enrolment.not-enrolled` while the coordinator's answer is outstanding."""
    if granted is None:
        hint = "send the coordinator the request, then: fedtune client join GRANT"
        raise EnrolmentError("not-enrolled", f"{federation} has not enrolled this site yet", hint=hint)
    return granted


def _require_envelope(content: RecordDict) -> None:
    if ENVELOPE not in content:
        raise EnvelopeError("missing", "a message has no envelope", hint="nobody may speak without one")


@lru_cache(maxsize=8)
def _memory(path: Path, _process: int) -> FileNonces:
    """Open the memory once a process: SQLite's connections are not to be inherited."""
    return FileNonces(path)
