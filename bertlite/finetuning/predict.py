"""`bertlite predict`: the predictions of a fine-tuned model, in the format of Hugging Face's pipelines."""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from bertlite.config.finetune_settings import SavedTask
from bertlite.core.errors import UserError
from bertlite.core.files import atomic_file
from bertlite.core.logging import logger
from bertlite.core.runtime import Runtime, check_finite
from bertlite.core.trust import MAX_TEXT_CHARACTERS
from bertlite.data.formats import Record
from bertlite.finetuning.batches import ExampleBatches
from bertlite.finetuning.decoding import Outputs
from bertlite.finetuning.losses import compute_outputs, compute_scores, no_loss
from bertlite.finetuning.splits import warn_of_unknown
from bertlite.finetuning.tasks import Task, find_task
from bertlite.inference.batching import chunks
from bertlite.model.heads import Classifier

CHUNK_SIZE = 64  # texts that are tokenized and packed together


def predict(
    model: Classifier,
    tokenizer: PreTrainedTokenizerBase,
    records: Iterable[Record],
    settings: SavedTask,
    runtime: Runtime,
    top_k: int = 1,
) -> Iterator[tuple[Record, Any]]:
    """Yield each record with the prediction for its texts, in order, in Hugging Face's format.

    Labels: `label, score`, or a list of the `top_k` best. Tokens: a list of entities, `entity_group, score, word,
    start, end`. Questions: `score, start, end, answer`. Multiple choice: `label, score, choice`, or a list of the best.
    At the end, log how many texts were truncated, and warn if many tokens are unknown.
    """
    task = find_task(model)
    num_records = num_truncated = num_unknown = num_tokens = 0
    pairs = ((record, task.read_unlabelled(record, settings)) for record in records)
    for chunk in chunks(pairs, CHUNK_SIZE, count_characters):
        examples = task.encode([texts for _, texts in chunk], tokenizer, settings)
        batches = ExampleBatches(examples, model.config.pad_token_id)
        scores, *_ = compute_outputs(model, batches, runtime, compute_scores, no_loss)
        check_finite(torch.from_numpy(np.concatenate(scores, axis=None)))
        results = task.results(Outputs(scores, examples, model.labels, settings), top_k)
        yield from zip((record for record, _ in chunk), results, strict=True)
        num_records += len(chunk)
        num_truncated += examples.num_truncated
        unknown, tokens = examples.count_unknown(tokenizer)
        num_unknown, num_tokens = num_unknown + unknown, num_tokens + tokens
    if num_truncated:
        logger.warning(
            f"{num_truncated:,} of {num_records:,} texts have more than {settings.max_length} tokens and were truncated"
        )
    warn_of_unknown("predict", num_unknown, num_tokens)


def count_characters(pair: tuple[Record, tuple[str, ...]]) -> int:
    """Count the characters of a record's texts. Raises UserError for more than MAX_TEXT_CHARACTERS."""
    record, texts = pair
    number = sum(map(len, texts))
    if number > MAX_TEXT_CHARACTERS:
        raise UserError(f"{record.location}: {number:,} characters, more than {MAX_TEXT_CHARACTERS:,}; divide the text")
    return number


def format_prediction(prediction: Any) -> str:
    """Format a prediction as a line of text: a dash if there are no entities, and for no answer."""
    keys = ("label", "entity_group", "word", "answer", "choice")
    entries = prediction if isinstance(prediction, list) else [prediction]
    formatted = (
        "  ".join([f"{entry['score']:.4f}", *dict.fromkeys(entry[key] or "-" for key in keys if key in entry)])
        for entry in entries
    )
    return "; ".join(formatted) or "-"


def write_predictions(out: Path, predictions: Iterable[tuple[Record, Any]], task: Task) -> int:
    """Write the columns of each record and its prediction, as predicted_label, …, to a table; return their number.

    Raises UserError for a name that does not end in .jsonl, .csv or .tsv, and for records that do not fit the format.
    """
    extension = out.suffix.lower()
    if extension not in (".jsonl", ".csv", ".tsv"):
        raise UserError(f"--out {out}: the name should end in .jsonl, .csv or .tsv")
    layout: dict[str, Any] = {"lineterminator": "\n"}
    if extension == ".tsv":  # without quotes, as bertlite reads it
        layout |= {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None}
    count, writer = 0, None
    with atomic_file(out) as file, io.TextIOWrapper(file, "utf-8", newline="") as text:
        for record, prediction in predictions:
            values = add_prediction(record, task.tabulate(prediction))
            count += 1
            if extension == ".jsonl":
                text.write(json.dumps(values, ensure_ascii=False, default=str) + "\n")
                continue
            if writer is None:
                writer = csv.DictWriter(text, list(values), **layout)
                writer.writeheader()
            try:
                writer.writerow({name: format_cell(value) for name, value in values.items()})
            except (ValueError, csv.Error) as error:
                raise UserError(f"{record.location}: does not fit {out}: {error}; write .jsonl instead") from None
    return count


def add_prediction(record: Record, added: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of a record and those that are added. Raises UserError if it has one of them already."""
    if taken := added.keys() & record.columns.keys():
        raise UserError(f"{record.location}: there already is a column {min(taken)!r}; rename it to use --out")
    return record.columns | added


def format_cell(value: Any) -> str:
    """Format a value for a table of texts: lists and objects as JSON, null as nothing."""
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, default=str)
