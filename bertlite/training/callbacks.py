"""What happens between the steps of a training: metrics, progress bar, evaluation, checkpoints."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from bertlite.core.distributed import all_reduce_max
from bertlite.core.files import disk_full_as_error, fsync, write_text
from bertlite.core.logging import logger
from bertlite.core.runtime import Runtime
from bertlite.core.signals import stop_request
from bertlite.training.checkpoint import TrainingState, save_checkpoint
from bertlite.training.progress import Progress
from bertlite.training.run_folder import metrics_file, read_metrics
from bertlite.training.trainer import Callback, Step, Trainer


def loggers(folder: Path, runtime: Runtime) -> list[Callback]:
    """Return the callbacks that metrics go to. A list starts with them, so that their `on_start` comes first."""
    return [MetricsFile(folder), ProgressBar()] if runtime.rank == 0 else []


class MetricsFile(Callback):
    """Appends each line to metrics.jsonl at once. Numbers that JSON does not have become null."""

    def __init__(self, folder: Path) -> None:
        self.path = metrics_file(folder)

    def on_start(self, trainer: Trainer) -> None:
        """Cut the file back to the checkpoint's step."""
        kept = [line for line in read_metrics(self.path.parent) if line["step"] <= trainer.progress.step]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def on_log(self, trainer: Trainer, line: dict[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in line.items()}
        with disk_full_as_error(self.path.parent), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")


class ProgressBar(Callback):
    """Shows the step, the loss and the throughput: as a bar on a terminal, elsewhere as lines."""

    def __init__(self) -> None:
        self.bar = tqdm(disable=True)

    def on_start(self, trainer: Trainer) -> None:
        self.bar = tqdm(total=trainer.settings.max_steps, initial=trainer.progress.step, desc="training", disable=None)

    def on_step(self, trainer: Trainer, step: Step) -> None:
        self.bar.total = trainer.settings.max_steps  # a budget changes it
        self.bar.update()

    def on_log(self, trainer: Trainer, line: dict[str, float]) -> None:
        if "loss" not in line:
            return
        text = f"loss {line['loss']:.3f}"
        if math.isfinite(line["tokens_per_second"]):
            text += f", {line['tokens_per_second']:,.0f} tokens/s"
        self.bar.set_postfix_str(text)
        if self.bar.disable:
            logger.info(f"step {trainer.progress.step:,} of {trainer.settings.max_steps:,}: {text}")

    def on_end(self, trainer: Trainer) -> None:
        self.bar.close()


class TrainingLog(Callback):
    """Logs loss, learning rate, gradient norm and throughput every `logging_steps`.

    The throughput leaves out the step that compiles the model; it is NaN where there is no other step.
    """

    def __init__(self) -> None:
        self.tokens = 0  # since the last line
        self.seconds = 0.0  # spent on steps since the last line, not on evaluation or checkpoints

    def on_step(self, trainer: Trainer, step: Step) -> None:
        progress = trainer.progress
        if not trainer.runtime.compile or progress.step > trainer.first_step + 1:
            self.tokens += step.tokens
            self.seconds += step.seconds
        if not step.skipped:
            progress.loss_sum += step.loss_sum
            progress.num_predictions += step.num_predictions
        if not trainer.is_due(trainer.settings.logging_steps):
            return
        line = {
            "step": progress.step,
            "tokens": progress.tokens,
            "loss": progress.loss_sum / progress.num_predictions if progress.num_predictions else math.nan,
            "lr": trainer.optimizer.learning_rate(),
            "grad_norm": step.gradient_norm,
            "tokens_per_second": self.tokens / self.seconds if self.seconds else math.nan,
            "elapsed_seconds": trainer.elapsed_seconds(),
        }
        if progress.skipped_steps:
            line["skipped_steps"] = progress.skipped_steps
        trainer.log(line)
        self.tokens, self.seconds = 0, 0.0
        progress.loss_sum, progress.num_predictions = 0.0, 0


class Evaluation(Callback):
    """Evaluates every `eval_steps`, and remembers the step with the best `metric` (higher is better).

    After `patience` evaluations in a row that are not better, the training ends.
    """

    def __init__(
        self, evaluate: Callable[[Trainer], dict[str, float]], metric: str | None = None, patience: int | None = None
    ) -> None:
        self.evaluate, self.metric, self.patience = evaluate, metric, patience
        self.compiled = False

    def on_start(self, trainer: Trainer) -> None:
        if trainer.progress.evaluated_step < trainer.progress.step:  # a signal interrupted this evaluation before
            self._evaluate_if_due(trainer)

    def on_step(self, trainer: Trainer, step: Step) -> None:
        self._evaluate_if_due(trainer)

    def should_stop(self, progress: Progress) -> bool:
        return self.patience is not None and progress.evaluations_since_best >= self.patience

    def _evaluate_if_due(self, trainer: Trainer) -> None:
        progress = trainer.progress
        if not trainer.is_due(trainer.settings.eval_steps):
            return
        if trainer.runtime.compile and not self.compiled:
            logger.info("compiling the evaluation")
            self.compiled = True
        with stop_request.saves_when_late(trainer.interrupt):
            scores = self.evaluate(trainer)
        trainer.log(
            {
                "step": progress.step,
                "tokens": progress.tokens,
                **{f"eval_{name}": value for name, value in scores.items()},
                "elapsed_seconds": trainer.elapsed_seconds(),
            }
        )
        results = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        logger.info(f"step {progress.step:,}, {progress.tokens:,} tokens: validation {results}")
        progress.evaluated_step = progress.step
        progress.evaluations_since_best += 1
        if self.metric and (not progress.best_scores or scores[self.metric] > progress.best_scores[self.metric]):
            progress.best_step, progress.best_scores, progress.evaluations_since_best = progress.step, scores, 0


class Checkpoints(Callback):
    """Saves every `save_steps`, when `save_minutes` have passed since the last save, and when a signal arrives.

    `facts` must be equal for equal results; they are compared on resume.
    """

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase, facts: dict[str, Any]) -> None:
        self.folder, self.tokenizer, self.facts = folder, tokenizer, facts
        self.saved_step = -1
        self.saved_at = 0.0  # in elapsed seconds of the run

    def on_start(self, trainer: Trainer) -> None:
        self.saved_at = trainer.elapsed_seconds()
        if trainer.progress.step > 0:  # resumed from it
            self.saved_step = trainer.progress.step
        elif trainer.is_due(trainer.settings.save_steps):  # a run of no steps
            self._save(trainer)

    def on_step(self, trainer: Trainer, step: Step) -> None:
        if trainer.is_due(trainer.settings.save_steps) or self._minutes_have_passed(trainer):
            self._save(trainer)

    def on_interrupt(self, trainer: Trainer) -> None:
        if 0 < trainer.progress.step != self.saved_step:
            self._save(trainer)
        if self.saved_step > 0:
            logger.info(f"saved step {self.saved_step:,} in {self.folder / 'checkpoints'}; continue with --resume")

    def _minutes_have_passed(self, trainer: Trainer) -> bool:
        minutes = trainer.settings.save_minutes
        if minutes is None:
            return False
        passed = trainer.elapsed_seconds() - self.saved_at >= 60 * minutes
        return bool(all_reduce_max(int(passed), trainer.runtime.device))

    def _save(self, trainer: Trainer) -> None:
        progress = trainer.progress
        progress.elapsed_seconds = trainer.elapsed_seconds()
        with stop_request.deferred():
            if trainer.runtime.rank == 0:
                fsync(metrics_file(self.folder))
                facts = self.facts | {"micro_batch_size": trainer.micro_batch_size}
                state = TrainingState(trainer.optimizer.state(), progress, facts)
                limit = trainer.settings.save_total_limit
                save_checkpoint(self.folder, trainer.model, self.tokenizer, state, limit)
        self.saved_step, self.saved_at = progress.step, trainer.elapsed_seconds()
