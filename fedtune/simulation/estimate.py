"""An estimate of a study's memory on one machine, from shapes alone; stated as an estimate wherever it is shown."""

from __future__ import annotations

import os

from fedtune.config.plan import StudyPlan
from fedtune.model.base import BaseModel

_FLOAT = 4
_ACTIVATIONS = 16  # numbers kept a token, layer and unit of width: attention and feed-forward inputs and outputs
_SHARE = 0.8  # of the machine's memory
_RUNTIME = 500_000_000  # Python, torch and transformers themselves


def largest_rank(plan: StudyPlan, base: BaseModel) -> int:
    """Return the largest rank from the plan's least to its own whose estimate fits into 80 % of this machine's memory.

    A machine too small for the least is given the least: it fails loudly where the estimate is right, and nowhere else.
    """
    most = _SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    ranks = range(plan.lora.rank, plan.lora.min_rank, -1)
    return next((rank for rank in ranks if memory_bytes(plan, base, rank) <= most), plan.lora.min_rank)


def memory_bytes(plan: StudyPlan, base: BaseModel, rank: int = 0) -> int:
    """Return weights + per-record gradients + activations of one physical batch at full length + the runtime.

    A physical batch holds at most `training.physical_batch` records and, padding included, `physical_tokens` tokens; a
    single record may be longer. At another rank than the plan's the adapter counts in proportion, head included.
    """
    weights = sum(path.stat().st_size for path in base.folder.glob("*.safetensors"))
    records = plan.training.physical_batch
    tokens = records * plan.data.max_tokens
    if plan.training.physical_tokens is not None:
        tokens = min(tokens, max(plan.training.physical_tokens, plan.data.max_tokens))
    copies = 2 if plan.promise.engine == "opacus" else 1  # Opacus' own rows and their flat copy
    gradients = _FLOAT * records * plan.adapter.trained * copies * (rank or plan.lora.rank) // plan.lora.rank
    width = int(base.config.get("hidden_size", base.config.get("n_embd", 0)))
    layers = int(base.config.get("num_hidden_layers", base.config.get("n_layer", 0)))
    activations = _FLOAT * tokens * width * layers * _ACTIVATIONS
    vocabulary = int(base.config.get("vocab_size", 0)) if plan.task.kind == "causal-lm" else 0
    logits = _FLOAT * tokens * vocabulary * 2
    return weights + gradients + activations + logits + _RUNTIME
