"""GPT-2 stores its linear layers transposed (`Conv1D`); what PEFT makes of the factors must be the mean update."""

import math
from typing import Any

import numpy as np
import pytest

from fedtune.aggregation.lora.gather import Collector
from fedtune.aggregation.lora.protocol import Turn
from fedtune.aggregation.lora.registry import get_algorithm
from fedtune.config.schema import AggregationSettings
from fedtune.model.layout import AdapterLayout, TensorSpec

State = dict[str, np.ndarray]
WEIGHTS = [0.5, 1.0, 2.5]
FIRST = Turn(1)


@pytest.fixture(scope="module")
def gpt2() -> Any:
    """A tiny random GPT-2 with LoRA on c_attn (8 → 24), c_fc (8 → 32) and c_proj (8 → 8 and 32 → 8)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=8))
    assert isinstance(model.transformer.h[0].attn.c_attn, Conv1D)
    targets = ["c_attn", "c_fc", "c_proj"]
    return get_peft_model(model, LoraConfig(r=3, lora_alpha=12, target_modules=targets, fan_in_fan_out=True))


def layout_of(model: Any) -> AdapterLayout:
    specs = []
    for name, parameter in model.named_parameters():
        layer, _, rest = name.partition(".lora_")
        if rest:
            specs.append(TensorSpec(name, tuple(parameter.shape), f"lora_{rest[0]}", layer))
    return AdapterLayout(tuple(sorted(specs, key=lambda spec: spec.name)))


def deltas(model: Any, layout: AdapterLayout, state: State) -> State:
    """Load the state and return what PEFT itself would add to each base weight, scale and storage order included."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in state:
                parameter.copy_(torch.from_numpy(state[name]))
    return {
        spec.layer: model.get_submodule(spec.layer).get_delta_weight("default").double().detach().numpy()
        for spec, _ in layout.pairs
    }


def sites(algorithm: str, layout: AdapterLayout) -> tuple[State, list[State]]:
    generator = np.random.default_rng(5)
    start = {spec.name: generator.standard_normal(spec.shape).astype(np.float32) for spec in layout.tensors}
    upload = get_algorithm(algorithm).up(layout, FIRST)
    trained = [
        start | {spec.name: generator.standard_normal(spec.shape).astype(np.float32) for spec in upload.tensors}
        for _ in WEIGHTS
    ]
    return start, trained


def aggregate(algorithm: str, layout: AdapterLayout, start: State, trained: list[State]) -> State:
    settings, chosen = AggregationSettings(algorithm=algorithm), get_algorithm(algorithm)
    replies = Collector(chosen.averaged(layout, FIRST), chosen.stacked(layout, FIRST))
    for number, (state, weight) in enumerate(zip(trained, WEIGHTS, strict=True)):
        replies.add(f"site-{number}", state, weight)
    begun = chosen.server.start(settings, layout, start)
    return dict(chosen.server.receive(settings, layout, FIRST, begun, replies.result()).adapter)


def weighted(states: list[State]) -> State:
    total = math.fsum(WEIGHTS)
    return {
        name: sum(weight / total * state[name] for weight, state in zip(WEIGHTS, states, strict=True))
        for name in states[0]
    }


def test_the_base_weights_are_stored_transposed_and_the_factors_are_not(gpt2: Any) -> None:
    layer = gpt2.get_submodule("base_model.model.transformer.h.0.attn.c_attn")
    assert tuple(layer.base_layer.weight.shape) == (8, 24)
    assert tuple(layer.lora_A["default"].weight.shape) == (3, 8)
    assert tuple(layer.lora_B["default"].weight.shape) == (24, 3)


@pytest.mark.parametrize("algorithm", ["ffa", "fedsvd"])
def test_bug_2_of_fedex_the_update_that_peft_applies_to_a_conv1d_is_the_mean_update(gpt2: Any, algorithm: str) -> None:
    layout = layout_of(gpt2)
    start, trained = sites(algorithm, layout)
    wanted = weighted([deltas(gpt2, layout, state) for state in trained])
    reached = deltas(gpt2, layout, aggregate(algorithm, layout, start, trained))
    assert len(reached) == 4
    for layer, update in wanted.items():
        np.testing.assert_allclose(reached[layer], update, atol=1e-5 * np.abs(update).max())


def test_bug_2_of_fedex_fedit_applies_the_product_of_the_mean_factors_to_a_conv1d(gpt2: Any) -> None:
    layout = layout_of(gpt2)
    start, trained = sites("fedit", layout)
    mean = weighted([{name: array.astype(float) for name, array in state.items()} for state in trained])
    reached = deltas(gpt2, layout, aggregate("fedit", layout, start, trained))
    for spec_a, spec_b in layout.pairs:
        update = 4 * (mean[spec_b.name] @ mean[spec_a.name]).T  # scale alpha / rank = 12 / 3, stored (d_in, d_out)
        np.testing.assert_allclose(reached[spec_a.layer], update, atol=1e-5 * np.abs(update).max())


@pytest.mark.parametrize("algorithm", ["fedit", "ffa", "fedsvd"])
def test_bug_7_the_scale_is_applied_once_whatever_the_algorithm(gpt2: Any, algorithm: str) -> None:
    layout = layout_of(gpt2)
    start, trained = sites(algorithm, layout)
    same = [trained[0]] * len(WEIGHTS)
    wanted = deltas(gpt2, layout, trained[0])
    reached = deltas(gpt2, layout, aggregate(algorithm, layout, start, same))
    for layer, update in wanted.items():
        np.testing.assert_allclose(reached[layer], update, atol=1e-5 * np.abs(update).max())
