"""Configurations of fine-tuning runs that take seconds."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from paths import SAMPLE
from tiny_tasks import make_records, save_model

from bertlite.config.finetune_settings import FinetuneConfig
from bertlite.config.loading import load_config
from bertlite.data.tokenizer import wrap_tokenizer
from bertlite.data.vocabulary import train_word_piece


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory) -> Path:
    """A folder with a tokenizer of a thousand tokens."""
    folder = tmp_path_factory.mktemp("vocabulary")
    texts = (SAMPLE / "pretrain.txt").read_text(encoding="utf-8").split("\n\n")[:60]
    wrap_tokenizer(train_word_piece(texts, 1000, True)).save_pretrained(folder)
    return folder


@pytest.fixture
def write(vocabulary, tmp_path):
    """Write the tables and the YAML of a short run; changes are named section__setting. Returns the configuration."""

    def make(kind: str = "classification", records: list[dict[str, Any]] | None = None, name: str = "run", **changes):
        records = make_records(kind) if records is None else records
        for split, split_records in {"train": records[24:], "validation": records[:24]}.items():
            lines = "".join(json.dumps(record) + "\n" for record in split_records)
            (tmp_path / f"{split}.jsonl").write_text(lines)
        model = tmp_path / "bert"
        if not model.exists():
            save_model(vocabulary, "", model)
        values: dict[str, Any] = {
            "model": {"init_from": str(model)},
            "task": {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation")}
            | {"type": kind, "max_length": 48 if kind != "question-answering" else 64, "doc_stride": 16},
            "train": {"max_steps": 6, "global_batch_size": 8, "learning_rate": 1e-3, "precision": "fp32"},
            "output_dir": str(tmp_path / name),
        }
        values["train"] |= {"logging_steps": 1, "eval_steps": 3}
        for key, value in changes.items():
            section, _, setting = key.partition("__")
            values[section][setting] = value
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return load_config(FinetuneConfig, path)

    return make
