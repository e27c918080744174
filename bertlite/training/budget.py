"""A budget of time: how many steps fit into what is left of it."""

import time
from collections import deque
from collections.abc import Callable
from statistics import mean

from bertlite.core.distributed import all_reduce_max
from bertlite.core.logging import logger
from bertlite.model.initialization import parameter_count
from bertlite.training.trainer import Callback, Step, Trainer

UNKNOWN = 1_000_000  # steps, before one has been measured
WINDOW = 20  # steps whose mean time is that of the next ones
CHECKPOINT_BYTES = 16  # of a parameter, in the last checkpoint and the final model
BYTES_PER_SECOND = 400e6  # that are written to a disk


class Budget(Callback):
    """Sets the trainer's number of steps to those that fit into `seconds`, and corrects it after each step.

    The learning rate follows the corrected number, so that its decay ends with the budget also where the machine gets
    slower. Evaluations and the last checkpoint count. `start` is the `time.time()` at which the command started;
    `measure_evaluation` returns the seconds of an evaluation. Give this callback before those that ask `is_due`.
    """

    def __init__(self, seconds: float, start: float, measure_evaluation: Callable[[Trainer], float]) -> None:
        self.seconds, self.start, self.measure_evaluation = seconds, start, measure_evaluation
        self.steps: deque[float] = deque(maxlen=WINDOW)
        self.evaluation, self.reserve, self.spent_before = 0.0, 0.0, 0.0

    def on_start(self, trainer: Trainer) -> None:
        self.spent_before = trainer.progress.spent_seconds
        self.evaluation = self.measure_evaluation(trainer)
        self.reserve = self.evaluation + parameter_count(trainer.model) * CHECKPOINT_BYTES / BYTES_PER_SECOND
        self._set_steps(trainer, trainer.progress.planned_steps or UNKNOWN)

    def on_step(self, trainer: Trainer, step: Step) -> None:
        progress = trainer.progress
        progress.spent_seconds = self.spent_before + time.time() - self.start
        if progress.step == trainer.first_step + 1 and trainer.runtime.compile:
            return  # it has compiled
        self.steps.append(step.seconds)
        left = self.seconds - progress.spent_seconds - self.reserve
        seconds = mean(self.steps) + self.evaluation / trainer.settings.eval_steps
        fit = all_reduce_max(max(0, round(left / seconds)), trainer.runtime.device)
        if len(self.steps) == 1 and trainer.first_step == 0:
            logger.info(f"train.budget {trainer.settings.budget}: about {progress.step + fit:,} steps")
        self._set_steps(trainer, progress.step + fit)

    def _set_steps(self, trainer: Trainer, steps: int) -> None:
        trainer.progress.planned_steps = steps
        trainer.settings = trainer.settings.model_copy(update={"max_steps": steps})
