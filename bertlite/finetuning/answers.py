"""Question answering: the answers of records, examples and targets, the loss, and the answers that scores mean."""

# Shapes: B sequences, T positions of a sequence, E places for examples in a sequence.
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
from bertlite.data.columns import get_column
from bertlite.data.formats import Record
from bertlite.data.masking import IGNORED
from bertlite.finetuning.answer_metrics import choose_null_threshold
from bertlite.finetuning.batches import TaskBatch
from bertlite.finetuning.decoding import Outputs, Scores
from bertlite.finetuning.examples import Examples, without_labels
from bertlite.finetuning.labels import read_input_texts

NO_SPAN = -1e6  # less than any sum of scores


def read_answers(record: Record) -> tuple[list[str], list[int]]:
    """Read the texts of a question's answers, and at which character of the context each starts.

    There are none if the question is unanswerable: if `is_impossible` is true, or the lists are empty.
    """
    answers = get_column(record, "answers", "SQuAD's format")
    try:
        texts, starts = [str(text) for text in answers["text"]], [int(start) for start in answers["answer_start"]]
    except (TypeError, KeyError, ValueError, OverflowError):
        raise UserError(f"{record.location}: answers should hold the lists text and answer_start") from None
    return ([], []) if record.columns.get("is_impossible") is True else (texts, starts)


def check_answers(record: Record, settings: InputSettings) -> list[str]:
    """Return no label for a question. Raises UserError as `read_answers` does."""
    read_answers(record)
    return []


def find_first_answer(record: Record, settings: InputSettings) -> tuple[int, int] | None:
    """Return the start and end of a question's first answer, in characters of the context.

    Returns (0, 0) for an unanswerable question, and None if the answer is missing: the context does not hold its text
    at that position, or there is none although `is_impossible` is false.
    """
    texts, starts = read_answers(record)
    if not texts and record.columns.get("is_impossible") is not False:
        return 0, 0
    if not (texts and starts and texts[0]):
        return None
    start, end = starts[0], starts[0] + len(texts[0])
    return (start, end) if record.columns[settings.text[1]][start:end] == texts[0] else None


def encode_questions(
    texts: Sequence[tuple[str, ...]], tokenizer: PreTrainedTokenizerBase, settings: InputSettings
) -> Examples:
    """Tokenize questions with their contexts. A long context gives examples that overlap by `doc_stride` tokens.

    Questions are truncated, which is logged, so that a context token beyond the overlap fits. Raises UserError if none
    would fit.
    """
    max_question = settings.max_length - settings.doc_stride - 4  # [CLS], [SEP], [SEP], and that context token
    if max_question < 1:
        raise UserError(
            f"task.doc_stride is {settings.doc_stride}, which leaves no room for the question in task.max_length "
            f"{settings.max_length}; raise task.max_length"
        )
    questions, contexts = map(list, zip(*texts, strict=True))
    tokenized = tokenizer(questions, add_special_tokens=False, verbose=False).encodings
    too_long = [number for number, encoding in enumerate(tokenized) if len(encoding) > max_question]
    for number in too_long:
        questions[number] = questions[number][: tokenized[number].offsets[max_question - 1][1]]
    if too_long:
        logger.warning(
            f"{len(too_long):,} questions, such as {texts[too_long[0]][0][:60]!r}, are truncated to the {max_question} "
            f"tokens that task.max_length {settings.max_length} leaves beside an overlap of {settings.doc_stride}"
        )
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


def encode_for_pipeline(
    texts: Sequence[tuple[str, ...]], tokenizer: PreTrainedTokenizerBase, settings: InputSettings
) -> Examples:
    """Tokenize questions with their contexts as Hugging Face's question-answering pipeline does.

    An example has at most 384 tokens; the parts of a context overlap by half of that, at most by 128 tokens.
    """
    max_length = min(settings.max_length, 384)
    changes = {"max_length": max_length, "doc_stride": min(max_length // 2, 128)}
    return encode_questions(texts, tokenizer, settings.model_copy(update=changes))


def answer_examples(
    records: list[Record], labels: list[str], tokenizer: PreTrainedTokenizerBase, settings: InputSettings
) -> Examples:
    """The target is the first and the last token of the answer, or [CLS] twice in an example without the answer.

    So it is in all examples of an unanswerable question. A missing answer does not count in the loss.
    """
    examples = encode_questions(read_input_texts(records, settings), tokenizer, settings)
    answers = [find_first_answer(record, settings) for record in records]
    log_questions_without_answer(records, answers)
    targets = [
        answer_tokens(encoding, answers[index])
        for encoding, index in zip(examples.encodings, examples.record_indices, strict=True)
    ]
    return replace(examples, targets=targets, references=[read_answers(record)[0] or [""] for record in records])


def log_questions_without_answer(records: list[Record], answers: list[tuple[int, int] | None]) -> None:
    """Log how many questions are unanswerable, and how many answers are missing."""
    unanswerable = answers.count((0, 0))
    if unanswerable:
        logger.info(f"{unanswerable:,} of {len(records):,} questions are unanswerable: their answer is empty")
    missing = [record.location for record, answer in zip(records, answers, strict=True) if answer is None]
    if missing:
        logger.warning(
            f"{len(missing):,} of {len(records):,} questions have no answer at their answer_start, such as "
            f"{missing[0]}; they do not count in the loss"
        )


def answer_tokens(encoding: Encoding, answer: tuple[int, int] | None) -> NDArray[np.int64]:
    """Return the positions of an answer's first and last token, given its characters (start, end) in the context.

    Returns [0, 0], which is [CLS], if the encoding does not hold the whole answer; IGNORED for a missing answer.
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


def find_best_answers(outputs: Outputs) -> tuple[list[str], list[float]]:
    """Return the best answer of at most `max_answer_length` tokens to each question, and a difference: by how much the
    score of no answer exceeds that answer's.

    Of all examples that a context is split into, the span with the largest sum of start and end score is taken (Devlin
    et al. 2018, section 4.2). The score of no answer is the sum at [CLS], the smallest of these examples, as in Hugging
    Face's run_qa.
    """
    examples = outputs.examples
    answers = [""] * len(examples.texts)
    best, null = np.full(len(answers), NO_SPAN), np.full(len(answers), np.inf)
    for scores, record, encoding in zip(outputs.scores, examples.record_indices, examples.encodings, strict=True):
        starts, ends = context_offsets(encoding).T
        first, last, total = find_best_span(scores, starts < ends, outputs.settings.max_answer_length)
        null[record] = min(null[record], scores[0].sum())
        if total > best[record]:
            best[record], answers[record] = total, examples.texts[record][1][starts[first] : ends[last]]
    return answers, (null - best).tolist()


def decode_answers(outputs: Outputs) -> list[str]:
    """Return the best answer to each question; none where the score of no answer exceeds its score by more than
    `null_score_diff_threshold`."""
    threshold = outputs.settings.null_score_diff_threshold
    pairs = zip(*find_best_answers(outputs), strict=True)
    return ["" if threshold is not None and difference > threshold else answer for answer, difference in pairs]


def learn_null_threshold(outputs: Outputs) -> dict[str, float | None]:
    """Return the threshold that the task sets, or else, if questions are unanswerable, the one with the best F1."""
    threshold, references = outputs.settings.null_score_diff_threshold, outputs.examples.references
    if threshold is None and not all(any(answers) for answers in references):
        threshold = choose_null_threshold(references, *find_best_answers(outputs))
    return {"null_score_diff_threshold": threshold}


def find_pipeline_answers(outputs: Outputs) -> list[dict[str, Any]]:
    """Return the answer to each question as Hugging Face's question-answering pipeline does: `score, start, end,
    answer`; `start` and `end` are characters.

    `score` is the product of the probabilities of start and end, by softmax over the context and [CLS]; of all examples
    that a context is split into, the answer with the highest one is taken, and widened to whole words. With a
    `null_score_diff_threshold`, the answer is empty where `decode_answers` returns none: its score is the product of
    the probabilities of [CLS], the smallest of these examples.
    """
    examples, settings = outputs.examples, outputs.settings
    answers = [{"score": 0.0, "start": 0, "end": 0, "answer": ""} for _ in examples.texts]
    null_scores = np.ones(len(answers))
    for scores, record, encoding in zip(outputs.scores, examples.record_indices, examples.encodings, strict=True):
        in_context = np.array([sequence == 1 for sequence in encoding.sequence_ids])
        probabilities = log_softmax_over(scores, in_context)
        first, last, total = find_best_span(probabilities, in_context, settings.max_answer_length)
        null_scores[record] = min(null_scores[record], np.exp(probabilities[0].sum()))
        if np.exp(total) > answers[record]["score"]:
            start, end = widen_to_words(encoding, in_context, first, last)
            text = examples.texts[record][1][start:end]
            answers[record] = {"score": float(np.exp(total)), "start": start, "end": end, "answer": text}
    if settings.null_score_diff_threshold is not None:
        exceed = np.array(find_best_answers(outputs)[1]) > settings.null_score_diff_threshold
        for record in np.flatnonzero(exceed).tolist():
            answers[record] = {"score": float(null_scores[record]), "start": 0, "end": 0, "answer": ""}
    return answers


def log_softmax_over(scores: Scores, in_context: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return log-probabilities (n,2) of start and end among the tokens of the context and [CLS], -inf for others."""
    allowed = in_context.copy()
    allowed[0] = True
    masked = np.where(allowed[:, None], scores.astype(np.float64), -np.inf)
    return masked - np.logaddexp.reduce(masked)


def widen_to_words(encoding: Encoding, in_context: NDArray[np.bool_], first: int, last: int) -> tuple[int, int]:
    """Return the characters of the context, start and end, of the words that tokens `first` to `last` belong to."""
    words = np.where(in_context, np.array(encoding.word_ids, dtype=float), np.nan)
    starts, ends = np.array(encoding.offsets).T
    return int(starts[words == words[first]].min()), int(ends[words == words[last]].max())


def find_best_span(
    scores: NDArray[np.floating[Any]], allowed: NDArray[np.bool_], max_length: int
) -> tuple[int, int, np.floating[Any]]:
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
