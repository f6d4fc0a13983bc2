"""kNN next-token distributions: from nearest neighbours to sparse training targets.

p_kNN(y|x) is proportional to the sum of exp(-d^2 / temperature) over those of the k neighbours whose token is y. Here
d^2 is the squared L2 distance of the keys, and a position is not its own neighbour (paper, section 3.1 and equation 2).

The released code differs in three ways. It drops the nearest neighbour (rank zero) instead of the position itself, so a
position whose key occurs twice may keep itself and lose a true neighbour. It gives a row without neighbours probability
one on the last token. It puts product-quantised distances into the softmax. Here the position itself is removed by its
number, a row without neighbours is an error, and distances are recomputed from the keys.
"""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from memdec.errors import NumericsError
from memdec.maths import kernels

_ROWS = 128  # rows per compiled call: 128 x 1024 float64 weights are 1 MB and stay in the cache


class RowError(NumericsError):
    """A row has no valid distribution. `row` is its number in the batch, from which the caller finds the position."""

    def __init__(self, row: int, why: str) -> None:
        super().__init__(f"row {row} of the batch: expected neighbours with finite distances, but {why}")
        self.row, self.why = row, why


def exact_distances(
    queries: Float[np.ndarray, "B D"],
    parts: Sequence[tuple[int, NDArray[Any]]],
    ids: Int[np.ndarray, "B K"],
) -> Float[np.ndarray, "B K"]:
    """Squared distances to candidates, computed from the keys; +inf where the candidate is missing (-1).

    Args:
        queries: float32.
        parts: (first position, keys) of each shard of the datastore; float32, or the bits of float16 (uint16) or
            bfloat16 (int16).
        ids: Positions of the candidates.
    """
    sq_dist = np.full(ids.shape, np.inf, np.float32)

    def work(begin: int, end: int) -> None:
        for first, keys in parts:
            kernels.sq_distances(queries[begin:end], keys, first, ids[begin:end], sq_dist[begin:end])

    kernels.in_threads(work, len(ids), 16)
    return sq_dist


def drop_self(
    sq_dist: Float[np.ndarray, "B C"], ids: Int[np.ndarray, "B C"], own: Int[np.ndarray, " B"], neighbours: int
) -> tuple[Float[np.ndarray, "B K"], Int[np.ndarray, "B K"]]:
    """The nearest `neighbours` candidates without the query's own position; ties go to the smaller position.

    Args:
        sq_dist: Squared distances in any order.
        ids: Datastore positions; -1 where the index found nothing. A position that occurs twice with the same distance
            counts once.
        own: Datastore position of each query; -1 for a query from outside the datastore.
        neighbours: Number of neighbours to keep.

    Returns:
        Distances (float32) and positions, nearest first, padded with +inf and -1. The query's own position is removed
        whatever its rank; other positions with an identical key stay.
    """
    gone = (ids < 0) | (ids == own[:, None])
    near = np.where(gone, np.float32(np.inf), np.maximum(sq_dist, np.float32(0))).astype(np.float32, copy=False)
    # The bits of non-negative float32 numbers sort like the numbers. One sort of (distance, position) packed into 64
    # bits takes a tenth of the time of an argsort.
    order = near.view(np.uint32).astype(np.uint64) << np.uint64(32)
    order |= np.where(gone, kernels.NOBODY, ids).astype(np.uint64)
    order.sort(axis=1)
    kept_dist = np.full((len(ids), neighbours), np.inf, np.float32)
    kept = np.full((len(ids), neighbours), -1)
    kernels.unpack_distinct(order, kept_dist.view(np.int32), kept)
    return kept_dist, kept


def aggregate(
    sq_dist: Float[Tensor, "N K"],
    values: Int[Tensor, "N K"],
    temperature: float,
    *,
    top: int | None = None,
    threshold: float = 0.0,
) -> tuple[Int[Tensor, " rows"], Int[Tensor, " nnz"], Float[Tensor, " nnz"]]:
    """Turn neighbour distances and tokens into sparse p_kNN rows, by compiled loops on CPU and by torch elsewhere.

    Args:
        sq_dist: Squared L2 distances, in any order. +inf marks a missing neighbour.
        values: Token of each neighbour (ignored where the neighbour is missing).
        temperature: Divides the squared distance before the softmax (paper's tau; released script: 16).
        top: Keep only the `top` most probable tokens of a row and renormalise (ties: the smaller token id).
        threshold: Drop tokens whose probability is at or below it and renormalise; the most probable token always
            stays.

    Returns:
        (counts, tokens, probs). `counts` is the number of entries per row, shape (N,). The entries are in row order;
        within a row they are in the order in which the tokens first occur among the neighbours. `probs` is float64 and
        sums to one within each row; no entry is zero.

    Raises:
        RowError: A row has no neighbour at all, a distance is NaN, or a token is negative.
    """
    if not len(sq_dist):
        return values.new_empty(0).long(), values.new_empty(0).long(), sq_dist.new_empty(0).double()
    # min and max use vector instructions and propagate NaN and inf; masks of the whole block take ten times as long.
    nearest = sq_dist.amin(dim=1, keepdim=True)
    if not torch.isfinite(nearest).all():
        row = int((~torch.isfinite(nearest)).nonzero()[0, 0])
        if torch.isnan(nearest[row]):
            raise RowError(row, "a distance is NaN: the keys are broken, rebuild the datastore")
        raise RowError(row, "it has no neighbour: search more cells (nprobe) or check the index")
    values = values.long()
    if torch.isinf(sq_dist.amax()):
        values = values.masked_fill(torch.isinf(sq_dist), 0)
    if (largest := _largest(values)) < 0:
        row = int((values < 0).any(dim=1).nonzero()[0, 0])
        raise RowError(row, f"a neighbour has the token {int(values[row].min())}: the values are broken")
    if sq_dist.device.type == "cpu":
        return _aggregate_compiled(sq_dist, values, nearest, largest + 1, temperature, top, threshold)
    return aggregate_torch(sq_dist, values, nearest, temperature, top, threshold)


def _largest(values: Tensor) -> int:
    """The largest token, or a negative token if there is one."""
    if values.device.type == "cpu":  # one pass is enough: negative numbers read as unsigned ones are the largest
        return int(np.asarray(values.numpy()).view(np.uint64).max().astype(np.int64))
    smallest, largest = torch.aminmax(values)
    return int(torch.where(smallest < 0, smallest, largest))


def _aggregate_compiled(
    sq_dist: Tensor,
    values: Tensor,
    nearest: Tensor,
    vocab: int,
    temperature: float,
    top: int | None,
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    n_rows, n_neighbours = sq_dist.shape
    sq, tokens_of, least = sq_dist.numpy(), np.ascontiguousarray(values.numpy()), nearest.numpy()
    counts = np.empty(n_rows, np.int64)

    def work(begin: int, end: int) -> list[NDArray[Any]]:
        room = (end - begin) * n_neighbours + 1
        weights = _scratch("weights", room, np.float64)[:-1].reshape(end - begin, n_neighbours)
        np.subtract(sq[begin:end], least[begin:end], out=weights, dtype=np.float64)
        weights *= -1.0 / temperature
        np.exp(weights, out=weights)
        out = counts[begin:end], _scratch("tokens", room, np.int64), _scratch("probs", room, np.float64)
        used = kernels.sum_equal(weights, tokens_of[begin:end], _scratch("mass", vocab, np.float64), *out)
        if top is not None or threshold > 0:
            used = kernels.keep_best(*out, top or n_neighbours, threshold)
        return [out[1][:used].astype(np.int32 if n_rows > _ROWS else np.int64), out[2][:used].copy()]

    parts = kernels.in_threads(work, n_rows, _ROWS)
    if len(parts) == 1:
        return torch.from_numpy(counts), torch.from_numpy(parts[0][0]), torch.from_numpy(parts[0][1])
    prob = np.concatenate([part.pop() for part in parts])  # the parts' probs are freed before tokens are joined
    token = np.concatenate([part.pop() for part in parts], dtype=np.int64)
    return torch.from_numpy(counts), torch.from_numpy(token), torch.from_numpy(prob)


_KEPT = threading.local()


def _scratch(name: str, size: int, dtype: type) -> NDArray[Any]:
    """This thread's scratch array of this name, kept between calls because allocation costs more than the sums.

    It is zero when it is new.
    """
    found = getattr(_KEPT, name, None)
    if found is None or len(found) < size:
        found = np.zeros(size, dtype)
        setattr(_KEPT, name, found)
    kept: NDArray[Any] = found[:size]
    return kept


def aggregate_torch(
    sq_dist: Tensor, values: Tensor, nearest: Tensor, temperature: float, top: int | None, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same as `_aggregate_compiled`, in torch operations for any device."""
    n_rows, n_neighbours = values.shape
    weight = (sq_dist.double() - nearest.double()).mul_(-1.0 / temperature).exp_()

    # Sort keys are (token, neighbour): equal tokens of a row become adjacent, and each keeps the number of its weight.
    bits = (n_neighbours - 1).bit_length()
    key = values.bitwise_left_shift(bits)
    key = key.bitwise_or_(torch.arange(n_neighbours, device=key.device)).sort(dim=1).values
    place = key & ((1 << bits) - 1)
    weight = weight.gather(1, place)
    token = key.bitwise_right_shift_(bits)
    first = torch.ones_like(token, dtype=torch.bool)
    torch.ne(token[:, 1:], token[:, :-1], out=first[:, 1:])
    row = torch.arange(n_rows, device=key.device)[:, None].expand_as(token)[first]
    entry = first.flatten().cumsum(0).sub_(1)
    mass = _sums(entry, weight.flatten(), len(row))
    mass /= _sums(row, mass, n_rows)[row]
    tokens = token[first]
    seen = torch.where(weight > 0, place, n_neighbours).flatten()  # a missing neighbour does not count as an occurrence
    place = seen.new_full((len(row),), n_neighbours).scatter_reduce_(0, entry, seen, "amin")

    keep = mass > max(threshold, 0.0)
    if threshold > 0 or top is not None:
        # Entries by row, then falling probability, then token: within a row they are in the order of tokens already.
        order = mass.argsort(descending=True, stable=True)
        order = order[row[order].argsort(stable=True)]
        counts = torch.bincount(row, minlength=n_rows)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(row), device=key.device) - (counts.cumsum(0) - counts)[row[order]]
        keep |= rank == 0
        if top is not None:
            keep &= rank < top
    row, tokens, mass, place = row[keep], tokens[keep], mass[keep], place[keep]
    order = (row * n_neighbours + place).argsort()  # by row, then first occurrence
    row, tokens, mass = row[order], tokens[order], mass[order]
    return torch.bincount(row, minlength=n_rows), tokens, mass / _sums(row, mass, n_rows)[row]


def _sums(group: Tensor, values: Tensor, n_groups: int) -> Tensor:
    """Sum the values of each group with the same bits in every run; `index_add_` on CUDA adds in varying order."""
    return values.new_zeros(n_groups).index_put_((group,), values, accumulate=True)


def recall(found: Int[np.ndarray, "B K"], true: Int[np.ndarray, "B K"]) -> float:
    """Fraction of the true neighbours that were found, over all rows; missing neighbours (-1) are not counted."""
    hits = sum(len(np.intersect1d(a[a >= 0], b[b >= 0])) for a, b in zip(found, true, strict=True))
    return hits / max(1, int((true >= 0).sum()))
