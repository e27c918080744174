"""The state of the training loop that a checkpoint holds besides weights and optimizer."""

from dataclasses import dataclass, field
from typing import Any

VERSION = 2  # raise it when a name below changes, and add the old name to OLD_NAMES
# Names in the checkpoints of version 1, which had no number.
OLD_NAMES = {
    "scored": "num_predictions",
    "evaluated": "evaluated_step",
    "skipped": "skipped_steps",
    "skipped_in_a_row": "consecutive_skipped_steps",
    "best": "best_scores",
    "since_best": "evaluations_since_best",
    "rows at a time": "micro_batch_size",
}


@dataclass
class Progress:
    """How far a run has come. The trainer counts; callbacks keep here what they need after a resume."""

    step: int = 0
    tokens: int = 0  # without padding, over all ranks
    elapsed_seconds: float = 0.0
    skipped_steps: int = 0  # their loss was not finite
    consecutive_skipped_steps: int = 0
    loss_sum: float = 0.0  # in nats, since the last logged line
    num_predictions: int = 0  # since the last logged line
    evaluated_step: int = -1
    best_step: int = 0
    best_scores: dict[str, float] = field(default_factory=dict)
    evaluations_since_best: int = 0
    planned_steps: int = 0  # of a run with a budget of time, as estimated last
    spent_seconds: float = 0.0  # of that budget


def with_current_names(values: dict[str, Any]) -> dict[str, Any]:
    """Translate the names of older checkpoints."""
    return {OLD_NAMES.get(name, name): value for name, value in values.items()}
