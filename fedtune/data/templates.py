"""Examples: a record as the tokens a model sees, with the tokens that count in its loss. Knows no batch and no model.

Each record is tokenised by itself, so that an example never depends on another record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from fedtune.data.chat import lay_out
from fedtune.data.records import Conversation, Dialogue, LabelledText, Record, Segment

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from fedtune.data.tasks import Task

IGNORED = -100  # the label that PyTorch's cross-entropy leaves out
_CHUNK = 1000  # records tokenised in one call


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One record as tokens.

    `input_ids` is (tokens,). Classification has `target`, the class. Causal language modelling has `labels` (tokens,):
    the token itself where it counts in the loss and `IGNORED` elsewhere, not shifted (the loss shifts them by one).
    `length` is the number of tokens before truncation.
    """

    input_ids: NDArray[np.int32]
    length: int
    target: int | None = None
    labels: NDArray[np.int32] | None = None

    @property
    def truncated(self) -> bool:
        """Whether tokens were cut off."""
        return self.length > len(self.input_ids)

    @property
    def trained_tokens(self) -> int:
        """How many next-token predictions count in the loss; the first token is never predicted.

        It can be 0: a text of one token and no beginning-of-sequence token. The loss of such a record must be 0,
        not 0/0.
        """
        return 0 if self.labels is None else int(np.count_nonzero(self.labels[1:] != IGNORED))


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """What a tokenizer puts around a text by itself: `[CLS] … [SEP]` or `<s> …`."""

    before: tuple[int, ...]
    after: tuple[int, ...]


def render(record: Record, tokenizer: Any, task: Task, max_tokens: int) -> Example:
    """Render one record; see `render_all`."""
    return render_all([record], tokenizer, task, max_tokens)[0]


def render_all(records: Sequence[Record], tokenizer: Any, task: Task, max_tokens: int) -> list[Example]:
    """Render records in order, each to at most `max_tokens` tokens.

    Classification: the text within the tokenizer's special tokens; the end of a long text is cut.

    Causal language modelling: beginning-of-sequence (where the tokenizer adds one by itself), the segments,
    end-of-sequence (where there is one; a chat template writes its own). No token runs across the start of a trained
    segment, and the tokens before the first one are those of the prompt alone, which is what generation starts from.
    Too long, the prompt loses tokens from its left until it fills what the completion leaves free, or half of the
    room if the completion leaves less; then the completion loses its end. So a cut completion keeps its start and
    does not learn to stop there, and every record with a trained token keeps one.
    """
    special = special_tokens(tokenizer)
    classify = task.kind == "classification"
    examples: list[Example] = []
    for start in range(0, len(records), _CHUNK):
        chunk = records[start : start + _CHUNK]
        if classify:
            examples += _classified(chunk, tokenizer, special, max_tokens)
        else:
            examples += _modelled(chunk, tokenizer, special, max_tokens)
    return examples


def special_tokens(tokenizer: Any) -> SpecialTokens:
    """Find what the tokenizer adds around a text, by comparing one text with and without."""
    (inner,) = _encode(tokenizer, ["a"])
    framed = tokenizer("a")["input_ids"]
    for at in range(len(framed) - len(inner) + 1):
        if inner and framed[at : at + len(inner)] == inner:
            return SpecialTokens(tuple(framed[:at]), tuple(framed[at + len(inner) :]))
    return SpecialTokens((), ())


def segments_of(record: Record, tokenizer: Any) -> tuple[Segment, ...]:
    """Return a record's text in segments, as it will be tokenised."""
    match record:
        case LabelledText(text=text):
            return (Segment(text, trained=False),)
        case Conversation(segments=segments):
            return segments
        case Dialogue():
            return lay_out(record, tokenizer)


def _classified(
    records: Sequence[Record], tokenizer: Any, special: SpecialTokens, max_tokens: int
) -> Iterable[Example]:
    labelled = cast(Sequence[LabelledText], records)
    around = len(special.before) + len(special.after)
    encoded = _encode(tokenizer, [record.text for record in labelled])
    for record, ids in zip(labelled, encoded, strict=True):
        kept = [*special.before, *ids[: max(0, max_tokens - around)], *special.after]
        yield Example(np.array(kept, np.int32), length=len(ids) + around, target=record.label)


def _modelled(records: Sequence[Record], tokenizer: Any, special: SpecialTokens, max_tokens: int) -> Iterable[Example]:
    laid_out = [segments_of(record, tokenizer) for record in records]
    prefixes = ["".join(part.text for part in parts[: at + 1]) for parts in laid_out for at in range(len(parts))]
    encoded = iter(_encode(tokenizer, prefixes))
    for record, parts in zip(records, laid_out, strict=True):
        ids, trained = _joined(parts, [next(encoded) for _ in parts], tokenizer)
        end = tokenizer.eos_token_id
        if isinstance(record, Conversation) and end is not None and ids[-1:] != [end]:
            ids, trained = [*ids, end], [*trained, parts[-1].trained]
        yield _fitted(ids, trained, special.before, max_tokens)


def _joined(parts: Sequence[Segment], prefixes: Sequence[list[int]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Tokenise segment after segment; `prefixes[i]` are the tokens of the text up to the end of segment i.

    Where that text's tokens begin with those we have, the rest of them is the segment: no boundary is disturbed, and
    nothing is put in front of a segment in mid-text (SentencePiece would add a space). Otherwise a token would run
    across the boundary, and the segment is tokenised by itself.
    """
    ids: list[int] = []
    trained: list[bool] = []
    for part, prefix in zip(parts, prefixes, strict=True):
        undisturbed = prefix[: len(ids)] == ids
        added = prefix[len(ids) :] if undisturbed else _encode(tokenizer, [part.text])[0]
        ids += added
        trained += [part.trained] * len(added)
    return ids, trained


def _fitted(ids: list[int], trained: list[bool], before: tuple[int, ...], max_tokens: int) -> Example:
    """Put the beginning-of-sequence tokens in front and cut to `max_tokens`, as `render_all` describes."""
    own = len(before) if before and tuple(ids[: len(before)]) == before else 0  # a chat template may write them itself
    ids, trained = ids[own:], trained[own:]
    room = max(1, max_tokens - len(before))
    prompt = trained.index(True) if True in trained else len(ids)
    kept_prompt = min(prompt, max(room - (len(ids) - prompt), room // 2))
    cut = slice(prompt - kept_prompt, prompt - kept_prompt + room)
    kept = np.array([*before, *ids[cut]], np.int32)
    counted = np.array([*[False] * len(before), *trained[cut]], bool)
    labels = np.where(counted, kept, np.int32(IGNORED))
    return Example(kept, length=len(before) + len(ids), labels=labels)


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Tokenise texts without special tokens, truncation or padding."""
    if not texts:
        return []
    plain = {"add_special_tokens": False, "truncation": False, "padding": False, "verbose": False}
    encoded = tokenizer(list(texts), return_attention_mask=False, return_token_type_ids=False, **plain)
    return cast(list[list[int]], encoded["input_ids"])
