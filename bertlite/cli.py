"""The command line. Every command imports what it needs when it runs, so that --help is immediate."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from bertlite import __version__

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; see configs/ for examples.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting: --set train.max_steps=100.")
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run folder, in place of output_dir.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face folder, a hub name, or a run folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Precision = Annotated[str, typer.Option(help="fp32 or bf16.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"bertlite {__version__}")
        raise typer.Exit


@app.callback()
def bertlite(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Turns a pile of text into a BERT that Hugging Face loads, and proves that it is one."""


@app.command()
def prepare(config: ConfigFile, overrides: Overrides = None) -> None:
    """Make the tokenizer and the corpus of a configuration, if they are not in the cache yet."""
    from bertlite import pretrain as pretraining
    from bertlite.config import PretrainConfig, load_config

    pretraining.prepare(load_config(PretrainConfig, config, overrides or []))


@app.command()
def pretrain(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest valid checkpoint.")] = False,
) -> None:
    """Train an encoder on raw text by masked language modelling."""
    from bertlite import pretrain as pretraining
    from bertlite.config import PretrainConfig, load_config

    folder = [f"output_dir={json.dumps(str(out))}"] if out else []
    print(pretraining.run(load_config(PretrainConfig, config, [*(overrides or []), *folder]), resume=resume))


def main() -> None:
    """Run the command line; a user's mistake ends in one or two lines and exit code 2, never in a traceback."""
    from bertlite.errors import Failure, UserError
    from bertlite.signals import Stopped, listen

    listen()
    try:
        app()
    except UserError as error:
        sys.exit(_say(str(error), 2))
    except Failure as error:
        sys.exit(_say(str(error), 1))
    except Stopped as stopped:
        sys.exit(_say(f"stopped by {stopped}", 128 + stopped.number))


def _say(text: str, code: int) -> int:
    for line in text.splitlines():
        print(f"bertlite: {line}", file=sys.stderr)
    return code
