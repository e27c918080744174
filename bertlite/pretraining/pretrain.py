"""`bertlite prepare` and `bertlite pretrain`: from a configuration to a corpus, and to a trained model."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from bertlite.config.loading import choose
from bertlite.config.settings import Architecture, EncoderSettings, PretrainConfig
from bertlite.core.distributed import barrier, leave_process_group
from bertlite.core.errors import UserError
from bertlite.core.logging import logger
from bertlite.core.runtime import Runtime, initialize_runtime
from bertlite.data.batches import EVALUATION_MASKING, Batch, Batches
from bertlite.data.corpus import Corpus, cache_folder, prepare_corpus
from bertlite.data.masking import IGNORED, STRATEGIES, max_predictions
from bertlite.data.packing import Packing, pack_corpus
from bertlite.data.sources import digest_source, read_documents
from bertlite.data.tokenizer import prepare_tokenizer, spell_token
from bertlite.data.words import SEGMENTERS
from bertlite.model.attention import best_kernel
from bertlite.model.heads import MaskedLanguageModel
from bertlite.model.huggingface import load_model, load_tokenizer_of, read_architecture
from bertlite.model.initialization import exchange_vocabulary, initialize, parameter_count
from bertlite.model.layers import ACTIVATIONS
from bertlite.training.checkpoint import newest_checkpoint, save_final_model
from bertlite.training.memory import rows_at_a_time
from bertlite.training.optim import OPTIMIZERS, SCHEDULES, Optimizer
from bertlite.training.plateau import PlateauWatch
from bertlite.training.run_folder import model_folder, open_run, write_config
from bertlite.training.trainer import Training, evaluate

# What a model to begin from does not bring along.
DROPOUT_SETTINGS = {"hidden_dropout_prob", "attention_probs_dropout_prob"}


class Prepared(NamedTuple):
    """What a configuration's text became."""

    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    plan: Packing
    validation_corpus: Corpus
    validation_plan: Packing


def prepare(config: PretrainConfig) -> Prepared:
    """Tokenizer, corpora and rows of the configured text, from the cache or made now.

    Raises UserError, naming setting and file, for settings, text or a tokenizer that cannot be used.
    """
    check_settings(config)
    data, cache, T = config.data, cache_folder(config.data.cache_dir), config.data.sequence_length
    digests = [digest_source(source, "data.train", cache) for source in data.train]
    base = config.tokenizer.path or config.model.init_from
    if base is not None and (base == config.model.init_from or (Path(base) / "config.yaml").exists()):
        base = str(model_folder(base))
    tokenizer = prepare_tokenizer(
        config.tokenizer,
        base,
        lambda: (text for source in data.train for text in read_documents(source, data.document, "data.train")),
        [digests, data.document],
        cache,
    )
    tokenizer.model_max_length = T
    corpus = prepare_corpus(data.train, tokenizer, data, "data.train")
    weights = [source.weight for source in data.train]
    if data.validation:
        validation = prepare_corpus(data.validation, tokenizer, data, "data.validation")
        plan, validation_plan = pack_corpus(corpus, T, weights), pack_corpus(validation, T)
    else:
        validation, share = corpus, data.validation_split
        plan = pack_corpus(corpus, T, weights, share, "train")
        validation_plan = pack_corpus(corpus, T, None, share, "validation")
    for name, rows, masking in (
        ("training", plan, config.masking),
        ("held-out", validation_plan, EVALUATION_MASKING),
    ):
        used = rows.tokens() / (len(rows) * T)
        if rows.tokens() * max(masking.schedule().start, masking.schedule().end) < 1:
            raise UserError(f"the {name} text is {rows.tokens()} tokens, too few to hide one of them; give more of it")
        logger.info(
            f"{name} text: {rows.tokens():,} tokens in {len(rows):,} rows of {T}, {used:.1%} of the positions used"
        )
    return Prepared(tokenizer, corpus, plan, validation, validation_plan)


def run(config: PretrainConfig, resume: bool = False) -> Path:
    """Pretrain as configured into `output_dir`; with `resume`, go on from its newest valid checkpoint.

    Returns the folder of the final model. Raises UserError for what is wrong with the configuration, Failure when the
    training cannot go on, and Stopped after SIGINT or SIGTERM, when all is saved.
    """
    check_settings(config)
    folder = Path(config.output_dir)
    runtime = initialize_runtime(config.train.precision, config.train.compile)
    with open_run(folder, config, resume, runtime.rank):
        if resume and (folder / "model" / "config.json").exists():
            logger.info(f"{folder}: the run has finished; its model is in {folder / 'model'}")
            return folder / "model"
        if runtime.rank == 0:  # the others find everything in the cache afterwards
            prepared = prepare(config)
        barrier()
        if runtime.rank:
            prepared = prepare(config)
        training = new_training(config, prepared, folder, runtime, resume)
        if runtime.rank == 0:  # only now: until here a mistake leaves no run behind
            write_config(folder, config)
        training.run()
        if runtime.rank == 0:
            save_final_model(folder, training.model, prepared.tokenizer)
        barrier()
        logger.info(f"the model is in {folder / 'model'}")
    leave_process_group()
    return folder / "model"


def batch_of_step(config: PretrainConfig, step: int) -> list[list[str]]:
    """The rows that step `step`, counted from 1, trains on, as `Batches.describe` shows them."""
    if not 1 <= step <= config.train.max_steps:
        raise UserError(f"--step is {step}, but the run goes from 1 to train.max_steps {config.train.max_steps}")
    batches, rows = training_batches(config, prepare(config)), config.train.global_batch_size
    return batches.describe(batches.training((step - 1) * rows, rows))


def training_batches(config: PretrainConfig, prepared: Prepared) -> Batches:
    """The stream of batches that a configuration trains on."""
    T = config.data.sequence_length
    return Batches(prepared.corpus, prepared.plan, prepared.tokenizer, T, config.masking, config.train)


def check_settings(config: PretrainConfig) -> None:
    """Raise UserError for a name of no function, and for a shape that contradicts the model to begin from."""
    choose(ACTIVATIONS, config.model.hidden_act, "model.hidden_act")
    if config.data.segmenter is not None:
        choose(SEGMENTERS, config.data.segmenter, "data.segmenter")
    choose(STRATEGIES, config.masking.strategy, "masking.strategy")
    choose(OPTIMIZERS, config.train.optim, "train.optim")
    choose(SCHEDULES, config.train.lr_scheduler_type, "train.lr_scheduler_type")
    settings = config.model
    if settings.init_from is None:
        return
    begin = read_architecture(model_folder(settings.init_from))
    for name in settings.model_fields_set & EncoderSettings.model_fields.keys() - DROPOUT_SETTINGS:
        ours, theirs = getattr(settings, name), getattr(begin, name)
        if ours != theirs:
            raise UserError(f"model.{name} is {ours}, but {settings.init_from} has {theirs}; leave it out")
    if config.data.sequence_length > begin.max_position_embeddings:
        raise UserError(
            f"data.sequence_length is {config.data.sequence_length}, more than max_position_embeddings "
            f"{begin.max_position_embeddings} of {settings.init_from}"
        )


def architecture(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> Architecture:
    """The shape of the model that is trained."""
    settings, size = config.model, {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    if settings.init_from is None:
        return Architecture(**settings.model_dump(exclude={"init_from", "position_init"}), **size)
    begin = read_architecture(model_folder(settings.init_from))
    return begin.model_copy(update={name: getattr(settings, name) for name in DROPOUT_SETTINGS} | size)


def first_model(config: PretrainConfig, batches: Batches, kernel: str) -> MaskedLanguageModel:
    """The model that a run begins with: a new one, or that of `model.init_from` with this tokenizer's vocabulary.

    A new model knows from its start how often tokens occur: its decoder's bias is the logarithm of their frequencies.
    """
    tokenizer = batches.tokenizer
    settings = config.model
    if settings.init_from is None:
        model = MaskedLanguageModel(architecture(config, tokenizer), kernel)
        initialize(model, settings.initializer_range, config.train.seed, settings.position_init)
        counts = torch.from_numpy(batches.token_counts + 1.0)
        model.head.bias.data.copy_(torch.log(counts / counts.sum()))
        return model
    source = model_folder(settings.init_from)
    begin = load_model(source, kernel)
    chosen = begin.config.model_copy(update={name: getattr(settings, name) for name in DROPOUT_SETTINGS})
    model = MaskedLanguageModel(chosen, kernel)
    initialize(model, chosen.initializer_range, config.train.seed)
    if isinstance(begin, MaskedLanguageModel):
        model.load_state_dict(begin.state_dict())
    else:
        logger.info(f"{settings.init_from} has no masked language modelling head; it begins as a new one")
        weights = begin.encoder.state_dict()
        model.encoder.load_state_dict({name: weights[name] for name in model.encoder.state_dict()})
    old = load_tokenizer_of(source, begin.config)
    _exchange_vocabulary(model, old.get_vocab(), tokenizer)
    return model


def _exchange_vocabulary(model: MaskedLanguageModel, old: dict[str, int], tokenizer: PreTrainedTokenizerBase) -> None:
    new = tokenizer.get_vocab()
    if old == new:
        return
    pieces = sorted(new, key=lambda piece: new[piece])
    old_ids = [[old[piece]] if piece in old else spell_token(piece, old) for piece in pieces]
    fresh = [piece for piece in pieces if piece not in old]
    gone = old.keys() - new.keys()
    unused = sum(piece.startswith("[unused") for piece in gone)
    logger.info(
        f"vocabulary: {len(new):,} pieces; {len(fresh):,} are new ({', '.join(fresh[:5])}, …) and start as the mean of "
        f"the old pieces that spell them; {len(gone):,} old ones are gone, {unused:,} of them [unused] places"
    )
    exchange_vocabulary(model, old_ids, tokenizer.pad_token_id)


def masked_lm_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross entropy in nats, summed over the predictions, and how many there are (Devlin et al. 2018, section 3.1)."""
    return _masked_lm(model, batch)[:2]


def masked_lm_scores(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Sums for the held-out loss (nats per prediction) and accuracy."""
    loss, count, logits, labels = _masked_lm(model, batch)
    return {"loss": loss, "accuracy": (logits.argmax(-1) == labels).sum(), "count": count}


def _masked_lm(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Summed loss, number of predictions, logits (R·P,V) and labels (R·P,)."""
    logits = model(batch.input_ids, batch.position_ids, batch.document_ids, batch.prediction_positions).flatten(0, 1)
    labels = batch.labels.flatten()
    loss = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    return loss, (labels != IGNORED).sum(), logits, labels


def new_training(
    config: PretrainConfig, prepared: Prepared, folder: Path, runtime: Runtime, resume: bool = False
) -> Training:
    """A training run in `folder`, ready to begin or to go on from the newest valid checkpoint; writes nothing yet."""
    settings, T = config.train, config.data.sequence_length
    tokenizer = prepared.tokenizer
    batches = training_batches(config, prepared)
    validation = Batches(prepared.validation_corpus, prepared.validation_plan, tokenizer, T)
    kernel = best_kernel(runtime.device)
    checkpoint = newest_checkpoint(folder) if resume else None
    if resume and checkpoint is None:
        logger.info(f"{folder}: there is no checkpoint to resume from, so the run starts at step 0")
    model: Any = load_model(checkpoint, kernel) if checkpoint else first_model(config, batches, kernel)
    model.encoder.gradient_checkpointing = settings.gradient_checkpointing
    model.to(runtime.device)
    loss, scores = masked_lm_loss, masked_lm_scores
    if runtime.compile:
        loss, scores = torch.compile(loss, dynamic=False), torch.compile(scores, dynamic=False)
    training = Training(
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        loss=loss,
        make_batch=batches.training,
        evaluate=lambda: evaluate(
            model, scores, validation.evaluation, len(validation.packing), training.micro_batch, runtime
        ),
        settings=settings,
        runtime=runtime,
        facts={"text": [part.folder.name for part in prepared[1:]], **runtime.environment()},
        micro_batch=rows_at_a_time(settings, model, T, max_predictions(T, config.masking), runtime),
        optimizer=Optimizer(model, settings),
        watch=PlateauWatch(settings, batches.unigram_entropy),
        batch_command=f"bertlite batch {folder / 'config.yaml'} --step",
    )
    if checkpoint is not None:
        training.resume(checkpoint)
    facts = training.facts
    ranks = f" on each of {runtime.world_size} ranks" if runtime.world_size > 1 else ""
    logger.info(
        f"{parameter_count(model):,} parameters on {facts['device']}, {facts['precision']}, "
        f"{kernel} attention, {'compiled' if runtime.compile else 'not compiled'}; {settings.global_batch_size} rows "
        f"a step, {training.micro_batch} at a time{ranks}"
    )
    return training
