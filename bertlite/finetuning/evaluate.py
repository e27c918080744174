"""The evaluation of a fine-tuned model: its metrics on a split of the run, or on labelled files."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bertlite.config.finetune_settings import InputSettings
from bertlite.config.settings import DataLocation
from bertlite.core.logging import logger
from bertlite.core.runtime import PRECISION_NAMES, Runtime, check_finite
from bertlite.data.tables import read_records
from bertlite.finetuning.batches import ExampleBatches
from bertlite.finetuning.decoding import Outputs
from bertlite.finetuning.inputs import choose_inputs
from bertlite.finetuning.losses import compute_outputs, compute_scores
from bertlite.finetuning.results import EvaluationResult
from bertlite.finetuning.splits import ON_COMMAND_LINE, Split, log_split, select_examples, warn_of_unknown
from bertlite.finetuning.tasks import Task, find_task, saved_task
from bertlite.model.heads import Classifier


def evaluate_split(
    model: Classifier,
    task: Task,
    split: Split,
    settings: InputSettings,
    runtime: Runtime,
    compute: Callable[..., Tensor] = compute_scores,
    learn: bool = False,
    metric: str | None = None,
) -> EvaluationResult:
    """Compute all metrics of a split, `metric` among them, and the loss without class weights.

    With `learn`, as on the validation split, the model's task first learns settings from the split, such as the
    threshold of unanswerable questions.
    """
    scores, losses, loss = compute_outputs(model, split.batches, runtime, compute, task.loss)
    outputs = Outputs(scores, split.examples, model.labels, settings)
    if learn:
        model.task = saved_task(settings).model_copy(update=task.learn(outputs))
    outputs = replace(outputs, settings=model.task or settings)
    predictions, references = task.decode(outputs), split.examples.references
    metrics = task.metrics_of(model.labels, settings, metric)
    results = {name: function(references, predictions) for name, function in metrics.items()}
    results |= task.details(references, predictions)
    by_label = task.score_labels(references, predictions, model.labels, settings) if task.score_labels else {}
    return EvaluationResult({**results, "loss": loss}, predictions, losses, outputs, by_label)


def evaluate_files(
    model: Classifier,
    tokenizer: PreTrainedTokenizerBase,
    files: list[str],
    runtime: Runtime,
    columns: list[str] | None = None,
    label: list[str] | None = None,
    field: str | None = None,
    on_bad_example: Literal["error", "skip"] | None = None,
) -> dict[str, float]:
    """Return all metrics of a fine-tuned model on labelled files, and the loss.

    The files have the columns of the model's training files, unless `columns` and `label` name others; `field` is the
    key of the list in JSON files. `on_bad_example` is as in training unless it is given. Raises UserError for what
    cannot be read, and for a label that the model does not have.
    """
    task, settings = find_task(model), choose_inputs(model, tokenizer, columns)
    changes = {"label": label, "on_bad_example": on_bad_example}
    settings = settings.model_copy(update={name: value for name, value in changes.items() if value})
    settings = settings.model_copy(update=task.settle([], model.labels, settings))
    read = [
        record for file in files for record in read_records(DataLocation(path=file, field=field), settings, "--data")
    ]
    records = select_examples(read, task, settings, "--data", model.labels, ON_COMMAND_LINE)
    examples = task.make_examples(records, model.labels, tokenizer, settings)
    split = Split(records, examples, ExampleBatches(examples, model.config.pad_token_id))
    log_split("--data", split, task, model.labels, settings)
    precision = PRECISION_NAMES[runtime.dtype]
    logger.info(f"--data: measured in {precision}; a run in another precision has other last digits")
    warn_of_unknown("--data", *examples.count_unknown(tokenizer))
    scores = evaluate_split(model, task, split, settings, runtime).scores
    check_finite(torch.tensor(scores["loss"]))
    return scores
