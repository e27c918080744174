"""A model's scores for examples, and the losses of the types of task."""

# Shapes: B sequences, T positions of a sequence, E places for examples in a sequence, L labels.
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bertlite.core.runtime import Runtime
from bertlite.data.masking import IGNORED
from bertlite.finetuning.batches import ExampleBatches, TaskBatch
from bertlite.model.heads import Classifier
from bertlite.training.trainer import evaluate

MICRO_BATCH_TOKENS = 4096  # positions that an evaluation computes together

# Takes scores and a batch; returns the loss of each example (B,E) or token (B,T), and which of them count (bool).
Loss = Callable[..., tuple[Tensor, Tensor]]


def compute_scores(model: Classifier, batch: TaskBatch) -> Tensor:
    """Return the head's scores: (B,E,L), one per example, or (B,T,L), one per token."""
    first_tokens = None if model.per_token else batch.prediction_positions
    hidden = model.encoder(batch.input_ids, batch.position_ids, batch.document_ids, batch.token_type_ids, first_tokens)
    if first_tokens is None:
        return model.classify(hidden)
    return model.classify(hidden.flatten(0, 1)[:, None]).view(*first_tokens.shape, -1)


def label_loss(
    scores: Tensor, batch: TaskBatch, weights: Tensor | None = None, smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Cross entropy of one label each, in nats, weighted by label; `smoothing` spreads a share over all labels."""
    losses = F.cross_entropy(
        scores.flatten(0, 1).float(), batch.labels.flatten(), weights, ignore_index=IGNORED, reduction="none",
        label_smoothing=smoothing,
    )  # fmt: skip
    return losses.view(batch.labels.shape), batch.labels != IGNORED


def multilabel_loss(scores: Tensor, batch: TaskBatch) -> tuple[Tensor, Tensor]:
    """Binary cross entropy, in nats, averaged over the labels of an example."""
    losses = F.binary_cross_entropy_with_logits(scores.float(), batch.labels.nan_to_num(), reduction="none").mean(-1)
    return losses, ~batch.labels[..., 0].isnan()


def regression_loss(scores: Tensor, batch: TaskBatch) -> tuple[Tensor, Tensor]:
    """Squared error."""
    return (scores[..., 0].float() - batch.labels.nan_to_num()).square(), ~batch.labels.isnan()


def no_loss(scores: Tensor, batch: TaskBatch) -> tuple[Tensor, Tensor]:
    """Zero, for examples without labels."""
    zeros = scores.new_zeros(batch.prediction_positions.shape)
    return zeros, zeros.bool()


def sum_losses(losses: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the losses that count, and their number."""
    return torch.where(counted, losses, 0).sum(), counted.sum()


def compute_outputs(
    model: Classifier, batches: ExampleBatches, runtime: Runtime, compute_scores: Callable[..., Tensor], loss: Loss
) -> tuple[list[NDArray[np.float32]], list[float], float]:
    """Return each example's scores, each example's mean loss, in order, and the mean loss of all examples or tokens."""
    outputs: dict[int, NDArray[np.float32]] = {}
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

    single_rank = replace(runtime, rank=0, world_size=1)  # every rank evaluates all examples: all choose one checkpoint
    micro_batch_size = max(1, min(batches.num_sequences, MICRO_BATCH_TOKENS // batches.sequence_length))
    means = evaluate(model, evaluate_batch, batches.evaluation, batches.num_sequences, micro_batch_size, single_rank)
    indices = range(len(outputs))
    return [outputs[index] for index in indices], [losses[index] for index in indices], means["loss"]
