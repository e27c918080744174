"""One task with its seeds: read and tokenize everything once, then train and evaluate a model per seed."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
from bertlite.core.files import write_json
from bertlite.core.logging import logger
from bertlite.core.runtime import Runtime
from bertlite.finetuning.batches import ExampleBatches
from bertlite.finetuning.confusion import draw_confusion_matrix
from bertlite.finetuning.evaluate import evaluate_split
from bertlite.finetuning.examples import Examples
from bertlite.finetuning.losses import Loss, compute_scores, sum_losses
from bertlite.finetuning.metrics import average_scores
from bertlite.finetuning.results import PER_CLASS, EvaluationResult, read_results, write_reports
from bertlite.finetuning.splits import Split, fingerprint_data, read_tables, tokenize_splits
from bertlite.finetuning.tasks import TASKS, Task, saved_task
from bertlite.model.attention import best_kernel
from bertlite.model.heads import Classifier, prepare_for_training
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
from bertlite.training.run_folder import model_folder
from bertlite.training.trainer import Trainer


@dataclass(frozen=True)
class Experiment:
    """A task that is ready to be trained: what all seeds share."""

    config: FinetuneConfig
    settings: TaskSettings
    task: Task
    architecture: Architecture
    starting_weights: dict[str, Tensor]  # of the starting model, as far as the task's model has them
    tokenizer: PreTrainedTokenizerBase
    labels: list[str]
    class_weights: Tensor | None  # (L,)
    splits: dict[str, Split]  # train, validation and perhaps test
    data_fingerprint: str
    runtime: Runtime
    compute_scores: Callable[..., Tensor]  # losses.compute_scores, compiled or not

    @property
    def metric(self) -> str:
        return self.settings.metric or next(iter(self.task.metrics_of(self.labels, self.settings)))

    @property
    def measured_on(self) -> str:
        return "test" if "test" in self.splits else "validation"

    def evaluate(self, model: Classifier, split_name: str) -> EvaluationResult:
        """Evaluate a model on a split; on the validation split, its task learns settings."""
        split, learn = self.splits[split_name], split_name == "validation"
        metric = self.settings.metric
        return evaluate_split(model, self.task, split, self.settings, self.runtime, self.compute_scores, learn, metric)


def prepare(config: FinetuneConfig, settings: TaskSettings, runtime: Runtime) -> Experiment:
    """Read the starting model and the tables, check and tokenize everything.

    Raises UserError, naming the setting or the file and line, for what is wrong with any of it.
    """
    task, starting_model = TASKS[settings.type], str(config.model.init_from)
    folder = model_folder(starting_model)
    architecture = read_architecture(folder).model_copy(update=config.model.model_dump(exclude={"init_from"}))
    tokenizer = load_tokenizer_of(folder, architecture)
    check_fit(config, settings, architecture)
    trained_length, tokenizer.model_max_length = tokenizer.model_max_length, settings.max_length
    logger.info("reading the tables")
    labels, records, settings = read_tables(task, settings)
    logger.info("tokenizing the examples")
    splits = tokenize_splits(records, task, labels, tokenizer, settings)
    check_examples(splits, config, architecture, trained_length)
    torch.compiler.reset()  # each task has its own shapes, and torch compiles few shapes of one function
    return Experiment(
        config=config,
        settings=settings,
        task=task,
        architecture=architecture,
        starting_weights=load_weights_for(task.head, labels, folder),
        tokenizer=tokenizer,
        labels=labels,
        class_weights=make_class_weights(settings, labels, splits["train"].examples),
        splits=splits,
        data_fingerprint=fingerprint_data(splits),
        runtime=runtime,
        compute_scores=torch.compile(compute_scores, dynamic=False) if runtime.compile else compute_scores,
    )


def check_fit(config: FinetuneConfig, settings: TaskSettings, architecture: Architecture) -> None:
    """Raise UserError for settings that the starting model is too small for."""
    if settings.max_length > architecture.max_position_embeddings:
        raise UserError(
            f"task.max_length is {settings.max_length}, more than the {architecture.max_position_embeddings} "
            f"positions of {config.model.init_from}"
        )
    if config.train.frozen_layers > architecture.num_hidden_layers:
        raise UserError(
            f"train.frozen_layers is {config.train.frozen_layers}; the model has {architecture.num_hidden_layers}"
        )


def check_examples(
    splits: dict[str, Split], config: FinetuneConfig, architecture: Architecture, trained_length: int
) -> None:
    """Raise UserError for pairs of texts that the starting model cannot read; warn of untrained positions."""
    starting_model = config.model.init_from
    encodings = [encoding for split in splits.values() for encoding in split.examples.encodings]
    if max(max(encoding.type_ids) for encoding in encodings) >= architecture.type_vocab_size:
        raise UserError(f"task.text: {starting_model} cannot read pairs of texts: its type_vocab_size is 1")
    longest = max(map(len, encodings))
    if longest > trained_length:
        logger.warning(
            f"examples have up to {longest} tokens, but {starting_model} was trained on {trained_length}: it learns "
            "the later positions from this task alone; lower task.max_length to truncate the examples"
        )


def make_train_settings(train: FinetuneTrainSettings, batches: ExampleBatches, seed: int) -> TrainSettings:
    """Return the settings of the training loop, which counts steps and sequences instead of epochs and examples.

    A step takes as many sequences as hold about `global_batch_size` examples. Example: 1,000 examples packed into 100
    sequences, with a global batch size of 32, make steps of 3 sequences and epochs of 33 steps.
    """
    num_examples, num_sequences = len(batches.group_lengths), batches.num_sequences
    step_sequences = max(1, round(train.global_batch_size * num_sequences / num_examples))
    epoch_steps = max(1, round(num_sequences / step_sequences))
    max_steps = train.max_steps or max(1, round(train.num_train_epochs * num_sequences / step_sequences))
    eval_steps = train.eval_steps or epoch_steps
    shared = {name: getattr(train, name) for name in OptimizationSettings.model_fields} | {
        "global_batch_size": step_sequences
    }
    return TrainSettings(
        **shared, max_steps=max_steps, seed=seed, logging_steps=train.logging_steps, eval_steps=eval_steps,
        save_steps=eval_steps, save_total_limit=1,
    )  # fmt: skip


def build_initial_model(experiment: Experiment, kernel: str, seed: int) -> Classifier:
    """Build the model with the weights of the starting model; what that lacks, such as the head, is initialized."""
    model = experiment.task.head(experiment.architecture, experiment.labels, kernel, experiment.task.problem_type)
    model.task = saved_task(experiment.settings)
    initialize(model, experiment.architecture.initializer_range, seed)
    model.load_state_dict(model.state_dict() | experiment.starting_weights)
    return model


def layerwise_decay(decay: float, num_layers: int) -> Callable[[str], float]:
    """Return a function of a parameter's name: the factor of its learning rate, `decay` once per layer below the head.

    Example: with 12 layers and a decay of 0.9, the head has 1, the last layer 0.9, the embeddings 0.9 ** 13.
    """

    def factor(name: str) -> float:
        if name.startswith("encoder.embeddings."):
            return decay ** (num_layers + 1)
        return decay ** (num_layers - int(name.split(".")[2])) if name.startswith("encoder.layers.") else 1.0

    return factor


def make_class_weights(settings: TaskSettings, labels: list[str], examples: Examples) -> Tensor | None:
    """Return a weight per label (L,): as set, or else 1; if balanced, the weights give each label the same sum."""
    weights = settings.class_weights
    if weights is None:
        return None
    if isinstance(weights, dict):
        if unknown := set(weights) - set(labels):
            raise UserError(f"task.class_weights: {min(unknown)!r} is not a label; labels are {', '.join(labels)}")
        return torch.tensor([weights.get(label, 1.0) for label in labels])
    targets = np.concatenate([np.ravel(target) for target in examples.targets])
    counts = np.bincount(targets[targets >= 0], minlength=len(labels))
    return torch.tensor(counts.sum() / (len(labels) * np.maximum(counts, 1)), dtype=torch.float32)


def make_training_loss(experiment: Experiment) -> Loss:
    """Return the task's loss, with class weights and label smoothing where it takes them."""
    task, weights = experiment.task, experiment.class_weights
    if not task.label_weights:
        return task.loss
    if weights is not None:
        weights = weights.to(experiment.runtime.device)
    return partial(task.loss, weights=weights, smoothing=experiment.config.train.label_smoothing_factor)


def run_seed(experiment: Experiment, seed: int, resume: bool) -> dict[str, Any]:
    """Train with one seed and evaluate the best checkpoint; return the results. A finished seed's results are read."""
    folder = Path(experiment.config.output_dir) / f"seed-{seed}"
    runtime = experiment.runtime
    if (folder / "results.json").exists():
        if runtime.rank == 0:  # a killed process may have left them after it wrote the results
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return read_results(folder)
    folder.mkdir(exist_ok=True)
    trainer = build_trainer(experiment, folder, seed, resume)
    trainer.train()
    barrier()
    progress = trainer.progress
    checkpoint = checkpoint_folder(folder, progress.best_step)
    if damage := problem(checkpoint):
        raise Failure(f"{checkpoint}: cannot read the best checkpoint: {damage}; start another run with --out")
    best: Any = load_model(checkpoint, best_kernel(runtime.device))
    barrier()
    prepare_for_training(best, runtime)
    evaluation = experiment.evaluate(best, experiment.measured_on)
    on_validation = {f"validation_{name}": value for name, value in progress.best_scores.items()}
    results: dict[str, Any] = {**evaluation.scores, **on_validation, "best_step": progress.best_step}
    if evaluation.scores_by_label:
        results |= {**average_scores(evaluation.scores_by_label), PER_CLASS: evaluation.scores_by_label}
    if runtime.rank == 0:
        split = experiment.splits[experiment.measured_on]
        write_reports(folder, experiment.task, experiment.labels, split, evaluation)
        if not (folder / "model").exists():  # a killed process may have saved it before the results
            save_final_model(folder, best, experiment.tokenizer)
        write_json(folder / "results.json", results)
        if experiment.task.single_label:  # after the results: a picture that fails loses no training
            references, path = split.examples.references, folder / "confusion.png"
            draw_confusion_matrix(path, references, evaluation.predictions, experiment.labels)
        shutil.rmtree(folder / "checkpoints")
    barrier()
    return results


def build_model(experiment: Experiment, checkpoint: Path | None, seed: int) -> Classifier:
    """Load the checkpoint, or else build the initial model; freeze layers, and move the model to the device."""
    train, kernel = experiment.config.train, best_kernel(experiment.runtime.device)
    model: Any = load_model(checkpoint, kernel) if checkpoint else build_initial_model(experiment, kernel, seed)
    model.encoder.gradient_checkpointing = train.gradient_checkpointing
    if train.frozen_layers:
        model.encoder.embeddings.requires_grad_(False)
        model.encoder.layers[: train.frozen_layers].requires_grad_(False)
    prepare_for_training(model, experiment.runtime)
    return model


def build_trainer(experiment: Experiment, folder: Path, seed: int, resume: bool) -> Trainer:
    """Build the trainer of one seed, which starts at step 0 or resumes from the newest valid checkpoint."""
    runtime, train, train_split = experiment.runtime, experiment.config.train, experiment.splits["train"]
    sequence_length = train_split.batches.sequence_length
    batches = ExampleBatches(train_split.examples, experiment.tokenizer.pad_token_id, seed, sequence_length)
    settings = make_train_settings(train, batches, seed)
    checkpoint = newest_checkpoint(folder) if resume else None
    model = build_model(experiment, checkpoint, seed)
    facts = {"text": experiment.data_fingerprint, **runtime.environment()}
    examples_per_step = len(batches.group_lengths) * settings.global_batch_size / batches.num_sequences
    compiled = ", compiled in the first step, about a minute" if runtime.compile else ""
    precision = runtime.describe_precision(train.precision)
    logger.info(f"seed {seed}: {parameter_count(model):,} parameters on {facts['device']}, {precision}{compiled}")
    logger.info(
        f"seed {seed}: {settings.max_steps:,} steps of {settings.global_batch_size} sequences of {sequence_length} "
        f"tokens, on average {examples_per_step:.1f} examples"
    )
    optimizer = Optimizer(model, settings, layerwise_decay(train.layerwise_lr_decay, len(model.encoder.layers)))
    state = load_training_state(checkpoint) if checkpoint else TrainingState()
    micro_batch_size = choose_micro_batch_size(settings, model, sequence_length, 0, runtime, state.micro_batch_size)
    if checkpoint is not None:
        restore_optimizer(checkpoint, state, optimizer, facts | {"micro_batch_size": micro_batch_size})
    loss = make_training_loss(experiment)
    evaluation = Evaluation(
        lambda trainer: experiment.evaluate(model, "validation").scores,
        experiment.metric,
        train.early_stopping_patience,
    )
    return Trainer(
        model=model,
        optimizer=optimizer,
        loss=lambda model, batch: sum_losses(*loss(experiment.compute_scores(model, batch), batch)),
        make_batch=batches.training,
        settings=settings,
        runtime=runtime,
        micro_batch_size=micro_batch_size,
        progress=state.progress,
        callbacks=[
            *loggers(folder, runtime),
            TrainingLog(),
            evaluation,
            Checkpoints(folder, experiment.tokenizer, facts),
        ],
    )
