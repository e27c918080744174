"""`bertlite bench`: what a training step costs on this machine, and what its time is spent on."""

import sys
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from bertlite.config.settings import Architecture, PretrainConfig
from bertlite.core.runtime import Runtime, initialize_runtime
from bertlite.data.masking import max_predictions
from bertlite.model.heads import MaskedLanguageModel
from bertlite.pretraining.prepare import Prepared, prepare
from bertlite.pretraining.pretrain import new_trainer
from bertlite.pretraining.starting_model import resolve_architecture
from bertlite.training.callbacks import ProgressBar
from bertlite.training.trainer import PHASES, Callback, Step, Trainer

WARM_UP = 5  # steps that compile and fill caches, and are not measured
# Shapes (M, K, N) of products (M,K) × (K,N): the fastest of them is the machine's peak.
PEAK_SHAPES = [(1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 4096)]


class Lap(NamedTuple):
    """The end of a step: the time, and the tokens and the seconds of each phase since the start."""

    at: float
    tokens: int
    seconds: dict[str, float]


class StepTimer(Callback):
    """Records a lap after each step. Give it last, so that the time of other callbacks does not count."""

    def __init__(self) -> None:
        self.laps: list[Lap] = []
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.phase_start = 0.0

    def on_start(self, trainer: Trainer) -> None:
        self.phase_start = perf_counter()

    def on_phase_end(self, trainer: Trainer, phase: str) -> None:
        if trainer.runtime.device.type == "cuda":
            torch.cuda.synchronize()
        now = perf_counter()
        self.seconds[phase] += now - self.phase_start
        self.phase_start = now

    def on_step(self, trainer: Trainer, step: Step) -> None:
        self.phase_start = perf_counter()
        self.laps.append(Lap(self.phase_start, trainer.progress.tokens, dict(self.seconds)))


def bench(config: PretrainConfig, steps: int = 20) -> dict[str, Any]:
    """Train `steps` steps as configured, on the configured text, and measure them; nothing is kept.

    Returns medians over the steps: tokens and seconds by phase; the share of the machine's peak that the model's matrix
    products reach (padding and unused predictions count as work); and peak memory in bytes.
    """
    runtime = initialize_runtime(config.train.precision, config.train.compile)
    prepared = prepare(config)
    laps = rehearse(config, prepared, runtime, WARM_UP + steps)
    memory = peak_memory(runtime.device)
    pairs = list(pairwise(laps[WARM_UP - 1 :]))
    step_seconds = median(after.at - before.at for before, after in pairs)
    flops = flops_of_step(config, prepared, config.train.global_batch_size // runtime.world_size)
    peak = matmul_peak(runtime.device, runtime.dtype)
    return {
        "tokens_per_second": median((after.tokens - before.tokens) / (after.at - before.at) for before, after in pairs),
        "step_seconds": step_seconds,
        **{
            f"{phase}_seconds": median(after.seconds[phase] - before.seconds[phase] for before, after in pairs)
            for phase in PHASES
        },
        "flops_per_second": flops / step_seconds,
        "peak_flops_per_second": peak,
        "share_of_peak": flops / step_seconds / peak,
        "peak_memory_bytes": memory,
        "device": str(runtime.environment()["device"]),
        "precision": str(runtime.environment()["precision"]),
    }


def rehearse(config: PretrainConfig, prepared: Prepared, runtime: Runtime, steps: int) -> list[Lap]:
    """Train as configured for some steps, without evaluation or checkpoints, and time each of them."""
    settings = config.train.model_copy(update={"max_steps": steps})
    timer = StepTimer()
    callbacks = [ProgressBar(), timer] if runtime.rank == 0 else [timer]
    new_trainer(config.model_copy(update={"train": settings}), prepared, runtime, callbacks).train()
    return timer.laps


def format_bench(result: dict[str, Any]) -> str:
    """Format what `bench` returns as lines for people."""
    step_seconds = result["step_seconds"]
    phases = {phase: result[f"{phase}_seconds"] for phase in PHASES}
    return "\n".join(
        [
            f"{result['tokens_per_second']:,.0f} tokens/s on {result['device']} in {result['precision']}",
            *(
                f"  {phase:10} {seconds * 1e3:9.1f} ms  {seconds / step_seconds:6.1%}"
                for phase, seconds in phases.items()
            ),
            f"  {'step':10} {step_seconds * 1e3:9.1f} ms",
            f"matrix products at {result['flops_per_second'] / 1e9:,.0f} GFLOP/s, {result['share_of_peak']:.0%} of the "
            f"measured peak of {result['peak_flops_per_second'] / 1e9:,.0f} GFLOP/s",
            f"peak memory {result['peak_memory_bytes'] / 2**20:,.0f} MiB",
        ]
    )


def flops_of_step(config: PretrainConfig, prepared: Prepared, batch_size: int) -> int:
    """Count the floating point operations of a step of `batch_size` sequences, forward and backward."""
    architecture = resolve_architecture(config.model, prepared.starting_model, prepared.tokenizer)
    T = config.data.sequence_length
    return batch_size * flops_per_sequence(architecture, T, max_predictions(T, config.masking))


def flops_per_sequence(architecture: Architecture, sequence_length: int, num_predictions: int) -> int:
    """Count the floating point operations of the matrix products for one sequence, forward and backward.

    A multiply and an add are two operations. The model has no weights: torch counts by shapes alone.
    """
    with torch.device("meta"):
        model = MaskedLanguageModel(architecture, "matmul")
        ids = torch.zeros(1, sequence_length, dtype=torch.long)
        positions = torch.zeros(1, num_predictions, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(ids, ids, ids, positions).sum().backward()
    return int(counter.get_total_flops())


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the floating point operations per second of the fastest of some matrix products."""
    scale = 4 if device.type == "cuda" else 1
    peak = 0.0
    for M, K, N in (tuple(scale * size for size in shape) for shape in PEAK_SHAPES):
        a, b = torch.randn(M, K, device=device).to(dtype), torch.randn(K, N, device=device).to(dtype)
        times = []
        for _ in range(8):
            start_time = perf_counter()
            a @ b
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(perf_counter() - start_time)
        peak = max(peak, 2 * M * K * N / min(times))
    return peak


def peak_memory(device: torch.device) -> int:
    """Return the most memory that this process has held so far, in bytes: the GPU's, or its own where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
