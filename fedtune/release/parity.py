"""Whether two models compute the same: their outputs on real prompts, compared in float32.

An output is a language model's logits (tokens, vocabulary), a classifier's (1, labels), or an encoder's last hidden
states (tokens, width), of one prompt at a time, so that no padding hides a difference. Knows no merging.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedtune.errors import ReleaseError

# Of the root mean square: float32 rounds sums of products, the others every merged weight.
LIMITS = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
_LOST = 0.5  # of the adapter's effect: above it what was trained is not in the merged model
_NO_EFFECT = 1e-6
PROMPTS = (
    "My card was declined at the supermarket although there is money in my account.",
    "How long does a transfer to another country take?",
    "I lost my phone and cannot log in any more.",
    "The patient reports chest pain for two days and shortness of breath at night.",
    "What are the side effects of this medicine?",
    "Is a fever of 39 degrees dangerous for a child of three years?",
    "Please explain the difference between a virus and a bacterium.",
    "The invoice of 14 March over 1,250.00 was paid twice.",
    "Once upon a time there was a little girl who lived near the sea.",
    "Summarise: the meeting was moved to Thursday, and nobody told the supplier.",
    "Wie kann ich meine Adresse ändern?",
    "Le paiement a été refusé, que dois-je faire ?",
    "def mean(values):\n    return sum(values) / len(values)",
    "1, 1, 2, 3, 5, 8, 13,",
    "Yes",
    "Thank you for your help with the loan; the rate that you named is not the one in the contract: which one holds?",
)


@dataclass(frozen=True, slots=True)
class Parity:
    """How equal two models are: differences as shares of the outputs' root mean square.

    `largest` is the largest absolute difference, `error` the root mean square of all, `effect` that between the adapted
    model and its base, `agree` the share of positions with the same largest output.
    """

    prompts: int
    largest: float
    error: float
    effect: float
    agree: float


def read_prompts(path: Path | None) -> tuple[str, ...]:
    """Return the lines of a file that are not empty, or the built-in prompts. Error: `release.no-prompts`."""
    if path is None:
        return PROMPTS
    try:
        found = tuple(line for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        message = f"{path} cannot be read as text"
        raise ReleaseError("no-prompts", message, hint="name a text file with one prompt a line") from error
    if not found:
        raise ReleaseError("no-prompts", f"{path} holds no prompt", hint="name a text file with one prompt a line")
    return found


@torch.no_grad()
def outputs(model: Any, tokenizer: Any, prompts: Sequence[str], max_tokens: int) -> list[Tensor]:
    """Return a model's output of each prompt, on the CPU in float32."""
    found = []
    for prompt in prompts:
        tokens = tokenizer(prompt, return_tensors="pt", truncation=True, max_length=max_tokens)
        given = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        found.append((given.logits if hasattr(given, "logits") else given.last_hidden_state)[0].float().cpu())
    return found


def compare(adapted: Sequence[Tensor], plain: Sequence[Tensor], merged: Sequence[Tensor], dtype: torch.dtype) -> Parity:
    """Compare a merged model saved in `dtype` with the adapted one, `plain` being the base's outputs.

    Errors: `release.not-equal` beyond what rounding explains, `release.lost-in-rounding` where the adapter changes less
    than rounding the weights to that type does.
    """
    live, base, made = (torch.cat([one.reshape(-1) for one in parts]) for parts in (adapted, plain, merged))
    size = max(_rms(live), 1e-30)
    same = torch.cat([(a.argmax(-1) == b.argmax(-1)).reshape(-1) for a, b in zip(adapted, merged, strict=True)])
    parity = Parity(
        prompts=len(adapted),
        largest=float((made - live).abs().max()),
        error=_rms(made - live) / size,
        effect=_rms(live - base) / size,
        agree=float(same.float().mean()),
    )
    _refuse(parity, dtype)
    return parity


def _refuse(parity: Parity, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    if not parity.error <= LIMITS[dtype]:  # NaN included
        message = (
            f"the merged model differs from base and adapter by {parity.error:.2g} of its outputs' size, above "
            f"{LIMITS[dtype]:g}, which {name} explains"
        )
        raise ReleaseError("not-equal", message, hint="release it as an adapter (--to peft), and report this")
    if parity.error > _LOST * parity.effect > _LOST * _NO_EFFECT:
        message = (
            f"rounding the merged weights to {name} changes the outputs by {parity.error:.2g} of their size, the "
            f"adapter by {parity.effect:.2g}: little of it would be left"
        )
        hint = "release it as an adapter: fedtune release RUN --to peft --out DIR"
        raise ReleaseError("lost-in-rounding", message, hint=hint)


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())
