"""`fedtune chat`: talk to a finished study's model in the terminal, or through a pipe."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer

from fedtune.commands.asking import is_interactive
from fedtune.commands.options import Base, Format, OutputFormat, Verbose
from fedtune.commands.screen import quiet_libraries
from fedtune.errors import ConfigError, FedtuneError

if TYPE_CHECKING:
    from fedtune.generation.chat import Chat

app = typer.Typer(help="Talk to a finished study's model.")
_SHOWN = 5  # labels shown to a person
_AGAIN = "the same command starts a new conversation"

Reply = Callable[[str], None]


@app.command()
def chat(  # noqa: PLR0913 - one argument an option
    model: Annotated[Path, typer.Argument(metavar="RUN|DIR", help="A run folder, or a release made with --to peft.")],
    *,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; more draws more freely.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that reach this together.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed and words give the same answers.")] = 0,
    system: Annotated[str | None, typer.Option(help="A system message, in a study of messages.")] = None,
    base: Base = None,
    output: Format = OutputFormat.text,
    verbose: Verbose = False,
) -> None:
    r"""Talk to a finished study's model; words are put to it exactly as records were in training.

    /reset forgets the conversation, /input TEXT sets what instructions apply to, /exit ends. Ctrl-C stops an answer,
    a second one ends. From a pipe, each line is answered by one line (a line feed in an answer as \n).
    """
    quiet_libraries(verbose=verbose)
    from fedtune.generation.sampling import Sampling
    from fedtune.simulation.finished import FinishedRun

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    opened = FinishedRun(model, base)
    if is_interactive() or opened.plan.promise.mode == "off":
        click.echo(opened.statement, err=True)
    if opened.plan.task.kind == "classification":
        _refuse_system(system)
        _note("labels with their probabilities; /exit ends")
        _talk(_classifier(opened, output), {})
        return
    from fedtune.generation.chat import Chat

    talk = Chat(opened.workspace, sampling, system)
    _note(f"{talk.manner}; /exit ends, Ctrl-C stops an answer")
    _talk(_speaker(talk, output), {"/reset": lambda _: talk.reset(), "/input": talk.apply_to})


def _talk(reply: Reply, commands: dict[str, Callable[[str], None]]) -> None:
    """Reply to line after line; a second interruption ends: at the prompt of a terminal, or in a pipe's next answer."""
    interrupted = False
    for line in _lines():
        word, _, rest = line.partition(" ")
        if word == "/exit":
            return
        try:
            commands[word](rest.strip()) if word in commands else reply(line)
            interrupted = False
        except FedtuneError as error:  # such as a chat template that refuses these words: others may do
            if not is_interactive():
                raise
            _note(f"{error.message}; {error.hint}")
        except KeyboardInterrupt:
            if interrupted and not is_interactive():
                raise KeyboardInterrupt(_AGAIN) from None
            interrupted = True


def _lines() -> Iterator[str]:
    """Yield what is written, without blank lines, until its end; in a terminal Ctrl-C ends it too."""
    while True:
        try:
            line = _read()
        except KeyboardInterrupt:
            if not is_interactive():
                raise KeyboardInterrupt(_AGAIN) from None
            line = ""
        if not line:
            return
        if text := line.strip():
            yield text


def _read() -> str:
    """Return the next line, "" at the end; a terminal shows that it waits, and has the keys of a shell."""
    if not (is_interactive() and sys.stdout.isatty()):
        return sys.stdin.readline()
    import readline  # noqa: F401 - gives `input` its keys

    try:
        return input("> ") + "\n"
    except EOFError:
        return ""


def _speaker(talk: "Chat", output: OutputFormat) -> Reply:
    def speak(text: str) -> None:
        answer = talk.ask(text)
        finish = "interrupted"
        try:
            for piece in answer:
                _write(piece, output)
            finish = answer.completion.finish
        finally:
            said = answer.completion
            talk.remember(text, said.text)
            _end({"prompt": text, "answer": said.text, "finish": finish, "tokens": said.tokens}, output)
        if answer.cut:
            _note("the beginning no longer fits into what the base can see and was left out; /reset starts anew")
        if finish == "length":
            _note(f"stopped after {said.tokens} tokens; --max-new-tokens allows more")

    return speak


def _classifier(opened: Any, output: OutputFormat) -> Reply:
    from fedtune.generation.classes import probabilities

    labels = opened.plan.task.labels

    def classify(text: str) -> None:
        (row,) = probabilities(opened.workspace, [text], opened.plan.data.max_tokens, 1)
        ranked = sorted(zip(labels, row, strict=True), key=lambda pair: -pair[1])
        between = "\n" if is_interactive() else ", "
        _write(between.join(f"{label} {probability:.4f}" for label, probability in ranked[:_SHOWN]), output)
        named = [{"label": label, "probability": round(probability, 6)} for label, probability in ranked]
        _end({"text": text, "labels": named}, output)

    return classify


def _write(piece: str, output: OutputFormat) -> None:
    """Show text as it comes; what a terminal would act on is escaped, and so is a line feed in a pipe."""
    from fedtune.display import printable

    if output is OutputFormat.text and piece:
        shown = printable(piece)
        click.echo(shown if is_interactive() else shown.replace("\n", "\\n"), nl=False)


def _end(document: dict[str, Any], output: OutputFormat) -> None:
    click.echo(json.dumps(document, ensure_ascii=False) if output is OutputFormat.json else "")
    sys.stdout.flush()


def _note(words: str) -> None:
    from fedtune.display import printable

    if is_interactive():
        click.echo(f"({printable(words)})", err=True)


def _refuse_system(system: str | None) -> None:
    if system is not None:
        raise ConfigError("no-system-message", "a classifier takes no system message", hint="leave --system out")
