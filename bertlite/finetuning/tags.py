"""Token classification: a tag for each word, which marks the entities of a text or stands for itself."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from bertlite.config.finetune_settings import InputSettings
from bertlite.core.errors import UserError
from bertlite.core.logging import count, logger
from bertlite.data.columns import get_column
from bertlite.data.formats import Record
from bertlite.data.masking import IGNORED
from bertlite.finetuning.decoding import Outputs, softmax
from bertlite.finetuning.examples import Examples, without_labels
from bertlite.finetuning.labels import find_label_indices, name_label
from bertlite.finetuning.labels import read_texts as read_text
from bertlite.finetuning.labels import read_unlabelled as read_unlabelled_text
from bertlite.finetuning.metrics import (
    ENTITIES,
    Metric,
    ScoresByLabel,
    library_metric,
    score_entities,
    score_labels,
    sklearn_metric,
    without_repeated,
)
from bertlite.finetuning.spans import Fit, Span, read_spans, tag_words
from bertlite.finetuning.tag_schemes import collect_labels, convert_to_iob2, entity_labels, marks_entities


class Word(NamedTuple):
    """A word of a text: the example and the position of its first token, and its characters in the text."""

    example: int
    position: int
    start: int
    end: int


def read_tagged_words(record: Record, settings: InputSettings) -> tuple[list[str], list[str]]:
    """Read the words and tags of a sentence; numbers become the names of `label_names`.

    Raises UserError for cells that are not lists of one length, and for numbers without a name.
    """
    words, tags = (get_column(record, name, "task") for name in (settings.text[0], settings.label[0]))
    if not isinstance(words, list) or not isinstance(tags, list):
        raise UserError(
            f"{record.location}: {settings.text[0]!r} and {settings.label[0]!r} should be lists of words and of tags, "
            "or a text and a list of spans [start, end, label]"
        )
    if len(words) != len(tags):
        raise UserError(f"{record.location}: {len(words)} words, but {len(tags)} tags")
    if not words:
        raise UserError(f"{record.location}: the sentence is empty")
    return [str(word) for word in words], [name_label(str(tag), record, settings) for tag in tags]


def read_text_and_spans(record: Record, settings: InputSettings) -> tuple[str, list[Span]] | None:
    """Read a text and its spans of characters; None for a record of words and tags."""
    text, cell = (get_column(record, name, "task") for name in (settings.text[0], settings.label[0]))
    if not isinstance(text, str) or not isinstance(cell, list) or any(isinstance(value, str) for value in cell):
        return None
    return text, read_spans(record, text, cell)


def read_texts(record: Record, settings: InputSettings) -> tuple[str | list[str]]:
    """Read the text of a record, or its words."""
    if read_text_and_spans(record, settings) is None:
        return (read_tagged_words(record, settings)[0],)
    return (read_text(record, settings)[0],)


def read_unlabelled(record: Record, settings: InputSettings) -> tuple[str, ...]:
    """Read the text of a record to predict for; words are joined by blanks."""
    cell = get_column(record, settings.text[0], "--column")
    return (" ".join(map(str, cell)),) if isinstance(cell, list) else read_unlabelled_text(record, settings)


def read_labels(record: Record, settings: InputSettings) -> list[str]:
    """Read the tags of a record as labels of the model, or the first ones of its spans."""
    if labelled_text := read_text_and_spans(record, settings):
        return [f"B-{span.kind}" for span in labelled_text[1]]
    tags = read_tagged_words(record, settings)[1]
    return convert_to_iob2(tags) if settings.tag_scheme == "entities" else tags


def settle_scheme(records: list[Record], labels: list[str], settings: InputSettings) -> dict[str, Any]:
    """Return the setting `tag_scheme` that the labels of the training examples show."""
    return {"tag_scheme": "entities" if marks_entities(labels, settings.tag_scheme) else "none"}


def collect_tags(records: list[Record], settings: InputSettings) -> list[str]:
    """Return the labels of a model for tagged records, and log how their tags are read."""
    if read_text_and_spans(records[0], settings) is not None:
        spans = [span for record in records for span in read_labelled_text(record, settings)[1]]
        kinds = settings.label_names or sorted({span.kind for span in spans})
        if not kinds:
            raise UserError(f"task.train: no text has a span in column {settings.label[0]!r}")
        logger.info(f"tags: {len(spans):,} spans of characters, with {count(len(kinds), 'kind')}: {', '.join(kinds)}")
        return entity_labels(kinds)
    sentences = [(record.location, read_tagged_words(record, settings)[1]) for record in records]
    labels, description = collect_labels(sentences, settings.tag_scheme, settings.label_names)
    logger.info(f"{description}; measured by {next(iter(tag_metrics(labels, settings, None)))}")
    return labels


def read_labelled_text(record: Record, settings: InputSettings) -> tuple[str, list[Span]]:
    """Read a text and its spans. Raises UserError for a record of words in a table that begins with spans."""
    found = read_text_and_spans(record, settings)
    if found is None:
        raise UserError(f"{record.location}: should be a text and a list of spans, as in the records before")
    return found


def encode_sentences(
    texts: Sequence[tuple[Any, ...]], tokenizer: PreTrainedTokenizerBase, settings: InputSettings
) -> Examples:
    """Tokenize texts, or lists of words. A text longer than `max_length` gives windows, one example each.

    They overlap by `doc_stride` tokens, but by at most half of a window.
    """
    (inputs,) = map(list, zip(*texts, strict=True))
    window_length = settings.max_length - tokenizer.num_special_tokens_to_add()
    has_words = isinstance(inputs[0], list)
    encoded = tokenizer(inputs, is_split_into_words=has_words, add_special_tokens=False, verbose=False)
    windows, records = [], []
    for record, encoding in enumerate(encoded.encodings):
        # Truncated here and not by the call above: there tokenizers 0.23.2 drops all windows but two.
        encoding.truncate(window_length, stride=min(settings.doc_stride, window_length // 2))
        first = tokenizer.backend_tokenizer.post_process(encoding)
        windows += [first, *first.overflowing]
        records += [record] * (1 + len(first.overflowing))
    examples = without_labels(windows, records, texts, tokenizer)
    return replace(examples, targets_per_token=True)


def find_words(examples: Examples) -> list[dict[int, Word]]:
    """Return the words of each text, by their index; of a list of words, those that have tokens."""
    windows: list[list[tuple[int, Encoding]]] = [[] for _ in examples.texts]
    for example, (record, encoding) in enumerate(zip(examples.record_indices, examples.encodings, strict=True)):
        windows[record].append((example, encoding))
    texts = []
    for (text,), windows_of_text in zip(examples.texts, windows, strict=True):
        words = find_words_of_text(windows_of_text)
        if isinstance(text, str):
            texts.append(dict(enumerate(words.values())))
            continue
        starts = np.cumsum([0, *(len(word) + 1 for word in text)]).tolist()  # of the words with blanks between
        texts.append(
            {
                index: word._replace(start=starts[index] + word.start, end=starts[index] + word.end)
                for index, word in words.items()
            }
        )
    return texts


def find_words_of_text(windows: list[tuple[int, Encoding]]) -> dict[int, Word]:
    """Return the words of a text that is read in one or several windows, which have indices among all examples.

    A word that several windows have belongs to the one in which it has the most context. A window that begins inside a
    word has the least there, so the word belongs to one that has its first token.
    """
    words: dict[int, Word] = {}
    contexts: dict[int, float] = {}  # the tokens between a word and the closer cut of its window
    for number, (example, encoding) in enumerate(windows):
        seen = set()
        for position, index in enumerate(encoding.word_ids):
            if index is None:
                continue
            start, end = encoding.offsets[position]
            word = words.setdefault(index, Word(example, position, start, end))
            words[index] = word._replace(end=max(end, word.end))
            if index not in seen:
                before = position if number else math.inf
                after = len(encoding) - 1 - position if number < len(windows) - 1 else math.inf
                if min(before, after) > contexts.get(index, -1):
                    contexts[index] = min(before, after)
                    words[index] = words[index]._replace(example=example, position=position)
                seen.add(index)
    return words


def tag_examples(
    records: list[Record], labels: list[str], tokenizer: PreTrainedTokenizerBase, settings: InputSettings
) -> Examples:
    """The target is the index of the word's tag at the first token of each word, IGNORED at all other tokens."""
    if read_text_and_spans(records[0], settings) is None:
        sentences = [read_tagged_words(record, settings) for record in records]
        examples = encode_sentences([(words,) for words, _ in sentences], tokenizer, settings)
        words = find_words(examples)
        is_iob2 = marks_entities(labels, settings.tag_scheme)
        tags = [convert_to_iob2(tags) if is_iob2 else tags for _, tags in sentences]
    else:
        texts = [read_labelled_text(record, settings) for record in records]
        examples = encode_sentences([(text,) for text, _ in texts], tokenizer, settings)
        words = find_words(examples)
        fits = [
            tag_words(spans, [(word.start, word.end) for word in words_of_text.values()])
            for (_, spans), words_of_text in zip(texts, words, strict=True)
        ]
        log_fits(fits, records)
        tags = [fit.tags for fit in fits]
    if len(examples.encodings) > len(records):
        num_long = np.count_nonzero(np.bincount(examples.record_indices) > 1)
        logger.info(
            f"texts longer than task.max_length {settings.max_length}, read in overlapping windows: {num_long:,}"
        )
    targets = [np.full(len(encoding), IGNORED) for encoding in examples.encodings]
    for record, tags_of_text, words_of_text in zip(records, tags, words, strict=True):
        tag_indices = find_label_indices(tags_of_text, labels, record)
        for index, word in words_of_text.items():
            targets[word.example][word.position] = tag_indices[index]
    return replace(examples, targets=targets, references=tags)


def log_fits(fits: list[Fit], records: list[Record]) -> None:
    """Log how many spans do not fit the words of their texts."""
    consequences = {
        "widened": "begin or end inside a word and were widened to whole words",
        "overlapping": "overlap a longer span and were left out",
        "empty": "have no word and were left out",
    }
    for name, consequence in consequences.items():
        counts = [getattr(fit, name) for fit in fits]
        if any(counts):
            example = records[int(np.argmax(np.array(counts) > 0))].location
            logger.warning(f"{sum(counts):,} spans {consequence}, such as in {example}")


def decode_tags(outputs: Outputs) -> list[list[str]]:
    """Return a tag per word of each text, from the word's first token; without tokens, O or the first label."""
    outside = "O" if "O" in outputs.labels else outputs.labels[0]
    predictions = []
    for (text,), words in zip(outputs.examples.texts, find_words(outputs.examples), strict=True):
        tags = [outside] * (len(words) if isinstance(text, str) else len(text))
        for index, word in words.items():
            tags[index] = outputs.labels[int(outputs.scores[word.example][word.position].argmax())]
        predictions.append(tags)
    return predictions


def find_entities(outputs: Outputs) -> Iterator[list[dict[str, Any]]]:
    """Yield the entities of each text, as Hugging Face's pipeline does; words of a list have blanks between."""
    for (text,), words in zip(outputs.examples.texts, find_words(outputs.examples), strict=True):
        probabilities = [softmax(outputs.scores[word.example][word.position]) for word in words.values()]
        characters = [(word.start, word.end) for word in words.values()]
        whole = text if isinstance(text, str) else " ".join(text)
        yield group_entities(probabilities, characters, whole, outputs.labels)


def group_entities(
    probabilities: list[NDArray[np.float32]], words: list[tuple[int, int]], text: str, labels: list[str]
) -> list[dict[str, Any]]:
    """Group the words of each entity, given by their characters (start, end): Hugging Face's aggregation "first".

    A word starts an entity if its label is B-KIND, or if the word before it is not of the same kind. A label without a
    prefix is a kind.
    """
    entities: list[dict[str, Any]] = []
    previous_kind = ""
    for word_probabilities, (start, end) in zip(probabilities, words, strict=True):
        label = labels[int(word_probabilities.argmax())]
        kind = "" if label == "O" else label[2:] if label.startswith(("B-", "I-")) else label
        if kind and (label.startswith("B-") or kind != previous_kind):
            entities.append({"entity_group": kind, "score": [], "word": "", "start": start, "end": end})
        if kind:
            entities[-1]["score"].append(float(word_probabilities.max()))
            entities[-1]["end"] = end
        previous_kind = kind
    for entity in entities:
        entity |= {"score": float(np.mean(entity["score"])), "word": text[entity["start"] : entity["end"]]}
    return entities


def tag_metrics(labels: list[str], settings: InputSettings, metric: str | None) -> dict[str, Metric]:
    """Return the metrics of entities or, if each tag stands for itself, of words, where F1 is that of all tags but O.

    Without O, that is the accuracy, and left out unless it is the `metric` of the task.
    """
    if marks_entities(labels, settings.tag_scheme):
        return ENTITIES
    others = [label for label in labels if label != "O"]
    of_others = {name: of_words(sklearn_metric(name, "micro", others)) for name in ("f1", "precision", "recall")}
    of_all = {
        "accuracy": of_words(library_metric("sklearn.metrics", "accuracy_score")),
        "macro_f1": of_words(sklearn_metric("f1", "macro")),
    }
    return of_others | of_all if "O" in labels else without_repeated(of_all | of_others, set(of_others), metric)


def of_words(metric: Metric) -> Metric:
    """Return a metric of lists of tags that is computed over all words."""
    return lambda references, predictions: metric(list(chain(*references)), list(chain(*predictions)))


def score_tags(
    references: list[list[str]], predictions: list[list[str]], labels: list[str], settings: InputSettings
) -> ScoresByLabel:
    """Return precision, recall and F1 of each kind of entity or, if each tag stands for itself, of each tag."""
    if marks_entities(labels, settings.tag_scheme):
        return score_entities(references, predictions)
    expected, predicted = ([labels.index(tag) for tag in chain(*tags)] for tags in (references, predictions))
    return score_labels(expected, predicted, labels, settings)
