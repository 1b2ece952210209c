"""A tokenizer as GGUF metadata: tokens, their types, scores or merges, special tokens, and the chat template.

llama.cpp brings its own tokenizers. Which of them equals the one of training is found from the tokenizer's own
definition (`tokenizer.json`, as `transformers` loaded it), never from a model's name: `spm` for byte-fallback BPE with
`▁`, `bpe` for byte-level BPE. Everything else is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedtune.errors import ReleaseError

if TYPE_CHECKING:
    from pathlib import Path

    from gguf import GGUFWriter

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens by id, with GGUF's token types; `scores` rank SentencePiece merges, `merges` are byte-level BPE's."""

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] | None = None
    merges: tuple[str, ...] | None = None
    space_prefix: bool | None = None


@dataclass(frozen=True, slots=True)
class TokenizerTable:
    """What a GGUF file says about its tokenizer: `special` maps bos, eos, eot, eom, unk and pad to ids."""

    vocabulary: Vocabulary
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    chat_template: str | None
    notes: tuple[str, ...] = field(default=())


def load_tokenizer(folder: Path) -> Any:
    """Load a folder's fast tokenizer; error: `release.no-tokenizer`."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise _no_tokenizer(folder, f"cannot be loaded ({error})") from error
    if not getattr(tokenizer, "is_fast", False):
        raise _no_tokenizer(folder, "has no tokenizer.json, whose rules could be read")
    return tokenizer


def read_tokenizer(folder: Path, rows: int) -> TokenizerTable:
    """Read a folder's tokenizer for a model with `rows` embeddings, and check it on texts.

    Errors: `release.no-tokenizer`, `release.unknown-tokenizer` when llama.cpp has none like it,
    `release.tokenizer-differs` when its tokens of a text would be others than in training.
    """
    from fedtune.release.gguf.bpe import byte_level_vocabulary
    from fedtune.release.gguf.spm import check_pieces, prefix_notes, sentencepiece_vocabulary

    tokenizer = load_tokenizer(folder)
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    types = token_types(definition, tokenizer)
    model = definition["model"]
    if model["type"] != "BPE":
        raise unknown_tokenizer(f"is of the type {model['type']}")
    if model.get("byte_fallback"):
        vocabulary = sentencepiece_vocabulary(definition, types, rows)
        check_pieces(vocabulary, tokenizer)
    else:
        vocabulary = byte_level_vocabulary(definition, types, rows)
    before, after = _framing(tokenizer)
    special, notes = _special_ids(folder, tokenizer)
    notes += prefix_notes(definition)
    return TokenizerTable(vocabulary, special, before, after, _chat_template(tokenizer), notes)


def add_tokenizer(writer: GGUFWriter, table: TokenizerTable) -> None:
    """Write a tokenizer's metadata."""
    vocabulary = table.vocabulary
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.scores is not None:
        writer.add_token_scores(list(vocabulary.scores))
    if vocabulary.merges is not None:
        writer.add_token_merges(list(vocabulary.merges))
    if vocabulary.space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.space_prefix)
    for name, token in table.special.items():
        writer.add_uint32(f"tokenizer.ggml.{_KEYS[name]}_token_id", token)
    writer.add_add_bos_token(table.add_bos)
    writer.add_add_eos_token(table.add_eos)
    if table.chat_template is not None:
        writer.add_chat_template(table.chat_template)


_KEYS = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unk": "unknown", "pad": "padding"}


def token_types(definition: dict[str, Any], tokenizer: Any) -> dict[int, tuple[str, int]]:
    """Return each token's text and type by id; added tokens that are special are `CONTROL`."""
    model = definition["model"]
    typed = {number: (text, NORMAL) for text, number in model["vocab"].items()}
    for added in definition["added_tokens"]:
        typed[added["id"]] = (added["content"], CONTROL if added["special"] else USER_DEFINED)
    if model.get("byte_fallback"):
        for byte in range(256):
            number = model["vocab"].get(f"<0x{byte:02X}>")
            if number is None:
                raise unknown_tokenizer(f"has no token for the byte {byte:#04x}")
            typed[number] = (typed[number][0], BYTE)
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is not None and model.get("byte_fallback"):
        typed[unknown] = (typed[unknown][0], UNKNOWN)
    return typed


def padded(typed: dict[int, tuple[str, int]], rows: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return tokens and types for every embedding row; rows without a token get a name that no text is."""
    if max(typed) >= rows:
        raise unknown_tokenizer(f"has the token id {max(typed)}, but the model has {rows} embeddings")
    texts = {text for text, _ in typed.values()}
    full = [typed.get(row, (f"[PAD{row}]", UNUSED)) for row in range(rows)]
    if len(texts) != len(typed) or len({text for text, _ in full}) != rows or "" in texts:
        raise unknown_tokenizer("has two tokens with the same text, or an empty one, which GGUF cannot tell apart")
    return tuple(text for text, _ in full), tuple(kind for _, kind in full)


def unknown_tokenizer(finding: str) -> ReleaseError:
    """Return the refusal of a tokenizer that llama.cpp has no equal of."""
    return ReleaseError(
        "unknown-tokenizer",
        f"the base's tokenizer {finding}; llama.cpp has none that would give the same tokens",
        hint="use transformers: fedtune release RUN --to merged",
    )


def _framing(tokenizer: Any) -> tuple[bool, bool]:
    """Return whether the tokenizer puts its bos before and its eos after every text; anything else is refused."""
    from fedtune.data.templates import special_tokens

    around = special_tokens(tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if around.before not in {(), (bos,)} or around.after not in {(), (eos,)}:
        raise unknown_tokenizer(f"frames a text with {around.before} and {around.after}, not with bos and eos")
    return bool(around.before), bool(around.after)


def _special_ids(folder: Path, tokenizer: Any) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the special tokens, with the other ends of generation as eot and eom, the two more that GGUF has."""
    names = ("bos", "eos", "unk", "pad")
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in names}
    special = {name: int(number) for name, number in ids.items() if number is not None}
    ends = [number for number in end_ids(folder, tokenizer) if number != special.get("eos")]
    if ends and "eos" not in special:
        special["eos"] = ends.pop(0)
    special |= dict(zip(("eot", "eom"), ends, strict=False))
    dropped = [tokenizer.convert_ids_to_tokens(number) for number in ends[2:]]
    notes = [f"GGUF has no place for the further end tokens {', '.join(dropped)}"] if dropped else []
    if "eos" not in special:
        notes.append("the tokenizer has no end token; llama.cpp takes one by a fixed number")
    return special, tuple(notes)


def end_ids(folder: Path, tokenizer: Any) -> list[int]:
    """Return the token ids that end a generation: the tokenizer's eos, and those of `generation_config.json`."""
    ends = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    path = folder / "generation_config.json"
    if path.exists():
        stated = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        more = stated if isinstance(stated, list) else [stated]
        ends += [int(number) for number in more if number is not None]
    return list(dict.fromkeys(ends))


def _chat_template(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, dict) else template


def _no_tokenizer(folder: Path, finding: str) -> ReleaseError:
    hint = "name a model folder with tokenizer.json and tokenizer_config.json"
    return ReleaseError("no-tokenizer", f"the tokenizer of {folder} {finding}", hint=hint)
