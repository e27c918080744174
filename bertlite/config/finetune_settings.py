"""The settings of fine-tuning and of sweeps."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from bertlite.config.fields import Fraction, NonNegative, PathText, Positive, PositiveFloat, Probability, Section, Seed
from bertlite.config.settings import DataLocation, OptimizationSettings

MAX_LENGTH = 1 << 24  # more than any model reads


class FinetuneModel(Section):
    """The pretrained model, and the dropout of its fine-tuning."""

    init_from: PathText | None = None
    """Pretrained BERT: a Hugging Face folder, a hub name or a run folder; --model sets it."""
    hidden_dropout_prob: Probability = 0.1
    """Dropout of embeddings, attention outputs, feed-forward outputs and the input of the head."""
    attention_probs_dropout_prob: Probability = 0.1
    """Dropout of attention probabilities."""


def _locate(value: Any) -> Any:
    if isinstance(value, list):
        raise ValueError("path: for several files write a glob, such as 'data/*.tsv', or the folder that holds them")
    return {"path": value} if isinstance(value, str) else value


def _check_seeds(value: Any) -> Any:
    if isinstance(value, int):  # it could mean a seed or a number of them
        raise PydanticCustomError("seeds", "it should be a list of seeds, such as [0, 1, 2]")
    return value


TableLocation = Annotated[DataLocation, BeforeValidator(_locate)]
_in_list = BeforeValidator(lambda value: [value] if isinstance(value, str | int) else value)
_as_text = BeforeValidator(
    lambda value: str(value) if type(value) is int else value
)  # YAML reads some names as numbers
ColumnName = Annotated[str, _as_text]
TextColumns = Annotated[list[ColumnName], Field(min_length=1, max_length=2), _in_list]
Columns = Annotated[list[ColumnName], Field(min_length=1), _in_list]
LabelTexts = Annotated[
    list[str],
    BeforeValidator(  # YAML reads some labels as numbers
        lambda value: (
            [str(label) if type(label) is int else label for label in value] if isinstance(value, list) else value
        )
    ),
]
Delimiter = Annotated[
    str, Field(min_length=1, max_length=1), BeforeValidator(lambda value: "\t" if value == r"\t" else value)
]
ClassWeights = Annotated[
    Annotated[Literal["balanced"], Tag("<balanced>")] | Annotated[dict[str, PositiveFloat], Tag("<weights>")],
    Discriminator(lambda value: "<weights>" if isinstance(value, dict) else "<balanced>"),
    BeforeValidator(  # YAML reads some labels as numbers
        lambda value: {str(label): weight for label, weight in value.items()} if isinstance(value, dict) else value
    ),
]


class InputSettings(Section):
    """What a model reads: its type of task, the columns of its files, and how long its inputs may be."""

    type: str = "classification"
    """classification, multilabel, regression, token-classification, question-answering or multiple-choice."""
    text: TextColumns = Field(default=["text"])
    """Column of the text, or two for pairs, for [question, context], and for a context and what precedes a choice."""
    choices: Columns = Field(default=["choices"])
    """For multiple choice: the column of a list of choices, or a column for each choice."""
    label: Columns = Field(default=["label"])
    """Column of the label: text, a number, tags or spans for tokens; for multilabel also a column of 0/1 for each."""
    label_separator: Annotated[str, Field(min_length=1)] = ","
    """What separates the labels of a multilabel example, where they are not a list."""
    label_names: Annotated[LabelTexts, Field(min_length=2)] | None = None
    """Names of labels that the data give as numbers 0, 1, … or as vectors of 0 and 1, in order."""
    no_label: LabelTexts | None = None
    """Labels that mean that an example has none; null: -1 beside words, and - beside three or more labels."""
    positive_label: Annotated[str, _as_text] | None = None
    """Which of two labels f1, precision and recall are those of; null: 1 of 0 and 1, else the rarer label."""
    tag_scheme: Literal["entities", "none"] | None = None
    """What tags are: entities (B-PER, I-PER, O in any scheme) or none (each stands for itself); null: as they look."""
    sentence: ColumnName | None = None
    """Column of the sentence's number in a table with one word per row; null: a row or block of lines is a sentence."""
    on_bad_example: Literal["error", "skip"] = "error"
    """What to do with examples that cannot be used, such as an empty text: end with an error, or leave them out."""
    max_length: Annotated[int, Field(ge=8, le=MAX_LENGTH)] = 128
    """Tokens of an example; longer ones are truncated or, for tags and question answering, read in windows."""
    doc_stride: Annotated[int, Field(gt=0, le=MAX_LENGTH)] = 64
    """Tokens by which such windows overlap, for tags at most half of one; in predict of answers half, at most 128."""
    max_answer_length: Annotated[int, Field(gt=0, le=MAX_LENGTH)] = 30
    """Tokens of the longest answer."""
    null_score_diff_threshold: float | None = None
    """A question has no answer if [CLS] scores higher than the best answer by more; null: learned on validation."""
    columns: list[str] | None = None
    """Names of the columns of a file without a header."""
    delimiter: Delimiter | None = None
    """What separates columns; null: a comma in .csv, else a tab."""
    quoting: bool | None = None
    """Whether text in double quotes may contain delimiters and line ends; null: in .csv only."""
    encoding: str = "utf-8"
    """Character encoding of the files."""

    @model_validator(mode="before")
    @classmethod
    def set_columns_of_questions(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("type") == "question-answering":
            return {"text": ["question", "context"], **values}
        return values

    @model_validator(mode="after")
    def check_label_is_not_a_text(self) -> "InputSettings":
        has_label = self.type not in ("question-answering", "multiple-choice")
        for name in self.text if has_label else []:
            if name in self.label:
                raise ValueError(f"text is {name!r}, and so is label: name the column of the label")
        return self


class SavedTask(InputSettings):
    """What the folder of a fine-tuned model says in task.json: the inputs that the model was trained on.

    A `null_score_diff_threshold` that was not set is the one with the best F1 on the validation set, or null if all of
    its questions have an answer.
    """


class TaskSettings(InputSettings):
    """The task: what the model reads, its data, and its metric."""

    train: TableLocation
    """Training examples: tables (.tsv, .csv, .jsonl, .parquet, CoNLL, fastText), class folders, a dataset, sample."""
    validation: TableLocation | None = None
    """Validation examples, which choose the best checkpoint; null: some of the training examples."""
    validation_split: Fraction = 0.1
    """Fraction of the training examples that are the validation set where task.validation is null."""
    test: TableLocation | None = None
    """Test examples, which the results are measured on; null: the validation examples."""
    metric: str | None = None
    """Metric that chooses the best checkpoint; null: the first one of the task's type, or of its kind of tags."""
    class_weights: ClassWeights | None = None
    """Weights of the labels in the loss: balanced, or a number for each label, such as {spam: 2}; null: equal."""


class FinetuneTrainSettings(OptimizationSettings):
    """Fine-tuning: optimization, length in epochs, seeds, and regularization."""

    num_train_epochs: PositiveFloat = 3.0
    """Number of epochs."""
    max_steps: Positive | None = None
    """Number of optimizer steps, in place of num_train_epochs."""
    learning_rate: PositiveFloat = 2e-5
    """Peak learning rate of AdamW; 2e-5 suits base and large models, up to 5e-4 small ones."""
    adam_beta2: Probability = 0.999
    """Decay of AdamW's mean of squared gradients."""
    adam_epsilon: PositiveFloat = 1e-8
    """Constant that AdamW adds to the denominator."""
    compile: Literal["auto"] | bool = False
    """Whether torch.compile is used; it takes about a minute before the first step."""
    seeds: Annotated[list[Seed], BeforeValidator(_check_seeds)] = Field(default=[0], min_length=1)
    """Seeds; one model is trained with each."""
    logging_steps: Positive = 10
    """Steps between training lines of metrics.jsonl."""
    eval_steps: Positive | None = None
    """Steps between evaluations on the validation set; null: once an epoch."""
    early_stopping_patience: Positive | None = None
    """Stop after this number of evaluations without a better one."""
    label_smoothing_factor: Probability = 0.0
    """Label smoothing, for labels and tags."""
    layerwise_lr_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor between the learning rates of a layer and of the layer above it, such as 0.9."""
    frozen_layers: NonNegative = 0
    """Number of layers that are not trained, from the lowest; any also freezes the embeddings."""


class FinetuneConfig(Section):
    """All settings of `bertlite finetune`: one task, or several by name."""

    model: FinetuneModel = FinetuneModel()
    task: TaskSettings | None = None
    """The task, if there is one."""
    tasks: dict[str, TaskSettings] = Field(default={})
    """Several tasks by name, in place of task."""
    train: FinetuneTrainSettings = FinetuneTrainSettings()
    output_dir: PathText = "runs/finetune"
    """Run folder; --out sets it."""

    @model_validator(mode="after")
    def check_task_or_tasks(self) -> "FinetuneConfig":
        if (self.task is None) == (not self.tasks):
            raise ValueError("should have either task or tasks")
        return self


class Range(Section):
    """Numbers from `low` to `high`; whole numbers if both are."""

    low: int | float
    """Smallest value."""
    high: int | float
    """Largest value."""
    log: bool = False
    """Search on a logarithmic scale."""

    @model_validator(mode="after")
    def check_low_is_below_high(self) -> "Range":
        if self.low >= self.high:
            raise ValueError(f"low is {self.low}, not below high {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low}, not above 0, as log needs")
        return self


class SweepSettings(Section):
    """A search: the number of trials, and the values that they choose from."""

    trials: Positive = 20
    """Number of trials."""
    seed: Seed = 0
    """Seed of the search."""
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
    """Settings by dotted name, each with a list of values or a range."""


class SweepConfig(FinetuneConfig):
    """All settings of `bertlite sweep`: a fine-tuning of one task, and a search."""

    sweep: SweepSettings
