"""`bertlite prepare`: from a configuration to a tokenizer, a corpus and its packed sequences."""

from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from bertlite.config.budget import budget_seconds, parse_budget
from bertlite.config.loading import choose, with_changes
from bertlite.config.settings import DataSettings, MaskingSettings, PretrainConfig
from bertlite.core.errors import UserError
from bertlite.core.logging import logger
from bertlite.data.batches import EVALUATION_MASKING, Batches
from bertlite.data.corpus import Corpus, cache_folder, prepare_corpus
from bertlite.data.masking import STRATEGIES
from bertlite.data.packing import Packing, pack_corpus
from bertlite.data.sources import digest_source, forget_digests, read_documents
from bertlite.data.tokenizer import prepare_tokenizer
from bertlite.data.words import SEGMENTERS
from bertlite.model.layers import ACTIVATIONS
from bertlite.pretraining.starting_model import StartingModel, resolve_starting_model
from bertlite.training.optim import OPTIMIZERS, SCHEDULES
from bertlite.training.run_folder import model_folder


class Prepared(NamedTuple):
    """What a run trains on, and what it starts from."""

    tokenizer: PreTrainedTokenizerBase
    corpus: Corpus
    packing: Packing
    validation_corpus: Corpus
    validation_packing: Packing
    starting_model: StartingModel | None


def check_settings(config: PretrainConfig) -> None:
    """Raise UserError for an unknown name of a function."""
    choose(ACTIVATIONS, config.model.hidden_act, "model.hidden_act")
    if config.data.segmenter is not None:
        choose(SEGMENTERS, config.data.segmenter, "data.segmenter")
    choose(STRATEGIES, config.masking.strategy, "masking.strategy")
    choose(OPTIMIZERS, config.train.optim, "train.optim")
    choose(SCHEDULES, config.train.lr_scheduler_type, "train.lr_scheduler_type")


def prepare(config: PretrainConfig) -> Prepared:
    """Make the tokenizer, the corpora and their packed sequences, or read them from the cache.

    Raises UserError, naming setting and file, for settings, text or a tokenizer that cannot be used.
    """
    check_settings(config)
    starting_model = resolve_starting_model(config)
    data, T = config.data, config.data.sequence_length
    tokenizer = _prepare_tokenizer(config, starting_model)
    tokenizer.model_max_length = T
    corpus = prepare_corpus(data.train, tokenizer, data, "data.train")
    weights = [source.weight for source in data.train]
    if data.validation:
        validation_corpus = prepare_corpus(data.validation, tokenizer, data, "data.validation")
        packing, validation_packing = pack_corpus(corpus, T, weights), pack_corpus(validation_corpus, T)
    else:
        validation_corpus, share = corpus, data.validation_split
        packing = pack_corpus(corpus, T, weights, share, "train")
        validation_packing = pack_corpus(corpus, T, None, share, "validation")
    _check_size("training", packing, T, config.masking)
    _check_size("validation", validation_packing, T, EVALUATION_MASKING)
    return Prepared(tokenizer, corpus, packing, validation_corpus, validation_packing, starting_model)


def forget_content(data: DataSettings) -> None:
    """Forget the content of all files, so that the next preparation reads it again."""
    for setting, sources in (("data.train", data.train), ("data.validation", data.validation)):
        forget_digests(sources, setting, cache_folder(data.cache_dir))


def resolve_steps(config: PretrainConfig, prepared: Prepared) -> PretrainConfig:
    """Return the configuration with the number of steps that a budget of tokens buys."""
    if config.train.budget is None or budget_seconds(config.train.budget):
        return config
    amount, _ = parse_budget(config.train.budget)
    tokens_per_step = prepared.packing.tokens() / len(prepared.packing) * config.train.global_batch_size
    return with_changes(config, {"train.max_steps": max(1, round(amount / tokens_per_step))}, "train.budget")


def training_batches(config: PretrainConfig, prepared: Prepared) -> Batches:
    """Return the endless stream of batches that a configuration trains on."""
    T = config.data.sequence_length
    return Batches(prepared.corpus, prepared.packing, prepared.tokenizer, T, config.masking, config.train)


def batch_of_step(config: PretrainConfig, step: int) -> list[list[str]]:
    """Return the sequences of step `step`, counted from 1, as `Batches.describe` shows them."""
    if not config.train.budget and not 1 <= step <= config.train.max_steps:
        raise UserError(f"--step is {step}, but the steps are 1 to train.max_steps {config.train.max_steps}")
    prepared = prepare(config)
    config = resolve_steps(config, prepared)
    if config.train.budget and not budget_seconds(config.train.budget) and step > config.train.max_steps:
        raise UserError(f"--step is {step}, but train.budget {config.train.budget} buys {config.train.max_steps} steps")
    batches, size = training_batches(config, prepared), config.train.global_batch_size
    return batches.describe(batches.training((step - 1) * size, size))


def _prepare_tokenizer(config: PretrainConfig, starting_model: StartingModel | None) -> PreTrainedTokenizerBase:
    data, cache = config.data, cache_folder(config.data.cache_dir)
    base = config.tokenizer.path
    if starting_model is not None and base in (None, starting_model.name):
        base = str(starting_model.folder)
    elif base is not None and (Path(base) / "config.yaml").exists():  # a run folder
        base = str(model_folder(base))
    return prepare_tokenizer(
        config.tokenizer,
        base,
        lambda: (text for source in data.train for text in read_documents(source, data.document, "data.train")),
        [[digest_source(source, "data.train", cache) for source in data.train], data.document],
        cache,
    )


def _check_size(name: str, packing: Packing, T: int, masking: MaskingSettings) -> None:
    """Log the size of a text. Raises UserError when no token of it would be masked."""
    rate = masking.schedule()
    if packing.tokens() * max(rate.start, rate.end) < 1:
        raise UserError(f"the {name} text has {packing.tokens()} tokens, too few to mask one of them; add more text")
    used = packing.tokens() / (len(packing) * T)
    logger.info(
        f"{name} text: {packing.tokens():,} tokens in {len(packing):,} sequences of {T}, {1 - used:.1%} of it padding"
    )
