"""Positions of a datastore that a search in cells compares with a query beside the keys of its nearest cells.

The nearest keys of a rare token are mostly keys of the same token. They are too few to form a cell, so a search in the
nearest cells often misses them. Most neighbours that it misses and that matter are found here.

With an untrained model of absolute positions most of p_kNN is on keys of the query's own place in its window: these are
in many cells, a few in each. `accuracy.same_place` measures how much it is.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from memdec.errors import ArtifactError

MOST = 256  # a token with at most so many positions is rare
MOSTLY = 0.5  # from this share of p_kNN on, the keys of the query's own place are candidates
_CELLS = 8  # but not if they are more than in so many cells
_TOKENS = 1 << 22  # tokens counted per block: NumPy converts a block to 64-bit integers
SetOf = Callable[[Int[np.ndarray, " n"]], Int[np.ndarray, " n"]]


class Sets:
    """Numbered sets of positions; a query names one of them, or none.

    Args:
        positions: Positions, uint32, ascending within a set, set after set.
        sizes: Number of positions of each set.
        set_of: Gives the set of each of some positions, -1 if it is in none.

    Attributes:
        positions: As given.
        set_of: As given.
        edges: Set s is positions[edges[s] : edges[s + 1]].
    """

    def __init__(self, positions: NDArray[np.uint32], sizes: Int[np.ndarray, " sets"], set_of: SetOf) -> None:
        self.positions, self.set_of = positions, set_of
        self.edges = np.concatenate([[0], np.cumsum(sizes)])

    def spans(self, sets: Int[np.ndarray, " B"]) -> tuple[Int[np.ndarray, " B"], Int[np.ndarray, " B"]]:
        """Where these sets begin and end in `positions`; nowhere for -1 (no set)."""
        number = np.maximum(sets, 0)
        begin = self.edges[number]
        return begin, np.where(sets < 0, begin, self.edges[number + 1])

    def of(self, sets: Int[np.ndarray, " B"]) -> Int[np.ndarray, "B C"]:
        """Positions of these sets, padded with -1."""
        begin, end = self.spans(sets)
        places = begin[:, None] + np.arange(int((end - begin).max(initial=0)))
        there = places < end[:, None]
        return np.where(there, self.positions[np.where(there, places, 0)].astype(np.int64) if there.any() else -1, -1)


def rare_tokens(values: NDArray[np.integer], vocab_size: int) -> Sets:
    """The positions after each rare token; a token is a set, which is empty if the token is not rare.

    Args:
        values: Token of each position; the input token of a position is the one before it.
        vocab_size: Number of different tokens.

    Raises:
        ArtifactError: A token is outside of the vocabulary.
    """
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
    in_order = positions[np.argsort(values[positions - 1], kind="stable")].astype(np.uint32)

    def set_of(some: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        tokens = values[np.maximum(some - 1, 0)].astype(np.int64)
        return np.where(rare[tokens] & (some > 0), tokens, -1)

    return Sets(in_order, np.where(rare, counts, 0), set_of)


def same_place(places: SetOf, n: int) -> Sets:
    """The positions of each place in a window; `places` gives that of each of some positions, which are below n."""
    every = places(np.arange(n))
    return Sets(np.argsort(every, kind="stable").astype(np.uint32), np.bincount(every), places)


def by_place(share: float, stride: int, centroids: int) -> bool:
    """Whether positions of the query's own place are candidates.

    Args:
        share: Share of p_kNN that is on them (`accuracy.same_place`).
        stride: Places that hold nearly all positions.
        centroids: Cells of the index.
    """
    return share >= MOSTLY and centroids <= _CELLS * stride
