"""The tokenizer in the file is the one of training: found by its rules, checked on texts, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedtune.errors import ReleaseError
from fedtune.release.gguf.bpe import byte_level_vocabulary
from fedtune.release.gguf.spm import check_pieces, pieces, sentencepiece_vocabulary
from fedtune.release.gguf.tokenizer import BYTE, CONTROL, UNKNOWN, UNUSED, Vocabulary, read_tokenizer, token_types
from tests.release.gguf.conftest import Shelf
from tests.release.gguf.made import made_tokenizer
from tests.support.runs import MODELS

STORIES = MODELS / "stories260k"
RULES = {"llama3": "llama-bpe", "qwen2": "qwen2", "gpt2": "gpt-2", "llama": "default", "gemma": "default"}


def spm(tokenizer: Any, rows: int | None = None) -> Vocabulary:
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    return sentencepiece_vocabulary(definition, token_types(definition, tokenizer), rows or len(tokenizer))


@pytest.mark.parametrize("family", RULES)
def test_the_cutting_rule_is_found_by_its_definition(family: str, shelf: Shelf) -> None:
    table = read_tokenizer(shelf.base(family), 1000)
    assert table.vocabulary.pre == RULES[family]
    assert table.add_bos is (family in {"llama3", "llama", "gemma"})
    assert not table.add_eos


@pytest.mark.parametrize("rule", ["spm", "spm-bare"])
@settings(max_examples=150, deadline=None)
@given(text=st.text(st.sampled_from("Once upon time patients Lily's 120/80 ▁<>é日🦙\n\t"), min_size=1, max_size=40))
def test_scores_merge_as_ranks_do(rule: str, text: str) -> None:
    tokenizer, vocabulary, ids = _spm_of(rule)
    assume(not any(word in text for word in tokenizer.all_special_tokens))  # cut out of a text before any merge
    wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert pieces(text, vocabulary, ids) == wanted


_MADE: dict[str, tuple[Any, Vocabulary, dict[str, int]]] = {}


def _spm_of(rule: str) -> tuple[Any, Vocabulary, dict[str, int]]:
    if rule not in _MADE:
        tokenizer = made_tokenizer(rule)
        vocabulary = spm(tokenizer)
        _MADE[rule] = tokenizer, vocabulary, {text: at for at, text in enumerate(vocabulary.tokens)}
    return _MADE[rule]


def test_types_tell_bytes_and_special_tokens_and_unused_rows_apart() -> None:
    vocabulary = spm(made_tokenizer("spm"), rows=2000)
    kinds = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
    assert (kinds["<unk>"], kinds["<s>"], kinds["<0x0A>"], kinds["[PAD1999]"]) == (UNKNOWN, CONTROL, BYTE, UNUSED)
    assert len(kinds) == 2000


def test_merges_that_scores_cannot_say_are_refused() -> None:
    tokenizer = made_tokenizer("spm")
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    definition["model"]["merges"] = definition["model"]["merges"][:20]  # the pieces stay, but are never merged
    broken = made_tokenizer("spm")
    from tokenizers import Tokenizer

    broken._tokenizer = Tokenizer.from_str(json.dumps(definition))
    with pytest.raises(ReleaseError) as caught:
        check_pieces(spm(broken), broken)
    assert caught.value.code == "release.tokenizer-differs"


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
    ],
)
def test_a_byte_level_rule_that_llama_cpp_has_not_is_refused(change: dict[str, Any]) -> None:
    tokenizer = made_tokenizer("gpt-2")
    definition = json.loads(tokenizer.backend_tokenizer.to_str()) | change
    with pytest.raises(ReleaseError) as caught:
        byte_level_vocabulary(definition, token_types(definition, tokenizer), 1000)
    assert caught.value.code == "release.unknown-tokenizer"


def test_more_tokens_than_embeddings_are_refused(shelf: Shelf) -> None:
    with pytest.raises(ReleaseError, match="the model has 100 embeddings"):
        read_tokenizer(shelf.base("gpt2"), 100)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReleaseError) as caught:
        read_tokenizer(tmp_path, 100)
    assert caught.value.code == "release.no-tokenizer"


@pytest.mark.skipif(not STORIES.exists(), reason="no model stories260k; set FEDTUNE_MODELS")
def test_a_published_models_tokenizer_passes_the_check() -> None:
    table = read_tokenizer(STORIES, 512)
    assert table.vocabulary.space_prefix is True
    assert table.special == {"bos": 1, "eos": 2, "unk": 0, "eot": 1}  # generation also ends where a new story begins
