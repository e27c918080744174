"""Metrics against published scores and against the libraries that define them."""

import pytest
from sklearn.metrics import f1_score

from bertlite.finetuning.metrics import CLASSIFICATION, ENTITIES, MULTILABEL, REGRESSION


def test_r_squared_of_one_number_is_zero():
    assert REGRESSION["r2"]([1.0], [2.0]) == 0 and REGRESSION["r2"]([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 1


def test_labels_and_numbers():
    assert CLASSIFICATION["f1"]([0, 1, 1], [0, 1, 0]) == f1_score([0, 1, 1], [0, 1, 0])
    assert CLASSIFICATION["f1"]([0, 1, 2], [0, 1, 0]) == CLASSIFICATION["macro_f1"]([0, 1, 2], [0, 1, 0])
    assert CLASSIFICATION["f1"]([0, 1, 1], [0, 1, 2]) == CLASSIFICATION["f1"]([0, 1, 1], [0, 1, 0])  # the same metric
    assert CLASSIFICATION["f1"]([0, 0], [0, 0]) == 0  # no warning, no error
    assert CLASSIFICATION["matthews_correlation"]([0, 1, 0, 1], [0, 1, 0, 1]) == 1
    assert MULTILABEL["accuracy"]([[0, 1], [1, 1]], [[0, 1], [1, 0]]) == 0.5
    assert REGRESSION["pearson"]([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx(1)
    assert REGRESSION["spearmanr"]([1.0, 2.0, 3.0], [1.0, 10.0, 5.0]) == pytest.approx(0.5)
    assert REGRESSION["pearson"]([1.0, 2.0], [3.0, 3.0]) == 0
    assert ENTITIES["f1"]([["B-A", "I-A", "O", "B-B"]], [["B-A", "I-A", "O", "O"]]) == pytest.approx(2 / 3)
