"""One study for all tests of a site's authority: its plan and model are made once, each site is a folder of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.crashes import Clients
from tests.support.sites import RealSite, Study, make_site, make_study

MakeStudy = Callable[..., Study]
MakeSite = Callable[..., RealSite]


@pytest.fixture(scope="session")
def make_other_study(tmp_path_factory: pytest.TempPathFactory) -> MakeStudy:
    """Make a study, once for the same settings."""
    made: dict[str, Study] = {}

    def make(**keys: Any) -> Study:
        name = repr(sorted(keys.items()))
        if name not in made:
            made[name] = make_study(tmp_path_factory.mktemp("study"), **keys)
        return made[name]

    return make


@pytest.fixture(scope="session")
def study(make_other_study: MakeStudy) -> Study:
    """A study of many rounds of one step, so that its budget is no matter."""
    return make_other_study(federation__rounds=400, training__local_steps=1, privacy__noise_multiplier=3.0)


@pytest.fixture
def make_a_site(tmp_path: Path, study: Study) -> MakeSite:
    """Make a site; `study=` asks for another than the usual one, other keys are `make_site`'s."""

    def make(name: str = "site", **keys: Any) -> RealSite:
        return make_site(tmp_path / name, keys.pop("study", study), **keys)

    return make


@pytest.fixture
def site(make_a_site: MakeSite) -> RealSite:
    """A site with a grant for everything the study asks."""
    return make_a_site()


@pytest.fixture(scope="session")
def clients(study: Study) -> Iterator[Clients]:
    """Client processes of the study."""
    started = Clients(study)
    yield started
    started.close()
