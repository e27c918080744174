"""What a training step costs: counted as the literature does, and measured on a real run."""

import json

import pytest

from bertlite.config.settings import Architecture
from bertlite.pretraining.bench import flops_per_sequence
from bertlite.training.trainer import PHASES


@pytest.mark.parametrize(("T", "P"), [(16, 3), (32, 32)])
def test_operations_are_those_of_the_matrix_products(T, P):
    """A product (M,K) × (K,N) is 2MKN operations, and the backward pass has two for each (Kaplan et al. 2020, 2.1)."""
    D, inner, layers, vocabulary = 32, 48, 3, 70
    architecture = Architecture(
        hidden_size=D, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=inner, vocab_size=vocabulary
    )
    key_and_value = T * 4 * D * D
    per_query = 4 * D * D + 4 * D * inner + 4 * T * D  # its projections, the feed-forward network, and attention
    queries = (layers - 1) * T + P  # the last layer computes only what is predicted
    head = P * 2 * (D * D + D * vocabulary)
    assert flops_per_sequence(architecture, T, P) == 3 * (layers * key_and_value + queries * per_query + head)


def test_bench_measures_a_run_and_leaves_nothing(bertlite, write_config, tmp_path):
    path = write_config()
    before = set(tmp_path.rglob("*"))
    code, out, _ = bertlite("bench", path, "--steps", "3", "--json")
    assert code == 0
    result = json.loads(out)
    assert set(tmp_path.rglob("*")) == before
    phases = sum(result[f"{phase}_seconds"] for phase in PHASES)
    assert phases == pytest.approx(result["step_seconds"], rel=0.5)
    tokens = 8 * 64  # sequences and positions of the configuration, nearly all used
    assert 0.5 * tokens < result["tokens_per_second"] * result["step_seconds"] < 1.05 * tokens
    assert 0 < result["share_of_peak"] < 1
    assert result["peak_memory_bytes"] > 50e6
