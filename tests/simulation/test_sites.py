from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.config.compose import compose
from fedtune.errors import DataError, RunError
from fedtune.model.build import load_tokenizer
from fedtune.simulation.resolve import Resolved, resolve
from fedtune.simulation.sites import DealtData, dealt, file_examples
from tests.support.runs import Study


def deal(study: Study, *changes: str) -> tuple[Resolved, DealtData]:
    resolved = resolve(compose(study.words(*changes)))
    return resolved, dealt(resolved.plan.json_text, resolved.machine, load_tokenizer(resolved.base))


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["data.partition.scheme=dirichlet"],
        ["data.partition.scheme=quantity"],
        ["data.partition.scheme=column", "data.partition.column=category", "federation.sites=2"],
        ["data.limit=31"],
        ["data.holdout=0"],
    ],
)
def test_every_record_is_at_one_site_and_on_one_side_of_its_split(study: Study, changes: list[str]) -> None:
    resolved, found = deal(study, *changes)
    rows = [row for _, train, held_out in found.deal.sites for row in (*train, *held_out)]
    assert sorted(rows) == list(range(len(found.examples)))
    assert [name for name, _, _ in found.deal.sites] == [site.name for site in resolved.sites]
    for index, size in enumerate(resolved.sites):
        site = found.site(index)
        assert (site.name, len(site.held_out)) == (size.name, size.held_out)
        assert len(site.train) == pytest.approx(size.units, rel=0.05)


def test_every_process_deals_the_same_records(study: Study) -> None:
    first = deal(study, "data.partition.scheme=dirichlet")[1]
    dealt.cache_clear()
    second = deal(study, "data.partition.scheme=dirichlet")[1]
    assert first is not second
    assert first.sha256 == second.sha256
    for one, other in zip(first.deal.sites, second.deal.sites, strict=True):
        assert one[0] == other[0]
        assert one[1].tolist() == other[1].tolist()


def test_another_seed_deals_them_differently(study: Study) -> None:
    first, second = deal(study)[1], deal(study, "seed=1")[1]
    assert first.sha256 == second.sha256
    assert any(a[1].tolist() != b[1].tolist() for a, b in zip(first.deal.sites, second.deal.sites, strict=True))


def test_a_run_without_a_file_says_what_to_name(study: Study) -> None:
    resolved, _ = deal(study)
    lost = resolved.machine.model_copy(update={"data_path": None})
    with pytest.raises(RunError, match="names no data file"):
        dealt(resolved.plan.json_text, lost, load_tokenizer(resolved.base))


def test_a_file_that_is_gone_is_an_error(study: Study) -> None:
    resolved, _ = deal(study)
    lost = resolved.machine.model_copy(update={"data_path": str(study.folder / "gone.csv")})
    with pytest.raises(DataError, match=r"gone\.csv"):
        dealt(resolved.plan.json_text, lost, load_tokenizer(resolved.base))


def test_a_test_file_keeps_its_order_and_needs_the_labels_of_training(study: Study, tmp_path: Path) -> None:
    resolved, _ = deal(study)
    tokenizer = load_tokenizer(resolved.base)
    file = tmp_path / "test.csv"
    file.write_text("category,text\ncash,a\ncard,bb\ncash,ccc\n")
    examples = file_examples(resolved.plan, str(file), tokenizer)
    assert [len(example.input_ids) for example in examples] == [2, 3, 4]
    file.write_text("category,text\ncheque,a\n")
    with pytest.raises(DataError, match="'cheque'"):
        file_examples(resolved.plan, str(file), tokenizer)
