"""Compute a model's scores for examples, and their losses."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bertlite.core.runtime import Runtime
from bertlite.finetuning.batches import ExampleBatches
from bertlite.finetuning.decoding import Scores
from bertlite.finetuning.losses import Loss, sum_losses
from bertlite.model.heads import Classifier
from bertlite.training.trainer import evaluate

MICRO_BATCH_TOKENS = 4096  # positions that are computed together


def compute_outputs(
    model: Classifier, batches: ExampleBatches, runtime: Runtime, compute_scores: Callable[..., Tensor], loss: Loss
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
