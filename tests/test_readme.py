"""What the README tells people to write is valid, and what it tells them to run exists."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from bertlite import finetune
from bertlite.config import FinetuneConfig, PretrainConfig, SweepConfig
from bertlite.config_file import load_config
from bertlite.pretrain import check_settings

ROOT = Path(__file__).parent.parent
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
    assert [set(one) for one in several] == [{"label", "score"}] * 2 and scope["film"].predict("A film.") == several[0]


def test_commands_and_files_in_the_readme_exist():
    from bertlite import cli

    commands = {command.callback.__name__ for command in cli.app.registered_commands}
    for text in blocks("bash"):
        for line in text.splitlines():
            if line.startswith("bertlite "):
                assert line.split()[1] in commands
            if line.startswith("scripts/"):
                assert (ROOT / line.split()[0]).exists()
    for name in re.findall(r"`(?:bertlite/)?(\w+\.py)`", README):
        assert (ROOT / "bertlite" / name).exists(), name
    for path in (ROOT / "bertlite").glob("*.py"):
        assert path.name.startswith("__") or f"`{path.name}`" in README or f"`bertlite/{path.name}`" in README, path
