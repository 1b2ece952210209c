"""`fedtune config`: what can be chosen (`ls`) and what a run would use (`show`)."""

import json
from enum import StrEnum
from typing import Annotated

import click
import typer

from fedtune.commands.options import ConfigFile, Format, OutputFormat, Overrides, Verbose

app = typer.Typer(help="List the configuration's groups, or print what a run would use.", no_args_is_help=True)


class ConfigFormat(StrEnum):
    """YAML can be read back with `--config`; JSON is for programs."""

    yaml = "yaml"
    json = "json"


@app.command()
def ls(*, output: Format = OutputFormat.text, verbose: Verbose = False) -> None:  # noqa: ARG001 - read by the caller
    """List groups, their options and the experiments, each with what it is."""
    from fedtune.config.sources import groups

    if output is OutputFormat.json:
        click.echo(json.dumps({group: dict(options) for group, options in groups().items()}, ensure_ascii=False))
        return
    for group, options in groups().items():
        width = max(len(option) for option in options)
        click.echo(f"{group}")
        for option, description in options.items():
            click.echo(f"  {group}={option:<{width}}  {description}")


@app.command()
def show(
    overrides: Overrides = None,
    *,
    config: ConfigFile = None,
    output: Annotated[ConfigFormat, typer.Option("--format", help="YAML or JSON.")] = ConfigFormat.yaml,
    verbose: Verbose = False,  # noqa: ARG001 - read where errors are printed
) -> None:
    """Print the composed and validated settings of one run; as YAML they can be given back with `--config`."""
    from fedtune.config.compose import compose

    settings = compose(overrides or [], config).model_dump(mode="json")
    if output is ConfigFormat.json:
        click.echo(json.dumps(settings, indent=2, ensure_ascii=False))
        return
    import yaml

    click.echo(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=120), nl=False)
