"""The study plan: everything that defines a study, as one canonical JSON with its SHA-256.

The plan is what travels to every site and what a site approves. It holds no path, device or credential, and nothing
executable. Two studies with the same hash train the same adapter from the same records.
"""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any, Literal

from pydantic import ValidationError

from fedtune.config.canonical import canonical_json, sha256_hex
from fedtune.config.schema import (
    AggregationSettings,
    EvaluationSettings,
    FederationSettings,
    LoraSettings,
    Name,
    PartitionSettings,
    Section,
    TrainingSettings,
)
from fedtune.data.tasks import Task
from fedtune.errors import ConfigError
from fedtune.privacy.plan import PrivacyPlan

PLAN_KEY = "plan"


class DataPlan(Section):
    """Which data set, by the name sites know it under, and how its records become examples."""

    name: Name
    source: Literal["file", "bank-messages"]
    task: dict[str, Any]
    max_tokens: int
    holdout: float
    limit: int | None
    partition: PartitionSettings


class ModelPlan(Section):
    """The base model by content: `sha256` covers configuration, weights and tokenizer."""

    name: str
    sha256: str
    architecture: str
    head: Literal["architecture", "pooled", "none"]
    head_init: Literal["zero", "labels"]
    head_center: Literal["none", "labels"]
    head_scale: float
    dtype: Literal["float32", "bfloat16"]
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"]
    quantization: Literal["none", "8bit", "4bit"]


class AdapterPlan(Section):
    """The adapter's size in numbers: held, and the most trained, sent up and sent down a round; its layout's hash.

    `upload_bytes` is what the numbers that go up weigh, as the plan has them written.
    """

    numbers: int
    trained: int
    upload: int
    upload_bytes: int
    download: int
    layout_sha256: str


class StudyPlan(Section):
    """One study, complete."""

    schema_version: Literal[1] = 1
    name: Name
    purpose: Name
    seed: int
    data: DataPlan
    model: ModelPlan
    lora: LoraSettings
    adapter: AdapterPlan
    privacy: dict[str, Any]
    training: TrainingSettings
    aggregation: AggregationSettings
    federation: FederationSettings
    evaluation: EvaluationSettings

    @cached_property
    def json_text(self) -> str:
        """The plan as canonical JSON: the string that travels."""
        return canonical_json(self.model_dump(mode="json"))

    @cached_property
    def sha256(self) -> str:
        """The plan's identity."""
        return sha256_hex(self.json_text)

    @cached_property
    def task(self) -> Task:
        """The task with its columns and labels."""
        return Task.from_dict(self.data.task)

    @cached_property
    def promise(self) -> PrivacyPlan:
        """The privacy plan with its noise multiplier."""
        return PrivacyPlan.from_dict(self.privacy)

    @property
    def total_steps(self) -> int:
        """Local steps of a site that takes part in every round."""
        return self.federation.rounds * self.training.local_steps

    @property
    def has_fixed_shapes(self) -> bool:
        """Whether a record's physical batch has a shape that depends on its own unit alone (`training.batch_shapes`).

        `auto`: where the noise is for release, and where rounding is coarse enough to move the clipped sum visibly.
        """
        if self.promise.mode == "off" or self.training.batch_shapes == "tight":
            return False
        coarse = (
            self.model.dtype != "float32" or self.model.quantization != "none" or self.training.autocast is not None
        )
        return self.training.batch_shapes == "fixed" or self.promise.noise == "secure" or coarse

    @classmethod
    def from_json(cls, text: str) -> StudyPlan:
        """Read a plan that travelled; anything but the canonical form of a valid plan is refused."""
        try:
            plan = cls.model_validate(json.loads(text))
        except (ValueError, ValidationError) as error:
            raise ConfigError(
                "bad-plan", "the study plan cannot be read", hint="resolve it again: fedtune plan"
            ) from error
        if plan.json_text != text:
            raise ConfigError("bad-plan", "the study plan is not in canonical form", hint="fedtune plan --format json")
        return plan
