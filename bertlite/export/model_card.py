"""The model card: what an exported folder says about itself, written from the run that made the model."""

import json
from pathlib import Path
from typing import Any

import yaml

from bertlite.config.finetune_settings import FinetuneConfig
from bertlite.config.loading import load_config
from bertlite.config.settings import PretrainConfig, Section
from bertlite.core.errors import UserError
from bertlite.export.parity import Check
from bertlite.model.heads import HEADS, Model
from bertlite.model.huggingface import hf_class
from bertlite.model.initialization import parameter_count
from bertlite.training.run_folder import read_metrics

CURVE_LINES = 10

USE = {
    "hf": """from transformers import pipeline

print(pipeline("{task}", model="{name}")({call}))""",
    "BertForQuestionAnswering": """from transformers import AutoModelForQuestionAnswering, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("A question?", "The text that answers it.", return_tensors="pt")
output = AutoModelForQuestionAnswering.from_pretrained("{name}")(**inputs)
start, end = output.start_logits.argmax(), output.end_logits.argmax()
print(tokenizer.decode(inputs["input_ids"][0, start : end + 1]))""",
    "onnx": """from onnxruntime import InferenceSession
from transformers import AutoTokenizer

inputs = AutoTokenizer.from_pretrained("{name}")(["A sentence."], return_tensors="np")
print(InferenceSession("{name}/{graph}").run(None, dict(inputs)))""",
    "sentence-transformers": """from sentence_transformers import SentenceTransformer

print(SentenceTransformer("{name}").encode(["A sentence."]))""",
}


def model_card(
    source: Path, name: str, model: Model, format: str, licence: str, checks: list[Check], found: list[str], graph: str
) -> str:
    """README.md of the model in folder `source` under its new name, in Markdown under Hugging Face's YAML.

    What is known of data, recipe and evaluation comes from the run folder that `source` lies in, if it does. Of paths
    on the machine of the run, only the last part is told.
    """
    kind, task, call = hf_class(model), HEADS[model.head_name].pipeline, HEADS[model.head_name].example
    about = {
        "license": licence,
        "library_name": "sentence-transformers" if format == "sentence-transformers" else "transformers",
        "pipeline_tag": "sentence-similarity" if format == "sentence-transformers" else task,
        "tags": ["bert", "bertlite", *(["onnx"] if format == "onnx" else [])],
    }
    config = model.config
    example = USE.get(kind, USE[format]) if format == "hf" else USE[format]  # there is no pipeline that answers
    table = [f"| {one.inputs} | {one.quantity} | {one.difference:.1e} | {one.tolerance:.0e} |" for one in checks]
    text = [
        f"---\n{yaml.safe_dump(about, sort_keys=False)}---\n# {name}",
        f"A BERT ({kind}) with {config.num_hidden_layers} layers of {config.hidden_size}, {config.num_attention_heads} "
        f"heads, {config.vocab_size:,} word pieces and {parameter_count(model):,} parameters, made by bertlite.",
        f"## How to use\n\n```python\n{example.format(task=task, call=call, name=name, graph=graph)}\n```",
        *_of_the_run(source),
        "## Checks\n\nAgainst Hugging Face's implementation in fp32, the same folder and inputs in both: the largest "
        "relative difference of each quantity.",
        "\n".join(["| inputs | quantity | difference | allowed |\n|---|---|---|---|", *table]),
        "\n".join(f"* {line}" for line in found),
    ]
    return "\n\n".join(text) + "\n"


def _of_the_run(source: Path) -> list[str]:
    run = source.parent.parent if source.parent.name == "checkpoints" else source.parent
    read = None
    if source.name == "model" or run != source.parent:
        read = _configuration(run / "config.yaml") or _configuration(run / "best.yaml")  # the latter is a sweep's
    if read is None:
        return ["## Training\n\nThe folder that this was exported from says nothing about its training."]
    config = _without_folders(read.model_dump(mode="json"))
    state = source / "training" / "state.json"  # of a checkpoint: what came later is not in it
    progress = json.loads(state.read_text())["progress"] if state.exists() else None
    lines = [line for line in read_metrics(run) if progress is None or line["step"] <= progress["step"]]
    evaluations = [line for line in lines if "eval_loss" in line]
    text = []
    if "data" in config:
        trained, held_out = (
            ", ".join(str(one if isinstance(one, str) else one.get("path") or one["dataset"]) for one in sources)
            for sources in (config["data"]["train"], config["data"]["validation"])
        )
        text.append(f"## Data\n\nTrained on {trained}; held out: {held_out or 'a part of it'}.")
    if last := progress or (lines and lines[-1]):
        text.append(f"Tokens seen: {last['tokens']:,} in {last['step']:,} steps.")
    if evaluations:
        every = -(-len(evaluations) // CURVE_LINES)
        table = [
            f"| {line['step']:,} | {line['tokens']:,} | {line['eval_loss']:.3f} | {line['eval_accuracy']:.1%} |"
            for line in [*evaluations[:-1:every], evaluations[-1]]
        ]
        text += [
            "## Evaluation\n\nOn held-out text, masked the same way every time; the loss in nats per masked token:",
            "\n".join(["| step | tokens | loss | accuracy |\n|---|---|---|---|", *table]),
        ]
    if (run / "results.json").exists():
        results = json.loads((run / "results.json").read_text(encoding="utf-8"))
        text.append(
            f"## Evaluation\n\n{results['metric']}: {results['mean']:.4f} ± {results['std']:.4f} over "
            f"{len(results['seeds'])} seed(s), on the {results['measured_on']} examples."
        )
    recipe = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    return [*text, f"## Recipe\n\n```yaml\n{recipe}```"]


def _configuration(path: Path) -> Section | None:
    """The configuration of a run of bertlite; None where the file is none."""
    for kind in (PretrainConfig, FinetuneConfig):
        try:
            return load_config(kind, path)
        except UserError:
            continue
    return None


def _without_folders(value: Any, name: str = "") -> Any:
    """A configuration as it may be published: of a path, its last part; of folders for results, nothing."""
    if isinstance(value, dict):
        kept = {key: one for key, one in value.items() if key not in ("output_dir", "cache_dir")}
        return {key: _without_folders(one, key) for key, one in kept.items()}
    if isinstance(value, list):
        return [_without_folders(one, name) for one in value]
    paths = ("path", "dataset", "train", "validation", "test", "init_from")
    return (
        Path(value).name if name in paths and isinstance(value, str) and value.startswith(("/", "~", "..")) else value
    )
