"""What a site's policy may say: every key with its type, its bounds and its default.

A key left out allows nothing, or the least; what only the site can decide has no default. A list's order means nothing,
so a list is kept sorted: policies that allow the same are equal and have one hash. What allows everything is a word
that must be written (`any`, `none`, `always`), never an absence. Knows no file, no plan and no clock.
"""

from __future__ import annotations

import importlib.resources
import json
from functools import cached_property
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo

import rfc8785
from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, ValidationError, model_validator

from fedtune.config.canonical import sha256_hex
from fedtune.config.schema import Name, Section
from fedtune.errors import PolicyError

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
MOST_TEXT = 1_000_000
HASH = r"^[0-9a-f]{64}$"
MOMENT = r"^(([01][0-9]|2[0-3]):[0-5][0-9]|24:00)$"
MARKS = frozenset({"<word>", "<form>", "<file>", "<opt-out>", "[key]"})  # what pydantic's places hold besides keys
PATTERNS = {  # in words
    HASH: "64 digits or letters a to f",
    MOMENT: "a time HH:MM, at most 24:00",
    r"^[A-Za-z0-9][A-Za-z0-9._-]*$": "a name of letters, digits, dots, underscores and hyphens",
}


def _one_or_many(value: Any) -> Any:
    """Accept `purposes: research` for `purposes: [research]`."""
    return [value] if isinstance(value, str) else value


def _sorted(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(sorted(set(values)))


def _in_week_order(days: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(set(days), key=DAYS.index))


def _is_zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (OSError, ValueError, KeyError):
        raise ValueError("this machine knows no such time zone; Europe/Berlin and UTC are such names") from None
    return name


def _form(value: Any) -> str:
    """Tell a union's forms apart, in text that was read and in a policy that is written."""
    if isinstance(value, str):
        return "<word>"
    if _has(value, "opt_out"):
        return "<opt-out>"
    return "<file>" if _has(value, "file") else "<form>"


def _has(value: Any, key: str) -> bool:
    return key in value if isinstance(value, dict) else hasattr(value, key)


def _form_of_texts(value: Any) -> str:
    return "<word>" if value == "any" else "<form>"


FORM = Discriminator(_form)
Text = Annotated[str, Field(min_length=1, max_length=1000)]
Hash = Annotated[str, Field(pattern=HASH)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Epsilon = Annotated[float, Field(ge=0)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(_one_or_many), AfterValidator(_sorted)]
Names = Annotated[tuple[Name, ...], BeforeValidator(_one_or_many), AfterValidator(_sorted)]
Moment = Annotated[str, Field(pattern=MOMENT)]
AnyWord = Annotated[Literal["any"], Tag("<word>")]
TextsOrAny = Annotated[AnyWord | Annotated[Texts, Tag("<form>")], Discriminator(_form_of_texts)]


class AllowedModel(Section):
    """A base model by the content of its configuration, weights and tokenizer; `name` is for people alone."""

    sha256: Hash
    name: str = Field("", max_length=200)


def _by_hash(models: tuple[AllowedModel, ...]) -> tuple[AllowedModel, ...]:
    return tuple(sorted(set(models), key=lambda model: (model.sha256, model.name)))


class ColumnConsent(Section):
    """A record takes part when `column` holds one of `values`."""

    column: Text
    values: Annotated[Texts, Field(min_length=1)]


class FileConsent(Section):
    """`file` lists, one a line, values of `column`; a relative path starts at the site's folder."""

    column: Text
    file: Text


class OptIn(Section):
    """Only records that opted in take part."""

    opt_in: Annotated[Annotated[ColumnConsent, Tag("<form>")] | Annotated[FileConsent, Tag("<file>")], FORM]


class OptOut(Section):
    """All records but those that opted out take part."""

    opt_out: FileConsent


Consent = Annotated[
    Annotated[Literal["none"], Tag("<word>")] | Annotated[OptIn, Tag("<form>")] | Annotated[OptOut, Tag("<opt-out>")],
    FORM,
]


class DataPolicy(Section):
    """What one data set may be used for, at most how much, and which of its records.

    `units` are the privacy units that a plan may protect: `record`, or a column. `columns` are all that a plan may
    name, that of its unit included. `lifetime_epsilon` is for all studies together, at the policy's δ.
    """

    purposes: Names
    units: Texts
    columns: TextsOrAny
    lifetime_epsilon: Epsilon
    consent: Consent
    min_units: Count = 100


class ClipRange(Section):
    """The smallest and the largest clip norm."""

    min: float = Field(gt=0)
    max: float = Field(gt=0)

    @model_validator(mode="after")
    def _in_order(self) -> ClipRange:
        if self.min > self.max:
            raise ValueError("min is above max")
        return self


class PrivacyPolicy(Section):
    """The least privacy of a study: ε at most, δ at most (the lifetime ε holds at it too), noise at least.

    `allow_off` lets a study run without any privacy; no other key of this section then holds for it.
    """

    study_epsilon: Epsilon
    delta: float = Field(gt=0, lt=1)
    min_noise_multiplier: float = Field(1.0, ge=0)
    require_secure_noise: bool = True
    clip_norm: Annotated[AnyWord | Annotated[ClipRange, Tag("<form>")], FORM] = "any"
    allow_off: bool = False


class TrainingPolicy(Section):
    """The most work a study may ask for: `total_steps` is rounds times local steps, tokens are those of one example."""

    max_rounds: Count = 50
    max_local_steps: Count = 10
    max_total_steps: Count = 500
    max_tokens: Count = 512


class AdapterPolicy(Section):
    """The largest adapter and where it may sit: module names, patterns (`*_proj`), `auto`, `all-linear`, or `any`."""

    max_rank: Count = 16
    targets: TextsOrAny = ("auto",)
    max_upload_bytes: Count = 10_000_000


class FederationPolicy(Section):
    """In whose company: the fewest sites of a study, and the fewest updates that a round may combine."""

    require_secure_aggregation: bool
    min_sites: Count = 3
    min_sites_per_round: Count = 3


class EvaluationPolicy(Section):
    """The most that held-out metrics may tell: `off` < `noisy` < `coarse` < `clear`."""

    site_metrics: Literal["off", "noisy", "coarse", "clear"] = "off"


class Span(Section):
    """Open on `days` from `opens` until `closes`; where `closes` is the earlier, it is that of the next day."""

    days: Annotated[
        tuple[Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"], ...],
        BeforeValidator(_one_or_many),
        AfterValidator(_in_week_order),
        Field(min_length=1),
    ]
    opens: Moment
    closes: Moment

    @model_validator(mode="after")
    def _is_a_span(self) -> Span:
        if self.opens in {self.closes, "24:00"}:
            raise ValueError("a whole day is opens: 00:00 and closes: 24:00")
        return self


class OpeningHours(Section):
    """The spans, by the clocks of an IANA time zone, in which a round may start."""

    timezone: Annotated[str, Field(max_length=100), AfterValidator(_is_zone)]
    spans: tuple[Span, ...]


class Policy(Section):
    """A whole policy; its hash is what a site signs when it adopts it, defaults included."""

    version: int = Field(1, ge=1, le=1)
    name: str = Field("policy", min_length=1, max_length=200)
    models: Annotated[
        AnyWord | Annotated[tuple[AllowedModel, ...], AfterValidator(_by_hash), Tag("<form>")],
        FORM,
    ] = ()
    data: dict[Name, DataPolicy] = Field(default_factory=dict)
    tasks: Annotated[
        tuple[Literal["classification", "causal-lm"], ...], BeforeValidator(_one_or_many), AfterValidator(_sorted)
    ] = ()
    privacy: PrivacyPolicy
    training: TrainingPolicy = TrainingPolicy()
    adapter: AdapterPolicy = AdapterPolicy()
    federation: FederationPolicy
    evaluation: EvaluationPolicy = EvaluationPolicy()
    require_approval: bool = True
    opening_hours: Annotated[
        Annotated[Literal["always"], Tag("<word>")] | Annotated[OpeningHours, Tag("<form>")], FORM
    ] = "always"

    @cached_property
    def canonical(self) -> str:
        """The policy as canonical JSON (RFC 8785), every default written out."""
        return rfc8785.dumps(self.model_dump(mode="json")).decode("utf-8")

    @cached_property
    def sha256(self) -> str:
        """The policy's identity: the hash of its canonical form."""
        return sha256_hex(self.canonical)

    @classmethod
    def from_canonical(cls, text: str) -> Policy:
        """Read `canonical` back; anything else is `policy.not-canonical`."""
        try:
            policy = cls.model_validate(json.loads(text[: MOST_TEXT + 1]))
            if policy.canonical == text:
                return policy
        except (ValueError, RecursionError, ValidationError, rfc8785.CanonicalizationError) as error:
            raise _not_canonical() from error
        raise _not_canonical()

    @staticmethod
    def strict_example() -> str:
        """Return the text of a strict policy with a comment for each key, for an operator to edit."""
        return importlib.resources.files(__package__).joinpath("template.yaml").read_text("utf-8")


def _not_canonical() -> PolicyError:
    hint = "adopt it again: fedtune client policy adopt"
    return PolicyError("not-canonical", "this is not the canonical form of a policy", hint=hint)
