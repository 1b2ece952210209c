"""Trained layers that are not LoRA: linear layers and any single layer by functorch, right or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm
from transformers.pytorch_utils import Conv1D

from fedtune.errors import PrivacyError
from fedtune.privacy.engines import open_engine
from tests.support.adapted import autograd_row, named, rows_of, worst_error

RECORDS, TOKENS, WIDTH = 4, 5, 6


def records(dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(RECORDS, TOKENS, WIDTH, dtype=dtype)


def token_ids() -> Tensor:
    return torch.tensor([[1, 2, 3, 0, 0], [2, 2, 2, 2, 2], [8, 7, 6, 5, 4], [1, 0, 0, 0, 0]])


def squares(model: nn.Module, inputs: Tensor) -> Callable[[], Tensor]:
    return lambda: model(inputs).flatten(1).square().sum(1)


def error(model: nn.Module, inputs: Tensor) -> float:
    """The error of the engine's rows against autograd on each record alone."""
    found = rows_of("lora", model, squares(model, inputs), len(inputs))
    alone = [autograd_row(model, squares(model, inputs[[at]])().sum()) for at in range(len(inputs))]
    return worst_error(model, found, torch.stack(alone))


def rules(model: nn.Module) -> dict[str, str]:
    with open_engine("lora", model, named(model)) as engine:
        return dict(engine.rules)  # type: ignore[attr-defined] - the LoRA engine's


class Scale(nn.Module):
    """A layer of nobody's library with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(WIDTH))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.scale


def frozen(layer: nn.Module, *names: str) -> nn.Module:
    for name in names:
        layer.get_parameter(name).requires_grad_(False)
    return layer


class Used(nn.Module):
    """A model of one layer that is called in a way of the test's own."""

    def __init__(self, layer: nn.Module, call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, inputs: Tensor) -> Tensor:
        return self.call(self.layer, inputs)


# --- layers that have a rule ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "rule"),
    [
        (nn.Linear(WIDTH, 3), "linear"),
        (nn.Linear(WIDTH, 30, bias=False), "linear"),
        (frozen(nn.Linear(WIDTH, 3), "weight"), "linear"),
        (frozen(nn.Linear(WIDTH, 3), "bias"), "linear"),
        (nn.LayerNorm(WIDTH), "functorch"),
        (frozen(nn.LayerNorm(WIDTH), "bias"), "functorch"),
        (nn.RMSNorm(WIDTH), "functorch"),
        (nn.GroupNorm(1, TOKENS), "functorch"),
        (Conv1D(7, WIDTH), "functorch"),
        (nn.Conv1d(TOKENS, 3, 2), "functorch"),
        (nn.PReLU(), "functorch"),
        (Scale(), "functorch"),
    ],
    ids=lambda item: item if isinstance(item, str) else type(item).__name__,
)
def test_gradients_equal_the_loop_and_the_rule_is_named(layer: nn.Module, rule: str) -> None:
    torch.manual_seed(0)
    for tensor in layer.parameters():
        nn.init.normal_(tensor)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), layer).double()
    assert error(model, records()) <= 1e-10
    assert rules(model) == {"0": "linear", "1": rule}


@pytest.mark.parametrize("padding", [None, 0])
def test_a_trained_embedding_equals_the_loop(padding: int | None) -> None:
    model = nn.Sequential(nn.Embedding(9, WIDTH, padding_idx=padding), nn.Linear(WIDTH, 2)).double()
    assert error(model, token_ids()) <= 1e-10
    assert rules(model) == {"0": "functorch", "1": "linear"}


def test_an_embedding_and_an_output_of_one_weight_sum_both_uses() -> None:
    model = nn.Sequential(nn.Embedding(9, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 9)).double()
    model[2].weight = model[0].weight
    assert error(model, token_ids()) <= 1e-10


@pytest.mark.parametrize("layer", [nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)], ids=["linear", "functorch"])
def test_a_layer_used_twice_sums_both_uses(layer: nn.Module) -> None:
    assert error(Used(layer, lambda used, inputs: used(used(inputs).sin())).double(), records()) <= 1e-10


@pytest.mark.parametrize("layer", [nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)], ids=["linear", "functorch"])
def test_a_layer_applied_to_one_vector_a_record_equals_the_loop(layer: nn.Module) -> None:
    assert error(nn.Sequential(layer).double(), records()[:, 0]) <= 1e-10


@pytest.mark.parametrize("layer", [nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)], ids=["linear", "functorch"])
def test_an_output_may_be_changed_in_place(layer: nn.Module) -> None:
    """As Longformer scales its queries."""

    def call(used: nn.Module, inputs: Tensor) -> Tensor:
        outputs: Tensor = used(inputs)
        outputs /= 3.0
        return outputs

    assert error(Used(layer, call).double(), records()) <= 1e-10


def test_the_input_of_a_linear_layer_may_be_named() -> None:
    model = Used(nn.Linear(WIDTH, 3), lambda used, inputs: used(input=inputs)).double()
    assert error(model, records()) <= 1e-10


def test_a_layer_with_dropout_of_its_own_follows_the_mode_it_is_in() -> None:
    class Dropping(Scale):
        def forward(self, inputs: Tensor) -> Tensor:
            return F.dropout(inputs * self.scale, 0.5, self.training)

    model = nn.Sequential(Dropping()).double().train()
    with open_engine("lora", model, named(model)) as engine:
        model.eval()
        assert engine.per_sample_gradients(squares(model, records()), RECORDS).any()
        model.train()
        with pytest.raises(PrivacyError, match=r"layer 0 \(Dropping\).*random"):
            engine.per_sample_gradients(squares(model, records()), RECORDS)


@pytest.mark.parametrize("layer", [nn.Linear(WIDTH, 3), nn.LayerNorm(WIDTH), Conv1D(7, WIDTH)])
def test_under_autocast_gradients_are_float32_and_near_the_loops(layer: nn.Module) -> None:
    model, inputs = nn.Sequential(layer).float(), records(torch.float32)

    def losses() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            outputs: Tensor = model(inputs)
        return outputs.float().flatten(1).square().sum(1)

    found = rows_of("lora", model, losses, RECORDS)
    alone = torch.stack([autograd_row(model, squares(model, inputs[[at]])().sum()) for at in range(RECORDS)])
    assert found.dtype == torch.float32
    assert worst_error(model, found, alone) <= 0.02


def test_outside_a_pass_every_layer_is_itself() -> None:
    class Counting(Scale):
        def forward(self, inputs: Tensor, times: float = 1.0) -> Tensor:
            return super().forward(inputs) * times

    layer, inputs = Counting(), records(torch.float32)
    with open_engine("lora", layer, named(layer)):
        assert torch.equal(layer(inputs, times=2.0), inputs * layer.scale * 2.0)
        layer(inputs).sum().backward()
    assert layer.scale.grad is not None


# --- layers that are refused by name --------------------------------------------------------------------------------


class Holder(nn.Module):
    def __init__(self, parameters: nn.Module) -> None:
        super().__init__()
        self.held = parameters


class ParentWithParameter(Scale):
    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(WIDTH, WIDTH)


class Counter(Scale):
    """Keeps a running statistic, which vmap would lose and which no noise would cover."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda _layer, _inputs, output: 2 * output)
    return layer


@pytest.mark.parametrize(
    ("model", "layer"),
    [
        (Holder(nn.ParameterDict({"a": torch.ones(2)})), r"held \(ParameterDict\)"),
        (Holder(nn.ParameterList([torch.ones(2)])), r"held \(ParameterList\)"),
        (Holder(ParentWithParameter()), r"held \(ParentWithParameter\)"),
        (Holder(nn.MultiheadAttention(WIDTH, 2)), r"held \(MultiheadAttention\)"),
        (Holder(Counter()), r"held \(Counter\)"),
        (Holder(hooked(nn.LayerNorm(WIDTH))), r"held \(LayerNorm\)"),
        (Holder(parametrizations.weight_norm(nn.Linear(WIDTH, 3))), r"held \(ParametrizedLinear\)"),
        (Holder(spectral_norm(nn.Linear(WIDTH, 3))), r"held \(Linear\)"),
    ],
    ids=lambda item: "" if isinstance(item, nn.Module) else item.split("(")[1].rstrip("\\)"),
)
def test_a_layer_without_a_rule_is_refused_by_name_when_the_engine_opens(model: nn.Module, layer: str) -> None:
    with pytest.raises(PrivacyError, match=rf"the layer {layer}.*unsupported-layer"):
        open_engine("lora", model, named(model))
    assert not any("forward" in vars(module) for module in model.modules())


def test_running_statistics_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 3), nn.BatchNorm1d(TOKENS))
    with pytest.raises(PrivacyError, match=r"layer 1 \(BatchNorm1d\).*coupled-records"):
        open_engine("lora", model, named(model))


class Branching(Scale):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.scale if inputs.sum() > 0 else inputs


class Pair(Scale):
    """Two outputs: the first alone would pass for a batch."""

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return inputs * self.scale, inputs.sum()


class SummedAway(Scale):
    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs * self.scale).sum(0)


class WithMask(Scale):
    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        return inputs * self.scale if mask is None else inputs * self.scale * mask


@pytest.mark.parametrize(
    ("model", "layer"),
    [
        (Used(nn.LSTM(WIDTH, 2, batch_first=True), lambda used, inputs: used(inputs)[0]), "LSTM"),
        (Used(Branching(), lambda used, inputs: used(inputs)), "Branching"),
        (Used(Pair(), lambda used, inputs: used(inputs)[0]), "Pair"),
        (Used(SummedAway(), lambda used, inputs: used(inputs)), "SummedAway"),
        (Used(WithMask(), lambda used, inputs: used(inputs, torch.ones_like(inputs))), "WithMask"),
        (Used(WithMask(), lambda used, inputs: used(inputs, mask=torch.ones_like(inputs))), "WithMask"),
        (Used(nn.Bilinear(WIDTH, WIDTH, 2), lambda used, inputs: used(inputs, inputs)), "Bilinear"),
    ],
)
def test_a_layer_that_cannot_be_run_record_by_record_is_refused_by_name(model: nn.Module, layer: str) -> None:
    with pytest.raises(PrivacyError, match=rf"the layer layer \({layer}\).*unsupported-layer"):
        rows_of("lora", model, squares(model, records(torch.float32)), RECORDS)


@pytest.mark.parametrize(
    "layer", [nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), Conv1D(WIDTH, WIDTH)], ids=lambda item: type(item).__name__
)
@pytest.mark.parametrize(
    ("shape", "rows"), [((RECORDS * TOKENS, WIDTH), 20), ((1, TOKENS, WIDTH), 1)], ids=["flattened", "shared"]
)
def test_an_input_that_is_not_one_row_a_record_is_refused_by_name(
    layer: nn.Module, shape: tuple[int, ...], rows: int
) -> None:
    def call(used: nn.Module, inputs: Tensor) -> Tensor:
        whole = inputs if rows > 1 else inputs.mean(0)
        outputs: Tensor = (
            used(whole.reshape(shape)).expand(RECORDS, -1, -1) if rows == 1 else used(whole.reshape(shape))
        )
        return outputs.reshape(RECORDS, -1)

    model = Used(layer, call)
    with pytest.raises(PrivacyError, match=rf"layer layer sees {rows} rows for 4 records.*flattened-records"):
        rows_of("lora", model, squares(model, records(torch.float32)), RECORDS)


def test_positions_that_all_records_share_are_refused_by_name() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Embedding(TOKENS, WIDTH)

        def forward(self, inputs: Tensor) -> Tensor:
            result: Tensor = inputs + self.position(torch.arange(TOKENS)[None])
            return result

    model = Positions()
    with pytest.raises(PrivacyError, match="layer position sees 1 rows for 4 records"):
        rows_of("lora", model, squares(model, records(torch.float32)), RECORDS)


def test_a_parameter_used_outside_its_layer_is_refused_by_name() -> None:
    model = Used(nn.LayerNorm(WIDTH), lambda used, inputs: used(inputs) * used.weight)
    with pytest.raises(PrivacyError, match=r"layer\.weight has a gradient, but not one for each record"):
        rows_of("lora", model, squares(model, records(torch.float32)), RECORDS)
