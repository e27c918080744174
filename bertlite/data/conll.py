"""Files of tagged words: a word and its tag per line, as in the CoNLL shared tasks."""

import re
from collections.abc import Iterator

from bertlite.core.errors import UserError
from bertlite.data.formats import Record, TableFile


def read_conll(table: TableFile, word_column: str, tag_column: str) -> Iterator[Record]:
    """Read sentences in the CoNLL format: a word and its tag per line, blank lines between sentences.

    The word is in the first column and the tag in the last one, unless `table.columns` names them.
    """
    names = table.columns or [word_column, tag_column]
    if word_column not in names or tag_column not in names:
        raise UserError(f"task.columns should name {word_column!r} and {tag_column!r} (task.text, task.label)")
    word_index = names.index(word_column)
    tag_index = names.index(tag_column) if table.columns else -1
    words: list[str] = []
    tags: list[str] = []
    start = 0
    for number, line in enumerate([*table.lines(), ""], 1):
        line = line.strip("\r ")
        if not line.strip() or line.startswith("-DOCSTART-"):
            if words:
                yield Record(f"{table.path}:{start}", {word_column: words, tag_column: tags})
            words, tags = [], []
            continue
        separator = re.escape(table.delimiter) if table.delimiter else "\t" if "\t" in line else " +"
        fields = re.split(separator, line)
        if len(fields) < 2 or (table.columns and len(fields) != len(names)):
            raise UserError(f"{table.path}:{number}: {line!r} should be {' '.join(names)}")
        start = start if words else number
        words.append(fields[word_index])
        tags.append(fields[tag_index])
