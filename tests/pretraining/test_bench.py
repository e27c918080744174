"""What a training step costs: counted as torch counts it, and measured on a real run."""

import json
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bertlite.config.settings import Architecture
from bertlite.model.heads import MaskedLanguageModel
from bertlite.pretraining.bench import matmul_flops
from bertlite.training.trainer import PARTS


@pytest.mark.parametrize(("rows", "positions", "slots"), [(2, 16, 3), (3, 32, 32)])
def test_operations_are_those_that_torch_counts(rows, positions, slots):
    config = Architecture(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, vocab_size=70
    )
    model = MaskedLanguageModel(config, "matmul")
    ids = torch.randint(70, (rows, positions))
    places = torch.arange(slots).expand(rows, slots)
    with FlopCounterMode(display=False) as counter:
        model(ids, torch.arange(positions).expand(rows, -1), torch.ones_like(ids), places).sum().backward()
    assert matmul_flops(config, rows, positions, slots) == counter.get_total_flops()


def test_bench_measures_a_run_and_leaves_nothing(write_config, tmp_path):
    path = write_config()
    before = set(tmp_path.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-m", "bertlite", "bench", str(path), "--steps", "3", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout)
    assert set(tmp_path.rglob("*")) == before
    parts = sum(result[f"{part}_seconds"] for part in PARTS)
    assert parts == pytest.approx(result["step_seconds"], rel=0.5)
    tokens = 8 * 64  # rows and positions of the configuration, nearly all used
    assert 0.5 * tokens < result["tokens_per_second"] * result["step_seconds"] < 1.05 * tokens
    assert 0 < result["share_of_peak"] < 1
    assert result["peak_memory_bytes"] > 50e6
