"""Compiled inner loops of the kNN stage on CPU (numba): summing equal tokens, and exact distances to candidates.

Plain loops that NumPy would turn into large temporaries. Each call works on one block of rows with its own scratch and
releases the GIL, so that threads can share the work. `memdec.maths.knn` is the door; CUDA has its own path there.
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
_LARGEST_BITS = int(np.float32(LARGEST).view(np.int32))
_STRIP = 32  # distances whose smallest is looked at first
_AHEAD = 6  # candidates between asking for a key and using it


@intrinsic  # type: ignore[untyped-decorator]
def _widen(_typing: Any, value: Any) -> Any:
    """float32 of a key element: uint16 holds float16 bits, int16 holds bfloat16 bits, float32 is itself.

    numba has no float16 on CPU; this is one `vcvtph2ps` where the processor has it.
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
    """Ask for a row of a C-contiguous array before it is needed: rows of candidates lie anywhere in memory."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        stride = builder.extract_value(array.strides, 0)
        byte, word = ir.IntType(8), ir.IntType(32)
        begin = builder.gep(builder.bitcast(array.data, byte.as_pointer()), [builder.mul(args[1], stride)])
        prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch", [byte.as_pointer()], ir.FunctionType(ir.VoidType(), [byte.as_pointer(), word, word, word])
        )
        with cgutils.for_range_slice(builder, stride.type(0), stride, stride.type(64), stride.type) as (offset, _):
            # To read, into the second level: a fifth faster than into the first.
            builder.call(prefetch, [builder.gep(begin, [offset]), word(0), word(2), word(1)])
        return context.get_dummy_value()

    return types.none(keys, row), codegen


def bits(keys: NDArray[Any]) -> NDArray[Any]:
    """Keys as the loops below take them: float16 as uint16."""
    plain = np.asarray(keys)
    return plain.view(np.uint16) if plain.dtype == np.float16 else plain


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def widen(keys: NDArray[Any], out: NDArray[np.float32], out_bits: NDArray[np.int32]) -> bool:
    """Keys (`bits`) to float32, shape (n, D); whether all are finite and below LARGEST.

    Writes into memory that is there, as fresh memory takes ten times as long. `out_bits` is `out` as int32.
    """
    largest = np.int32(0)
    for row in range(keys.shape[0]):
        for i in range(keys.shape[1]):
            out[row, i] = _widen(keys[row, i])
        for i in range(keys.shape[1]):
            largest = max(largest, out_bits[row, i] & np.int32(0x7FFFFFFF))
    return bool(largest < _LARGEST_BITS)


@njit(nogil=True, fastmath=True, cache=True)  # type: ignore[untyped-decorator]
def sq_distances(
    queries: NDArray[np.float32],
    keys: NDArray[Any],
    first: int,
    ids: NDArray[np.int64],
    sq_dist: NDArray[np.float32],
) -> None:
    """Fill in the squared distances to the candidates that lie in this part of the datastore.

    Differences are squared and summed in one order, so that a distance depends on its two keys alone: not on the
    batch, the shard or the index, and identical keys have distance 0 (|q|^2 - 2qk + |k|^2 has not).

    Args:
        queries: Shape (B, D).
        keys: Positions `first .. first + len(keys) - 1`, shape (n, D); float32, float16 bits (uint16) or bfloat16
            bits (int16).
        first: Position of the first key.
        ids: Candidates, shape (B, K); those outside of this part are left alone.
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
                    difference = queries[row, i] - _widen(keys[here, i])
                    total += difference * difference
                sq_dist[row, column] = total


NOBODY = 2**32 - 1  # position that stands for a missing neighbour in a sort key; a datastore must be smaller


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def unpack_distinct(order: NDArray[np.uint64], sq_dist: NDArray[np.int32], ids: NDArray[np.int64]) -> None:
    """Take the first distinct (distance bits, position) pairs of each sorted row apart, until NOBODY or the row is full.

    Args:
        order: Sorted rows, shape (B, C): the bits of the squared distance above those of the position.
        sq_dist: Output, bits of float32, shape (B, K); left alone where there are fewer.
        ids: Output, likewise.
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


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def cut(near: Any, ids: Any, end: int, neighbours: int) -> tuple[int, Any]:
    """Keep the `neighbours` smallest of `near[:end]` in their order, the earlier one in a tie: (how many, largest)."""
    if end <= neighbours:
        return end, near[:end].max() if end else np.inf
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


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def cut_all(near: Any, ids: Any, counts: Any, neighbours: int) -> None:
    """`cut` for each row; the places after its neighbours become +inf and -1."""
    for row in range(len(counts)):
        counts[row], _ = cut(near[row], ids[row], counts[row], neighbours)
        near[row, counts[row] : neighbours] = np.inf
        ids[row, counts[row] : neighbours] = -1


@njit(nogil=True, fastmath={"nnan", "nsz", "reassoc"}, cache=True)  # type: ignore[untyped-decorator]
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

    A row of `near` is a buffer of candidates below `limits`; when it is full, the `neighbours` smallest stay and the
    largest of them becomes the limit. Strips of distances without one below the limit are passed over at once. Among equal distances the smaller position stays, provided the blocks come in order.

    Args:
        sq_dist: Distances to positions first, first + 1, ..., shape (B, n).
        first: Position of the first column.
        near: Buffer, shape (B, room) with room > neighbours.
        ids: Positions of the buffer, same shape.
        counts: Filled places, shape (B,).
        limits: Distances at or above it are of no interest, shape (B,); begins as +inf.
        neighbours: How many to keep.
    """
    room, width = near.shape[1], sq_dist.shape[1]
    for row in range(sq_dist.shape[0]):
        end, limit = counts[row], limits[row]
        for begin in range(0, width, _STRIP):
            stop = min(begin + _STRIP, width)
            if stop == begin + _STRIP:
                smallest = sq_dist[row, begin]
                for column in range(begin, begin + _STRIP):  # becomes a few vector instructions
                    if sq_dist[row, column] < smallest:
                        smallest = sq_dist[row, column]
                if smallest >= limit:
                    continue
            for column in range(begin, stop):
                distance = sq_dist[row, column]
                if distance < limit:
                    near[row, end], ids[row, end] = distance, first + column
                    end += 1
                    if end == room:
                        end, limit = cut(near[row], ids[row], end, neighbours)
        counts[row], limits[row] = end, limit


@njit(  # type: ignore[untyped-decorator]
    "int64(float64[:, ::1], int64[:, ::1], float64[::1], int64[::1], int64[::1], float64[::1])", nogil=True, cache=True
)
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
        weights: Shape (B, K), not negative; zero weights leave no entry.
        values: Token of each weight, shape (B, K), below len(mass).
        mass: Scratch of the size of the vocabulary, all zero before and after.
        counts: Output, entries per row, shape (B,); 0 where all weights are zero.
        tokens: Output, at least B * K + 1 long (one place is written in vain at the end).
        probs: Output, likewise.

    Returns:
        Number of entries.
    """
    end = 0
    for row in range(weights.shape[0]):
        begin, total = end, 0.0
        for column in range(weights.shape[1]):
            weight, token = weights[row, column], values[row, column]
            before = mass[token]
            tokens[end] = token  # without a branch: kept only if this is the token's first weight
            end += (before == 0.0) & (weight > 0.0)
            mass[token] = before + weight
            total += weight
        for entry in range(begin, end):
            probs[entry] = mass[tokens[entry]] / total
            mass[tokens[entry]] = 0.0
        counts[row] = end - begin
    return end


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def keep_best(
    counts: NDArray[np.int64], tokens: NDArray[Any], probs: NDArray[np.float64], top: int, threshold: float
) -> int:
    """Drop all but the `top` most probable tokens of each row and those at or below `threshold`, in place.

    The most probable token always stays; among equally probable ones the smaller token stays. Rows are normalised
    again. Returns the number of entries left.
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
        if best <= threshold:  # nothing would stay
            limit, ties = best, 1
        # Tokens exactly at the limit: the smallest `ties` of them.
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
    """Results of `work(begin, end)` for all blocks of [0, n), in order, on as many threads as the process may use."""
    threads = torch.get_num_threads()
    spans = [(begin, min(begin + block, n)) for begin in range(0, n, block)]
    if threads < 2 or len(spans) < 2:
        return [work(*span) for span in spans]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda span: work(*span), spans))
