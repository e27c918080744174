"""One task with its seeds: prepare, train, measure."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bertlite.config.finetune_settings import FinetuneConfig, FinetuneTrainSettings, TaskSettings
from bertlite.config.settings import Architecture, OptimizationSettings, TrainSettings
from bertlite.core.distributed import barrier
from bertlite.core.errors import Failure, UserError
from bertlite.core.files import fingerprint, write_json, write_text
from bertlite.core.logging import logger
from bertlite.core.random import choose_validation
from bertlite.core.runtime import Runtime
from bertlite.data.formats import Record
from bertlite.data.tables import read_records
from bertlite.finetuning.examples import ExampleBatches, Examples, TaskBatch
from bertlite.finetuning.losses import compute_scores, label_loss, summed
from bertlite.finetuning.metrics import CLASSIFICATION
from bertlite.finetuning.tasks import TASKS, Task
from bertlite.model.attention import best_kernel
from bertlite.model.heads import Classifier
from bertlite.model.huggingface import load_model, load_tokenizer_of, load_weights_for, read_architecture
from bertlite.model.initialization import initialize, parameter_count
from bertlite.training.callbacks import Checkpoints, Evaluation, TrainingLog, loggers
from bertlite.training.checkpoint import (
    TrainingState,
    checkpoint_folder,
    load_training_state,
    newest_checkpoint,
    problem,
    restore_optimizer,
    save_final_model,
)
from bertlite.training.memory import choose_micro_batch_size
from bertlite.training.optim import Optimizer
from bertlite.training.trainer import Trainer, evaluate

POSITIONS_AT_A_TIME = 4096  # in evaluation and prediction
FEW = 10  # labels that are named in a line


@dataclass
class Part:
    """One table of a task: its rows, and its examples in batches."""

    rows: list[Record]
    examples: Examples
    batches: ExampleBatches


@dataclass
class FineTuning:
    """What the seeds of a run share."""

    config: FinetuneConfig
    settings: TaskSettings
    task: Task
    architecture: Architecture
    begin: dict[str, Tensor]  # what the model to begin from has for this one
    tokenizer: PreTrainedTokenizerBase
    labels: list[str]
    class_weights: Tensor | None
    parts: dict[str, Part]
    runtime: Runtime
    compute: Callable[..., Tensor]  # compute_scores, compiled where that is wanted

    @cached_property
    def digest(self) -> str:
        """What stands for all examples of the run: the same digest, the same examples."""
        parts = [part.examples for part in self.parts.values()]
        return fingerprint([[part.ids, [np.asarray(target).tolist() for target in part.targets]] for part in parts])

    @property
    def metric(self) -> str:
        return self.settings.metric or next(iter(self.task.metrics))

    @property
    def measured_on(self) -> str:
        return "test" if "test" in self.parts else "validation"


def compute_outputs(
    model: Classifier,
    batches: ExampleBatches,
    runtime: Runtime,
    compute: Callable[..., Tensor],
    loss: Callable[..., Any],
) -> tuple[list[Any], list[float], float]:
    """Each example's scores and its mean loss, in order, and the mean loss of all."""
    outputs: dict[int, Any] = {}
    losses: dict[int, float] = {}
    rows: list[Any] = []

    def make_batch(first: int, count: int) -> TaskBatch:
        rows[:] = [batches.members(0, row) for row in range(first, first + count)]
        return batches.batch(rows)

    def collect(model: Any, batch: Any) -> dict[str, Tensor]:
        scores = compute(model, batch)
        each, real = loss(scores, batch)
        outputs.update(batches.apart(scores, rows))
        for member, one in batches.apart(torch.stack([torch.where(real, each, 0), real], -1), rows).items():
            total, count = one.reshape(-1, 2).sum(0)
            losses[member] = float(total / max(1, count))
        total, count = summed(each, real)
        return {"loss": total, "count": count}

    alone = replace(runtime, rank=0, world_size=1)  # each rank computes all: it decides what is best by it
    at_a_time = max(1, min(batches.rows, POSITIONS_AT_A_TIME // batches.length))
    means = evaluate(model, collect, make_batch, batches.rows, at_a_time, alone)
    numbers = range(len(outputs))
    return [outputs[number] for number in numbers], [losses[number] for number in numbers], means["loss"]


def _prepare(config: FinetuneConfig, settings: TaskSettings, source: Path, runtime: Runtime) -> FineTuning:
    """Read, check and tokenise everything."""
    task = TASKS[settings.type]
    architecture = read_architecture(source).model_copy(update=config.model.model_dump(exclude={"init_from"}))
    tokenizer = load_tokenizer_of(source, architecture)
    if settings.max_length > architecture.max_position_embeddings:
        raise UserError(
            f"task.max_length is {settings.max_length}, more than the {architecture.max_position_embeddings} "
            f"positions of {config.model.init_from}"
        )
    if config.train.frozen_layers > architecture.num_hidden_layers:
        raise UserError(
            f"train.frozen_layers is {config.train.frozen_layers}; the model has {architecture.num_hidden_layers}"
        )
    trained_length, tokenizer.model_max_length = tokenizer.model_max_length, settings.max_length
    rows = {"train": read_records(settings.train, settings, "task.train")}
    labels = task.labels(rows["train"], settings)
    for name, place in {"validation": settings.validation, "test": settings.test}.items():
        if place is not None:
            rows[name] = read_records(place, settings, f"task.{name}")
    if settings.validation is None:
        if len(rows["train"]) < 2:
            raise UserError("task.train holds one row, so none can be held out; name a file in task.validation")
        apart = choose_validation(len(rows["train"]), settings.validation_split)
        rows["validation"] = [row for row, out in zip(rows["train"], apart, strict=True) if out]
        rows["train"] = [row for row, out in zip(rows["train"], apart, strict=True) if not out]
    parts: dict[str, Part] = {}
    for name, these in rows.items():
        examples = task.examples(these, labels, tokenizer, settings)
        length = parts["train"].batches.length if parts else 0
        batches = ExampleBatches(examples, task.head, tokenizer.pad_token_id, length=length)
        parts[name] = Part(these, examples, batches)
        if max(map(max, examples.types)) >= architecture.type_vocab_size:
            raise UserError(f"task.text: {config.model.init_from} tells no two texts apart (type_vocab_size is 1)")
        cut = f"; {examples.cut:,} are cut to task.max_length {settings.max_length}" if examples.cut else ""
        logger.info(f"{name}: {len(these):,} rows, {batches.padding:.1%} of the positions are padding{cut}")
        if task.metrics is CLASSIFICATION:
            absent = [label for number, label in enumerate(labels) if number not in examples.targets]
            if absent:
                few = ", ".join(absent[:FEW]) + (", …" if len(absent) > FEW else "")
                logger.info(
                    f"{name}: no row is labelled {few}, so that is not {'learnt' if name == 'train' else 'measured'}"
                )
    longest = max(int(part.batches.lengths.max()) for part in parts.values())
    if longest > trained_length:
        logger.info(
            f"examples are up to {longest} tokens long, but {config.model.init_from} was trained on {trained_length}: "
            "it learns the later positions from this task alone; a lower task.max_length cuts them off"
        )
    weights = _class_weights(settings, labels, parts["train"].examples)
    begin = load_weights_for(task.head, labels, source)
    torch.compiler.reset()  # each task of a suite has its own shapes, and torch compiles few for one function
    compute = torch.compile(compute_scores, dynamic=False) if runtime.compile else compute_scores
    return FineTuning(config, settings, task, architecture, begin, tokenizer, labels, weights, parts, runtime, compute)


def steps_of(train: FinetuneTrainSettings, batches: ExampleBatches, seed: int) -> TrainSettings:
    """The settings of the training loop. A step takes the rows that hold about `global_batch_size` examples."""
    examples = len(batches.lengths)
    rows = max(1, round(train.global_batch_size * batches.rows / examples))
    epoch = max(1, round(batches.rows / rows))
    steps = train.max_steps or max(1, round(train.num_train_epochs * batches.rows / rows))
    every = train.eval_steps or epoch
    shared = {name: getattr(train, name) for name in OptimizationSettings.model_fields} | {"global_batch_size": rows}
    return TrainSettings(
        **shared, max_steps=steps, seed=seed, logging_steps=train.logging_steps, eval_steps=every, save_steps=every,
        save_total_limit=1,
    )  # fmt: skip


def first_model(work: FineTuning, kernel: str, seed: int) -> Classifier:
    """A new head, by `seed`, on the encoder of the model to begin from."""
    model = work.task.head(work.architecture, work.labels, kernel, work.task.problem_type)
    initialize(model, work.architecture.initializer_range, seed)
    model.load_state_dict(model.state_dict() | work.begin)
    return model


def learning_rate_scale(decay: float, layers: int) -> Callable[[str], float]:
    """By which factor the rate of a parameter is lower: `decay` once for each layer between it and the head."""

    def scale(name: str) -> float:
        if name.startswith("encoder.embeddings."):
            return decay ** (layers + 1)
        return decay ** (layers - int(name.split(".")[2])) if name.startswith("encoder.layers.") else 1.0

    return scale


def _run_seed(work: FineTuning, seed: int, resume: bool) -> dict[str, Any]:
    """Train with one seed, and measure its best checkpoint; what is done already is read."""
    folder = Path(work.config.output_dir) / f"seed-{seed}"
    runtime = work.runtime
    if (folder / "results.json").exists():
        if runtime.rank == 0:  # left by a process that was killed after it had written the results
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return json.loads((folder / "results.json").read_text(encoding="utf-8"))
    folder.mkdir(exist_ok=True)
    trainer = _new_trainer(work, folder, seed, resume)
    trainer.train()
    barrier()
    progress = trainer.progress
    place = checkpoint_folder(folder, progress.best_step)
    if damage := problem(place):
        raise Failure(f"{place}: the best checkpoint cannot be read: {damage}; start another run with --out")
    best: Any = load_model(place, best_kernel(runtime.device))
    barrier()
    best.to(runtime.device)
    scores, predictions, losses = _measure(work, best, work.measured_on)
    results = {**scores, **{f"validation_{name}": value for name, value in progress.best_scores.items()}}
    results["best_step"] = progress.best_step
    if runtime.rank == 0:
        _write_findings(work, folder, predictions, losses)
        if not (folder / "model").exists():  # left by a process that was killed before the results
            save_final_model(folder, best, work.tokenizer)
        write_json(folder / "results.json", results)
        shutil.rmtree(folder / "checkpoints")
    barrier()
    return results


def _new_trainer(work: FineTuning, folder: Path, seed: int, resume: bool) -> Trainer:
    """Build the trainer of one seed, which starts at step 0 or resumes from the newest valid checkpoint."""
    runtime, train, kernel = work.runtime, work.config.train, best_kernel(work.runtime.device)
    examples = work.parts["train"].batches
    batches = ExampleBatches(examples.examples, work.task.head, examples.pad_id, seed, examples.length)
    settings = steps_of(train, batches, seed)
    checkpoint = newest_checkpoint(folder) if resume else None
    model: Any = load_model(checkpoint, kernel) if checkpoint else first_model(work, kernel, seed)
    model.encoder.gradient_checkpointing = train.gradient_checkpointing
    if train.frozen_layers:
        model.encoder.embeddings.requires_grad_(False)
        model.encoder.layers[: train.frozen_layers].requires_grad_(False)
    model.to(runtime.device)
    facts = {"text": work.digest, **runtime.environment()}
    logger.info(
        f"seed {seed}: {parameter_count(model):,} parameters on {facts['device']}, {facts['precision']}; "
        f"{settings.max_steps:,} steps of {settings.global_batch_size} rows of {batches.length}, "
        f"{len(batches.lengths) * settings.global_batch_size / batches.rows:.1f} examples on average"
    )
    loss = work.task.loss
    if loss is label_loss:
        weights = None if work.class_weights is None else work.class_weights.to(runtime.device)
        loss = partial(loss, weights=weights, smoothing=train.label_smoothing_factor)
    scale = learning_rate_scale(train.layerwise_lr_decay, len(model.encoder.layers))
    optimizer = Optimizer(model, settings, scale)
    state = load_training_state(checkpoint) if checkpoint else TrainingState()
    micro_batch_size = choose_micro_batch_size(settings, model, batches.length, 0, runtime, state.micro_batch_size)
    if checkpoint is not None:
        restore_optimizer(checkpoint, state, optimizer, facts | {"micro_batch_size": micro_batch_size})
    return Trainer(
        model=model,
        optimizer=optimizer,
        loss=lambda model, batch: summed(*loss(work.compute(model, batch), batch)),
        make_batch=batches.training,
        settings=settings,
        runtime=runtime,
        micro_batch_size=micro_batch_size,
        progress=state.progress,
        callbacks=[
            *loggers(folder, runtime),
            TrainingLog(),
            Evaluation(
                lambda trainer: _measure(work, model, "validation")[0], work.metric, train.early_stopping_patience
            ),
            Checkpoints(folder, work.tokenizer, facts),
        ],
    )


def _class_weights(settings: TaskSettings, labels: list[str], examples: Examples) -> Tensor | None:
    """A weight for each label: as set, 1 where nothing is said, or so that each label counts the same."""
    wanted = settings.class_weights
    if wanted is None:
        return None
    if isinstance(wanted, dict):
        if unknown := set(wanted) - set(labels):
            raise UserError(f"task.class_weights: {min(unknown)!r} is no label; they are {', '.join(labels)}")
        return torch.tensor([wanted.get(label, 1.0) for label in labels])
    targets = np.concatenate([np.ravel(target) for target in examples.targets])
    counts = np.bincount(targets[targets >= 0], minlength=len(labels))
    return torch.tensor(counts.sum() / (len(labels) * np.maximum(counts, 1)), dtype=torch.float32)


def _measure(work: FineTuning, model: Classifier, name: str) -> tuple[dict[str, float], list[Any], list[float]]:
    """All metrics and the mean loss (unweighted) on a part; the predictions; the loss of each example."""
    part, task = work.parts[name], work.task
    outputs, losses, loss = compute_outputs(model, part.batches, work.runtime, work.compute, task.loss)
    predictions = task.decode(outputs, part.examples, part.rows, work.labels, work.settings)
    references = task.references(part.rows, part.examples, work.settings)
    scores = {metric: float(measure(references, predictions)) for metric, measure in task.metrics.items()}
    return {**scores, "loss": loss}, predictions, losses


WORST = 100  # examples of the largest loss that are written down


def _write_findings(work: FineTuning, folder: Path, predictions: list[Any], losses: list[float]) -> None:
    """Write the examples of the largest loss and, for labels, the confusion matrix."""
    part, task = work.parts[work.measured_on], work.task
    sums = np.bincount(part.examples.owners, losses, len(part.rows))
    lines = []
    for number in np.argsort(-sums, kind="stable")[:WORST].tolist():
        predicted = predictions[number]
        if task.metrics is CLASSIFICATION:
            predicted = work.labels[predicted]
        elif isinstance(predicted, np.ndarray):
            predicted = [label for label, given in zip(work.labels, predicted, strict=True) if given]
        row = part.rows[number]
        about = {"where": row.location, **row.columns, "predicted": predicted, "loss": sums[number]}
        lines.append(json.dumps(about, ensure_ascii=False, default=str) + "\n")
    write_text(folder / "worst.jsonl", "".join(lines))
    if task.metrics is CLASSIFICATION:
        _draw_confusion(folder / "confusion.png", part.examples.targets, predictions, work.labels)


def _draw_confusion(path: Path, references: list[int], predictions: list[int], labels: list[str]) -> None:
    """Which label is taken for which, as a share of each label's examples."""
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    size = min(4 + 0.35 * len(labels), 40)  # inches
    figure = Figure(figsize=(size, size), layout="constrained")
    display = ConfusionMatrixDisplay.from_predictions(
        references, predictions, labels=range(len(labels)), display_labels=labels, normalize="true",
        include_values=len(labels) <= 20, values_format=".2f", xticks_rotation="vertical", cmap="Blues", colorbar=False,
        ax=figure.subplots(),
    )  # fmt: skip
    if len(labels) > 100:  # nobody can read them
        display.ax_.set(xticks=[], yticks=[])
    figure.savefig(path)
