"""What several test files share."""

import os

from paths import SAMPLE
from tiny_models import FOLDER_SHAPE, HEADS, randomize

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # tests start processes beside themselves

import sys
from pathlib import Path

import hypothesis
import pytest
import yaml

from bertlite import cli
from bertlite.core.logging import log_to_terminal
from bertlite.core.signals import stop_request

# A busy machine is no reason to fail.
hypothesis.settings.register_profile("bertlite", suppress_health_check=[hypothesis.HealthCheck.too_slow], deadline=None)
hypothesis.settings.load_profile("bertlite")


@pytest.fixture(autouse=True)
def log_lines_on_standard_error() -> None:
    """As in the shell, also where a test calls the package in its own process."""
    log_to_terminal()


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> str:
    """One corpus cache for the whole session, so that the small tokenizer is trained once."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def text_files(tmp_path_factory) -> dict[str, str]:
    """Training and validation text, cut from the sample where a document ends."""
    folder = tmp_path_factory.mktemp("text")
    documents = (SAMPLE / "pretrain.txt").read_text(encoding="utf-8").split("\n\n")
    for name, part in {"train": documents[:30], "validation": documents[-5:]}.items():
        (folder / f"{name}.txt").write_text("\n\n".join(part), encoding="utf-8")
    return {name: str(folder / f"{name}.txt") for name in ("train", "validation")}


@pytest.fixture
def write_config(tmp_path, cache, text_files):
    """Write the YAML of a run of seconds, with changes by dotted names, and return its path."""

    def write(name: str = "run", **changes) -> Path:
        config = {
            "model": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
            "tokenizer": {"vocab_size": 1000},
            "data": {
                "train": [text_files["train"]],
                "validation": [text_files["validation"]],
                "sequence_length": 64,
                "cache_dir": cache,
            },
            "train": {
                "max_steps": 12,
                "global_batch_size": 8,
                "learning_rate": 1e-3,
                "logging_steps": 2,
                "eval_steps": 4,
                "save_steps": 4,
                "compile": False,
                "precision": "fp32",
            },
            "output_dir": str(tmp_path / name),
        }
        for key, value in changes.items():
            section, _, setting = key.partition("__")
            config.setdefault(section, {})[setting] = value
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return write


@pytest.fixture
def bertlite(capsys, monkeypatch):
    """Run the command line in this process: `bertlite("fill", …)` returns exit code, stdout and stderr."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bertlite", *map(str, arguments)])
        monkeypatch.setattr(stop_request, "is_deferred", False)  # this process continues after the command
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return end.value.code or 0, out, err

    return run


@pytest.fixture(scope="session")
def every_head(tmp_path_factory, text_files) -> dict[str, Path]:
    """Folders with tiny random models of every head, by transformers, and a tokenizer; not to be changed."""
    import transformers

    from bertlite.data.tokenizer import wrap_tokenizer
    from bertlite.data.vocabulary import train_word_piece

    documents = Path(text_files["train"]).read_text(encoding="utf-8").split("\n\n")
    tokenizer = wrap_tokenizer(train_word_piece(documents, FOLDER_SHAPE["vocab_size"], lowercase=True))
    tokenizer.model_max_length = 32
    folders = {}
    for name, changes in HEADS.items():
        kind = name if name.startswith("Bert") else "BertForSequenceClassification"
        config = transformers.BertConfig(**{**FOLDER_SHAPE, **changes})
        model = randomize(getattr(transformers, kind)(config), 0.3)
        folders[name] = tmp_path_factory.mktemp("head")
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders
