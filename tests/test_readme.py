"""What the README tells people to write is valid, and what it tells them to run runs."""

import json
import lzma
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml
from paths import ROOT

from bertlite.config.loading import load_config
from bertlite.config.settings import FinetuneConfig, PretrainConfig, SweepConfig
from bertlite.finetuning import finetune
from bertlite.pretraining.pretrain import check_settings

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def kind_of(path: Path) -> type:
    """What a configuration is for."""
    sections = yaml.safe_load(path.read_text()).keys()
    return SweepConfig if "sweep" in sections else FinetuneConfig if sections & {"task", "tasks"} else PretrainConfig


@pytest.mark.parametrize("text", blocks("yaml"))
def test_configurations_in_the_readme_load(text, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    load_config(kind_of(tmp_path / "mine.yaml"), tmp_path / "mine.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_that_ship_load(path):
    config = load_config(kind_of(path), path)
    if isinstance(config, FinetuneConfig):
        named = config.model_copy(update={"model": config.model.model_copy(update={"init_from": "runs/mine"})})
        finetune.check_settings(named)
    elif config.model.init_from is None:
        check_settings(config)


def test_the_list_of_settings_shows_every_setting_with_its_default():
    listed = yaml.safe_load((ROOT / "configs" / "mini.yaml").read_text())
    config = load_config(PretrainConfig, ROOT / "configs" / "mini.yaml")
    assert config == PretrainConfig.model_validate({"data": {"train": ["sample"]}})
    for section in ("model", "tokenizer", "data", "masking", "train"):
        assert listed[section].keys() == getattr(config, section).model_dump().keys(), section


def test_the_list_of_settings_of_fine_tuning_is_complete():
    listed = yaml.safe_load((ROOT / "configs" / "classification.yaml").read_text())
    config = load_config(FinetuneConfig, ROOT / "configs" / "classification.yaml")
    sample = {"task": {part: "sample" for part in ("train", "validation", "test")}}
    assert config == FinetuneConfig.model_validate(sample)
    assert listed.keys() == config.model_dump().keys()
    for section in ("model", "task", "train"):
        assert listed[section].keys() == getattr(config, section).model_dump().keys(), section


def test_the_attention_example_of_the_readme_runs():
    scope: dict = {}
    (example,) = [text for text in blocks("python") if "MultiHeadAttention" in text]
    exec(example, scope)
    assert scope["output"].shape == (2, 5, 64) and scope["weights"].shape == (2, 4, 5, 9)


def test_the_python_example_of_the_readme_runs(every_head, tmp_path, monkeypatch):
    for name, head in {"mine": "BertForMaskedLM", "reviews": "BertForSequenceClassification"}.items():
        shutil.copytree(every_head[head], tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    (example,) = [text for text in blocks("python") if "from bertlite import load" in text]
    exec(example, scope)
    assert scope["vectors"].shape == (2, 24) and scope["answers"][0].keys() >= {"score", "token_str"}
    several = scope["film"].predict(["A film.", "Another."])
    assert [set(one) for one in several] == [{"label", "score"}] * 2
    alone = scope["film"].predict("A film.")
    assert (alone["label"], alone["score"]) == (several[0]["label"], pytest.approx(several[0]["score"], abs=1e-5))


def commands() -> list[list[str]]:
    """The commands of the README in their order, then those within its prose, each as the shell would split it."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    within = re.findall(r"`(bertlite [^`\s]+\s[^`]+)`", prose)
    return [words for line in [*lines, *within] if (words := shlex.split(line, comments=True))]


SHELL = [["scripts/quickstart"], ["scripts/test"]]  # the commands that install into .venv
MEASUREMENTS = [words for words in commands() if words[0] != "bertlite" and words not in SHELL]


# What makes a command short enough for a test; added to the settings and options that the README gives.
SMALL_SETTINGS = {
    "train": {"max_steps": 20, "save_steps": 10, "compile": False, "precision": "fp32", "num_train_epochs": 1},
    "model": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
    "tokenizer": {"path": "vocabulary"},
    "sweep": {"trials": 2},
}
SMALL_OPTIONS = {"--rounds": "1", "--seconds": "0.1", "--runs": "1", "--kills": "1", "--steps": "300", "--step": "2"}


def smaller(words: list[str]) -> list[str]:
    """A command with less to do."""
    words = [SMALL_OPTIONS.get(option, word) for option, word in pairwise(["", *words])]
    words = ["tiny" if word in ("mini", "small", "base") else word for word in words]  # of compare_hf
    words = [word for before, word in pairwise(["", *words]) if (before, word) != ("tiny", "tiny")]
    for path in [word for word in words if word.endswith(".yaml") and words[0] == "bertlite"]:
        sections = kind_of(Path(path)).model_fields
        for section in sections.keys() & SMALL_SETTINGS.keys():
            known = sections[section].annotation.model_fields
            for name in known.keys() & SMALL_SETTINGS[section].keys():
                words += ["--set", f"{section}.{name}={SMALL_SETTINGS[section][name]}"]
    return words


@pytest.fixture
def readers_folder(tmp_path, text_files, every_head, monkeypatch) -> Path:
    """Where somebody who follows the README stands: texts, tables, minimal pairs and configurations lie there."""
    text, held_out = (Path(text_files[name]).read_text(encoding="utf-8") for name in ("train", "validation"))
    texts = {"texts/a.txt": text, "enwiki.txt.xz": text, "enwiki_0.txt.xz": text, "held-out.txt": held_out,
             "enwiki_valid.txt": held_out, "zhwiki.txt.xz": text, "zhwiki_valid.txt": held_out,
             "other.txt": held_out[:300], "texts.txt": held_out[:300],
             "sentences.txt": held_out}  # fmt: skip
    for folder in ("texts", "blimp"):
        (tmp_path / folder).mkdir()
    for name, content in texts.items():
        (tmp_path / name).write_bytes((lzma.compress if name.endswith(".xz") else bytes)(content.encode()))
    for name in ("vocabulary", "bert-base-uncased"):
        shutil.copytree(every_head["BertForMaskedLM"], tmp_path / name)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "mine.yaml").write_text(
        "data: {train: [texts/*.txt], validation: [held-out.txt]}\noutput_dir: runs/mine"
    )
    (reviews,) = [block for block in blocks("yaml") if "runs/reviews" in block]
    for name in ("reviews", "trec6", "sst2", "banking77", "cola", "agnews", "mrpc", "wnut17", "chnsenticorp"):
        (tmp_path / f"{name}.yaml").write_text(reviews)
    sample = (ROOT / "bertlite/sample/subject_train.tsv").read_text(encoding="utf-8").splitlines()[1:]
    for name, rows in {"train": sample[:80], "dev": sample[80:120], "test": sample[:40]}.items():
        (tmp_path / f"{name}.tsv").write_text("\n".join(["label\tsentence", *rows]), encoding="utf-8")
    pair = {"sentence_good": "The state is.", "sentence_bad": "The state are.", "linguistics_term": "x", "UID": "y"}
    (tmp_path / "blimp" / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BERTLITE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def run_script(words: list[str]) -> None:
    subprocess.run([sys.executable, ROOT / words[0], *smaller(words)[1:]], check=True)


def test_the_commands_of_the_readme_run(bertlite, readers_folder):
    for words in commands():
        if words[0] == "bertlite":
            code, _, errors = bertlite(*smaller(words)[1:])
            assert code == 0, f"{words}: {errors}"
        elif words[0] == "scripts/curve":
            run_script(words)
    assert {path.name for path in (readers_folder / "runs").iterdir()} == {
        "mine",
        "reviews",
        "sweep",
        "wikipedia",
        "chinese",
    }
    assert "held out" in (readers_folder / "curve.svg").read_text()


@pytest.mark.slow
def test_the_measurements_of_the_readme_run(bertlite, readers_folder, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for words in commands():
        if words[0] == "bertlite":
            assert bertlite(*smaller(words)[1:])[0] == 0
        elif words not in SHELL:
            run_script(words)


class Parsed(Exception):
    """A script has understood its options."""


@pytest.mark.parametrize("words", MEASUREMENTS, ids=" ".join)
def test_scripts_know_the_options_that_the_readme_gives_them(words, monkeypatch):
    parse = ArgumentParser.parse_args

    def parse_and_stop(parser: ArgumentParser) -> None:
        parse(parser)
        raise Parsed

    monkeypatch.setattr(ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", words)
    with patch.dict(os.environ), pytest.raises(Parsed):  # some set variables
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")


@pytest.mark.parametrize("words", SHELL, ids=" ".join)
def test_shell_scripts_are_well_formed(words):
    subprocess.run(["bash", "-n", *words], cwd=ROOT, check=True)


def test_files_named_in_the_readme_exist():
    for words in commands():
        assert words[0] == "bertlite" or (ROOT / words[0]).exists()
    for name in re.findall(r"`(?:bertlite/)?(\w+\.py)`", README):
        assert (ROOT / "bertlite" / name).exists(), name
    for path in (ROOT / "bertlite").glob("*.py"):
        assert path.name.startswith("__") or f"`{path.name}`" in README or f"`bertlite/{path.name}`" in README, path
