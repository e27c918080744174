"""The loss of masked language modelling."""

# Shapes: B sequences, P prediction positions of a sequence, V vocabulary.
import torch.nn.functional as F
from torch import Tensor, nn

from bertlite.data.batches import Batch
from bertlite.data.masking import IGNORED


def masked_lm_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Sum the cross entropy, in nats, over the predictions, and count them (Devlin et al. 2018, section 3.1)."""
    loss, num_predictions, _, _ = _predict(model, batch)
    return loss, num_predictions


def masked_lm_scores(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Sum the cross entropy and the correct predictions."""
    loss, num_predictions, logits, labels = _predict(model, batch)
    return {"loss": loss, "accuracy": (logits.argmax(-1) == labels).sum(), "count": num_predictions}


def _predict(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the summed loss, the number of predictions, the logits (B·P,V) and the labels (B·P,)."""
    logits = model(batch.input_ids, batch.position_ids, batch.document_ids, batch.prediction_positions).flatten(0, 1)
    labels = batch.labels.flatten()
    loss = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    return loss, (labels != IGNORED).sum(), logits, labels
