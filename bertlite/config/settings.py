"""The settings of pretraining, and those that fine-tuning shares; strict, and without importing torch.

The text below a setting is its description. Names are Hugging Face's where it has one.
"""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    model_serializer,
    model_validator,
)

from bertlite.config.budget import budget_seconds, check_budget
from bertlite.config.fields import (
    Depth,
    Fraction,
    NonNegative,
    PathText,
    Positive,
    PositiveFloat,
    Probability,
    Section,
    Seed,
    Width,
)


class EncoderSettings(Section):
    """The size and the layers of the encoder; the defaults are google-research/bert's BERT-mini."""

    hidden_size: Width = 256
    """Size of the vector of each token."""
    num_hidden_layers: Depth = 4
    """Number of layers."""
    num_attention_heads: Width = 4
    """Attention heads of each layer; divides hidden_size."""
    intermediate_size: Width = 1024
    """Size of the hidden layer of each feed-forward network."""
    hidden_act: str = "gelu"
    """Activation of the feed-forward networks: gelu, gelu_new or relu."""
    hidden_dropout_prob: Probability = 0.0
    """Dropout of embeddings, attention outputs and feed-forward outputs."""
    attention_probs_dropout_prob: Probability = 0.0
    """Dropout of attention probabilities."""
    max_position_embeddings: Annotated[Width, Field(ge=8)] = 512
    """Longest sequence that the model can read; at least data.sequence_length."""
    type_vocab_size: Width = 2
    """Number of segments that token_type_ids can tell apart."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""
    layer_norm_eps: PositiveFloat = 1e-12
    """Constant that layer normalization adds to the variance."""

    @model_validator(mode="after")
    def check_heads_divide_hidden_size(self) -> "EncoderSettings":
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}, which does not divide hidden_size "
                f"{self.hidden_size}; choose a divisor"
            )
        return self


class ModelSettings(EncoderSettings):
    """The model to pretrain: a new encoder, or an existing one (init_from), which brings its own size."""

    init_from: PathText | None = None
    """Existing BERT to continue from: a Hugging Face folder, a hub name or a run folder; null: a new model."""
    initialization: Literal["auto", "counted", "sinusoidal", "normal"] = "auto"
    """Initial weights: random, with sinusoidal positions, or counted from the text; auto: counted where possible."""

    @model_validator(mode="after")
    def check_one_origin_of_the_weights(self) -> "ModelSettings":
        if self.init_from is not None and self.initialization != "auto":
            raise ValueError(
                f"initialization is {self.initialization}, but init_from brings its own weights; leave it out"
            )
        return self

    @model_serializer(mode="wrap")
    def serialize_settings_in_force(self, serialize: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Leave out default sizes where an existing model brings its own."""
        values = serialize(self)
        return values if self.init_from is None else {name: values[name] for name in sorted(self.model_fields_set)}


class Architecture(EncoderSettings):
    """The complete description of an encoder: its settings, and what the tokenizer determines."""

    model_type: ClassVar[str] = "bert"  # Hugging Face's name, which `model.architectures` knows
    vocab_size: Width
    pad_token_id: NonNegative = 0

    @model_validator(mode="after")
    def check_padding_is_in_the_vocabulary(self) -> "Architecture":
        if self.pad_token_id >= self.vocab_size:
            raise ValueError(f"pad_token_id is {self.pad_token_id}, outside of the vocabulary of {self.vocab_size}")
        return self


class TokenizerSettings(Section):
    """The tokenizer: an existing one (path), or a WordPiece tokenizer trained on the text."""

    path: PathText | None = None
    """A Hugging Face folder, vocab.txt, tokenizer.json or hub name; null: that of model.init_from, or a new one."""
    vocab_size: Annotated[Width, Field(gt=5)] = 30522  # the special tokens alone are five
    """Vocabulary size of a new tokenizer."""
    special_tokens: list[Annotated[str, Field(min_length=1)]] = Field(default=[])
    """Tokens such as "[E1]" that are added, never split and never masked."""
    lowercase: bool = True
    """Whether a new tokenizer lowercases text."""
    strip_accents: bool | None = None
    """Whether é becomes e, and other marks are removed; null: a new tokenizer keeps them, vocab.txt as BERT does."""
    train_characters: Positive = 100_000_000
    """Characters that train a new tokenizer: a random sample of longer text."""
    pad_to_multiple_of: Positive | None = None
    """Pad the vocabulary with [unusedN] tokens to a multiple of this, such as 64."""
    extend: NonNegative = 0
    """Number of tokens, learned from the text, that are added to an existing tokenizer, first in place of [unusedN]."""

    @model_validator(mode="after")
    def check_room_for_special_tokens(self) -> "TokenizerSettings":
        needed = 5 + len(self.special_tokens)
        if self.special_tokens and self.path is None and self.vocab_size <= needed:
            raise ValueError(f"vocab_size is {self.vocab_size}; the special tokens alone are {needed}")
        return self


class DataLocation(Section):
    """Where data are: files (path), or a Hugging Face dataset (dataset)."""

    path: PathText | None = None
    """A file, a glob or a folder."""
    format: Literal["text", "jsonl", "json", "csv", "tsv", "parquet", "fasttext"] | None = None
    """Format of the files: text, jsonl, json, csv, tsv, parquet or fasttext; null: by name, else by content."""
    field: str | None = None
    """Key of the list of records within a JSON file, such as train, or keys: data.train."""
    dataset: PathText | None = None
    """Hub name or folder of a dataset."""
    name: str | None = None
    """Configuration of the dataset, such as 20231101.de."""
    split: str = "train"
    """Split of the dataset."""
    revision: str | None = None
    """Revision of the dataset on the hub."""

    @model_validator(mode="after")
    def check_path_or_dataset(self) -> "DataLocation":
        if (self.path is None) == (self.dataset is None):
            raise ValueError("path: name either a path or a dataset")
        for name in ("format", "field"):
            if self.dataset is not None and getattr(self, name) is not None:
                raise ValueError(f"{name} is {getattr(self, name)!r}, but belongs to a path, not to a dataset")
        for name in self.model_fields_set & {"name", "split", "revision", "streaming"}:
            if self.path is not None and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is {getattr(self, name)!r}, but belongs to a dataset, not to a path")
        return self

    @property
    def given_format(self) -> str | None:
        """The format that the settings name; `field` exists in JSON only."""
        return self.format or ("json" if self.field else None)

    @model_serializer(mode="wrap")
    def serialize_briefly(self, serialize: Callable[[Any], dict[str, Any]]) -> Any:
        """Write the values that differ from the defaults; a path alone becomes a string."""
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        given = {name: value for name, value in serialize(self).items() if value != defaults[name]}
        return self.path if set(given) == {"path"} else given


class Source(DataLocation):
    """A source of text for pretraining."""

    streaming: bool = False
    """Whether the dataset is read over the network without storing it."""
    column: str | None = None
    """Column of a table or dataset that holds the text, each of its rows being a document; null: text."""
    encoding: str = "utf-8"
    """Character encoding of the files, such as gb18030."""
    weight: PositiveFloat = 1.0
    """How often the text is seen in each epoch."""


def _list_sources(value: Any) -> Any:
    """Put a single source into a list; a string is a path."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [{"path": source} if isinstance(source, str) else source for source in values]


Sources = Annotated[list[Source], BeforeValidator(_list_sources)]


class DataSettings(Section):
    """The text, how it is divided into documents, which documents are dropped, and the length of the sequences."""

    train: Annotated[Sources, Field(min_length=1)]
    """Training text: files, globs, folders, datasets, or sample, the text that ships with bertlite."""
    validation: Sources = Field(default=[])
    """Validation text; without it, some documents of the training text are the validation set."""
    validation_split: Fraction = 0.02
    """Fraction of the training documents that are the validation set where data.validation is empty."""
    sequence_length: Annotated[int, Field(ge=8)] = 128
    """Positions of a sequence; short documents share a sequence without attending to each other."""
    document: Literal["blank-line", "line"] = "blank-line"
    """What ends a document of a text file."""
    min_characters: NonNegative = 0
    """Drop shorter documents."""
    max_characters: Positive | None = None
    """Drop longer documents."""
    remove_duplicates: bool = False
    """Drop documents that equal an earlier one."""
    segmenter: str | None = None
    """Word segmenter for whole-word masking: jieba for Chinese."""
    cache_dir: PathText | None = None
    """Where corpora and tokenizers are kept; null: $BERTLITE_CACHE or ~/.cache/bertlite."""


class LinearSchedule(Section):
    """A fraction that changes linearly over the run."""

    start: Fraction
    """Value at the first step."""
    end: Fraction
    """Value at the last step."""


class MaskingSettings(Section):
    """Which tokens are masked."""

    strategy: str = "token"
    """What is masked as a unit: token or whole-word."""
    rate: Annotated[
        Annotated[Fraction, Tag("<number>")] | Annotated[LinearSchedule, Tag("<schedule>")],
        Discriminator(lambda value: "<schedule>" if isinstance(value, dict | LinearSchedule) else "<number>"),
    ] = 0.15
    """Fraction of the tokens, special ones excluded, that are masked: a number, or {start: 0.3, end: 0.15}."""

    def schedule(self) -> LinearSchedule:
        """Return the rate as a schedule, also where it is constant."""
        return self.rate if isinstance(self.rate, LinearSchedule) else LinearSchedule(start=self.rate, end=self.rate)


class OptimizationSettings(Section):
    """Batch, optimizer, learning rate schedule and precision."""

    global_batch_size: Annotated[int, Field(gt=0, le=1 << 20)] = 32
    """Sequences of an optimizer step over all ranks and micro-batches; in fine-tuning, examples, on average."""
    per_device_train_batch_size: Positive | None = None
    """Sequences of a micro-batch; null: as many as fit in memory. Results do not depend on it but for rounding."""
    gradient_checkpointing: bool = False
    """Recompute the layers in the backward pass, which needs much less memory and more time."""
    optim: str = "adamw"
    """adamw, or muon: Muon for the matrices of the layers, AdamW for the rest."""
    learning_rate: PositiveFloat = 4e-4
    """Peak learning rate of AdamW."""
    muon_learning_rate: PositiveFloat = 5e-3
    """Peak learning rate of Muon."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Weight decay; biases and layer normalization have none."""
    adam_beta1: Probability = 0.9
    """Decay of AdamW's mean of gradients."""
    adam_beta2: Probability = 0.98
    """Decay of AdamW's mean of squared gradients."""
    adam_epsilon: PositiveFloat = 1e-6
    """Constant that AdamW adds to the denominator."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.06
    """Fraction of the steps in which the learning rate rises to its peak."""
    lr_scheduler_type: str = "linear"
    """Learning rate after warm-up: linear, cosine or constant."""
    max_grad_norm: PositiveFloat = 1.0
    """Norm at which gradients are clipped."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of matrix products; auto: bf16 where the hardware is faster with it."""
    compile: Literal["auto"] | bool = "auto"
    """Whether torch.compile is used; auto: where it can be."""


class TrainSettings(OptimizationSettings):
    """Pretraining: optimization, length, and intervals in steps."""

    max_steps: NonNegative = 1200
    """Number of optimizer steps."""
    budget: Annotated[str, AfterValidator(check_budget)] | None = None
    """What the whole run may take, instead of max_steps: a time, such as 30m or 24h, or tokens, such as 2e9 tokens."""
    seed: Seed = 0
    """Seed of initial weights, order, masks and dropout."""
    logging_steps: Positive = 10
    """Steps between training lines of metrics.jsonl."""
    eval_steps: Positive = 200
    """Steps between evaluations on the validation set."""
    save_steps: Positive = 200
    """Steps between checkpoints."""
    save_minutes: PositiveFloat | None = None
    """Also save a checkpoint when the last one is older than this."""
    save_total_limit: Positive = 3
    """Number of checkpoints that are kept, the newest."""
    on_nonfinite_loss: Literal["stop", "skip"] = "stop"
    """What to do in a step with an infinite or NaN loss or gradient: stop the run, or leave the weights unchanged."""


class PretrainConfig(Section):
    """All settings of `bertlite pretrain`."""

    model: ModelSettings = ModelSettings()
    tokenizer: TokenizerSettings = TokenizerSettings()
    data: DataSettings
    masking: MaskingSettings = MaskingSettings()
    train: TrainSettings = TrainSettings()
    output_dir: PathText = "runs/mini"
    """Run folder; --out sets it."""

    @model_validator(mode="after")
    def check_tokenizer_to_extend_exists(self) -> "PretrainConfig":
        if self.tokenizer.extend and self.tokenizer.path is None and self.model.init_from is None:
            raise ValueError(
                f"tokenizer.extend is {self.tokenizer.extend}, but there is no tokenizer to extend; "
                "set tokenizer.path or model.init_from, or raise tokenizer.vocab_size"
            )
        return self

    @model_validator(mode="after")
    def check_masking_has_a_length(self) -> "PretrainConfig":
        if budget_seconds(self.train.budget) and isinstance(self.masking.rate, LinearSchedule):
            raise ValueError(
                f"masking.rate changes over the run, but train.budget {self.train.budget} does not fix the number of "
                "steps; give the budget in tokens, or one rate"
            )
        return self

    @model_validator(mode="after")
    def check_sequence_fits_positions(self) -> "PretrainConfig":
        length, limit = self.data.sequence_length, self.model.max_position_embeddings
        if length > limit and self.model.init_from is None:
            raise ValueError(
                f"data.sequence_length is {length}, more than model.max_position_embeddings {limit}; "
                "lower the first or raise the second"
            )
        return self
