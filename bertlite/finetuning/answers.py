"""Question answering: the answers of records, examples and targets, the loss, and the answers that scores mean."""

# Shapes: B sequences, T positions of a sequence, E places for examples in a sequence.
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tokenizers import Encoding
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bertlite.config.finetune_settings import InputSettings
from bertlite.core.errors import UserError
from bertlite.core.logging import logger
from bertlite.data.formats import Record
from bertlite.data.masking import IGNORED
from bertlite.data.tables import get_column
from bertlite.finetuning.batches import TaskBatch
from bertlite.finetuning.decoding import Outputs, Scores
from bertlite.finetuning.examples import Examples, without_labels
from bertlite.finetuning.labels import read_input_texts


def read_answers(record: Record) -> tuple[list[str], list[int]]:
    """Read the texts of a question's answers, and at which character of the context each starts."""
    answers = get_column(record, "answers", "SQuAD's format")
    try:
        return [str(text) for text in answers["text"]], [int(start) for start in answers["answer_start"]]
    except (TypeError, KeyError, ValueError, OverflowError):
        raise UserError(f"{record.location}: answers should hold the lists text and answer_start") from None


def find_first_answer(record: Record, settings: InputSettings) -> tuple[int, int] | None:
    """Return the start and end of a question's first answer, in characters of the context.

    Returns None unless the context holds the answer's text at that position.
    """
    texts, starts = read_answers(record)
    if not (texts and starts and texts[0]):
        return None
    start, end = starts[0], starts[0] + len(texts[0])
    return (start, end) if record.columns[settings.text[1]][start:end] == texts[0] else None


def encode_questions(
    texts: Sequence[tuple[str, ...]], tokenizer: PreTrainedTokenizerBase, settings: InputSettings
) -> Examples:
    """Tokenize questions with their contexts. A long context gives examples that overlap by `doc_stride` tokens.

    Questions are truncated so that a context token beyond the overlap fits. Raises UserError if none would fit.
    """
    max_question = settings.max_length - settings.doc_stride - 4  # [CLS], [SEP], [SEP], and that context token
    if max_question < 1:
        raise UserError(
            f"task.doc_stride is {settings.doc_stride}, which leaves no room for the question in task.max_length "
            f"{settings.max_length}; raise task.max_length"
        )
    questions, contexts = map(list, zip(*texts, strict=True))
    for number, encoding in enumerate(tokenizer(questions, add_special_tokens=False, verbose=False).encodings):
        if len(encoding) > max_question:
            questions[number] = questions[number][: encoding.offsets[max_question - 1][1]]
    encoded = tokenizer(
        questions,
        contexts,
        truncation="only_second",
        max_length=settings.max_length,
        stride=settings.doc_stride,
        return_overflowing_tokens=True,
        verbose=False,
    )
    return without_labels(encoded.encodings, encoded["overflow_to_sample_mapping"], texts, tokenizer)


def context_offsets(encoding: Encoding) -> NDArray[np.int64]:
    """Return the characters (n,2), start and end, of the context that each token stands for; (0, 0) outside of it."""
    in_context = np.array(encoding.sequence_ids, dtype=object) == 1
    return np.where(in_context[:, None], np.array(encoding.offsets), 0)


def answer_examples(
    records: list[Record], labels: list[str], tokenizer: PreTrainedTokenizerBase, settings: InputSettings
) -> Examples:
    """The target is the first and the last token of the answer, or [CLS] twice in an example without the answer."""
    examples = encode_questions(read_input_texts(records, settings), tokenizer, settings)
    answers = [find_first_answer(record, settings) for record in records]
    missing = [record.location for record, answer in zip(records, answers, strict=True) if answer is None]
    if missing:
        logger.warning(
            f"{len(missing):,} of {len(records):,} questions have no answer at their answer_start, such as "
            f"{missing[0]}; they do not count in the loss"
        )
    targets = [
        answer_tokens(encoding, answers[index])
        for encoding, index in zip(examples.encodings, examples.record_indices, strict=True)
    ]
    return replace(examples, targets=targets, references=[read_answers(record)[0] or [""] for record in records])


def answer_tokens(encoding: Encoding, answer: tuple[int, int] | None) -> NDArray[np.int64]:
    """Return the positions of an answer's first and last token, given its characters (start, end) in the context.

    Returns [0, 0], which is [CLS], if the encoding does not hold the whole answer; IGNORED for an unknown answer.
    """
    if answer is None:
        return np.full(2, IGNORED)
    starts, ends = context_offsets(encoding).T
    tokens = np.flatnonzero((starts < answer[1]) & (ends > answer[0]))
    if len(tokens) and starts[tokens[0]] <= answer[0] and ends[tokens[-1]] >= answer[1]:
        return tokens[[0, -1]]
    return np.zeros(2, np.int64)


def answer_loss(scores: Tensor, batch: TaskBatch) -> tuple[Tensor, Tensor]:
    """Cross entropy of start and end, averaged, among the tokens of the example (Devlin et al. 2018, section 4.2)."""
    first_tokens = batch.prediction_positions  # labels are relative to it, scores are per position of the sequence
    labels = torch.where(batch.labels == IGNORED, IGNORED, batch.labels + first_tokens[..., None])  # (B,E,2)
    numbers = torch.arange(1, first_tokens.shape[1] + 1, device=scores.device)
    inside = (batch.document_ids[:, None] == numbers[:, None])[:, :, None]  # (B,E,1,T)
    scores = scores.float().transpose(1, 2)[:, None].masked_fill(~inside, torch.finfo(torch.float32).min)  # (B,E,2,T)
    losses = F.cross_entropy(scores.flatten(0, 2), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(labels.shape).mean(-1), labels[..., 0] != IGNORED


def find_best_answers(outputs: Outputs) -> list[dict[str, Any]]:
    """Return the best answer of at most `max_answer_length` tokens to each question: `score, start, end, answer`.

    Of all examples that a context is split into, the span with the largest sum of start and end score is taken (Devlin
    et al. 2018, section 4.2); `score` is the span's probability within its example, `start` and `end` are characters.
    """
    examples = outputs.examples
    no_answer = {"score": 0.0, "start": 0, "end": 0, "answer": ""}
    best: list[tuple[float, dict[str, Any]]] = [(-math.inf, no_answer)] * len(examples.texts)
    for scores, record, encoding in zip(outputs.scores, examples.record_indices, examples.encodings, strict=True):
        starts, ends = context_offsets(encoding).T
        first, last, total = find_best_span(scores, starts < ends, outputs.settings.max_answer_length)
        if total > best[record][0]:
            log_normalizer = np.logaddexp.reduce(scores[:, 0]) + np.logaddexp.reduce(scores[:, 1])
            probability, start, end = float(np.exp(total - log_normalizer)), int(starts[first]), int(ends[last])
            answer = {"score": probability, "start": start, "end": end, "answer": examples.texts[record][1][start:end]}
            best[record] = float(total), answer
    return [answer for _, answer in best]


def find_best_span(scores: Scores, allowed: NDArray[np.bool_], max_length: int) -> tuple[int, int, np.floating[Any]]:
    """Return the span of allowed tokens with the largest sum of start and end score: first, last, and that sum.

    Entry [i, j] of the matrix of sums is the score of the span i … j. With `max_length` 2, only the diagonal (spans of
    one token) and the one above it (spans of two) are valid; all other entries are -inf.
    """
    starts, ends = (np.where(allowed, scores[:, column], -np.inf) for column in (0, 1))
    sums = starts[:, None] + ends[None]
    valid = np.tril(np.triu(np.ones_like(sums)), max_length - 1) > 0
    sums = np.where(valid, sums, -np.inf)
    first, last = np.unravel_index(int(sums.argmax()), sums.shape)
    return int(first), int(last), sums[first, last]
