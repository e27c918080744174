"""`bertlite plan`: what a pretraining will take, before anything is spent."""

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from bertlite.config.budget import budget_seconds
from bertlite.config.loading import with_changes
from bertlite.config.settings import PretrainConfig, Source
from bertlite.core.logging import logger
from bertlite.core.runtime import Runtime, available_memory, initialize_runtime
from bertlite.data.corpus import Corpus
from bertlite.data.masking import max_predictions
from bertlite.data.packing import Packing
from bertlite.data.sources import find_source_files, read_documents
from bertlite.model.attention import best_kernel
from bertlite.model.heads import MaskedLanguageModel
from bertlite.model.initialization import parameter_count
from bertlite.pretraining.bench import flops_of_step, peak_memory, rehearse
from bertlite.pretraining.prepare import Prepared, prepare, resolve_steps
from bertlite.pretraining.starting_model import resolve_architecture
from bertlite.training.memory import bytes_per_sequence, choose_micro_batch_size
from bertlite.training.trainer import PHASES

SAMPLE_CHARACTERS = 2_000_000  # of each source
MEASURED_STEPS = 4  # the first of them warms up, and is not counted
MEASURED_OPERATIONS = 3e11  # of a measured step on a CPU: some seconds


@dataclass
class Sample:
    """A configuration whose sources are replaced by files with their first documents.

    A share says how much of a source its file holds; it is None where nobody knows how large the source is.
    """

    config: PretrainConfig
    train_shares: list[float | None]
    validation_shares: list[float | None]


def plan(
    config: PretrainConfig, measure: bool = True, report: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Estimate parameters, tokens, epochs, memory and disk (bytes), time (seconds), and warn of what does not fit.

    Only the start of the text is read and, with `measure`, a few micro-batches are trained; all of it in a temporary
    folder. `report` is called with what is known before that. What cannot be known is None. For example, of a run of
    1,000 steps of 32 sequences, when the first fifth of the text fills 200 sequences: 32,000 sequences are trained on,
    the text has about 1,000, and so `epochs` is 32.

    Raises UserError for a wrong configuration.
    """
    runtime = initialize_runtime(config.train.precision, config.train.compile)
    with TemporaryDirectory() as folder:
        logger.info("sampling the start of each source, in a temporary folder")
        sample = _sample_sources(config, Path(folder))
        prepared = prepare(sample.config)
        train_sequences, validation_sequences = _count_sequences(sample, prepared)
        config, known = resolve_steps(config, prepared), _estimate_size(config, prepared, runtime)
        fits = measure and known["memory"] <= known["memory_free"]
        seconds = budget_seconds(config.train.budget)

        def measure_time() -> tuple[float, float]:
            return _measure_time(sample.config, prepared, runtime, known["micro_batch_size"], validation_sequences or 0)

        times = measure_time() if fits and seconds else None
        if times:
            config = _fill_budget(config, seconds, *times)
        result = known | _estimate_run(config, prepared, train_sequences)
        result["warnings"] = _warnings(config, result)
        if seconds and not times:
            result["warnings"].append(f"not measured: {config.train.max_steps:,} steps need not fit the budget")
        if report:
            report(result)
        if fits:
            step, evaluation = times or measure_time()
            evaluations = math.ceil(config.train.max_steps / config.train.eval_steps)
            total = step * config.train.max_steps + evaluation * evaluations
            result |= {"seconds_per_step": step, "seconds": seconds or total}
    return result


def _fill_budget(config: PretrainConfig, seconds: float, step: float, evaluation: float) -> PretrainConfig:
    """Return the configuration with as many steps as fit into a time, with their evaluations."""
    steps = max(1, int((seconds - evaluation) / (step + evaluation / config.train.eval_steps)))
    return with_changes(config, {"train.max_steps": steps}, "train.budget")


def _estimate_run(config: PretrainConfig, prepared: Prepared, train_sequences: float | None) -> dict[str, Any]:
    """Estimate what follows from the number of steps and the length of the text."""
    trained_sequences = config.train.max_steps * config.train.global_batch_size
    tokens_per_sequence = prepared.packing.tokens() / len(prepared.packing)
    return {
        "steps": config.train.max_steps,
        "text_tokens": round(train_sequences * tokens_per_sequence) if train_sequences else None,
        "tokens": round(trained_sequences * tokens_per_sequence),
        "epochs": trained_sequences / train_sequences if train_sequences else None,
        "floating_point_operations": float(flops_of_step(config, prepared, trained_sequences)),
        "disk_free": shutil.disk_usage(_existing_folder(config)).free,
        "seconds_per_step": None,
        "seconds": None,
    }


def format_size(result: dict[str, Any]) -> str:
    """Format what `plan` knows without measuring."""
    text, epochs = "an unknown number of tokens", "an unknown number of"
    if result["epochs"] is not None:
        text = f"about {result['text_tokens']:,} tokens"
        epochs = f"about {result['epochs']:,.{0 if result['epochs'] >= 10 else 1}f}"
    lines = {
        "parameters": f"{result['parameters']:,}",
        "text": f"{text} in data.train, estimated from its start",
        "training": f"{result['tokens']:,} tokens in {result['steps']:,} steps: {epochs} epochs of the text",
        "operations": f"{result['floating_point_operations']:.2g}",
        "memory": f"{format_bytes(result['memory'])} with micro-batches of {result['micro_batch_size']} sequences; "
        f"{format_bytes(result['memory_free'])} are free",
        "disk": f"{format_bytes(result['disk'])} for checkpoints; {format_bytes(result['disk_free'])} are free",
    }
    warnings = [f"warning: {text}" for text in result["warnings"]]
    return "\n".join([*(f"{name:11} {text}" for name, text in lines.items()), *warnings])


def format_bytes(number: int) -> str:
    """Format a number of bytes in GB, or in MB where it is small."""
    return f"{number / 1e9:,.1f} GB" if number >= 1e8 else f"{number / 1e6:,.1f} MB"


def format_time(result: dict[str, Any]) -> str:
    """Format what `plan` has measured."""
    if result["seconds"] is None:
        return f"{'time':11} not measured"
    duration = timedelta(seconds=round(result["seconds"]))
    return f"{'time':11} about {duration}, {result['seconds_per_step']:.3g} s a step, as measured here"


def _estimate_size(config: PretrainConfig, prepared: Prepared, runtime: Runtime) -> dict[str, Any]:
    """Estimate what follows from the shape of the model."""
    settings, T = config.train, config.data.sequence_length
    with torch.device("meta"):
        architecture = resolve_architecture(config.model, prepared.starting_model, prepared.tokenizer)
        model = MaskedLanguageModel(architecture, best_kernel(runtime.device))
    num_predictions = max_predictions(T, config.masking)
    micro_batch_size = choose_micro_batch_size(settings, model, T, num_predictions, runtime)
    activations = micro_batch_size * bytes_per_sequence(settings, architecture, T, num_predictions)
    weights = gradients = 4 * parameter_count(model)
    moments = 2 * weights  # AdamW has two, Muon one
    num_checkpoints = min(settings.save_total_limit, math.ceil(settings.max_steps / settings.save_steps))
    num_checkpoints += 1  # the new one is written before the oldest is removed
    return {
        "parameters": parameter_count(model),
        "micro_batch_size": micro_batch_size,
        "memory": peak_memory(runtime.device) + weights + gradients + moments + activations,
        "memory_free": available_memory(runtime),
        "disk": num_checkpoints * (weights + moments) + weights,
    }


def _measure_time(
    config: PretrainConfig,
    prepared: Prepared,
    runtime: Runtime,
    micro_batch_size: int,
    validation_sequences: float,
) -> tuple[float, float]:
    """Train a few micro-batches, and estimate the seconds of a step and of an evaluation.

    On a CPU the micro-batches are small and the model is not compiled, which would take longer than all the rest.
    """
    settings = config.train
    share = settings.global_batch_size / runtime.world_size
    slower = ""
    if runtime.device.type == "cpu":
        micro_batch_size = max(1, min(micro_batch_size, int(MEASURED_OPERATIONS / flops_of_step(config, prepared, 1))))
        if runtime.compile:
            slower = ", without compiling the model, which makes it faster"
        runtime = replace(runtime, compile=False)
    logger.info(f"measuring {MEASURED_STEPS} steps of {micro_batch_size} sequences{slower}")
    changes = {
        "global_batch_size": micro_batch_size * runtime.world_size,
        "per_device_train_batch_size": micro_batch_size,
    }
    measured = config.model_copy(update={"train": settings.model_copy(update=changes)})
    laps = rehearse(measured, prepared, runtime, MEASURED_STEPS)
    phases = {phase: np.median(np.diff([lap.seconds[phase] for lap in laps])) for phase in PHASES}
    micro_batches = share / micro_batch_size
    step_seconds = (phases["data"] + phases["forward"] + phases["backward"]) * micro_batches + phases["optimizer"]
    evaluation_seconds = phases["forward"] * validation_sequences / (micro_batch_size * runtime.world_size)
    return float(step_seconds), float(evaluation_seconds)


def _warnings(config: PretrainConfig, result: dict[str, Any]) -> list[str]:
    warnings = []
    if result["memory"] > result["memory_free"]:
        warnings.append(
            "this does not fit into memory: lower train.per_device_train_batch_size, set train.gradient_checkpointing "
            "to true, or use a smaller model"
        )
    if result["disk"] > result["disk_free"]:
        warnings.append(
            f"the checkpoints do not fit on the disk of {_existing_folder(config)}: lower train.save_total_limit, or "
            "choose another --out"
        )
    return warnings


def _existing_folder(config: PretrainConfig) -> Path:
    """Return the run folder, or the nearest folder above it that exists."""
    folder = Path(config.output_dir)
    return next(path for path in (folder, *folder.parents) if path.exists())


def _sample_sources(config: PretrainConfig, folder: Path) -> Sample:
    data, tokenizer = config.data, config.tokenizer
    train, train_shares = _sample(data.train, data.document, "data.train", folder)
    validation, validation_shares = _sample(data.validation, data.document, "data.validation", folder)
    changes = {"train": train, "validation": validation, "cache_dir": str(folder / "cache")}
    if tokenizer.path is None and config.model.init_from is None:
        # A sample yields fewer tokens than the whole text; pad the vocabulary to the size that the text will yield.
        multiple = tokenizer.pad_to_multiple_of or 1
        size = math.ceil(tokenizer.vocab_size / multiple) * multiple
        tokenizer = tokenizer.model_copy(update={"pad_to_multiple_of": size})
    sampled = config.model_copy(update={"data": data.model_copy(update=changes), "tokenizer": tokenizer})
    return Sample(sampled, train_shares, validation_shares)


def _sample(
    sources: Sequence[Source], document: str, setting: str, folder: Path
) -> tuple[list[Source], list[float | None]]:
    """Write the first documents of each source to a file. Returns the files, and the share of the source in each."""
    samples, shares = [], []
    for number, source in enumerate(sources):
        path = folder / f"{setting}-{number}.txt"
        shares.append(_write_sample(path, source, document, setting))
        samples.append(Source(path=str(path), weight=source.weight))
    return samples, shares


def _write_sample(path: Path, source: Source, document: str, setting: str) -> float | None:
    """Write the first documents of a source. Returns the share of its bytes that were read, or None if unknown."""
    characters = 0
    bytes_read = [0]
    with path.open("w", encoding="utf-8") as file:
        for text in read_documents(source, document, setting, bytes_read.append):
            if characters > SAMPLE_CHARACTERS:
                size = sum(part.stat().st_size for part in find_source_files(source, setting))
                return sum(bytes_read) / max(1, size) or None
            file.write(text + "\n\n")
            characters += len(text)
    return 1.0


def _count_sequences(sample: Sample, prepared: Prepared) -> tuple[float | None, float | None]:
    """Estimate how many sequences an epoch of training and an evaluation have."""
    data = sample.config.data
    weights = [source.weight for source in data.train]
    epoch = _scale_up(prepared.corpus, prepared.packing, sample.train_shares, weights)
    if data.validation:
        corpus, packing = prepared.validation_corpus, prepared.validation_packing
        return epoch, _scale_up(corpus, packing, sample.validation_shares, [1.0] * len(data.validation))
    unweighted = _scale_up(prepared.corpus, prepared.packing, sample.train_shares, [1.0] * len(weights))
    if epoch is None or unweighted is None:
        return None, None
    return epoch * (1 - data.validation_split), unweighted * data.validation_split


def _scale_up(
    corpus: Corpus, packing: Packing, shares: Sequence[float | None], weights: Sequence[float]
) -> float | None:
    """Estimate how many sequences the whole sources fill, from the tokens of their samples."""
    if None in shares:
        return None
    documents = corpus.summary.source_documents
    documents = [*documents, *[0] * (len(shares) - len(documents))]  # the last sources may have kept none
    ends = np.cumsum([0, *documents])
    tokens = np.diff(corpus.starts[ends]) / np.array(shares)
    tokens_per_sequence = int(packing.span_lengths.sum()) / len(packing)
    return float(np.dot(tokens, weights)) / tokens_per_sequence
