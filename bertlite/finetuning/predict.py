"""`bertlite predict`: what a fine-tuned model says about texts, as Hugging Face's pipelines would."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, softmax
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from bertlite.config.finetune_settings import TaskSettings
from bertlite.config.settings import DataLocation
from bertlite.core.errors import UserError
from bertlite.core.runtime import Runtime
from bertlite.data.formats import decode_line
from bertlite.data.sources import read_file_texts
from bertlite.finetuning.examples import ExampleBatches, encode_questions, encode_texts
from bertlite.finetuning.experiment import compute_outputs
from bertlite.finetuning.losses import compute_scores, no_loss
from bertlite.finetuning.tasks import best_answers
from bertlite.inference.batching import chunks
from bertlite.model.heads import Classifier, QuestionAnswerer, TokenClassifier

TEXTS_AT_A_TIME = 64


def predict(
    model: Classifier,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    runtime: Runtime,
    pairs: bool = False,
    top_k: int = 1,
) -> Iterator[Any]:
    """What the model says about each text, one after the other, in Hugging Face's form.

    Labels: `label, score`, or a list of the `top_k` best. Tokens: a list of entities, `entity_group, score, word,
    start, end`. Questions: `score, start, end, answer`. With `pairs`, and for questions, each text is two with a tab
    between. Raises UserError for a text that is not.
    """
    two = pairs or isinstance(model, QuestionAnswerer)
    if pairs and isinstance(model, TokenClassifier):
        raise UserError("--pairs: this model labels the words of one text")
    if two and model.config.type_vocab_size < 2:
        raise UserError("the model tells no two texts apart: its type_vocab_size is 1")
    length = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    settings = TaskSettings(train=DataLocation(path="-"), max_length=length, doc_stride=min(64, length // 4))
    encode = encode_questions if isinstance(model, QuestionAnswerer) else encode_texts
    for chunk in chunks(enumerate(texts, 1), TEXTS_AT_A_TIME):
        inputs = [tuple(text.split("\t")) if two else (text,) for _, text in chunk]
        for (place, text), one in zip(chunk, inputs, strict=True):
            if two and len(one) != 2:
                what = "a question and its context" if isinstance(model, QuestionAnswerer) else "two texts"
                raise UserError(f"text {place}: should be {what}, with a tab between: {text[:60]!r}")
        examples = encode(inputs, tokenizer, settings)
        batches = ExampleBatches(examples, type(model), model.config.pad_token_id)
        outputs, *_ = compute_outputs(model, batches, runtime, compute_scores, no_loss)
        if isinstance(model, QuestionAnswerer):
            yield from best_answers(outputs, examples, [one[1] for one in inputs], settings.max_answer_length)
        elif isinstance(model, TokenClassifier):
            for output, encoding, (text,) in zip(outputs, examples.spans, inputs, strict=True):
                yield entities(softmax(output, axis=-1), encoding, text, model.labels)
        else:
            yield from (_labels(output, model, top_k) for output in outputs)


def entities(scores: NDArray[np.float32], encoding: Encoding, text: str, labels: list[str]) -> list[dict[str, Any]]:
    """Words of one entity together, each word by its first piece: Hugging Face's aggregation "first"."""
    found: list[dict[str, Any]] = []
    before, seen = "", None
    for place, word in enumerate(encoding.word_ids):
        if word is None:
            continue
        start, end = encoding.offsets[place]
        if word != seen:
            label = labels[int(scores[place].argmax())]
            kind = "" if label == "O" else label[2:] if label.startswith(("B-", "I-")) else label
            if kind and (label.startswith("B-") or kind != before):
                found.append({"entity_group": kind, "score": [], "word": "", "start": start, "end": end})
            if kind:
                found[-1]["score"].append(float(scores[place].max()))
            before, seen = kind, word
        if before:
            found[-1]["end"] = end
    for one in found:
        one |= {"score": float(np.mean(one["score"])), "word": text[one["start"] : one["end"]]}
    return found


def read_texts(file: str | None, column: str) -> Iterator[str]:
    """The lines of a text file or a column of a table; without a file, the lines of standard input.

    Raises UserError, naming the file, for what cannot be read.
    """
    if file is not None:
        if not Path(file).exists():
            raise UserError(f"--file: {file}: there is no such file")
        yield from read_file_texts(Path(file), column)
        return
    for number, line in enumerate(sys.stdin.buffer, 1):
        yield decode_line(line, number, "standard input")


def as_text(result: Any) -> str:
    """A prediction as a line for people."""
    names = ("label", "entity_group", "word", "answer")
    several = result if isinstance(result, list) else [result]
    lines = ("  ".join([f"{one['score']:.4f}", *(one[name] for name in names if name in one)]) for one in several)
    return "; ".join(lines) or "-"


def _labels(output: NDArray[np.float32], model: Classifier, top_k: int) -> Any:
    if model.problem_type == "regression":
        scores = output
    elif model.problem_type == "multi_label_classification" or len(model.labels) == 1:
        scores = expit(output)
    else:
        scores = softmax(output)
    order = np.argsort(-scores, kind="stable")[:top_k].tolist()
    answers = [{"label": model.labels[number], "score": float(scores[number])} for number in order]
    return answers[0] if top_k == 1 else answers
