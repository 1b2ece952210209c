import hashlib
import os
import subprocess
import sys
from collections import Counter
from string import Formatter

from fedtune.config.schema import DataSettings, PartitionSettings
from fedtune.data import bank_phrases as phrases
from fedtune.data.bank_messages import generate
from fedtune.data.partitions import partition
from fedtune.data.records import to_records
from fedtune.data.tasks import find_task
from fedtune.data.units import Units


def digest(seed: int = 11) -> str:
    return hashlib.sha256(repr(sorted(generate(seed, 3, 50).columns.items())).encode()).hexdigest()


def test_a_seed_gives_the_same_messages_in_another_process_and_another_seed_others() -> None:
    program = (
        "import hashlib; from fedtune.data.bank_messages import generate; "
        "print(hashlib.sha256(repr(sorted(generate(11, 3, 50).columns.items())).encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert other.stdout.strip() == digest()
    assert digest(12) != digest()


def test_the_messages_are_pinned() -> None:
    assert digest() == "773b5ee084b1973a40c9a030daca4aba4750edec15feb598402d4cda7ae2baf6"


def test_the_messages_say_that_they_are_synthetic() -> None:
    table = generate(0, 2, 5)
    assert "synthetic" in table.source
    assert set(table.columns["bank"]) == {"synthetic-bank-01", "synthetic-bank-02"}


def test_a_bank_does_not_depend_on_how_many_there_are() -> None:
    few, many = generate(4, 2, 40), generate(4, 5, 40)
    assert many.columns["text"][:80] == few.columns["text"]


def test_no_message_repeats_another_and_no_slot_is_left_open() -> None:
    texts = generate(0, 6, 200).columns["text"]
    assert len(set(texts)) == len(texts) == 1200
    assert not any("{" in str(text) or "}" in str(text) for text in texts)


def test_every_intent_has_several_templates_and_only_known_slots() -> None:
    assert len(phrases.INTENTS) >= 12
    assert all(len(set(templates)) >= 6 for templates in phrases.INTENTS.values())
    templates = [*(text for texts in phrases.INTENTS.values() for text in texts), *phrases.VAGUE, *phrases.ASIDES]
    slots = {slot for text in templates for _, slot, _, _ in Formatter().parse(text) if slot}
    assert slots == {"card", "account", "app", "amount", "merchant", "city", "when", "years"}
    assert {intent for intents in phrases.VAGUE.values() for intent in intents} <= set(phrases.INTENTS)


def test_the_label_mix_differs_from_bank_to_bank() -> None:
    table = generate(0, 6, 300)
    shares = Counter(zip(table.columns["bank"], table.columns["label"], strict=True))
    largest = [max(count for (bank, _), count in shares.items() if bank == name) for name in set(table.columns["bank"])]
    assert min(largest) > 2 * 300 / len(phrases.INTENTS)


def test_the_table_is_a_study_of_its_own() -> None:
    table = generate(0, 6, 50)
    task = find_task(DataSettings(), table.names).with_labels([str(label) for label in table.columns["label"]])
    assert len(to_records(table, task)) == 300
    banks = [str(bank) for bank in table.columns["bank"]]
    by_bank = PartitionSettings(scheme="column", column="bank")
    parts = partition(by_bank, units=Units.each_record(300), column=banks, sites=6, seed=0)
    assert [len(part.rows) for part in parts] == [50] * 6
