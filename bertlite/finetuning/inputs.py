"""What `bertlite predict` reads: texts, files of them and standard input, as records with the columns of the task."""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from bertlite.config.finetune_settings import InputSettings, SavedTask
from bertlite.config.settings import DataLocation
from bertlite.core.errors import UserError
from bertlite.core.logging import logger
from bertlite.data.encodings import decode_line
from bertlite.data.formats import READERS, Record, TableFile, file_format, find_format, split_lines
from bertlite.data.tables import DELIMITERS, names_texts, read_records, read_table, use_header
from bertlite.finetuning.tasks import TASKS, find_task, input_settings
from bertlite.model.heads import Classifier

TAG = re.compile(r"\S+\s(?:.*\s)?(?:O|[BIMESLU]-\S+)")  # a line of a word and its tag


@dataclass(frozen=True)
class Stream(TableFile):
    """A table whose lines are being read already; its path is a name for messages."""

    content: Iterator[str] = field(default_factory=lambda: iter(()))

    def lines(self) -> Iterator[str]:
        return self.content


def choose_inputs(
    model: Classifier, tokenizer: PreTrainedTokenizerBase, columns: list[str] | None = None, pairs: bool = False
) -> SavedTask:
    """Return what a model reads, with the names of `columns` if there are any.

    A folder without task.json does not tell single texts from pairs; `pairs` or two columns do. Raises UserError for
    what contradicts the model.
    """
    settings, task = input_settings(model, tokenizer), find_task(model)
    can_be_pairs = model.task is None and task.num_texts == (1, 2)
    if can_be_pairs and (pairs or (columns and len(columns) == 2)):
        settings = settings.model_copy(update={"text": ["text", "text_pair"]})
    num_texts = len(settings.text)
    reads = f"{'pairs of' if num_texts == 2 else 'single'} texts ({' and '.join(settings.text)})"
    if pairs and num_texts == 1:
        raise UserError("--pairs: the model reads single texts; leave --pairs out")
    if (num_texts == 2 or settings.type == "multiple-choice") and model.config.type_vocab_size < 2:
        raise UserError("the model cannot read pairs of texts: its type_vocab_size is 1")
    if columns and len(columns) != num_texts:
        given = " ".join(f"--column {name}" for name in columns)
        raise UserError(f"{given}: the model reads {reads}; give --column {['once', 'twice'][num_texts - 1]}")
    return settings.model_copy(update={"text": columns or settings.text})


def read_inputs(
    texts: Iterable[str] | None,
    file: str | None,
    settings: InputSettings,
    columns: list[str] | None = None,
    key: str | None = None,
) -> Iterator[Record]:
    """Yield the given texts, or the records of a table or the lines of another file, or else those of standard input.

    `key` is that of the list in a JSON file. Raises UserError, naming the file, for what cannot be read, and for lines
    of text if `columns` were named.
    """
    split_line = TASKS[settings.type].split_line
    if texts is not None:
        return (split_line(text, f"text {number}", settings) for number, text in enumerate(texts, 1))
    if file is None:
        return parse_lines(Path("standard input"), read_standard_input(), settings, columns)
    path, location = Path(file), DataLocation(path=file, field=key)
    if not path.exists():
        raise UserError(f"--file: {file}: no such file")
    if path.is_dir():
        return iter(read_records(location, settings, "--file"))
    table = TableFile(
        path,
        format=location.given_format,
        field=key,
        encoding=settings.encoding,
        encoding_setting="task.encoding",
    )
    has_tags = settings.type == "token-classification" and file_format(path) not in ("", ".txt")
    extension = find_format(path, table.format)
    if has_tags or extension in READERS:
        return read_table(table, settings)
    return parse_lines(path, table.lines(), settings, columns)


def read_standard_input() -> Iterator[str]:
    """Yield the lines of standard input; on a terminal, log that it is waited for."""
    if sys.stdin.isatty():
        logger.info("reading standard input, a text per line; end it with Ctrl-D")
    for number, line in enumerate(split_lines(sys.stdin.buffer, "standard input"), 1):
        yield decode_line(line, number, "standard input")


def read_single_texts(file: str, settings: InputSettings, key: str | None = None) -> Iterator[str]:
    """Yield the texts of a file that `read_inputs` reads for a task of single texts, words with blanks between."""
    for record in read_inputs(None, file, settings, key=key):
        (text,) = TASKS[settings.type].read_unlabelled(record, settings)
        yield text if isinstance(text, str) else " ".join(text)


def parse_lines(
    path: Path, lines: Iterator[str], settings: InputSettings, columns: list[str] | None
) -> Iterator[Record]:
    """Yield a record per line: a text, or two with a tab between.

    The lines are those of a table if the first one is a JSON object, a header with the task's columns, or a word with
    its tag.
    """
    split_line, first = TASKS[settings.type].split_line, next(lines, None)
    if first is None:
        return
    stream = Stream(path, content=chain([first], lines))
    if is_json_object(first):
        form, records = "JSON lines", READERS[".jsonl"](stream)
    elif first.startswith("__label__"):
        form, records = "labels and texts, as of fastText", READERS[".fasttext"](stream)
    elif settings.type == "token-classification" and TAG.fullmatch(first.strip()):
        form, records = "words with tags", read_table(stream, settings)
    elif extension := find_table_format(first, settings):
        columns_of_file = use_header(settings, first, extension, path).columns
        table = replace(stream, columns=columns_of_file, delimiter=settings.delimiter, quoting=settings.quoting)
        form, records = "a table with columns", READERS[extension](table)
    elif columns:
        raise UserError(f"{path}: read as lines of text, which have no column {columns[0]!r}; leave --column out")
    else:
        yield from (split_line(line, f"{path}:{n}", settings) for n, line in enumerate(stream.lines(), 1))
        return
    logger.info(f"{path}: read as {form}, which its first line shows")
    yield from records


def is_json_object(line: str) -> bool:
    try:
        return line.startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def find_table_format(first: str, settings: InputSettings) -> str | None:
    """Return the format of a table by its first line, which names its columns or, if the task does, has as many."""
    for extension, delimiter in DELIMITERS.items():
        num_columns = len(first.split(settings.delimiter or delimiter))
        has_columns = settings.columns is not None and num_columns == len(settings.columns) > 1
        if names_texts(first, delimiter, settings) or (has_columns and (settings.delimiter or delimiter == "\t")):
            return extension
    return None
