"""Tiny random models with LoRA, and a batch for each, built on the spot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from fedtune.privacy.engines import OpacusEngine
from fedtune.privacy.losses import record_losses

if TYPE_CHECKING:
    from collections.abc import Callable

VOCAB = 23


@dataclass(frozen=True)
class Case:
    """A model, its trainable parameters and a padded batch of records of uneven length."""

    kind: str
    model: nn.Module
    batch: dict[str, Tensor]

    @property
    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, tensor) for name, tensor in self.model.named_parameters() if tensor.requires_grad]

    @property
    def records(self) -> int:
        return len(self.batch["labels"])

    def rows(self, *keep: int) -> dict[str, Tensor]:
        return {name: tensor[list(keep)] for name, tensor in self.batch.items()}

    def losses(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return record_losses(self.kind, logits, batch["labels"])

    def gradients(self, batch: dict[str, Tensor]) -> Tensor:
        with OpacusEngine(self.model, self.parameters) as engine:
            return engine.per_sample_gradients(lambda: self.losses(batch), len(batch["labels"]))


def _base(name: str) -> tuple[str, nn.Module, list[str]]:
    if name == "bert":
        config = BertConfig(
            vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=16, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return "classification", BertForSequenceClassification(config), ["query", "value", "intermediate.dense"]
    if name == "llama":
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=24, max_position_embeddings=16,
        )  # fmt: skip
        return "causal-lm", LlamaForCausalLM(config), ["q_proj", "v_proj", "down_proj"]
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0,
    )  # fmt: skip
    return "causal-lm", GPT2LMHeadModel(config), ["c_attn", "c_fc"]


def _batch(kind: str, lengths: tuple[int, ...]) -> dict[str, Tensor]:
    width = max(lengths)
    tokens = torch.randint(1, VOCAB, (len(lengths), width))
    mask = (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).long()
    labels = torch.arange(len(lengths)) % 3 if kind == "classification" else tokens.masked_fill(mask == 0, -100)
    return {"input_ids": tokens * mask, "attention_mask": mask, "labels": labels}


def _make(
    name: str, rank: int = 2, dtype: torch.dtype = torch.float64, lengths: tuple[int, ...] = (7, 2, 5, 1)
) -> Case:
    torch.manual_seed(rank)
    kind, base, targets = _base(name)
    task = "SEQ_CLS" if kind == "classification" else "CAUSAL_LM"
    lora = LoraConfig(
        r=rank, lora_alpha=4, target_modules=targets, task_type=task, fan_in_fan_out=name == "gpt2"
    )  # fmt: skip
    model = get_peft_model(base, lora).to(dtype)
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            if "lora_B" in key:
                tensor.normal_(std=0.3)
    return Case(kind, model, _batch(kind, lengths))


@pytest.fixture
def tiny() -> Callable[..., Case]:
    return _make


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
