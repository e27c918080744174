"""The model that a pretraining starts from: a new one, or the one that `model.init_from` names."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from bertlite.config.settings import Architecture, EncoderSettings, ModelSettings, PretrainConfig
from bertlite.core.errors import UserError
from bertlite.core.logging import logger
from bertlite.data.batches import Batches
from bertlite.data.cooccurrence import count_cooccurrence, num_counted_sequences
from bertlite.data.vocabulary import spell_token
from bertlite.model.counted import calibrate, head_offsets, position_size, why_not, write_counted
from bertlite.model.heads import MaskedLanguageModel
from bertlite.model.huggingface import load_model, load_tokenizer_of, read_architecture
from bertlite.model.initialization import exchange_vocabulary, initialize
from bertlite.training.run_folder import model_folder

# Settings of the new run, whatever the starting model was trained with.
DROPOUT_SETTINGS = {"hidden_dropout_prob", "attention_probs_dropout_prob"}

MIN_TOKENS_OF_TYPE = 10  # training tokens for each entry of the vocabulary, for counted initialization
CALIBRATION_SEQUENCES = 64


@dataclass
class StartingModel:
    """A pretrained model, as `model.init_from` names it."""

    name: str
    folder: Path
    architecture: Architecture

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """The id of each token of its tokenizer."""
        return load_tokenizer_of(self.folder, self.architecture).get_vocab()


def resolve_starting_model(config: PretrainConfig) -> StartingModel | None:
    """Find the model that `model.init_from` names; None without it.

    Raises UserError for a setting that contradicts the model.
    """
    settings, length = config.model, config.data.sequence_length
    if settings.init_from is None:
        return None
    folder = model_folder(settings.init_from)
    architecture = read_architecture(folder)
    for name in settings.model_fields_set & EncoderSettings.model_fields.keys() - DROPOUT_SETTINGS:
        value, pretrained = getattr(settings, name), getattr(architecture, name)
        if value != pretrained:
            raise UserError(f"model.{name} is {value}, but {settings.init_from} has {pretrained}; leave it out")
    if length > architecture.max_position_embeddings:
        raise UserError(
            f"data.sequence_length is {length}, more than max_position_embeddings "
            f"{architecture.max_position_embeddings} of {settings.init_from}"
        )
    return StartingModel(settings.init_from, folder, architecture)


def resolve_architecture(
    settings: ModelSettings, starting_model: StartingModel | None, tokenizer: PreTrainedTokenizerBase
) -> Architecture:
    """Return the architecture to train, with the tokenizer's vocabulary."""
    vocabulary = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    if starting_model is None:
        return Architecture(**settings.model_dump(exclude={"init_from", "initialization"}), **vocabulary)
    return starting_model.architecture.model_copy(update=_dropout(settings) | vocabulary)


def create_model(
    config: PretrainConfig, starting_model: StartingModel | None, batches: Batches, kernel: str
) -> MaskedLanguageModel:
    """Create the model of step 0: a new one, or the starting model with this tokenizer's vocabulary.

    The decoder's bias of a new model is the logarithm of the token frequencies.
    """
    if starting_model is not None:
        return _load_starting_model(config, starting_model, batches.tokenizer, kernel)
    settings = config.model
    model = MaskedLanguageModel(resolve_architecture(settings, None, batches.tokenizer), kernel)
    method = _choose_initialization(config, batches)
    initialize(model, settings.initializer_range, config.train.seed, sinusoidal_positions=method == "sinusoidal")
    counts = torch.from_numpy(batches.token_counts + 1.0)
    model.head.bias.data.copy_(torch.log(counts / counts.sum()))
    if method == "counted":
        counted = count_cooccurrence(batches, settings.hidden_size - position_size(settings), head_offsets(settings))
        write_counted(model, counted, batches.tokenizer.mask_token_id)
        batch = batches.training(num_counted_sequences(batches), CALIBRATION_SEQUENCES)
        inputs = batch.input_ids, batch.position_ids, batch.document_ids, batch.prediction_positions
        loss = calibrate(model, inputs, batch.labels)
        logger.info(f"the initial weights are counted; before the first step their loss is {loss:.2f}")
    return model


def _choose_initialization(config: PretrainConfig, batches: Batches) -> str:
    """Return counted, sinusoidal or normal. Raises UserError where counted was asked for and is not possible."""
    setting, size, tokens = config.model.initialization, batches.vocabulary.size, batches.packing.tokens()
    if setting not in ("auto", "counted"):
        return setting
    problem = why_not(config.model)
    if not problem and tokens < MIN_TOKENS_OF_TYPE * size:
        problem = f"{tokens:,} training tokens are too few to count pairs of a vocabulary of {size:,}"
    if not problem:
        return "counted"
    if setting == "counted":
        raise UserError(f"model.initialization is counted, but {problem}; choose auto")
    logger.info(f"model.initialization: sinusoidal, not counted: {problem}")
    return "sinusoidal"


def _load_starting_model(
    config: PretrainConfig, starting_model: StartingModel, tokenizer: PreTrainedTokenizerBase, kernel: str
) -> MaskedLanguageModel:
    pretrained = load_model(starting_model.folder, kernel)
    architecture = pretrained.config.model_copy(update=_dropout(config.model))
    model = MaskedLanguageModel(architecture, kernel)
    initialize(model, architecture.initializer_range, config.train.seed)
    if isinstance(pretrained, MaskedLanguageModel):
        model.load_state_dict(pretrained.state_dict())
    else:
        logger.info(f"{starting_model.name} has no masked language modelling head; a new one is initialized")
        weights = pretrained.encoder.state_dict()  # it may have a pooler, too
        model.encoder.load_state_dict({name: weights[name] for name in model.encoder.state_dict()})
    _adopt_vocabulary(model, starting_model.vocabulary, tokenizer)
    return model


def _dropout(settings: ModelSettings) -> dict[str, float]:
    return {name: getattr(settings, name) for name in DROPOUT_SETTINGS}


def _adopt_vocabulary(model: MaskedLanguageModel, old: dict[str, int], tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the model the tokenizer's vocabulary in place of `old`. A new token is the mean of those that spell it."""
    new = tokenizer.get_vocab()
    if old == new:
        return
    tokens = sorted(new, key=lambda token: new[token])
    old_ids = [[old[token]] if token in old else spell_token(token, old) for token in tokens]
    added = [token for token in tokens if token not in old]
    removed = old.keys() - new.keys()
    unused = sum(token.startswith("[unused") for token in removed)
    logger.info(
        f"vocabulary: {len(new):,} tokens; {len(added):,} are new ({', '.join(added[:5])}, …), each initialized as the "
        f"mean of the old tokens that spell it; {len(removed):,} old tokens are removed, {unused:,} of them [unused]"
    )
    exchange_vocabulary(model, old_ids, tokenizer.pad_token_id)
