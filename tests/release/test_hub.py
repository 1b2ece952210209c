"""The way to the Hub: no secret leaves it, and what goes wrong is said in words."""

from __future__ import annotations

import logging
import os
import traceback
from typing import TYPE_CHECKING, Any

import pytest

from fedtune.errors import FedtuneError, HubError
from fedtune.release.hub import Hub, open_hub
from tests.support.hub import StandIn, connect, running_hub

if TYPE_CHECKING:
    from collections.abc import Iterator

REFUSED = {"Content-Type": "text/plain"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with running_hub() as running:
        connect(monkeypatch, running)
        yield running


def failure(hub: Hub) -> HubError:
    with pytest.raises(HubError) as caught, hub.talking("me/it"):
        hub.api.model_info("me/it")
    return caught.value


def test_offline_mode_is_refused_before_anything_is_asked(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"hub\.offline") as caught:
        open_hub(to_write=False)
    assert "HF_HUB_OFFLINE" in caught.value.hint
    assert not hub.asked


def test_writing_without_a_token_says_where_to_get_one(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"hub\.no-token") as caught:
        open_hub(to_write=True)
    assert "hf auth login" in caught.value.hint
    open_hub(to_write=False)


@pytest.mark.parametrize("endpoint", ["http://hub.example.org", "ftp://127.0.0.1", "http://127.0.0.1.example.org"])
def test_a_token_is_not_sent_in_clear(hub: StandIn, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(HubError, match=r"hub\.insecure-endpoint"):
        open_hub(to_write=False)


@pytest.mark.parametrize("endpoint", ["https://hub.example.org", "http://localhost:1", "http://[::1]:1", ""])
def test_other_endpoints_are_taken(hub: StandIn, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert open_hub(to_write=False).endpoint == (endpoint or "https://huggingface.co")


@pytest.mark.parametrize("token", ["hf_half\x01way", "hf_two words", "hf_é"])
def test_a_token_that_no_header_can_hold_is_refused_unquoted(
    hub: StandIn, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=r"hub\.bad-token") as caught:
        open_hub(to_write=True)
    assert token not in "".join(traceback.format_exception(caught.value))


def test_the_token_is_in_no_representation(hub: StandIn) -> None:
    opened = open_hub(to_write=True)
    assert hub.token not in repr(opened)


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ((401, {"X-Error-Code": "RepoNotFound"}, b""), "hub.no-repository"),
        ((404, {"X-Error-Code": "RevisionNotFound"}, b""), "hub.no-revision"),
        ((403, {}, b'{"error": "TOKEN may not"}'), "hub.refused"),
        ((400, {}, b'{"error": "TOKEN is odd"}'), "hub.failed"),
        ((418, {"X-Error-Message": "Bearer TOKEN"}, b""), "hub.failed"),
        ((200, {"Content-Type": "application/json"}, b'{"TOKEN'), "hub.failed"),
        ((200, {"Content-Type": "application/json", "Content-Length": "999", "Connection": "close"}, b"{"), "unreach"),
    ],
)
def test_what_the_server_answers_is_told_without_the_token(hub: StandIn, answer: Any, code: str) -> None:
    """Also where the server quotes it, in a header or in what it says."""
    status, headers, body = answer
    quoted = {name: value.replace("TOKEN", hub.token) for name, value in headers.items()}
    hub.answers = lambda *_: (status, quoted, body.replace(b"TOKEN", hub.token.encode()))
    error = failure(open_hub(to_write=True))
    assert code in error.code
    assert error.hint
    assert hub.token not in "".join(traceback.format_exception(error))


def test_a_warning_of_the_server_shows_no_token_and_no_control_character(
    hub: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    said = {"X-HF-Warning": f"new; {hub.token} \x1b[31mred"}
    hub.answers = lambda *_: (404, {"X-Error-Code": "RepoNotFound"} | said, b"")
    logger = logging.getLogger("huggingface_hub")
    logger.addHandler(caplog.handler)
    try:
        failure(open_hub(to_write=True))
    finally:
        logger.removeHandler(caplog.handler)
    assert "[hidden]" in caplog.text
    assert hub.token not in caplog.text
    assert "\x1b" not in caplog.text


def test_a_hub_that_is_not_there_is_unreachable(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    error = failure(open_hub(to_write=False))
    assert (error.code, "HF_ENDPOINT" in error.hint) == ("hub.unreachable", True)


def test_a_password_in_the_endpoint_is_hidden(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url.replace("//", "//me:opensesame@"))
    error = failure(open_hub(to_write=False))
    assert "opensesame" not in "".join(traceback.format_exception(error))


def test_errors_of_fedtune_pass_as_they_are(hub: StandIn) -> None:
    with pytest.raises(FedtuneError, match=r"hub\.mine"), open_hub(to_write=False).talking("me/it"):
        raise HubError("mine", "as it is")


def test_nothing_of_this_is_logged_at_any_level(hub: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    failure(open_hub(to_write=True))
    assert hub.token not in caplog.text
    assert hub.token not in " ".join(hub.asked)
    assert os.environ["HF_TOKEN"] == hub.token
