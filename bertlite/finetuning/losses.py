"""Losses of the types of task."""

# Shapes: R rows, T positions of a row, P places of a row for an example, L labels.

import torch
import torch.nn.functional as F
from torch import Tensor

from bertlite.data.masking import IGNORED
from bertlite.finetuning.examples import TaskBatch
from bertlite.model.heads import Classifier, SequenceClassifier


def compute_scores(model: Classifier, batch: TaskBatch) -> Tensor:
    """The head's scores: (R,P,L), one for each example, or (R,T,L), one for each token."""
    firsts = batch.prediction_positions if isinstance(model, SequenceClassifier) else None
    hidden = model.encoder(batch.input_ids, batch.position_ids, batch.document_ids, batch.token_type_ids, firsts)
    if firsts is None:
        return model.classify(hidden)
    return model.classify(hidden.flatten(0, 1)[:, None]).view(*firsts.shape, -1)


# Losses take scores and a batch, and return the loss of each place (R,P) or token (R,T), and which of them count.
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
    """The squared error."""
    return (scores[..., 0].float() - batch.labels.nan_to_num()).square(), ~batch.labels.isnan()


def answer_loss(scores: Tensor, batch: TaskBatch) -> tuple[Tensor, Tensor]:
    """Cross entropy of start and end, averaged, among the tokens of the example (Devlin et al. 2018, section 4.2)."""
    numbers = torch.arange(1, batch.prediction_positions.shape[1] + 1, device=scores.device)
    inside = (batch.document_ids[:, None] == numbers[:, None])[:, :, None]  # (R,P,1,T)
    scores = scores.float().transpose(1, 2)[:, None].masked_fill(~inside, torch.finfo(torch.float32).min)  # (R,P,2,T)
    losses = F.cross_entropy(scores.flatten(0, 2), batch.labels.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(batch.labels.shape).mean(-1), batch.labels[..., 0] != IGNORED


def no_loss(scores: Tensor, batch: TaskBatch) -> tuple[Tensor, Tensor]:
    """Nothing, where labels are not known."""
    nothing = scores.new_zeros(batch.prediction_positions.shape)
    return nothing, nothing.bool()


def summed(losses: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the losses that count, and how many it sums."""
    return torch.where(real, losses, 0).sum(), real.sum()
