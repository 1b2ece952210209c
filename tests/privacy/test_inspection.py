"""Models and losses that mix records are refused, by name or by the probe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import (
    LongformerConfig,
    LongformerForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from fedtune.errors import PrivacyError
from fedtune.privacy.engines import EngineName, open_engine
from fedtune.privacy.inspection import assert_independent, refuse_coupled
from tests.support.adapted import FAMILIES, Case, make_batch, make_case, named, wake, worst_error


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(3), nn.SyncBatchNorm(3), nn.InstanceNorm1d(3, track_running_stats=True)]
)
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_that_normalises_over_records_is_refused_by_name(
    layer: nn.Module, training: bool, engine: EngineName
) -> None:
    model = nn.ModuleDict({"inner": nn.Sequential(nn.Linear(3, 3), layer)}).train(training)
    with pytest.raises(PrivacyError, match=r"inner\.1"):
        refuse_coupled(model)
    with pytest.raises(PrivacyError, match=r"inner\.1.*coupled-records"):
        open_engine(engine, model, named(model))


def test_a_frozen_batch_norm_is_refused_too(engine: EngineName) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3).requires_grad_(False))
    with pytest.raises(PrivacyError, match="BatchNorm1d"):
        open_engine(engine, model, named(model))


@pytest.mark.parametrize("layer", [nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.InstanceNorm1d(3), nn.Dropout(0.5)])
def test_layers_that_keep_records_apart_are_accepted(layer: nn.Module) -> None:
    refuse_coupled(nn.Sequential(nn.Linear(3, 3), layer))


MOE = {
    "vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "num_experts_per_tok": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: MixtralForCausalLM(MixtralConfig(**MOE, num_local_experts=2)), "Mixtral"),
        (lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**MOE, num_experts=2, moe_intermediate_size=8)), "Qwen2Moe"),
    ],
    ids=["Mixtral", "Qwen2Moe"],
)
def test_a_mixture_of_experts_is_refused_by_name(make: Callable[[], nn.Module], kind: str, engine: EngineName) -> None:
    model = make()
    with pytest.raises(PrivacyError, match=rf"model\.layers\.0\.mlp.*{kind}"):
        refuse_coupled(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(PrivacyError, match=rf"layers\.0\.mlp.*{kind}.*coupled-records"):
        open_engine(engine, adapted, named(adapted))


# --- a prefix that all records share --------------------------------------------------------------------------------


def test_a_prefix_cache_that_is_looked_up_for_each_record_is_right() -> None:
    """PEFT's prefix tuning: every record has its own copy of the keys and values, so its own gradient."""
    base = make_case("llama").model.unload()
    model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).double()
    case = Case("causal-lm", model, make_batch("causal-lm", (7, 2, 5, 1)))
    assert worst_error(model, case.gradients(case.batch), case.loop()) <= 1e-10


class OwnPrefix(nn.Module):
    """Keys that are learnt once and put before those of every record."""

    def __init__(self, *, as_a_layer: bool) -> None:
        super().__init__()
        self.key = nn.Linear(3, 3)
        if as_a_layer:
            self.prefix: Any = nn.Embedding(2, 3)
        else:
            self.prefix = nn.Parameter(torch.randn(2, 3))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        prefix = self.prefix(torch.arange(2)[None]) if isinstance(self.prefix, nn.Embedding) else self.prefix[None]
        return torch.cat([prefix.expand(len(inputs), -1, -1), self.key(inputs)], dim=1).cumsum(1)


@pytest.mark.parametrize(
    ("as_a_layer", "reason"), [(False, r"layer 0 \(OwnPrefix\)"), (True, r"layer 0\.prefix sees 1 rows for 4 records")]
)
def test_a_prefix_that_is_expanded_to_all_records_is_refused_by_name(as_a_layer: bool, reason: str) -> None:
    model, inputs = nn.Sequential(OwnPrefix(as_a_layer=as_a_layer)), torch.randn(4, 5, 3)
    with (
        pytest.raises(PrivacyError, match=reason),
        open_engine("lora", model, named(model)) as engine,
    ):
        engine.per_sample_gradients(lambda: model(inputs).square().sum((1, 2)), 4)


def test_debertas_relative_positions_are_refused_by_name_where_somebody_adapts_them(engine: EngineName) -> None:
    """One projection of the positions serves all records; fedtune adapts it only where it is named."""
    case = make_case("deberta", targets=("query_proj", "pos_key_proj"))
    with pytest.raises(PrivacyError, match=r"pos_key_proj.* sees 1 rows for 4 records"):
        case.gradients(case.batch, engine)


def test_a_model_that_puts_positions_before_records_is_refused_by_name(engine: EngineName) -> None:
    """Longformer's queries are (tokens, records, features): each token would be clipped as a record."""
    config = LongformerConfig(
        vocab_size=24, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=40, attention_window=4, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    lora = LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = get_peft_model(LongformerForSequenceClassification(config), lora)
    wake(model)
    case = Case("classification", model, make_batch("classification", (8, 8, 8)))
    with pytest.raises(PrivacyError, match=r"self\.query.* sees 8 rows for 3 records"):
        case.gradients(case.batch, engine)


# --- the probe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_ordinary_transformers_pass_both_checks(tiny: Callable[..., Any], name: str) -> None:
    case = tiny(name, dtype=torch.float32)
    refuse_coupled(case.model)
    assert_independent(case.model, case.losses, case.batch)


def test_a_batch_mean_loss_dressed_as_one_loss_a_record_is_found(tiny: Callable[..., Any]) -> None:
    case = tiny("llama")

    def dressed(batch: Any) -> torch.Tensor:
        return case.model(**batch).loss.expand(len(batch["labels"]))

    with pytest.raises(PrivacyError, match="coupled-records"):
        assert_independent(case.model, dressed, case.batch)


class LastComesFirst(nn.Module):
    """Only the first record influences the others, as where early tokens fill an expert."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = self.linear(inputs)
        return outputs + 0.1 * torch.cat([torch.zeros_like(outputs[:1]), outputs[:1].expand(len(outputs) - 1, -1)])


class CoupledAtZero(nn.Module):
    """Coupling inside an adapter that starts at zero shows in the gradient alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 3, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs + self.up(inputs - inputs.mean(0))


@pytest.mark.parametrize(
    "model", [LastComesFirst(), CoupledAtZero(), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))]
)
def test_the_probe_finds_coupling_in_either_direction_and_at_a_zero_adapter(model: nn.Module) -> None:
    torch.manual_seed(0)
    with pytest.raises(PrivacyError, match="coupled-records"):
        assert_independent(model, lambda batch: model(batch["x"]).square().sum(1), {"x": torch.randn(4, 3)})


def test_dropout_is_not_taken_for_coupling() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    batch, state = {"x": torch.randn(4, 3)}, torch.get_rng_state()
    assert_independent(model, lambda batch: model(batch["x"]).square().sum(1), batch)
    assert all(tensor.grad is None for tensor in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_the_probe_needs_two_records_and_one_loss_for_each(tiny: Callable[..., Any]) -> None:
    case = tiny("bert")
    with pytest.raises(PrivacyError, match="two records"):
        assert_independent(case.model, case.losses, case.rows(0))
    with pytest.raises(PrivacyError, match="not one value a record"):
        assert_independent(case.model, lambda batch: case.losses(batch).mean(), case.batch)
