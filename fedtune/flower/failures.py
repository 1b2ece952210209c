"""What Flower says in place of a reply: which of its errors mean that a site was lost, and the code that one carries.

Executors of ours answer with a code as the error's reason; Flower's own reasons are sentences and are not used.
"""

from __future__ import annotations

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from fedtune.flower.messages import CODE

LOST = frozenset(
    {
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.NODE_UNAVAILABLE,
        ErrorCode.CLIENT_APP_CRASHED,
    }
)  # the process that had to answer, or the way to it, is gone: it may answer when it is asked again


def code_of(error: Error) -> str:
    """Return the code that a site's process has given, or Flower's number; neither is signed by anybody."""
    reason = str(error.reason or "")
    return reason if CODE.fullmatch(reason) else f"flower.error-{error.code}"


def refused(message: Message, code: str) -> Message:
    """Return Flower's error with a code instead of a reply; it is signed by nobody, and never taken for an answer."""
    return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, code), reply_to=message)
