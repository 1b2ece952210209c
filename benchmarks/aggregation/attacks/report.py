"""The figures as Markdown: an overview of every rule against every attack, then a table for each rule."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.aggregation.attacks.cells import ATTACKS, BACKDOOR, NONE, SITES, UNDEFENDED, Cell

Done = Mapping[str, Mapping[str, Any]]
_NAMES: Final = {
    "sign_flip": "sign flip",
    "scaled": "×100",
    "gaussian": "Gaussian",
    BACKDOOR: "backdoor",
    "little_is_enough": "a little is enough",
}
_OVERVIEW: Final = 2


@dataclass(frozen=True, slots=True)
class _Found:
    """What there is of one algorithm: its cells, and the lines of those that are finished."""

    cells: Sequence[Cell]
    done: Done

    @property
    def rules(self) -> list[str]:
        """The rules, the undefended mean first."""
        return list(dict.fromkeys(cell.rule for cell in self.cells))

    @property
    def counts(self) -> list[int]:
        """The numbers of attackers, 0 among them."""
        return sorted({cell.attackers for cell in self.cells})

    def text(self, rule: str, attack: str, attackers: int, what: str = "accuracy", assumed: int | None = None) -> str:
        """Return one cell in percent; ± is half the distance between the extreme seeds."""
        told = attackers if assumed is None else assumed
        asked = (rule, attack if attackers else NONE, attackers, told)
        cells = [cell for cell in self.cells if (cell.rule, cell.attack, cell.attackers, cell.assumed) == asked]
        if cells and cells[0].refusal:
            return f"refused: {cells[0].refusal}"
        lines = [self.done[cell.key] for cell in cells if cell.key in self.done]
        if any("stopped" in line for line in lines):
            return "stopped"
        return _percent([line[what] for line in lines if what in line])


def render(cells: Sequence[Cell], done: Done) -> str:
    """Return all tables; a study that is not finished is a dash, one that is refused says what its rule needs."""
    parts = []
    for algorithm in dict.fromkeys(cell.algorithm for cell in cells):
        found = _Found([cell for cell in cells if cell.algorithm == algorithm], done)
        count = _OVERVIEW if _OVERVIEW in found.counts else found.counts[-1]
        about = f"`{algorithm}`, {_share(count)} attackers, accuracy in percent"
        parts += [
            f"{about} ({found.text(UNDEFENDED, NONE, 0, 'start')} before the first round):",
            _overview(found, count),
        ]
        if len(found.counts) > 2:
            parts += [text for rule in found.rules for text in (_title(rule), _of_rule(found, rule))]
    return "\n\n".join([*parts, *_told(cells, done), _took(cells, done)])


def _overview(found: _Found, count: int) -> str:
    head = ["", "no attack", *(_NAMES[attack] for attack in ATTACKS), "backdoor's success"]
    return _table(head, [[_named(rule), *_against(found, rule, count)] for rule in found.rules])


def _against(found: _Found, rule: str, count: int) -> list[str]:
    accuracies = [found.text(rule, attack, count) for attack in ATTACKS]
    return [found.text(rule, NONE, 0), *accuracies, found.text(rule, BACKDOOR, count, "backdoor")]


def _title(rule: str) -> str:
    return "The mean without defence:" if rule == UNDEFENDED else f"`{rule}` (the mean without defence in brackets):"


def _of_rule(found: _Found, rule: str) -> str:
    """Return one rule against every attack, by the share of attackers."""
    rows = [[_NAMES[attack], *_row(found, rule, attack)] for attack in ATTACKS]
    rows.insert(ATTACKS.index(BACKDOOR) + 1, ["backdoor's success", *_row(found, rule, BACKDOOR, "backdoor")])
    return _table(["attack", *map(_share, found.counts)], rows)


def _row(found: _Found, rule: str, attack: str, what: str = "accuracy") -> list[str]:
    """Return a rule's cells with those of the mean beside them."""
    cells = []
    for count in found.counts:
        own = found.text(rule, attack, count, what)
        bare = rule == UNDEFENDED or own.startswith("refused")
        control = found.text(UNDEFENDED, attack, count, what).partition(" ±")[0]
        cells.append(own if bare else f"{own} ({control})")
    return cells


def _told(cells: Sequence[Cell], done: Done) -> list[str]:
    """Return what it costs to tell a rule of attackers where there are none."""
    rows = []
    for cell in {(cell.algorithm, cell.rule): cell for cell in cells if cell.assumed and not cell.attackers}.values():
        found = _Found([one for one in cells if one.algorithm == cell.algorithm], done)
        accuracies = [found.text(cell.rule, NONE, 0, assumed=told) for told in (0, cell.assumed)]
        rows.append([f"`{cell.rule}`", *accuracies, str(cell.assumed)])
    head = ["", "told of none", "told of the most", "the most"]
    about = "No attack, and the plan assumes none, or as many attackers as the rule allows:"
    return [about, _table(head, rows)] if rows else []


def _took(cells: Sequence[Cell], done: Done) -> str:
    lines = [done[cell.key] for cell in cells if cell.key in done]
    return f"{len(lines)} studies, {sum(line['cpu_seconds'] for line in lines) / 60:.0f} CPU minutes."


def _percent(shares: Sequence[float]) -> str:
    if not shares:
        return "-"
    spread = f" ± {50 * (max(shares) - min(shares)):.1f}" if len(shares) > 1 else ""
    return f"{100 * statistics.mean(shares):.1f}{spread}"


def _named(rule: str) -> str:
    return "no defence" if rule == UNDEFENDED else f"`{rule}`"


def _share(attackers: int) -> str:
    return f"{100 * attackers // SITES} %"


def _table(head: list[str], rows: list[list[str]]) -> str:
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ruler, *rows])
