"""SIGKILL at every step of a round, and at any moment: nothing is under-counted, and what was committed comes back.

Three things are compared that share no code: what the journal's file says, read as JSON; what the killed processes told
before each act; and the replies that a coordinator got.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.client.authority.conftest import MakeSite
from tests.support.crashes import STEPS, Clients, Script, Story
from tests.support.sites import RealSite

ANY = "any moment"
LONGEST = 0.15  # seconds; about a round and a half


@dataclass(frozen=True, slots=True)
class Trial:
    """A round whose client was killed, and what became of it when it was asked for again."""

    step: str
    number: int
    charged: int
    drawn: int
    left: int
    was_committed: bool
    identical: bool

    @property
    def over(self) -> int:
        """How many rounds were charged for each whose result left."""
        return self.charged - self.left


class Killing:
    """One site whose every client is killed; each begins with the round that its predecessor was killed in."""

    def __init__(self, site: RealSite, clients: Clients, folder: Path, fault: str = "") -> None:
        self.site, self.clients, self.folder, self.fault = site, clients, folder, fault

    def trials(self, steps: Iterable[str], seed: int) -> Iterator[Trial]:
        """Kill a client for each step in turn."""
        draw, earlier = random.Random(seed), None
        for number, step in enumerate(steps, start=1):
            script = self._script((*([number - 1] if earlier else []), number), step)
            if step == ANY:
                story = self.clients.killed_after(script, draw.uniform(0, LONGEST))
            else:
                story = self.clients.killed_at_its_step(script)
            self.require_charged(number, story)
            if earlier:
                yield self._judged(*earlier, story)
            earlier = step, number, story, self.reserved(number), self.is_committed(number)
        if earlier:
            (last,) = self.clients.finished(self._script((earlier[1],), ""))
            yield self._judged(*earlier, last)

    def require_charged(self, number: int, *stories: Story) -> None:
        """Compare what the journal says right after a kill with what was begun."""
        drawn = sum(len(story.told("draws", number)) for story in stories)
        assert self.reserved(number) >= drawn, "noise was drawn that is not charged"

    def reserved(self, number: int) -> int:
        return sum(entry["round"] == number for entry in self.site.entries("reserve"))

    def is_committed(self, number: int) -> bool:
        mine = {at for at, entry in enumerate(self.site.entries()) if entry.get("round") == number}
        return any(entry["reserved"] in mine for entry in self.site.entries("commit"))

    def _judged(self, step: str, number: int, killed: Story, reserved: int, committed: bool, after: Story) -> Trial:
        self.require_charged(number, killed, after)
        first, again = killed.told("commits", number), after.told("reply", number)
        assert len(again) == 1, after
        left = {*killed.told("reply", number), *again}
        assert not committed or left == set(first), "what was committed is not what came back"
        contents = {*killed.told("content", number), *after.told("content", number)}
        assert len(contents) == 1, "the whole reply but the head is not what came before"
        assert self.reserved(number) == reserved + (not committed)
        drawn = len(killed.told("draws", number)) + len(after.told("draws", number))
        return Trial(step, number, self.reserved(number), drawn, len(left), committed, left == set(first))

    def _script(self, rounds: tuple[int, ...], step: str) -> Script:
        return Script(self.site.path, rounds, step, self.folder / f"{rounds[-1]:04d}-{step}.jsonl", self.fault)


def table(trials: list[Trial]) -> str:
    """Say in figures what was seen."""
    lines = [f"{'killed':<30}{'trials':>8}{'over-count':>12}{'sent again':>12}{'under':>8}"]
    for step in [*STEPS, ANY, "all"]:
        found = [trial for trial in trials if step in {trial.step, "all"}]
        if found:
            same, under = sum(trial.identical for trial in found), sum(trial.charged < trial.drawn for trial in found)
            mean = sum(trial.over for trial in found) / len(found)
            lines.append(f"{step:<30}{len(found):>8}{mean:>12.2f}{same:>12}{under:>8}")
    return "\n".join(lines)


def run(make_a_site: MakeSite, clients: Clients, folder: Path, steps: list[str], seed: int) -> list[Trial]:
    """Kill in a random order of steps at one site, and compare its whole journal with what was seen."""
    random.Random(seed).shuffle(steps)
    killing = Killing(make_a_site(f"killed-{seed}"), clients, folder)
    trials = list(killing.trials(steps, seed))
    assert len(trials) == len(steps)
    assert killing.site.charged == sum(trial.charged for trial in trials)
    assert all(trial.charged >= trial.drawn >= trial.left == 1 for trial in trials)
    assert all(trial.identical for trial in trials if trial.was_committed)
    return trials


def test_a_killed_round_is_charged_and_a_committed_one_comes_back_bit_for_bit(
    make_a_site: MakeSite, clients: Clients, tmp_path: Path
) -> None:
    trials = run(make_a_site, clients, tmp_path, [*STEPS] * 2 + [ANY] * 14, seed=1)
    print(table(trials))  # noqa: T201 - pytest shows it on request
    for trial in trials:
        wasted = "RESERVE not flushed", "COMMIT half written"
        between = trial.step in STEPS and STEPS.index(wasted[0]) <= STEPS.index(trial.step) <= STEPS.index(wasted[1])
        assert trial.step == ANY or trial.over == between


@pytest.mark.parametrize(
    ("fault", "step", "complaint"),
    [
        ("no RESERVE on disk", "mid-train, after noise", "noise was drawn that is not charged"),
        ("no update in the vault", "reply gone", "what was committed is not what came back"),
    ],
)
def test_control_a_client_that_is_wrong_is_found_out(
    make_a_site: MakeSite, clients: Clients, tmp_path: Path, fault: str, step: str, complaint: str
) -> None:
    with pytest.raises(AssertionError, match=complaint):
        list(Killing(make_a_site(), clients, tmp_path, fault).trials([step], seed=1))


@pytest.mark.slow
def test_hundreds_of_kills_are_never_under_counted(
    make_a_site: MakeSite, clients: Clients, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trials: list[Trial] = []
    for seed in range(10, 14):
        folder = tmp_path / f"stories-{seed}"
        folder.mkdir()
        trials += run(make_a_site, clients, folder, [*STEPS] * 3 + [ANY] * 21, seed)
    with capsys.disabled():
        print("\n" + table(trials))  # noqa: T201 - the figures are what this test is run for
    assert len(trials) >= 200
