"""Sparse next-token distributions in CSR form."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SparseRows:
    """N sparse distributions in CSR form: row i has `tokens[indptr[i]:indptr[i+1]]`, and its `probs` sum to one."""

    indptr: NDArray[np.int64]  # (N + 1,)
    tokens: NDArray[np.integer]  # (nnz,)
    probs: NDArray[np.floating]  # (nnz,)

    @classmethod
    def of(cls, counts: Int[Tensor, " N"], tokens: Int[Tensor, " nnz"], probs: Float[Tensor, " nnz"]) -> "SparseRows":
        """Make rows from the output of `knn.aggregate`."""
        return cls(np.concatenate([[0], np.cumsum(counts.numpy())]), tokens.numpy(), probs.numpy())

    def at(
        self, rows: Int[np.ndarray, " n"]
    ) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " nnz"], Float[np.ndarray, " nnz"]]:
        """Numbers of entries, tokens and probabilities of these rows, in this order."""
        begins = self.indptr[rows]
        counts = self.indptr[rows + 1] - begins
        entries = np.arange(counts.sum()) + np.repeat(begins - (np.cumsum(counts) - counts), counts)
        return counts, self.tokens[entries], self.probs[entries]

    def __len__(self) -> int:
        return len(self.indptr) - 1


def probability_of(rows: SparseRows, tokens: Int[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Probability (float64) that row i gives to `tokens[i]`; zero where the row does not contain the token."""
    counts = np.diff(rows.indptr)
    hit = rows.tokens == np.repeat(tokens, counts)
    return np.bincount(np.repeat(np.arange(len(rows)), counts)[hit], rows.probs[hit], minlength=len(rows))


def total_variation(ours: SparseRows, other: SparseRows) -> Float[np.ndarray, " N"]:
    """Total variation distance (half the L1 distance, from 0 to 1) of each pair of rows."""
    numbers = np.arange(len(ours))
    row = np.concatenate([np.repeat(numbers, np.diff(rows.indptr)) for rows in (ours, other)])
    token = np.concatenate([ours.tokens, other.tokens]).astype(np.int64)
    if not len(token):
        return np.zeros(len(ours))
    difference = np.concatenate([ours.probs, other.probs]).astype(np.float64)
    difference[len(ours.probs) :] *= -1
    entry = row * (token.max() + 1) + token
    order = np.argsort(entry, kind="stable")
    first = np.flatnonzero(np.diff(entry[order], prepend=-1))
    apart = np.abs(np.add.reduceat(difference[order], first))
    return 0.5 * np.bincount(row[order][first], apart, minlength=len(ours))
