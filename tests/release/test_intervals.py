from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from fedtune.release.intervals import wilson


@given(data=st.data(), count=st.integers(1, 5000))
def test_the_interval_is_the_one_of_scipy(data: st.DataObject, count: int) -> None:
    hits = data.draw(st.integers(0, count))
    expected = binomtest(hits, count).proportion_ci(0.95, method="wilson")
    assert wilson(hits / count, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("share", "count"), [(0.5, 0), (-0.1, 5), (1.1, 5), (float("nan"), 5)])
def test_what_is_no_share_has_no_interval(share: float, count: int) -> None:
    with pytest.raises(ValueError, match="no share"):
        wilson(share, count)
