"""Notices a training that has stalled where a model knows how often tokens occur, but uses no context."""

import math
from collections.abc import Callable

from bertlite.config.settings import TrainSettings
from bertlite.core.logging import logger
from bertlite.training.trainer import Callback, Step, Trainer

MIN_WINDOW = 100  # steps
BELOW, ABOVE = 0.1, 0.3  # nats around the unigram entropy; a high learning rate keeps the loss a little above it
MIN_IMPROVEMENT = 0.02  # nats from one window to the next


class PlateauWatch(Callback):
    """Warns once when, after warm-up, the loss stays at the entropy of the token frequencies.

    Models with layer norms after the residuals are known for it (Xiong et al. 2020; Liu et al. 2020). The loss is
    averaged over windows of half the warm-up; it stays when a window is no better than the window before.
    """

    def __init__(self, settings: TrainSettings, unigram_entropy: Callable[[], float]) -> None:
        self.unigram_entropy = unigram_entropy
        self.warmup_steps = math.ceil(settings.warmup_ratio * settings.max_steps)
        self.window = max(MIN_WINDOW, self.warmup_steps // 2)
        self.loss_sum, self.num_predictions, self.steps = 0.0, 0, 0  # of this window
        self.previous_mean = math.inf
        self.has_warned = False

    def on_step(self, trainer: Trainer, step: Step) -> None:
        settings = trainer.settings
        self.warmup_steps = math.ceil(settings.warmup_ratio * settings.max_steps)  # a budget changes it
        if not step.skipped:
            self.watch(trainer.progress.step, step.loss_sum, step.num_predictions)

    def watch(self, step: int, loss_sum: float, num_predictions: int) -> None:
        """Add the loss of a step, and warn when the window that it ends shows a plateau."""
        if self.has_warned or step <= max(self.warmup_steps, MIN_WINDOW):
            return
        self.loss_sum += loss_sum
        self.num_predictions += num_predictions
        self.steps += 1
        if self.steps < self.window:
            return
        mean = self.loss_sum / max(1, self.num_predictions)
        stays = mean > self.previous_mean - MIN_IMPROVEMENT
        self.previous_mean = mean
        self.loss_sum, self.num_predictions, self.steps = 0.0, 0, 0
        if not stays:
            return
        entropy = self.unigram_entropy()
        if -BELOW < mean - entropy < ABOVE:
            self.has_warned = True
            logger.warning(
                f"step {step:,}: the loss stays at {mean:.2f}, which token frequencies alone give ({entropy:.2f}): the "
                "model does not use context yet. If it stays there, start a new run with model.initialization: "
                "counted, train.optim: muon, a lower train.learning_rate, or a higher train.warmup_ratio"
            )
