"""The commands beside a real client: what an operator decides is what a coordinator's next round meets."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import yaml

from fedtune.flower.messages import Refusal, Update, decode_update
from fedtune_client.policy.limits import simulation_policy
from tests.client.commands.conftest import clean_environment
from tests.support.runs import command

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.client.conftest import Coordinator


def test_a_round_is_trained_when_the_operator_has_allowed_it_and_refused_once_consent_is_revoked(
    study: Callable[..., Coordinator], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean_environment(monkeypatch)
    monkeypatch.setenv("FEDTUNE_VAULT_KEY", "ab" * 32)
    monkeypatch.setenv("FEDTUNE_SITE", str(tmp_path / "site"))
    coordinator = study(data__name="claims", privacy__noise="secure", federation__sites=3)
    plan, run = coordinator.plan, str(coordinator.bench.machine.run)

    def client(*words: str) -> str:
        done = command("client", *words)
        assert done.code == 0, done.err
        return done.out

    def train(number: int) -> Update | Refusal:
        return decode_update(coordinator.ask("train", number).content, plan.sha256)

    def refused(number: int) -> str:
        answer = train(number)
        assert isinstance(answer, Refusal)
        return answer.code

    client("init", "mercy")
    site = tmp_path / "site"
    (site / "site.yaml").write_text(f"name: mercy\ndata:\n  claims:\n    path: {tmp_path / 'bank.csv'}\n")
    tree = json.loads(simulation_policy(plan).canonical) | {"require_approval": True}
    (site / "policy.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert refused(1) == "policy.not-adopted"
    client("policy", "adopt", "--yes")
    client("consent", "grant", "claims", "--purpose", plan.purpose)
    coming = json.loads(client("budget", "--forecast", run, "--format", "json"))["forecast"]
    assert (coming["allowed"], coming["needs_approval"]) == (True, True)
    assert refused(1) == "policy.not-approved"
    client("approve", run, "--yes")

    answer = train(1)
    assert isinstance(answer, Update)
    (account,) = json.loads(client("budget", "--plan", run, "--format", "json"))["accounts"]
    assert account["rounds"] == 1
    assert account["reserved"] == 0.0
    assert account["spent"] == account["studies"][0]["epsilon"] == plan.promise.spent(plan.training.local_steps)

    client("consent", "revoke", "3", "--reason", "the board has withdrawn")
    assert refused(2) == "consent.not-granted"
    client("consent", "grant", "claims", "--purpose", plan.purpose)
    assert isinstance(train(2), Update)
    (account,) = json.loads(client("budget", "--format", "json"))["accounts"]
    assert account["epsilon"] == pytest.approx(coming["after"], rel=1e-12)
    shown = client("journal", "show")
    assert "the board has withdrawn" in " ".join(shown.split())
    assert command("client", "journal", "verify").code == 0
