"""What is refused about a study from its settings alone, before a model is loaded or a number is calibrated."""

from __future__ import annotations

from fedtune.aggregation import compatibility
from fedtune.config.schema import Settings, TrainingSettings
from fedtune.data.tasks import Task
from fedtune.errors import AggregationError, ConfigError, DataError, PrivacyError
from fedtune.flower.engine import check_backend
from fedtune.privacy.accounting import steps_an_epoch


def refuse_early(settings: Settings) -> None:
    """Refuse what no data and no model could make right."""
    check_backend(settings.run.backend)
    compatibility.check(settings)
    _refuse_part_epochs(settings.training)
    _refuse_idle_noise(settings)
    _refuse_unmeasured_parts(settings)
    privacy, federation = settings.privacy, settings.federation
    if privacy.mode == "dp" and privacy.noise_multiplier is None and not privacy.epsilon > 0:
        raise PrivacyError(
            "epsilon",
            f"privacy.epsilon={privacy.epsilon:g} promises nothing that can be kept; it must be above 0",
            hint="privacy.epsilon=8, or privacy=off for a study without privacy",
        )
    if privacy.mode == "dp" and privacy.engine == "opacus" and settings.training.gradient_checkpointing:
        raise PrivacyError(
            "engine-checkpointing",
            "privacy.engine=opacus cannot be used with training.gradient_checkpointing: its hooks lose the per-record "
            "gradients of a layer that is computed again",
            hint="privacy.engine=lora, or training.gradient_checkpointing=false",
        )
    if federation.sites_per_round is not None and federation.sites_per_round > federation.sites:
        raise ConfigError(
            "sites-per-round",
            f"federation.sites_per_round={federation.sites_per_round} is above federation.sites={federation.sites}",
            hint="federation.sites_per_round=null asks every site",
        )
    if federation.early_close is not None and federation.early_close < federation.quorum:
        raise ConfigError(
            "early-close",
            f"federation.early_close={federation.early_close:g} would end rounds before federation.quorum="
            f"{federation.quorum:g} of the sites have answered",
            hint=f"federation.early_close={federation.quorum:g} or more, or null to wait for all",
        )


def refuse_told_unit(settings: Settings, task: Task) -> None:
    """Refuse units whose names would be told: labels stand in the plan, and sites are named after a column's values."""
    unit, partition = settings.privacy.unit, settings.data.partition
    told = {"label": task.columns.get("label"), "site": partition.column if partition.scheme == "column" else None}
    for kind, column in told.items():
        if unit == column:
            raise DataError(
                "unit-column",
                f"privacy.unit={unit} is the column that names each record's {kind}, and those names leave the site",
                hint="name the column of the patient or the account that owns the record, or use privacy.unit=record",
            )


def _refuse_idle_noise(settings: Settings) -> None:
    """Refuse noisy metrics that no ε would cover, or that would spend a part of it on no record."""
    if settings.evaluation.site_metrics != "noisy":
        return
    if settings.privacy.mode == "off":
        raise PrivacyError(
            "noisy-metrics",
            "evaluation.site_metrics=noisy charges metrics to an ε, and privacy.mode=off promises none",
            hint="evaluation.site_metrics=clear, coarse or off",
        )
    if settings.data.holdout == 0:
        raise ConfigError(
            "nothing-held-out",
            "evaluation.site_metrics=noisy would spend privacy on measuring nothing: data.holdout=0",
            hint="data.holdout=0.2, or evaluation.site_metrics=off",
        )


def _refuse_unmeasured_parts(settings: Settings) -> None:
    """Refuse adapters that are whole at their sites only, in a study whose coordinator never sends a site its part."""
    aggregation = settings.aggregation
    if settings.evaluation.site_metrics == "off" and (aggregation.local_head or aggregation.algorithm == "fedsa"):
        raise AggregationError(
            "unmeasured-parts",
            "a part of each adapter stays at its site, and evaluation.site_metrics=off never brings it the other part",
            hint="evaluation.site_metrics=clear, coarse or noisy",
        )


def _refuse_part_epochs(training: TrainingSettings) -> None:
    """Refuse shuffling in rounds that are not whole epochs: no accountant here covers a part of one."""
    if training.sampler != "shuffle":
        return
    epoch = steps_an_epoch(training.sampling_rate)
    if training.local_steps % epoch:
        raise PrivacyError(
            "epoch",
            f"training.sampler=shuffle deals the units out to {epoch} steps, and training.local_steps="
            f"{training.local_steps} is not a whole number of such epochs",
            hint=f"training.local_steps={epoch * max(1, round(training.local_steps / epoch))}, or "
            "training.sampler=poisson",
        )
