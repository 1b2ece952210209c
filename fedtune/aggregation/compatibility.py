"""Which words of a plan cannot work together, decided when it is made and never in the middle of a study.

Every refusal gives the reason and the nearest combination that works. What an algorithm can do is in
`fedtune.aggregation.matrix`; here are the sentences. Knows only words: what depends on the data or on the number of
sites that come is checked where those are known (`site_weights`, `check_shares`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from fedtune.aggregation.matrix import Row, matrix, row_of
from fedtune.aggregation.robust.traits import check_sites
from fedtune.errors import AggregationError

if TYPE_CHECKING:
    from fedtune.config.schema import AggregationSettings, FederationSettings, LoraSettings, TrainingSettings

_FULL = "float32"


class Base(Protocol):
    """What a plan says of the frozen base."""

    @property
    def dtype(self) -> str:
        """The type of its weights."""

    @property
    def quantization(self) -> str:
        """How its linear layers are held."""


class Words(Protocol):
    """A plan, or the settings that one is made of."""

    @property
    def aggregation(self) -> AggregationSettings:
        """How updates become an adapter."""

    @property
    def training(self) -> TrainingSettings:
        """What a site does in a round."""

    @property
    def lora(self) -> LoraSettings:
        """The adapter."""

    @property
    def federation(self) -> FederationSettings:
        """Who takes part."""

    @property
    def model(self) -> Base:
        """The base."""


def check(words: Words) -> None:
    """Raise AggregationError, with the nearest choice that works, for words that cannot be combined."""
    row = row_of(words.aggregation.algorithm)
    _check_optimizer(words, row)
    _check_kept(words, row)
    _check_base(words, row)
    _check_ranks(words, row)
    _check_personal(words, row)
    _check_robust(words, row)
    _check_unused(words)


def _check_optimizer(words: Words, row: Row) -> None:
    settings = words.aggregation
    allowed = row.traits.optimizers
    plain = settings.server_optimizer == "fedavg" and settings.server_learning_rate == 1
    if settings.server_optimizer in allowed and (plain or len(allowed) > 1):
        return
    if len(allowed) > 1:  # fedsvd
        raise AggregationError(
            "adaptive-with-fedsvd",
            f"{settings.server_optimizer} keeps a second moment for each entry of B, and {row.name} turns B's basis "
            "every round, so the entries change their meaning",
            hint=f"use aggregation.server_optimizer=fedavgm with {row.name}, or aggregation.algorithm=ffa with "
            f"{settings.server_optimizer}",
        )
    raise AggregationError(
        "optimizer-with-stack",
        f"{row.name} builds new factors every round, and {settings.server_optimizer} at learning rate "
        f"{settings.server_learning_rate:g} moves the old ones",
        hint="use aggregation.server_optimizer=fedavg with aggregation.server_learning_rate=1, or "
        "aggregation.algorithm=ffa",
    )


def _check_kept(words: Words, row: Row) -> None:
    """Refuse what a site keeps in coordinates that are others in its next round."""
    training, settings = words.training, words.aggregation
    remembers = training.optimizer == "adamw" or training.momentum > 0
    if training.optimizer_state == "keep" and remembers and not row.keeps_moments:
        raise _moved("kept-state", "training.optimizer_state=keep", "moments", row, "training.optimizer_state=reset")
    if settings.error_feedback and not row.keeps_residuals:
        raise _moved(
            "kept-residual", "aggregation.error_feedback", "what was left out", row, "aggregation.error_feedback=false"
        )
    if training.variates == "none":
        return
    if not row.keeps_variates:
        raise _moved("kept-variates", "training.variates=scaffold", "control variates", row, "training.variates=none")
    others = {
        "aggregation.local_head": settings.local_head,
        f"aggregation.robust={settings.robust}": settings.robust != "none",
        "lora.ranks": words.lora.ranks is not None,
    }
    for word in (word for word, is_set in others.items() if is_set):
        raise AggregationError(
            "variates-beside",
            f"training.variates=scaffold averages a variate of every trained tensor over all sites, and {word} leaves "
            "some out",
            hint=f"leave {word.partition('=')[0]} at its default, or use training.proximal instead of variates",
        )


def _moved(code: str, word: str, what: str, row: Row, instead: str) -> AggregationError:
    how = {
        "turned": "rewrites the factors after every round",
        "alternating": "trains another factor in the next round",
        "same": "sends other tensors than it trains",
    }[row.traits.trained_as]
    able = ", ".join(known.name for known in matrix() if getattr(known, _KEEPS[code]))
    return AggregationError(
        f"{code}-with-{row.name}",
        f"{word} keeps {what} as vectors in what is trained, and {row.name} {how}: they would point elsewhere",
        hint=f"use {instead} with {row.name}, or aggregation.algorithm of {able}",
    )


_KEEPS = {"kept-state": "keeps_moments", "kept-residual": "keeps_residuals", "kept-variates": "keeps_variates"}


def _check_base(words: Words, row: Row) -> None:
    if row.rounded_base:
        return
    model = words.model
    if model.dtype != _FULL or model.quantization != "none":
        raise AggregationError(
            "rounded-base",
            f"{row.name} adds to the base's weights every round, and a base of {model.dtype} with quantization "
            f"{model.quantization} would round the increments off",
            hint="use model.dtype=float32 with model.quantization=none, or aggregation.algorithm=flexlora",
        )
    if words.aggregation.average_last > 1:
        raise AggregationError(
            "average-with-increments",
            f"{row.name} moves what was learnt into the base, so the last {words.aggregation.average_last} adapters "
            "have no mean",
            hint=f"use aggregation.average_last=1 with {row.name}, or aggregation.algorithm=flexlora",
        )


def _check_ranks(words: Words, row: Row) -> None:
    lora = words.lora
    if lora.ranks is None:
        return
    if not row.ranks:
        able = ", ".join(known.name for known in matrix() if known.ranks)
        raise AggregationError(
            "one-rank",
            f"{row.name} averages factors, and factors of different ranks have no mean",
            hint=f"use lora.ranks=null, or aggregation.algorithm of {able}",
        )
    if lora.min_rank > lora.rank:
        raise AggregationError(
            "bad-ranks", f"lora.min_rank={lora.min_rank} is above lora.rank={lora.rank}", hint="lower lora.min_rank"
        )
    if isinstance(lora.ranks, tuple) and (len(lora.ranks) != words.federation.sites or max(lora.ranks) > lora.rank):
        raise AggregationError(
            "bad-ranks",
            f"lora.ranks has {len(lora.ranks)} ranks up to {max(lora.ranks, default=0)}, for {words.federation.sites} "
            f"sites and lora.rank={lora.rank}",
            hint="give one rank a site, in site order, none above lora.rank; or lora.ranks=hardware",
        )


def _check_personal(words: Words, row: Row) -> None:
    settings = words.aggregation
    if (settings.local_head or not row.traits.releases) and settings.average_last > 1:
        raise AggregationError(
            "average-of-parts",
            "a part of the adapter stays at each site, and a mean of the other part was trained beside none of them",
            hint="aggregation.average_last=1",
        )


def _check_robust(words: Words, row: Row) -> None:
    settings = words.aggregation
    if settings.robust == "none":
        if settings.attackers:
            raise AggregationError(
                "no-defence",
                f"aggregation.attackers={settings.attackers}, and the plain mean withstands none",
                hint=f"aggregation.robust of {', '.join(row.robust) or 'none with ' + row.name}",
            )
        return
    if settings.robust not in row.robust:
        raise _no_such_defence(settings.robust, row)
    federation = words.federation
    asked = federation.sites_per_round or federation.sites
    check_sites(settings.robust, max(1, math.ceil(federation.quorum * asked)), settings.attackers)


def _no_such_defence(rule: str, row: Row) -> AggregationError:
    if row.robust:
        reason = f"looks at single entries of the update, and {row.name} sends two factors whose product nobody forms"
        hint = f"aggregation.robust of {', '.join(row.robust)}, or aggregation.algorithm=fedsvd"
    else:
        reason = (
            f"has nothing to act on: entries of A and B mean nothing by themselves, and {row.name} sends no product"
        )
        hint = "aggregation.algorithm=fedsvd, ffa or fedsb, or flexlora for different ranks"
    return AggregationError("no-robust-form", f"{rule} {reason}", hint=hint)


def _check_unused(words: Words) -> None:
    """Refuse words that would be passed over in silence."""
    settings = words.aggregation
    compresses = settings.upload != "fp32" or settings.upload_keep < 1
    unused = {
        "aggregation.train_both": (settings.train_both and settings.algorithm != "fedask", "algorithm=fedask"),
        "aggregation.robust_threshold": (
            settings.robust_threshold is not None and settings.robust != "norm_clip",
            "robust=norm_clip",
        ),
        "aggregation.robust_chosen": (
            settings.robust_chosen is not None and settings.robust != "multi_krum",
            "robust=multi_krum",
        ),
        "aggregation.error_feedback": (settings.error_feedback and not compresses, "upload=int4 or upload_keep=0.1"),
    }
    for word, (is_unused, needed) in unused.items():
        if is_unused:
            raise AggregationError(
                "unused", f"{word} is set and nothing uses it", hint=f"it goes with aggregation.{needed}"
            )
