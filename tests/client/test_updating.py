"""A site takes from a message exactly what its plan's algorithm sends, and refuses everything else before it trains."""

# ruff: noqa: N806
# A and B are the factors' names in every LoRA paper and in PEFT.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.aggregation.lora.protocol import Turn
from fedtune.aggregation.lora.registry import ALGORITHMS
from fedtune.flower.messages import Instruction, Refusal, Standing, Update
from fedtune.model.layout import AdapterState
from fedtune.simulation.workspace import open_workspace
from tests.support.journal_lines import charged_rounds
from tests.support.whole import Federation, Workshop, same, workshop

State = dict[str, np.ndarray]
SITE = "site-001"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("updating")


@pytest.fixture
def shop(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    return workshop(tmp_path, monkeypatch, shared=folder)


def first_message(study: Federation, number: int = 1) -> State:
    """Return what a coordinator of this study sends to a site that has nothing, when nothing was learnt yet."""
    merging = study.merging
    return dict(merging.algorithm.server.send(merging.layout, Turn(number), merging.start(), 0))


def asked(study: Federation, message: AdapterState, number: int = 1, **standing: Any) -> Update | Refusal:
    return study.ask("train", Instruction(study.plan.sha256, number, message, standing=Standing(**standing)), SITE)


def refused(study: Federation, message: AdapterState, number: int = 1, **standing: Any) -> str:
    """Return the code of a refusal that cost nothing and trained nothing."""
    answer = asked(study, message, number, **standing)
    assert isinstance(answer, Refusal)
    assert study.trainings == []
    assert charged_rounds(study.sites / SITE / f"{SITE}.journal") == []
    return answer.code


def factor(study: Federation, which: int) -> State:
    """Return one layer's A (0) or B (1), of ones: what no machine has drawn."""
    spec = study.merging.layout.pairs[0][which]
    return {spec.name: np.ones(spec.shape, np.float32)}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_the_plans_algorithm_sends_is_answered(shop: Workshop, name: str) -> None:
    study = shop.make(f"aggregation.algorithm={name}")
    assert isinstance(asked(study, first_message(study)), Update)


Twist = Callable[[Federation, State], State]


def nan(message: State) -> State:
    first, *rest = message
    return {first: np.full_like(message[first], np.nan), **{name: message[name] for name in rest}}


def plus(*which: int) -> Twist:
    """Add one layer's A (0), its B (1), or both."""
    return lambda study, message: {
        **message,
        **{name: array for at in which for name, array in factor(study, at).items()},
    }


def moved(*which: int) -> Twist:
    """Add an increment of one layer's base with these factors of it."""
    return lambda study, message: {
        **message,
        **{f"drift/{name}": array for at in which for name, array in factor(study, at).items()},
    }


_STRANGER = {"drift/x.lora_A.weight": np.ones((2, 2), np.float32)}
_CASES: list[tuple[str, list[str], Twist, str]] = [
    ("a frozen A", ["aggregation.algorithm=ffa"], plus(0), "unknown-key"),
    ("a frozen A", ["aggregation.algorithm=fedsb"], plus(0), "unknown-key"),
    ("a frozen B", ["aggregation.algorithm=fedsb"], plus(1), "unknown-key"),
    ("a site's own B", ["aggregation.algorithm=fedsa"], plus(1), "unknown-key"),
    ("a fresh A", ["aggregation.algorithm=flora"], plus(0), "unknown-key"),
    ("a pair before any round", ["aggregation.algorithm=rolora"], plus(0, 1), "unknown-key"),
    ("a site's own head", ["aggregation.local_head=true"], lambda study, m: {**m, **head_of(study)}, "unknown-key"),
    ("no variates", ["training.variates=scaffold"], lambda _, m: without(m, "variate/"), "missing-key"),
    ("variates unasked", [], lambda _, m: {**m, **{f"variate/{name}": m[name] for name in m}}, "unknown-key"),
    ("an increment unasked", [], moved(0, 1), "unknown-key"),
    ("half an increment", ["aggregation.algorithm=flora"], moved(0), "missing-key"),
    ("an increment of no layer", ["aggregation.algorithm=fedex"], lambda _, m: {**m, **_STRANGER}, "unknown-key"),
    ("a rank too high", ["aggregation.algorithm=fedex"], lambda study, m: {**m, **ranked(study, 17)}, "wrong-shape"),
    ("another rank", [], lambda _, m: {name: np.repeat(m[name], 2, axis=0) for name in m}, "wrong-shape"),
    ("a bare adapter", ["aggregation.algorithm=fedsb"], lambda study, _: dict(study.merging.initial), "unknown-key"),
]


def head_of(study: Federation) -> State:
    return {name: array for name, array in study.merging.initial.items() if "lora" not in name}


def without(message: State, prefix: str) -> State:
    return {name: array for name, array in message.items() if not name.startswith(prefix)}


def ranked(study: Federation, rank: int) -> State:
    A, B = study.merging.layout.pairs[0]
    return {
        f"drift/{A.name}": np.ones((rank, A.shape[1]), np.float32),
        f"drift/{B.name}": np.ones((B.shape[0], rank), np.float32),
    }


@pytest.mark.parametrize(
    ("words", "twist", "code"), [case[1:] for case in _CASES], ids=[" ".join([c[0], *c[1]]) for c in _CASES]
)
def test_what_it_does_not_send_is_refused_before_a_record_is_read(
    shop: Workshop, words: list[str], twist: Twist, code: str
) -> None:
    study = shop.make(*words)
    assert refused(study, twist(study, first_message(study))) == f"message.{code}"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_number_that_is_none_is_refused(shop: Workshop, name: str) -> None:
    study = shop.make(f"aggregation.algorithm={name}")
    assert refused(study, nan(first_message(study, 2)), 2) == "aggregation.not-finite"


@pytest.mark.parametrize("words", [["aggregation.algorithm=flora"], ["training.variates=scaffold"]], ids=" ".join)
def test_so_is_one_among_increments_and_variates(shop: Workshop, words: list[str]) -> None:
    study = shop.make(*words)
    message = {**first_message(study), **(ranked(study, 2) if "flora" in words[0] else {})}
    marked = [name for name in message if name.startswith(("drift/", "variate/"))]
    message[marked[0]] = np.full_like(message[marked[0]], np.inf)
    assert refused(study, message) == "aggregation.not-finite"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_site_asked_twice_answers_alike_whatever_was_asked_between(shop: Workshop, name: str) -> None:
    study = shop.make(f"aggregation.algorithm={name}", "aggregation.upload=int8")
    message = first_message(study)
    first = asked(study, message)
    moved = {key: array + np.float32(0.01) for key, array in message.items()}
    asked(study, moved)
    again = asked(study, message)
    assert isinstance(first, Update)
    assert isinstance(again, Update)
    assert same(first.state, again.state)


@pytest.mark.parametrize("name", ["flora", "fedex", "rolora"])
def test_a_message_on_top_of_a_kept_state_needs_that_state(shop: Workshop, name: str) -> None:
    study = shop.make(f"aggregation.algorithm={name}")
    assert refused(study, first_message(study), base="ab" * 16) == "message.lacks-state"


@pytest.mark.parametrize("name", ["flora", "fedex"])
def test_increments_that_come_in_two_messages_are_those_that_come_in_one(shop: Workshop, name: str) -> None:
    """A site that is sent one round on top of another holds what one that is sent both at once holds."""
    study = shop.make(f"aggregation.algorithm={name}", "federation.rounds=4")
    generator, merging = np.random.default_rng(0), study.merging
    memory: State = {}
    for number in (1, 2):
        for A, B in merging.layout.pairs:
            memory[f"drift/{number:06d}/{A.name}"] = generator.standard_normal((3, A.shape[1])).astype(np.float32)
            memory[f"drift/{number:06d}/{B.name}"] = generator.standard_normal((B.shape[0], 3)).astype(np.float32)
    state = replace(merging.start(), memory=memory)
    early = replace(state, memory={key: array for key, array in memory.items() if "000001" in key})
    send, layout = merging.algorithm.server.send, merging.layout
    asked(study, send(layout, Turn(2), early, 0), 2, mark="aa" * 16)
    asked(study, send(layout, Turn(3), state, 1), 3, since=1, base="aa" * 16, mark="bb" * 16)
    asked(study, send(layout, Turn(3), state, 0), 3, mark="cc" * 16)
    step, at_once = (one.start for one in study.trainings[-2:])
    assert same(step, at_once)


def test_a_site_that_trains_leaves_the_base_as_it_was_for_the_next(shop: Workshop) -> None:
    """All sites of a simulation share one model in memory."""
    study = shop.make("aggregation.algorithm=flora")
    workspace = open_workspace(study.plan, study.machine)
    workspace.load(workspace.initial)
    before = {
        name: tensor.detach().clone() for name, tensor in workspace.model.state_dict().items() if "lora" not in name
    }
    asked(study, {**first_message(study), **ranked(study, 2)})
    changed = {
        name
        for name, tensor in workspace.model.state_dict().items()
        if name in before and not tensor.equal(before[name])
    }
    assert any("base_layer" in name for name in changed)
    workspace.load(workspace.initial)
    after = {name: tensor for name, tensor in workspace.model.state_dict().items() if name in before}
    assert all(after[name].equal(before[name]) for name in before if "head" not in name)
