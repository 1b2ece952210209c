"""Builds what is trained: a random model from a transformers configuration, adapted by PEFT, and a random batch.

Knows no privacy and measures nothing.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.dp_step.configurations import Configuration
from fedtune.data.batches import Batch
from fedtune.privacy.losses import Task

_QV = {"bert": ["query", "value"], "gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Subject:
    """An adapted model in training mode, without any dropout, and the kind of its task."""

    model: nn.Module
    kind: Task

    @property
    def parameters(self) -> tuple[tuple[str, nn.Parameter], ...]:
        """The trainable parameters by name, in the model's order."""
        return tuple((name, tensor) for name, tensor in self.model.named_parameters() if tensor.requires_grad)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.parameters[0][1].device

    def twin(self) -> Subject:
        """Return a copy with trainable tensors of its own; frozen ones, which nobody changes, are shared."""
        frozen = {id(tensor): tensor for tensor in self.model.parameters() if not tensor.requires_grad}
        return Subject(copy.deepcopy(self.model, dict(frozen)), self.kind)


def logits(call: Callable[..., Any], kind: Task, batch: Batch) -> Tensor:
    """Run a model, or whatever wraps it, on a batch."""
    extra = {"use_cache": False} if kind == "causal-lm" else {}
    output = call(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **extra)
    result: Tensor = output if isinstance(output, Tensor) else output.logits
    return result


def build(configuration: Configuration, device: str = "cpu", seed: int = 0) -> Subject:
    """Return the adapted random model. Both LoRA factors are random: with B = 0, A would have no gradient."""
    torch.manual_seed(seed)
    with torch.device(device):
        base = _base(configuration).to(_DTYPES[configuration.dtype])
        kind: Task = "classification" if configuration.family == "bert" else "causal-lm"
        config = LoraConfig(
            r=configuration.rank,
            lora_alpha=2 * configuration.rank,
            target_modules=_QV[configuration.family] if configuration.targets == "qv" else "all-linear",
            task_type="SEQ_CLS" if kind == "classification" else "CAUSAL_LM",
            fan_in_fan_out=configuration.family == "gpt2",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: nn.Module = get_peft_model(base, config)
    for name, tensor in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(tensor, std=0.02)
    return Subject(model.train(), kind)


def random_batch(configuration: Configuration, device: str = "cpu", seed: int = 0) -> Batch:
    """Return B records of T tokens without padding."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(configuration.vocabulary, (configuration.batch, configuration.tokens), generator=draw)
    classes = torch.randint(configuration.classes, (configuration.batch,), generator=draw)
    labels = classes if configuration.family == "bert" else ids
    return Batch(ids, torch.ones_like(ids), labels).to(device)


def without_dropout(model: nn.Module) -> nn.Module:
    """Switch every dropout off, so that training mode, which Opacus needs, computes what evaluation mode does."""
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return model.train()


def _base(configuration: Configuration) -> nn.Module:
    import transformers

    make: Any = {"bert": _bert, "gpt2": _gpt2, "llama": _llama}[configuration.family]
    model: nn.Module = make(configuration, transformers)
    return model


def _bert(shape: Configuration, library: Any) -> Any:
    config = library.BertConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.inner,
        max_position_embeddings=max(512, shape.tokens),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=shape.classes,
    )
    return library.BertForSequenceClassification(config)


def _gpt2(shape: Configuration, library: Any) -> Any:
    config = library.GPT2Config(
        vocab_size=shape.vocabulary,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_inner=shape.inner,
        n_positions=max(512, shape.tokens),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return library.GPT2LMHeadModel(config)


def _llama(shape: Configuration, library: Any) -> Any:
    config = library.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.inner,
        max_position_embeddings=max(512, shape.tokens),
        bos_token_id=0,
        eos_token_id=0,
    )
    return library.LlamaForCausalLM(config)
