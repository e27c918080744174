"""A training that has stalled where a network knows how often tokens occur, and nothing of their context."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from bertlite.config.settings import TrainSettings
from bertlite.core.logging import logger

LEAST_WINDOW = 100  # steps whose mean is compared, at least
BELOW, ABOVE = 0.1, 0.3  # nats around the unigram level; a high rate holds the loss a little above it
PROGRESS = 0.02  # nats from one window to the next that a training at this level should make at least


@dataclass
class PlateauWatch:
    """Says once when, after warm-up, the loss stays at the entropy of the tokens' frequencies.

    Networks with layer norms behind the residuals are known for it (Xiong et al. 2020; Liu et al. 2020).
    Means over windows are compared, of half the warm-up: at this level, and no better than the one before.
    """

    settings: TrainSettings
    unigram_entropy: Callable[[], float]
    loss_sum: float = 0.0  # of the window, …
    scored: int = 0
    steps: int = 0
    before: float = math.inf  # … and the mean of the one before
    silent: bool = False

    def __call__(self, step: int, loss_sum: float, scored: int) -> None:
        warmup = math.ceil(self.settings.warmup_ratio * self.settings.max_steps)
        window = max(LEAST_WINDOW, warmup // 2)
        if self.silent or step <= max(warmup, LEAST_WINDOW):
            return
        self.loss_sum, self.scored, self.steps = self.loss_sum + loss_sum, self.scored + scored, self.steps + 1
        if self.steps < window:
            return
        mean = self.loss_sum / max(1, self.scored)
        stalled, self.before = mean > self.before - PROGRESS, mean
        self.loss_sum, self.scored, self.steps = 0.0, 0, 0
        if stalled and -BELOW < mean - (level := self.unigram_entropy()) < ABOVE:
            self.silent = True
            logger.info(
                f"step {step:,}: the loss stays at {mean:.2f}, which tokens' frequencies alone give ({level:.2f}): the "
                "model uses no context yet. If it stays so, start again with model.position_init: sinusoidal, "
                "train.optim: muon, a lower train.learning_rate, or a higher train.warmup_ratio"
            )
