import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedtune.config.schema import PartitionSettings
from fedtune.data.partitions import partition, split_holdout, units_at_several_sites
from fedtune.data.units import Units
from fedtune.errors import DataError

ALL = Units.each_record(10_001)
SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def dealt_out(chosen: PartitionSettings, **given_: Any) -> Any:
    """Return the partition, or None where the draws leave a site empty: that is refused, never returned."""
    try:
        return partition(chosen, **given_)
    except DataError as error:
        if chosen.scheme in {"iid", "column"} or error.code != "data.empty-site":
            raise
        return None


@settings(max_examples=150, deadline=None)
@given(
    scheme=st.sampled_from(["iid", "dirichlet", "quantity", "column"]),
    rows=st.integers(1, 300),
    sites=st.integers(1, 12),
    alpha=st.floats(0.01, 1000),
    seed=st.integers(0, 2**63 - 1),
    classes=st.integers(1, 9),
)
def test_every_row_belongs_to_exactly_one_site(
    scheme: Any, rows: int, sites: int, alpha: float, seed: int, classes: int
) -> None:
    assume(rows >= sites)
    labels = [str(row % classes) for row in range(rows)]
    column = [f"bank {row % sites}" for row in range(rows)]
    chosen = PartitionSettings(scheme=scheme, alpha=alpha, column="bank")
    parts = dealt_out(chosen, units=Units.each_record(rows), labels=labels, column=column, sites=sites, seed=seed)
    assume(parts is not None)
    dealt = np.concatenate([part.rows for part in parts])
    assert np.array_equal(np.sort(dealt), np.arange(rows))
    assert len(parts) == sites
    assert len({part.name for part in parts}) == sites
    for part in parts:
        assert SITE_NAME.fullmatch(part.name)
        assert part.rows.dtype == np.int64
        assert np.all(np.diff(part.rows) > 0)
        assert len(part.rows) >= min(2, rows // sites)


@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "quantity"])
def test_the_same_seed_deals_the_same_and_another_deals_otherwise(scheme: Any) -> None:
    def deal(seed: int) -> list[list[int]]:
        labels = [str(row % 5) for row in range(500)]
        chosen, units = PartitionSettings(scheme=scheme), Units.each_record(500)
        parts = partition(chosen, units=units, labels=labels, sites=4, seed=seed)
        return [part.rows.tolist() for part in parts]

    assert deal(7) == deal(7)
    assert deal(7) != deal(8)


def test_the_deal_is_the_same_on_every_machine() -> None:
    parts = partition(PartitionSettings(), units=Units.each_record(10), sites=3, seed=0)
    assert [(part.name, part.rows.tolist()) for part in parts] == [
        ("site-001", [3, 6, 7, 9]),
        ("site-002", [2, 4, 8]),
        ("site-003", [0, 1, 5]),
    ]


def test_iid_sites_are_of_equal_size() -> None:
    sizes = [len(part.rows) for part in partition(PartitionSettings(), units=Units.each_record(103), sites=10, seed=1)]
    assert max(sizes) - min(sizes) == 1


def test_a_small_alpha_skews_labels_and_a_large_one_does_not() -> None:
    labels = [str(row % 10) for row in range(5000)]

    def largest_share(alpha: float) -> float:
        chosen = PartitionSettings(scheme="dirichlet", alpha=alpha)
        parts = partition(chosen, units=Units.each_record(5000), labels=labels, sites=5, seed=3)
        shares = [Counter(labels[row] for row in part.rows).most_common(1)[0][1] / len(part.rows) for part in parts]
        return float(np.mean(shares))

    assert largest_share(1000.0) < 0.13
    assert largest_share(0.1) > 0.3


def test_quantity_skew_varies_sizes_and_keeps_the_label_mix() -> None:
    labels = [str(row % 2) for row in range(20_000)]
    chosen = PartitionSettings(scheme="quantity", alpha=1.0)
    parts = partition(chosen, units=Units.each_record(20_000), labels=labels, sites=5, seed=2)
    sizes = [len(part.rows) for part in parts]
    assert max(sizes) > 2 * min(sizes)
    for part in parts:
        if len(part.rows) > 1000:
            assert abs(np.mean([labels[row] == "1" for row in part.rows]) - 0.5) < 0.06


def test_natural_sites_are_named_after_their_values() -> None:
    column = ["Zürich Bank", "bank-a", "Bank A", "", "Zürich Bank"]
    chosen = PartitionSettings(scheme="column", column="bank")
    parts = partition(chosen, units=Units.each_record(5), column=column, sites=4, seed=0)
    assert {part.name: part.rows.tolist() for part in parts} == {
        "site": [3],
        "bank-a": [2],
        "bank-a-2": [1],
        "zurich-bank": [0, 4],
    }


@pytest.mark.parametrize(
    ("settings_", "given_", "code", "says"),
    [
        ({}, {"units": 3, "sites": 4}, "more-sites-than-records", "3"),
        ({"scheme": "column", "column": "b"}, {"units": 9, "sites": 2, "column": [*"aabbccab"]}, "sites-mismatch", "3"),
        ({"scheme": "column"}, {"units": 9, "sites": 2}, "no-partition-column", "column"),
        ({"scheme": "dirichlet"}, {"units": 9, "sites": 2}, "no-labels", "quantity"),
        (
            {"scheme": "dirichlet", "alpha": 1e-4},
            {"units": 100, "sites": 20, "labels": ["a", "b"] * 50},
            "empty-site",
            "alpha",
        ),
        ({"scheme": "quantity", "alpha": 1e-4}, {"units": 100, "sites": 20}, "empty-site", "alpha"),
    ],
)
def test_an_impossible_deal_is_an_error_that_says_what_would_work(
    settings_: dict[str, Any], given_: dict[str, Any], code: str, says: str
) -> None:
    with pytest.raises(DataError) as caught:
        partition(PartitionSettings(**settings_), seed=0, **{**given_, "units": Units.each_record(given_["units"])})
    assert caught.value.code == f"data.{code}"
    assert says in caught.value.hint


@settings(max_examples=100, deadline=None)
@given(
    rows=st.sets(st.integers(0, 10_000), min_size=1, max_size=80),
    fraction=st.floats(0, 0.99),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_holdout_splits_a_sites_rows_and_leaves_one_to_train_on(rows: set[int], fraction: float, seed: int) -> None:
    own = np.array(sorted(rows), np.int64)
    train, held = split_holdout(own, ALL, fraction, seed, "site-001")
    assert sorted([*train, *held]) == own.tolist()
    assert len(train) >= 1
    assert len(held) == min(int(fraction * len(own) + 0.5), len(own) - 1)
    assert np.all(np.diff(train) > 0)
    again = split_holdout(own[::-1], ALL, fraction, seed, "site-001")
    assert np.array_equal(again[0], train)


def test_no_holdout_keeps_every_row() -> None:
    train, held = split_holdout(np.arange(10, dtype=np.int64), ALL, 0.0, 5, "site-001")
    assert (train.tolist(), held.tolist()) == (list(range(10)), [])


def test_two_sites_do_not_hold_out_the_same_places() -> None:
    rows = np.arange(1000, dtype=np.int64)
    _, one = split_holdout(rows, ALL, 0.2, 0, "site-001")
    _, two = split_holdout(rows, ALL, 0.2, 0, "site-002")
    assert 0 < len(np.intersect1d(one, two)) < 120


# --- units of several records ---------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    scheme=st.sampled_from(["iid", "dirichlet", "quantity"]),
    owners=st.lists(st.integers(0, 30), min_size=4, max_size=120),
    sites=st.integers(1, 4),
    fraction=st.floats(0, 0.9),
    seed=st.integers(0, 2**63 - 1),
)
def test_no_unit_is_at_two_sites_or_on_both_sides_of_a_split(
    scheme: Any, owners: list[int], sites: int, fraction: float, seed: int
) -> None:
    assume(len(set(owners)) >= sites)
    units, labels = Units.grouped(np.array(owners)), [str(row % 3) for row in range(len(owners))]
    parts = dealt_out(PartitionSettings(scheme=scheme, alpha=5.0), units=units, labels=labels, sites=sites, seed=seed)
    assume(parts is not None)
    assert sorted(row for part in parts for row in part.rows) == list(range(len(owners)))
    assert units_at_several_sites(parts, units) == 0
    for part in parts:
        train, held = split_holdout(part.rows, units, fraction, seed, part.name)
        of_train, of_held = ({owners[row] for row in side} for side in (train, held))
        assert sorted([*train, *held]) == part.rows.tolist()
        assert not of_train & of_held
        present = len(of_train) + len(of_held)
        assert len(of_held) == min(int(fraction * present + 0.5), present - 1)
    seen = [{owners[row] for row in part.rows} for part in parts]
    assert sum(map(len, seen)) == len(set(owners))


def test_iid_sites_have_equally_many_units_however_many_records_those_have() -> None:
    units = Units.grouped(["big"] * 1000 + [f"small {n}" for n in range(11)])
    parts = partition(PartitionSettings(), units=units, sites=4, seed=0)
    assert [units.take(part.rows).count for part in parts] == [3, 3, 3, 3]
    assert max(len(part.rows) for part in parts) > 1000


def test_a_small_alpha_skews_the_units_most_frequent_labels() -> None:
    owners = np.repeat(np.arange(500), 4)
    labels = [str(owner % 5 if turn else "other") for owner in range(500) for turn in range(4)]
    chosen = PartitionSettings(scheme="dirichlet", alpha=0.1)
    parts = partition(chosen, units=Units.grouped(owners), labels=labels, sites=4, seed=2)
    main = [Counter(labels[row] for row in part.rows if labels[row] != "other") for part in parts]
    shares = [count.most_common(1)[0][1] / count.total() for count in main]
    assert np.mean(shares) > 0.4  # in the whole file each label has a fifth


def test_by_column_a_unit_may_be_at_two_sites_and_is_counted() -> None:
    column, owners = [*"aabbcc"], ["p", "q", "p", "r", "s", "p"]
    units = Units.grouped(owners)
    parts = partition(PartitionSettings(scheme="column", column="bank"), units=units, column=column, sites=3, seed=0)
    assert units_at_several_sites(parts, units) == 1  # p stands at a, b and c


def test_more_sites_than_units_are_refused_however_many_records_there_are() -> None:
    with pytest.raises(DataError, match="2 units cannot be dealt out to 3 sites"):
        partition(PartitionSettings(), units=Units.grouped(["a"] * 50 + ["b"] * 50), sites=3, seed=0)
