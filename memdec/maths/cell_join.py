"""Nearest keys of many queries, where each query names the cells (sets of keys) in which it searches.

All queries that search a cell are compared with it together, so that its keys are read and converted once.

Every distance is a sum of squared differences in a fixed order, with a fixed rounding at each step (`_add_squares`). So it
depends on its query and its key only. Neighbours are ordered by (distance, position), which has no ties. So the result
is the same to the last bit for any group of queries, any order of the cells and any number of threads.

A matrix product |k|^2 - 2 q k needs one operation for a dimension in the place of two. But its rounding depends on its
shape, so exact distances have to follow for those that may be among the best. For the few nearest cells of a query that
pays (`nearest_cells`). For the k nearest keys it would not: they are scattered over the memory.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from memdec.maths import exact_search
from memdec.maths.kernels import LARGEST_BITS, NOBODY, compiled, gather, in_threads, unpack_distinct, widened

_PIECE = 256  # keys whose distances are looked at together
_LANES = 16  # keys that are compared at once; of width 256 they and `_TILE` queries (32 kB) fit into the level 1 cache
_TOGETHER = 4  # queries that share the reading of these keys, and whose sums stay in registers
_TILE = 16  # queries that are compared with the same keys one after the other
_HELD = 8192  # keys that are gathered at once: 4 MB in float16 at width 256
_SORTED = 64  # queries whose neighbours are sorted at once: 512 kB with k = 1024 stay in the level 2 cache
_FEWEST = 256  # queries that are not shared among threads, each of which would gather the same keys
_BOUNDS = 1 << 20  # distances of queries to centroids that are looked at together: 4 MB
_NONE = -2  # no set, other than the -1 of a key
_STEPS = 10  # power iterations for the widest direction; it need not be exact
_TINY = float(np.finfo(np.float32).tiny)
_GROUP = 64 * 2**20  # bytes of candidates of the queries that a thread handles at once
_INF = int(np.float32(np.inf).view(np.int32))
# Memory of groups that have ended, one for each thread at most: to get new pages takes up to a quarter of the time.
_SPARE: list[tuple[Any, Any]] = []
Parts = Sequence[tuple[int, NDArray[Any]]]
Pair = tuple[Float[np.ndarray, "B K"], Int[np.ndarray, "B K"]]


class BadKeyError(ValueError):
    """The key at `position` is NaN, infinite, or too large for distances (`kernels.LARGEST`)."""

    def __init__(self, position: int) -> None:
        super().__init__(f"expected finite keys, found NaN, inf or a larger number at position {position}")
        self.position = position


class Beside(NamedTuple):
    """Other sets of keys than the cells, of which a query searches one.

    Attributes:
        chosen: Set of each query, (B,); -1 for none.
        starts: Set s has the keys positions[starts[s] : starts[s + 1]].
        positions: Positions of the keys, set after set.
        cells: Cell of each of these keys.
        set_of: Gives the set of each of some positions, -1 if it is in none.
    """

    chosen: Int[np.ndarray, " B"]
    starts: Int[np.ndarray, " S+1"]
    positions: Int[np.ndarray, " M"]
    cells: Int[np.ndarray, " M"]
    set_of: Callable[[Int[np.ndarray, " n"]], Int[np.ndarray, " n"]]


def nearest(
    queries: Float[np.ndarray, "B D"],
    own: Int[np.ndarray, " B"],
    probes: Int[np.ndarray, "B P"],
    starts: Int[np.ndarray, " C+1"],
    positions: Int[np.ndarray, " N"],
    parts: Parts,
    neighbours: int,
    beside: Sequence[Beside] = (),
) -> Pair:
    """Find the nearest keys of each query in the cells that it names, and in sets beside them.

    Memory: 70 MB for each of torch's threads, whatever the number of queries, of keys and of cells, and
    the result.

    Args:
        queries: float32, finite.
        own: Position of each query, which is not its neighbour; -1 if the query is no key.
        probes: Cells of each query, each cell at most once.
        starts: Cell c has the keys positions[starts[c] : starts[c + 1]].
        positions: Positions of the keys, cell after cell.
        parts: (first position, keys) of each shard of the datastore, as in `knn.exact_distances`.
        neighbours: K.
        beside: At most two kinds of other sets. A key that a query meets in several ways counts once.

    Returns:
        Squared distances (float32) and positions (int64), nearest first, ties by position. Where there are fewer keys,
        the rest is +inf and -1.

    Raises:
        BadKeyError: A key of these cells and sets cannot be compared.
    """
    sq_dist = np.full((len(queries), neighbours), np.inf, np.float32)
    ids = np.full((len(queries), neighbours), -1)
    room = neighbours + max(_PIECE, neighbours // 2)  # of candidates, between two selections of the nearest

    def work(begin: int, end: int) -> None:
        searched = probes[begin:end]
        found = _Group(queries[begin:end], own[begin:end], searched, len(starts) - 1, neighbours, room)
        held = np.empty((_HELD, queries.shape[1]), parts[0][1].dtype)  # allocated once: a page at first use is slow
        for pieces, places in _chunks(searched, starts):
            chosen = positions[places]
            found.compare(gathered(parts, chosen, held[: len(chosen)]), chosen, pieces)
        for kind, sets in enumerate(beside):
            for pieces, places in _chunks(sets.chosen[begin:end, None], sets.starts):
                chosen = sets.positions[places]
                before = beside[0].set_of(chosen.astype(np.int64)) if kind else np.full(len(chosen), -1)
                met = sets.cells[places], before, beside[0].chosen[begin:end]
                found.compare(gathered(parts, chosen, held[: len(chosen)]), chosen, pieces, met)
        found.result(sq_dist[begin:end], ids[begin:end])

    share = max(_FEWEST, -(-len(queries) // torch.get_num_threads()))
    in_threads(work, len(queries), max(1, min(share, _GROUP // (8 * room))))
    return sq_dist, ids


def nearest_cells(
    queries: Float[np.ndarray, "B D"], centroids: Float[np.ndarray, "C D"], n: int
) -> Int[np.ndarray, "B P"]:
    """The `n` nearest cells of each query, nearest first, ties by number; `n` is at most C.

    A matrix product gives lower bounds of all distances (`exact_search`). Those that may be among the nearest are computed
    exactly, with sums in float64. So the result depends on the query and the centroids only.
    """
    centre = centroids.mean(0)
    norms, moved = exact_search.key_parts(torch.from_numpy(centroids - centre))
    found = np.empty((len(queries), n), np.int64)
    size = max(1, _BOUNDS // len(centroids))
    room = torch.empty(min(size, len(queries)), len(centroids))
    for low in range(0, len(queries), size):
        some = np.ascontiguousarray(queries[low : low + size], np.float32)
        apart = torch.from_numpy(some - centre)
        bounds = torch.addmm(norms, apart, moved.T, alpha=-2, out=room[: len(some)])
        rows = bounds.numpy(), exact_search.own_part(apart)[:, 0].numpy(), some, found[low : low + size]

        def work(begin: int, end: int, rows: Any = rows) -> None:
            exact, codes = np.empty(1, np.float32), np.empty(len(centroids), np.uint64)
            some = (each[begin:end] for each in rows)
            loss = np.float32(2 * exact_search.slack(centroids.shape[1]))
            _choose(*some, centroids, norms.numpy(), loss, exact, exact.view(np.int32), codes)

        in_threads(work, len(some), _FEWEST)
    return found


def side_by_side(points: Float[np.ndarray, "n D"]) -> Int[np.ndarray, " n"]:
    """An order in which near points are near each other: halves along the widest direction, and halves of these.

    Queries in the order of such cells search few different ones.
    """
    order = np.arange(len(points))
    parts = [order]
    while parts:
        part = parts.pop()
        apart = points[part] - points[part].mean(0)
        widest = apart[np.square(apart).sum(1).argmax()]  # a start that is not at right angles to it
        for _ in range(_STEPS):
            widest = apart.T @ (apart @ (widest / max(float(np.linalg.norm(widest)), _TINY)))
        part[:] = part[np.argsort(apart @ widest, kind="stable")]
        parts += [half for half in np.split(part, [len(part) // 2]) if len(half) > 1]
    return order


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
    """A few queries, the cells that they search, and the nearest keys that they have met so far."""

    def __init__(
        self,
        queries: Float[np.ndarray, "B D"],
        own: Int[np.ndarray, " B"],
        probes: Int[np.ndarray, "B P"],
        n_cells: int,
        neighbours: int,
        room: int,
    ) -> None:
        n, width = queries.shape
        self._queries = np.ascontiguousarray(queries, np.float32)
        self._own, self._neighbours = own.astype(np.uint32), neighbours  # -1 becomes `NOBODY`, which no key is
        self._probes, self._marks = probes, np.full(n_cells, -1, np.int32)
        self._near, self._ids = (each[: n * room].reshape(n, room) for each in _taken(n * room))
        self._counts, self._limits = np.zeros(n, np.int64), np.full(n, np.inf, np.float32)
        self._panel, self._strip = _aligned(_PIECE, width), _aligned(_LANES, width)
        self._tile = _aligned(_TILE, _PIECE)

    def compare(
        self,
        keys: NDArray[Any],
        positions: Int[np.ndarray, " n"],
        pieces: tuple[NDArray[np.int64], ...],
        met: tuple[NDArray[np.integer], ...] | None = None,
    ) -> None:
        """Compare keys with queries.

        Args:
            keys: In their format on disk, (n, D).
            positions: Their positions.
            pieces: (edges, begins, ends, rows): the keys edges[i] to edges[i + 1] and the queries
                rows[begins[i] : ends[i]].
            met: (cells of the keys, sets of the keys, sets of the queries): a query does not meet a key again that is in
                one of its cells or in its set. None: no key was met before.
        """
        cells, sets, chosen = (np.empty(0),) * 3 if met is None else met
        bad = int(
            _compare(
                keys,
                positions,
                *pieces,
                self._queries,
                self._own,
                met is not None,
                cells.astype(np.uint32),
                sets.astype(np.int32),
                np.where(chosen < 0, _NONE, chosen).astype(np.int32),
                self._probes,
                self._marks,
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
        self._marks[:] = -1
        if bad >= 0:
            raise BadKeyError(int(positions[bad]))

    def result(self, sq_dist: Float[np.ndarray, "B K"], ids: Int[np.ndarray, "B K"]) -> None:
        """Write distances and positions of the nearest, sorted; the places of missing ones are left as they are.

        This ends the group: its memory goes to the next one.
        """
        near, bits = self._near, self._near.view(np.int32)
        for low in range(0, len(near), _SORTED):
            some = slice(low, low + _SORTED)
            codes = np.empty((len(near[some]), self._neighbours), np.uint64)
            _pack(near[some], bits[some], self._ids[some], self._counts[some], codes)
            codes.sort(axis=1)
            unpack_distinct(codes, sq_dist[some].view(np.int32), ids[some])
        _SPARE.append((self._near.base, self._ids.base))


def _taken(n: int) -> tuple[NDArray[np.float32], NDArray[np.uint32]]:
    """Room for at least n distances and positions, that of a group which has ended if it is large enough."""
    try:
        near, ids = _SPARE.pop()  # another thread may have taken it
    except IndexError:
        near = ids = None
    if near is None or len(near) < n:
        near, ids = np.empty(n, np.float32), np.empty(n, np.uint32)
    return near, ids


def _aligned(n: int, width: int) -> NDArray[np.float32]:
    """Zeros that begin at a multiple of 64 bytes: vectors across two cache lines take twice as long to read."""
    plain = np.zeros(n * width + 16, np.float32)
    skip = -plain.ctypes.data // 4 % 16
    return plain[skip : skip + n * width].reshape(n, width)


def _chunks(
    probes: Int[np.ndarray, "B P"], starts: Int[np.ndarray, " C+1"]
) -> Iterator[tuple[tuple[NDArray[np.int64], ...], Int[np.ndarray, " n"]]]:
    """Go through the cells that are named: what `_Group.compare` takes, and the keys' places in the order of cells.

    -1 is no cell.

    A large cell is cut into pieces of equal size, so memory does not depend on it.
    """
    flat = probes.reshape(-1)
    order = np.argsort(flat, kind="stable")[np.count_nonzero(flat < 0) :]
    rows = order // probes.shape[1]
    cells, first = np.unique(flat[order], return_index=True)
    edges = np.append(first, len(order))
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
def _add_squares(
    _typing: Any,
    queries: Any,
    query0: Any,
    query1: Any,
    query2: Any,
    query3: Any,
    panel: Any,
    keys: Any,
    width: Any,
    tile: Any,
    out: Any,
    row: Any,
) -> Any:
    """Write the squared distances of `_TOGETHER` queries to `_LANES` keys.

    Every sum runs over the dimensions in order, in one `fma(difference, difference, sum)` each, with one rounding. The
    compiler would keep these sums in memory, and choose between one and two roundings loop by loop.

    Args:
        queries: Queries; arrays are flat, and places are uint64.
        query0: Place of the first number of a query; likewise `query1`, `query2` and `query3`.
        panel: Keys as `_lay_out` writes them, at a multiple of 64 bytes.
        keys: Place of the first number of the first of these keys.
        width: Dimensions.
        tile: Distances, at a multiple of 64 bytes.
        out: Place of the first distance of the first query.
        row: Numbers from there to the first distance of the next query.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number, place, index = ir.FloatType(), ir.IntType(64), ir.IntType(32)
        vector = ir.VectorType(number, _LANES)
        every = ir.Constant(ir.VectorType(index, _LANES), [0] * _LANES)
        blank, aligned = ir.Constant(vector, ir.Undefined), 4 * _LANES
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{_LANES}f32"
        )
        flat_queries, flat_panel, flat_tile = (
            context.make_array(signature.args[at])(context, builder, args[at]).data for at in (0, 5, 8)
        )

        def vector_at(flat: Any, at: Any) -> Any:
            return builder.bitcast(builder.gep(flat, [at]), vector.as_pointer())

        sums = [cgutils.alloca_once_value(builder, ir.Constant(vector, [0.0] * _LANES)) for _ in range(_TOGETHER)]
        with cgutils.for_range(builder, args[7], intp=place) as loop:
            at = builder.add(args[6], builder.mul(loop.index, ir.Constant(place, _LANES)))
            some = builder.load(vector_at(flat_panel, at), align=aligned)
            for total, query in zip(sums, args[1 : 1 + _TOGETHER], strict=True):
                one = builder.load(builder.gep(flat_queries, [builder.add(query, loop.index)]))
                first = builder.insert_element(blank, one, ir.Constant(index, 0))
                difference = builder.fsub(builder.shuffle_vector(first, blank, every), some)
                builder.store(builder.call(fma, [difference, difference, builder.load(total)]), total)
        for number_of, total in enumerate(sums):
            at = builder.add(args[9], builder.mul(args[10], ir.Constant(place, number_of)))
            builder.store(builder.load(total), vector_at(flat_tile, at), align=aligned)
        return context.get_dummy_value()

    u = types.uint64
    return types.void(queries, u, u, u, u, panel, u, u, tile, u, u), codegen


@compiled()
def _lay_out(keys: Any, begin: int, n: int, strip: Any, strip_bits: Any, panel: Any) -> int:
    """Write the keys begin ... begin + n - 1 in float32, `_LANES` of them at a time by dimension, into the flat panel.

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
            place = low * width + d * _LANES
            out = panel[place : place + _LANES]
            for j in range(_LANES):
                out[j] = strip[j, d]
    return -1


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
    again: bool,
    cells: Any,
    sets: Any,
    chosen: Any,
    probes: Any,
    marks: Any,
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
    flat_near, flat_ids = near.reshape(-1), ids.reshape(-1)
    for piece in range(len(begins)):
        first, n = edges[piece], edges[piece + 1] - edges[piece]
        bad: int = _lay_out(keys, first, n, strip, strip_bits, flat_panel)
        if bad >= 0:
            return bad
        there = positions[first : first + n]
        in_cells, in_sets = cells[first : first + n], sets[first : first + n]
        for low in range(begins[piece], ends[piece], _TILE):
            size = min(_TILE, ends[piece] - low)
            for begin in range(0, n, _LANES):
                for i in range(0, size, _TOGETHER):
                    # In the place of queries that are missing stands the last one; nobody reads their distances.
                    at, last = low + i, low + size - 1
                    _add_squares(
                        flat_queries,
                        np.uint64(rows[at] * width),
                        np.uint64(rows[min(at + 1, last)] * width),
                        np.uint64(rows[min(at + 2, last)] * width),
                        np.uint64(rows[min(at + 3, last)] * width),
                        flat_panel,
                        np.uint64(begin * width),
                        np.uint64(width),
                        flat_tile,
                        np.uint64(i * _PIECE + begin),
                        np.uint64(_PIECE),
                    )
            for i in range(size):
                row = rows[low + i]
                if counts[row] + n > room:
                    counts[row], limits[row] = _cut(near[row], near_bits[row], ids[row], counts[row], neighbours)
                # Flat arrays and unsigned places: negative ones would be tested for at every number.
                limit, me, here = limits[row], own[row], np.uint64(row) * np.uint64(room)
                end, found = here + np.uint64(counts[row]), np.uint64(i * _PIECE)
                if again:
                    mark, mine = np.int32(row), chosen[row]
                    for probe in range(probes.shape[1]):
                        marks[probes[row, probe]] = mark
                    for j in range(np.uint64(n)):
                        distance, position = flat_tile[found + j], there[j]
                        flat_near[end], flat_ids[end] = distance, position
                        new = (marks[in_cells[j]] != mark) & (in_sets[j] != mine)
                        end += np.uint64((distance <= limit) & (position != me) & new)
                else:
                    for j in range(np.uint64(n)):  # no branch: `end` advances only past a candidate
                        distance, position = flat_tile[found + j], there[j]
                        flat_near[end], flat_ids[end] = distance, position
                        end += np.uint64((distance <= limit) & (position != me))
                counts[row] = np.int64(end - here)
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


@compiled(fastmath={"reassoc", "contract"})
def _distance(query: Any, key: Any) -> float:
    """The squared distance: float32 differences, summed in float64."""
    total = 0.0
    for d in range(len(query)):
        apart = np.float64(query[d] - key[d])
        total += apart * apart
    return total


@compiled()
def _choose(
    bounds: Any,
    own: Any,
    queries: Any,
    found: Any,
    centroids: Any,
    norms: Any,
    loss: Any,
    exact: Any,
    exact_bits: Any,
    codes: Any,
) -> None:
    """See `nearest_cells`.

    Args:
        bounds: Lower bounds of squared distances without the query's own part, (B, C).
        own: Squared norm of each query, (B,).
        queries: Shape (B, D).
        found: Output, (B, P).
        centroids: Shape (C, D).
        norms: Squared norm of each centroid, (C,).
        loss: Twice the largest error of a squared distance, as a fraction of the sum of both norms.
        exact: Scratch memory for a number; `exact_bits` are its bits.
        codes: Scratch memory, C numbers.
    """
    n = found.shape[1]
    for row in range(len(bounds)):
        here = bounds[row]
        low = high = here[0]
        for cell in range(len(here)):
            low, high = min(low, here[cell]), max(high, here[cell])
        # A bound below which there are at least n cells and hardly more, by halving as in `_cut`.
        while True:
            limit = low + (high - low) / np.float32(2)
            if limit in (low, high):
                break
            count = np.int32(0)
            for cell in range(len(here)):
                count = np.int32(count + (here[cell] <= limit))
            if count < n:
                low = limit
            else:
                high = limit
                if count <= n + n // 8:
                    break
        # The distances to these cells are at most so large; no other cell with a larger bound is nearer.
        largest = np.float32(0)
        for cell in range(len(here)):
            largest = max(largest, norms[cell] if here[cell] <= high else np.float32(0))
        end, last = 0, high + loss * (own[row] + largest)
        for cell in range(len(here)):
            if here[cell] <= last:
                exact[0] = _distance(queries[row], centroids[cell])
                codes[end] = np.uint64(exact_bits[0]) << np.uint64(32) | np.uint64(cell)
                end += 1
        codes[:end].sort()
        for place in range(n):
            found[row, place] = np.int64(codes[place] & np.uint64(NOBODY))


@compiled()
def _place(cells: Any, following: Any, positions: Any) -> None:
    """Counting sort: `following` is the next free place of each cell."""
    for position in range(len(cells)):
        cell = cells[position]
        positions[following[cell]] = position
        following[cell] += 1
