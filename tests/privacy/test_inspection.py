"""Models and losses that mix records are refused, by name or by the probe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from fedtune.errors import PrivacyError
from fedtune.privacy.opacus_engine import OpacusEngine
from fedtune.privacy.inspection import assert_independent, refuse_coupled

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(3), nn.SyncBatchNorm(3), nn.InstanceNorm1d(3, track_running_stats=True)]
)
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_that_normalises_over_records_is_refused_by_name(layer: nn.Module, training: bool) -> None:
    model = nn.ModuleDict({"inner": nn.Sequential(nn.Linear(3, 3), layer)}).train(training)
    with pytest.raises(PrivacyError, match=r"inner\.1"):
        refuse_coupled(model)
    with pytest.raises(PrivacyError, match="coupled-records"):
        OpacusEngine(model, list(model.named_parameters()))


@pytest.mark.parametrize("layer", [nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.InstanceNorm1d(3), nn.Dropout(0.5)])
def test_layers_that_keep_records_apart_are_accepted(layer: nn.Module) -> None:
    refuse_coupled(nn.Sequential(nn.Linear(3, 3), layer))


def test_a_mixture_of_experts_is_refused_by_name() -> None:
    config = MixtralConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    with pytest.raises(PrivacyError, match=r"model\.layers\.0\.mlp.*Mixtral"):
        refuse_coupled(MixtralForCausalLM(config))


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
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
