"""The splits of a task: train, validation and perhaps test, read from its tables and tokenized."""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from bertlite.config.finetune_settings import InputSettings, TaskSettings
from bertlite.core.errors import UserError
from bertlite.core.files import fingerprint
from bertlite.core.logging import logger
from bertlite.core.random import choose_validation
from bertlite.data.columns import get_column
from bertlite.data.formats import Record
from bertlite.data.summary import MAX_UNKNOWN
from bertlite.data.tables import read_records
from bertlite.finetuning.batches import ExampleBatches
from bertlite.finetuning.examples import Examples
from bertlite.finetuning.labels import find_label_indices, list_counts, list_some
from bertlite.finetuning.tasks import Task

MAX_PLACES = 5  # rows that cannot be used and are left out, of which the places are logged


class Names(NamedTuple):
    """How messages name what a user may change."""

    text: str = "task.text"
    label: str = "task.label"
    skip: str = "task.on_bad_example: skip"


IN_YAML = Names()
ON_COMMAND_LINE = Names("--column", "--label", "--on-bad-example skip")


@dataclass(frozen=True)
class Split:
    """A split of a task (train, validation or test): its records, their examples, and batches of those."""

    records: list[Record]
    examples: Examples
    batches: ExampleBatches


def read_tables(task: Task, settings: TaskSettings) -> tuple[list[str], dict[str, list[Record]], TaskSettings]:
    """Read the tables of a task: the labels of the training table, the records of each split, and the settings with
    those that follow from the training table.

    Without `task.validation`, a share of the training records becomes the validation split.
    """
    train = read_records(settings.train, settings, "task.train")
    records = {"train": select_examples(train, task, settings, "task.train", [])}
    labels = task.output_labels(records["train"], settings)
    settings = settings.model_copy(update=task.settle(records["train"], labels, settings))
    for name, table in {"validation": settings.validation, "test": settings.test}.items():
        if table is not None:
            split_records = read_records(table, settings, f"task.{name}")
            records[name] = select_examples(split_records, task, settings, f"task.{name}", labels)
    if settings.validation is None:
        if len(records["train"]) < 2:
            raise UserError("task.train holds one example, too few to split off validation; set task.validation")
        chosen = choose_validation(len(records["train"]), settings.validation_split)
        pairs = list(zip(records["train"], chosen, strict=True))
        records["validation"] = [record for record, is_chosen in pairs if is_chosen]
        records["train"] = [record for record, is_chosen in pairs if not is_chosen]
    return labels, records, settings


def select_examples(
    records: list[Record],
    task: Task,
    settings: InputSettings,
    setting: str,
    labels: list[str],
    names: Names = IN_YAML,
) -> list[Record]:
    """Return the records that can be used as examples, and log how many are left out, and why.

    `labels` are those that the training examples have; [] if these are the training examples. Raises UserError if no
    record has a label and, unless `on_bad_example` is skip, for those that cannot be used.
    """
    check_columns(records, settings, names)
    are_labelled = task.are_labelled(records, settings, labels)
    labelled = [record for record, has_label in zip(records, are_labelled, strict=True) if has_label]
    if not labelled:
        advice = "test sets are often published without labels; leave this one out, and bertlite predict labels it"
        raise UserError(f"{setting}: none of the {len(records):,} rows has a label in {settings.label[0]!r}; {advice}")
    if len(labelled) < len(records):
        missing = len(records) - len(labelled)
        logger.info(f"{setting}: {missing:,} of {len(records):,} rows have no label and are left out (task.no_label)")
    usable, problems, known = [], {}, set(labels)
    for record in labelled:
        try:
            task.read_texts(record, settings)
            own_labels = task.read_labels(record, settings)
            if labels and not known.issuperset(own_labels):
                find_label_indices(own_labels, labels, record)
            usable.append(record)
        except UserError as error:
            problems[record.location] = str(error)
    if problems:
        report_problems(problems, len(labelled), settings, setting, names)
    return usable


def check_columns(records: list[Record], settings: InputSettings, names: Names) -> None:
    """Raise UserError if no record has the column of a text or of the label."""
    labels = settings.label if settings.type != "question-answering" else []
    for column in [*settings.text, *labels]:
        if not any(column in record.columns for record in records):
            get_column(records[0], column, names.label if column in labels else names.text)


def report_problems(
    problems: dict[str, str], num_rows: int, settings: InputSettings, setting: str, names: Names
) -> None:
    """Log the problems, by location, of the rows that cannot be used. Raises UserError instead if all or none may be
    left out."""
    first = next(iter(problems.values()))
    count = f"{len(problems):,} of {num_rows:,} rows cannot be used"
    if len(problems) == num_rows:
        raise UserError(first)
    if settings.on_bad_example == "error":
        raise UserError(f"{first}\n{setting}: {count}; {names.skip} leaves them out")
    places = "".join(f"; {location.rsplit('/')[-1]}" for location in list(problems)[1:MAX_PLACES])
    more = f"{places}; …" if len(problems) > MAX_PLACES else places
    logger.warning(f"{setting}: {count} and are left out: {first}{more}")


def tokenize_splits(
    records: dict[str, list[Record]],
    task: Task,
    labels: list[str],
    tokenizer: PreTrainedTokenizerBase,
    settings: TaskSettings,
) -> dict[str, Split]:
    """Make the examples and batches of each split, with sequences of the training split's length where they fit."""
    splits: dict[str, Split] = {}
    for name, split_records in records.items():
        examples = task.make_examples(split_records, labels, tokenizer, settings)
        sequence_length = splits["train"].batches.sequence_length if splits else 0
        batches = ExampleBatches(examples, tokenizer.pad_token_id, sequence_length=sequence_length)
        splits[name] = Split(split_records, examples, batches)
        log_split(name, splits[name], task, labels, settings)
        warn_of_unknown(name, *examples.count_unknown(tokenizer))
        if name != "train":
            warn_of_training_texts(name, examples, splits["train"].examples)
    return splits


def log_split(name: str, split: Split, task: Task, labels: list[str], settings: InputSettings) -> None:
    """Log the size of a split, and warn of labels that none of its examples has."""
    num_truncated, padding = split.examples.num_truncated, split.batches.padding
    truncated = f"; {num_truncated:,} truncated to task.max_length {settings.max_length}" if num_truncated else ""
    counts = Counter(label for record in split.records for label in task.read_labels(record, settings))
    labelled = f" ({list_counts(counts)})" if counts else ""
    logger.info(
        f"{name}: {len(split.records):,} examples{labelled}, {padding:.1%} of the positions are padding{truncated}"
    )
    if task.single_label:
        present = set(split.examples.targets)
        absent = [label for index, label in enumerate(labels) if index not in present]
        if absent:
            consequence = "learned" if name == "train" else "measured"
            subject, result = ("label", "it is") if len(absent) == 1 else ("labels", "they are")
            logger.warning(f"{name}: no example has the {subject} {list_some(absent)}, so {result} not {consequence}")


def warn_of_unknown(name: str, num_unknown: int, num_tokens: int) -> None:
    """Warn if the model's vocabulary does not fit the texts."""
    if num_unknown > MAX_UNKNOWN * num_tokens:
        share = num_unknown / num_tokens
        logger.warning(f"{name}: {share:.1%} of the tokens are unknown; the model's vocabulary is of other text")


def warn_of_training_texts(name: str, examples: Examples, training: Examples) -> None:
    """Warn of texts that are also training examples: the scores on them say little about new texts."""
    known = set(map(repr, training.texts))
    shared = sum(repr(text) in known for text in examples.texts)
    if shared:
        logger.warning(f"{name}: {shared:,} of {len(examples.texts):,} texts are also in train")


def fingerprint_data(splits: dict[str, Split]) -> str:
    """Return a digest of all examples of a run: a resumed run must read the same ones."""
    contents = []
    for split in splits.values():
        ids = [encoding.ids for encoding in split.examples.encodings]
        contents.append([ids, [np.asarray(target).tolist() for target in split.examples.targets]])
    return fingerprint(contents)
