"""The types of task: for each its head, labels, examples, loss, metrics and results, in one table."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from bertlite.config.finetune_settings import InputSettings, SavedTask
from bertlite.config.loading import choose
from bertlite.core.errors import UserError
from bertlite.data.formats import Record
from bertlite.finetuning import (
    answer_metrics,
    answers,
    choices,
    decoding,
    examples,
    label_lists,
    labels,
    losses,
    metrics,
    tags,
)
from bertlite.finetuning.decoding import Outputs
from bertlite.finetuning.examples import Examples
from bertlite.finetuning.metrics import Metric, ScoresByLabel
from bertlite.model.heads import Classifier, MultipleChoice, QuestionAnswerer, SequenceClassifier, TokenClassifier

SINGLE_OR_PAIR, SINGLE, PAIR = (1, 2), (1,), (2,)


@dataclass(frozen=True)
class Task:
    """A type of task: its head, and the functions that make examples of records and predictions of outputs."""

    head: type[Classifier]
    problem_type: str | None  # Hugging Face's name for what the outputs of SequenceClassifier mean
    metrics: dict[str, Metric]  # the first is the default
    num_texts: tuple[int, ...]  # how many text columns an example may have
    output_labels: Callable[[list[Record], InputSettings], list[str]]  # names of the outputs, from training records
    make_examples: Callable[[list[Record], list[str], PreTrainedTokenizerBase, InputSettings], Examples]
    encode: Callable[[list[tuple[str, ...]], PreTrainedTokenizerBase, InputSettings], Examples]  # texts without labels
    loss: losses.Loss
    decode: Callable[[Outputs], list[Any]]  # the predictions that metrics compare with the references
    results: Callable[[Outputs, int], Iterable[Any]]  # what `predict` returns, of the `top_k` best labels
    tabulate: Callable[[Any], dict[str, Any]] = decoding.tabulate  # a result as columns of the table of `predict --out`
    lists_all_labels: bool = False  # that table has the scores of all labels
    # Settings that follow from the training examples and their labels.
    settle: Callable[[list[Record], list[str], InputSettings], dict[str, Any]] = lambda records, labels, settings: {}
    learn: Callable[[Outputs], dict[str, Any]] = lambda outputs: {}  # settings that follow from the validation set
    details: Callable[[list[Any], list[Any]], dict[str, float]] = lambda references, predictions: {}  # further scores
    read_texts: Callable[[Record, InputSettings], tuple[Any, ...]] = labels.read_texts  # raises for a bad record
    read_unlabelled: Callable[[Record, InputSettings], tuple[str, ...]] = labels.read_unlabelled  # texts to predict for
    split_line: Callable[[str, str, InputSettings], Record] = labels.split_line  # of a line of text and its location
    read_labels: Callable[[Record, InputSettings], list[str]] = lambda record, settings: []  # names; raises likewise
    are_labelled: Callable[[list[Record], InputSettings, list[str]], list[bool]] = (
        lambda records, settings, known_labels: [True] * len(records)
    )
    # The metrics of a model with these labels, the named one among them, if not all of `metrics`.
    choose_metrics: Callable[[list[str], InputSettings, str | None], dict[str, Metric]] | None = None
    score_labels: Callable[[list[Any], list[Any], list[str], InputSettings], ScoresByLabel] | None = None
    describe: Callable[[Any, list[str]], Any] = lambda prediction, labels: prediction  # as worst.jsonl shows it
    is_correct: Callable[[Any, Any], bool] | None = np.array_equal  # of a reference and a prediction; None: neither
    single_label: bool = False  # each example has exactly one of the labels: a confusion matrix makes sense
    label_weights: bool = False  # the loss takes class weights and label smoothing

    def metrics_of(self, labels: list[str], settings: InputSettings, metric: str | None = None) -> dict[str, Metric]:
        """Return the metrics of a model with these labels, `metric` among them; the first one is the default."""
        return self.choose_metrics(labels, settings, metric) if self.choose_metrics else self.metrics


# Keys of task.type.
TASKS = {
    "classification": Task(
        SequenceClassifier, "single_label_classification", metrics.CLASSIFICATION, SINGLE_OR_PAIR,
        labels.collect_classes, examples.classification_examples, examples.encode_texts, losses.label_loss,
        decode=lambda outputs: [int(scores.argmax()) for scores in outputs.scores],
        results=decoding.rank_classes,
        read_labels=lambda record, settings: [labels.read_label(record, settings)],
        are_labelled=labels.have_label,
        settle=labels.choose_positive_label, choose_metrics=metrics.classification_metrics,
        score_labels=metrics.score_labels,
        describe=lambda prediction, labels: labels[prediction],
        single_label=True, label_weights=True,
    ),
    "multilabel": Task(
        SequenceClassifier, "multi_label_classification", metrics.MULTILABEL, SINGLE_OR_PAIR,
        label_lists.collect_labels, examples.multilabel_examples, examples.encode_texts, losses.multilabel_loss,
        decode=lambda outputs: [(scores > 0).astype(int) for scores in outputs.scores],
        results=lambda outputs, top_k: decoding.rank_labels(outputs, top_k, decoding.sigmoid),
        tabulate=decoding.tabulate_labels, lists_all_labels=True,
        read_labels=label_lists.read_label_list, are_labelled=label_lists.have_label_columns,
        score_labels=metrics.score_labels,
        describe=lambda prediction, labels: [label for label, has in zip(labels, prediction, strict=True) if has],
    ),
    "regression": Task(
        SequenceClassifier, "regression", metrics.REGRESSION, SINGLE_OR_PAIR,
        lambda records, settings: settings.label, examples.regression_examples, examples.encode_texts,
        losses.regression_loss,
        decode=lambda outputs: [float(scores[0]) for scores in outputs.scores],
        results=lambda outputs, top_k: decoding.rank_labels(outputs, top_k, lambda scores: scores),
        tabulate=decoding.tabulate_number,
        read_labels=labels.check_number,
        are_labelled=labels.have_number,
        is_correct=None,
    ),
    "token-classification": Task(
        TokenClassifier, None, metrics.ENTITIES, SINGLE,
        tags.collect_tags, tags.tag_examples, tags.encode_sentences, losses.label_loss,
        decode=tags.decode_tags,
        results=lambda outputs, top_k: tags.find_entities(outputs),
        read_texts=tags.read_texts, read_unlabelled=tags.read_unlabelled,
        read_labels=tags.read_labels, settle=tags.settle_scheme,
        choose_metrics=tags.tag_metrics,
        score_labels=tags.score_tags,
        label_weights=True,
    ),
    "question-answering": Task(
        QuestionAnswerer, None, answer_metrics.ANSWERS, PAIR,
        lambda records, settings: ["start", "end"], answers.answer_examples, answers.encode_for_pipeline,
        answers.answer_loss,
        decode=answers.decode_answers,
        results=lambda outputs, top_k: answers.find_pipeline_answers(outputs),
        read_labels=answers.check_answers,
        learn=answers.learn_null_threshold,
        details=answer_metrics.scores_by_answerability,
        is_correct=answer_metrics.is_correct,
    ),
    "multiple-choice": Task(
        MultipleChoice, None, metrics.CHOICES, SINGLE_OR_PAIR,
        choices.collect_choice_names, choices.choice_examples, choices.encode_choices, choices.choice_loss,
        decode=choices.decode_choices,
        results=choices.rank_choices,
        read_texts=choices.read_fields, read_unlabelled=choices.read_unlabelled, split_line=choices.split_line,
        are_labelled=choices.have_right_choice,
        describe=choices.describe_choice,
    ),
}  # fmt: skip


def find_task(model: Classifier) -> Task:
    """Return the task that a fine-tuned model does: as task.json says or, without one, by its head and problem type.

    Raises UserError for a task.json that does not go with the model.
    """
    if model.task is not None:
        task: Task = choose(TASKS, model.task.type, "task.json: type")
        if task.head is not type(model) or len(model.task.text) not in task.num_texts:
            raise UserError(
                f"task.json: {model.task.type} of {len(model.task.text)} text columns is no task of the folder's "
                f"{type(model).__name__}"
            )
        return task
    tasks = [task for task in TASKS.values() if task.head is type(model)]
    return next((task for task in tasks if task.problem_type == model.problem_type), tasks[0])


def saved_task(settings: InputSettings) -> SavedTask:
    """Return what task.json keeps of the settings of a task."""
    return SavedTask.model_validate(settings.model_dump(include=set(SavedTask.model_fields)))


def input_settings(model: Classifier, tokenizer: PreTrainedTokenizerBase) -> SavedTask:
    """Return what a fine-tuned model reads: its task.json, or defaults; with a `max_length` that fits the model."""
    length = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    if model.task is not None:
        return model.task.model_copy(update={"max_length": min(model.task.max_length, length)})
    kind = next(name for name, task in TASKS.items() if task is find_task(model))
    return SavedTask(type=kind, max_length=length, doc_stride=min(64, length // 4))
