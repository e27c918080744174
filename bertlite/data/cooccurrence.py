"""Which tokens stand beside each other in the training text, as word vectors and a matrix for each offset."""

# Shapes: B sequences, T positions, V vocabulary, W size of the word vectors, O offsets.
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from scipy import sparse
from tqdm import tqdm

from bertlite.core.files import atomic_file, fingerprint, lock
from bertlite.core.logging import logger
from bertlite.data.batches import Batches

VERSION = 1  # raise it when the same text would give other vectors
MAX_COUNTED_TOKENS = 10_000_000  # that are counted
CHUNK = 2_000  # sequences that are read at a time
MIN_PAIRS = 2  # pairs that occur less often are noise
SMOOTHING = 10.0  # added to the counts of tokens, so that rare ones get no large values
FREQUENCY_POWER = 0.25  # by which frequent tokens weigh more in the factorization
ITERATIONS = 6  # of the subspace iteration
OVERSAMPLING = 16  # vectors beyond W, which the iteration drops (Halko et al. 2011)

Floats = NDArray[np.float32]


class Cooccurrence(NamedTuple):
    """A factorization of positive PMI: of token w beside token c at an offset, about `words[w] @ matrix @ words[c]`."""

    words: Floats  # (V,W)
    matrices: Floats  # (O,W,W), one for each offset
    frequencies: Floats  # (V,), which sum to 1


def count_cooccurrence(batches: Batches, size: int, offsets: tuple[int, ...]) -> Cooccurrence:
    """Count the training sequences and factorize, or read the result of the last time from beside the corpus.

    A token's context at offset o is the token o positions to its right, within the same document; [CLS] and [SEP]
    count as in training, which shows where texts begin and end.
    """
    inputs = [VERSION, batches.packing.folder.name, batches.sequence_length, batches.train.seed, size, offsets]
    path = batches.corpus.folder / f"cooccurrence-{fingerprint(inputs)}.safetensors"
    with lock(path):
        if (stored := _load(path)) is None:
            logger.info("counting which tokens stand beside each other")
            stored = factorize(*_count(batches, max(map(abs, offsets))), size, offsets)
            with atomic_file(path) as file:
                file.write(safetensors.numpy.save(stored._asdict()))
    return stored


def num_counted_sequences(batches: Batches) -> int:
    """Return how many of the first training sequences are counted."""
    return min(len(batches.packing), max(1, MAX_COUNTED_TOKENS // batches.sequence_length))


def _load(path: Path) -> Cooccurrence | None:
    try:
        return Cooccurrence(**safetensors.numpy.load(path.read_bytes()))
    except (OSError, TypeError, safetensors.SafetensorError):  # missing or damaged
        return None


def _count(batches: Batches, distance: int) -> tuple[NDArray[np.int64], list[sparse.csr_matrix]]:
    """Count tokens (V,), and pairs of tokens 1 to `distance` positions apart: a matrix (V,V) of each distance."""
    V, total = batches.vocabulary.size, num_counted_sequences(batches)
    counts = np.zeros(V, np.int64)
    keys: list[list[NDArray[np.int64]]] = [[] for _ in range(distance)]
    with tqdm(desc="counting tokens", total=total, unit=" sequences", disable=None) as bar:
        for first in range(0, total, CHUNK):
            samples = np.arange(first, min(first + CHUNK, total))
            ids, document_ids = batches.read_sequences(samples)
            counts += np.bincount(ids[document_ids > 0], minlength=V)
            for number, key in enumerate(keys, 1):
                together = (document_ids[:, :-number] == document_ids[:, number:]) & (document_ids[:, number:] > 0)
                key.append((ids[:, :-number] * V + ids[:, number:])[together])
            bar.update(len(samples))
    return counts, [_count_pairs(np.concatenate(key), V) for key in keys]


def _count_pairs(keys: NDArray[np.int64], V: int) -> sparse.csr_matrix:
    keys.sort()
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    counts, keys = np.diff(first, append=len(keys)), keys[first]
    often = counts >= MIN_PAIRS
    counts, keys = counts[often], keys[often]
    return sparse.csr_matrix((counts.astype(np.float64), (keys // V, keys % V)), shape=(V, V))


def positive_pmi(pairs: sparse.csr_matrix, counts: NDArray[np.int64]) -> sparse.csr_matrix:
    """Return max(0, log p(w, c) / (p(w) p(c))) of each pair (Church and Hanks 1990), (V,V).

    Half a pair is taken off, since a pair that was counted twice by chance is more likely than its frequency says.
    """
    pairs = pairs.tocoo()
    smooth = counts + SMOOTHING
    pmi = np.log(pairs.data - 0.5) + np.log(counts.sum()) - np.log(smooth[pairs.row]) - np.log(smooth[pairs.col])
    positive = sparse.csr_matrix((np.maximum(pmi, 0).astype(np.float32), (pairs.row, pairs.col)), shape=pairs.shape)
    positive.eliminate_zeros()
    return positive


def factorize(
    counts: NDArray[np.int64], pairs: list[sparse.csr_matrix], size: int, offsets: tuple[int, ...]
) -> Cooccurrence:
    """Factorize the positive PMI of all offsets together, with the same vectors for a token and for its context.

    Levy and Goldberg (2014) factorize PMI into two sets of vectors. Here the matrices between them are an offset's own,
    and `words` spans the largest eigenvectors of the sum of P Pᵀ over the offsets, by subspace iteration. Signs and
    order follow from a fixed seed, so that equal counts give equal bits on the same machine.
    """
    V = len(counts)
    weights = (counts + 1.0) ** FREQUENCY_POWER
    weights = (weights / weights.mean()).astype(np.float32)
    scale = sparse.diags(weights)
    matrices = []
    for offset in offsets:
        pmi = positive_pmi(pairs[abs(offset) - 1], counts)
        matrices.append((scale @ (pmi if offset > 0 else pmi.T) @ scale).tocsr().astype(np.float32))
    transposed = [matrix.T.tocsr() for matrix in matrices]

    def square(x: Any) -> Any:
        return sum(matrix @ (other @ x) for matrix, other in zip(matrices, transposed, strict=True))

    basis = np.random.default_rng(0).standard_normal((V, size + OVERSAMPLING)).astype(np.float32)
    basis = np.linalg.qr(basis)[0]
    for _ in tqdm(range(ITERATIONS), desc="factorizing", disable=None):
        basis = np.linalg.qr(square(basis))[0]
    values, vectors = np.linalg.eigh(basis.T @ square(basis))  # ascending
    leading = slice(None, -size - 1, -1)
    words = (basis @ vectors[:, leading]) * np.maximum(values[leading], 1e-12) ** 0.25
    inverse = np.linalg.pinv(words)  # (W,V)
    between = [inverse @ (matrix @ inverse.T) for matrix in matrices]
    frequencies = (counts / counts.sum()).astype(np.float32)
    return Cooccurrence(
        (words / weights[:, None]).astype(np.float32), np.stack(between).astype(np.float32), frequencies
    )
