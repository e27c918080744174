"""Assertions about what is left to chance."""

import numpy as np


def assert_uniform(counts):
    """Pearson's chi-square of equally likely cells, within five standard deviations of what it is by chance."""
    counts = np.asarray(counts)
    expected = counts.sum() / counts.size
    assert expected >= 5
    freedom = counts.size - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < freedom + 5 * np.sqrt(2 * freedom), (statistic, freedom)
