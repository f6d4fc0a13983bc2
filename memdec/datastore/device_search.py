"""Exact nearest-neighbour search in a stored datastore on a GPU (or any other torch device).

If the keys fit, they are copied to the device once, in their format on disk. Otherwise every search streams them
through pinned memory in blocks. A search has three steps:

1. Candidates: the matrix product of a block of queries with each block of keys gives a lower bound of every squared
   distance (`exact_search.lower_bounds`). The k + 1 + `_MORE` keys with the smallest bounds are the query's candidates.
2. Exact distances are computed from the keys of the candidates. The query's own position is removed by its number.
3. Proof: if the k-th exact distance is below the largest bound among the candidates, no other key can be nearer. The
   few queries without this proof (ties at rank k, keys far from the centre) need a full search ("settling"). It
   computes the exact distance to every key whose bound does not exceed the k-th distance.

So the result is always that of exact distances, with ties broken by position. It does not depend on the block size,
the memory of the device or the rounding of the product. TF32 only means that more queries may need the full search.

Cost of a query for N keys of width D: 2 N D operations, about 13 N bytes of traffic for the bounds and, on CUDA, 2 k D bytes
for the exact distances (N = 1 M, D = 768, k = 1024: 1.5 GFLOP, 13 MB and 1.6 MB).
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from memdec.artefacts.devices import free_memory
from memdec.datastore.keys import DISK, Datastore
from memdec.maths import exact_search, kernels

QUERIES = 8192  # queries per pass over all keys; they share the cost of streaming the keys
_KEYS = 1 << 17  # keys per block: with 8,192 queries the bounds take 4.3 GB
_MORE = 16  # candidates beyond k and the query itself, for the proof
# TF32 makes the error of the bounds 25 times as large. A test had 768 queries, k = 1024, and 77,000 keys of three key
# points of trained models. With 64 more candidates no query needed the full search, with 32 more 6, with 16 more 292.
_MORE_TF32 = 128
_GIVE_UP = 0.25  # if this fraction of a block's queries needs the full search, TF32 costs more than it saves
_SAMPLE = 4096  # number of keys whose median is the centre
_HELD = 0.6  # fraction of the device's free memory that the keys may take
_WORK = 0.5  # fraction of the remaining memory for one block; the model needs memory on the same device
_BYTES = 8  # bytes per bound of a block: the bound, and the copies that the selection makes of some bounds
_BYTES_SETTLED = 64  # bytes per bound in the full search, where every bound may become a (query, key) pair


class DeviceSearch:
    """Search for the nearest keys of a stored datastore on one device.

    Args:
        store: The datastore; its keys must be stored.
        device: Device of the search. The CPU runs the same operations.
        tf32: Compute the products in TF32 on tensor cores. Neighbours and distances are the same. If too many queries
            need the full search, which makes TF32 slow, the search continues in float32.
        room: Bytes of device memory to plan with; None: the free memory.

    Attributes:
        resident: Whether all keys are on the device.
        n_searched: Number of queries so far.
        n_settled: Number of queries that needed the full search of step 3.

    Raises:
        NumericsError: A key is NaN, infinite, or so large that squared distances overflow; the message names it. If the
            keys do not fit on the device, each search reads and checks them.
    """

    def __init__(self, store: Datastore, device: torch.device, *, tf32: bool = False, room: int | None = None) -> None:
        self.store, self.device, self.tf32 = store, device, tf32
        self.n_searched = self.n_settled = 0
        room = free_memory(device) if room is None else room
        n_bytes = store.n * store.width * DISK[store.settings.dtype].itemsize
        self.resident = n_bytes <= _HELD * room
        self._room = int(_WORK * (room - n_bytes * self.resident))
        # A centred key takes 16 bytes per element, with its copies in TF32 and float64. A quarter of the room is for
        # keys.
        self._n_keys = max(1, min(store.n, _KEYS, self._room // (4 * 16 * store.width)))
        _, sample = next(store.blocks(0, min(store.n, _SAMPLE), _SAMPLE))
        # |k|^2 - 2 q k loses the fewest digits near the origin. The centre is a median because single keys may be far
        # away.
        self._centre = torch.from_numpy(sample).median(0).values.to(device)
        self._all: Tensor | None = None
        if self.resident:
            dtype = getattr(torch, store.settings.dtype)
            held = torch.empty(store.n, store.width, dtype=dtype, device=device)
            for first, keys in self._stream():
                held[first : first + len(keys)] = keys
            self._all = held

    @torch.no_grad()
    def search(
        self, queries: Float[Tensor, "B D"], neighbours: int, own: Int[Tensor, " B"] | None = None
    ) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"]]:
        """Find the nearest neighbours of each query, without the query's own position.

        Args:
            queries: float32, on any device.
            neighbours: K.
            own: Position of each query in the datastore, -1 for a query from outside; None if all are from outside.

        Returns:
            Squared distances (float32) and positions, on the device of the search, nearest first, ties by position,
            padded with +inf and -1 if there are too few keys.
        """
        queries = queries.to(self.device)
        own = torch.full((len(queries),), -1) if own is None else own
        own = own.to(self.device)
        size = max(1, min(QUERIES, self._room // (_BYTES * self._n_keys)))
        with torch.autocast(self.device.type, enabled=False):  # bfloat16 products would break the bounds
            codes = [
                self._nearest(queries[low : low + size], neighbours, own[low : low + size])
                for low in range(0, len(queries), size)
            ]
        return exact_search.decode(torch.cat(codes) if codes else own.new_empty(0, neighbours))

    # --- the three steps ------------------------------------------------------------------------------------------

    def _nearest(self, queries: Tensor, neighbours: int, own: Tensor) -> Int[Tensor, "B K"]:
        """Codes (`exact_search.encode`) of the nearest neighbours of one block of queries, nearest first."""
        fetch = min(neighbours + 1 + (_MORE_TF32 if self.tf32 else _MORE), self.store.n)
        ids, edge = self._candidates(queries, fetch)
        codes = self._exact(queries, ids)
        codes = codes.masked_fill_(ids == own[:, None], exact_search.NONE).sort(1).values[:, :neighbours]
        self.n_searched += len(queries)
        if fetch < self.store.n:
            last, _ = exact_search.decode(codes[:, -1])
            unsure = (~(last < edge)).nonzero()[:, 0]
            self.n_settled += len(unsure)
            self.tf32 &= len(unsure) < _GIVE_UP * len(queries)
            size = max(1, self._room // (_BYTES_SETTLED * self._n_keys))
            for low in range(0, len(unsure), size):
                rows = unsure[low : low + size]
                codes[rows] = self._settled(queries[rows], neighbours, own[rows], last[rows])
        missing = codes.new_full((len(codes), neighbours - codes.shape[1]), exact_search.NONE)
        return torch.cat([codes, missing], 1)

    def _candidates(self, queries: Tensor, fetch: int) -> tuple[Int[Tensor, "B C"], Float[Tensor, " B"]]:
        """Positions of the keys with the smallest lower bounds, and a lower bound for all other keys."""
        moved = queries - self._centre
        rest = exact_search.own_part(moved, tf32=self.tf32)
        moved = exact_search.to_tf32(moved) if self.tf32 else moved
        near, ids = moved.new_empty(len(moved), 0), torch.empty(len(moved), 0, dtype=torch.long, device=self.device)
        for first, keys in self._blocks():
            bounds = self._bounds(moved, keys, self.tf32)
            fresh, column = exact_search.smallest(bounds, fetch)
            near, ids = torch.cat([near, fresh], 1), torch.cat([ids, column + first], 1)
            if near.shape[1] > fetch:
                near, order = near.topk(fetch, largest=False, sorted=False)
                ids = ids.gather(1, order)
        return ids, near.amax(1) + rest[:, 0]

    def _bounds(self, moved: Tensor, keys: Tensor, tf32: bool) -> Float[Tensor, "B n"]:
        with exact_search.product_of(tf32=tf32):
            return exact_search.lower_bounds(moved, keys.float() - self._centre, tf32=tf32)

    def _exact(self, queries: Tensor, ids: Tensor) -> Int[Tensor, "B C"]:
        """Codes of the candidates with exact distances; streamed keys are handled block by block."""
        if self._all is not None:
            return exact_search.encode(exact_search.row_distances(queries, self._all, ids), ids)
        codes = torch.full_like(ids, exact_search.NONE)
        for first, keys in self._blocks():
            here = (ids >= first) & (ids < first + len(keys))
            row, at = here.nonzero(as_tuple=True)[0], ids[here]
            codes[here] = exact_search.encode(exact_search.pair_distances(queries, keys, row, at - first), at)
        return codes

    def _settled(self, queries: Tensor, neighbours: int, own: Tensor, last: Tensor) -> Int[Tensor, "B K"]:
        """Codes of the nearest among all keys whose bound is not above `last`, the distance of the k-th candidate."""
        moved = queries - self._centre
        limit = last[:, None] - exact_search.own_part(moved)
        # Allow for the rounding of this subtraction.
        limit += limit.abs() * 2.0**-23
        kept = own.new_full((len(queries), neighbours), exact_search.NONE)
        for first, keys in self._blocks():
            row, at = (self._bounds(moved, keys, False) <= limit).nonzero(as_tuple=True)
            codes = exact_search.encode(exact_search.pair_distances(queries, keys, row, at), at + first)
            codes.masked_fill_(at + first == own[row], exact_search.NONE)
            counts = torch.bincount(row, minlength=len(queries))
            begin = counts.cumsum(0) - counts
            fresh = own.new_full((len(queries), int(counts.max())), exact_search.NONE)
            fresh[row, torch.arange(len(row), device=row.device) - begin[row]] = codes
            kept = torch.cat([kept, fresh], 1).sort(1).values[:, :neighbours]
        return kept

    # --- the keys -------------------------------------------------------------------------------------------------

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Iterate over all keys on the device in blocks of `_n_keys`: (first position, keys in their type on disk)."""
        if self._all is None:
            return self._stream()
        return ((first, self._all[first : first + self._n_keys]) for first in range(0, self.store.n, self._n_keys))

    def _stream(self) -> Iterator[tuple[int, Tensor]]:
        """Iterate over all keys as `_blocks` does, from disk. One buffer is filled while the device uses the other.

        Copies and computation share one CUDA stream, so the device waits for a copy. A copy of 200 MB of float16 keys
        takes 4 to 8 ms on PCIe 5; the product with 8,192 queries takes 15 (TF32) to 40 ms.
        """
        cuda, shape = self.device.type == "cuda", (self._n_keys, self.store.width)
        dtype = torch.from_numpy(np.empty(0, DISK[self.store.settings.dtype])).dtype
        buffers = [torch.empty(shape, dtype=dtype, pin_memory=cuda) for _ in range(2)]
        copied = [torch.cuda.Event() if cuda else None for _ in range(2)]  # type: ignore[no-untyped-call]
        for number, first in enumerate(range(0, self.store.n, self._n_keys)):
            buffer, over, end = buffers[number % 2], copied[number % 2], min(first + self._n_keys, self.store.n)
            if over is not None:
                over.synchronize()  # wait for the last copy from this buffer before overwriting it
            filled = 0
            for piece in self.store.pieces(first, end):
                buffer.numpy()[filled : filled + len(piece)] = piece
                filled += len(piece)
            keys = buffer[:filled].to(self.device, non_blocking=cuda)
            if over is not None:
                over.record(torch.cuda.current_stream(self.device))
            keys = keys.view(getattr(torch, self.store.settings.dtype))
            self._check(first, keys)
            yield first, keys

    def _check(self, first: int, keys: Tensor) -> None:
        if not float(keys.abs().amax()) < kernels.LARGEST:  # `not <` is also true for NaN
            bad = ~(keys.float().abs() < kernels.LARGEST)
            raise self.store.not_finite(first + int(bad.any(1).nonzero()[0, 0]))
