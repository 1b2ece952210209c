"""What only a forward pass shows about a model is refused when the plan is made."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from fedtune.errors import PrivacyError
from fedtune.training.rehearsal import rehearse
from tests.support.bench import CASES, make_bench

if TYPE_CHECKING:
    from fedtune.data.batches import Batch


class Small(nn.Module):
    """An embedding and one trained layer; `order` is how the layer sees (records, tokens, width)."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=20)
        self.embedding = nn.Embedding(20, 4).requires_grad_(requires_grad=False)
        self.inner = nn.Linear(4, 3)
        self.order = order

    def forward(self, batch: Batch) -> Tensor:
        hidden = self.embedding(batch.input_ids)
        if self.order == "positions first":
            return self.inner(hidden.transpose(0, 1)).mean(0)
        if self.order == "folded":
            return self.inner(hidden.flatten(0, 1)).view(*hidden.shape[:2], 3).mean(1)
        if self.order == "centred":
            hidden = hidden - hidden.mean(0, keepdim=True)
        return self.inner(hidden).mean(1)


def workspace(order: str) -> Any:
    torch.manual_seed(0)
    model = Small(order)
    parameters = tuple((name, tensor) for name, tensor in model.named_parameters() if tensor.requires_grad)
    return SimpleNamespace(
        model=model,
        peft=model,
        pad_id=0,
        device=torch.device("cpu"),
        task=SimpleNamespace(kind="classification", labels=("a", "b", "c")),
        train_only=lambda _layout: parameters,
        logits=model,
    )


@pytest.mark.parametrize("engine", ["lora", "opacus"])
def test_a_model_that_keeps_records_apart_passes(engine: Any) -> None:
    rehearse(workspace("records first"), None, engine)  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ["lora", "opacus"])
@pytest.mark.parametrize("order", ["positions first", "folded"])
def test_a_layer_that_does_not_see_one_row_a_record_is_refused_by_name(order: str, engine: Any) -> None:
    with pytest.raises(PrivacyError, match=r"layer inner sees (6|18) rows for 3 records"):
        rehearse(workspace(order), None, engine)  # type: ignore[arg-type]


def test_records_that_change_each_others_gradients_are_refused() -> None:
    with pytest.raises(PrivacyError, match="coupled-records"):
        rehearse(workspace("centred"), None, "lora")  # type: ignore[arg-type]


@pytest.mark.parametrize(("architecture", "head"), CASES)
def test_every_supported_architecture_passes_and_is_left_as_it_was(
    tmp_path: Path, architecture: str, head: str
) -> None:
    bench = make_bench(tmp_path, architecture, head)  # which rehearses
    start = bench.workspace.export(bench.workspace.layout)
    rehearse(bench.workspace, bench.layouts[0], "lora")
    after = bench.workspace.export(bench.workspace.layout)
    assert all((start[name] == after[name]).all() for name in start)
    assert not any("forward" in vars(layer) for layer in bench.workspace.model.modules())


@contextmanager
def centred_embeddings(model: Any) -> Any:
    hook = model.get_input_embeddings().register_forward_hook(lambda _m, _a, out: out - out.mean(0, keepdim=True))
    yield
    hook.remove()


def test_a_coupled_model_is_refused_in_bfloat16_too(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, "llama", "none", model__dtype="bfloat16")
    bench.workspace.load(bench.alive())
    with centred_embeddings(bench.workspace.peft), pytest.raises(PrivacyError, match="coupled-records"):
        rehearse(bench.workspace, bench.layouts[0], "lora")
