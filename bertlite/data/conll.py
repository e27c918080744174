"""Files with a word per line or row: CoNLL's columns, CoNLL-U, and tables with a column of sentence numbers."""

import re
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from bertlite.core.errors import UserError
from bertlite.core.logging import logger
from bertlite.data.columns import get_column
from bertlite.data.formats import Record, TableFile, file_format, is_empty

CONLLU = ["id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc"]


def read_conll(table: TableFile, word_column: str, tag_column: str) -> Iterator[Record]:
    """Read sentences in the CoNLL format: a word and its tag per line, blank lines between sentences.

    The word is in the first column and the tag in the last one, unless a header or `table.columns` names them or they
    are numbers of columns. CoNLL-U has names of its own; its ranges of words (1-2) and empty nodes (1.1) are skipped.
    Raises UserError for a line without its tag.
    """
    lines = [line.strip("\r ") for line in table.lines()]
    rows = split_columns(lines, table.delimiter)
    marked = ("#", "-DOCSTART-")
    first = next((index for index, line in enumerate(lines) if line and not line.startswith(marked)), -1)
    first_row = rows[first] if first >= 0 else []
    has_header = word_column != tag_column and {word_column, tag_column} <= set(first_row)
    is_conllu = file_format(table.path) == ".conllu" or (tag_column in CONLLU and len(first_row) == len(CONLLU))
    names = first_row if has_header else table.columns or (CONLLU if is_conllu else None)
    word_index = find_column(names, "form" if is_conllu and word_column not in CONLLU else word_column, 0, "text")
    tag_index = find_column(names, tag_column, -1, "label")
    if not names and len(first_row) > 2 and not tag_column.lstrip("-").isdecimal():
        shown = f"{first_row[0]!r} and {first_row[-1]!r}"
        logger.info(f"{table.path}: of {len(first_row)} columns the first is the word and the last its tag: {shown}")
    skipped = find_comments(lines, rows, tag_index)
    if skipped:
        logger.info(f"{table.path}: {len(skipped):,} comment lines (# …) are left out")
    skipped |= {first} if has_header else set()
    if is_conllu:
        skipped |= {index for index, row in enumerate(rows) if not row[0].isdecimal()}
    ends = [not line.strip() or line.startswith("-DOCSTART-") for line in lines]
    tagged = [row for index, row in enumerate(rows) if not ends[index] and index not in skipped]
    warn_of_prefix(table.path, [row[word_index] for row in tagged if -len(row) <= word_index < len(row)])
    for is_end, group in groupby(range(len(lines)), ends.__getitem__):
        indices = [index for index in group if index not in skipped]
        if is_end or not indices:
            continue
        for index in indices:
            if problem := find_problem(rows[index], len(first_row), names, {"text": word_index, "label": tag_index}):
                raise UserError(f"{table.path}:{index + 1}: {lines[index]!r} {problem}{table.advice}")
        columns = {word_column: word_index, tag_column: tag_index}
        sentence = {name: [rows[index][column] for index in indices] for name, column in columns.items()}
        yield Record(f"{table.path}:{indices[0] + 1}", sentence)


def warn_of_prefix(path: Path, words: list[str]) -> None:
    """Warn if all words begin with the code of a language, as in WikiANN's files: `en:river`."""
    prefixes = {word.partition(":")[0] for word in words if ":" in word}
    if len(words) > 10 and len(prefixes) == 1 and all(word.startswith(f"{min(prefixes)}:") for word in words):
        logger.warning(f"{path}: all words begin with {min(prefixes) + ':'!r}, which is read as a part of them")


def find_problem(row: list[str], width: int, names: list[str] | None, columns: dict[str, int]) -> str | None:
    """Return what is wrong with the columns of a line, None if nothing is; `width` is the number of the first line."""
    if names and len(row) != len(names):
        return f"should be {' '.join(names)}"
    if len(row) < max(2, width):
        return f"should have {max(2, width)} columns, {'as the first line has' if width > 1 else 'a word and its tag'}"
    for setting, index in columns.items():
        if not -len(row) <= index < len(row):
            return f"has {len(row)} columns: task.{setting} should be from {-len(row)} to {len(row) - 1}, not {index}"
    return None


def split_columns(lines: list[str], delimiter: str | None) -> list[list[str]]:
    """Split each line at `delimiter`, or else at tabs if it has some, or else at blanks.

    A line that starts with # is split as the other lines are, since a comment may have blanks where words have tabs.
    """
    has_tabs = any("\t" in line for line in lines if not line.startswith("#"))
    separator = re.escape(delimiter) if delimiter else None
    splits = [
        re.split(separator or ("\t" if "\t" in line or (has_tabs and line.startswith("#")) else " +"), line)
        for line in lines
    ]
    return [[field.strip(" ") for field in fields] for fields in splits]


def find_comments(lines: list[str], rows: list[list[str]], tag_index: int) -> set[int]:
    """Return the indices of comments: lines that start with # and have no tag that a line without # has."""
    marked = {index for index, line in enumerate(lines) if line.startswith("#")}
    needed = max(2, tag_index + 1)
    tags = {row[tag_index] for index, row in enumerate(rows) if index not in marked and len(row) >= needed}
    return {index for index in marked if len(rows[index]) < needed or rows[index][tag_index] not in tags}


def find_column(names: list[str] | None, column: str, default: int, setting: str) -> int:
    """Return the index of a column that is given by its name or its number: 0 is the first, -1 the last."""
    if names and column in names:
        return names.index(column)
    if re.fullmatch(r"-?\d+", column):
        return int(column)
    if names:
        raise UserError(f"task.{setting} is {column!r}, which is not one of the columns {', '.join(names)}")
    return default


def group_words(records: Iterator[Record], sentence: str, word: str, tag: str) -> Iterator[Record]:
    """Group the rows of a table with a word per row into sentences, by the numbers in the column `sentence`.

    Raises UserError for a sentence that continues after another one began, and for a word without a tag.
    """
    seen: set[str] = set()
    for number, group in groupby(fill_down(records, sentence), itemgetter(0)):
        rows = [record for _, record in group]
        if number in seen:
            raise UserError(f"{rows[0].location}: the sentence {number!r} continues after another one; sort the rows")
        seen.add(number)
        for name, setting in {word: "task.text", tag: "task.label"}.items():
            get_column(rows[0], name, setting)
        for record in rows:
            if is_empty(record.columns[tag]):
                raise UserError(f"{record.location}: the word {record.columns[word]!r} has no tag")
        words = [str(record.columns[word] or "") for record in rows]
        yield Record(rows[0].location, {word: words, tag: [str(record.columns[tag]).strip() for record in rows]})


def fill_down(records: Iterator[Record], column: str) -> Iterator[tuple[str, Record]]:
    """Yield each record with its value in a column; an empty one is that of the record above."""
    value = ""
    for record in records:
        cell = get_column(record, column, "task.sentence")
        value = value if is_empty(cell) else str(cell).strip()
        if not value:
            raise UserError(f"{record.location}: the first row has no value in the column {column!r} (task.sentence)")
        yield value, record
