"""Answers are what transformers and PEFT would write, alone or in a batch, and stream without a half character."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedtune.data.records import Conversation, Segment
from fedtune.data.tasks import Task
from fedtune.errors import ConfigError
from fedtune.generation.answers import Answer, Completion, complete, prompt_limit
from fedtune.generation.prompts import Prompt, prompt_of
from fedtune.generation.sampling import Sampling, next_token
from fedtune.generation.stops import Stops, stops_of
from fedtune.generation.streaming import TextStream
from tests.support.bench import Bench

TEXTS = ["what is 1?", "what is 22 or 333?", "is it?", "what is it now?", "so?"]
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASKING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
MESSAGES = Task("messages", {"messages": "m"})


def prompts(bench: Bench, sampling: Sampling) -> list[Prompt]:
    limit, tokenizer = prompt_limit(bench.workspace, sampling), bench.workspace.tokenizer
    records = [Conversation((Segment(f"{text}\n", trained=False), Segment("A", trained=True))) for text in TEXTS]
    return [prompt_of(record, tokenizer, bench.plan.task, limit) for record in records]


def by_transformers(bench: Bench, prompt: Prompt, sampling: Sampling, stops: Stops) -> list[int]:
    """Generate greedily with PEFT's own `generate`."""
    given = torch.tensor([prompt.tokens])
    kept = {"max_new_tokens": sampling.max_new_tokens, "eos_token_id": list(stops.tokens), "pad_token_id": 0}
    found = bench.workspace.peft.generate(
        input_ids=given, attention_mask=torch.ones_like(given), do_sample=False, **kept
    )
    return [token for token in found[0, given.shape[1] :].tolist() if token not in stops.tokens]


def test_greedy_answers_are_those_of_transformers_token_for_token(language: Bench) -> None:
    sampling, workspace = Sampling(max_new_tokens=24), language.workspace
    stops = stops_of(workspace.tokenizer, language.plan.task)
    for prompt in prompts(language, sampling):
        answer = Answer(workspace, prompt, sampling, stops)
        streamed = "".join(answer)
        reference = by_transformers(language, prompt, sampling, stops)
        assert (streamed, answer.completion.tokens) == (workspace.tokenizer.decode(reference), len(reference))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_a_batch_of_uneven_prompts_gives_what_each_gives_alone(
    language: Bench, temperature: float, batch_size: int
) -> None:
    sampling = Sampling(max_new_tokens=16, temperature=temperature)
    stops, chosen = stops_of(language.workspace.tokenizer, language.plan.task), prompts(language, sampling)
    alone = []
    for number, prompt in enumerate(chosen):
        answer = Answer(language.workspace, prompt, sampling, stops, number)
        list(answer)
        alone.append(answer.completion)
    assert list(complete(language.workspace, chosen, sampling, stops, batch_size)) == alone


def test_the_same_seed_draws_the_same_answer_and_another_one_another(language: Bench) -> None:
    def drawn(seed: int) -> Completion:
        sampling = Sampling(16, temperature=1.0, seed=seed)
        return next(complete(language.workspace, prompts(language, sampling)[:1], sampling, Stops(), 1))

    assert drawn(1) == drawn(1) != drawn(2)


def test_an_answer_ends_at_its_stop_token_which_is_not_shown(language: Bench) -> None:
    sampling = Sampling(max_new_tokens=24)
    prompt = prompts(language, sampling)[0]
    first = by_transformers(language, prompt, sampling, Stops())
    (found,) = complete(language.workspace, [prompt], sampling, Stops(frozenset({first[3]})), 1)
    assert (found.finish, found.tokens) == ("stop", first.index(first[3]))


def test_an_answer_never_leaves_what_the_base_can_see(language: Bench) -> None:
    sampling = Sampling(max_new_tokens=1000)
    limit = prompt_limit(language.workspace, sampling)
    assert limit == 64  # half of the 128 tokens
    record = Conversation((Segment("a" * 500, trained=False), Segment("A", trained=True)))
    prompt = prompt_of(record, language.workspace.tokenizer, language.plan.task, limit)
    (found,) = complete(language.workspace, [prompt], sampling, Stops(), 1)
    assert (found.finish, found.tokens + len(prompt.tokens)) == ("length", 128)


# --- sampling -------------------------------------------------------------------------------------------------------


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)

    def seen(top_p: float) -> set[int]:
        return {next_token(logits, Sampling(temperature=1, top_p=top_p), generator) for _ in range(400)}

    assert (seen(0.4), seen(0.6), seen(0.9), seen(1)) == ({0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3})


def test_tokens_are_drawn_as_often_as_the_softmax_at_that_temperature_says() -> None:
    logits, generator, draws = torch.tensor([2.0, 1.0, 0.0]), torch.Generator().manual_seed(1), 5_000
    sampling = Sampling(temperature=2.0)
    counts = torch.bincount(torch.tensor([next_token(logits, sampling, generator) for _ in range(draws)]))
    expected = (logits / 2).softmax(-1)
    deviations = (counts / draws - expected) / (expected * (1 - expected) / draws).sqrt()
    assert deviations.abs().max() < 4.5


@pytest.mark.parametrize(
    "wrong",
    [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}],
)
def test_impossible_ways_of_drawing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"config\.bad-sampling"):
        Sampling(**wrong)


# --- where an answer ends -------------------------------------------------------------------------------------------


def test_the_template_s_end_marker_ends_an_answer(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(bos="<s>", eos="</s>", chat=CHATML + ASKING)
    assert stops_of(tokenizer, MESSAGES).texts == ("<|im_end|>",)
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    marker = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stops_of(tokenizer, MESSAGES) == Stops(frozenset({marker, tokenizer.bos_token_id, tokenizer.eos_token_id}))


def test_a_study_without_a_template_ends_as_its_own_layout_did(make_tokenizer: Any) -> None:
    with_end, without = make_tokenizer(eos="</s>"), make_tokenizer()
    assert stops_of(with_end, MESSAGES) == Stops(frozenset({with_end.eos_token_id}))
    assert stops_of(without, MESSAGES) == Stops(texts=("\n\n",))
    assert stops_of(without, Task("text", {"text": "t"})) == Stops()


def test_a_stop_text_is_never_shown_in_part(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    stream = TextStream(tokenizer, ("<|end|>",))
    pieces = [stream.push(token) for token in tokenizer("a <| b<|end|>c")["input_ids"]]
    assert "".join(pieces) + stream.finish() == "a <| b"
    assert stream.stopped
    assert all("<" not in piece or "<| b".startswith(piece.strip()) for piece in pieces)


def test_what_only_began_like_a_stop_text_is_shown_at_the_end(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    stream = TextStream(tokenizer, ("<|end|>",))
    shown = "".join(stream.push(token) for token in tokenizer("a<|en")["input_ids"])
    assert (shown, stream.finish()) == ("a", "<|en")


def test_a_character_of_several_tokens_appears_whole(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer("né 🙂!")["input_ids"]]
    assert [piece for piece in pieces if piece] == ["n", "é", " ", "🙂", "!"]


def test_streamed_text_is_the_decoded_whole(stories: Any) -> None:
    text = "Once upon a time, there was a café 🙂 and a dog."
    tokens = stories(text, add_special_tokens=False)["input_ids"]
    stream = TextStream(stories)
    assert "".join(map(stream.push, tokens)) + stream.finish() == text
