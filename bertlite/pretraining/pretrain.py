"""`bertlite pretrain`: from a configuration to a trained model."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bertlite.config.budget import budget_seconds
from bertlite.config.settings import PretrainConfig, TrainSettings
from bertlite.core.distributed import barrier, leave_process_group
from bertlite.core.errors import UserError
from bertlite.core.logging import logger
from bertlite.core.runtime import Runtime, initialize_runtime
from bertlite.data.batches import Batches
from bertlite.data.masking import max_predictions
from bertlite.model.attention import best_kernel
from bertlite.model.heads import prepare_for_training
from bertlite.model.huggingface import load_model
from bertlite.model.initialization import parameter_count
from bertlite.pretraining.losses import masked_lm_loss, masked_lm_scores
from bertlite.pretraining.prepare import Prepared, check_settings, prepare, resolve_steps, training_batches
from bertlite.pretraining.starting_model import create_model
from bertlite.training.budget import Budget
from bertlite.training.callbacks import Checkpoints, Evaluation, TrainingLog, loggers
from bertlite.training.checkpoint import (
    TrainingState,
    load_training_state,
    newest_checkpoint,
    restore_optimizer,
    save_final_model,
)
from bertlite.training.memory import choose_micro_batch_size
from bertlite.training.optim import Optimizer
from bertlite.training.plateau import PlateauWatch
from bertlite.training.run_folder import RUN_FILES, keep_former_defaults, open_run, write_config
from bertlite.training.trainer import Callback, Trainer, evaluate

MEASURED_BATCHES = 4  # of an evaluation, which say how long all of it takes


def run(
    config: PretrainConfig,
    resume: bool = False,
    overwrite: bool = False,
    extend: bool = False,
    start: float | None = None,
) -> Path:
    """Pretrain into `output_dir`; with `resume`, continue from its newest valid checkpoint.

    With `overwrite`, replace a run in this folder; with `extend`, resume it with a larger `train.max_steps`, also if it
    has finished. A budget of time counts from `start`, a `time.time()`; None: from now.

    Returns the folder of the final model. Raises UserError for a wrong configuration, Failure when the training cannot
    continue, and Stopped after a signal, with a checkpoint saved.
    """
    check_settings(config)
    start = start or time.time()
    if extend and config.train.budget:
        raise UserError(f"train.budget is {config.train.budget}; only runs with train.max_steps can be extended")
    folder = Path(config.output_dir)
    if resume or extend:
        config = keep_former_defaults(folder, config)
    runtime = initialize_runtime(config.train.precision, config.train.compile)
    with open_run(folder, config, resume, runtime.rank, overwrite, extend):
        if resume and not extend and (folder / "model" / "config.json").exists():
            logger.info(f"{folder}: the run has finished; its model is in {folder / 'model'}")
            return folder / "model"
        if runtime.rank == 0:  # the other ranks find everything in the cache afterwards
            prepared = prepare(config)
        barrier()
        if runtime.rank:
            prepared = prepare(config)
        checkpoint = _find_checkpoint(folder, extend) if resume else None
        resolved = resolve_steps(config, prepared)
        callbacks = standard_callbacks(resolved, prepared, runtime, start)
        trainer = new_trainer(resolved, prepared, runtime, callbacks, checkpoint)
        if runtime.rank == 0:  # not before: a mistake found until here leaves no run behind
            write_config(folder, config, outdated=RUN_FILES if overwrite else ["model"] if extend else [])
        trainer.train()
        if runtime.rank == 0:
            save_final_model(folder, trainer.model, prepared.tokenizer)
        barrier()
    leave_process_group()
    return folder / "model"


def _find_checkpoint(folder: Path, extend: bool) -> Path | None:
    checkpoint = newest_checkpoint(folder)
    if extend and checkpoint is None:
        raise UserError(f"{folder}: has no valid checkpoint to continue from; start another run with --out DIR")
    if checkpoint is None:
        logger.info(f"{folder}: there is no checkpoint to resume from, so the run starts at step 0")
    return checkpoint


def new_trainer(
    config: PretrainConfig,
    prepared: Prepared,
    runtime: Runtime,
    callbacks: Sequence[Callback],
    checkpoint: Path | None = None,
) -> Trainer:
    """Build a trainer that starts at step 0, or continues from a valid checkpoint."""
    settings, T = config.train, config.data.sequence_length
    batches, kernel = training_batches(config, prepared), best_kernel(runtime.device)
    if checkpoint is None:
        model: Any = create_model(config, prepared.starting_model, batches, kernel)
        state = TrainingState()
    else:
        model, state = load_model(checkpoint, kernel), load_training_state(checkpoint)
    model.encoder.gradient_checkpointing = settings.gradient_checkpointing
    prepare_for_training(model, runtime)
    optimizer = Optimizer(model, settings)
    num_predictions = max_predictions(T, config.masking)
    micro_batch_size = choose_micro_batch_size(settings, model, T, num_predictions, runtime, state.micro_batch_size)
    if checkpoint is not None:
        facts = collect_facts(prepared, runtime)
        restore_optimizer(checkpoint, state, optimizer, facts | {"micro_batch_size": micro_batch_size})
    _log_setup(model, settings, runtime, kernel, micro_batch_size)
    return Trainer(
        model=model,
        optimizer=optimizer,
        loss=torch.compile(masked_lm_loss, dynamic=False) if runtime.compile else masked_lm_loss,
        make_batch=batches.training,
        settings=settings,
        runtime=runtime,
        micro_batch_size=micro_batch_size,
        progress=state.progress,
        callbacks=callbacks,
        batch_command=f"bertlite batch {Path(config.output_dir) / 'config.yaml'} --step",
    )


def _log_setup(
    model: torch.nn.Module, settings: TrainSettings, runtime: Runtime, kernel: str, micro_batch_size: int
) -> None:
    precision = runtime.describe_precision(settings.precision)
    compiled = "compiled in the first step, about a minute" if runtime.compile else "not compiled"
    ranks = f" on each of {runtime.world_size} ranks" if runtime.world_size > 1 else ""
    device, parameters = runtime.environment()["device"], parameter_count(model)
    logger.info(f"{parameters:,} parameters on {device}, {precision}, {kernel} attention, {compiled}")
    logger.info(f"{settings.global_batch_size} sequences a step in micro-batches of {micro_batch_size}{ranks}")


def standard_callbacks(config: PretrainConfig, prepared: Prepared, runtime: Runtime, start: float) -> list[Callback]:
    """Return what happens between steps, in this order: keep the budget, log, evaluate, save."""
    folder = Path(config.output_dir)
    validation = Batches(
        prepared.validation_corpus, prepared.validation_packing, prepared.tokenizer, config.data.sequence_length
    )
    scores = torch.compile(masked_lm_scores, dynamic=False) if runtime.compile else masked_lm_scores

    def evaluate_on_validation(trainer: Trainer, num_sequences: int = len(validation.packing)) -> dict[str, float]:
        return evaluate(trainer.model, scores, validation.evaluation, num_sequences, trainer.micro_batch_size, runtime)

    def measure_evaluation(trainer: Trainer) -> float:
        num_sequences = min(len(validation.packing), MEASURED_BATCHES * trainer.micro_batch_size * runtime.world_size)
        evaluate_on_validation(trainer, num_sequences)  # compiles
        before = time.perf_counter()
        evaluate_on_validation(trainer, num_sequences)
        return (time.perf_counter() - before) * len(validation.packing) / num_sequences

    seconds = budget_seconds(config.train.budget)
    return [
        *([Budget(seconds, start, measure_evaluation)] if seconds else []),
        *loggers(folder, runtime),
        PlateauWatch(config.train, training_batches(config, prepared).unigram_entropy),
        TrainingLog(),
        Evaluation(evaluate_on_validation),
        Checkpoints(folder, prepared.tokenizer, collect_facts(prepared, runtime)),
    ]


def collect_facts(prepared: Prepared, runtime: Runtime) -> dict[str, Any]:
    """Return what must be equal for equal results: the text and the machine."""
    inputs = (prepared.corpus, prepared.packing, prepared.validation_corpus, prepared.validation_packing)
    return {"text": [part.folder.name for part in inputs], **runtime.environment()}
