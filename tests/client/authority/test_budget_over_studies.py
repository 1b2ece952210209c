"""One budget over all studies on a data set, kept by the journal alone; and journals that were put back."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.journal.witness import Receipt
from fedtune.privacy.plan import PrivacyPlan
from tests.client.authority.conftest import MakeSite, MakeStudy
from tests.support.opens import opened_files
from tests.support.sites import NAME, RealSite, Study, content_of

STUDIES = 3
ROUNDS = 3
STEPS = 2
COORDINATOR = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


@pytest.fixture
def studies(make_other_study: MakeStudy) -> list[Study]:
    """Studies that differ in nothing but their names, one more than the budget is for."""
    return [make_other_study(study__name=f"study-{name}", federation__rounds=ROUNDS) for name in range(STUDIES + 1)]


def independent(promise: PrivacyPlan, steps: int) -> float:
    """ε of so many steps, with nothing of this project's accounting."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
    from dp_accounting.pld import PLDAccountant

    step = PoissonSampledDpEvent(promise.sampling_rate, GaussianDpEvent(promise.noise_multiplier))
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    return float(accountant.compose(SelfComposedDpEvent(step, steps)).get_epsilon(promise.delta))


def spent(site: RealSite) -> tuple[int, float]:
    """Steps and ε of the data set's account, by the journal that is on disk."""
    spending = site.open().journal.state.spending
    data = spending.latest(NAME)
    assert data is not None
    found = spending.spent(data)
    return sum(event.steps for event in found.events), found.epsilon(site.study.plan.promise.delta)


@pytest.fixture
def used_up(make_a_site: MakeSite, studies: list[Study]) -> RealSite:
    """A site that three studies have brought to its lifetime cap."""
    cap = independent(studies[0].plan.promise, STUDIES * ROUNDS * STEPS) * 1.005
    site = make_a_site(study=studies[0], data__claims__lifetime_epsilon=cap)
    for study in studies[:STUDIES]:
        for number in range(1, ROUNDS + 1):
            site.update(number, study=study)
    return site


def test_three_studies_compose_and_a_fourth_that_would_pass_the_cap_is_refused(
    used_up: RealSite, studies: list[Study]
) -> None:
    steps, epsilon = spent(used_up)
    promise = studies[0].plan.promise
    assert steps == STUDIES * ROUNDS * STEPS
    assert epsilon == pytest.approx(independent(promise, steps), rel=5e-3)
    assert epsilon < STUDIES * promise.epsilon  # composed from events, not added up
    with opened_files() as opened:
        assert used_up.refusal(1, study=studies[STUDIES]) == "ledger.over-cap"
    assert str(used_up.data) not in opened
    assert used_up.entries("plan-refused")[-1]["reasons"] == ["ledger.over-cap"]
    assert spent(used_up) == (steps, epsilon)


def test_the_budget_is_the_journal_s_whatever_else_is_lost(used_up: RealSite, studies: list[Study]) -> None:
    before = spent(used_up)
    last = content_of(used_up.ask("train", ROUNDS, study=studies[STUDIES - 1]).content)
    kept = {used_up.journal.name, "vault", "site.yaml", used_up.data.name}
    for path in used_up.path.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    used_up.restart()
    assert spent(used_up) == before
    assert used_up.refusal(1, study=studies[STUDIES]) == "ledger.over-cap"
    assert content_of(used_up.ask("train", ROUNDS, study=studies[STUDIES - 1]).content) == last
    assert spent(used_up) == before


def test_a_journal_that_is_gone_ends_everything(used_up: RealSite, studies: list[Study]) -> None:
    used_up.journal.unlink()
    assert used_up.restart().refusal(1, study=studies[STUDIES]) == "config.no-journal"


# --- put back -------------------------------------------------------------------------------------------------------


class PutBack:
    """A site whose journal is put back to before its second round, with its own heads or without."""

    def __init__(self, site: RealSite) -> None:
        self.site = site
        self.receipt = Receipt.of(site.update(1).head, COORDINATOR)
        self.copies = {path: path.read_bytes() for path in (site.journal, site.folder.heads_file) if path.exists()}
        self.receipt = Receipt.of(site.update(2, receipt=self.receipt).head, COORDINATOR)
        site.update(3, receipt=self.receipt)
        self.charged = site.charged

    def restore(self, *paths: Path) -> None:
        for path in paths:
            if path in self.copies:
                path.write_bytes(self.copies[path])
            else:
                path.unlink()
        assert self.site.charged < self.charged
        self.site.restart()


@pytest.fixture
def put_back(site: RealSite) -> PutBack:
    return PutBack(site)


def test_a_journal_put_back_is_refused_by_the_heads_beside_it(put_back: PutBack) -> None:
    put_back.restore(put_back.site.journal)
    assert put_back.site.refusal(3) == "journal.rolled-back"
    assert put_back.site.charged == 1


def test_a_journal_put_back_with_its_heads_is_refused_by_the_coordinators_receipt(put_back: PutBack) -> None:
    put_back.restore(put_back.site.journal, put_back.site.folder.heads_file)
    assert put_back.site.refusal(3, receipt=put_back.receipt) == "journal.rolled-back"
    assert put_back.site.charged == 1
    assert put_back.site.journal.read_bytes() == put_back.copies[put_back.site.journal]


def test_control_without_any_receipt_a_journal_put_back_forgets_what_was_spent(put_back: PutBack) -> None:
    put_back.restore(put_back.site.journal, put_back.site.folder.heads_file)
    put_back.site.update(3)
    assert put_back.site.charged == 2 < put_back.charged


def test_a_journal_put_back_that_has_grown_again_is_refused(put_back: PutBack) -> None:
    put_back.restore(put_back.site.journal, put_back.site.folder.heads_file)
    for number in range(3, 9):
        put_back.site.update(number)
    assert put_back.site.charged > put_back.charged
    assert put_back.site.refusal(9, receipt=put_back.receipt) == "journal.rolled-back"


def test_the_newest_copy_put_back_in_its_place_goes_on(put_back: PutBack) -> None:
    newest = put_back.site.journal.read_bytes()
    put_back.restore(put_back.site.journal)
    assert put_back.site.refusal(4) == "journal.rolled-back"
    put_back.site.journal.write_bytes(newest)
    put_back.site.restart().update(4, receipt=put_back.receipt)


def test_a_receipt_of_another_site_stops_the_round_and_nothing_else(site: RealSite, make_a_site: MakeSite) -> None:
    foreign = Receipt.of(make_a_site("other").update(1).head, COORDINATOR)
    assert site.restart().refusal(1, receipt=foreign) == "journal.other-site"
    assert site.charged == 0
    site.update(1)
