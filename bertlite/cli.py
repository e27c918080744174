"""The command line. Every command imports what it needs when it runs, so that --help is immediate."""

import errno
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from bertlite import __version__

if TYPE_CHECKING:
    from bertlite.api import LoadedModel
    from bertlite.config.settings import Section

Kind = TypeVar("Kind", bound="Section")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; see configs/ for examples.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, as in --set train.max_steps=100; repeatable."),
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run folder, in place of output_dir.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face folder, a hub name, or a run folder.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the run's newest valid checkpoint.")]
Begin = Annotated[str | None, typer.Option("--model", metavar="MODEL", help="In place of model.init_from.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Precision = Annotated[Literal["fp32", "bf16"], typer.Option(help="What to compute in.")]


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
    """Make the tokenizer and the corpus of a configuration."""
    from bertlite.config.settings import PretrainConfig
    from bertlite.pretraining import prepare as preparing

    preparing.prepare(_settings(PretrainConfig, config, overrides))


@app.command()
def pretrain(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
) -> None:
    """Train an encoder on raw text by masked language modelling."""
    from bertlite.config.settings import PretrainConfig
    from bertlite.pretraining import pretrain as pretraining

    model = pretraining.run(_settings(PretrainConfig, config, overrides, out), resume=resume)
    if os.environ.get("RANK", "0") == "0":
        print(model)


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Out = None,
    measure: Annotated[bool, typer.Option(help="Run a few steps to measure the time.")] = True,
    as_json: AsJson = False,
) -> None:
    """Tell what a run will take: memory, tokens, time, disk."""
    from bertlite.config.settings import PretrainConfig
    from bertlite.pretraining import estimate as planning

    result = planning.plan(_settings(PretrainConfig, config, overrides, out), measure)
    print(json.dumps(result) if as_json else planning.describe(result))


@app.command()
def batch(
    config: ConfigFile,
    step: Annotated[int, typer.Option(min=1, help="The step that trains on it, counted from 1.")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Print the batch of one step, and what is hidden in it."""
    from bertlite.config.settings import PretrainConfig
    from bertlite.pretraining.prepare import batch_of_step

    rows = batch_of_step(_settings(PretrainConfig, config, overrides), step)
    if as_json:
        print(json.dumps(rows, ensure_ascii=False))
        return
    for number, documents in enumerate(rows, 1):
        print(f"row {number}", *documents, sep="\n  ")


@app.command()
def evaluate(
    model: Model,
    data: Annotated[list[str] | None, typer.Option(metavar="FILE", help="Held-out text; may be repeated.")] = None,
    pairs: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Minimal pairs as BLiMP has them; may be repeated.")
    ] = None,
    pseudo_perplexity: Annotated[
        bool, typer.Option("--pseudo-perplexity", help="Also mask every token of the text in turn; takes long.")
    ] = False,
    sequence_length: Annotated[int | None, typer.Option(min=8, help="Positions of a row; as trained if unset.")] = None,
    document: Annotated[Literal["blank-line", "line"], typer.Option(help="What ends a document.")] = "blank-line",
    column: Annotated[str, typer.Option(help="The column of a table that holds the text.")] = "text",
    precision: Precision = "fp32",
    as_json: AsJson = False,
) -> None:
    """Measure a masked language model on text, or by minimal pairs."""
    from bertlite.core.errors import UserError
    from bertlite.pretraining.evaluate import evaluate_text
    from bertlite.pretraining.scoring import minimal_pairs, read_pairs

    if not data and (not pairs or pseudo_perplexity):
        raise UserError(f"evaluate needs --data FILE{'' if pseudo_perplexity else ', --pairs FILE, or both'}")
    loaded = _loaded(model, precision)
    masked_lm, tokenizer, runtime = loaded.masked_lm, loaded.tokenizer, loaded.runtime
    result: dict[str, Any] = {}
    if data:
        result |= evaluate_text(
            masked_lm, tokenizer, data, runtime, sequence_length, document, column, pseudo_perplexity
        )
    if pairs:
        with runtime.autocast():
            result |= minimal_pairs(masked_lm, tokenizer, read_pairs(pairs))
    if as_json:
        print(json.dumps(result))
        return
    print("\n".join(f"{name:17}  {value:.4f}" for name, value in result.items() if isinstance(value, float)))
    for phenomenon, counts in result.get("phenomena", {}).items():
        print(f"\n{phenomenon:50}  {counts['accuracy']:6.1%} of {counts['pairs']:,}")
        for paradigm, share in counts["paradigms"].items():
            print(f"  {paradigm:48}  {share['accuracy']:6.1%} of {share['pairs']:,}")


@app.command()
def finetune(
    config: ConfigFile,
    model: Begin = None,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a BERT: labels, numbers, entities, answers."""
    from bertlite.config.finetune_settings import FinetuneConfig
    from bertlite.finetuning.finetune import run
    from bertlite.finetuning.results import format_results

    results = run(_settings(FinetuneConfig, config, overrides, out, model), resume=resume)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(results) if as_json else format_results(results))


@app.command()
def sweep(
    config: ConfigFile,
    model: Begin = None,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Search the best settings of a fine-tuning."""
    from bertlite.config.finetune_settings import SweepConfig
    from bertlite.finetuning.sweep import format_trials
    from bertlite.finetuning.sweep import sweep as run_sweep

    trials = run_sweep(_settings(SweepConfig, config, overrides, out, model), resume=resume)
    print(json.dumps(trials) if as_json else format_trials(trials))


@app.command()
def predict(
    model: Model,
    texts: Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help="Or standard input's lines.")] = None,
    file: Annotated[str | None, typer.Option("--file", metavar="FILE", help="A text a line, or a table.")] = None,
    column: Annotated[str, typer.Option(help="The column of a table that holds the text.")] = "text",
    pairs: Annotated[bool, typer.Option("--pairs", help="Each text is two, with a tab between.")] = False,
    top_k: Annotated[int, typer.Option(min=1, help="How many labels for each text.")] = 1,
    precision: Precision = "fp32",
    as_json: AsJson = False,
) -> None:
    """Say what a fine-tuned model predicts."""
    from bertlite.core.errors import UserError
    from bertlite.finetuning.predict import format_prediction, read_texts

    if texts and file:
        raise UserError("predict reads either TEXT or --file, not both")
    for result in _loaded(model, precision).predictions(texts or read_texts(file, column), pairs, top_k):
        print(json.dumps(result, ensure_ascii=False) if as_json else format_prediction(result), flush=True)


@app.command()
def fill(
    model: Model,
    text: Annotated[str, typer.Argument(metavar="TEXT", help='Such as "Paris is the [MASK] of France."')],
    top_k: Annotated[int, typer.Option(min=1, help="How many answers for each mask.")] = 5,
    precision: Precision = "fp32",
    as_json: AsJson = False,
) -> None:
    """Show what a masked language model expects in place of [MASK]."""
    result = _loaded(model, precision).fill(text, top_k)
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
        return
    answers = [result] if isinstance(result[0], dict) else result
    for number, mask in enumerate(answers, 1):
        if len(answers) > 1:
            print(f"mask {number}")
        for answer in mask:
            print(f"{answer['score']:.4f}  {answer['token_str']:16}  {answer['sequence']}")


@app.command()
def embed(
    model: Model,
    file: Annotated[str, typer.Argument(metavar="FILE", help="A text a line, or a table; compressed or not.")],
    out: Annotated[Path, typer.Option("--out", metavar="VECTORS.npy", help="The vectors, a row for each text.")],
    pooling: Annotated[str, typer.Option(help="How a text's vectors become one: mean, cls or max.")] = "mean",
    layer: Annotated[int, typer.Option(help="Which layer's output; 0 is the embeddings', -1 the last.")] = -1,
    normalize: Annotated[bool, typer.Option("--normalize", help="Give every vector the length 1.")] = False,
    sequence_length: Annotated[int | None, typer.Option(min=3, help="Where texts are cut; default as trained.")] = None,
    column: Annotated[str, typer.Option(help="The column of a table that holds the text.")] = "text",
    precision: Precision = "fp32",
) -> None:
    """Turn each line of a file into a vector."""
    from bertlite.config.settings import Source
    from bertlite.data.sources import find_source_files, read_file_texts

    loaded = _loaded(model, precision)
    files = find_source_files(Source(path=file), "FILE")
    embedder = loaded.embedder(pooling=pooling, layer=layer, normalize=normalize, sequence_length=sequence_length)
    with loaded.runtime.autocast():
        rows, size = embedder.write((text for path in files for text in read_file_texts(path, column)), out)
    print(f"{out}: {rows:,} vectors of {size}")


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that does not exist yet.")],
    format: Annotated[str, typer.Option(help="hf, onnx or sentence-transformers.")] = "hf",
    dtype: Annotated[
        str | None, typer.Option(help="Numbers: for hf fp32, bf16 or fp16; for onnx fp32 or int8, both if unset.")
    ] = None,
    pooling: Annotated[str | None, typer.Option(help="For sentence-transformers: mean, cls or max.")] = None,
    licence: Annotated[str, typer.Option("--license", help="What the model card says, as mit.")] = "unknown",
) -> None:
    """Write a model for other programs, checked, with a card."""
    from bertlite.export.formats import ExportOptions
    from bertlite.export.formats import export as write_export
    from bertlite.training.run_folder import model_folder

    write_export(model_folder(model), out, format, ExportOptions(dtype, pooling, licence))
    print(out)


@app.command()
def verify(model: Model, precision: Precision = "fp32", as_json: AsJson = False) -> None:
    """Compare a model with Hugging Face's; exit code 1 if it differs."""
    from bertlite.export.parity import check_parity
    from bertlite.training.run_folder import model_folder

    folder = model_folder(model)
    checks = check_parity(folder, precision)
    ok = all(check.ok for check in checks)
    if as_json:
        lines = [{**vars(check), "ok": check.ok} for check in checks]
        for line in lines:  # JSON has no NaN
            line["difference"] = line["difference"] if math.isfinite(line["difference"]) else None
        print(json.dumps({"ok": ok, "model": str(folder), "checks": lines}))
    else:
        print(f"{'inputs':8}  {'quantity':30}  {'difference':>10}  {'allowed':>8}")
        for check in checks:
            verdict = "ok" if check.ok else "DIFFERS"
            print(f"{check.inputs:8}  {check.quantity:30}  {check.difference:10.2g}  {check.tolerance:8.0g}  {verdict}")
        print(f"{folder}: {'equals' if ok else 'DIFFERS FROM'} Hugging Face's model")
    raise typer.Exit(0 if ok else 1)


@app.command()
def bench(
    config: ConfigFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to measure, after the warm-up.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Measure a training here: tokens/s, time, share of peak, memory."""
    from bertlite.config.settings import PretrainConfig
    from bertlite.pretraining import bench as benching

    result = benching.bench(_settings(PretrainConfig, config, overrides), steps)
    print(json.dumps(result) if as_json else benching.describe(result))


def main() -> None:
    """Run the command line; a user's mistake ends in one or two lines and exit code 2, never in a traceback."""
    from bertlite.core.errors import Failure, UserError
    from bertlite.core.logging import log_to_terminal
    from bertlite.core.signals import Stopped, listen

    # torch's own switch, read when it is imported: large tensors in huge pages, which spares a tenth of a step.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    log_to_terminal()
    listen()
    try:
        app()
    except UserError as error:
        sys.exit(_say(str(error), 2))
    except Failure as error:
        sys.exit(_say(str(error), 1))
    except (MemoryError, RuntimeError) as error:
        from bertlite.core.runtime import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        advice = "lower the rows of a step, those computed at a time, or the size of the model"
        sys.exit(_say(f"the memory is exhausted; {advice}", 1))
    except OSError as error:  # a folder that cannot be written, a file that vanished
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        sys.exit(_say(f"{error.filename or 'the system'}: {error.strerror or error}", 1 if full else 2))
    except Stopped as stopped:
        sys.exit(_say(f"stopped by {stopped}", 128 + stopped.number))


def _settings(
    kind: type[Kind], config: Path, overrides: list[str] | None, out: Path | None = None, model: str | None = None
) -> Kind:
    """The configuration that a command reads, with --set, --out and --model."""
    from bertlite.config.loading import load_config

    named = {"model.init_from": model, "output_dir": out and str(out)}
    changes = [*(overrides or []), *(f"{name}={json.dumps(value)}" for name, value in named.items() if value)]
    return load_config(kind, config, changes)


def _loaded(model: str, precision: str) -> "LoadedModel":
    from bertlite.api import LoadedModel
    from bertlite.core.runtime import initialize_runtime

    return LoadedModel(model, initialize_runtime(precision))


def _say(text: str, code: int) -> int:
    for line in text.splitlines() if os.environ.get("RANK", "0") == "0" or code == 1 else ():
        print(f"bertlite: {line}", file=sys.stderr)
    return code
