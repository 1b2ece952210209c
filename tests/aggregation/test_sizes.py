"""What a round trains and sends, counted from layouts: equal to what the algorithms' own messages hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedtune.aggregation.assembly import assemble
from fedtune.aggregation.compression.codec import make_codec
from fedtune.aggregation.lora.gather import Collector
from fedtune.aggregation.lora.protocol import Algorithm, Options, SiteState, Turn
from fedtune.aggregation.lora.registry import ALGORITHMS, get_algorithm
from fedtune.aggregation.lora.variates import with_variates
from fedtune.aggregation.sizes import sizes_of
from fedtune.config.schema import AggregationSettings, LoraSettings, TrainingSettings
from fedtune.model.layout import AdapterLayout
from fedtune.privacy.random import SeededSource
from tests.aggregation.lora.world import PLAIN, initial, layout_of
from tests.support.whole import workshop

LAYOUT = layout_of({"h.wide": (2, 11, 30), "h.tall": (2, 40, 9)})
SITES = 3
A, B, HEAD = 2 * (11 + 40), 2 * (30 + 9), 15
every = pytest.mark.parametrize("name", ALGORITHMS)


def sent(algorithm: Algorithm, layout: AdapterLayout) -> tuple[list[int], list[int]]:
    """Run two rounds; return the numbers that a site sends and is sent in each."""
    state, up, down = algorithm.server.start(PLAIN, layout, initial(layout)), [], []
    held = algorithm.site.start(layout, initial(layout))
    for number in (1, 2):
        up.append(0)
        down.append(0)
        for part in range(algorithm.traits.exchanges):
            turn = Turn(number, part)
            message = algorithm.server.send(
                layout, turn, state, max(0, number - 2) if algorithm.traits.incremental else 0
            )
            begun = algorithm.site.receive(layout, turn, held, message)
            held = SiteState(begun.adapter, {**held.memory, **begun.memory})
            reply = algorithm.site.send(layout, turn, begun)
            up[-1] += sum(array.size for array in reply.values())
            down[-1] += sum(array.size for array in message.values())
            collector = Collector(algorithm.averaged(layout, turn), algorithm.stacked(layout, turn))
            for at in range(SITES):
                noise = np.random.default_rng(at)
                moved = {
                    key: (array + noise.standard_normal(array.shape)).astype(np.float32) for key, array in reply.items()
                }
                collector.add(f"site-{at}", moved, 1.0)
            state = algorithm.server.receive(PLAIN, layout, turn, state, collector.result())
    return up, down


@every
def test_a_site_sends_what_the_plan_says_in_the_largest_round(name: str) -> None:
    algorithm = get_algorithm(name)
    up, down = sent(algorithm, LAYOUT)
    sizes = sizes_of(algorithm, None, LAYOUT, SITES)
    assert sizes.upload == max(up)
    assert sizes.upload_bytes == 4 * max(up)
    assert sizes.download >= max(down)
    if not algorithm.traits.changes_base:
        assert sizes.download == max(down)


def test_the_numbers_are_those_of_the_table_of_algorithms() -> None:
    """P up and down for `fedit`, half of it for a frozen factor, r² for a core, ΣP down for a stack."""
    found = {name: sizes_of(get_algorithm(name), None, LAYOUT, SITES) for name in ALGORITHMS}
    assert {name: one.upload for name, one in found.items() if name not in {"fedask", "rolora"}} == {
        "fedit": A + B + HEAD,
        "ffa": B + HEAD,
        "fedsvd": B + HEAD,
        "fedsa": A + HEAD,
        "flora": A + B + HEAD,
        "fedex": A + B + HEAD,
        "flexlora": A + B + HEAD,
        "hetlora": A + B + HEAD,
        "fedsb": 2 * 4 + HEAD,
    }
    assert found["rolora"].upload == found["rolora"].trained == max(A, B) + HEAD
    assert found["fedsvd"].download == A + B + HEAD
    assert found["flora"].download == SITES * (A + B) + HEAD
    assert found["fedsa"].trained == A + B + HEAD
    sketch = (30 + 9) * (2 + 8) - 9 * 1  # Q has no more columns than rows
    assert found["fedask"].upload == (30 + 9) * 10 + 11 * 10 + 40 * 9 + HEAD
    assert found["fedask"].download == A + B + HEAD + sketch


@pytest.mark.parametrize(("upload", "keep"), [("fp16", 1.0), ("int8", 1.0), ("int4", 0.1)])
@every
def test_bytes_are_those_of_what_an_encoder_writes(name: str, upload: str, keep: float) -> None:
    algorithm, codec = get_algorithm(name), make_codec(upload, keep)
    sizes = sizes_of(algorithm, codec, LAYOUT, SITES)
    written = []
    for number in (1, 2):
        total = 0
        for part in range(algorithm.traits.exchanges):
            up = algorithm.up(LAYOUT, Turn(number, part))
            zeros = {spec.name: np.zeros(spec.shape, np.float32) for spec in up.tensors}
            payload, _ = codec.encode(zeros, zeros, up, {}, SeededSource("x", 1))
            total += sum(array.nbytes for array in payload.arrays.values())
        written.append(total)
    assert sizes.upload_bytes == max(written)


def test_variates_double_what_is_trained_and_sent_both_ways() -> None:
    bare, beside = (
        sizes_of(one, None, LAYOUT, SITES) for one in (get_algorithm("fedit"), with_variates(get_algorithm("fedit")))
    )
    assert (beside.upload, beside.download, beside.trained) == (2 * bare.upload, 2 * bare.download, bare.trained)


def test_a_head_that_stays_is_trained_and_not_sent() -> None:
    words = AggregationSettings(local_head=True), TrainingSettings(), LoraSettings(rank=2)
    sizes = sizes_of(assemble(*words, 0), None, LAYOUT, SITES)
    assert (sizes.trained, sizes.upload, sizes.download) == (A + B + HEAD, A + B, A + B)


def test_both_factors_of_fedask_can_be_trained() -> None:
    one, both = (
        sizes_of(get_algorithm("fedask", Options(train_both=said)), None, LAYOUT, SITES) for said in (False, True)
    )
    assert (one.trained, both.trained) == (B + HEAD, A + B + HEAD)
    assert one.upload == both.upload


@pytest.mark.parametrize(
    "words",
    [["aggregation.algorithm=rolora"], ["aggregation.algorithm=fedsb"], ["aggregation.upload=int4"]],
    ids=" ".join,
)
def test_the_plan_says_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    study = workshop(tmp_path, monkeypatch).make(*words)
    algorithm, codec = study.merging.algorithm, study.merging.codec
    sizes = sizes_of(algorithm, codec, study.merging.layout, 3)
    said = study.plan.adapter
    assert (said.trained, said.upload, said.upload_bytes, said.download) == (
        sizes.trained,
        sizes.upload,
        sizes.upload_bytes,
        sizes.download,
    )
    assert said.numbers == study.merging.layout.size
