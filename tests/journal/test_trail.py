from __future__ import annotations

from fedtune.journal import entries as e
from fedtune.journal.chain import Chain, Record
from fedtune.journal.trail import Row, describe
from tests.support.site_journals import Site, data, receipt_of, rotation, run_round, twelve


def rows_of(site: Site) -> list[Row]:
    chain, records = Chain(), list[Record]()
    for line in site.lines():
        chain, record = chain.accept(line)
        records.append(record)
    return list(describe(records))


def said(*entries: e.Entry) -> list[str]:
    records = [Record(number, "2026-01-01T00:00:00.000000Z", entry, "") for number, entry in enumerate(entries)]
    return [row.text for row in describe(records)]


def test_a_journal_reads_as_a_story_of_data_consent_and_rounds(site: Site) -> None:
    twelve(site)
    rows = rows_of(site)
    assert [row.sequence for row in rows] == list(range(12))
    texts = [row.text for row in rows]
    assert "the journal of site hospital begins" in texts[0]
    assert "data set claims is registered: about 100 units (record)" in texts[1]
    assert "consent to use data set claims for research, up to ε = 3, without an end" in texts[2]
    assert "the site takes part in study study" in texts[4]
    assert texts[5] == (
        "round 1 of study study is charged to data set claims: 4 steps with noise 1 (secure), rate 0.1, clip norm 1, "
        "for each record"
    )
    assert texts[6].startswith("round 1 of study study has its result: 1.0 kB")
    assert texts[7] == "the result of round 1 of study study is handed to the transport"
    assert "has confirmed the journal up to record 7" in texts[8]


def test_every_kind_of_record_has_words(site: Site) -> None:
    with site.create() as journal:
        run_round(journal, 1, None)
        receipt, created = receipt_of(journal).entry(), e.SiteCreated(site="a", public_key=site.public)
        reserve = journal.state.spending.reserved[3]
    entries: list[e.Entry] = [
        created,
        rotation(site.key, site.key),
        e.PolicyAdopted(sha256="a" * 64, policy={}),
        data("claims", joins=(1,)),
        e.ConsentGiven(data=3, fingerprint="a" * 64, purpose="research", epsilon=None, expires="2027-01-01T00:00:00Z"),
        e.ConsentRevoked(grant=4, reason="asked by the board"),
        e.RecordsConsented(data=3, source="a" * 64, units=90),
        e.PlanApproved(plan="b" * 64, by="A. Person"),
        e.PlanAccepted(plan="b" * 64, name="sepsis", policy="a" * 64),
        e.PlanRefused(plan="c" * 64, name="other", reasons=("policy.rounds", "policy.noise")),
        reserve.model_copy(update={"plan": "b" * 64, "purpose": "metrics", "data": 3, "grant": 4}),
        e.Committed(reserved=10, payload="a" * 64, size=12_300_000),
        e.Sent(reserved=10, again=True),
        receipt,
        e.Released(plan="b" * 64, manifest="a" * 64),
        e.ClockSet(before="2027-01-01T00:00:00Z"),
    ]
    texts = said(*entries)
    assert {type(entry) for entry in entries} == set(e.KINDS.values())
    assert "it shares its budget with the data of record 1" in texts[3]
    assert "as far as the policy allows, until 2027-01-01T00:00:00Z" in texts[4]
    assert texts[5] == "consent is withdrawn to use claims for research (record 4): asked by the board"
    assert texts[7].startswith("A. Person agrees to plan bbbbbbbbbbbb")
    assert texts[9].endswith("policy.rounds, policy.noise")
    assert texts[10] == (
        "round 1 of study sepsis (metrics) is charged to data set claims: NOT PRIVATE, nothing bounds what it reveals"
    )
    assert texts[12] == "the result of round 1 of study sepsis (metrics) is handed to the transport, once more"
    assert texts[14].startswith("the adapter of study sepsis is released")


def test_a_terminal_acts_on_nothing_that_a_journal_says() -> None:
    (text,) = said(e.PlanApproved(plan="a" * 64, by="\x1b[31mboss\x1b[0m\nrecord 9: \u202eintact"))
    assert "\x1b" not in text
    assert "\n" not in text
    assert "\u202e" not in text
    assert r"\x1b[31mboss" in text


def test_records_without_what_they_speak_of_still_have_words() -> None:
    assert said(e.Sent(reserved=7, again=False)) == ["the result of ? is handed to the transport"]
