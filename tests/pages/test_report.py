"""The page of a run: its data, its size, text that is hostile, and how a browser shows it."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from sklearn.metrics import confusion_matrix
from tiny_runs import TIMES, metrics, pretrain
from tiny_tasks import make_records

from bertlite.config.finetune_settings import FinetuneConfig
from bertlite.config.loading import load_config
from bertlite.finetuning.finetune import run as finetune
from bertlite.pages.report import count_confusion, downsample, write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "</script><script>alert('x')</script> \u202e rtl \x1b[31m 😀 " + "long " * 2000


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory, every_head) -> Path:
    """A fine-tuning with two seeds; not to be changed."""
    folder, records = tmp_path_factory.mktemp("finetuned"), make_records("classification")
    for name, part in {"train": records[24:], "validation": records[:24]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in part))
    (folder / "a.yaml").write_text(
        f"model: {{init_from: {every_head['BertModel']}}}\n"
        f"task: {{train: {folder}/train.jsonl, validation: {folder}/validation.jsonl, max_length: 48}}\n"
        "train: {max_steps: 4, eval_steps: 2, logging_steps: 1, seeds: [0, 1], precision: fp32}\n"
        f"output_dir: {folder}/run\n"
    )
    finetune(load_config(FinetuneConfig, folder / "a.yaml"))
    return folder / "run"


def data_of(page: Path) -> dict:
    return json.loads(re.search(r"const DATA = (.*);\n", page.read_text(encoding="utf-8"))[1])


def test_the_page_holds_the_curves_and_settings_of_the_run(write_config, bertlite, tmp_path):
    folder = pretrain(write_config(train__max_steps=12, train__eval_steps=4, train__logging_steps=1))
    code, out, err = bertlite("report", folder)
    assert (code, out) == (0, f"{folder}/report.html\n"), err
    (run,) = data_of(folder / "report.html")["runs"]
    lines, curve = metrics(folder), run["curves"][0]
    shown = {
        name: [{key: value for key, value in line.items() if key not in TIMES} for line in curve[name]]
        for name in ("training", "evaluation")
    }
    assert shown["training"] == [line for line in lines if "loss" in line] and len(shown["training"]) == 12
    assert shown["evaluation"] == [line for line in lines if "eval_loss" in line] and len(shown["evaluation"]) == 3
    settings = {name: (value, default) for name, value, default in run["settings"]}
    assert settings["train.max_steps"] == ("12", "1200")
    assert settings["train.adam_beta1"] == ("0.9", None)
    assert run["facts"]["precision"] in ("fp32", "bf16") and run["kind"] == "pretraining"


def test_the_page_of_a_fine_tuning_holds_its_confusion_matrix_and_worst_examples(finetuned, tmp_path):
    (run,) = data_of(write_report([str(finetuned)], tmp_path / "page.html"))["runs"]
    predictions = [json.loads(line) for line in (finetuned / "predictions.jsonl").read_text().splitlines()]
    labels = run["confusion"]["labels"]
    expected = confusion_matrix(
        [line["label"] for line in predictions], [line["predicted"] for line in predictions], labels=labels
    )
    assert run["confusion"]["counts"] == expected.tolist()
    assert [curve["name"] for curve in run["curves"]] == ["seed-0", "seed-1"]
    assert run["results"]["metric"] == "accuracy" and len(run["worst"]) > 3
    assert run["worst"][0]["loss"] == max(one["loss"] for one in run["worst"])


def test_text_cannot_leave_the_data_and_is_cut_where_it_is_long(finetuned, tmp_path):
    folder = Path(shutil.copytree(finetuned, tmp_path / "copy"))
    lines = [json.loads(line) for line in (folder / "worst.jsonl").read_text().splitlines()]
    lines[0]["text"] = HOSTILE
    (folder / "worst.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report([str(folder)], None)
    text = page.read_text(encoding="utf-8")
    assert text.count("<script>") == 1 and text.count("</script>") == 1
    shown = data_of(page)["runs"][0]["worst"][0]["texts"]["text"]
    assert shown.startswith(HOSTILE[:2000]) and shown.endswith("more characters)")


def test_a_long_run_gives_a_small_page(write_config, tmp_path):
    folder = pretrain(write_config(train__max_steps=2))
    line = {"tokens": 1, "loss": 5.0, "lr": 1e-4, "grad_norm": 1.0, "tokens_per_second": 1e4, "elapsed_seconds": 1.0}
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 100_001):
            file.write(json.dumps({"step": step, **line, "loss": 5 + step % 2}) + "\n")
    page = write_report([str(folder)], None)
    assert page.stat().st_size < 3e6
    curve = data_of(page)["runs"][0]["curves"][0]
    assert curve["lines"] == 100_000 and len(curve["training"]) == 1000
    assert curve["training"][-1]["step"] == 100_000 and curve["training"][5]["loss"] == 5.5


def test_downsampling_keeps_the_mean_loss():
    lines = [{"step": number, "loss": float(number)} for number in range(10)]
    assert downsample(lines, 10) == lines
    assert downsample(lines, 5) == [{"step": 2 * n + 1, "loss": 2 * n + 0.5} for n in range(5)]


def test_labels_that_make_no_matrix():
    assert count_confusion([]) is None
    assert count_confusion([{"label": ["a", "b"], "predicted": ["a"]}]) is None
    assert count_confusion([{"label": 1, "predicted": "1"}, {"label": 0, "predicted": "1"}]) == {
        "labels": ["0", "1"],
        "counts": [[0, 1], [0, 1]],
    }


def test_what_is_no_run_or_damaged_is_named(finetuned, bertlite, tmp_path):
    code, _, err = bertlite("report", tmp_path)
    assert code == 2 and "holds no run" in err
    folder = Path(shutil.copytree(finetuned, tmp_path / "copy"))
    (folder / "predictions.jsonl").write_text("{")
    code, _, err = bertlite("report", folder)
    assert code == 2 and "predictions.jsonl: is damaged" in err
    assert not (folder / "report.html").exists()


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1440])
def test_a_browser_shows_the_page_without_errors(finetuned, tmp_path, width):
    page = write_report([str(finetuned), str(finetuned)], tmp_path / "page.html")
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--window-size={width},900",
    ]
    result = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    shown = html.unescape(result.stdout)
    assert "CONSOLE" not in result.stderr, result.stderr
    for text in ("Validation accuracy", "Confusion matrix", "seed 1", "Examples with the highest loss", "train.seeds"):
        assert text in shown
    assert shown.count("<polyline") > 4 and not re.search(r"""(src|href)=["']http""", shown)
