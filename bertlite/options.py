"""Options that several commands have, and what the commands do with them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

if TYPE_CHECKING:
    from bertlite.api import LoadedModel
    from bertlite.config.fields import Section

Config = TypeVar("Config", bound="Section")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; see configs/ for examples.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, as in train.max_steps=100; repeatable."),
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run folder, instead of output_dir.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face folder, a hub name or a run folder.")]
Resume = Annotated[bool, typer.Option("--resume", help="Resume from the newest valid checkpoint.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a run of this command in the run folder.")]
ExtendTo = Annotated[
    int | None, typer.Option(min=1, metavar="STEPS", help="Resume a run, also a finished one, up to this step.")
]
Budget = Annotated[
    str | None, typer.Option(metavar="TIME", help='What the run may take, as in 30m, 24h or "2e9 tokens".')
]
InitialModel = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="The pretrained model, instead of model.init_from.")
]
Column = Annotated[
    list[str] | None,
    typer.Option("--column", metavar="NAME", help="Column that holds the text, if FILE is a table; default: text."),
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column", metavar="NAME", help="Column that holds the text; twice for pairs. Default: as in fine-tuning."
    ),
]
Field = Annotated[
    str | None, typer.Option(metavar="KEY", help="Key of the list in a JSON file that holds several, such as test.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Precision = Annotated[Literal["fp32", "bf16"], typer.Option(help="Precision of matrix products.")]

# Of `evaluate`.
EvaluationData = Annotated[
    list[str] | None, typer.Option("--data", metavar="FILE", help="Text, or labelled examples; repeatable.")
]
MinimalPairs = Annotated[
    list[str] | None, typer.Option("--pairs", metavar="FILE", help="File of BLiMP pairs; repeatable.")
]
PseudoPerplexity = Annotated[
    bool, typer.Option("--pseudo-perplexity", help="Also mask each token of the text in turn, which is slow.")
]
EvaluationLength = Annotated[int | None, typer.Option(min=8, metavar="TOKENS", help="Default: as in pretraining.")]
DocumentEnd = Annotated[
    Literal["blank-line", "line"] | None, typer.Option(help="What ends a document; default: a blank line.")
]
Labels = Annotated[
    list[str] | None, typer.Option(metavar="COLUMN", help="Column of the label; default: as in fine-tuning.")
]
OnBadExample = Annotated[
    Literal["error", "skip"] | None, typer.Option(help="What to do with rows that cannot be used.")
]


def load_config(
    config_type: type[Config],
    path: Path,
    overrides: list[str] | None,
    out: Path | None = None,
    model: str | None = None,
) -> Config:
    """Load the configuration of a command, with --set, --model and --out."""
    from bertlite.config.loading import load_config

    out = out or _folder_of_run(path)
    options = {"model.init_from": model, "output_dir": out and str(out)}
    changes = [f"{name}={json.dumps(value)}" for name, value in options.items() if value]
    return load_config(config_type, path, [*(overrides or []), *changes])


def refuse(options: Mapping[str, Any], reason: str) -> None:
    """Raise UserError if one of these options is given."""
    from bertlite.core.errors import UserError

    for name, value in options.items():
        if value:
            raise UserError(f"{name} does not apply: {reason}")


def check_start(overwrite: bool, resume: bool) -> None:
    from bertlite.core.errors import UserError

    if overwrite and resume:
        raise UserError("--overwrite replaces a run, --resume and --extend-to continue one; give one of them")


def load_model(model: str, precision: str) -> "LoadedModel":
    from bertlite.api import LoadedModel
    from bertlite.core.runtime import initialize_runtime

    return LoadedModel(model, initialize_runtime(precision))


def _folder_of_run(config: Path) -> Path | None:
    """Return the folder of the run that a configuration is a part of, wherever it was moved or copied; else None."""
    files = (".lock", "metrics.jsonl", "checkpoints", "results.json")
    is_run = config.name == "config.yaml" and any((config.parent / name).exists() for name in files)
    return config.parent if is_run else None
