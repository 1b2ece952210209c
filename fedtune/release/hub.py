"""The way to the Hugging Face Hub: whose token, which endpoint, and errors that quote neither token nor password.

`huggingface_hub` finds the token in its own places (`HF_TOKEN`, `hf auth login`); it goes into its requests alone. The
endpoint is `HF_ENDPOINT`, or the public Hub. Knows no release.
"""

from __future__ import annotations

import logging
import os
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fedtune import __version__
from fedtune.errors import FedtuneError, HubError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_PUBLIC = "https://huggingface.co"
_HIDDEN = "[hidden]"
_UNKNOWN = "check the name; a private repository is there only for those who may read it: hf auth login"


@dataclass(frozen=True, slots=True)
class Hub:
    """One endpoint and the right to use it; `secrets` is never shown, not even by `repr`."""

    api: HfApi
    endpoint: str
    secrets: tuple[str, ...] = field(repr=False)

    @contextmanager
    def talking(self, about: str) -> Iterator[None]:
        """Turn what the client raises into a `HubError` about a repository, and hide secrets in what it logs.

        A cause that quotes a secret is dropped, so that no traceback shows it. Errors: `hub.no-repository`,
        `hub.no-revision`, `hub.refused`, `hub.changed-meanwhile`, `hub.unreachable`, `hub.failed`.
        """
        try:
            with _silenced(self.secrets):
                yield
        except FedtuneError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever the client raises may quote its request
            quotes = any(secret in "".join(traceback.format_exception(error)) for secret in self.secrets)
            raise self._described(error, about) from (None if quotes else error)

    def _described(self, error: Exception, about: str) -> HubError:
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

        said = hidden(_gist(error), self.secrets)
        if isinstance(error, RevisionNotFoundError):
            return HubError("no-revision", f"{about} has no such revision", hint="see its commits at the Hub")
        if isinstance(error, RepositoryNotFoundError):
            return HubError("no-repository", f"{self.endpoint} shows no repository {about}", hint=_UNKNOWN)
        status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
        if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
            hint = "use a token that may do this: hf auth login, or HF_TOKEN"
            return HubError("refused", f"{self.endpoint} refuses ({status}) for {about}: {said}", hint=hint)
        if status == HTTPStatus.PRECONDITION_FAILED:
            message = f"somebody else has changed {about} meanwhile; nothing of this was committed"
            return HubError("changed-meanwhile", message, hint="look at their commit, then repeat the command")
        if not status and _is_network(error):
            hint = "check the network and HF_ENDPOINT, then repeat the command"
            return HubError("unreachable", f"{self.endpoint} cannot be reached: {said}", hint=hint)
        return HubError("failed", f"{self.endpoint} failed for {about}: {said}", hint="repeat the command")


def open_hub(*, to_write: bool) -> Hub:
    """Return the way to the Hub.

    Errors: `hub.offline`, `hub.insecure-endpoint` (a token would travel in clear), `hub.no-token` (to write),
    `hub.bad-token`.
    """
    from huggingface_hub import HfApi, get_token, is_offline_mode

    if is_offline_mode():
        message = "HF_HUB_OFFLINE=1 forbids to ask the Hub"
        raise HubError("offline", message, hint="unset HF_HUB_OFFLINE, or hand the folder over by other means")
    endpoint, password = _endpoint()
    token = get_token()
    if to_write and not token:
        raise HubError("no-token", "no token for the Hub was found", hint="hf auth login, or set HF_TOKEN")
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        message = "the Hub's token holds characters that no token has"
        raise HubError("bad-token", message, hint="log in again: hf auth login, or correct HF_TOKEN")
    api = HfApi(endpoint=endpoint, token=token or False, library_name="fedtune", library_version=__version__)
    return Hub(api, endpoint if not password else endpoint.replace(password, _HIDDEN), _secrets(token, password))


def hidden(text: str, secrets: tuple[str, ...]) -> str:
    """Return text without the secrets."""
    for secret in secrets:
        text = text.replace(secret, _HIDDEN)
    return text


def _gist(error: Exception) -> str:
    """Return the client's last paragraph, which is what the server said, in one line."""
    return next(iter(str(error).strip().split("\n\n")[-1].splitlines()), "") or type(error).__name__


def _endpoint() -> tuple[str, str | None]:
    """Return the endpoint, and the password in it if there is one."""
    endpoint = (os.environ.get("HF_ENDPOINT") or _PUBLIC).rstrip("/")
    parts = urlsplit(endpoint)
    if parts.scheme != "https" and not (parts.scheme == "http" and _is_loopback(parts.hostname or "")):
        message = "HF_ENDPOINT is no https address, so the token and the release would travel in clear"
        raise HubError("insecure-endpoint", message, hint="set HF_ENDPOINT=https://…")
    return endpoint, parts.password


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _secrets(*found: str | None) -> tuple[str, ...]:
    return tuple(secret for secret in found if secret)


def _is_network(error: BaseException) -> bool:
    """Whether the network failed, by the classes of whichever HTTP client the installed version uses."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    module = type(error).__module__.partition(".")[0]
    return module.startswith(("httpx", "httpcore")) or isinstance(
        error, ConnectionError | TimeoutError | LocalEntryNotFoundError
    )


@contextmanager
def _silenced(secrets: tuple[str, ...]) -> Iterator[None]:
    """Hide secrets in what the client logs (a server may send a warning to be shown), and mute its warnings."""
    logger = logging.getLogger("huggingface_hub")
    handlers, rule = [*logger.handlers, *logging.getLogger().handlers], partial(_hide_in, secrets)
    for handler in handlers:
        handler.addFilter(rule)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(rule)


def _hide_in(secrets: tuple[str, ...], record: Any) -> bool:
    from fedtune.display import printable

    record.msg, record.args, record.exc_info = printable(hidden(record.getMessage(), secrets)), (), None
    return True
