"""Nearest keys of many queries, where each query names the cells (sets of keys) in which it searches.

All queries that search a cell are compared with it together, so that its keys are read and converted once. The cells of
an index are one use. Finding a query's nearest cells is another: there the centroids are the keys of a single cell.

Every distance is a sum of squared differences in a fixed order, with a fixed rounding at each step (`_fma`). So it
depends on its query and its key only. Neighbours are ordered by (distance, position), which has no ties. So the result
is the same to the last bit for any group of queries, any order of the cells and any number of threads.

A matrix product |k|^2 - 2 q k would not be faster on a CPU. It takes 6 ns for a query and a key of width 256, and the
differences take 7 ns, because a processor subtracts and adds at the same time. Its rounding depends on its shape, so
exact distances would have to follow for the k best and a margin, scattered over the memory.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from memdec.maths.kernels import LARGEST_BITS, NOBODY, compiled, gather, in_threads, unpack_distinct, widened

_PIECE = 256  # keys that are compared at once; 4 dimensions of them (4 kB) stay in the level 1 cache
_DIMS = 4  # dimensions that are compared between reading and writing a distance
_LANES = 16  # the number of keys of a piece is rounded up to a multiple; one vector instruction takes so many
_TILE = 16  # queries that are compared with the same 4 dimensions; their distances (16 kB) stay in that cache, too
_HELD = 8192  # keys that are gathered at once: 4 MB in float16 at width 256
_SORTED = 64  # queries whose neighbours are sorted at once: 512 kB with k = 1024 stay in the level 2 cache
_FEWEST = 256  # queries that are not shared among threads, each of which would gather the same keys
_ROOM = 1024  # candidates collected between two selections of the nearest, at least; never fewer than a piece
_GROUP = 24 * 2**20  # bytes of candidates of the queries that a thread handles at once
_1, _2, _3, _ROW = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(_PIECE)
_INF = int(np.float32(np.inf).view(np.int32))
Parts = Sequence[tuple[int, NDArray[Any]]]
Pair = tuple[Float[np.ndarray, "B K"], Int[np.ndarray, "B K"]]


class BadKeyError(ValueError):
    """The key at `position` is NaN, infinite, or too large for distances (`kernels.LARGEST`)."""

    def __init__(self, position: int) -> None:
        super().__init__(f"expected finite keys, found NaN, inf or a larger number at position {position}")
        self.position = position


def nearest(
    queries: Float[np.ndarray, "B D"],
    own: Int[np.ndarray, " B"],
    probes: Int[np.ndarray, "B P"],
    starts: Int[np.ndarray, " C+1"],
    positions: Int[np.ndarray, " N"],
    parts: Parts,
    neighbours: int,
) -> Pair:
    """Find the nearest keys of each query in the cells that it names.

    Memory: 30 MB for each of torch's threads with k = 1024, whatever the number of queries, of keys and of cells, and
    the result.

    Args:
        queries: float32, finite.
        own: Position of each query, which is not its neighbour; -1 if the query is no key.
        probes: Cells of each query, each cell at most once.
        starts: Cell c has the keys positions[starts[c] : starts[c + 1]].
        positions: Positions of the keys, cell after cell.
        parts: (first position, keys) of each shard of the datastore, as in `knn.exact_distances`.
        neighbours: K.

    Returns:
        Squared distances (float32) and positions (int64), nearest first, ties by position. Where the cells have fewer
        keys, the rest is +inf and -1.

    Raises:
        BadKeyError: A key of these cells cannot be compared.
    """
    sq_dist = np.full((len(queries), neighbours), np.inf, np.float32)
    ids = np.full((len(queries), neighbours), -1)
    room = 2 * neighbours + _ROOM

    def work(begin: int, end: int) -> None:
        found = _Group(queries[begin:end], own[begin:end], neighbours, room)
        held = np.empty((_HELD, queries.shape[1]), parts[0][1].dtype)  # allocated once: a page at first use is slow
        for pieces, places in _chunks(probes[begin:end], starts):
            chosen = positions[places]
            found.compare(gathered(parts, chosen, held[: len(chosen)]), chosen, *pieces)
        found.result(sq_dist[begin:end], ids[begin:end])

    share = max(_FEWEST, -(-len(queries) // torch.get_num_threads()))
    in_threads(work, len(queries), max(1, min(share, _GROUP // (8 * room))))
    return sq_dist, ids


def nearest_cells(
    queries: Float[np.ndarray, "B D"], centroids: Float[np.ndarray, "C D"], n: int
) -> Int[np.ndarray, "B P"]:
    """The `n` nearest cells of each query, nearest first, ties by number; `n` is at most C."""
    one, n_cells = np.zeros((len(queries), 1), np.int64), len(centroids)
    nobody, numbers = np.full(len(queries), -1), np.arange(n_cells, dtype=np.uint32)
    return nearest(queries, nobody, one, np.array([0, n_cells]), numbers, [(0, centroids)], n)[1]


def gathered(parts: Parts, positions: Int[np.ndarray, " n"], out: NDArray[Any]) -> NDArray[Any]:
    """Copy the keys of these positions from all shards to `out`, in their format on disk."""
    for first, keys in parts:
        gather(keys, first, positions, out)
    return out


def grouped(cells: Int[np.ndarray, " N"], n_cells: int) -> tuple[Int[np.ndarray, " C+1"], Int[np.ndarray, " N"]]:
    """`starts` and `positions` (uint32), ascending within a cell, from the cell of each position."""
    starts = np.concatenate([[0], np.cumsum(np.bincount(cells, minlength=n_cells))])
    positions = np.empty(len(cells), np.uint32)
    _place(cells, starts[:-1].copy(), positions)
    return starts, positions


class _Group:
    """A few queries and the nearest keys that they have met so far."""

    def __init__(
        self, queries: Float[np.ndarray, "B D"], own: Int[np.ndarray, " B"], neighbours: int, room: int
    ) -> None:
        n, width = queries.shape
        full = -(-width // _DIMS) * _DIMS  # more dimensions in which all are 0 change no distance
        self._queries = np.zeros((n, full), np.float32)
        self._queries[:, :width] = queries
        self._own, self._neighbours = own.astype(np.int64), neighbours
        self._near, self._ids = np.empty((n, room), np.float32), np.empty((n, room), np.uint32)
        self._counts, self._limits = np.zeros(n, np.int64), np.full(n, np.inf, np.float32)
        self._panel, self._strip = _aligned(full, _PIECE), _aligned(_LANES, width)
        self._tile = _aligned(_TILE, _PIECE)

    def compare(
        self,
        keys: NDArray[Any],
        positions: Int[np.ndarray, " n"],
        edges: Int[np.ndarray, " pieces+1"],
        begins: Int[np.ndarray, " pieces"],
        ends: Int[np.ndarray, " pieces"],
        rows: Int[np.ndarray, " pairs"],
    ) -> None:
        """Compare keys with queries: the keys edges[i] to edges[i + 1] with the queries rows[begins[i] : ends[i]]."""
        bad = int(
            _compare(
                keys,
                positions,
                edges,
                begins,
                ends,
                rows,
                self._queries,
                self._own,
                self._near,
                self._near.view(np.int32),
                self._ids,
                self._counts,
                self._limits,
                self._neighbours,
                self._strip,
                self._strip.view(np.int32),
                self._panel,
                self._tile,
            )
        )
        if bad >= 0:
            raise BadKeyError(int(positions[bad]))

    def result(self, sq_dist: Float[np.ndarray, "B K"], ids: Int[np.ndarray, "B K"]) -> None:
        """Write distances and positions of the nearest, sorted; the places of missing ones are left as they are."""
        near, bits = self._near, self._near.view(np.int32)
        for low in range(0, len(near), _SORTED):
            some = slice(low, low + _SORTED)
            codes = np.empty((len(near[some]), self._neighbours), np.uint64)
            _pack(near[some], bits[some], self._ids[some], self._counts[some], codes)
            codes.sort(axis=1)
            unpack_distinct(codes, sq_dist[some].view(np.int32), ids[some])


def _aligned(n: int, width: int) -> NDArray[np.float32]:
    """Zeros that begin at a multiple of 64 bytes: vectors across two cache lines take twice as long to read."""
    plain = np.zeros(n * width + 16, np.float32)
    skip = -plain.ctypes.data // 4 % 16
    return plain[skip : skip + n * width].reshape(n, width)


def _chunks(
    probes: Int[np.ndarray, "B P"], starts: Int[np.ndarray, " C+1"]
) -> Iterator[tuple[tuple[NDArray[np.int64], ...], Int[np.ndarray, " n"]]]:
    """Go through the cells that are named: what `_Group.compare` takes, and the keys' places in the order of cells.

    A large cell is cut into pieces of equal size, so memory does not depend on it.
    """
    flat = probes.reshape(-1)
    order = np.argsort(flat, kind="stable")
    rows = order // probes.shape[1]
    cells, first = np.unique(flat[order], return_index=True)
    edges = np.append(first, len(flat))
    sizes = starts[cells + 1] - starts[cells]
    n_pieces = -(-sizes // _PIECE)
    cell = np.repeat(np.arange(len(cells)), n_pieces)
    number = np.arange(len(cell)) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)
    begin = starts[cells][cell] + number * sizes[cell] // n_pieces[cell]
    length = starts[cells][cell] + (number + 1) * sizes[cell] // n_pieces[cell] - begin
    total = np.concatenate([[0], np.cumsum(length)])
    low = 0
    while low < len(cell):
        high = int(np.searchsorted(total, total[low] + _HELD, side="right")) - 1
        some, within = slice(low, high), total[low : high + 1] - total[low]
        held = np.arange(within[-1]) + np.repeat(begin[some] - within[:-1], length[some])
        yield (within, edges[cell[some]], edges[cell[some] + 1], rows), held
        low = high


# --- compiled loops -----------------------------------------------------------------------------------------------


@intrinsic  # type: ignore[untyped-decorator]
def _fma(_typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c with one rounding. Otherwise the compiler would choose between one and two, loop by loop."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    single = types.float32
    return single(single, single, single), codegen


@compiled()
def _lay_out(keys: Any, begin: int, n: int, strip: Any, strip_bits: Any, panel: Any) -> int:
    """Write the keys begin ... begin + n - 1 by dimension, in float32: number d of key j becomes panel[d, j].

    Returns:
        -1, or the number of the first key that is not finite or too large.
    """
    width = keys.shape[1]
    for low in range(0, n, _LANES):
        for j in range(_LANES):
            if low + j < n:
                largest, row, wide, wide_bits = np.int32(0), keys[begin + low + j], strip[j], strip_bits[j]
                for d in range(width):
                    wide[d] = widened(row[d])
                for d in range(width):
                    largest = max(largest, wide_bits[d] & np.int32(0x7FFFFFFF))
                if largest >= LARGEST_BITS:
                    return begin + low + j
        for d in range(width):
            out = panel[d, low : low + _LANES]
            for j in range(_LANES):
                out[j] = strip[j, d]
    return -1


@compiled()
def _add_squares(queries: Any, one: Any, other: Any, panel: Any, keys: Any, n: Any, tile: Any, out: Any) -> None:
    """Add the squares of `_DIMS` differences of two queries to n keys; two share the reading of the keys.

    Arrays are flat, and places unsigned: views would take as long as the sums, and the compiler uses no vectors where a
    place may be negative.

    Args:
        queries: Queries.
        one: Place of the first number of one query.
        other: The same of the other query.
        panel: Keys by dimension.
        keys: Place of the first number of the first key.
        n: Number of keys.
        tile: Sums.
        out: Place of the first sum of one query; those of the other query are `_PIECE` further on.
    """
    a0, a1, a2, a3 = queries[one], queries[one + _1], queries[one + _2], queries[one + _3]
    b0, b1, b2, b3 = queries[other], queries[other + _1], queries[other + _2], queries[other + _3]
    for j in range(n):
        at = keys + j
        k0, k1, k2, k3 = panel[at], panel[at + _ROW], panel[at + _2 * _ROW], panel[at + _3 * _ROW]
        x0, x1, x2, x3 = a0 - k0, a1 - k1, a2 - k2, a3 - k3
        y0, y1, y2, y3 = b0 - k0, b1 - k1, b2 - k2, b3 - k3
        tile[out + j] += _fma(x3, x3, _fma(x2, x2, _fma(x1, x1, x0 * x0)))
        tile[out + j + _ROW] += _fma(y3, y3, _fma(y2, y2, _fma(y1, y1, y0 * y0)))


@compiled()
def _compare(
    keys: Any,
    positions: Any,
    edges: Any,
    begins: Any,
    ends: Any,
    rows: Any,
    queries: Any,
    own: Any,
    near: Any,
    near_bits: Any,
    ids: Any,
    counts: Any,
    limits: Any,
    neighbours: int,
    strip: Any,
    strip_bits: Any,
    panel: Any,
    tile: Any,
) -> int:
    """See `_Group.compare`; returns the number of the first key that cannot be compared, or -1."""
    room, width = near.shape[1], queries.shape[1]
    flat_queries, flat_panel, flat_tile = queries.reshape(-1), panel.reshape(-1), tile.reshape(-1)
    for piece in range(len(begins)):
        first, n = edges[piece], edges[piece + 1] - edges[piece]
        bad: int = _lay_out(keys, first, n, strip, strip_bits, panel)
        if bad >= 0:
            return bad
        there, full = positions[first : first + n], (n + _LANES - 1) // _LANES * _LANES
        for low in range(begins[piece], ends[piece], _TILE):
            size = min(_TILE, ends[piece] - low)
            tile[:] = 0
            for d in range(0, width, _DIMS):
                for i in range(0, size, 2):
                    # Without a second query the last one takes its place. Its sums go to the unused next row.
                    one, other = rows[low + i] * width + d, rows[low + min(i + 1, size - 1)] * width + d
                    _add_squares(
                        flat_queries,
                        np.uint64(one),
                        np.uint64(other),
                        flat_panel,
                        np.uint64(d * _PIECE),
                        np.uint64(full),
                        flat_tile,
                        np.uint64(i * _PIECE),
                    )
            for i in range(size):
                row, found = rows[low + i], tile[i]
                end = counts[row]
                if end + n > room:
                    end, limits[row] = _cut(near[row], near_bits[row], ids[row], end, neighbours)
                limit, me, near_row, ids_row = limits[row], own[row], near[row], ids[row]
                for j in range(n):  # no branch: `end` advances only past a candidate
                    near_row[end], ids_row[end] = found[j], there[j]
                    end += (found[j] <= limit) & (there[j] != me)
                counts[row] = end
    return -1


@compiled()
def _cut(near: Any, bits: Any, ids: Any, end: int, neighbours: int) -> tuple[int, Any]:
    """Keep the `neighbours` smallest (distance, position) of the first `end`; return their number and the limit.

    No later candidate beyond the limit can be among the nearest. The limit is searched by halving. 15 passes over 2,000
    numbers by vector instructions take a sixth of the time of a partition, which branches at every number. `bits` are
    the distances as int32, which sort like them. All numbers here have 32 bits, so that a vector holds the most.
    """
    if end <= neighbours:
        return end, np.float32(np.inf)
    low = high = bits[0]
    for j in range(end):
        low, high = min(low, bits[j]), max(high, bits[j])
    last = np.uint32(NOBODY)  # of those at the limit, the largest position that stays
    while True:
        limit = np.int32(low + (high - low) // 2)
        count = np.int32(0)
        for j in range(end):
            count = np.int32(count + (bits[j] <= limit))
        if count == neighbours:
            break
        if low == high:  # ties at the limit
            equal = bits[:end] == limit
            last = np.sort(ids[:end][equal])[equal.sum() - 1 - (count - neighbours)]
            break
        if count > neighbours:
            high = limit
        else:
            low = np.int32(limit + 1)
    kept, largest = 0, np.float32(0)
    for j in range(end):  # no branch: `kept` advances only past what stays
        distance, position, code = near[j], ids[j], bits[j]
        near[kept], ids[kept] = distance, position
        kept += (code < limit) | ((code == limit) & (position <= last))
    for j in range(kept):
        largest = max(largest, near[j])
    return kept, largest


@compiled()
def _pack(near: Any, bits: Any, ids: Any, counts: Any, codes: Any) -> None:
    """Write the nearest as codes, distance bits before position, and fill up with (+inf, `NOBODY`)."""
    neighbours = codes.shape[1]
    for row in range(len(codes)):
        end, _ = _cut(near[row], bits[row], ids[row], counts[row], neighbours)
        for j in range(end):
            codes[row, j] = np.uint64(bits[row, j]) << np.uint64(32) | np.uint64(ids[row, j])
        codes[row, end:] = np.uint64(_INF) << np.uint64(32) | np.uint64(NOBODY)


@compiled()
def _place(cells: Any, following: Any, positions: Any) -> None:
    """Counting sort: `following` is the next free place of each cell."""
    for position in range(len(cells)):
        cell = cells[position]
        positions[following[cell]] = position
        following[cell] += 1
