"""The training loop and the evaluation loop. What is trained, on what and by which loss, comes as arguments."""

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from bertlite.config.settings import TrainSettings
from bertlite.core.distributed import all_reduce_max, all_reduce_sum
from bertlite.core.errors import DataLost, Failure, UserError
from bertlite.core.files import fsync
from bertlite.core.logging import logger
from bertlite.core.random import DROPOUT, philox, split64
from bertlite.core.runtime import Runtime, is_out_of_memory
from bertlite.core.signals import Stopped, stop_request
from bertlite.data.batches import Batch
from bertlite.model.heads import Model
from bertlite.training.checkpoint import load_training_state, save_checkpoint
from bertlite.training.optim import Optimizer, clip_gradients, learning_rate_factor
from bertlite.training.run_folder import Metrics

# The sum of the losses of a batch, and how many it sums.
Loss = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]
# Sums over a batch by name; "count" is what the others are divided by.
Scores = Callable[[nn.Module, Batch], dict[str, Tensor]]
# Told after each step: its number, the sum of its losses, and how many they are.
Watch = Callable[[int, float, int], None]
# A batch from the number of its first row and how many rows it has.
MakeBatch = Callable[[int, int], Batch]
# What a step's time goes to: waiting for the batch, the loss, its gradient, and the update of the weights.
PARTS = ("data", "forward", "backward", "optimizer")

MOST_SKIPPED = 20  # steps in a row; after so many it is the weights that are at fault, and no batch


@dataclass
class Progress:
    """How far a run has come: with the weights and the optimizer's state, all that going on depends on."""

    step: int = 0
    tokens: int = 0
    loss_sum: float = 0.0  # since the last training line
    scored: int = 0
    elapsed_seconds: float = 0.0
    evaluated: int = -1  # the last step with an evaluation
    skipped: int = 0  # steps whose loss was not finite
    skipped_in_a_row: int = 0
    best_step: int = 0  # that of the best evaluation so far, …
    best: dict[str, float] = field(default_factory=dict)  # … its results, …
    since_best: int = 0  # … and how many evaluations came after it


@dataclass
class Training:
    """A training run: `loss` is backpropagated through `model`; `evaluate`, if any, is called when due.

    `facts` are what has to be equal for equal results; `settings.save_total_limit` checkpoints are kept, and the best.
    """

    folder: Path
    model: Model
    tokenizer: PreTrainedTokenizerBase
    loss: Loss
    make_batch: MakeBatch
    evaluate: Callable[[], dict[str, float]] | None
    settings: TrainSettings
    runtime: Runtime
    facts: dict[str, Any]
    micro_batch: int  # rows that a rank computes at a time
    optimizer: Optimizer
    progress: Progress = field(default_factory=Progress)
    saves: bool = True
    batch_command: str | None = None  # what prints the batch of the step whose number follows
    watch: Watch = lambda step, loss_sum, scored: None
    synchronize: bool = False  # wait for the GPU after each part of a step, so that `seconds` are the parts' own
    metric: str | None = None  # which result of an evaluation says what is best
    patience: int | None = None  # evaluations without a better one after which the training ends

    def run(self) -> None:
        """Train to the last step; at each step train, log, evaluate and save, in this order.

        After SIGINT or SIGTERM the work so far is saved and Stopped raised, likewise DataLost when the text vanishes.
        Raises Failure when memory gives out, or the loss is not finite and `on_nonfinite_loss` is not to skip.
        """
        self.metrics = Metrics(self.folder)
        if self.runtime.rank == 0:
            self.metrics.cut_back(self.progress.step)
        self.parameters = list(self.model.parameters())
        self.saved = self.progress.step or -1
        self.logged = self.progress.step
        self.saved_at = time.perf_counter()
        self.started = time.perf_counter() - self.progress.elapsed_seconds
        self.window = (time.perf_counter(), self.progress.tokens)
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.part_began = time.perf_counter()
        self.bar = tqdm(total=self.settings.max_steps, initial=self.progress.step, desc="training",
                        disable=True if self.runtime.rank else None)  # fmt: skip
        try:
            with ThreadPoolExecutor(1, "batches") as executor:
                self._loop(executor)
        except (Stopped, DataLost):
            stop_request.deferred = True
            if 0 < self.progress.step != self.saved:
                self._save()
            if self.saves and self.saved > 0:
                logger.info(f"step {self.saved:,} is saved in {self.folder / 'checkpoints'}; go on with --resume")
            raise
        finally:
            stop_request.deferred = False
            self.bar.close()

    def resume(self, checkpoint: Path) -> None:
        """Take up the training state of a checkpoint, with as many rows at a time unless they are set anew.

        Raises UserError for another text than before; another machine is announced.
        """
        try:
            tensors, state = load_training_state(checkpoint)
            self.optimizer.load_state(tensors)
            self.progress, before = Progress(**state["progress"]), state["facts"]
            rows = self.settings.per_device_train_batch_size or before["rows at a time"]
            text = before["text"]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{checkpoint}: cannot be resumed from: its training state is of another form: {error}"
            ) from None
        if self.facts["text"] != text:
            raise UserError(f"{self.folder}: the text or the tokenizer has changed since the run began; "
                            "start another run")  # fmt: skip
        self.micro_batch = min(rows, math.ceil(self.settings.global_batch_size / self.runtime.world_size))
        for name, now in {**self.facts, "rows at a time": self.micro_batch}.items():
            if now != before.get(name):
                logger.info(
                    f"{name}: {now}, but was {before.get(name)}: the batches are the same, the last digits may not be"
                )
        logger.info(f"resuming from {checkpoint}")

    def _loop(self, executor: ThreadPoolExecutor) -> None:
        settings, progress = self.settings, self.progress
        share = executor.submit(self._share, progress.step)
        while True:
            if self.logged < progress.step and self._due(settings.logging_steps):
                self._log()
            if self.evaluate and progress.evaluated < progress.step and self._due(settings.eval_steps):
                self._evaluate(self.evaluate)
            if self.saved < progress.step and (self._due(settings.save_steps) or self._minutes_have_passed()):
                self._save()
            if stop := all_reduce_max(stop_request.number, self.runtime.device):
                raise Stopped(stop)
            if progress.step == settings.max_steps or (self.patience and progress.since_best >= self.patience):
                return
            self.part_began = time.perf_counter()
            batch = share.result()
            self._count("data")
            share = executor.submit(self._share, progress.step + 1)
            self._step(batch)
            self.bar.update()

    def _due(self, every: int) -> bool:
        step = self.progress.step
        return step == self.settings.max_steps or (step > 0 and step % every == 0)

    def _minutes_have_passed(self) -> bool:
        minutes = self.settings.save_minutes
        if minutes is None or self.progress.step == 0:
            return False
        return bool(all_reduce_max(int(time.perf_counter() - self.saved_at >= 60 * minutes), self.runtime.device))

    def _share(self, step: int) -> Batch:
        """This rank's rows of the batch of `step`; past the last step they are made and dropped."""
        first, end = self._rows(step)
        return self.make_batch(first, end - first)

    def _rows(self, step: int) -> tuple[int, int]:
        size, rank, ranks = self.settings.global_batch_size, self.runtime.rank, self.runtime.world_size
        return step * size + rank * size // ranks, step * size + (rank + 1) * size // ranks

    def _step(self, share: Batch) -> None:
        """One optimizer step: sums over all rows of all ranks, divided once."""
        progress, device = self.progress, self.runtime.device
        sums = torch.tensor([0, 0, share.tokens()], dtype=torch.float64, device=device)  # loss, scored, tokens
        self.model.train()
        for start in range(0, len(share), self.micro_batch):
            if stop_request.number and self.runtime.world_size == 1:
                raise Stopped(stop_request.number)  # the step is left undone: it changed nothing yet
            torch.manual_seed(self._dropout_seed(start))
            rows = share.slice(start, start + self.micro_batch).to(device)
            try:
                with self.runtime.autocast():
                    loss, count = self.loss(self.model, rows)
                self._count("forward")
                loss.backward()
                self._count("backward")
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                memory = "GPU's memory" if device.type == "cuda" else "memory"
                raise Failure(
                    f"{len(rows)} rows at a time do not fit into the {memory}: lower "
                    "train.per_device_train_batch_size, or set train.gradient_checkpointing to true"
                ) from None
            sums[:2] += torch.stack([loss.detach().double(), count.double()])
        # Until the first step is computed, which may compile for long, there is nothing to lose by stopping at once.
        stop_request.deferred = True
        all_reduce_sum([parameter.grad for parameter in self.parameters if parameter.grad is not None] + [sums])
        loss_sum, scored, tokens = sums.tolist()
        self.norm = clip_gradients(self.parameters, max(1.0, scored), self.settings.max_grad_norm).item()
        progress.tokens += int(tokens)
        if not (math.isfinite(loss_sum) and math.isfinite(self.norm)):
            self._skip()
            return
        self.optimizer.step(learning_rate_factor(progress.step, self.settings))
        progress.step += 1
        progress.skipped_in_a_row = 0
        progress.loss_sum += loss_sum
        progress.scored += int(scored)
        self._count("optimizer")
        self.watch(progress.step, loss_sum, int(scored))

    def _skip(self) -> None:
        """Leave out a step whose loss or gradient is not finite, or end where that is the policy or does not help."""
        progress = self.progress
        what = f"the loss or its gradient is not finite at step {progress.step + 1}"
        if self.batch_command:
            what += f"; its batch: {self.batch_command} {progress.step + 1}"
        if self.settings.on_nonfinite_loss == "stop" or progress.skipped_in_a_row == MOST_SKIPPED:
            advice = "start a new run with a lower train.learning_rate or more warm-up"
            if self.batch_command and self.saved > 0:
                advice = (
                    "the checkpoints before are intact: --resume --set train.on_nonfinite_loss=skip leaves such steps "
                    f"out; if there are many, {advice}"
                )
            raise Failure(f"{what}\n{advice}")
        logger.info(f"skipped: {what}")
        self.optimizer.step(learning_rate_factor(progress.step, self.settings), skip=True)
        progress.step += 1
        progress.skipped += 1
        progress.skipped_in_a_row += 1

    def _count(self, part: str) -> None:
        """Count the time since the last call as that of a part of the step."""
        if self.synchronize:
            torch.accelerator.synchronize()
        now = time.perf_counter()
        self.seconds[part] += now - self.part_began
        self.part_began = now

    def _dropout_seed(self, start: int) -> int:
        """Dropout follows from the seed, the step and the row."""
        first = self._rows(self.progress.step)[0] + start
        low, high, *_ = map(int, philox((self.settings.seed, DROPOUT), (*split64(first), 0, 0)))
        return low | (high >> 1) << 32

    def _log(self) -> None:
        progress, (since, tokens) = self.progress, self.window
        now = time.perf_counter()
        line = {
            "step": progress.step,
            "tokens": progress.tokens,
            "loss": progress.loss_sum / progress.scored if progress.scored else math.nan,
            "lr": self.optimizer.learning_rate(),
            "grad_norm": self.norm,
            "tokens_per_second": (progress.tokens - tokens) / (now - since),
            "elapsed_seconds": now - self.started,
        }
        if progress.skipped:
            line["skipped_steps"] = progress.skipped
        self._write(line)
        watched = f"loss {line['loss']:.3f}, {line['tokens_per_second']:,.0f} tokens/s"
        self.bar.set_postfix_str(watched)
        if self.bar.disable:  # nobody sees the bar
            logger.info(f"step {progress.step:,} of {self.settings.max_steps:,}: {watched}")
        self.window = (now, progress.tokens)
        self.logged = progress.step
        progress.loss_sum, progress.scored = 0.0, 0

    def _evaluate(self, evaluate: Callable[[], dict[str, float]]) -> None:
        began = time.perf_counter()
        # It changes nothing, so a process without others leaves it at once if all is saved, and else after a batch.
        stop_request.deferred = self.runtime.world_size > 1 or self.saved != self.progress.step
        scores = evaluate()
        stop_request.deferred = True
        progress = self.progress
        self._write(
            {
                "step": progress.step,
                "tokens": progress.tokens,
                **{f"eval_{name}": value for name, value in scores.items()},
                "elapsed_seconds": time.perf_counter() - self.started,
            }
        )
        results = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        logger.info(f"step {progress.step:,}, {progress.tokens:,} tokens: held-out {results}")
        progress.evaluated = progress.step
        progress.since_best += 1
        if self.metric and (not progress.best or scores[self.metric] > progress.best[self.metric]):
            progress.best_step, progress.best, progress.since_best = progress.step, scores, 0
        self._pass_over(began)

    def _save(self) -> None:
        began = time.perf_counter()
        self.progress.elapsed_seconds = began - self.started
        if self.runtime.rank == 0 and self.saves:
            fsync(self.metrics.path)
            state = {"progress": asdict(self.progress), "facts": self.facts | {"rows at a time": self.micro_batch}}
            save_checkpoint(self.folder, self.model, self.tokenizer, self.optimizer.state(), state,
                            self.settings.save_total_limit)  # fmt: skip
        self.saved, self.saved_at = self.progress.step, time.perf_counter()
        self._pass_over(began)

    def _pass_over(self, began: float) -> None:
        """Do not count the time since `began` as training time."""
        since, tokens = self.window
        self.window = (since + time.perf_counter() - began, tokens)

    def _write(self, line: dict[str, Any]) -> None:
        if self.runtime.rank == 0:
            self.metrics.write(line)


def evaluate(
    model: nn.Module, scores: Scores, make_batch: MakeBatch, rows: int, micro_batch: int, runtime: Runtime
) -> dict[str, float]:
    """The means of `scores` over rows 0 to `rows`, shared out among the ranks; the model computes without dropout.

    Of nothing they are NaN.
    """
    model.eval()
    sums: dict[str, Tensor] = {}
    with torch.inference_mode(), runtime.autocast():
        # Every rank makes as many batches as the others; those past the last row are empty.
        for first in range(0, rows, micro_batch * runtime.world_size):
            if stop_request.number and not dist.is_initialized():  # the other ranks would wait
                raise Stopped(stop_request.number)
            batch = make_batch(first + runtime.rank * micro_batch, micro_batch).to(runtime.device)
            for name, value in scores(model, batch).items():
                sums[name] = sums.get(name, 0) + value.double()
        all_reduce_sum(list(sums.values()))
    count = sums.pop("count").item()
    return {name: value.item() / count if count else math.nan for name, value in sums.items()}
