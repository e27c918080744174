"""The command line. A command imports what it needs when it runs, so that --help is immediate."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from bertlite import __version__, options
from bertlite.terminal import print_result, print_text, run_app

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(requested: bool) -> None:
    if requested:
        print(f"bertlite {__version__}")
        raise typer.Exit


@app.callback()
def bertlite(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Turns a pile of text into a BERT that Hugging Face loads, and proves that it is one."""


@app.command()
def prepare(
    config: options.ConfigFile,
    overrides: options.Overrides = None,
    check_content: Annotated[
        bool, typer.Option("--check-content", help="Read all text again, also files whose size and times are the same.")
    ] = False,
) -> None:
    """Train the tokenizer and tokenize the text."""
    from bertlite.config.settings import PretrainConfig
    from bertlite.pretraining import prepare as preparing

    settings = options.load_config(PretrainConfig, config, overrides)
    if check_content:
        preparing.forget_content(settings.data)
    preparing.prepare(settings)


@app.command()
def pretrain(
    config: options.ConfigFile,
    overrides: options.Overrides = None,
    out: options.Out = None,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    extend_to: options.ExtendTo = None,
    budget: options.Budget = None,
) -> None:
    """Pretrain a BERT by masked language modelling."""
    from psutil import Process

    from bertlite.config.settings import PretrainConfig
    from bertlite.pretraining.pretrain import run

    options.check_start(overwrite, resume or bool(extend_to))
    changes = [*(overrides or []), *([f"train.max_steps={extend_to}"] if extend_to else [])]
    changes += [f"train.budget={budget}"] if budget else []
    settings = options.load_config(PretrainConfig, config, changes, out)
    extend = bool(extend_to)
    print_text(run(settings, resume or extend, overwrite, extend, start=Process().create_time()))


@app.command()
def plan(
    config: options.ConfigFile,
    overrides: options.Overrides = None,
    out: options.Out = None,
    measure: Annotated[bool, typer.Option(help="Run a few steps to measure the time.")] = True,
    as_json: options.AsJson = False,
) -> None:
    """Estimate memory, time and disk of a pretraining run."""
    from bertlite.config.settings import PretrainConfig
    from bertlite.pretraining import estimate

    report = None if as_json else lambda known: print_text(estimate.format_size(known))
    result = estimate.plan(options.load_config(PretrainConfig, config, overrides, out), measure, report)
    print_result(result, as_json, estimate.format_time)


@app.command()
def batch(
    config: options.ConfigFile,
    step: Annotated[int, typer.Option(min=1, help="The step that trains on the batch, counted from 1.")],
    overrides: options.Overrides = None,
    as_json: options.AsJson = False,
) -> None:
    """Print the batch of a step and its masked tokens."""
    from bertlite.config.settings import PretrainConfig
    from bertlite.data.batches import format_batch
    from bertlite.pretraining.prepare import batch_of_step

    print_result(batch_of_step(options.load_config(PretrainConfig, config, overrides), step), as_json, format_batch)


@app.command()
def evaluate(
    model: options.Model,
    data: options.EvaluationData = None,
    pairs: options.MinimalPairs = None,
    pseudo_perplexity: options.PseudoPerplexity = False,
    sequence_length: options.EvaluationLength = None,
    document: options.DocumentEnd = None,
    columns: options.Columns = None,
    label: options.Labels = None,
    field: options.Field = None,
    on_bad_example: options.OnBadExample = None,
    precision: options.Precision = "fp32",
    as_json: options.AsJson = False,
) -> None:
    """Evaluate a masked language model on text or minimal pairs, or a fine-tuned model on labelled examples."""
    from bertlite.core.errors import UserError
    from bertlite.pretraining.evaluate import evaluate_masked_lm, format_evaluation

    if not data and (not pairs or pseudo_perplexity):
        raise UserError(f"evaluate needs --data FILE{'' if pseudo_perplexity else ', --pairs FILE, or both'}")
    loaded = options.load_model(model, precision)
    for_text = {"--pairs": pairs, "--pseudo-perplexity": pseudo_perplexity, "--sequence-length": sequence_length}
    for_examples = {"--label": label, "--field": field, "--on-bad-example": on_bad_example}
    if loaded.is_fine_tuned:
        options.refuse(
            {**for_text, "--document": document}, f"{model} is fine-tuned, and measured on labelled examples"
        )
        result = loaded.evaluate(data or [], columns, label, field, on_bad_example)
    else:
        options.refuse({**for_examples, "a second --column": (columns or [])[1:]}, f"{model} is not fine-tuned")
        result = evaluate_masked_lm(
            loaded.masked_lm, loaded.tokenizer, loaded.runtime, data, pairs, sequence_length, document, columns,
            pseudo_perplexity,
        )  # fmt: skip
    print_result(result, as_json, format_evaluation)


@app.command()
def finetune(
    config: options.ConfigFile,
    model: options.InitialModel = None,
    overrides: options.Overrides = None,
    out: options.Out = None,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Fine-tune a BERT on one or several tasks."""
    from bertlite.config.finetune_settings import FinetuneConfig
    from bertlite.finetuning.finetune import run
    from bertlite.finetuning.results import format_results

    options.check_start(overwrite, resume)
    results = run(options.load_config(FinetuneConfig, config, overrides, out, model), resume, overwrite)
    print_result(results, as_json, format_results)


@app.command()
def sweep(
    config: options.ConfigFile,
    model: options.InitialModel = None,
    overrides: options.Overrides = None,
    out: options.Out = None,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Search for the best settings of a fine-tuning."""
    from bertlite.config.finetune_settings import SweepConfig
    from bertlite.finetuning import sweep as sweeping

    options.check_start(overwrite, resume)
    trials = sweeping.sweep(options.load_config(SweepConfig, config, overrides, out, model), resume, overwrite)
    print_result(trials, as_json, sweeping.format_trials)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="RUN", help="A run of finetune.")],
    second: Annotated[Path, typer.Argument(metavar="RUN", help="Another one, with the same task and test data.")],
    as_json: options.AsJson = False,
) -> None:
    """Compare two fine-tuned models, by the predictions of their runs."""
    from bertlite.finetuning import compare as comparing

    print_result(comparing.compare_runs(first, second), as_json, comparing.format_comparison)


@app.command()
def predict(
    model: options.Model,
    texts: Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help="Default: standard input.")] = None,
    file: Annotated[str | None, typer.Option("--file", metavar="FILE", help="One text per line, or a table.")] = None,
    columns: options.Columns = None,
    field: options.Field = None,
    pairs: Annotated[
        bool, typer.Option("--pairs", help="Texts are pairs, separated by a tab; by default as in fine-tuning.")
    ] = False,
    top_k: Annotated[int, typer.Option(min=1, help="Number of labels for each text.")] = 1,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write .jsonl, .csv or .tsv, with FILE's columns.")
    ] = None,
    precision: options.Precision = "fp32",
    as_json: options.AsJson = False,
) -> None:
    """Predict labels with a fine-tuned model."""
    from bertlite.core.errors import UserError
    from bertlite.core.logging import logger
    from bertlite.finetuning import inputs
    from bertlite.finetuning import predict as predicting
    from bertlite.finetuning.tasks import find_task

    if texts and (file or columns):
        raise UserError(f"predict reads either TEXT or {'--file' if file else 'a --column of a table'}, not both")
    for name in filter(os.path.isfile, texts or []):
        logger.warning(f"{name}: read as a text; --file {name} reads the file")
    loaded = options.load_model(model, precision)
    settings = inputs.choose_inputs(loaded.classifier, loaded.tokenizer, columns, pairs)
    records = inputs.read_inputs(texts or None, file, settings, columns, field)
    task = find_task(loaded.classifier)
    if out and task.lists_all_labels:
        top_k = len(loaded.classifier.labels)
    predictions = predicting.predict(loaded.classifier, loaded.tokenizer, records, settings, loaded.runtime, top_k)
    if out:
        written = {"file": str(out), "predictions": predicting.write_predictions(out, predictions, task)}
        print_result(written, as_json, lambda result: f"{result['file']}: {result['predictions']:,} predictions")
        return
    for _, prediction in predictions:
        print_result(prediction, as_json, predicting.format_prediction)


@app.command()
def fill(
    model: options.Model,
    text: Annotated[str, typer.Argument(metavar="TEXT", help='Such as "Paris is the [MASK] of France."')],
    top_k: Annotated[int, typer.Option(min=1, help="Number of predictions for each [MASK].")] = 5,
    precision: options.Precision = "fp32",
    as_json: options.AsJson = False,
) -> None:
    """Predict the tokens at [MASK]."""
    from bertlite.inference.fill import format_predictions

    print_result(options.load_model(model, precision).fill(text, top_k), as_json, format_predictions)


@app.command()
def embed(
    model: options.Model,
    file: Annotated[str, typer.Argument(metavar="FILE", help="One text per line, or a table; may be compressed.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.npy", help="The vectors, in the order of the texts.")],
    pooling: Annotated[
        str | None,
        typer.Option(help="Vector of a text: mean, cls or max of its tokens; default: the model's, or mean."),
    ] = None,
    layer: Annotated[int, typer.Option(help="Layer to take: 0 is the embeddings, -1 the last layer.")] = -1,
    normalize: Annotated[
        bool | None,
        typer.Option("--normalize/--no-normalize", help="Scale every vector to length 1; default: as the model does."),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            min=3, metavar="TOKENS", help="Tokens after which texts are truncated; default: as in pretraining."
        ),
    ] = None,
    columns: options.Column = None,
    field: options.Field = None,
    precision: options.Precision = "fp32",
) -> None:
    """Turn each text of a file into a vector."""
    options.refuse({"a second --column": (columns or [])[1:]}, "embed turns single texts into vectors")
    loaded = options.load_model(model, precision)
    embedder = loaded.embedder(pooling=pooling, layer=layer, normalize=normalize, sequence_length=sequence_length)
    with loaded.runtime.autocast():
        count, size = embedder.write(loaded.read_texts(file, columns[0] if columns else None, field), out)
    print(f"{out}: {count:,} vectors of {size}")


@app.command()
def export(
    model: options.Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that does not exist yet.")],
    format: Annotated[str, typer.Option(help="hf, onnx or sentence-transformers.")] = "hf",
    dtype: Annotated[
        str | None, typer.Option(help="hf: fp32, bf16 or fp16; onnx: fp32 or int8, both by default.")
    ] = None,
    pooling: Annotated[str | None, typer.Option(help="sentence-transformers: mean, cls or max.")] = None,
    licence: Annotated[str, typer.Option("--license", help="License in the model card, such as mit.")] = "unknown",
) -> None:
    """Export a model for other programs, with a model card."""
    from bertlite.export.formats import export as export_model
    from bertlite.training.run_folder import find_run, model_folder

    export_model(model_folder(model), out, format, dtype, pooling, licence, find_run(model))
    print(out)


@app.command()
def verify(model: options.Model, precision: options.Precision = "fp32", as_json: options.AsJson = False) -> None:
    """Compare a model with transformers; exit code 1 if it differs."""
    from bertlite.export.parity import check_parity, checks_to_dict, format_checks
    from bertlite.training.run_folder import model_folder

    folder = model_folder(model)
    checks = check_parity(folder, precision)
    print(json.dumps(checks_to_dict(folder, checks)) if as_json else format_checks(folder, checks))
    raise typer.Exit(0 if all(check.ok for check in checks) else 1)


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders of pretrain or finetune.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE.html", help="Default: report.html in RUN.")] = None,
) -> None:
    """Write a page with the curves, results and settings of runs."""
    from bertlite.pages.report import write_report

    print_text(write_report(runs, out))


@app.command()
def bench(
    config: options.ConfigFile,
    overrides: options.Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to measure, after the warm-up.")] = 20,
    as_json: options.AsJson = False,
) -> None:
    """Measure throughput and memory of pretraining."""
    from bertlite.config.settings import PretrainConfig
    from bertlite.pretraining import bench as benching

    result = benching.bench(options.load_config(PretrainConfig, config, overrides), steps)
    print_result(result, as_json, benching.format_bench)


def main() -> None:
    """Run the command line."""
    run_app(app)
