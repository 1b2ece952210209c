"""What Ollama's TEMPLATE writes is, character by character, what training put before the assistant's answer."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.data.chat import lay_out
from fedtune.data.records import Dialogue, Turn
from fedtune.errors import DataError, ReleaseError
from fedtune.release.ollama_chat import find_format
from fedtune.release.ollama_template import chat_template, go_text
from tests.release.chat_templates import COUNTING, KNOWN, LLAMA3, PLACES, SHOUTING, chatting
from tests.release.go_template import ollama_prompt, render

WORDS = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).map(str.strip).filter(bool)


def prompted(turns: list[tuple[str, str]], tokenizer: Any) -> str:
    """What the chat template itself, or fedtune's own layout, puts before an answer."""
    if tokenizer.chat_template is None:
        return trained_prompt(turns, tokenizer)
    messages = [{"role": role, "content": text} for role, text in turns]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def trained_prompt(turns: list[tuple[str, str]], tokenizer: Any) -> str:
    """What training put before the last answer."""
    dialogue = Dialogue((*(Turn(*turn) for turn in turns), Turn("assistant", "the answer")))
    return "".join(segment.text for segment in lay_out(dialogue, tokenizer)[:-1])


def asked(template: str, turns: list[tuple[str, str]]) -> str:
    return ollama_prompt(template, [{"role": role, "content": text} for role, text in turns])


@pytest.mark.parametrize("family", KNOWN)
def test_the_place_of_a_system_message_is_found(family: str) -> None:
    assert find_format(chatting(KNOWN[family])).system_place == PLACES[family]


@pytest.mark.parametrize("family", KNOWN)
@settings(max_examples=25)
@given(texts=st.lists(WORDS, min_size=5, max_size=5), questions=st.integers(1, 3), system=st.booleans())
def test_ollama_prompts_as_the_chat_template_does(family: str, texts: list[str], questions: int, system: bool) -> None:
    tokenizer, template = _translated(family)
    turns = list(zip(["user", "assistant"] * 3, texts, strict=False))[: 2 * questions - 1]
    if system and PLACES[family] != "none":
        turns = [("system", "Be brief."), *turns]
    assert asked(template, turns) == prompted(turns, tokenizer)


@cache
def _translated(family: str) -> tuple[Any, str]:
    tokenizer = chatting(KNOWN[family])
    return tokenizer, chat_template(find_format(tokenizer))


@pytest.mark.parametrize("family", KNOWN)
def test_ollama_prompts_as_training_did(family: str) -> None:
    tokenizer, template = _translated(family)
    for turns in ([("user", "Hello")], [("user", "Hello"), ("assistant", "Hi"), ("user", "And {{ you }}?")]):
        assert asked(template, turns) == trained_prompt(turns, tokenizer)


def test_a_layout_without_a_place_for_a_system_message_is_one_that_training_refuses() -> None:
    with pytest.raises(DataError, match="no system role"):
        trained_prompt([("system", "Be brief."), ("user", "Hello")], chatting(KNOWN["gemma"]))


def test_the_bos_that_the_tokenizer_adds_itself_is_not_written_twice() -> None:
    tokenizer = chatting(LLAMA3)
    bare = chat_template(find_format(tokenizer).without_bos("<s>"))
    for turns in ([("user", "Hello")], [("system", "Be brief."), ("user", "Hello")]):
        assert "<s>" + asked(bare, turns) == trained_prompt(turns, tokenizer)


def test_a_template_that_counts_its_turns_is_refused_with_another_way() -> None:
    with pytest.raises(ReleaseError) as caught:
        find_format(chatting(COUNTING))
    assert caught.value.code == "release.untranslatable-chat"
    assert "--to gguf" in caught.value.hint


def test_a_template_that_changes_what_is_said_is_refused() -> None:
    with pytest.raises(ReleaseError, match="leaves out a message"):
        find_format(chatting(SHOUTING))


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=30))
def test_fixed_text_survives_go_and_the_modelfile(text: str) -> None:
    written = go_text(text)
    assert render(written, {}) == text
    assert '"""' not in written
    assert all(character == "\n" or character.isprintable() for character in written)
