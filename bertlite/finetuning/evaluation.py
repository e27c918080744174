"""Compute a model's outputs for examples, and its metrics."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bertlite.config.finetune_settings import TaskSettings
from bertlite.core.runtime import Runtime
from bertlite.data.formats import Record
from bertlite.finetuning.batches import ExampleBatches
from bertlite.finetuning.decoding import Outputs, Scores
from bertlite.finetuning.examples import Examples
from bertlite.finetuning.losses import Loss, sum_losses
from bertlite.finetuning.tasks import Task
from bertlite.model.heads import Classifier
from bertlite.training.trainer import evaluate

MICRO_BATCH_TOKENS = 4096  # positions that are computed together

ComputeScores = Callable[[Any, Any], Tensor]  # losses.compute_scores, compiled or not


@dataclass(frozen=True)
class Split:
    """A split of a task (train, validation or test): its records, their examples, and batches of those."""

    records: list[Record]
    examples: Examples
    batches: ExampleBatches


@dataclass(frozen=True)
class EvaluationResult:
    """What a model achieves on a split: its metrics and mean loss, a prediction per record, a loss per example."""

    scores: dict[str, float]
    predictions: list[Any]
    losses: list[float]


def compute_outputs(
    model: Classifier, batches: ExampleBatches, runtime: Runtime, compute_scores: ComputeScores, loss: Loss
) -> tuple[list[Scores], list[float], float]:
    """Return the scores and the mean loss of each example, in order, and the mean loss of all examples or tokens."""
    outputs: dict[int, Scores] = {}
    losses: dict[int, float] = {}

    def evaluate_batch(model: Any, batch: Any) -> dict[str, Tensor]:
        scores = compute_scores(model, batch)
        batch_losses, counted = loss(scores, batch)
        outputs.update(batches.unpack(scores, batch))
        losses_and_counts = torch.stack([torch.where(counted, batch_losses, 0), counted], -1)
        for index, values in batches.unpack(losses_and_counts, batch).items():
            total, count = values.reshape(-1, 2).sum(0)
            losses[index] = float(total / max(1, count))
        loss_sum, num_counted = sum_losses(batch_losses, counted)
        return {"loss": loss_sum, "count": num_counted}

    every_rank = replace(runtime, rank=0, world_size=1)  # each rank evaluates all, and so chooses the same checkpoint
    micro_batch_size = max(1, min(batches.num_sequences, MICRO_BATCH_TOKENS // batches.sequence_length))
    means = evaluate(model, evaluate_batch, batches.evaluation, batches.num_sequences, micro_batch_size, every_rank)
    indices = range(len(outputs))
    return [outputs[index] for index in indices], [losses[index] for index in indices], means["loss"]


def evaluate_split(
    model: Classifier,
    split: Split,
    task: Task,
    labels: list[str],
    settings: TaskSettings,
    runtime: Runtime,
    compute_scores: ComputeScores,
) -> EvaluationResult:
    """Compute all metrics of the task, and the loss without class weights."""
    outputs, losses, mean_loss = compute_outputs(model, split.batches, runtime, compute_scores, task.loss)
    predictions = task.decode(Outputs(outputs, split.examples, labels, settings))
    scores = {name: float(metric(split.examples.references, predictions)) for name, metric in task.metrics.items()}
    return EvaluationResult({**scores, "loss": mean_loss}, predictions, losses)
