"""Tokens to text as they come: no half character, nothing from a stop text on. Knows no model."""

from __future__ import annotations

from typing import Any

_HALF = "\ufffd"  # what a tokenizer writes for bytes that are no whole character (yet)


class TextStream:
    """The text of an answer that grows by a token at a time.

    What is given out is never taken back: a character whose last bytes are missing and text that may become a stop
    text are held until they are decided.
    """

    def __init__(self, tokenizer: Any, stops: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._tokens: list[int] = []
        self.given = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take one more token, and return the text that is certain now."""
        self._tokens.append(token)
        text = self._text()
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._give(text[: min(found)])
        return self._give(text[: len(text) - self._undecided(text)])

    def finish(self) -> str:
        """Return what was held back and stays; nothing after a stop text."""
        return "" if self.stopped else self._give(self._text())

    def _text(self) -> str:
        decoded = self._tokenizer.decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(decoded)

    def _undecided(self, text: str) -> int:
        """Return how many last characters may still change or become a stop text."""
        half = len(text) - len(text.rstrip(_HALF))
        starts = (n for stop in self._stops for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n]))
        return max(half, *starts, 0)

    def _give(self, text: str) -> str:
        new = text[len(self.given) :]
        self.given += new
        return new
