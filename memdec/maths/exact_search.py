"""Exact nearest-neighbour search that compares fixed queries with one block of keys at a time.

Memory use does not depend on the number of keys. Distances are computed as |k|^2 - 2 q k (one matrix product), so they
have its rounding error. Where exact distances matter, `memdec.maths.knn.exact_distances` recomputes them from the keys.

`Nearest` is the search on the CPU. The functions below it are the parts of the search on any other device
(`memdec.datastore.device_search`). They use torch operations only, so the tests can run them on the CPU.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from memdec.maths import kernels

_ROWS = 64  # queries that a thread handles at a time
_UNIT = 2.0**-24  # largest relative rounding error of one float32 operation
_CELLS_MORE = 16  # cells beyond P whose distances are compared: float64 products leave no doubt about the others
_PAIRS = 16_384  # (query, key) pairs whose exact distances are computed at once: 14 bytes x 768 each, 180 MB


class Nearest:
    """Keeps the nearest neighbours of fixed queries while `update` adds blocks of keys.

    Args:
        queries: Shape (B, D), on CPU. The search computes in their dtype.
        neighbours: Number of neighbours to keep.
    """

    def __init__(self, queries: Float[Tensor, "B D"], neighbours: int) -> None:
        # Subtracting a common centre does not change distances, and |k|^2 - 2 q k loses the fewest digits near the
        # origin. The centre is a median, so that one outlier (such as the first token of a window) does not shift it.
        self._centre = queries.median(0).values
        self.queries, self.neighbours = queries - self._centre, neighbours
        self._norms = (self.queries * self.queries).sum(1, keepdim=True)
        self._keys = self._sq_dist = queries.new_empty(0)
        room = kernels.buffer_width(neighbours)
        self._near = queries.new_full((len(queries), room), np.inf)
        self._ids = torch.full((len(queries), room), -1)
        self._counts = np.zeros(len(queries), np.int64)
        self._limits = np.full(len(queries), np.inf, queries.numpy().dtype)

    def update(self, keys: Float[Tensor, "n D"], first: int) -> None:
        """Compare the queries with the keys of positions first, first + 1, ...; blocks must come in order."""
        # Reuse the buffers: allocating new ones would take a tenth of the time of the product.
        if len(self._keys) < len(keys):
            self._keys = self.queries.new_empty(keys.shape)
            self._sq_dist = self.queries.new_empty(len(self.queries) * len(keys))
        moved = torch.sub(keys.to(self.queries), self._centre, out=self._keys[: len(keys)])
        norms = torch.einsum("nd,nd->n", moved, moved)
        sq_dist = self._sq_dist[: len(self.queries) * len(keys)].view(len(self.queries), len(keys))
        torch.addmm(norms[None], self.queries, moved.T, alpha=-2, out=sq_dist)
        near, ids, found = self._near.numpy(), self._ids.numpy(), sq_dist.numpy()

        def work(a: int, b: int) -> None:
            kernels.keep_nearest(
                found[a:b], first, near[a:b], ids[a:b], self._counts[a:b], self._limits[a:b], self.neighbours
            )

        kernels.in_threads(work, len(found), _ROWS)

    def result(self) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"]]:
        """Squared distances and positions in no order, padded with +inf and -1 if there were too few keys.

        Among equal distances the smaller positions are kept.
        """
        near, ids = self._near.numpy(), self._ids.numpy()

        def work(a: int, b: int) -> None:
            kernels.cut_all(near[a:b], ids[a:b], self._counts[a:b], self.neighbours)

        kernels.in_threads(work, len(near), _ROWS)
        sq_dist = (self._near[:, : self.neighbours] + self._norms).clamp_(min=0)
        return sq_dist, self._ids[:, : self.neighbours]

    def state(self) -> dict[str, np.ndarray]:
        """The state that `restore` needs to resume an interrupted search."""
        return {
            "near": self._near.numpy(),
            "ids": self._ids.numpy(),
            "counts": self._counts,
            "limits": self._limits,
        }

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Resume from `state()`; that of another version may have another room."""
        room = state["near"].shape[1]
        if room < self._near.shape[1]:
            self._near[:, :room], self._ids[:, :room] = torch.from_numpy(state["near"]), torch.from_numpy(state["ids"])
        else:
            self._near, self._ids = torch.from_numpy(state["near"]), torch.from_numpy(state["ids"])
        self._counts, self._limits = state["counts"].copy(), state["limits"].copy()


# --- parts of the search on another device ------------------------------------------------------------------------


def slack(width: int, *, tf32: bool = False) -> float:
    """Bound on the error of a squared distance by matrix product, as a fraction of |q|^2 + |k|^2 (centre subtracted).

    The error of the product of q and k is at most (2r + r^2 + c) |q| |k|. Here r is the rounding error of an input, and
    c that of the sum of `width` products in any order. Since 2 |q| |k| <= |q|^2 + |k|^2, this is a fraction of each
    norm. The last term covers the norms, the sum with them, and the exact distance that is compared with the result.

    Args:
        width: D.
        tf32: Whether inputs are rounded to 11 bits (`to_tf32`) and multiplied by tensor cores. Their sums may truncate
            instead of rounding, so the bound allows four times the rounding error.
    """
    rounded = _UNIT + (2.0**-11 if tf32 else 0.0)
    summed = width * _UNIT * (4 if tf32 else 1)
    return 2 * rounded + rounded**2 + summed + 32 * _UNIT


def to_tf32(values: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
    """Round float32 to the 11 significant bits of TF32, so that every device multiplies the same numbers."""
    bits = values.view(torch.int32)
    return bits.add(0x1000).bitwise_and_(~0x1FFF).view(torch.float32)


@contextmanager
def product_of(*, tf32: bool) -> Iterator[None]:
    """Switch TF32 on or off for float32 products on CUDA within the block, then restore the former setting."""
    flags = torch.backends.cuda.matmul
    before = flags.fp32_precision
    flags.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        flags.fp32_precision = before


def lower_bounds(
    queries: Float[Tensor, "B D"], keys: Float[Tensor, "n D"], *, tf32: bool = False
) -> Float[Tensor, "B n"]:
    """Lower bounds of the squared distances, without the query's own part (`own_part`).

    A distance is never below its bound plus `own_part`. Queries and keys are float32 with a common centre subtracted.
    With `tf32` the queries must already be rounded.
    """
    norms, keys = key_parts(keys, tf32=tf32)
    # cuBLAS adds one-dimensional norms while it writes the product; norms of shape [1, n] would first be expanded to
    # [B, n].
    return torch.addmm(norms, queries, keys.T, alpha=-2)


def key_parts(keys: Float[Tensor, "n D"], *, tf32: bool = False) -> tuple[Float[Tensor, " n"], Float[Tensor, "n D"]]:
    """What `lower_bounds` adds to the product, and what it multiplies: norms, and the keys, rounded with `tf32`."""
    norms = _sq_norms(keys).mul_(1 - slack(keys.shape[1], tf32=tf32)).float()
    return norms, to_tf32(keys) if tf32 else keys


def own_part(queries: Float[Tensor, "B D"], *, tf32: bool = False) -> Float[Tensor, "B 1"]:
    """The part of the bound that depends on the query only; `lower_bounds` leaves it out."""
    return _sq_norms(queries)[:, None].mul_(1 - slack(queries.shape[1], tf32=tf32)).float()


def smallest(values: Float[Tensor, "B n"], keep: int) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"]]:
    """The `keep` smallest values of each row and their columns, in no order; ties are broken arbitrarily.

    The columns are split into n / g groups of g. The `keep` groups with the smallest minima contain the `keep` smallest
    values. A top-k on CUDA reads its input about six times. With the groups it reads 2 sqrt(n keep) columns instead of
    n, which is a sixth for n = 131,072 and keep = 1,041.
    """
    n = values.shape[1]
    group = math.isqrt(n // keep) if keep else 1
    if group < 2:
        near, column = values.topk(min(keep, n), largest=False, sorted=False)
        return near, column
    # Group j has the columns j, j + n_groups, ..., so that neighbouring threads read neighbouring columns.
    n_groups = n // group
    members = values[:, : n_groups * group].view(-1, group, n_groups)
    picked = members.amin(1).topk(keep, largest=False, sorted=False).indices
    inside = members.gather(2, picked[:, None].expand(-1, group, -1)).flatten(1)
    near, at = torch.cat([inside, values[:, n_groups * group :]], 1).topk(keep, largest=False, sorted=False)
    column = (at // keep) * n_groups + picked.gather(1, at % keep)
    return near, torch.where(at < group * keep, column, at - group * keep + n_groups * group)


def row_distances(queries: Float[Tensor, "B D"], keys: Tensor, places: Int[Tensor, "B C"]) -> Float[Tensor, "B C"]:
    """Exact squared distances (float32) from query i to the keys `keys[places[i]]`.

    Differences are float32 and their squares are summed in float64. So the result does not depend on the order of the
    sum, and equal keys have distance 0.

    Args:
        queries: float32.
        keys: Keys in their type on disk (float16, bfloat16 or float32), shape (n, D).
        places: Row numbers in `keys`, C for each query.
    """
    if queries.is_cuda:
        from memdec.maths import gathered  # needs Triton, which comes with torch for CUDA

        return gathered.row_distances(queries, keys, places)
    out, size = queries.new_empty(places.shape), max(1, _PAIRS // max(1, places.shape[1]))
    for low in range(0, len(places), size):
        out[low : low + size] = _sq_norms(torch.sub(keys[places[low : low + size]], queries[low : low + size, None]))
    return out


def pair_distances(
    queries: Float[Tensor, "B D"], keys: Tensor, rows: Int[Tensor, " P"], places: Int[Tensor, " P"]
) -> Float[Tensor, " P"]:
    """Exact squared distances (as in `row_distances`) of the pairs (queries[rows], keys[places])."""
    out = queries.new_empty(len(rows))
    for low in range(0, len(rows), _PAIRS):
        out[low : low + _PAIRS] = _sq_norms(
            torch.sub(keys[places[low : low + _PAIRS]], queries[rows[low : low + _PAIRS]])
        )
    return out


def nearest_cells(
    queries: Float[Tensor, "B D"], centroids: Float[Tensor, "C D"], n: int, *, room: int
) -> Int[Tensor, "B P"]:
    """The `n` nearest cells of each query, nearest first, ties by number, as `cell_join.nearest_cells`.

    Args:
        queries: float32.
        centroids: float32, on the same device.
        n: P, at most C.
        room: Bytes of memory.
    """
    fetch = min(n + _CELLS_MORE, len(centroids))
    wide = centroids.double()
    norms = (wide * wide).sum(1)
    found = []
    size = max(1, room // (32 * len(centroids)))
    for low in range(0, len(queries), size):
        some = queries[low : low + size]
        near = torch.addmm(norms, some.double(), wide.T, alpha=-2)
        cells = near.topk(fetch, largest=False, sorted=False).indices
        codes = encode(row_distances(some, centroids, cells), cells)
        found.append(decode(codes.sort(1).values[:, :n])[1])
    return torch.cat(found) if found else torch.empty(0, n, dtype=torch.long, device=queries.device)


def _sq_norms(apart: Float[Tensor, "... D"]) -> Float[Tensor, "..."]:
    # One kernel squares and sums. A separate product and sum would read and write the differences once more.
    norms: Tensor = torch.linalg.vector_norm(apart, dim=-1, dtype=torch.float64)
    return norms.square_()


NONE = (0x7F800000 << 32) | kernels.NOBODY  # code of a missing neighbour (+inf, no position); it sorts after all others


def encode(sq_dist: Float[Tensor, "..."], ids: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Pack (distance, position) into one int64 that sorts by distance, then by position (as in `knn.drop_self`)."""
    return sq_dist.view(torch.int32).long().bitwise_left_shift_(32).bitwise_or_(ids)


def decode(codes: Int[Tensor, "..."]) -> tuple[Float[Tensor, "..."], Int[Tensor, "..."]]:
    """Unpack codes into distances and positions; a missing neighbour has position -1."""
    ids = codes.bitwise_and(kernels.NOBODY)
    return codes.bitwise_right_shift(32).int().view(torch.float32), ids.masked_fill_(ids == kernels.NOBODY, -1)
