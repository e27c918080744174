"""All settings of the YAML: strict, with Hugging Face's own names, and without importing torch."""

import os
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_serializer,
    model_validator,
)


class Section(BaseModel):
    """One section of the YAML: unknown keys and wrong types are errors, values never change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=(), allow_inf_nan=False)


Positive = Annotated[int, Field(gt=0)]
Width = Annotated[int, Field(gt=0, le=1 << 24)]  # of a matrix with two such sides, 64 bits can count the bytes
Depth = Annotated[int, Field(gt=0, le=10_000)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
PathText = Annotated[str, AfterValidator(os.path.expanduser)]  # of a file, a folder, or a name of the hub


class EncoderSettings(Section):
    """The encoder's shape; the defaults are google-research/bert's BERT-mini."""

    hidden_size: Width = 256
    num_hidden_layers: Depth = 4
    num_attention_heads: Width = 4
    intermediate_size: Width = 1024
    hidden_act: str = "gelu"
    hidden_dropout_prob: Probability = 0.0
    attention_probs_dropout_prob: Probability = 0.0
    max_position_embeddings: Annotated[Width, Field(ge=8)] = 512
    type_vocab_size: Width = 2
    initializer_range: Annotated[float, Field(gt=0)] = 0.02
    layer_norm_eps: Annotated[float, Field(gt=0)] = 1e-12

    @model_validator(mode="after")
    def heads_divide_hidden_size(self) -> "EncoderSettings":
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}, which does not divide hidden_size "
                f"{self.hidden_size}; choose a divisor"
            )
        return self


class ModelSettings(EncoderSettings):
    """What to train: a new encoder of a shape, or one that exists (`init_from`), which brings its own."""

    init_from: PathText | None = None
    position_init: Literal["normal", "sinusoidal"] = "normal"

    @model_serializer(mode="wrap")
    def a_model_that_exists_brings_its_shape(self, serialize: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        values = serialize(self)
        return values if self.init_from is None else {name: values[name] for name in sorted(self.model_fields_set)}


class Architecture(EncoderSettings):
    """A complete description of an encoder: its shape, and what the tokenizer decides."""

    vocab_size: Width
    pad_token_id: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def padding_is_in_the_vocabulary(self) -> "Architecture":
        if self.pad_token_id >= self.vocab_size:
            raise ValueError(f"pad_token_id is {self.pad_token_id}, outside of the vocabulary of {self.vocab_size}")
        return self


class TokenizerSettings(Section):
    """Which tokenizer: a given one (`path`), perhaps extended and padded, or WordPiece trained on the text."""

    path: PathText | None = None
    vocab_size: Annotated[Width, Field(gt=5)] = 30522  # the special tokens alone are five
    lowercase: bool = True
    train_characters: Positive = 100_000_000
    pad_to_multiple_of: Positive | None = None
    extend: Annotated[int, Field(ge=0)] = 0


class DataLocation(Section):
    """Where data lie: files (`path`), or a Hugging Face dataset (`dataset`)."""

    path: PathText | None = None
    dataset: PathText | None = None
    name: str | None = None
    split: str = "train"
    revision: str | None = None

    @model_validator(mode="after")
    def one_place(self) -> "DataLocation":
        if (self.path is None) == (self.dataset is None):
            raise ValueError("path: name either a path or a dataset")
        for name in self.model_fields_set & {"name", "split", "revision", "streaming"}:
            if self.path is not None and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is {getattr(self, name)!r}, but goes with a dataset, not with a path")
        return self

    @model_serializer(mode="wrap")
    def only_a_path_is_its_name(self, serialize: Callable[[Any], dict[str, Any]]) -> Any:
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        given = {name: value for name, value in serialize(self).items() if value != defaults[name]}
        return self.path if set(given) == {"path"} else given


class Source(DataLocation):
    """Text to pretrain on: which column of a table, and how often it is seen."""

    streaming: bool = False
    column: str = "text"
    weight: Annotated[float, Field(gt=0)] = 1.0


def _sources(value: Any) -> Any:
    """A single source, or a list of them; a source that is only a name is a path."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [{"path": one} if isinstance(one, str) else one for one in values]


Sources = Annotated[list[Source], BeforeValidator(_sources)]


class DataSettings(Section):
    """Which text, what a document of it is, which documents are dropped, and how long the rows are (in positions)."""

    train: Annotated[Sources, Field(min_length=1)]
    validation: Sources = []
    validation_split: Annotated[float, Field(gt=0, lt=1)] = 0.02
    sequence_length: Annotated[int, Field(ge=8)] = 128
    document: Literal["blank-line", "line"] = "blank-line"
    min_characters: Annotated[int, Field(ge=0)] = 0
    max_characters: Positive | None = None
    remove_duplicates: bool = False
    segmenter: str | None = None
    cache_dir: PathText | None = None


Fraction = Annotated[float, Field(gt=0, lt=1)]


class LinearSchedule(Section):
    """A share that goes in a straight line from `start` to `end` over the run."""

    start: Fraction
    end: Fraction


class MaskingSettings(Section):
    """Which share of the tokens that are not special is hidden, and by which strategy it is chosen."""

    strategy: str = "token"
    rate: Annotated[
        Annotated[Fraction, Tag("<number>")] | Annotated[LinearSchedule, Tag("<line>")],
        Discriminator(lambda value: "<line>" if isinstance(value, dict | LinearSchedule) else "<number>"),
    ] = 0.15

    def schedule(self) -> LinearSchedule:
        """The rate over the run."""
        return self.rate if isinstance(self.rate, LinearSchedule) else LinearSchedule(start=self.rate, end=self.rate)


class OptimizationSettings(Section):
    """Batch, optimizer, schedule and precision."""

    global_batch_size: Annotated[int, Field(gt=0, le=1 << 20)] = 32
    per_device_train_batch_size: Positive | None = None
    gradient_checkpointing: bool = False
    optim: str = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 4e-4
    muon_learning_rate: Annotated[float, Field(gt=0)] = 5e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    adam_beta1: Probability = 0.9
    adam_beta2: Probability = 0.98
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-6
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.06
    lr_scheduler_type: str = "linear"
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: Literal["auto"] | bool = "auto"


class TrainSettings(OptimizationSettings):
    """Pretraining: its length and its intervals, in steps."""

    max_steps: Annotated[int, Field(ge=0)] = 1200
    seed: Seed = 0
    logging_steps: Positive = 10
    eval_steps: Positive = 200
    save_steps: Positive = 200
    save_minutes: Annotated[float, Field(gt=0)] | None = None
    save_total_limit: Positive = 3
    on_nonfinite_loss: Literal["stop", "skip"] = "stop"


class PretrainConfig(Section):
    """Everything that `bertlite pretrain` reads."""

    model: ModelSettings = ModelSettings()
    tokenizer: TokenizerSettings = TokenizerSettings()
    data: DataSettings
    masking: MaskingSettings = MaskingSettings()
    train: TrainSettings = TrainSettings()
    output_dir: PathText = "runs/mini"

    @model_validator(mode="after")
    def what_is_extended_exists(self) -> "PretrainConfig":
        if self.tokenizer.extend and self.tokenizer.path is None and self.model.init_from is None:
            raise ValueError(
                f"tokenizer.extend is {self.tokenizer.extend}, but there is no tokenizer to extend; "
                "set tokenizer.path or model.init_from, or raise tokenizer.vocab_size"
            )
        return self

    @model_validator(mode="after")
    def row_fits_positions(self) -> "PretrainConfig":
        length, limit = self.data.sequence_length, self.model.max_position_embeddings
        if length > limit and self.model.init_from is None:
            raise ValueError(
                f"data.sequence_length is {length}, more than model.max_position_embeddings {limit}; "
                "lower the first or raise the second"
            )
        return self


class FinetuneModel(Section):
    """Which model to begin from, and the dropout of its fine-tuning."""

    init_from: PathText | None = None
    hidden_dropout_prob: Probability = 0.1
    attention_probs_dropout_prob: Probability = 0.1


Table = Annotated[DataLocation, BeforeValidator(lambda value: {"path": value} if isinstance(value, str) else value)]


ClassWeights = Annotated[
    Annotated[Literal["balanced"], Tag("<balanced>")]
    | Annotated[dict[str, Annotated[float, Field(gt=0)]], Tag("<weights>")],
    Discriminator(lambda value: "<weights>" if isinstance(value, dict) else "<balanced>"),
    BeforeValidator(  # labels that look like numbers
        lambda value: {str(label): weight for label, weight in value.items()} if isinstance(value, dict) else value
    ),
]


class TaskSettings(Section):
    """What is learnt, from which columns of which tables, and by which metric the best checkpoint is chosen."""

    type: str = "classification"
    train: Table
    validation: Table | None = None
    validation_split: Fraction = 0.1
    test: Table | None = None
    text: Annotated[
        list[str],
        Field(min_length=1, max_length=2),
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    ] = ["text"]
    label: str = "label"
    label_separator: Annotated[str, Field(min_length=1)] = ","
    metric: str | None = None
    class_weights: ClassWeights | None = None
    max_length: Annotated[int, Field(ge=8)] = 128
    doc_stride: Positive = 64
    max_answer_length: Positive = 30
    columns: list[str] | None = None
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    quoting: bool | None = None
    encoding: str = "utf-8"

    @model_validator(mode="before")
    @classmethod
    def questions_have_columns_of_their_own(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("type") == "question-answering":
            return {"text": ["question", "context"], **values}
        return values


class FinetuneTrainSettings(OptimizationSettings):
    """Fine-tuning: its length in epochs, its seeds, and what it does beyond pretraining."""

    num_train_epochs: Annotated[float, Field(gt=0)] = 3.0
    max_steps: Positive | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    adam_beta2: Probability = 0.999
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    compile: Literal["auto"] | bool = False
    seeds: Annotated[list[Seed], Field(min_length=1)] = [0]
    logging_steps: Positive = 10
    eval_steps: Positive | None = None
    early_stopping_patience: Positive | None = None
    label_smoothing_factor: Probability = 0.0
    layerwise_lr_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    frozen_layers: Annotated[int, Field(ge=0)] = 0


class FinetuneConfig(Section):
    """Everything that `bertlite finetune` reads: one task, or several by name."""

    model: FinetuneModel = FinetuneModel()
    task: TaskSettings | None = None
    tasks: dict[str, TaskSettings] = {}
    train: FinetuneTrainSettings = FinetuneTrainSettings()
    output_dir: PathText = "runs/finetune"

    @model_validator(mode="after")
    def one_task_or_several(self) -> "FinetuneConfig":
        if (self.task is None) == (not self.tasks):
            raise ValueError("should have either task or tasks")
        return self


class Range(Section):
    """Numbers from `low` to `high`, whole ones if both are; with `log`, as many between 1 and 10 as from 10 to 100."""

    low: int | float
    high: int | float
    log: bool = False

    @model_validator(mode="after")
    def numbers_lie_between(self) -> "Range":
        if self.low >= self.high or (self.log and self.low <= 0):
            limit = f"high {self.high}" if self.low >= self.high else "0, as log needs"
            raise ValueError(f"low is {self.low}, not {'below' if self.low >= self.high else 'above'} {limit}")
        return self


class SweepSettings(Section):
    """How many trials, and what they choose from: a list of values, or a range, for each setting by its name."""

    trials: Positive = 20
    seed: Seed = 0
    space: Annotated[
        dict[
            str,
            Annotated[
                Annotated[list[Any], Field(min_length=1), Tag("<values>")] | Annotated[Range, Tag("<range>")],
                Discriminator(lambda value: "<values>" if isinstance(value, list) else "<range>"),
            ],
        ],
        Field(min_length=1),
    ]


class SweepConfig(FinetuneConfig):
    """Everything that `bertlite sweep` reads: a fine-tuning of one task, and what to vary in it."""

    sweep: SweepSettings


MAY_DIFFER_ON_RESUME = {
    "output_dir",  # names the run folder itself
    "train.logging_steps",
    "train.eval_steps",
    "train.save_steps",
    "train.save_minutes",
    "train.save_total_limit",
    "train.per_device_train_batch_size",
    "train.on_nonfinite_loss",  # a run that stopped may go on by skipping; until then both are the same
    "sweep.trials",  # more of them may follow
}
