"""`bertlite bench`: what a training step costs on this machine, and where its time goes."""

import resource
import sys
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, NamedTuple

import torch

from bertlite.config.settings import Architecture, PretrainConfig
from bertlite.core.runtime import Runtime, initialize_runtime
from bertlite.data.masking import max_predictions
from bertlite.pretraining.pretrain import Prepared, architecture, new_training, prepare
from bertlite.training.trainer import PARTS

WARM_UP = 5  # steps that compile and fill caches, and are not measured
# Shapes (rows, inner, columns) of matrix products: the fastest of them is the machine's peak.
PEAK_SHAPES = [(1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 4096)]


class Lap(NamedTuple):
    """The end of a step: when it was, and the tokens and the seconds of each part up to then."""

    at: float
    tokens: int
    seconds: dict[str, float]


def bench(config: PretrainConfig, steps: int = 20) -> dict[str, Any]:
    """Train `steps` steps as configured, on its own text, and measure them; nothing is kept.

    Returns medians over the steps: tokens and seconds by part; the share of the peak that the model's matrix products
    reach (padding and unused prediction slots count as work); and peak memory in bytes.
    """
    runtime = initialize_runtime(config.train.precision, config.train.compile)
    prepared = prepare(config)
    laps = rehearse(config, prepared, runtime, WARM_UP + steps)
    memory = peak_memory(runtime.device)
    pairs = list(pairwise(laps[WARM_UP - 1 :]))
    step = median(now.at - before.at for before, now in pairs)
    T = config.data.sequence_length
    shape, rows = architecture(config, prepared.tokenizer), config.train.global_batch_size // runtime.world_size
    flops = matmul_flops(shape, rows, T, max_predictions(T, config.masking))
    peak = matmul_peak(runtime.device, runtime.dtype)
    return {
        "tokens_per_second": median((b.tokens - a.tokens) / (b.at - a.at) for a, b in pairs),
        "step_seconds": step,
        **{f"{part}_seconds": median(b.seconds[part] - a.seconds[part] for a, b in pairs) for part in PARTS},
        "flops_per_second": flops / step,
        "peak_flops_per_second": peak,
        "share_of_peak": flops / step / peak,
        "peak_memory_bytes": memory,
        "device": str(runtime.environment()["device"]),
        "precision": str(runtime.environment()["precision"]),
    }


def rehearse(config: PretrainConfig, prepared: Prepared, runtime: Runtime, steps: int) -> list[Lap]:
    """Train as configured for some steps, without evaluation or saving, and see when each of them ends."""
    changes = {"max_steps": steps, "logging_steps": 1, "save_steps": steps, "save_minutes": None}
    config = config.model_copy(update={"train": config.train.model_copy(update=changes)})
    laps: list[Lap] = []
    with TemporaryDirectory() as folder:
        training = new_training(config, prepared, Path(folder), runtime)
        training.evaluate, training.saves = None, False
        training.synchronize = runtime.device.type == "cuda"
        training.watch = lambda *_: laps.append(Lap(perf_counter(), training.progress.tokens, dict(training.seconds)))
        training.run()
    return laps


def described(result: dict[str, Any]) -> str:
    """What `bench` returns, as lines for people."""
    step = result["step_seconds"]
    parts = {part: result[f"{part}_seconds"] for part in PARTS}
    return "\n".join(
        [
            f"{result['tokens_per_second']:,.0f} tokens/s on {result['device']} in {result['precision']}",
            *(f"  {part:10} {seconds * 1e3:9.1f} ms  {seconds / step:6.1%}" for part, seconds in parts.items()),
            f"  {'a step':10} {step * 1e3:9.1f} ms",
            f"matrix products at {result['flops_per_second'] / 1e9:,.0f} GFLOP/s, {result['share_of_peak']:.0%} of the "
            f"{result['peak_flops_per_second'] / 1e9:,.0f} measured at best here",
            f"peak memory {result['peak_memory_bytes'] / 2**20:,.0f} MiB",
        ]
    )


def matmul_flops(config: Architecture, rows: int, positions: int, slots: int) -> int:
    """Floating point operations of the matrix products of one step, forward and backward, for one rank.

    A multiply and an add are two; the backward pass takes twice what the forward pass does (Kaplan et al. 2020, 2.1).
    The last layer attends to all positions from the slots alone.
    """
    D, inner = config.hidden_size, config.intermediate_size
    key_and_value = positions * 4 * D * D
    for_each_query = 4 * D * D + 4 * D * inner + 4 * positions * D  # its projections, feed-forward and attention
    queries = (config.num_hidden_layers - 1) * positions + slots
    head = slots * 2 * (D * D + D * config.vocab_size)
    return 3 * rows * (config.num_hidden_layers * key_and_value + queries * for_each_query + head)


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations a second of the machine's fastest matrix product, measured now."""
    best = 0.0
    for rows, inner, columns in PEAK_SHAPES:
        if device.type == "cuda":
            rows, inner, columns = 4 * rows, 4 * inner, 4 * columns
        a, b = torch.randn(rows, inner, device=device).to(dtype), torch.randn(inner, columns, device=device).to(dtype)
        times = []
        for _ in range(8):
            began = perf_counter()
            a @ b
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(perf_counter() - began)
        best = max(best, 2 * rows * inner * columns / min(times))
    return best


def peak_memory(device: torch.device) -> int:
    """The most memory that this process has held so far, in bytes: the GPU's, or all of its own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
