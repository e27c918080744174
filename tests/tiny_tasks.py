"""Tables and tiny models of each type of task."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paths import SAMPLE
from safetensors.torch import load_file
from tiny_models import randomize
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

from bertlite.config.finetune_settings import FinetuneConfig
from bertlite.core.runtime import initialize_runtime
from bertlite.data.masking import IGNORED
from bertlite.finetuning.experiment import Experiment, prepare
from bertlite.finetuning.tasks import TASKS

SENTENCES = [line.split("\t") for line in (SAMPLE / "subject_train.tsv").read_text(encoding="utf-8").splitlines()[1:]]
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
SUBJECTS = sorted({label for label, _ in SENTENCES})


def make_records(kind: str) -> list[dict[str, Any]]:
    """Make a table for a type of task from the sample's sentences."""
    records: list[dict[str, Any]] = []
    for number, (label, text) in enumerate(SENTENCES[:120]):
        words = text.split()[:15]
        capital = [word[:1].isupper() for word in words]
        prefixes = ["I" if follows else "B" for follows in [False, *capital]]
        tags = [f"{prefix}-CAP" if has else "O" for prefix, has in zip(prefixes, capital, strict=False)]
        records.append(
            {
                "classification": {"text": text, "label": label},
                "multilabel": {"text": text, "label": [word for word in ("the", "of", "a") if word in text.split()]},
                "regression": {"text": text, "label": len(text) / 100},
                "token-classification": {"text": words, "label": tags},
                "question-answering": {
                    "question": f"What follows {words[2]}?",
                    "context": text,
                    "answers": {"text": [words[3]], "answer_start": [text.index(words[3])]},
                    "id": str(number),
                },
                "multiple-choice": {"text": text, "choices": words[: 3 + number % 2], "label": number % 3},
            }[kind]
        )
    return records


# transformers' class and configuration for each type of task.
HEADS: dict[str, tuple[Any, dict[str, Any]]] = {
    "classification": (BertForSequenceClassification, {"id2label": dict(enumerate(SUBJECTS))}),
    "multilabel": (BertForSequenceClassification, {"id2label": {0: "a", 1: "of", 2: "the"}}),
    "regression": (BertForSequenceClassification, {"id2label": {0: "label"}}),
    "token-classification": (BertForTokenClassification, {"id2label": {0: "O", 1: "B-CAP", 2: "I-CAP"}}),
    "question-answering": (BertForQuestionAnswering, {"id2label": {0: "start", 1: "end"}}),
    "multiple-choice": (BertForMultipleChoice, {"id2label": dict(enumerate("0123"))}),
}


def save_model(vocabulary: Path, kind: str, out: Path, std: float = 0.1) -> Path:
    """Save a tiny BERT of random weights, of transformers' class for a type of task, with a tokenizer."""
    shutil.copytree(vocabulary, out, dirs_exist_ok=True)
    model, labels = HEADS.get(kind, (BertModel, {}))
    config = BertConfig(**TINY, vocab_size=1000, max_position_embeddings=128, **labels)
    config.problem_type = TASKS[kind].problem_type if kind in TASKS else None
    randomize(model(config), std).save_pretrained(out)
    return out


def make_experiment(config: FinetuneConfig) -> Experiment:
    """Prepare the task of a configuration."""
    return prepare(config, config.task, initialize_runtime("fp32"))


def read_metric(folder: str | Path, key: str = "loss", seed: int = 0) -> list[float]:
    """Return the values of a metric in the metrics.jsonl of one seed of a run."""
    lines = map(json.loads, (Path(folder) / f"seed-{seed}" / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


def read_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """Return the weights of a run's final model."""
    return load_file(Path(folder) / "model" / "model.safetensors")


def transformers_loss(model: Any, kind: str, examples: Any, member: int) -> tuple[torch.Tensor, int]:
    """Return the loss of one example in transformers, and the number of tokens or examples that it is the mean of.

    For multiple choice it is that of the whole record at its first choice, and 0 at the others.
    """
    target = torch.as_tensor(np.asarray(examples.targets[member]))
    inputs = {
        "input_ids": torch.tensor([examples.encodings[member].ids]),
        "token_type_ids": torch.tensor([examples.encodings[member].type_ids]),
    }
    if kind == "multiple-choice":
        if member and examples.record_indices[member - 1] == examples.record_indices[member]:
            return torch.zeros(()), 0
        choices = range(member, member + examples.record_indices.count(examples.record_indices[member]))
        tensors = {"input_ids": "ids", "token_type_ids": "type_ids", "attention_mask": "attention_mask"}
        inputs = {
            name: pad_sequence(
                [torch.tensor(getattr(examples.encodings[choice], attribute)) for choice in choices], batch_first=True
            )[None]
            for name, attribute in tensors.items()
        }
        return model(**inputs, labels=target[None]).loss, 1
    if kind == "question-answering":
        return model(**inputs, start_positions=target[:1], end_positions=target[1:]).loss, 1
    if kind == "classification":
        target = target.view(1)
    elif kind == "regression":
        target = target.view(1, 1)
    else:
        target = target[None]
    count = int((target != IGNORED).sum()) if kind == "token-classification" else 1
    return model(**inputs, labels=target).loss, count
