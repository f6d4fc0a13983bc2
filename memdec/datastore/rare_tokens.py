"""Positions of a datastore that follow the same rare token, as candidates beside those of search in cells.

The nearest keys of a rare token are mostly keys of the same token. They are too few to form a cell, so a search in the
nearest cells often misses them. Most neighbours that it misses and that matter are found here.
"""

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from memdec.errors import ArtifactError

MOST = 256  # a token with at most so many positions is rare
_TOKENS = 1 << 22  # tokens counted per block: NumPy converts a block to 64-bit integers


class RareTokens:
    """The positions after each rare token.

    Args:
        values: Token of each position; the input token of a position is the one before it.
        vocab_size: Number of different tokens.

    Attributes:
        positions: Positions after rare tokens, uint32, ascending for each token.
        edges: Those after token t are positions[edges[t] : edges[t + 1]]; none if t is not rare.

    Raises:
        ArtifactError: A token is outside of the vocabulary.
    """

    def __init__(self, values: NDArray[np.integer], vocab_size: int) -> None:
        inputs, counts = values[:-1], np.zeros(vocab_size, np.int64)
        blocks = range(0, len(inputs), _TOKENS)
        for first in blocks:
            found = np.bincount(inputs[first : first + _TOKENS], minlength=vocab_size)
            if len(found) > vocab_size:
                raise ArtifactError(
                    f"datastore: expected tokens below its vocabulary of {vocab_size}, found {len(found) - 1}; run `memdec "
                    "datastore` again"
                )
            counts += found
        rare = counts <= MOST
        positions = np.concatenate(
            [first + 1 + np.flatnonzero(rare[inputs[first : first + _TOKENS]]) for first in blocks]
            or [np.empty(0, np.int64)]
        )
        self.positions = positions[np.argsort(values[positions - 1], kind="stable")].astype(np.uint32)
        self.edges = np.concatenate([[0], np.cumsum(np.where(rare, counts, 0))])

    def spans(self, inputs: Int[np.ndarray, " B"]) -> tuple[Int[np.ndarray, " B"], Int[np.ndarray, " B"]]:
        """Where the positions after each of these tokens begin and end in `positions`; nowhere for -1 (no token)."""
        token = np.maximum(inputs, 0)
        begin = self.edges[token]
        return begin, np.where(inputs < 0, begin, self.edges[token + 1])

    def of(self, inputs: Int[np.ndarray, " B"]) -> Int[np.ndarray, "B C"]:
        """Positions after each of these tokens, padded with -1."""
        begin, end = self.spans(inputs)
        places = begin[:, None] + np.arange(int((end - begin).max(initial=0)))
        there = places < end[:, None]
        return np.where(there, self.positions[np.where(there, places, 0)].astype(np.int64) if there.any() else -1, -1)
