"""The table of what can be combined is the one that refuses plans."""

from __future__ import annotations

import re

from fedtune.aggregation.matrix import as_markdown
from tests.support.runs import ROOT

TABLE = re.compile(r"<!-- matrix: .*? -->\n(.*?)<!-- /matrix -->", re.DOTALL)


def test_the_documented_table_is_made_of_the_algorithms_traits() -> None:
    found = TABLE.search((ROOT / "docs" / "aggregation.md").read_text(encoding="utf-8"))
    assert found is not None
    assert found[1] == as_markdown()
