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
    out = np.empty(len(ours))
    for row in range(len(ours)):
        both: dict[int, float] = {}
        for rows, sign in ((ours, 1.0), (other, -1.0)):
            span = slice(rows.indptr[row], rows.indptr[row + 1])
            for token, prob in zip(rows.tokens[span].tolist(), rows.probs[span].tolist(), strict=True):
                both[token] = both.get(token, 0.0) + sign * prob
        out[row] = 0.5 * sum(map(abs, both.values()))
    return out
