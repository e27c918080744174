"""A budget of time or tokens in place of a number of steps."""

import signal
import time

import pytest
from processes import Command
from tiny_runs import metrics, pretrain, wait_for

from bertlite.config.budget import parse_budget
from bertlite.config.loading import load_config
from bertlite.config.settings import PretrainConfig
from bertlite.core.errors import UserError


def run_to_end(command: Command) -> None:
    errors = command.communicate(timeout=120)[1]
    assert command.returncode == 0, errors


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("90s", 90, "seconds"),
        ("30m", 1800, "seconds"),
        ("1.5 h", 5400, "seconds"),
        ("2d", 172_800, "seconds"),
        ("2e9 tokens", 2e9, "tokens"),
        ("2.5M tokens", 2.5e6, "tokens"),
        ("800 tokens", 800, "tokens"),
    ],
)
def test_budgets_are_read(text, amount, unit):
    assert parse_budget(text) == (amount, unit)


@pytest.mark.parametrize("text", ["30", "0m", "30 parsecs", "tokens", "-5m", "1e999 tokens", "1.2.3h", ""])
def test_what_is_no_budget_is_an_error(write_config, text):
    with pytest.raises(UserError, match=r"train\.budget.*neither a time, such as 30m"):
        load_config(PretrainConfig, write_config(), [f"train.budget='{text}'"])


def test_a_budget_of_tokens_is_the_same_run_as_its_number_of_steps(write_config):
    by_tokens = metrics(pretrain(write_config("tokens", train__budget="2500 tokens")))
    steps = by_tokens[-1]["step"]
    assert abs(by_tokens[-1]["tokens"] - 2500) <= by_tokens[-1]["tokens"] / steps
    by_steps = metrics(pretrain(write_config("steps", train__max_steps=steps)))
    assert [line.get("loss") for line in by_tokens] == [line.get("loss") for line in by_steps]


def test_a_budget_of_time_ends_with_a_finished_schedule(write_config, tmp_path):
    path = write_config(train__budget="20s", train__logging_steps=1, train__eval_steps=10_000)
    start = time.time()
    run_to_end(Command("pretrain", path))
    assert 16 < time.time() - start < 26
    lines = metrics(tmp_path / "run")
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates[-1] < 0.05 * max(rates)
    assert rates.index(max(rates)) < 0.3 * len(rates)
    assert "eval_loss" in lines[-1] and lines[-1]["step"] == lines[-2]["step"]


def test_a_stopped_run_spends_only_what_is_left(write_config, tmp_path):
    path = write_config(train__budget="24s", train__logging_steps=1, train__eval_steps=10_000)
    start = time.time()
    first = Command("pretrain", path)
    log = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 50, first)
    first.send_signal(signal.SIGTERM)
    first.communicate()
    assert first.returncode == 128 + signal.SIGTERM
    before, spent = metrics(tmp_path / "run")[-1]["step"], time.time() - start
    start = time.time()
    run_to_end(Command("pretrain", path, "--resume"))
    assert 18 < spent + time.time() - start < 32
    lines = [line for line in metrics(tmp_path / "run") if "lr" in line]
    assert lines[-1]["step"] > before and lines[-1]["lr"] < 0.05 * max(line["lr"] for line in lines)


def test_what_a_budget_excludes_is_an_error(write_config, tmp_path, bertlite):
    schedule = {"start": 0.3, "end": 0.15}
    code, _, err = bertlite("pretrain", write_config(masking__rate=schedule), "--budget", "5m")
    assert code == 2 and "train.budget 5m does not fix the number of steps" in err
    path = write_config("finished", train__budget="500 tokens")
    assert bertlite("pretrain", path)[0] == 0
    code, _, err = bertlite("pretrain", path, "--extend-to", "100")
    assert code == 2 and "only runs with train.max_steps can be extended" in err
