"""Token classification: a tag for each word, which marks the entities of a sentence."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from bertlite.config.finetune_settings import InputSettings
from bertlite.core.errors import UserError
from bertlite.data.formats import Record
from bertlite.data.masking import IGNORED
from bertlite.data.tables import get_column
from bertlite.finetuning.decoding import Outputs, Scores, softmax
from bertlite.finetuning.examples import Examples, encode_texts
from bertlite.finetuning.labels import find_label_indices


def read_tagged_words(record: Record, settings: InputSettings) -> tuple[list[str], list[str]]:
    """Read the words and IOB2 tags of a sentence.

    Raises UserError for cells that are not lists of one length, and for an unknown tag.
    """
    words, tags = (get_column(record, name, "task") for name in (settings.text[0], settings.label[0]))
    if not isinstance(words, list) or not isinstance(tags, list):
        raise UserError(
            f"{record.location}: {settings.text[0]!r} and {settings.label[0]!r} should be lists of words and of tags"
        )
    if len(words) != len(tags):
        raise UserError(f"{record.location}: {len(words)} words, but {len(tags)} tags")
    if not words:
        raise UserError(f"{record.location}: the sentence is empty")
    return [str(word) for word in words], convert_to_iob2([str(tag) for tag in tags], record.location)


def convert_to_iob2(tags: list[str], location: str) -> list[str]:
    """Convert the tags of a sentence from IOB1, IOB2, BMES or BILOU to IOB2.

    A tag starts an entity if its prefix is B, S or U, if it follows an entity of another kind, or if it follows a tag
    that ends one (E, S, L, U). Example: I-PER I-PER O U-LOC U-LOC → B-PER I-PER O B-LOC B-LOC.
    """
    converted, open_kind = [], ""  # open_kind: the kind of the entity that the next tag may continue
    for tag in tags:
        prefix, _, kind = tag.partition("-")
        if tag != "O" and (prefix not in ("B", "I", "M", "E", "S", "L", "U") or not kind):
            raise UserError(f"{location}: {tag!r} is not a tag; tags are O, B-KIND, I-KIND, or with M-, E-, S-, L-, U-")
        starts = prefix in ("B", "S", "U") or kind != open_kind
        converted.append("O" if tag == "O" else f"{'B' if starts else 'I'}-{kind}")
        open_kind = "" if prefix in ("E", "S", "L", "U") else kind
    return converted


def collect_tags(records: list[Record], settings: InputSettings) -> list[str]:
    kinds = sorted({tag[2:] for record in records for tag in read_tagged_words(record, settings)[1]} - {""})
    if not kinds:
        raise UserError(f"task.train: all tags in column {settings.label[0]!r} are O; there is no entity to learn from")
    return ["O", *(f"{prefix}-{kind}" for kind in kinds for prefix in "BI")]


def tag_examples(
    records: list[Record], labels: list[str], tokenizer: PreTrainedTokenizerBase, settings: InputSettings
) -> Examples:
    """The target is the index of the word's tag at the first token of each word, IGNORED at all other tokens."""
    sentences = [read_tagged_words(record, settings) for record in records]
    examples = encode_texts([(words,) for words, _ in sentences], tokenizer, settings, words=True)
    targets = []
    for record, (_, tags), encoding in zip(records, sentences, examples.encodings, strict=True):
        tag_indices = find_label_indices(tags, labels, record)
        target = np.full(len(encoding), IGNORED)
        for word, position in find_first_tokens(encoding).items():
            target[position] = tag_indices[word]
        targets.append(target)
    return replace(examples, targets=targets, references=[tags for _, tags in sentences], targets_per_token=True)


def find_first_tokens(encoding: Encoding) -> dict[int, int]:
    """Return the position of each word's first token, by the word's index; truncated words are left out."""
    positions: dict[int, int] = {}
    for position, word in enumerate(encoding.word_ids):
        if word is not None:
            positions.setdefault(word, position)
    return positions


def decode_tags(outputs: Outputs) -> list[list[str]]:
    """Return a tag per word of each sentence, from the word's first token; O for words that were truncated."""
    predictions, examples = [], outputs.examples
    for scores, encoding, (words,) in zip(outputs.scores, examples.encodings, examples.texts, strict=True):
        tags = ["O"] * len(words)
        for word, position in find_first_tokens(encoding).items():
            tags[word] = outputs.labels[int(scores[position].argmax())]
        predictions.append(tags)
    return predictions


def find_entities(outputs: Outputs) -> Iterator[list[dict[str, Any]]]:
    """Yield the entities of each text."""
    examples = outputs.examples
    for scores, encoding, (text,) in zip(outputs.scores, examples.encodings, examples.texts, strict=True):
        yield group_entities(softmax(scores), encoding, text, outputs.labels)


def group_entities(scores: Scores, encoding: Encoding, text: str, labels: list[str]) -> list[dict[str, Any]]:
    """Group the words of each entity, labelling each word by its first token: Hugging Face's aggregation "first".

    A word starts an entity if its label is B-KIND, or if the word before it is not of the same kind.
    """
    entities: list[dict[str, Any]] = []
    previous_kind, previous_word = "", None
    for position, word in enumerate(encoding.word_ids):
        if word is None:
            continue
        start, end = encoding.offsets[position]
        if word != previous_word:
            label = labels[int(scores[position].argmax())]
            kind = "" if label == "O" else label[2:] if label.startswith(("B-", "I-")) else label
            if kind and (label.startswith("B-") or kind != previous_kind):
                entities.append({"entity_group": kind, "score": [], "word": "", "start": start, "end": end})
            if kind:
                entities[-1]["score"].append(float(scores[position].max()))
            previous_kind, previous_word = kind, word
        if previous_kind:  # also by the word's later tokens
            entities[-1]["end"] = end
    for entity in entities:
        entity |= {"score": float(np.mean(entity["score"])), "word": text[entity["start"] : entity["end"]]}
    return entities
