"""The training loop and the evaluation loop. What is trained, on what and by which loss, comes as arguments."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from bertlite.config.settings import TrainSettings
from bertlite.core.distributed import all_reduce_max, all_reduce_sum
from bertlite.core.errors import DataLost, Failure
from bertlite.core.logging import logger
from bertlite.core.random import DROPOUT, philox, split64
from bertlite.core.runtime import Runtime, is_out_of_memory
from bertlite.core.signals import Stopped, stop_request
from bertlite.data.batches import Batch
from bertlite.model.heads import Model
from bertlite.training.optim import Optimizer, clip_gradients, learning_rate_factor
from bertlite.training.progress import Progress

# The summed loss of a batch, and the number of predictions that it sums.
Loss = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]
# Sums over a batch by name; "count" is what the others are divided by.
Scores = Callable[[nn.Module, Batch], dict[str, Tensor]]
# A batch from the index of its first sequence and the number of sequences.
MakeBatch = Callable[[int, int], Batch]

# What the time of a step is spent on: waiting for the batch, the loss, its gradient, updating the weights.
PHASES = ("data", "forward", "backward", "optimizer")
MAX_CONSECUTIVE_SKIPS = 20  # after that many steps the weights are at fault, not the batches


class Step(NamedTuple):
    """What one optimizer step computed, summed over all ranks."""

    loss_sum: float
    num_predictions: int
    tokens: int
    gradient_norm: float
    skipped: bool  # the loss was not finite, so the weights did not change
    seconds: float


class Callback:
    """Acts at points of the training loop, on all ranks. Every hook may be left out."""

    def on_start(self, trainer: "Trainer") -> None:
        """Before the first step of this process, also where no step is left to train."""

    def on_phase_end(self, trainer: "Trainer", phase: str) -> None:
        """When one of PHASES ends; forward and backward end once for each micro-batch."""

    def on_step(self, trainer: "Trainer", step: Step) -> None:
        """After each step, also a skipped one."""

    def on_log(self, trainer: "Trainer", line: dict[str, float]) -> None:
        """When a callback passes metrics to `trainer.log`."""

    def on_interrupt(self, trainer: "Trainer") -> None:
        """When a signal, or data that vanished, ends the training."""

    def on_end(self, trainer: "Trainer") -> None:
        """When the training ends, whatever the reason."""

    def should_stop(self, progress: Progress) -> bool:
        """Whether to end before the last step."""
        return False


class Trainer:
    """Trains `model` with gradients summed over micro-batches and ranks, and divided once by the predictions.

    `callbacks` act in their order after each step. `batch_command` prints the batch of the step whose number follows.
    """

    def __init__(
        self,
        model: Model,
        optimizer: Optimizer,
        loss: Loss,
        make_batch: MakeBatch,
        settings: TrainSettings,
        runtime: Runtime,
        micro_batch_size: int,
        progress: Progress,
        callbacks: Sequence[Callback],
        batch_command: str | None = None,
    ) -> None:
        self.model, self.optimizer, self.loss, self.make_batch = model, optimizer, loss, make_batch
        self.settings, self.runtime, self.micro_batch_size = settings, runtime, micro_batch_size
        self.progress, self.callbacks, self.batch_command = progress, callbacks, batch_command
        self.parameters = list(model.parameters())
        self.first_step = progress.step
        self.start_time = time.perf_counter() - progress.elapsed_seconds

    def train(self) -> None:
        """Train until the last step, or until a callback stops it.

        Raises Stopped after SIGINT, SIGTERM or SIGHUP, DataLost when the corpus vanishes, and Failure when memory runs
        out or the loss is not finite and `on_nonfinite_loss` is "stop".
        """
        with stop_request.deferred(), ThreadPoolExecutor(1, "batches") as executor:
            try:
                self._run_steps(executor)
            except (Stopped, DataLost):
                self.interrupt()
                raise
            finally:
                for callback in self.callbacks:
                    callback.on_end(self)

    def _run_steps(self, executor: ThreadPoolExecutor) -> None:
        with stop_request.deferred(self.runtime.world_size > 1):  # nothing is trained yet: nothing would be lost
            for callback in self.callbacks:
                callback.on_start(self)
        next_batch = executor.submit(self._load_batch, self.progress.step)
        while not self._is_finished():
            start = time.perf_counter()
            # Nothing would be lost before the end of the first forward and backward pass, which may compile for long.
            with stop_request.deferred(self.progress.step > self.first_step):
                batch = next_batch.result()
                next_batch = executor.submit(self._load_batch, self.progress.step + 1)
                self._end_phase("data")
                with stop_request.saves_when_late(self.interrupt):  # as of the last step: weights do not change here
                    sums = self._forward_backward(batch)
            step = self._update(sums, start)
            for callback in self.callbacks:
                callback.on_step(self, step)

    def interrupt(self) -> None:
        """Let the callbacks save what would be lost."""
        for callback in self.callbacks:
            callback.on_interrupt(self)

    def is_due(self, interval: int) -> bool:
        """Whether what happens every `interval` steps happens after this one; after the last step everything does."""
        step = self.progress.step
        return step == self.settings.max_steps or (step > 0 and step % interval == 0)

    def elapsed_seconds(self) -> float:
        """The time since the run started, without the time between a stop and a resume."""
        return time.perf_counter() - self.start_time

    def log(self, line: dict[str, float]) -> None:
        """Pass metrics to the callbacks that write or show them."""
        for callback in self.callbacks:
            callback.on_log(self, line)

    def _is_finished(self) -> bool:
        """Whether no step is left. Raises Stopped when a rank has received a signal."""
        if signal := all_reduce_max(stop_request.number, self.runtime.device):
            raise Stopped(signal)
        if self.progress.step == self.settings.max_steps:
            return True
        return any(callback.should_stop(self.progress) for callback in self.callbacks)

    def _load_batch(self, step: int) -> Batch:
        """This rank's share of the batch of `step`; the batch past the last step is made and dropped."""
        first, end = self._samples_of_rank(step)
        return self.make_batch(first, end - first)

    def _samples_of_rank(self, step: int) -> tuple[int, int]:
        size, rank, ranks = self.settings.global_batch_size, self.runtime.rank, self.runtime.world_size
        return step * size + rank * size // ranks, step * size + (rank + 1) * size // ranks

    def _forward_backward(self, batch: Batch) -> Tensor:
        """Sum the gradients of all micro-batches. Returns this rank's summed loss, number of predictions and tokens."""
        sums = torch.tensor([0, 0, batch.tokens()], dtype=torch.float64, device=self.runtime.device)
        self.model.train()
        for start in range(0, len(batch), self.micro_batch_size):
            if stop_request.number and self.runtime.world_size == 1:
                raise Stopped(stop_request.number)  # drop the step: it has not changed anything yet
            torch.manual_seed(self._dropout_seed(start))
            micro_batch = batch.slice(start, start + self.micro_batch_size).to(self.runtime.device)
            with _explain_out_of_memory(len(micro_batch), self.runtime):
                with self.runtime.autocast():
                    loss, num_predictions = self.loss(self.model, micro_batch)
                self._end_phase("forward")
                loss.backward()
                self._end_phase("backward")
            sums[:2] += torch.stack([loss.detach().double(), num_predictions.double()])
        return sums

    def _update(self, sums: Tensor, start: float) -> Step:
        """Sum over the ranks, clip the gradients, and update the weights."""
        progress, settings = self.progress, self.settings
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        all_reduce_sum([*gradients, sums])
        loss_sum, num_predictions, tokens = sums.tolist()
        gradient_norm = clip_gradients(self.parameters, max(1.0, num_predictions), settings.max_grad_norm).item()
        is_finite = math.isfinite(loss_sum) and math.isfinite(gradient_norm)
        if not is_finite:
            self._check_that_skipping_helps()
        self.optimizer.step(learning_rate_factor(progress.step, settings), skip=not is_finite)
        self._end_phase("optimizer")
        progress.step += 1
        progress.tokens += int(tokens)
        progress.skipped_steps += not is_finite
        progress.consecutive_skipped_steps = 0 if is_finite else progress.consecutive_skipped_steps + 1
        seconds = time.perf_counter() - start
        return Step(loss_sum, int(num_predictions), int(tokens), gradient_norm, not is_finite, seconds)

    def _check_that_skipping_helps(self) -> None:
        """Raise Failure when a step that is not finite may not be skipped, or when too many have been already."""
        number = self.progress.step + 1
        reason = f"the loss or its gradient is not finite at step {number}"
        if self.batch_command:
            reason += f"; its batch: {self.batch_command} {number}"
        may_skip = self.settings.on_nonfinite_loss == "skip"
        if may_skip and self.progress.consecutive_skipped_steps < MAX_CONSECUTIVE_SKIPS:
            logger.warning(f"skipped: {reason}")
            return
        advice = "start a new run with a lower train.learning_rate or a higher train.warmup_ratio"
        if self.batch_command and not may_skip:
            advice = f"skip such steps with --resume --set train.on_nonfinite_loss=skip; if there are many, {advice}"
        raise Failure(f"{reason}\n{advice}")

    def _dropout_seed(self, start: int) -> int:
        """A seed that follows from `train.seed` and the index of the micro-batch's first sequence in the run."""
        first = self._samples_of_rank(self.progress.step)[0] + start
        low, high, *_ = map(int, philox((self.settings.seed, DROPOUT), (*split64(first), 0, 0)))
        return low | (high >> 1) << 32

    def _end_phase(self, phase: str) -> None:
        for callback in self.callbacks:
            callback.on_phase_end(self, phase)


@contextmanager
def _explain_out_of_memory(micro_batch_size: int, runtime: Runtime) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        where = " on the GPU" if runtime.device.type == "cuda" else ""
        raise Failure(
            f"out of memory{where} with a micro-batch of {micro_batch_size} sequences: lower "
            "train.per_device_train_batch_size, or set train.gradient_checkpointing to true"
        ) from None


def evaluate(
    model: nn.Module, scores: Scores, make_batch: MakeBatch, num_sequences: int, micro_batch_size: int, runtime: Runtime
) -> dict[str, float]:
    """Return the means of `scores` over sequences 0 to `num_sequences`, without dropout, shared among the ranks.

    Without any prediction they are NaN.
    """
    model.eval()
    sums: dict[str, Tensor] = {}
    with torch.inference_mode(), runtime.autocast():
        # Every rank makes as many batches as the others; sequences past the last one are empty.
        firsts = range(0, num_sequences, micro_batch_size * runtime.world_size)
        hidden = True if runtime.rank else None  # None: shown on a terminal
        for first in tqdm(firsts, desc="evaluating", leave=False, disable=hidden, delay=2):
            if stop_request.number and not dist.is_initialized():  # the other ranks would wait
                raise Stopped(stop_request.number)
            batch = make_batch(first + runtime.rank * micro_batch_size, micro_batch_size).to(runtime.device)
            for name, value in scores(model, batch).items():
                sums[name] = sums.get(name, 0) + value.double()
        all_reduce_sum(list(sums.values()))
    count = sums.pop("count").item()
    return {name: value.item() / count if count else math.nan for name, value in sums.items()}
