"""What can be learnt on top of the encoder: for each type of task its head, labels, examples, loss and metrics."""

# Shapes: R rows, T positions of a row, P places of a row for an example, L labels.
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bertlite.config.finetune_settings import TaskSettings
from bertlite.data.formats import Record
from bertlite.finetuning.examples import (
    Examples,
    answer_examples,
    answers_of,
    class_examples,
    class_labels,
    multilabel_examples,
    multilabel_labels,
    regression_examples,
    tag_examples,
    tag_labels,
    words_and_tags,
)
from bertlite.finetuning.losses import answer_loss, label_loss, multilabel_loss, regression_loss
from bertlite.finetuning.metrics import ANSWERS, CLASSIFICATION, ENTITIES, MULTILABEL, REGRESSION, Measure
from bertlite.model.heads import Classifier, QuestionAnswerer, SequenceClassifier, TokenClassifier


def decode_tags(
    outputs: list[NDArray[np.float32]],
    examples: Examples,
    rows: list[Record],
    labels: list[str],
    settings: TaskSettings,
) -> list[list[str]]:
    """A tag for each word; O for words that were cut off."""
    results = []
    for output, firsts, row in zip(outputs, examples.spans, rows, strict=True):
        tags = ["O"] * len(row.columns[settings.text[0]])
        for word, place in firsts.items():
            tags[word] = labels[int(output[place].argmax())]
        results.append(tags)
    return results


def best_answers(
    outputs: list[NDArray[np.float32]], examples: Examples, contexts: list[str], most: int
) -> list[dict[str, Any]]:
    """The likeliest answer of at most `most` tokens in any piece of each context: `score`, `start`, `end`, `answer`.

    Spans are compared by the sum of their scores, as in Devlin et al. 2018, section 4.2; `score` is their
    probability within the piece.
    """
    nothing = {"score": 0.0, "start": 0, "end": 0, "answer": ""}
    best: list[tuple[float, dict[str, Any]]] = [(-math.inf, nothing)] * len(contexts)
    for output, owner, spans in zip(outputs, examples.owners, examples.spans, strict=True):
        allowed = np.array([span is not None and span[1] > span[0] for span in spans])
        sums = np.where(allowed, output[:, 0], -np.inf)[:, None] + np.where(allowed, output[:, 1], -np.inf)[None]
        sums = np.where(np.tril(np.triu(np.ones_like(sums)), most - 1) > 0, sums, -np.inf)
        start, end = np.unravel_index(int(sums.argmax()), sums.shape)
        if sums[start, end] > best[owner][0]:
            normal = np.logaddexp.reduce(output[:, 0]) + np.logaddexp.reduce(output[:, 1])
            score, first, last = float(np.exp(sums[start, end] - normal)), spans[start][0], spans[end][1]
            answer = {"score": score, "start": first, "end": last, "answer": contexts[owner][first:last]}
            best[owner] = float(sums[start, end]), answer
    return [answer for _, answer in best]


def _decode_answers(
    outputs: list[Any], examples: Examples, rows: list[Record], labels: list[str], settings: TaskSettings
) -> list[str]:
    contexts = [row.columns[settings.text[1]] for row in rows]
    return [found["answer"] for found in best_answers(outputs, examples, contexts, settings.max_answer_length)]


@dataclass(frozen=True)
class Task:
    """A type of task. `labels` names the head's outputs; `decode` turns outputs into what `metrics` compare with
    `references`, one for each row."""

    head: type[Classifier]
    problem_type: str | None
    metrics: dict[str, Measure]
    labels: Callable[[list[Record], TaskSettings], list[str]]
    examples: Callable[[list[Record], list[str], PreTrainedTokenizerBase, TaskSettings], Examples]
    loss: Callable[..., tuple[Tensor, Tensor]]
    decode: Callable[[list[Any], Examples, list[Record], list[str], TaskSettings], list[Any]]
    references: Callable[[list[Record], Examples, TaskSettings], list[Any]]


# Keys of task.type.
TASKS = {
    "classification": Task(
        SequenceClassifier, "single_label_classification", CLASSIFICATION, class_labels, class_examples, label_loss,
        decode=lambda outputs, *_: [int(output.argmax()) for output in outputs],
        references=lambda rows, examples, settings: examples.targets,
    ),
    "multilabel": Task(
        SequenceClassifier, "multi_label_classification", MULTILABEL, multilabel_labels, multilabel_examples,
        multilabel_loss,
        decode=lambda outputs, *_: [(output > 0).astype(int) for output in outputs],
        references=lambda rows, examples, settings: [target.astype(int) for target in examples.targets],
    ),
    "regression": Task(
        SequenceClassifier, "regression", REGRESSION, lambda rows, settings: [settings.label], regression_examples,
        regression_loss,
        decode=lambda outputs, *_: [float(output[0]) for output in outputs],
        references=lambda rows, examples, settings: [float(target) for target in examples.targets],
    ),
    "token-classification": Task(
        TokenClassifier, None, ENTITIES, tag_labels, tag_examples, label_loss, decode_tags,
        references=lambda rows, examples, settings: [words_and_tags(row, settings)[1] for row in rows],
    ),
    "question-answering": Task(
        QuestionAnswerer, None, ANSWERS, lambda rows, settings: ["start", "end"], answer_examples, answer_loss,
        _decode_answers,
        references=lambda rows, examples, settings: [answers_of(row)[0] or [""] for row in rows],
    ),
}  # fmt: skip
