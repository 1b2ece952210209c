"""Asks the real llama.cpp: run by a Python that has llama-cpp-python, which need not have fedtune.

`python llama_worker.py REQUEST.json ANSWER.npz`; the request names `model`, maybe `lora`, `prompts` (lists of token
ids), `steps` (greedy tokens) and `texts` to tokenise; the answer holds `greedy_I`, `logits_I` (of the prompt, one row a
token), `ids_I` and `end` (1 where a token id ends a generation).
"""

from __future__ import annotations

import json
import sys
from typing import Any

import llama_cpp
import numpy as np


def greedy(model: Any, prompt: list[int], steps: int) -> tuple[np.ndarray, np.ndarray]:
    model.reset()
    model.eval(prompt)
    logits, tokens = np.array(model.scores[: len(prompt)]), []
    for step in range(steps):
        tokens.append(int(model.scores[len(prompt) + step - 1].argmax()))
        model.eval([tokens[-1]])
    return np.array(tokens, np.int64), logits


def main(request: dict[str, Any], out: str) -> None:
    model = llama_cpp.Llama(
        request["model"],
        lora_path=request.get("lora"),
        n_ctx=request.get("context", 256),
        logits_all=True,
        n_threads=1,
        flash_attn=False,
        type_k=0,  # float32 keys and values, so that only the weights' format rounds
        type_v=0,
        verbose=False,
    )
    answer: dict[str, np.ndarray] = {}
    for at, prompt in enumerate(request.get("prompts", [])):
        answer[f"greedy_{at}"], answer[f"logits_{at}"] = greedy(model, prompt, request["steps"])
    for at, text in enumerate(request.get("texts", [])):
        answer[f"ids_{at}"] = np.array(model.tokenize(text.encode(), add_bos=True, special=True), np.int64)
    vocab = llama_cpp.llama_model_get_vocab(model.model)
    answer["end"] = np.array([llama_cpp.llama_vocab_is_eog(vocab, token) for token in range(model.n_vocab())])
    np.savez(out, **answer)


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:  # noqa: PTH123 - runs without anything but llama.cpp
        main(json.load(file), sys.argv[2])
