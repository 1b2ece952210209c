from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fedtune.data.batches import collate, padding_id
from fedtune.data.records import LabelledText
from fedtune.data.tasks import Task
from fedtune.data.templates import IGNORED, Example, render_all


def causal(*tokens: int) -> Example:
    ids = np.array(tokens, np.int32)
    return Example(ids, len(ids), labels=np.where(ids > 5, ids, IGNORED).astype(np.int32))


def test_examples_are_padded_on_the_right_to_the_longest() -> None:
    batch = collate([causal(1, 9), causal(1, 2, 8, 7)], pad_id=0, kind="causal-lm")
    assert batch.records == 2
    assert batch.input_ids.tolist() == [[1, 9, 0, 0], [1, 2, 8, 7]]
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.labels.tolist() == [[-100, 9, -100, -100], [-100, -100, 8, 7]]
    assert {batch.input_ids.dtype, batch.attention_mask.dtype, batch.labels.dtype} == {torch.int64}


def test_padding_changes_no_loss() -> None:
    torch.manual_seed(0)
    examples = [causal(1, 9), causal(1, 2, 8, 7)]
    batch = collate(examples, pad_id=0, kind="causal-lm")
    logits = torch.randn(2, 4, 12)
    padded = F.cross_entropy(logits[0, :-1], batch.labels[0, 1:], reduction="sum")
    alone = F.cross_entropy(logits[0, :1], torch.tensor([9]), reduction="sum")
    torch.testing.assert_close(padded, alone)


def test_a_batch_equals_the_tokenizers_own_padding(minilm: Any) -> None:
    texts = ["hello", "where is my card", "I was charged twice for one coffee"]
    records = [LabelledText(text, at % 2) for at, text in enumerate(texts)]
    task = Task("classification", {"text": "t", "label": "l"}, ("a", "b"))
    batch = collate(render_all(records, minilm, task, 128), padding_id(minilm), "classification")
    expected = minilm(texts, padding=True, return_tensors="pt")
    assert torch.equal(batch.input_ids, expected["input_ids"])
    assert torch.equal(batch.attention_mask, expected["attention_mask"])
    assert batch.labels.tolist() == [0, 1, 0]


def test_an_empty_batch_has_no_records_and_no_tokens() -> None:
    assert collate([], 0, "causal-lm").labels.shape == (0, 0)
    batch = collate([], 0, "classification").to("cpu")
    assert batch.records == 0
    assert (batch.input_ids.shape, batch.labels.shape, batch.labels.dtype) == ((0, 0), (0,), torch.int64)


def test_a_tokenizer_without_a_pad_token_is_padded_with_another(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(eos="</s>")
    assert padding_id(tokenizer) == tokenizer.eos_token_id
    assert padding_id(make_tokenizer()) == 0
