"""What the README pages tell people to write is valid, and what they tell them to run runs."""

import json
import lzma
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from argparse import ArgumentParser
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml
from paths import PACKAGE, ROOT, SAMPLE

from bertlite import load
from bertlite.config.finetune_settings import FinetuneConfig, SweepConfig
from bertlite.config.loading import load_config
from bertlite.config.settings import PretrainConfig
from bertlite.data import masking
from bertlite.finetuning import finetune
from bertlite.pretraining.prepare import check_settings

PATHS = [ROOT / "README.md", *sorted(ROOT.glob("*/README.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PATHS}
INSTALL = {"pip", "scripts/quickstart", "scripts/test", "scripts/check"}  # these change an environment
each_page = pytest.mark.parametrize("page", PAGES)


def blocks(page: str) -> list[tuple[str, str]]:
    """The fenced blocks of a page: language and text."""
    return re.findall(r"^```(\w*)\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def statements(text: str) -> list[str]:
    """The statements of a shell block: lines, joined where a line continues or a here-document follows."""
    result, lines = [], iter(text.splitlines())
    for line in lines:
        while line.endswith("\\"):
            line = line.removesuffix("\\") + next(lines)
        if here := re.search(r"<<'?(\w+)'?", line):
            while not line.endswith(f"\n{here[1]}"):
                line += "\n" + next(lines)
        if line.strip() and not line.startswith("#"):
            result.append(line)
    return result


def split(statement: str) -> list[str]:
    """The words of a simple command, without assignments to variables before it."""
    words = shlex.split(statement, comments=True)
    return [word for n, word in enumerate(words) if n or "=" not in word]


def page_commands(page: str) -> list[tuple[str, str]]:
    """What a reader of a page runs, in order: shell statements, with their output where it is shown, and Python."""
    commands = []
    for language, text in blocks(page):
        if language == "bash":
            commands += [(statement, "") for statement in statements(text)]
        elif language == "console":
            for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
                statement, _, output = part.partition("\n")
                commands.append((statement, output))
        elif language == "python":
            commands.append((text, "python"))
    prose = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    return commands + [(command, "") for command in re.findall(r"`(bertlite [^`\s]+\s[^`]+)`", prose)]


def script_commands() -> list[str]:
    """The commands of all pages that run a script of this repository with options."""
    shell = [statement for page in PAGES for statement, kind in page_commands(page) if kind != "python"]
    return [line for line in shell if re.match(r"(\w+=\S+ )?scripts/", line) and split(line)[0] not in INSTALL]


def config_class(path: Path) -> type:
    """The class of the settings that a file holds."""
    sections = yaml.safe_load(path.read_text()).keys()
    return SweepConfig if "sweep" in sections else FinetuneConfig if sections & {"task", "tasks"} else PretrainConfig


@pytest.mark.parametrize("text", [text for page in PAGES for language, text in blocks(page) if language == "yaml"])
def test_configurations_on_the_pages_load(text, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    load_config(config_class(tmp_path / "mine.yaml"), tmp_path / "mine.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_that_ship_load(path):
    config = load_config(config_class(path), path)
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
    sample = {"task": {split: "sample" for split in ("train", "validation", "test")}}
    assert config == FinetuneConfig.model_validate(sample)
    assert listed.keys() == config.model_dump().keys()
    for section in ("model", "task", "train"):
        assert listed[section].keys() == getattr(config, section).model_dump().keys(), section


def test_the_tables_of_settings_are_those_of_the_code():
    script = runpy.run_path(str(ROOT / "scripts" / "settings_page"))
    assert script["settings_tables"]() in PAGES["configs/README.md"], "run scripts/settings_page"


# What makes a command short enough for a test; added to the settings and options that a page gives.
SMALL_SETTINGS = {
    "train": {"max_steps": 6, "save_steps": 3, "compile": False, "precision": "fp32", "num_train_epochs": 1},
    "model": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "tokenizer": {"vocab_size": 1000},
    "sweep": {"trials": 2},
}
SMALL_OPTIONS = {"--rounds": "1", "--seconds": "0.1", "--runs": "1", "--kills": "1", "--steps": "300", "--count": "1"}


def smaller(words: list[str]) -> list[str]:
    """A command with less to do."""
    words = [SMALL_OPTIONS.get(option, word) for option, word in pairwise(["", *words])]
    if "--seeds" in words:
        words = words[: words.index("--seeds") + 2]  # the first of them, as the seeds come last
    words = ["tiny" if word in ("mini", "small", "base") else word for word in words]  # of compare_hf
    words = [word for before, word in pairwise(["", *words]) if (before, word) != ("tiny", "tiny")]
    for path in [word for word in words if word.endswith(".yaml") and words[0] == "bertlite"]:
        sections = config_class(Path(path)).model_fields
        for section in sections.keys() & SMALL_SETTINGS.keys():
            known = sections[section].annotation.model_fields
            for name in known.keys() & SMALL_SETTINGS[section].keys():
                words += ["--set", f"{section}.{name}={SMALL_SETTINGS[section][name]}"]
    return words


def run_page(page: str, bertlite, scripts: set[str]) -> dict:
    """Run a page in the current folder, with the scripts that are named; return Python's variables."""
    scope: dict = {}
    for command, output in page_commands(page):
        if output == "python":
            exec(command, scope)
            continue
        simple = "<<" not in command and "|" not in command and ">" not in command
        words = split(command) if simple else ["bash"]
        if words[0] == "bertlite":
            code, out, err = bertlite(*smaller(words)[1:])
            assert code == 0, f"{command}: {err}"
            check_output(command, output, out + err)
        elif words[0].startswith("scripts/"):
            if words[0].removeprefix("scripts/") in scripts:
                subprocess.run([sys.executable, ROOT / words[0], *smaller(words)[1:]], check=True)
        elif words[0] not in INSTALL:
            subprocess.run(["bash", "-euc", command], check=True)
    return scope


def check_output(command: str, shown: str, printed: str) -> None:
    """The lines that a page shows are printed, as far as their first number; a progress bar is for terminals."""
    lines = printed.splitlines()
    for line in shown.splitlines():
        words = re.match(r"[^\d…]*", line)[0].rstrip()
        if not line.startswith("training: "):
            assert any(other.startswith(words) for other in lines), f"{command}: {line!r} is not in {printed}"


@pytest.fixture
def empty_folder(tmp_path, cache, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BERTLITE_CACHE", cache)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(masking, "STRATEGIES", dict(masking.STRATEGIES))  # an example adds one
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable), prepend=os.pathsep)
    return tmp_path


@pytest.fixture
def clone(empty_folder, text_files, every_head) -> Path:
    """A clone of the repository, as far as pages use it, with small files in place of the data sets they name."""
    shutil.copytree(ROOT / "configs", empty_folder / "configs")
    text, validation = (Path(text_files[name]).read_text(encoding="utf-8") for name in ("train", "validation"))
    files = {"bertlite/sample/pretrain.txt": text,
             "data/enwiki_0.txt.xz": text, "data/enwiki_valid.txt": validation,
             "data/zhwiki.txt.xz": text, "data/zhwiki_valid.txt": validation,
             "data/sentences.txt": validation}  # fmt: skip
    table = (SAMPLE / "subject_train.tsv").read_text(encoding="utf-8").splitlines()[1:81]
    labels_and_texts = [line.split("\t") for line in table]
    for name in ("trec6", "sst2", "banking77", "cola", "agnews", "chnsenticorp"):
        files[f"data/{name}/train.tsv"] = files[f"data/{name}/test.tsv"] = "\n".join(["label\ttext", *table])
    pairs = [f"{number % 2}\t{text}\t{text}" for number, (_, text) in enumerate(labels_and_texts)]
    files["data/mrpc/train.tsv"] = files["data/mrpc/test.tsv"] = "\n".join(["label\tsentence1\tsentence2", *pairs])
    tagged = "\n\n".join("Ada\tB-PER\nspoke\tO" for _ in range(20))
    for name in ("wnut17/train.conll", "wnut17/test.conll", "peopledaily/train.txt", "peopledaily/dev.txt"):
        files[f"data/{name}"] = tagged
    question = {"id": "1", "question": "Who spoke?", "answers": [{"text": "Ada", "answer_start": 0}]}
    squad = json.dumps({"data": [{"title": "", "paragraphs": [{"context": "Ada spoke.", "qas": [question]}]}]})
    files["data/squad/train.json"] = files["data/squad/test.json"] = squad
    pair = {"sentence_good": "The state is.", "sentence_bad": "The state are.", "linguistics_term": "x", "UID": "y"}
    files["blimp/pairs.jsonl"] = json.dumps(pair)
    for name, content in files.items():
        (empty_folder / name).parent.mkdir(parents=True, exist_ok=True)
        (empty_folder / name).write_bytes((lzma.compress if name.endswith(".xz") else bytes)(content.encode()))
    for name in ("bert-base-uncased", "bert-base-chinese"):
        shutil.copytree(every_head["BertForMaskedLM"], empty_folder / "google-bert" / name)
    return empty_folder


def test_the_readme_runs_from_top_to_bottom(bertlite, empty_folder):
    scope = run_page("README.md", bertlite, scripts=set())
    assert {path.name for path in Path("runs").iterdir()} == {"mine", "subjects"}
    assert scope["vectors"].shape == (2, 32) and scope["answers"][0].keys() >= {"score", "token_str"}
    several = load("runs/subjects").predict(["A film.", "Another."])
    assert [set(prediction) for prediction in several] == [{"label", "score"}] * 2
    alone = load("runs/subjects").predict("A film.")
    assert (alone["label"], alone["score"]) == (several[0]["label"], pytest.approx(several[0]["score"], abs=1e-5))


def test_the_attention_example_has_the_shapes_that_it_says():
    scope: dict = {}
    (example,) = [text for _, text in blocks("bertlite/README.md") if "attention.weights" in text]
    exec(example, scope)
    assert scope["output"].shape == (2, 5, 64) and scope["weights"].shape == (2, 4, 5, 9)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md"])
def test_the_pages_of_the_repository_run_from_top_to_bottom(page, bertlite, clone):
    run_page(page, bertlite, scripts={"curve"})


@pytest.mark.slow
def test_the_measurements_run(bertlite, clone):
    names = {split(command)[0].removeprefix("scripts/") for command in script_commands()}
    if find_spec("accelerate") is None:  # which the page installs for it
        names.discard("compare_hf")
    run_page("scripts/README.md", bertlite, scripts=names - {"mutate", "compare_commits"})
    assert "validation" in Path("curve.svg").read_text()


class Parsed(Exception):
    """A script has understood its options."""


@pytest.mark.parametrize("command", script_commands())
def test_scripts_know_the_options_that_the_pages_give_them(command, monkeypatch):
    parse = ArgumentParser.parse_args

    def parse_and_stop(parser: ArgumentParser) -> None:
        parse(parser)
        raise Parsed

    monkeypatch.setattr(ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", split(command))
    with patch.dict(os.environ), pytest.raises(Parsed):  # some set variables
        runpy.run_path(str(ROOT / split(command)[0]), run_name="__main__")


@pytest.mark.parametrize("script", sorted(name for name in INSTALL if name != "pip"))
def test_shell_scripts_are_well_formed(script):
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)


def test_tests_that_the_pages_run_exist():
    commands = [split(command) for page in PAGES for command, kind in page_commands(page) if kind != "python"]
    named = {word for words in commands for word in words if words[0] == "scripts/test" and word.startswith("tests/")}
    assert named and all((ROOT / path).exists() for path in named)


@each_page
def test_links_and_file_names_on_the_pages_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)\)", PAGES[page])
    for link in [link for link in links if "://" not in link and "/actions/" not in link]:
        assert ((ROOT / page).parent / link).exists(), link
    for name in re.findall(r"`([\w/]+\.py)`", PAGES[page]):
        assert any((ROOT / base / name).exists() for base in ("", "bertlite", "tests")), name


def test_dicts_that_are_to_be_extended_are_where_the_page_says():
    entries = re.findall(r"`([A-Z]+)`, `([\w/]+\.py)` \|$", PAGES["bertlite/README.md"], re.MULTILINE)
    assert len(entries) > 5
    for name, file in entries:
        assert re.search(rf"^{name}\b.* = ", (PACKAGE / file).read_text(), re.MULTILINE), f"{name} in {file}"


def test_the_page_of_the_package_describes_every_sub_package():
    for path in PACKAGE.glob("*/__init__.py"):
        assert f"| `{path.parent.name}/` |" in PAGES["bertlite/README.md"], path


@pytest.mark.parametrize("folder, pattern", [("configs", "*.yaml"), ("scripts", "[!R]*"), ("tests", "*.py")])
def test_every_file_beside_a_page_is_described_on_it(folder, pattern):
    for path in (ROOT / folder).glob(pattern):
        assert re.search(rf"[`\[(]{re.escape(path.name)}[`\])]", PAGES[f"{folder}/README.md"]), path


def test_extras_that_the_pages_install_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {name for page in PAGES for names in re.findall(r"(?:\.|bertlite)\[([\w,-]+)\]", PAGES[page])
             for name in names.split(",")}  # fmt: skip
    assert named and named <= extras.keys()


def test_the_readme_fits_on_a_few_screens():
    assert len(PAGES["README.md"].splitlines()) <= 150


def test_results_in_the_readme_are_measurements():
    measured = set(re.findall(r"[\d,.]+", PAGES["scripts/README.md"]))
    (table,) = re.findall(r"^\| size .*?\n\n", PAGES["README.md"], re.DOTALL | re.MULTILINE)
    assert set(re.findall(r"[\d,.]+", table)) <= measured


def test_the_promises_name_tests_that_exist():
    promises = re.search(r"^## What is promised.*?^### ", PAGES["tests/README.md"], re.DOTALL | re.MULTILINE)[0]
    names = re.findall(r"`([\w/]+\.py)::(\w+)`", promises)
    assert len(names) > 30 and promises.count("::") == len(names)
    for file, name in names:
        assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(encoding="utf-8"), re.MULTILINE), name
