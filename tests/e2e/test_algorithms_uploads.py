"""Compressed updates in whole studies: what arrives is what was sent, as long as the codec says, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict

from fedtune.aggregation.assembly import codec_of
from fedtune.aggregation.lora.protocol import SiteState, Turn
from fedtune.aggregation.lora.registry import ALGORITHMS
from fedtune.flower.messages import Update, decode_update, encode_reply
from tests.support.whole import Federation, Letter, Reply, Workshop, workshop

SITE = "site-002"
INT8_STEPS = 127


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture
def shop(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    return workshop(tmp_path, monkeypatch, shared=folder)


def sent_by(study: Federation, number: int) -> list[Reply]:
    return [reply for reply in study.replies if reply.letter.number == number]


def said(study: Federation, reply: Reply) -> dict[str, np.ndarray]:
    """Return what a site meant to send, in full: the algorithm's message of what it trained."""
    letter = reply.letter
    one = study.trained_in(letter.number)[letter.site]
    changes = {f"variate/{name}": array for name, array in one.result.variate_change.items()}
    state = SiteState(one.state, {**letter.instruction.adapter, **changes})
    return dict(study.merging.algorithm.site.send(study.merging.layout, Turn(letter.number, letter.part), state))


def states(study: Federation) -> dict[Turn, Any]:
    """Return what the coordinator held before each exchange of round 2."""
    found = {Turn(2): study.state_after(1)}
    if study.merging.algorithm.traits.exchanges > 1:
        basis = next(letter for letter in study.letters if (letter.number, letter.part) == (2, 1))
        found[Turn(2, 1)] = replace(found[Turn(2)], memory=dict(basis.instruction.adapter))
    return found


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_arrives_is_what_was_sent_to_within_a_step_of_the_codec(shop: Workshop, name: str) -> None:
    """Both sides must take the difference from the same state, or a whole round's change would be added or lost."""
    study = shop.make(
        f"aggregation.algorithm={name}",
        "aggregation.upload=int8",
        "privacy.mode=off",
        "training.head_learning_rate=5",
        "federation.rounds=2",
    )
    study.run()
    before = states(study)
    for reply in sent_by(study, 2):
        turn = Turn(2, reply.letter.part)
        sending = study.merging.exchange(turn, before[turn])
        assert isinstance(reply.update, Update)
        arrived, meant = sending.read(0, reply.update.state), said(study, reply)
        assert arrived.keys() == meant.keys()
        for tensor in meant:
            change = meant[tensor] - sending.reference(0)[tensor]
            error = np.abs(arrived[tensor] - meant[tensor]).max()
            assert error <= np.abs(change).max() / INT8_STEPS * (1 + 1e-4) + 1e-7


@pytest.mark.parametrize(
    ("upload", "keep"),
    [
        ("bf16", 1.0),
        ("int4", 0.1),
        *(pytest.param(*more, marks=pytest.mark.slow) for more in [("fp16", 1.0), ("int8", 0.1), ("fp32", 0.1)]),
    ],
)
def test_the_new_adapter_is_the_mean_of_what_was_decoded(shop: Workshop, upload: str, keep: float) -> None:
    study = shop.make(f"aggregation.upload={upload}", f"aggregation.upload_keep={keep}", "federation.rounds=1")
    study.run()
    codec, layout = codec_of(study.plan.aggregation), study.merging.layout
    assert codec is not None
    sending = study.merging.exchange(Turn(1), study.merging.start())
    mean = dict.fromkeys(layout.names, 0.0)
    for reply in sent_by(study, 1):
        assert isinstance(reply.update, Update)
        decoded = sending.read(0, reply.update.state)
        mean = {name: mean[name] + study.weights[reply.letter.site] * decoded[name].astype(float) for name in mean}
    assert all(np.allclose(study.state.adapter[name], mean[name], rtol=1e-6, atol=1e-8) for name in mean)


@pytest.mark.parametrize(
    "words",
    [
        ["aggregation.upload=int4", "aggregation.upload_keep=0.1"],
        ["aggregation.upload=fp16"],
        ["aggregation.upload=int8", "aggregation.algorithm=fedask"],
        ["aggregation.upload=int8", "aggregation.algorithm=rolora"],
        ["aggregation.upload=int4", "training.variates=scaffold"],
        [],
    ],
    ids=" ".join,
)
def test_the_bytes_that_are_reported_are_those_of_the_wire_and_the_plan_has_told_them(
    shop: Workshop, words: list[str]
) -> None:
    study = shop.make(*words, "federation.rounds=2", "evaluation.site_metrics=off")
    study.run()
    codec, algorithm = codec_of(study.plan.aggregation), study.merging.algorithm
    for number, line in enumerate(study.lines(), 1):
        assert line["bytes_up"] == sum(reply.size for reply in sent_by(study, number))
        for site in study.weights:
            mine = [reply for reply in sent_by(study, number) if reply.letter.site == site]
            sizes = [sum(array.nbytes for array in reply.update.state.values()) for reply in mine]  # type: ignore[union-attr]
            ups = [algorithm.up(study.merging.layout, Turn(number, reply.letter.part)) for reply in mine]
            assert sizes == [4 * up.size if codec is None else sum(codec.lengths(up).values()) for up in ups]
            assert sum(sizes) <= study.plan.adapter.upload_bytes
    if "rolora" not in str(words):
        assert sum(sizes) == study.plan.adapter.upload_bytes


def test_what_feedback_keeps_is_all_that_has_not_arrived_yet(shop: Workshop) -> None:
    """Over all rounds: what was trained = what was decoded + what is still left at the site."""
    study = shop.make(
        "aggregation.upload=int4",
        "aggregation.upload_keep=0.05",
        "aggregation.error_feedback=true",
        "federation.rounds=2",
    )
    study.run()
    learnt = dict.fromkeys(study.merging.layout.names, 0.0)
    arrived = dict(learnt)
    for number, state in ((1, study.merging.start()), (2, study.state_after(1))):
        one = study.trained_in(number)[SITE]
        reply = next(reply for reply in sent_by(study, number) if reply.letter.site == SITE)
        assert isinstance(reply.update, Update)
        decoded = study.merging.exchange(Turn(number), state).read(0, reply.update.state)
        for name in learnt:
            learnt[name] = learnt[name] + (one.state[name].astype(float) - one.start[name])
            arrived[name] = arrived[name] + (decoded[name].astype(float) - one.start[name])
    left = study.kept_at(SITE, 2)
    assert any(np.any(array) for array in left.values())
    for name in learnt:
        assert np.allclose(learnt[name], arrived[name] + left[f"residual/{name}"], atol=1e-6)


# --- what no honest site sends --------------------------------------------------------------------------------------

Twist = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
_TWISTS: dict[str, tuple[Twist, str]] = {
    "cut short": (lambda sent: {name: array[:-1] for name, array in sent.items()}, "message.wrong-shape"),
    "one missing": (lambda sent: dict(list(sent.items())[1:]), "message.missing-key"),
    "one more": (lambda sent: {**sent, "more": np.zeros(1, np.uint8)}, "message.unknown-key"),
    "plain tensors": (
        lambda sent: {name: array.astype(np.float32) for name, array in sent.items()},
        "message.wrong-dtype",
    ),
    "of two dimensions": (lambda sent: {name: array[None] for name, array in sent.items()}, "message.wrong-shape"),
    "all ones": (
        lambda sent: {name: np.full_like(array, 255) for name, array in sent.items()},
        "message.wrong-encoding",
    ),
}


@pytest.mark.parametrize(
    "words",
    [
        ["aggregation.upload=int4", "aggregation.upload_keep=0.1"],
        pytest.param(["aggregation.upload=int8"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("twist", _TWISTS)
def test_bytes_that_no_encoder_writes_are_an_offence_and_end_no_round(
    shop: Workshop, twist: str, words: list[str]
) -> None:
    study = shop.make(*words, "federation.rounds=2")
    change, code = _TWISTS[twist]
    study.spoil = spoiling(study, change)
    summary = study.run()
    by_name = {site["name"]: site for site in summary["sites"]}
    assert [by_name[f"site-00{n}"]["rounds"] for n in (1, 2, 3)] == [2, 0, 2]
    assert by_name[SITE]["quarantine"] == code


def test_bytes_where_the_plan_says_plain_tensors_are_an_offence(shop: Workshop) -> None:
    study = shop.make("federation.rounds=2")
    study.spoil = spoiling(study, lambda sent: {name: array.astype(np.uint8) for name, array in sent.items()})
    summary = study.run()
    by_name = {site["name"]: site for site in summary["sites"]}
    assert by_name[SITE]["quarantine"] == "message.wrong-dtype"


def spoiling(study: Federation, change: Twist) -> Callable[[Letter, RecordDict], RecordDict]:
    def spoil(letter: Letter, content: RecordDict) -> RecordDict:
        if letter.site != SITE:
            return content
        update = decode_update(content, study.plan.sha256)
        assert isinstance(update, Update)
        return encode_reply(replace(update, state=change(dict(update.state))))

    return spoil


# --- SCAFFOLD -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["dp", "off"])
def test_the_common_variate_is_the_weighted_mean_of_the_sites_own_when_all_come(shop: Workshop, mode: str) -> None:
    study = shop.make("training.variates=scaffold", f"privacy.mode={mode}")
    study.run()
    own = {site: study.kept_at(site, 3) for site in study.weights}
    for name in study.merging.layout.names:
        mean = sum(study.weights[site] * own[site][f"own-variate/{name}"].astype(float) for site in own)
        assert np.allclose(study.state.memory[f"variate/{name}"], mean, rtol=1e-4, atol=1e-6)
        assert mode == "off" or np.any(mean)


def test_it_is_so_too_when_some_do_not_come(shop: Workshop) -> None:
    study = shop.make("training.variates=scaffold")
    study.meddle = lambda letter: "away" if (letter.site, letter.number) == (SITE, 2) else None
    study.run()
    own = {site: study.kept_at(site, 3) for site in study.weights}
    for name in study.merging.layout.names:
        mean = sum(study.weights[site] * own[site][f"own-variate/{name}"].astype(float) for site in own)
        assert np.allclose(study.state.memory[f"variate/{name}"], mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["dp", "off"])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_sites_variate_follows_the_papers_second_option_round_after_round(
    shop: Workshop, mode: str, steps: int
) -> None:
    """cᵢ⁺ = cᵢ − c + (x − y)/(K·η): under privacy too, so it is made of the noised gradients and of nothing else."""
    rate = 0.3
    study = shop.make(
        "training.variates=scaffold",
        f"privacy.mode={mode}",
        f"training.local_steps={steps}",
        f"training.learning_rate={rate}",
    )
    study.run()
    for number in (1, 2, 3):
        for site, one in study.trained_in(number).items():
            letter = next(letter for letter in study.letters_to(site) if letter.number == number)
            before = study.kept_at(site, number - 1) if number > 1 else {}
            for name in study.merging.layout.names:
                own = before.get(f"own-variate/{name}", np.zeros(1)).astype(float)
                moved = (one.start[name].astype(float) - one.state[name]) / (steps * rate)
                wanted = own - letter.instruction.adapter[f"variate/{name}"] + moved
                assert np.allclose(one.result.variate[name], wanted, atol=2e-5)


def test_one_step_of_everybody_is_plain_averaging(shop: Workshop) -> None:
    """With K = 1 and all sites the corrections sum to zero: the mean of y is that of plain SGD from the same x."""
    rate, study = 0.3, shop.make("training.variates=scaffold", "training.local_steps=1", "federation.rounds=2")
    study.run()
    trained = study.trained_in(2)
    for name in study.merging.layout.names:
        gradient = sum(study.weights[site] * one.result.variate[name].astype(float) for site, one in trained.items())
        start = trained[SITE].start[name].astype(float)
        assert np.allclose(study.state.adapter[name], start - rate * gradient, atol=1e-5)
