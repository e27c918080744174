"""The model card: the README.md of an exported folder, written from the run that made the model."""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from bertlite.config.loading import load_run_config
from bertlite.core.errors import UserError, first_line
from bertlite.core.logging import count, logger, without_controls
from bertlite.core.trust import check_run_folder
from bertlite.export.parity import Check
from bertlite.model.heads import HEADS, Model
from bertlite.model.huggingface import hf_class
from bertlite.model.initialization import parameter_count
from bertlite.training.run_folder import read_metrics

CURVE_LINES = 10
PATH_KEYS = ("path", "dataset", "train", "validation", "test", "init_from")  # of settings that may hold a path
PRIVATE_KEYS = ("output_dir", "cache_dir")

# How to use the model: keys are formats, and a head that transformers has no pipeline for.
EXAMPLES = {
    "hf": """from transformers import pipeline

print(pipeline("{task}", model="{name}")({example}))""",
    "question-answering": """from transformers import AutoModelForQuestionAnswering, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("A question?", "The text that answers it.", return_tensors="pt")
output = AutoModelForQuestionAnswering.from_pretrained("{name}")(**inputs)
start, end = output.start_logits.argmax(), output.end_logits.argmax()
print(tokenizer.decode(inputs["input_ids"][0, start : end + 1]))""",
    "multiple-choice": """from transformers import AutoModelForMultipleChoice, AutoTokenizer

choices = ["One choice.", "Another choice."]
inputs = AutoTokenizer.from_pretrained("{name}")(["A context."] * 2, choices, return_tensors="pt", padding=True)
inputs = {{name: tensor[None] for name, tensor in inputs.items()}}
print(choices[AutoModelForMultipleChoice.from_pretrained("{name}")(**inputs).logits.argmax()])""",
    "onnx": """from onnxruntime import InferenceSession
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer(["A sentence.", "And another one."], padding=True, truncation=True, return_tensors="np")
print(InferenceSession("{name}/{graph}").run(None, dict(inputs)))""",
    "sentence-transformers": """from sentence_transformers import SentenceTransformer

print(SentenceTransformer("{name}").encode(["A sentence."]))""",
}


def model_card(
    source: Path,
    run: Path | None,
    name: str,
    model: Model,
    format: str,
    licence: str,
    checks: list[Check],
    results: list[str],
    graph: str,
) -> str:
    """Return the card of the model in folder `source` under its new name: Markdown below Hugging Face's metadata.

    Data, settings and evaluation come from the run folder, if there is one. Of paths on the run's machine, only the
    last component is published.
    """
    config, task = model.config, HEADS[model.head_name].pipeline
    run_paragraphs, eval_results = describe_run(source, run, task)
    sentence_vectors = format == "sentence-transformers"
    metadata = ModelCardData(
        license=licence,
        library_name="sentence-transformers" if sentence_vectors else "transformers",
        pipeline_tag="sentence-similarity" if sentence_vectors else task,
        tags=["bert", "bertlite", *(["onnx"] if format == "onnx" else [])],
        model_name=name if eval_results else None,  # which the library writes even without results
        eval_results=eval_results or None,
    )
    example = EXAMPLES.get(task, EXAMPLES["hf"]) if format == "hf" else EXAMPLES[format]
    code = example.format(task=task, name=json.dumps(name)[1:-1], graph=graph, example=HEADS[model.head_name].example)
    rows = [[check.inputs, check.quantity, f"{check.difference:.1e}", f"{check.tolerance:.0e}"] for check in checks]
    paragraphs = [
        f"---\n{metadata.to_yaml()}\n---\n# {escape_markdown(name)}",
        f"A BERT ({hf_class(model)}) with {config.num_hidden_layers} layers of {config.hidden_size}, "
        f"{config.num_attention_heads} attention heads, a vocabulary of {config.vocab_size:,} tokens and "
        f"{parameter_count(model):,} parameters, made with bertlite.",
        f"## How to use\n\n```python\n{code}\n```",
        *run_paragraphs,
        "## Checks\n\nThis model in bertlite and in transformers, in fp32, on the same inputs: the largest relative "
        "difference of each quantity.",
        markdown_table(["inputs", "quantity", "difference", "tolerance"], rows),
        "\n".join(f"* {line}" for line in results),
    ]
    return "\n\n".join(paragraphs) + "\n"


def describe_run(source: Path, run: Path | None, task: str) -> tuple[list[str], list[EvalResult]]:
    """Describe the run that made the model folder `source`: paragraphs of Markdown, and results for the metadata."""
    loaded = None
    if run is not None:
        check_run_folder(run)
        loaded = load_run_config(run / "config.yaml") or load_run_config(run / "best.yaml")  # the latter of a sweep
        if loaded is None:
            logger.warning(f"{run}/config.yaml cannot be read, so the model card says nothing about the training")
    if run is None or loaded is None:
        return ["## Training\n\nThe exported folder says nothing about its training."], []
    config = publishable(loaded.model_dump(mode="json"))
    try:
        paragraphs, results = _describe_pretraining(source, run, config, task) if "data" in config else ([], [])
        if (run / "results.json").exists():
            measured = json.loads((run / "results.json").read_text(encoding="utf-8"))
            metric, mean, split = measured["metric"], measured["mean"], measured["measured_on"]
            paragraphs.append(
                f"## Evaluation\n\n{escape_markdown(metric)}: {mean:.4f} ± {measured['std']:.4f} over "
                f"{count(len(measured['seeds']), 'seed')}, on the {escape_markdown(split)} examples."
            )
            results.append(EvalResult(task, "text", split, metric, mean))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = f"metrics.jsonl, results.json or state.json is damaged ({first_line(error)})"
        raise UserError(f"{run}: {reason}; export {source} without its run by that path") from None
    recipe = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    fence = "`" * (2 + max(map(len, re.findall("`+", f"`{recipe}"))))  # longer than any in the names of labels
    return [*paragraphs, f"## Recipe\n\n{fence}yaml\n{recipe}{fence}"], results


def _describe_pretraining(
    source: Path, run: Path, config: dict[str, Any], task: str
) -> tuple[list[str], list[EvalResult]]:
    """Describe the data, the tokens seen, and the validation loss by about CURVE_LINES evaluations and the last."""
    training, validation = (_source_names(config["data"][split]) for split in ("train", "validation"))
    validation = validation or "a part of it"
    paragraphs = [f"## Data\n\nTrained on {training}; validated on {validation}."]
    state = source / "training" / "state.json"  # of a checkpoint, which knows nothing of later steps
    progress = json.loads(state.read_text())["progress"] if state.exists() else None
    lines = [line for line in read_metrics(run) if progress is None or line["step"] <= progress["step"]]
    if last := progress or (lines and lines[-1]):
        paragraphs.append(f"Tokens seen: {last['tokens']:,} in {last['step']:,} steps.")
    evaluations = [line for line in lines if "eval_loss" in line]
    if not evaluations:
        return paragraphs, []
    interval = -(-len(evaluations) // CURVE_LINES)
    rows = [
        [f"{line['step']:,}", f"{line['tokens']:,}", f"{line['eval_loss']:.3f}", f"{line['eval_accuracy']:.1%}"]
        for line in [*evaluations[:-1:interval], evaluations[-1]]
    ]
    paragraphs += [
        "## Evaluation\n\nOn validation text, with the same masks each time; the loss is in nats per masked token:",
        markdown_table(["step", "tokens", "loss", "accuracy"], rows),
    ]
    metrics = {"loss": evaluations[-1]["eval_loss"], "accuracy": evaluations[-1]["eval_accuracy"]}
    return paragraphs, [EvalResult(task, "text", validation, name, value) for name, value in metrics.items()]


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Format rows of cells as a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def _source_names(sources: list[Any]) -> str:
    """Return the names of the sources of a split, separated by commas."""
    names = [source if isinstance(source, str) else source.get("path") or source["dataset"] for source in sources]
    return ", ".join(map(escape_markdown, names))


def escape_markdown(text: str) -> str:
    """Escape what has a meaning in Markdown or HTML, and put line breaks and control characters as spaces."""
    return re.sub(r"([\\`*_{}\[\]()#+!|<>~&])", r"\\\1", without_controls(text))


def publishable(value: Any, key: str = "") -> Any:
    """Remove what a configuration tells of the machine: of paths all but the last component, and output folders."""
    if isinstance(value, dict):
        return {name: publishable(inner, name) for name, inner in value.items() if name not in PRIVATE_KEYS}
    if isinstance(value, list):
        return [publishable(inner, key) for inner in value]
    is_path = key in PATH_KEYS and isinstance(value, str) and value.startswith(("/", "~", ".."))
    return Path(value).name if is_path else value
