"""The estimates of `bertlite plan` against what runs take."""

import gzip
import json
import re
import shutil
from pathlib import Path

import pytest
from paths import SAMPLE
from tiny_runs import metrics, pretrain, weights

from bertlite.config.loading import load_config, with_changes
from bertlite.config.settings import MaskingSettings, PretrainConfig
from bertlite.core.errors import UserError
from bertlite.data.masking import max_predictions
from bertlite.model.huggingface import read_architecture
from bertlite.pretraining import estimate as planning
from bertlite.pretraining.bench import flops_per_sequence
from bertlite.pretraining.estimate import format_size, plan
from bertlite.pretraining.prepare import prepare


def planned(path: Path, *overrides: str, measure: bool = False) -> dict:
    return plan(load_config(PretrainConfig, path, list(overrides)), measure)


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_a_plan_is_what_the_run_takes(write_config, optim):
    path = write_config(train__optim=optim, train__save_steps=1, train__save_total_limit=2)
    result = planned(path)
    folder = pretrain(path)
    learnt = weights(folder)
    assert result["parameters"] == sum(tensor.numel() for tensor in learnt.values())
    assert result["tokens"] == pytest.approx(metrics(folder)[-1]["tokens"], rel=0.01)
    prepared = prepare(load_config(PretrainConfig, path))
    assert result["epochs"] == pytest.approx(12 * 8 / len(prepared.packing), rel=0.02)
    of_a_step = 8 * flops_per_sequence(read_architecture(folder / "model"), 64, max_predictions(64, MaskingSettings()))
    assert result["floating_point_operations"] == 12 * of_a_step
    sizes = [path.stat().st_size for path in folder.rglob("*.safetensors")]  # two checkpoints and the model
    assert 0.6 * result["disk"] < sum(sizes) <= 1.05 * result["disk"]
    assert result["warnings"] == [] and result["seconds"] is None


def test_sources_that_keep_no_document_count_nothing(write_config, text_files, tmp_path):
    copies = [str(shutil.copy(text_files["train"], tmp_path / f"{number}.txt")) for number in range(3)]
    path = write_config(data__train=copies, data__remove_duplicates=True)
    prepared = prepare(load_config(PretrainConfig, path))
    assert planned(path)["epochs"] == pytest.approx(12 * 8 / len(prepared.packing), rel=0.02)


def test_plan_leaves_no_files(write_config, tmp_path):
    path = write_config(data__cache_dir=str(tmp_path / "cache"))
    planned(path, measure=True)
    assert sorted(tmp_path.iterdir()) == [path]


def test_time_is_measured(write_config):
    result = planned(write_config(train__max_steps=1000, train__eval_steps=500), measure=True)
    assert 1000 * result["seconds_per_step"] < result["seconds"] < 3000 * result["seconds_per_step"] + 100
    assert 1e-4 < result["seconds_per_step"] < 10
    longer = planned(write_config(train__max_steps=100_000), measure=True)
    assert longer["seconds"] > 10 * result["seconds"]


def test_a_step_of_many_sequences_is_extrapolated_from_few(write_config, monkeypatch, capsys):
    """What is known is reported before the measurement, which trains one sequence a step here."""
    monkeypatch.setattr(planning, "MEASURED_OPERATIONS", 1)
    reported: list[dict] = []
    config = load_config(PretrainConfig, write_config(train__max_steps=1000))
    few, many = (
        plan(
            with_changes(config, {"train.global_batch_size": size}, "test"),
            report=lambda known: reported.append(dict(known)),
        )
        for size in (8, 800)
    )
    assert capsys.readouterr().err.count("4 steps of 1 sequences") == 2
    assert 4 < many["seconds_per_step"] / few["seconds_per_step"] < 3000  # without a busy machine, 50 to 100
    times = {"seconds", "seconds_per_step"}
    for known, result in zip(reported, (few, many), strict=True):
        assert all(known[name] is None for name in times)
        assert {name: known[name] for name in known.keys() - times} == {
            name: result[name] for name in result.keys() - times
        }


def test_the_text_and_the_run_are_counted_apart(write_config):
    result = planned(write_config(train__max_steps=500))
    assert result["tokens"] == pytest.approx(result["epochs"] * result["text_tokens"], rel=1e-3)
    prepared = prepare(load_config(PretrainConfig, write_config()))
    assert result["text_tokens"] == pytest.approx(prepared.packing.tokens(), rel=0.02)
    lines = format_size(result)
    assert f"about {result['text_tokens']:,} tokens in data.train" in lines
    assert f"{result['tokens']:,} tokens in {result['steps']:,} steps" in lines


@pytest.mark.parametrize("form", ["plain", "gz", "split"])
def test_epochs_are_estimated_from_a_sample(write_config, tmp_path, monkeypatch, form):
    monkeypatch.setattr(planning, "SAMPLE_CHARACTERS", 400_000)
    text = (SAMPLE / "pretrain.txt").read_text()
    names = ["text.txt.gz"] if form == "gz" else ["text.txt"]
    (tmp_path / names[0]).write_bytes(gzip.compress(text.encode()) if form == "gz" else text.encode())
    changes = {} if form == "split" else {"data__validation": ["sample"]}
    path = write_config(data__train=[str(tmp_path / names[0])], train__max_steps=1000,
                        **({"data__validation": []} if form == "split" else changes))  # fmt: skip
    prepared = prepare(load_config(PretrainConfig, path))
    assert planned(path)["epochs"] == pytest.approx(8000 / len(prepared.packing), rel=0.2)


def test_unknown_epochs_are_none(write_config, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "SAMPLE_CHARACTERS", 1000)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"some words of row {number}"}) for number in range(500)))
    result = planned(write_config(data__train=[str(rows)]))
    assert result["epochs"] is None and "an unknown number of epochs" in format_size(result)


def test_plan_warns_of_what_does_not_fit_without_allocating_it(write_config):
    huge = ["model.hidden_size=65536", "model.num_hidden_layers=20", "model.intermediate_size=262144"]
    result = planned(write_config(), *huge, measure=True)
    assert result["parameters"] > 10**12 and result["seconds"] is None
    memory, disk = result["warnings"]
    assert "does not fit into memory" in memory and "do not fit on the disk" in disk and "--out" in disk
    assert format_size(result).count("\nwarning: ") == 2


@pytest.mark.parametrize("setting", ["hidden_size", "vocab_size", "max_position_embeddings", "num_hidden_layers"])
def test_a_huge_shape_is_a_user_error(write_config, setting):
    section = "tokenizer" if setting == "vocab_size" else "model"
    with pytest.raises(UserError, match=f"{section}.{setting} is 4000000000000: .* less than or equal to"):
        planned(write_config(), f"{section}.{setting}=4000000000000")


def test_the_command_prints_lines_or_json(bertlite, write_config):
    command = ("plan", write_config(), "--no-measure")
    _, lines, _ = bertlite(*command)
    assert [line.split()[0] for line in lines.splitlines()] == [
        "parameters", "text", "training", "operations", "memory", "disk", "time",
    ]  # fmt: skip
    result = json.loads(bertlite(*command, "--json")[1])
    assert re.search(f"parameters +{result['parameters']:,}\n", lines)


def test_plan_counts_the_parameters_of_the_starting_model(write_config):
    folder = pretrain(write_config("begin"))
    changes = ["model={init_from: " + json.dumps(str(folder)) + "}", "tokenizer={}"]
    assert planned(write_config("on"), *changes)["parameters"] == planned(write_config("begin"))["parameters"]


def test_a_budget_of_time_gives_the_steps_that_fit(write_config):
    path = write_config(train__budget="10m", train__eval_steps=1_000_000)
    result = plan(load_config(PretrainConfig, path))
    assert result["seconds"] == 600 and result["steps"] > 100
    assert result["steps"] * result["seconds_per_step"] == pytest.approx(600, rel=0.1)
    unmeasured = plan(load_config(PretrainConfig, path), measure=False)
    assert "need not fit the budget" in unmeasured["warnings"][-1]
    by_tokens = plan(load_config(PretrainConfig, write_config(train__budget="64000 tokens")), measure=False)
    assert by_tokens["tokens"] == pytest.approx(64000, rel=0.02) and not by_tokens["warnings"]
