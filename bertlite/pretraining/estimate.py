"""`bertlite plan`: what a pretraining will take, before anything is spent."""

import math
import shutil
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from bertlite.config.settings import PretrainConfig, Source
from bertlite.core.logging import logger
from bertlite.core.runtime import available_memory, initialize_runtime
from bertlite.data.corpus import Corpus
from bertlite.data.masking import max_predictions
from bertlite.data.packing import Packing
from bertlite.data.sources import find_source_files, read_documents
from bertlite.model.attention import best_kernel
from bertlite.model.heads import MaskedLanguageModel
from bertlite.model.initialization import parameter_count
from bertlite.pretraining.bench import matmul_flops, peak_memory, rehearse
from bertlite.pretraining.pretrain import architecture, prepare
from bertlite.training.memory import bytes_of_a_row, rows_at_a_time

SAMPLE_CHARACTERS = 2_000_000  # of each source
MEASURED_STEPS = 6  # the first of which compiles, and is not counted


def plan(config: PretrainConfig, measure: bool = True) -> dict[str, Any]:
    """Parameters, tokens, epochs, memory and disk (bytes), time (seconds), and warnings of what will not fit.

    The text is sampled, and with `measure` a few steps are run, all in a temporary folder; what cannot be told so is
    None. Raises UserError for what is wrong with the configuration.
    """
    settings, T = config.train, config.data.sequence_length
    runtime = initialize_runtime(settings.precision, settings.compile)
    with TemporaryDirectory() as name:
        logger.info("from the beginning of each source, in a temporary folder:")
        sampled, parts, validation_parts = _sampled(config, Path(name))
        prepared = prepare(sampled)
        with torch.device("meta"):
            model = MaskedLanguageModel(architecture(sampled, prepared.tokenizer), best_kernel(runtime.device))
        parameters, slots = parameter_count(model), max_predictions(T, config.masking)
        rows = rows_at_a_time(settings, model, T, slots, runtime)
        tokens_of_a_row = prepared.plan.tokens() / len(prepared.plan)
        epoch = _rows(prepared.corpus, prepared.plan, parts, [source.weight for source in config.data.train])
        if config.data.validation:
            held_out = _rows(prepared.validation_corpus, prepared.validation_plan, validation_parts)
        else:
            split, every = config.data.validation_split, _rows(prepared.corpus, prepared.plan, parts)
            epoch, held_out = (epoch and epoch * (1 - split)), (every and every * split)
        trained = settings.max_steps * settings.global_batch_size  # rows
        weights, moments = 4 * parameters, 8 * parameters  # AdamW has two moments, Muon one
        kept = min(settings.save_total_limit, math.ceil(settings.max_steps / settings.save_steps))
        place = next(path for path in [Path(config.output_dir), *Path(config.output_dir).parents] if path.exists())
        result: dict[str, Any] = {
            "parameters": parameters,
            "tokens": round(trained * tokens_of_a_row),
            "epochs": trained / epoch if epoch else None,
            "floating_point_operations": float(trained * matmul_flops(model.config, 1, T, slots)),
            "rows_at_a_time": rows,
            "memory": peak_memory(runtime.device)
            + 2 * weights
            + moments
            + rows * bytes_of_a_row(settings, model.config, T, slots),
            "memory_free": available_memory(runtime),
            "disk": (kept + 1) * (weights + moments) + weights,
            "disk_free": shutil.disk_usage(place).free,
            "seconds_per_step": None,
            "seconds": None,
        }
        fits = result["memory"] <= result["memory_free"]
        if measure and fits:
            laps = rehearse(sampled, prepared, runtime, MEASURED_STEPS)
            step, forward = np.median(np.diff([(lap.at, lap.seconds["forward"]) for lap in laps], axis=0), axis=0)
            evaluated = math.ceil(settings.max_steps / settings.eval_steps) * (held_out or 0)  # rows
            result["seconds_per_step"] = float(step)
            result["seconds"] = float(step * settings.max_steps + forward * evaluated / settings.global_batch_size)
    result["warnings"] = []
    if not fits:
        result["warnings"].append(
            "this does not fit into memory: lower train.per_device_train_batch_size, set train.gradient_checkpointing "
            "to true, or take a smaller model"
        )
    if result["disk"] > result["disk_free"]:
        result["warnings"].append(
            f"the checkpoints do not fit on the disk of {place}: lower train.save_total_limit, or choose another --out"
        )
    return result


def described(result: dict[str, Any]) -> str:
    """What `plan` returns, as lines for people."""
    epochs = "an unknown number of"
    if result["epochs"] is not None:
        epochs = f"about {result['epochs']:,.{0 if result['epochs'] >= 10 else 1}f}"
    duration = "not measured"
    if result["seconds"] is not None:
        hours = timedelta(seconds=round(result["seconds"]))
        duration = f"about {hours}, {result['seconds_per_step']:.3g} s a step, as measured here"
    lines = {
        "parameters": f"{result['parameters']:,}",
        "tokens": f"{result['tokens']:,} to train on, {epochs} epochs",
        "operations": f"{result['floating_point_operations']:.2g}",
        "memory": f"{result['memory'] / 1e9:,.1f} GB at {result['rows_at_a_time']} rows at a time; "
        f"{result['memory_free'] / 1e9:,.1f} GB are free",
        "disk": f"{result['disk'] / 1e9:,.1f} GB for checkpoints; {result['disk_free'] / 1e9:,.1f} GB are free",
        "time": duration,
    }
    warnings = [f"warning: {text}" for text in result["warnings"]]
    return "\n".join([*(f"{name:11} {text}" for name, text in lines.items()), *warnings])


def _sampled(config: PretrainConfig, folder: Path) -> tuple[PretrainConfig, list[float | None], list[float | None]]:
    """The configuration with the beginning of each source in its place, and which part of the sources that is."""
    data, tokenizer = config.data, config.tokenizer
    train, parts = _sample(data.train, data.document, "data.train", folder)
    validation, validation_parts = _sample(data.validation, data.document, "data.validation", folder)
    changes = {"train": train, "validation": validation, "cache_dir": str(folder / "cache")}
    if tokenizer.path is None and config.model.init_from is None:  # as large a vocabulary as all of the text gives
        multiple = tokenizer.pad_to_multiple_of or 1
        size = math.ceil(tokenizer.vocab_size / multiple) * multiple
        tokenizer = tokenizer.model_copy(update={"pad_to_multiple_of": size})
    sampled = config.model_copy(update={"data": data.model_copy(update=changes), "tokenizer": tokenizer})
    return sampled, parts, validation_parts


def _sample(
    sources: Sequence[Source], document: str, setting: str, folder: Path
) -> tuple[list[Source], list[float | None]]:
    """A file with the beginning of each source, and which part of its text that is; None where it cannot be told."""
    samples, parts = [], []
    for number, source in enumerate(sources):
        path, characters, done, part = folder / f"{setting}-{number}.txt", 0, [0], 1.0
        with path.open("w", encoding="utf-8") as file:
            for text in read_documents(source, document, setting, done.append):
                if characters > SAMPLE_CHARACTERS:
                    part = sum(done) / max(1, sum(path.stat().st_size for path in find_source_files(source, setting)))
                    break
                file.write(text + "\n\n")
                characters += len(text)
        samples.append(Source(path=str(path), weight=source.weight))
        parts.append(part or None)
    return samples, parts


def _rows(
    corpus: Corpus, plan: Packing, parts: Sequence[float | None], weights: Sequence[float] | None = None
) -> float | None:
    """The rows that all of the text fills, from those that a part of each source fills."""
    if None in parts:
        return None
    documents = corpus.summary.source_documents
    ends = np.cumsum([0, *documents, *[0] * (len(parts) - len(documents))])  # the last sources may have kept none
    tokens = np.diff(corpus.starts[ends]) / np.array(parts)
    return float(np.dot(tokens, weights or np.ones(len(parts)))) * len(plan) / int(plan.span_lengths.sum())
