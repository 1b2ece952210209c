"""Tiny random models with LoRA as fedtune adapts them, a padded batch for each, and gradients by plain autograd."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

from fedtune.config.schema import LoraSettings
from fedtune.model.adapters import adapt
from fedtune.model.heads import PooledClassifier
from fedtune.privacy.engines import EngineName, open_engine
from fedtune.privacy.losses import Task, record_losses

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

VOCAB, WIDTH, LABELS = 24, 16, 3
UNUSED = VOCAB - 1  # a token that no batch holds unless a test puts it there
UNEVEN = (7, 2, 5, 1)

_SHARED = {"vocab_size": VOCAB, "pad_token_id": 0, "num_labels": LABELS}
_LAYERS = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 16,
}  # fmt: skip
_RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": WIDTH}
_QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pooler_dropout": 0.0}
_GPT2 = {
    "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 16, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}  # fmt: skip
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {**_LAYERS, **_QUIET}),
    "deberta": ("DebertaV2", {**_LAYERS, **_QUIET, **_RELATIVE}),
    "gpt2": ("GPT2", _GPT2),
    "llama": ("Llama", {**_LAYERS, "num_key_value_heads": 1}),
    "gemma": ("Gemma", {**_LAYERS, "num_key_value_heads": 1, "head_dim": 8}),
    "qwen2": ("Qwen2", {**_LAYERS, "num_key_value_heads": 1}),
}
FAMILIES = tuple(_FAMILIES)
DECODERS = ("gpt2", "llama", "gemma", "qwen2")
# Modules that a checkpoint does not hold, so that fedtune trains them in full.
_FRESH = {"bert": ("bert.pooler.dense",), "deberta": ("pooler.dense",)}
_KINDS = {"none": "ForCausalLM", "architecture": "ForSequenceClassification", "pooled": "Model"}


@dataclass(frozen=True)
class Case:
    """A model and a padded batch of records of uneven length; `precision` is the autocast type of its products."""

    kind: Task
    model: nn.Module
    batch: dict[str, Tensor]
    precision: list[torch.dtype] = field(default_factory=list)

    @property
    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        return named(self.model)

    @property
    def records(self) -> int:
        return len(self.batch["labels"])

    def rows(self, *keep: int) -> dict[str, Tensor]:
        return {name: tensor[list(keep)] for name, tensor in self.batch.items()}

    def alone(self, record: int) -> dict[str, Tensor]:
        """One record without any padding."""
        length = int(self.batch["attention_mask"][record].sum())
        one = self.rows(record)
        return {name: tensor[:, :length] if tensor.ndim > 1 else tensor for name, tensor in one.items()}

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        dtype = self.precision[0] if self.precision else None
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            found: Any = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return found if isinstance(found, Tensor) else found.logits

    def losses(self, batch: dict[str, Tensor]) -> Tensor:
        return record_losses(self.kind, self.logits(batch), batch["labels"])

    def gradients(self, batch: dict[str, Tensor], engine: EngineName = "lora") -> Tensor:
        """Per-record gradients, the columns in the order of the parameters."""
        return rows_of(engine, self.model, lambda: self.losses(batch), len(batch["labels"]))

    def loop(self) -> Tensor:
        """Each record alone and unpadded, by plain autograd."""
        each = [autograd_row(self.model, self.losses(self.alone(record)).sum()) for record in range(self.records)]
        return torch.stack(each)


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, tensor) for name, tensor in model.named_parameters() if tensor.requires_grad]


def rows_of(engine: EngineName, model: nn.Module, losses: Callable[[], Tensor], records: int) -> Tensor:
    """Rows of an engine that is opened for this one pass, the columns in the order of the parameters."""
    with open_engine(engine, model, named(model)) as opened:
        rows = opened.per_sample_gradients(losses, records)
        return torch.stack([opened.arrange(row) for row in rows]) if records else rows.clone()


def autograd_row(model: nn.Module, loss: Tensor, *, keep: bool = False) -> Tensor:
    """The gradient of one loss, flat, by plain autograd; with `keep` another may be taken from the same pass."""
    tensors = [tensor for _, tensor in named(model)]
    gradients = torch.autograd.grad(loss, tensors, allow_unused=True, retain_graph=keep)
    pairs = zip(gradients, tensors, strict=True)
    return torch.cat([(torch.zeros_like(t) if g is None else g).reshape(-1) for g, t in pairs])


def by_tensor(model: nn.Module, rows: Tensor) -> dict[str, Tensor]:
    """Cut rows (B, P) in the order of the parameters into one block of columns for each."""
    sizes = [tensor.numel() for _, tensor in named(model)]
    return dict(zip([name for name, _ in named(model)], rows.split(sizes, dim=1), strict=True))


def worst_error(model: nn.Module, found: Tensor, expected: Tensor) -> float:
    """The largest relative error: of all columns, and of any one tensor's, so that a small tensor cannot hide."""
    assert found.shape == expected.shape
    found, expected = found.double(), expected.double()
    parts = zip(by_tensor(model, found).values(), by_tensor(model, expected).values(), strict=True)
    return max(relative_error(found, expected), *(relative_error(*pair) for pair in parts))


def relative_error(found: Tensor, expected: Tensor) -> float:
    size, error = float(expected.norm()), float((found.double() - expected).norm())
    return error / size if size else float(error > 0)


def make_case(
    name: str,
    rank: int = 2,
    dtype: torch.dtype = torch.float64,
    lengths: Sequence[int] = UNEVEN,
    *,
    targets: str | tuple[str, ...] = "all-linear",
    head: str | None = None,
    attention: str | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> Case:
    """Build a model of a family with LoRA and a head: `none` (a language model), `architecture` or `pooled`."""
    torch.manual_seed(100 * seed + rank)
    head = head or ("none" if name in DECODERS else "architecture")
    kind, fields = _FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(**_SHARED, **fields, initializer_range=0.2)
    extra = {} if attention is None else {"attn_implementation": attention}
    config.use_cache = False  # as fedtune builds its models
    base = getattr(transformers, f"{kind}{_head_class(kind, head)}")._from_config(config, **extra)
    if head == "pooled" and hasattr(base, "pooler"):
        base.pooler = None
    lora = LoraSettings(rank=rank, alpha=4.0, targets=targets, dropout=dropout)
    fresh = _FRESH.get(name, ()) if head == "architecture" else ()
    model = adapt(base, lora, head, fresh)
    if head == "pooled":
        model = PooledClassifier(model, WIDTH, LABELS, 4.0)
    wake(model)
    task: Task = "causal-lm" if head == "none" else "classification"
    return Case(task, model.to(dtype), make_batch(task, lengths))


def make_batch(kind: Task, lengths: Sequence[int]) -> dict[str, Tensor]:
    width = max(lengths)
    tokens = torch.randint(1, UNUSED, (len(lengths), width))
    mask = (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).long()
    labels = torch.arange(len(lengths)) % 3 if kind == "classification" else tokens.masked_fill(mask == 0, -100)
    return {"input_ids": tokens * mask, "attention_mask": mask, "labels": labels}


def _head_class(kind: str, head: str) -> str:
    return "LMHeadModel" if (kind, head) == ("GPT2", "none") else _KINDS[head]


@torch.no_grad()
def wake(model: nn.Module) -> None:
    """Move what starts at zero, where a wrong gradient could not be seen."""
    for key, tensor in model.named_parameters():
        if "lora_B" in key or key == "head.weight":
            tensor.normal_(std=0.3)


def make_training_case(*args: Any, **kwargs: Any) -> Case:
    """Return a case in training mode, the only one in which Opacus records; there is no dropout."""
    case = make_case(*args, **kwargs)
    case.model.train()
    return case
