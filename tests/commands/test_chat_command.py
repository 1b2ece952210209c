from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fedtune.data.records import Dialogue, Turn
from fedtune.data.templates import IGNORED, render
from tests.support.runs import ROOT, Done, Study, command, run_process, summary_of
from tests.support.tiny import question_jsonl, tiny_base, tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = ROOT / "docs" / "generation.md"
CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def language_study(study: Study, name: str, *changes: str, chat: str | None = None) -> Path:
    """Train a study of language on a tiny Llama for one round."""
    folder, base = study.runs / name, tiny_base(study.folder / f"base-{name}", "llama", max_position_embeddings=4096)
    if chat is not None:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = chat
        tokenizer.save_pretrained(base)
    words = [word for word in study.words() if not word.startswith(("data.", "model."))]
    summary_of(*words, "data.max_tokens=48", f"model.base={base}", f"run.dir={folder}", "federation.rounds=1", *changes)
    return folder


@pytest.fixture(scope="module")
def prompts(study: Study) -> Path:
    file = question_jsonl(study.folder / "questions.jsonl")
    return language_study(study, "prompts", f"data.path={file}", "data.prompt=prompt", "data.completion=completion")


@pytest.fixture(scope="module")
def messages(study: Study) -> Path:
    file = study.folder / "messages.jsonl"
    said = [[{"role": "user", "content": f"Hi {n}"}, {"role": "assistant", "content": "Hello"}] for n in range(24)]
    file.write_text("".join(json.dumps({"messages": one}) + "\n" for one in said))
    return language_study(study, "messages", f"data.path={file}", "data.messages=messages", chat=CHAT)


@pytest.fixture(scope="module")
def classes(study: Study) -> Path:
    folder = study.runs / "chatty"
    summary_of(*study.words("privacy=off", "federation.rounds=1", "training.learning_rate=0.3"), f"run.dir={folder}")
    return folder


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Return `fedtune chat` with lines that come through a pipe."""

    def say(run: Path, lines: str, *options: str) -> Done:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        return command("chat", str(run), *options)

    return say


def documents(done: Done) -> list[dict[str, Any]]:
    assert done.code == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]


def test_each_line_of_a_pipe_is_answered_by_one_line(prompts: Path, said: Any) -> None:
    done = said(prompts, "what is 7?\n\nwhat is 8?\nwhat is 7?\n", "--max-new-tokens", "12")
    assert (done.code, done.out.count("\n")) == (0, 3), done.err
    first, _, third = done.out.splitlines()
    assert first == third  # the study learnt no conversations, so that nothing is remembered


def test_the_answers_are_those_of_predict(prompts: Path, said: Any, tmp_path: Path) -> None:
    file = tmp_path / "new.jsonl"
    file.write_text('{"prompt": "what is 7?"}\n{"prompt": "what is 12345?"}\n')
    predicted = documents(command("predict", str(prompts), str(file)))
    answered = documents(said(prompts, "what is 7?\nwhat is 12345?\n", "--format", "json", "--max-new-tokens", "64"))
    assert [line["answer"].strip() for line in answered] == [line["completion"] for line in predicted]


def test_json_names_the_end_of_an_answer(prompts: Path, said: Any) -> None:
    (found,) = documents(said(prompts, "what is 7?\n", "--format", "json", "--max-new-tokens", "3"))
    assert (found["prompt"], found["finish"], found["tokens"]) == ("what is 7?", "length", 3)


def test_a_seed_gives_the_same_words_again(prompts: Path, said: Any) -> None:
    def drawn(seed: int) -> str:
        return str(said(prompts, "what is 7?\n", "--temperature", "1.5", "--seed", str(seed)).out)

    assert drawn(3) == drawn(3) != drawn(4)


def test_a_conversation_is_remembered_until_it_is_reset(messages: Path, said: Any) -> None:
    options = ("--format", "json", "--max-new-tokens", "8", "--temperature", "1.5", "--system", "Be kind.")
    first, again, anew = documents(said(messages, "Hi\nHi\n/reset\nHi\n/exit\nHi\n", *options))
    assert first == anew
    assert first["answer"] != again["answer"]


def test_a_conversation_is_put_as_training_would_have(messages: Path) -> None:
    from fedtune.generation.chat import Chat
    from fedtune.generation.sampling import Sampling
    from fedtune.simulation.finished import FinishedRun

    finished = FinishedRun(messages)
    talk = Chat(finished.workspace, Sampling(), "Be kind.")
    talk.remember("Hi", "Hello")
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Ciao")]
    whole = Dialogue(tuple(Turn(*turn) for turn in turns))
    example = render(whole, finished.workspace.tokenizer, finished.plan.task, 9999)
    assert example.labels is not None
    kept = max(at for at, label in enumerate(example.labels) if label == IGNORED) + 1
    assert list(talk.prompt("Bye").tokens) == example.input_ids[:kept].tolist()


def test_a_classifier_gives_labels_with_probabilities(classes: Path, said: Any, study: Study) -> None:
    done = said(classes, "my card number 1\n")
    label, probability = done.out.split(", ")[0].split()
    assert label in {"card", "cash"}
    assert 0.5 <= float(probability) <= 1
    assert "NOT PRIVATE" in done.err
    (found,) = documents(said(classes, "my card number 1\n", "--format", "json"))
    assert sum(one["probability"] for one in found["labels"]) == pytest.approx(1, abs=1e-5)
    file = study.folder / "one.csv"
    file.write_text("text\nmy card number 1\n")
    (predicted,) = documents(command("predict", str(classes), str(file)))
    assert found["labels"][0] == {key: predicted[key] for key in ("label", "probability")}


def test_a_release_answers_as_the_run_that_it_was_made_of(
    prompts: Path, said: Any, study: Study, tmp_path: Path
) -> None:
    out, base = tmp_path / "release", study.folder / "base-prompts"
    done = command("release", str(prompts), "--to", "peft", "--out", str(out))
    assert done.code == 0, done.err
    answers = said(out, "what is 7?\n", "--base", str(base), "--format", "json").out
    assert answers == said(prompts, "what is 7?\n", "--format", "json").out
    assert "no-base]" in said(out, "what is 7?\n").err


@pytest.mark.parametrize("wrong", [("--temperature", "-1"), ("--top-p", "0"), ("--max-new-tokens", "0")])
def test_impossible_options_are_refused(prompts: Path, said: Any, wrong: tuple[str, str]) -> None:
    done = said(prompts, "Hi\n", *wrong)
    assert (done.code, done.out) == (2, "")
    assert "error[config.bad-sampling]" in done.err
    assert wrong[0] in done.err


def test_a_system_message_is_refused_where_none_was_learnt(prompts: Path, classes: Path, said: Any) -> None:
    for run in (prompts, classes):
        assert "error[config.no-system-message]" in said(run, "Hi\n", "--system", "Be kind.").err


def test_inputs_are_refused_where_none_were_learnt(prompts: Path, said: Any) -> None:
    assert "error[config.no-input]" in said(prompts, "/input a text\nHi\n").err


def test_a_study_without_an_adapter_says_how_to_get_one(study: Study, said: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command("simulate", *study.words("training.learning_rate=1e6", f"run.dir={run}"))  # no update is accepted
    done = said(run, "Hi\n")
    assert done.code == 2
    assert "no-adapter]" in done.err
    assert "fedtune simulate --resume" in done.err


def test_a_base_that_has_changed_is_refused(study: Study, tmp_path: Path) -> None:
    base, run = tiny_base(tmp_path / "base", seed=1), tmp_path / "run"
    summary_of(*study.words(f"model.base={base}", f"run.dir={run}", "federation.rounds=1"))
    tiny_base(base, seed=2)
    done = run_process("chat", str(run), stdin=subprocess.DEVNULL)
    assert (done.code, "error[model.other-base]" in done.err) == (2, True), done.err


def test_a_folder_that_is_no_run_is_refused(said: Any, tmp_path: Path) -> None:
    done = said(tmp_path, "Hi\n")
    assert done.code == 2
    assert "hint: " in done.err


# --- in a terminal --------------------------------------------------------------------------------------------------


class Terminal:
    """`fedtune chat` in a terminal of its own, whose keys are pressed when something has appeared."""

    def __init__(self, run: Path, *options: str) -> None:
        self.child, self.master = pty.fork()
        if not self.child:
            places = os.pathsep.join([str(ROOT), str(ROOT / "server"), str(ROOT / "client")])
            os.environ.update(PYTHONPATH=places, TERM="dumb", NO_COLOR="1", OMP_NUM_THREADS="1")
            os.execv(sys.executable, [sys.executable, "-m", "fedtune.cli", "chat", str(run), *options])
        self.text, self.seen = "", 0

    def wait_for(self, text: str) -> str:
        """Return what appeared until and with this text."""
        until = time.monotonic() + 120
        while (at := self.text.find(text, self.seen)) < 0:
            self._read(until)
        found, self.seen = self.text[self.seen : at + len(text)], at + len(text)
        return found

    def wait_for_more(self, count: int) -> None:
        """Wait until so many more characters have appeared."""
        wanted, until = len(self.text) + count, time.monotonic() + 120
        while len(self.text) < wanted:
            self._read(until)

    def _read(self, until: float) -> None:
        assert time.monotonic() < until, self.text
        if select.select([self.master], [], [], 0.2)[0]:
            self.text += os.read(self.master, 65536).decode(errors="replace")

    def write(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def end(self, keys: str) -> int:
        """Press keys, read until the process has ended, and return its exit code.

        Every ten seconds once more: a signal that comes just before the terminal is asked for a key waits for that key.
        """
        until = time.monotonic() + 120
        with contextlib.suppress(OSError):  # the other end is closed
            while True:
                self.write(keys)
                again = time.monotonic() + 10
                while time.monotonic() < again:
                    self._read(until)
        os.close(self.master)
        return os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])


def test_in_a_terminal_ctrl_c_stops_an_answer_and_a_second_one_ends(prompts: Path) -> None:
    terminal = Terminal(prompts, "--max-new-tokens", "4000")
    assert "each line is a prompt of its own" in terminal.wait_for("> ")
    for question in ("what is 7?", "what is 8?"):
        terminal.write(f"{question}\n")
        terminal.wait_for(f"{question}\r\n")
        terminal.wait_for_more(20)
        terminal.write("\x03")
        assert "stopped after" not in terminal.wait_for("> ")
    assert terminal.end("\x03") == 0
    assert "Traceback" not in terminal.text


def test_what_a_terminal_would_act_on_is_escaped(prompts: Path, said: Any) -> None:
    done = said(prompts, "what is 7?\n", "--temperature", "50", "--max-new-tokens", "200")
    assert all(char.isprintable() or char == "\n" for char in done.out)


def test_the_page_about_generation_runs(
    prompts: Path, said: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    (tmp_path / "questions.csv").write_text("prompt\nwhat is 7?\n")
    monkeypatch.chdir(tmp_path)
    for line in block.splitlines():
        _, verb, *words = line.split("#")[0].replace("RUN", str(prompts)).partition("<")[0].split()
        monkeypatch.setattr(sys, "stdin", io.StringIO("what is 7?\n"))
        done = command(verb, *words)
        assert (done.code, done.out.count("\n")) == (0, 1), done.err
