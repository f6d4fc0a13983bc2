"""Inner loops of the kNN stage on CPU, compiled by numba: sums over equal tokens, and exact distances to candidates.

The same loops in NumPy would make large temporary arrays. Each call works on one block of rows with its own scratch
memory and releases the GIL, so that threads can share the work. Other modules call these loops through
`memdec.maths.knn`, which uses torch operations instead on CUDA.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

LARGEST = 1e17  # squared distances of larger keys could overflow float32
LARGEST_BITS = int(np.float32(LARGEST).view(np.int32))
_STRIP = 32  # number of distances whose minimum is compared with the limit first
_HALVINGS = 48  # passes after which the limit of the nearest is no longer searched by halving
_AHEAD = 6  # number of candidates between the prefetch of a key and its use


def compiled(*signature: str, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """numba's `njit` without the GIL, with the machine code kept on disk where a folder can be written.

    numba keeps it beside the module or in the user's cache folder. In an installation where neither can be written it
    raises an error, and then the code is compiled at each start.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return njit(*signature, nogil=True, cache=True, **options)(function)
        except (RuntimeError, OSError):
            return njit(*signature, nogil=True, **options)(function)

    return decorate


@intrinsic  # type: ignore[untyped-decorator]
def widened(_typing: Any, value: Any) -> Any:
    """Convert a key element to float32: uint16 holds float16 bits, int16 holds bfloat16 bits, float32 is unchanged.

    numba has no float16 on CPU. The conversion is one instruction (`vcvtph2ps`) on processors that have it.
    """

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        if value == types.uint16:
            return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())
        if value == types.int16:
            wide = builder.zext(args[0], ir.IntType(32))
            return builder.bitcast(builder.shl(wide, ir.Constant(ir.IntType(32), 16)), ir.FloatType())
        return args[0]

    return types.float32(value), codegen


@intrinsic  # type: ignore[untyped-decorator]
def _prefetch(_typing: Any, keys: Any, row: Any) -> Any:
    """Prefetch a row of a C-contiguous array into the cache, because candidate rows are scattered in memory."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        stride = builder.extract_value(array.strides, 0)
        byte, word = ir.IntType(8), ir.IntType(32)
        begin = builder.gep(builder.bitcast(array.data, byte.as_pointer()), [builder.mul(args[1], stride)])
        prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch", [byte.as_pointer()], ir.FunctionType(ir.VoidType(), [byte.as_pointer(), word, word, word])
        )
        with cgutils.for_range_slice(builder, stride.type(0), stride, stride.type(64), stride.type) as (offset, _):
            # The arguments say: for reading, into the level 2 cache. That is a fifth faster than into level 1.
            builder.call(prefetch, [builder.gep(begin, [offset]), word(0), word(2), word(1)])
        return context.get_dummy_value()

    return types.none(keys, row), codegen


def bits(keys: NDArray[Any]) -> NDArray[Any]:
    """View float16 keys as uint16, which is what the loops below take; other types are unchanged."""
    plain = np.asarray(keys)
    return plain.view(np.uint16) if plain.dtype == np.float16 else plain


@compiled()
def widen(keys: NDArray[Any], out: NDArray[np.float32], out_bits: NDArray[np.int32]) -> bool:
    """Convert keys (`bits`) of shape (n, D) to float32; return whether all are finite and below LARGEST.

    The result goes into the existing array `out`, because allocating one takes ten times as long. `out_bits` is a view
    of `out` as int32.
    """
    largest = np.int32(0)
    for row in range(keys.shape[0]):
        for i in range(keys.shape[1]):
            out[row, i] = widened(keys[row, i])
        for i in range(keys.shape[1]):
            largest = max(largest, out_bits[row, i] & np.int32(0x7FFFFFFF))
    return bool(largest < LARGEST_BITS)


@compiled()
def gather(keys: NDArray[Any], first: int, positions: NDArray[Any], out: NDArray[Any]) -> None:
    """Copy those keys of these positions that are in this part of the datastore, to the same rows of `out`.

    Half the time of NumPy's `take`, because keys are prefetched; see `sq_distances` for the arguments.
    """
    n, width = keys.shape
    for row in range(len(positions)):
        if row + _AHEAD < len(positions):
            soon = np.int64(positions[row + _AHEAD]) - first
            if 0 <= soon < n:
                _prefetch(keys, soon)
        here = np.int64(positions[row]) - first
        if 0 <= here < n:
            for i in range(width):
                out[row, i] = keys[here, i]


@compiled(fastmath=True)
def sq_distances(
    queries: NDArray[np.float32],
    keys: NDArray[Any],
    first: int,
    ids: NDArray[np.int64],
    sq_dist: NDArray[np.float32],
) -> None:
    """Fill in the squared distances to those candidates that are in this part of the datastore.

    Differences are squared and summed in a fixed order. So a distance depends on its two keys only, not on the batch,
    the shard or the index. Identical keys have distance 0, which the formula |q|^2 - 2qk + |k|^2 does not guarantee.

    Args:
        queries: Shape (B, D).
        keys: Positions `first .. first + len(keys) - 1`, shape (n, D); float32, float16 bits (uint16) or bfloat16
            bits (int16).
        first: Position of the first key.
        ids: Positions of the candidates, shape (B, K); candidates outside of this part are skipped.
        sq_dist: Output, shape (B, K).
    """
    n, width = keys.shape
    for row in range(ids.shape[0]):
        for column in range(ids.shape[1]):
            if column + _AHEAD < ids.shape[1]:
                soon = ids[row, column + _AHEAD] - first
                if 0 <= soon < n:
                    _prefetch(keys, soon)
            here = ids[row, column] - first
            if 0 <= here < n:
                total = np.float32(0)
                for i in range(width):
                    difference = queries[row, i] - widened(keys[here, i])
                    total += difference * difference
                sq_dist[row, column] = total


NOBODY = 2**32 - 1  # position of a missing neighbour in a sort key; a datastore must have fewer positions


@compiled()
def unpack_distinct(order: NDArray[np.uint64], sq_dist: NDArray[np.int32], ids: NDArray[np.int64]) -> None:
    """Unpack the first K distinct (distance bits, position) pairs of each sorted row, or fewer if NOBODY comes first.

    Args:
        order: Sorted rows, shape (B, C): the high 32 bits are the squared distance, the low 32 bits the position.
        sq_dist: Output, bits of float32, shape (B, K); places without a pair are not written.
        ids: Output, positions, shape (B, K); places without a pair are not written.
    """
    for row in range(order.shape[0]):
        filled, last = 0, np.uint64(NOBODY)
        for column in range(order.shape[1]):
            pair = order[row, column]
            position = pair & np.uint64(NOBODY)
            if filled == ids.shape[1] or position == np.uint64(NOBODY):
                break
            if pair != last:
                sq_dist[row, filled], ids[row, filled] = np.int32(pair >> np.uint64(32)), np.int64(position)
                filled, last = filled + 1, pair


@compiled()
def cut(near: Any, ids: Any, end: int, neighbours: int) -> tuple[int, Any]:
    """Keep the `neighbours` smallest of `near[:end]` in order, the earlier in a tie; return (count, largest).

    The value that divides them from the others is searched by halving: a dozen passes by vector instructions take a fifth of
    the time of a partition, which branches at every number. The partition is for ties at that value, and for numbers so
    far apart that halving does not get there.
    """
    if end <= neighbours:
        return end, near[:end].max() if end else np.inf
    low = high = near[0]
    for place in range(end):
        low, high = min(low, near[place]), max(high, near[place])
    for _ in range(_HALVINGS):
        limit = low + (high - low) / 2
        count = np.int32(0)
        for place in range(end):
            count = np.int32(count + (near[place] <= limit))
        if count == neighbours:
            kept, largest = _up_to(near, ids, end, limit)
            return kept, largest
        if limit in (low, high):
            break
        if count > neighbours:
            high = limit
        else:
            low = limit
    limit = np.partition(near[:end], neighbours - 1)[neighbours - 1]
    ties = neighbours - (near[:end] < limit).sum()
    kept = 0
    for place in range(end):
        distance = near[place]
        if distance < limit or (distance == limit and ties > 0):
            ties -= distance == limit
            near[kept], ids[kept] = distance, ids[place]
            kept += 1
    return kept, limit


@compiled()
def _up_to(near: Any, ids: Any, end: int, limit: Any) -> tuple[int, Any]:
    """Keep what is not above the limit, in order; return (count, largest)."""
    kept = 0
    for place in range(end):  # no branch: `kept` advances only past what stays
        distance = near[place]
        near[kept], ids[kept] = distance, ids[place]
        kept += distance <= limit
    largest = near[0]
    for place in range(1, kept):
        largest = max(largest, near[place])
    return kept, largest


@compiled()
def cut_all(near: Any, ids: Any, counts: Any, neighbours: int) -> None:
    """Apply `cut` to each row and fill the places after its neighbours with +inf and -1."""
    for row in range(len(counts)):
        counts[row], _ = cut(near[row], ids[row], counts[row], neighbours)
        near[row, counts[row] : neighbours] = np.inf
        ids[row, counts[row] : neighbours] = -1


def buffer_width(neighbours: int) -> int:
    """Width of the buffer of `keep_nearest`: the wider, the fewer cuts, and the later the limit falls."""
    return neighbours + neighbours // 2 + 8 * _STRIP


@compiled(fastmath={"nnan", "nsz", "reassoc"})
def keep_nearest(
    sq_dist: NDArray[np.floating],
    first: int,
    near: NDArray[np.floating],
    ids: NDArray[np.int64],
    counts: NDArray[np.int64],
    limits: NDArray[np.floating],
    neighbours: int,
) -> None:
    """Add a block of distances to the running nearest neighbours of each query.

    A row of `near` is a buffer of candidates below the row's limit. When it is full, the `neighbours` smallest stay and
    the largest of them becomes the limit. A strip of `_STRIP` distances is skipped as a whole if its minimum is not
    below the limit. Among equal distances the smaller position stays, provided that the blocks come in order.

    Args:
        sq_dist: Distances to positions first, first + 1, ..., shape (B, n).
        first: Position of the first column.
        near: Buffer, shape (B, room) with the room of `buffer_width`.
        ids: Positions of the buffer, same shape.
        counts: Number of candidates in each row of the buffer, shape (B,).
        limits: Distances at or above the limit are ignored, shape (B,); the limit begins as +inf.
        neighbours: Number of neighbours to keep.
    """
    room, width = near.shape[1], sq_dist.shape[1]
    for row in range(sq_dist.shape[0]):
        end, limit, near_row, ids_row = counts[row], limits[row], near[row], ids[row]
        for begin in range(0, width, _STRIP):
            stop = min(begin + _STRIP, width)
            if stop == begin + _STRIP:
                smallest = sq_dist[row, begin]
                for column in range(begin, begin + _STRIP):  # compiled to a few vector instructions
                    smallest = min(smallest, sq_dist[row, column])
                if smallest >= limit:
                    continue
            if end + _STRIP > room:
                end, limit = cut(near_row, ids_row, end, neighbours)
            for column in range(begin, stop):  # no branch: `end` advances only past a candidate
                near_row[end], ids_row[end] = sq_dist[row, column], first + column
                end += sq_dist[row, column] < limit
        counts[row], limits[row] = end, limit


@compiled("int64(float64[:, ::1], int64[:, ::1], float64[::1], int64[::1], int64[::1], float64[::1])")
def sum_equal(
    weights: NDArray[np.float64],
    values: NDArray[Any],
    mass: NDArray[np.float64],
    counts: NDArray[np.int64],
    tokens: NDArray[Any],
    probs: NDArray[np.float64],
) -> int:
    """Sum the weights of equal tokens and normalise each row; the tokens of a row keep their order of appearance.

    Args:
        weights: Shape (B, K), not negative; a zero weight makes no entry.
        values: Token of each weight, shape (B, K), below len(mass).
        mass: Scratch memory with one element per vocabulary token, all zero before and after the call.
        counts: Output, entries per row, shape (B,); 0 where all weights are zero.
        tokens: Output, at least B * K + 1 long, because the loop may write one unused element after the last entry.
        probs: Output, of the same length.

    Returns:
        Number of entries.
    """
    end = 0
    for row in range(weights.shape[0]):
        begin, total = end, 0.0
        for column in range(weights.shape[1]):
            weight, token = weights[row, column], values[row, column]
            before = mass[token]
            tokens[end] = token  # no branch: `end` advances only if this is the token's first weight
            end += (before == 0.0) & (weight > 0.0)
            mass[token] = before + weight
            total += weight
        for entry in range(begin, end):
            probs[entry] = mass[tokens[entry]] / total
            mass[tokens[entry]] = 0.0
        counts[row] = end - begin
    return end


@compiled()
def keep_best(
    counts: NDArray[np.int64], tokens: NDArray[Any], probs: NDArray[np.float64], top: int, threshold: float
) -> int:
    """Keep the `top` most probable tokens of each row whose probability is above `threshold`, in place.

    The most probable token always stays. Among equally probable tokens the smaller token id stays. The rows are
    renormalised. Returns the number of entries left.
    """
    begin = end = 0
    for row in range(len(counts)):
        stop = begin + counts[row]
        p, t = probs[begin:stop], tokens[begin:stop]
        limit, ties = threshold, len(p)
        best = p.max()
        if top < len(p):
            limit = max(threshold, np.partition(p, len(p) - top)[len(p) - top])
            if limit > threshold:
                ties = top - (p > limit).sum()
        if best <= threshold:  # no token is above the threshold: keep the most probable one
            limit, ties = best, 1
        # Of the tokens exactly at the limit, keep the `ties` smallest ids.
        largest = np.int64(-1)
        if limit > threshold or best <= threshold:
            largest = np.sort(t[p == limit])[ties - 1]
        total, kept = 0.0, end
        for entry in range(len(p)):
            if p[entry] > limit or (p[entry] == limit and t[entry] <= largest):
                probs[end], tokens[end] = p[entry], t[entry]
                total += probs[end]
                end += 1
        for entry in range(kept, end):
            probs[entry] /= total
        counts[row] = end - kept
        begin = stop
    return end


def in_threads(work: Callable[[int, int], Any], n: int, block: int) -> list[Any]:
    """Call `work(begin, end)` for all blocks of [0, n) on torch's number of threads; return the results in order."""
    threads = torch.get_num_threads()
    spans = [(begin, min(begin + block, n)) for begin in range(0, n, block)]
    if threads < 2 or len(spans) < 2:
        return [work(*span) for span in spans]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda span: work(*span), spans))
