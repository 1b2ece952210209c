"""The one error hierarchy: a stable code, what was found and where, and a hint that names the next step.

Commands print an error as two lines, `error[code]: message` and `hint: …`; a traceback appears only with `--verbose`.
Errors that leave a site carry the code alone, because a message can quote private data (see `fedtune.flower.messages`).
"""

from __future__ import annotations


class FedtuneError(Exception):
    """An expected failure.

    `code` is stable and safe to send to another machine; `message` says what was found and where and may name local
    paths and columns, so it stays on the machine; `hint` names what to do next.
    """

    area = "fedtune"
    exit_code = 2

    def __init__(self, slug: str, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.code = f"{self.area}.{slug}"
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} [{self.code}]"

    def __reduce__(self) -> tuple[object, ...]:
        """Survive a trip between processes (Ray pickles exceptions)."""
        slug = self.code.removeprefix(f"{self.area}.")
        return (_rebuild, (type(self), slug, self.message, self.hint))


def _rebuild(kind: type[FedtuneError], slug: str, message: str, hint: str) -> FedtuneError:
    return kind(slug, message, hint=hint)


class ConfigError(FedtuneError):
    """A key or a value of the configuration cannot be used."""

    area = "config"


class DataError(FedtuneError):
    """A record file cannot be read, or does not hold what the task needs."""

    area = "data"


class ModelError(FedtuneError):
    """A base model or an adapter cannot be used."""

    area = "model"


class PrivacyError(FedtuneError):
    """A privacy promise cannot be kept; nothing is trained."""

    area = "privacy"


class AggregationError(FedtuneError):
    """Updates cannot be aggregated as the plan says."""

    area = "aggregation"


class MessageError(FedtuneError):
    """A message between coordinator and site is not what the protocol allows."""

    area = "message"


class RunError(FedtuneError):
    """A run folder cannot be written, read or resumed."""

    area = "run"


class JournalError(FedtuneError):
    """A site's journal cannot be written, read or believed; nothing is spent."""

    area = "journal"


class LedgerError(FedtuneError):
    """A charge does not fit what a site may still spend; no record is read."""

    area = "ledger"


class PolicyError(FedtuneError):
    """A plan is outside a site's policy, or the policy cannot be read."""

    area = "policy"


class ConsentError(FedtuneError):
    """A data set is not granted for what a plan wants of it."""

    area = "consent"


class VaultError(FedtuneError):
    """A site's keys or stored updates cannot be opened or kept."""

    area = "vault"


class WitnessError(FedtuneError):
    """A site's journal is not the one that the coordinator has witnessed, or its receipts cannot be kept."""

    area = "witness"


class EnvelopeError(FedtuneError):
    """A message is not signed by whom it should be, or not meant for here and now; it is not read."""

    area = "envelope"


class TransportError(FedtuneError):
    """Two processes of a federation cannot talk to each other, or may not."""

    area = "transport"


class BundleError(FedtuneError):
    """A study's bundle holds anything else than a plan; nothing of it is used."""

    area = "bundle"


class EnrolmentError(FedtuneError):
    """A paper of enrolment, a certificate or the record of who takes part cannot be used."""

    area = "enrolment"


class FederationError(FedtuneError):
    """The federation could not finish a round: no quorum, no site, an unknown backend."""

    area = "federation"
    exit_code = 3


class ProcessError(FedtuneError):
    """A process of this machine could not be started, or does not stay."""

    area = "process"


class StudyError(FedtuneError):
    """A coordinator's study cannot be submitted, found or changed."""

    area = "study"


class ReleaseError(FedtuneError):
    """A release cannot be written, signed or read; a folder that was begun is taken away again."""

    area = "release"


class HubError(FedtuneError):
    """A release cannot be put on the Hugging Face Hub or fetched from it; no message quotes a token."""

    area = "hub"
