"""`bertlite predict`: the predictions of a fine-tuned model, in the format of Hugging Face's pipelines."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from bertlite.core.errors import UserError
from bertlite.core.runtime import Runtime
from bertlite.data.formats import decode_line
from bertlite.data.sources import read_file_texts
from bertlite.finetuning.batches import ExampleBatches
from bertlite.finetuning.decoding import Outputs
from bertlite.finetuning.losses import compute_outputs, compute_scores, no_loss
from bertlite.finetuning.tasks import find_task, input_settings
from bertlite.inference.batching import chunks
from bertlite.model.heads import Classifier

CHUNK_SIZE = 64  # texts that are tokenized and packed together


def predict(
    model: Classifier,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    runtime: Runtime,
    pairs: bool = False,
    top_k: int = 1,
) -> Iterator[Any]:
    """Yield the prediction for each text, in order, in Hugging Face's format.

    Labels: `label, score`, or a list of the `top_k` best. Tokens: a list of entities, `entity_group, score, word,
    start, end`. Questions: `score, start, end, answer`. With `pairs`, and for questions, each text holds two, separated
    by a tab. Raises UserError for one that does not, and for pairs if the model reads single texts only.
    """
    task = find_task(model)
    num_texts = 2 if pairs else task.num_texts[0]
    if num_texts not in task.num_texts:
        raise UserError("--pairs: this model labels the words of single texts; leave --pairs out")
    if num_texts == 2 and model.config.type_vocab_size < 2:
        raise UserError("the model cannot read pairs of texts: its type_vocab_size is 1")
    settings = input_settings(model, tokenizer)
    for chunk in chunks(enumerate(texts, 1), CHUNK_SIZE):
        inputs = [split_text(text, number) if num_texts == 2 else (text,) for number, text in chunk]
        examples = task.encode(inputs, tokenizer, settings)
        batches = ExampleBatches(examples, model.config.pad_token_id)
        scores, *_ = compute_outputs(model, batches, runtime, compute_scores, no_loss)
        yield from task.results(Outputs(scores, examples, model.labels, settings), top_k)


def split_text(text: str, number: int) -> tuple[str, ...]:
    """Split input `number` at its tab into two texts."""
    texts = tuple(text.split("\t"))
    if len(texts) != 2:
        raise UserError(
            f"text {number}: should be two texts, such as a question and its context, separated by a tab: {text[:60]!r}"
        )
    return texts


def read_texts(file: str | None, column: str | None) -> Iterator[str]:
    """Yield the lines of a text file or a column of a table; without a file, the lines of standard input.

    Raises UserError, naming the file, for what cannot be read.
    """
    if file is not None:
        if not Path(file).exists():
            raise UserError(f"--file: {file}: no such file")
        yield from read_file_texts(Path(file), column)
        return
    for number, line in enumerate(sys.stdin.buffer, 1):
        yield decode_line(line, number, "standard input")


def format_prediction(prediction: Any) -> str:
    """Format a prediction as a line of text: a dash if there are no entities."""
    keys = ("label", "entity_group", "word", "answer")
    entries = prediction if isinstance(prediction, list) else [prediction]
    formatted = (
        "  ".join([f"{entry['score']:.4f}", *(entry[key] for key in keys if key in entry)]) for entry in entries
    )
    return "; ".join(formatted) or "-"
