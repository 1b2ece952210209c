"""The one form of a released adapter: whole alpha, explicit targets, and nothing that a consumer could misread."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig

from fedtune.config.schema import LoraSettings
from fedtune.errors import ReleaseError
from fedtune.release.canonical import configuration, explicit_targets, form_of, require_canonical, scale_back


@given(
    alpha=st.one_of(st.integers(1, 256).map(float), st.floats(0.01, 256)),
    rank=st.integers(1, 64),
    released=st.integers(1, 512),
)
def test_the_scale_of_the_study_is_kept_at_every_rank(alpha: float, rank: int, released: int) -> None:
    """What PEFT computes, (lora_alpha / r)·B_saved·A, is what was trained, s·B·A."""
    lora = LoraSettings(rank=rank, alpha=alpha)
    form = form_of(lora, released)
    assert type(form.alpha) is int
    assert form.alpha >= 1
    assert form.rank == released
    assert form.alpha / form.rank * form.fold == pytest.approx(alpha / rank, rel=1e-9)
    assert scale_back({"r": form.rank, "lora_alpha": form.alpha}, lora) * form.fold == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize(
    ("alpha", "rank", "released", "expected"),
    [
        (16, 8, 8, (8, 16, 1.0)),
        (16, 8, 24, (24, 48, 1.0)),
        (1, 2, 3, (3, 3, 0.5)),
        (0.5, 1, 4, (4, 2, 1.0)),
        (4.5, 2, 2, (2, 2, 2.25)),
        (16, 3, 3, (3, 16, 1.0)),
    ],
)
def test_alpha_is_scaled_where_it_stays_whole_and_else_folded(
    alpha: float, rank: int, released: int, expected: tuple[int, int, float]
) -> None:
    form = form_of(LoraSettings(rank=rank, alpha=alpha), released)
    assert (form.rank, form.alpha, form.fold) == expected


def test_short_names_stand_only_where_they_mean_the_adapted_layers_alone() -> None:
    modules = ["layer.0.query", "layer.1.query", "layer.0.dense", "pooler.dense", "head"]
    assert explicit_targets(["layer.0.query", "layer.1.query"], modules) == ["query"]
    assert explicit_targets(["layer.1.query"], modules) == ["layer.1.query"]
    assert explicit_targets(["layer.0.dense", "head"], modules) == ["head", "layer.0.dense"]


FOREIGN: list[tuple[str, Any, str]] = [
    ("use_dora", True, "merged"),
    ("use_rslora", True, "use_rslora false"),
    ("rank_pattern", {"q": 4}, "pad"),
    ("alpha_pattern", {"q": 4}, "fold"),
    ("modules_to_save", ["lm_head"], "without whole modules"),
    ("bias", "lora_only", "bias none"),
    ("lora_alpha", 4.0, "fold"),
    ("lora_alpha", 4.5, "fold"),
    ("lora_alpha", True, "fold"),
    ("target_modules", "all-linear", "list"),
    ("init_lora_weights", "pissa", "plain LoRA"),
    ("layers_to_transform", [0], "plain LoRA"),
    ("exclude_modules", ["pooler"], "plain LoRA"),
    ("trainable_token_indices", [1, 2], "plain LoRA"),
    ("layer_replication", [[0, 1]], "plain LoRA"),
    ("peft_type", "ADALORA", "plain LoRA"),
    ("what_peft_may_add_one_day", 1, "plain LoRA"),
]


@pytest.mark.parametrize(("field", "value", "hint"), FOREIGN)
def test_what_is_not_plain_lora_is_refused_by_name_with_what_to_do(field: str, value: Any, hint: str) -> None:
    config = {**plain(), field: value}
    with pytest.raises(ReleaseError, match=field) as caught:
        require_canonical(config)
    assert caught.value.code == "release.not-canonical"
    assert hint in caught.value.hint


def test_a_classifiers_own_head_is_part_of_its_adapter_and_of_no_other() -> None:
    require_canonical({**plain(), "task_type": "SEQ_CLS", "modules_to_save": ["classifier"]})
    with pytest.raises(ReleaseError, match="modules_to_save"):
        require_canonical({**plain(), "task_type": "CAUSAL_LM", "modules_to_save": ["classifier"]})


def test_what_peft_reads_back_is_what_was_meant() -> None:
    config = LoraConfig(**{k: v for k, v in plain().items() if k not in {"peft_type", "auto_mapping"}})
    assert (config.r, config.lora_alpha, config.target_modules, config.inference_mode) == (2, 4, {"v", "q"}, True)


def plain() -> dict[str, Any]:
    form = form_of(LoraSettings(rank=2, alpha=4), 2)
    return configuration("base", "none", form, ["v", "q"], lora_dropout=0.1, fan_in_fan_out=True)
