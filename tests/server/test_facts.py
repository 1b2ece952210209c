from __future__ import annotations

import json
import math

from fedtune.flower.messages import Description
from fedtune.journal.witness import Head
from fedtune.privacy.accounting import Event, epsilon
from fedtune.privacy.plan import PrivacyPlan
from fedtune_server.facts import SiteFacts, StudyFacts
from tests.support.journals import MemoryJournal

SPENT = (Event(1.0, 0.1, 20, 1.0),)
PROMISE = PrivacyPlan.from_noise(noise_multiplier=1.0, delta=1e-5, clip_norm=1.0, sampling_rate=0.1, max_steps=20)


def facts() -> StudyFacts:
    sites = {
        "bank-a": SiteFacts("bank-a", 120, "d" * 64, SPENT, 2, {"message.wrong-shape": 1}, {}, {"accuracy": 0.5}),
        "bank-b": SiteFacts("bank-b", 80, "d" * 64),
    }
    return StudyFacts(sites, {"accuracy": 0.1}, {"accuracy": 0.5}, 10, 20, 1.5)


def test_facts_survive_a_trip_through_json() -> None:
    assert StudyFacts.from_dict(json.loads(json.dumps(facts().to_dict()))) == facts()


def test_the_largest_epsilon_is_that_of_the_site_that_spent_most() -> None:
    assert facts().max_epsilon(PROMISE) == epsilon(SPENT, 1e-5) == facts().sites["bank-a"].epsilon(PROMISE)
    assert facts().sites["bank-b"].epsilon(PROMISE) == 0.0
    assert StudyFacts().max_epsilon(PROMISE) == 0.0


def test_without_privacy_there_is_no_epsilon() -> None:
    off = PrivacyPlan.off(sampling_rate=0.1, max_steps=20)
    assert facts().max_epsilon(off) is None
    assert facts().sites["bank-a"].epsilon(off) is None


def test_a_site_starts_from_what_it_says_it_has_spent() -> None:
    head = Head.of(MemoryJournal.create("bank-a"))
    site = SiteFacts.of(Description("a" * 64, "bank-a", 120, "d" * 64, SPENT, head))
    assert (site.name, site.units, site.events, site.rounds) == ("bank-a", 120, SPENT, 0)
    assert math.isclose(site.epsilon(PROMISE) or 0, PROMISE.epsilon)
