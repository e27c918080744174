"""Entities given as spans of characters, as annotation tools write them, and the words that they cover."""

from typing import Any, NamedTuple

from bertlite.core.errors import UserError
from bertlite.data.formats import Record

# Keys of a span that is an object.
START, END, KIND = ("start", "start_offset"), ("end", "end_offset"), ("label", "labels", "entity_group")


class Span(NamedTuple):
    """An entity: its first character, the one after its last, and its kind."""

    start: int
    end: int
    kind: str


class Fit(NamedTuple):
    """The tags of a text's words, and how many of its spans were changed to fit them."""

    tags: list[str]
    widened: int  # began or ended inside a word
    overlapping: int  # left out, since a longer span has one of their words
    empty: int  # left out, since they have no word


def read_span(value: Any, text: str, location: str) -> Span:
    """Read a span: [start, end, kind], or an object with these keys. Raises UserError for anything else."""
    if isinstance(value, dict):
        value = [next((value[key] for key in keys if key in value), None) for keys in (START, END, KIND)]
    if isinstance(value, list) and len(value) == 3:
        start, end, kind = value
        if isinstance(kind, list) and len(kind) == 1:  # Label Studio has a list of labels
            (kind,) = kind
        numbers = type(start) is int and type(end) is int
        if numbers and isinstance(kind, str) and kind.strip():
            if not 0 <= start < end <= len(text):
                raise UserError(f"{location}: the span {[start, end]} is outside of its text of {len(text)} characters")
            return Span(start, end, kind.strip())
    raise UserError(f"{location}: {value!r} is not a span; spans are [start, end, label], or objects with these keys")


def read_spans(record: Record, text: str, cell: list[Any]) -> list[Span]:
    """Read the spans of a text."""
    return [read_span(value, text, record.location) for value in cell]


def tag_words(spans: list[Span], words: list[tuple[int, int]]) -> Fit:
    """Return IOB2 tags of words, given as characters (start, end) in ascending order.

    A span is widened to whole words. Of spans that have a word in common, the longest is kept.
    """
    tags = ["O"] * len(words)
    widened = overlapping = empty = 0
    for span in sorted(spans, key=lambda span: (span.start - span.end, span)):
        covered = [index for index, (start, end) in enumerate(words) if start < span.end and end > span.start]
        if not covered:
            empty += 1
        elif any(tags[index] != "O" for index in covered):
            overlapping += 1
        else:
            tags[covered[0]] = f"B-{span.kind}"
            for index in covered[1:]:
                tags[index] = f"I-{span.kind}"
            widened += words[covered[0]][0] < span.start or words[covered[-1]][1] > span.end
    return Fit(tags, widened, overlapping, empty)
