"""kNN next-token distributions, from neighbours to sparse targets.

p_kNN(y|x) is proportional to the sum over the k neighbours with value y of exp(-d^2 / temperature), where d^2 is the
squared L2 distance of the keys and the position itself is not a neighbour (paper, section 3.1 and equation 2).

The released code drops the neighbour of *rank* zero instead of the position itself, so a position whose key occurs
twice keeps itself and loses a true neighbour; rows without any neighbour become probability one on the last token.
Here self is removed by identity and an empty row is an error.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from memdec.errors import NumericsError


@dataclass(frozen=True, slots=True)
class SparseRows:
    """N sparse distributions in CSR form: row i has `tokens[indptr[i]:indptr[i+1]]` with `probs` that sum to one."""

    indptr: NDArray[np.int64]  # (N + 1,)
    tokens: NDArray[np.integer]  # (nnz,)
    probs: NDArray[np.floating]  # (nnz,)

    def __len__(self) -> int:
        return len(self.indptr) - 1


def drop_self(
    sq_dist: NDArray[np.float32], ids: NDArray[np.int64], own: NDArray[np.int64], neighbours: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Keep the first `neighbours` of each row that are not the row's own position.

    Args:
        sq_dist: Squared distances, nearest first, shape (N, K) with K > neighbours.
        ids: Datastore positions, shape (N, K); -1 where the index found nothing.
        own: The position each query stands for, shape (N,); -1 for a query from outside the datastore.
        neighbours: How many to keep.

    Returns:
        Distances and ids, shape (N, neighbours). A self match of any rank is gone; other positions with the very same
        key stay.
    """
    rank = np.where((ids == own[:, None]) & (own[:, None] >= 0), 1, 0)
    order = np.argsort(rank, axis=1, kind="stable")[:, :neighbours]
    return np.take_along_axis(sq_dist, order, 1), np.take_along_axis(ids, order, 1)


def aggregate(
    sq_dist: Float[Tensor, "N K"],
    values: Int[Tensor, "N K"],
    temperature: float,
    *,
    top: int | None = None,
    threshold: float = 0.0,
) -> tuple[Int[Tensor, " rows"], Int[Tensor, " nnz"], Float[Tensor, " nnz"]]:
    """Sparse p_kNN rows from neighbour distances and their tokens.

    Args:
        sq_dist: Squared L2 distances; rows need not be sorted. +inf marks a missing neighbour.
        values: Token of each neighbour (ignored where the neighbour is missing).
        temperature: Divides the squared distance before the softmax (paper's tau; released script: 16).
        top: Keep only the `top` most probable tokens of a row and renormalise.
        threshold: Drop tokens with a probability at or below it and renormalise; the most probable always stays.

    Returns:
        (counts, tokens, probs): entries per row, shape (N,), then the entries in row order, each row sorted by falling
        probability (ties: smaller token first). probs is float64 and sums to one within each row.

    Raises:
        NumericsError: A row has no neighbour at all, or a distance is NaN.
    """
    if torch.isnan(sq_dist).any():
        raise NumericsError("kNN distances hold NaN; the keys are broken, rebuild the datastore (float32 keys if fp16)")
    missing = torch.isinf(sq_dist)
    if missing.all(dim=1).any():
        row = int(missing.all(dim=1).nonzero()[0, 0])
        raise NumericsError(f"row {row} of the batch has no neighbour; search more cells (nprobe) or check the index")
    n_rows, n_neighbours = values.shape
    weight = sq_dist.double().div(-temperature)
    weight = weight.sub_(weight.amax(dim=1, keepdim=True)).exp_()  # exp(-inf) = 0 for missing neighbours

    # Keys name (token, neighbour), so that equal tokens of a row meet in a sort and still know their weight.
    bits = (n_neighbours - 1).bit_length()
    key = values.long().clamp(min=0).bitwise_left_shift_(bits)
    key = _sort_rows(key.bitwise_or_(torch.arange(n_neighbours, device=key.device)))
    weight = weight.gather(1, key & ((1 << bits) - 1))
    token = key.bitwise_right_shift_(bits)
    first = torch.ones_like(token, dtype=torch.bool)
    torch.ne(token[:, 1:], token[:, :-1], out=first[:, 1:])
    counts = first.sum(dim=1)
    rows = torch.repeat_interleave(torch.arange(n_rows, device=key.device), counts)
    entry = first.flatten().cumsum(0).sub_(1)
    mass = weight.new_zeros(len(rows)).index_add_(0, entry, weight.flatten())
    mass /= weight.new_zeros(n_rows).index_add_(0, rows, mass)[rows]

    # Rows of distinct tokens, rising, padded with -1: the stable sort puts the smaller token first in a tie.
    real = torch.arange(int(counts.max()), device=key.device) < counts[:, None]
    padded = weight.new_full(real.shape, -1.0).masked_scatter_(real, mass)
    tokens = token.new_zeros(real.shape).masked_scatter_(real, token[first])
    padded, order = padded.sort(dim=1, descending=True, stable=True)
    keep = padded > max(threshold, 0.0)
    keep[:, 0] = True
    if top is not None:
        keep[:, top:] = False
    counts = keep.sum(dim=1)
    tokens, mass = tokens.gather(1, order)[keep], padded[keep]
    rows = torch.repeat_interleave(torch.arange(n_rows, device=key.device), counts)
    kept = weight.new_zeros(n_rows).index_add_(0, rows, mass)
    return counts, tokens, mass / kept[rows]


def _sort_rows(keys: Int[Tensor, "N K"]) -> Int[Tensor, "N K"]:
    """Rows in rising order. NumPy's vector sort takes a seventh of torch's time on CPU."""
    return torch.from_numpy(np.sort(keys.numpy(), axis=1)) if keys.device.type == "cpu" else keys.sort(dim=1).values
