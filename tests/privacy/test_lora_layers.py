"""LoRA layers as one node: the same as PEFT's own forward, nothing left behind, and PEFT's own where it must be."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from fedtune.errors import PrivacyError
from fedtune.privacy.engines import open_engine, summed_gradient
from fedtune.privacy.lora_layers import fused
from tests.support.adapted import (
    FAMILIES,
    Case,
    make_batch,
    make_case,
    relative_error,
    wake,
    worst_error,
)

EXACT = 1e-10
TARGETS = ["query", "value", "dense"]


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=23, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def lora(**changes: Any) -> LoraConfig:
    words = {"r": 2, "lora_alpha": 4, "target_modules": TARGETS, "task_type": "SEQ_CLS"}
    return LoraConfig(**{**words, **changes})


def adapted(base: nn.Module | None = None, **changes: Any) -> Case:
    """BERT with LoRA by PEFT, without fedtune's own choices."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base or bert(), lora(**changes))
    wake(model)
    return Case("classification", model.double(), make_batch("classification", (7, 2, 5, 1)))


def fused_layers(case: Case) -> int:
    """Check that all layers give PEFT's own logits inside the block, and count those that run as one node."""
    with torch.inference_mode():
        expected = case.logits(case.batch)
        with fused(case.model) as count:
            assert relative_error(case.logits(case.batch), expected) <= 1e-12
    return count


def rows_are_right(case: Case) -> bool:
    return worst_error(case.model, case.gradients(case.batch), case.loop()) <= EXACT


# --- training without privacy, and evaluation -----------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_gives_pefts_logits_and_training_its_gradient(family: str) -> None:
    case = make_case(family)

    def gradient() -> Tensor:
        return summed_gradient(case.parameters, lambda: case.losses(case.batch), case.records)[None]

    expected = gradient()
    assert fused_layers(case) > 0
    with fused(case.model):
        assert worst_error(case.model, gradient(), expected) <= EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_pefts_within_the_precision_of_the_type(dtype: torch.dtype) -> None:
    case = make_case("llama", dtype=torch.float32)
    for tensor in case.model.parameters():
        tensor.data = tensor.data if tensor.requires_grad else tensor.data.to(dtype)
    with torch.inference_mode(), fused(case.model):
        found = case.logits(case.batch)
    with torch.inference_mode():
        expected = case.logits(case.batch)
    assert found.dtype == expected.dtype == dtype
    assert relative_error(found, expected) <= (1e-5 if dtype == torch.float32 else 0.05)


def test_a_frozen_factor_gets_no_gradient_and_the_others_keep_theirs() -> None:
    case = make_case("gpt2")
    for name, tensor in case.model.named_parameters():
        tensor.requires_grad_("lora_B" in name)
    expected = summed_gradient(case.parameters, lambda: case.losses(case.batch), 4)
    with fused(case.model):
        found = summed_gradient(case.parameters, lambda: case.losses(case.batch), 4)
    assert relative_error(found, expected) <= EXACT


def test_pefts_own_dropout_drops_the_same_numbers() -> None:
    case = adapted(lora_dropout=0.4)

    def gradient() -> Tensor:
        torch.manual_seed(5)
        return summed_gradient(case.parameters, lambda: case.losses(case.batch), case.records)

    expected = gradient()
    with fused(case.model):
        assert relative_error(gradient(), expected) <= EXACT
    case.model.eval()
    assert relative_error(gradient(), expected) > 0.01


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_nothing_is_left_behind(error: type[BaseException] | None) -> None:
    case = make_case("bert")
    before = {name: dict(vars(module)) for name, module in case.model.named_modules()}

    def inside() -> None:
        with fused(case.model):
            assert any("forward" in vars(module) for module in case.model.modules())
            case.losses(case.batch).sum().backward()
            if error:
                raise error

    if error:
        with pytest.raises(error):
            inside()
    else:
        inside()
    after = {name: dict(vars(module)) for name, module in case.model.named_modules()}
    assert all(after[name].keys() == before[name].keys() for name in before)
    assert all(after[name][key] is before[name][key] for name in before for key in before[name])


def test_a_block_in_a_block_leaves_the_outer_one_at_work() -> None:
    case = make_case("llama")
    with fused(case.model) as outer:
        with fused(case.model) as inner:
            assert (outer, inner) == (14, 0)
        assert sum("forward" in vars(module) for module in case.model.modules()) == outer


def test_inside_an_engine_nothing_is_fused_twice_and_the_engine_goes_on() -> None:
    case = make_case("llama")
    with open_engine("lora", case.model, case.parameters) as engine:
        with fused(case.model) as count:
            rows = engine.per_sample_gradients(lambda: case.losses(case.batch), case.records).clone()
        assert count == 0
        assert torch.equal(engine.per_sample_gradients(lambda: case.losses(case.batch), case.records), rows)


@pytest.mark.parametrize("engine", ["lora", "opacus"])
def test_no_engine_opens_on_a_model_that_runs_fused(engine: Any) -> None:
    case = make_case("llama")
    with fused(case.model), pytest.raises(PrivacyError, match="engine-open"):
        open_engine(engine, case.model, case.parameters)


# --- whatever is not plain LoRA on a frozen linear layer ------------------------------------------------------------


def two_adapters(active: Any) -> Case:
    model = get_peft_model(bert(), lora(task_type="FEATURE_EXTRACTION"))
    model.add_adapter("other", lora(r=3, task_type="FEATURE_EXTRACTION"))
    model.base_model.set_adapter(active)
    wake(model)
    return Case("classification", model.double(), make_batch("classification", (7, 2, 5, 1)))


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (adapted, 11),
        (lambda: adapted(use_rslora=True), 11),
        (lambda: adapted(init_lora_weights="pissa"), 11),
        (lambda: adapted(lora_bias=True), 0),
        (lambda: adapted(bias="lora_only"), 0),
        (lambda: two_adapters("default"), 11),
        (lambda: two_adapters("other"), 11),
        (lambda: two_adapters(["default", "other"]), 0),
    ],
    ids=["plain", "rank-stabilised", "pissa", "bias-of-B", "bias-of-the-base", "first", "second", "both"],
)
def test_variants_run_as_one_node_or_as_pefts_own_and_are_right_either_way(
    make: Callable[[], Case], layers: int
) -> None:
    case = make()
    assert fused_layers(case) == layers
    assert rows_are_right(case)


@pytest.mark.parametrize(
    ("changes", "layer"),
    [
        ({"use_dora": True}, r"query\.lora_magnitude_vector\.default \(DoraLinearLayer\)"),
        ({"target_modules": ["query", "word_embeddings"]}, r"word_embeddings\.lora_embedding_A \(ParameterDict\)"),
        ({"trainable_token_indices": {"word_embeddings": [1, 2]}}, r"trainable_tokens_delta \(ParameterDict\)"),
    ],
    ids=["dora", "embeddings", "tokens"],
)
@pytest.mark.parametrize("lengths", [(7, 2, 5, 1), (7,) * 16])
def test_variants_without_a_rule_run_as_pefts_own_and_are_refused_by_name_with_privacy(
    changes: dict[str, Any], layer: str, lengths: tuple[int, ...]
) -> None:
    """DoRA runs A and B on a unit matrix: with as many records as features it would pass for a batch."""
    case = adapted(**changes)
    case.batch.update(make_batch("classification", lengths))
    fused_layers(case)
    with pytest.raises(PrivacyError, match=rf"{layer}.*unsupported-layer"):
        case.gradients(case.batch)


class Packed(nn.Linear):
    """Stands for a quantized layer: a kind of linear layer whose weight is not what it multiplies with."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.round(decimals=1), self.bias)


def test_a_base_layer_of_another_kind_keeps_its_own_product_and_the_rows_are_right() -> None:
    base = bert()
    for name, layer in base.named_modules():
        if name.endswith(("query", "value")):
            layer.__class__ = Packed
    case = adapted(base)
    assert fused_layers(case) == 11 - 4
    assert rows_are_right(case)
    with open_engine("lora", case.model, case.parameters) as engine:
        rules = {name.split(".", 5)[-1]: rule for name, rule in engine.rules.items()}
    assert rules["0.attention.self.query.lora_A.default"] == "linear"
    assert rules["0.attention.output.dense"] == "fused LoRA"


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default"])
def test_somebody_elses_hook_inside_a_layer_is_not_passed_over(part: str) -> None:
    case = adapted(target_modules=["query"])
    layer = case.model.base_model.model.bert.encoder.layer[0].attention.self.query
    layer.get_submodule(part).register_forward_hook(lambda _layer, _inputs, output: 2 * output)
    assert fused_layers(case) == 1
    assert rows_are_right(case)


# --- states that PEFT can be switched to at any time ----------------------------------------------------------------


def test_disabled_merged_and_switched_adapters_are_followed_inside_a_block() -> None:
    case = two_adapters("default")

    def states() -> list[Tensor]:
        found = [case.logits(case.batch)]
        with case.model.disable_adapter():
            found.append(case.logits(case.batch))
        case.model.base_model.set_adapter("other")
        found.append(case.logits(case.batch))
        case.model.base_model.set_adapter("default")
        case.model.merge_adapter()
        found.append(case.logits(case.batch))
        case.model.unmerge_adapter()
        return [*found, case.logits(case.batch)]

    with torch.no_grad():
        expected = states()
        with fused(case.model) as count:
            found = states()
    assert count == 11
    assert all(relative_error(one, other) <= 1e-12 for one, other in zip(found, expected, strict=True))
    assert relative_error(expected[0], expected[1]) > 0.01
    assert relative_error(expected[0], expected[2]) > 0.01


def test_adapters_by_record_are_pefts_own() -> None:
    case = two_adapters("default")
    names = ["default", "other", "__base__", "default"]
    case.model.eval()

    def logits() -> Tensor:
        result: Tensor = case.model(**case.batch | {"labels": None}, adapter_names=names).logits
        return result

    with torch.no_grad():
        expected = logits()
        with fused(case.model):
            assert relative_error(logits(), expected) <= 1e-12


def test_with_privacy_merged_adapters_have_zero_rows_and_the_head_keeps_its_own() -> None:
    case = adapted()
    case.model.merge_adapter()
    rows, size = case.gradients(case.batch), sum(t.numel() for name, t in case.parameters if "lora_" in name)
    assert worst_error(case.model, rows, case.loop()) <= EXACT
    assert rows[:, size:].any()
    assert not rows[:, :size].any()


def test_with_privacy_disabled_adapters_have_zero_rows() -> None:
    case = adapted()
    with open_engine("lora", case.model, case.parameters) as engine, case.model.disable_adapter():
        assert not engine.per_sample_gradients(lambda: case.losses(case.batch), case.records).any()
