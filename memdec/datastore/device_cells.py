"""Search in the nearest cells on a GPU (or any other torch device), for an index of kind `cells`.

All queries of a call that search a cell are compared with it in one matrix product. The steps are those of
`device_search`, among the keys of a query's cells only:

1. Candidates: the products give a lower bound of every squared distance, and the smallest bounds are chosen.
2. Exact distances are computed from the keys of the candidates. The query's own position is removed by its number.
3. Proof: if the k-th exact distance is below the largest bound of the candidates, no other key of these cells can be
   nearer. For the few queries without this proof, exact distances to all keys of their cells are computed.

Then positions that are candidates beside the cells (`candidates`) are added, by their exact distances.

So the result is that of exact distances, with ties broken by position. It does not depend on the other queries of a call,
the memory of the device or the rounding of the products. `cells.CellSearch` on the CPU gives the same neighbours, but
for ties up to rounding.

The device holds cells one after the other, each filled up to a multiple of `_STEP` keys. If not all cells fit, those that
a call needs are copied when they are missing. If not even those fit, they are searched in several turns.

Cost of a query that meets M keys of width D: 2 M D operations, about 16 M bytes of traffic for the bounds, and 2 k D bytes
for the exact distances.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from memdec.artefacts.devices import free_memory
from memdec.datastore.cells import CellSearch
from memdec.datastore.keys import DISK
from memdec.maths import exact_search, kernels

QUERIES = 32_768  # queries per call: many share a cell, and the results take 0.5 GB with k = 1024
_STEP = 64  # keys; a cell takes whole steps, so that the bounds of a cell are copied by rows of 256 bytes
_LARGEST = 1 << 15  # keys; a larger cell is cut into parts of this size at most
_MORE = 128  # candidates beyond k and the query itself, for the proof (as `device_search._MORE_TF32`)
_SAMPLE = 4096  # number of keys whose median is the centre
_BLOCK = 1 << 16  # keys that are copied to the device at once
_HELD = 0.5  # fraction of the device's free memory that the cells may take
_WORK = 0.6  # fraction of the remaining memory for one pass; the model needs memory on the same device
_BYTES = 12  # bytes per bound of a pass: the bound, and the copies that the selection makes of some bounds
_BYTES_CHOSEN = 128  # bytes per candidate: its place, its distance, its code, and what their sort needs
_BYTES_SETTLED = 64  # the same for each key of a query that needs step 3
_BYTES_BESIDE = 64  # the same for each position beside the cells, without its query and its key


@dataclass(frozen=True)
class _Pairs:
    """Which queries search which parts of cells: pair i is query `row[i]` and part `part[i]`, in the order of rows.

    The bounds of a row of a pass stand one after the other; those of pair i begin at step `begin[i]` of its row, and at
    step `row[i] * steps + begin[i]` of all.

    Attributes:
        row: Number of the query in the pass.
        part: Number of the part.
        begin: First step of the pair in its row.
        steps: Steps of every row.
    """

    row: Int[Tensor, " pairs"]
    part: Int[Tensor, " pairs"]
    begin: Int[Tensor, " pairs"]
    steps: int


class DeviceCells:
    """The cells of an index on one device.

    Args:
        index: The cells.
        device: Device of the search. The CPU runs the same operations.
        room: Bytes of device memory to plan with; None: the free memory.

    Attributes:
        resident: Whether all keys are on the device.
        n_searched: Number of queries so far.
        n_settled: Number of queries that needed the full search of step 3.

    Raises:
        NumericsError: A key is NaN, infinite, or so large that squared distances overflow; the message names it. If the
            keys do not fit on the device, each search reads and checks those that it needs.
    """

    def __init__(self, index: CellSearch, device: torch.device, *, room: int | None = None) -> None:
        store = index.store
        self.device, self._index = device, index
        self.n_searched = self.n_settled = 0
        self._centroids = torch.from_numpy(index.centroids).to(device)
        self._dtype = getattr(torch, store.settings.dtype)

        sizes = np.diff(index.starts)
        n_parts = -(-sizes // _LARGEST)
        cell = np.repeat(np.arange(len(sizes)), n_parts)
        number = np.arange(len(cell)) - np.repeat(np.cumsum(n_parts) - n_parts, n_parts)
        self._first = index.starts[cell] + number * _LARGEST  # of each part, in `positions`
        self._sizes = np.minimum(sizes[cell] - number * _LARGEST, _LARGEST)
        self._n_steps = -(-self._sizes // _STEP)
        self._n_parts = torch.from_numpy(n_parts).to(device)
        self._part_of_cell = torch.from_numpy(np.cumsum(n_parts) - n_parts).to(device)
        self._steps = torch.from_numpy(self._n_steps).to(device)
        self._beside = [
            tuple(torch.from_numpy(each.astype(np.int64)).to(device) for each in (beside.positions, cells))
            for beside, cells in index.beside
        ]

        room = free_memory(device) if room is None else room
        # A held key is there as stored, in float32 with the centre subtracted, with its norm and its position.
        per_step = _STEP * (store.width * (DISK[store.settings.dtype].itemsize + 4) + 12)
        wanted, fits = int(self._n_steps.sum()), int(_HELD * room) // per_step
        self.resident = wanted <= fits
        self._capacity = wanted if self.resident else max(fits, int(self._n_steps.max()))
        self._room = int(_WORK * max(0, room - per_step * self._capacity))
        _, sample = next(store.blocks(0, min(store.n, _SAMPLE), _SAMPLE))
        self._centre = torch.from_numpy(sample).median(0).values.to(device)

        n_held = self._capacity * _STEP
        self._keys = torch.zeros(n_held, store.width, dtype=self._dtype, device=device)
        self._moved = torch.zeros(n_held, store.width, device=device)
        self._norms = torch.full((n_held,), torch.inf, device=device)
        self._ids = torch.full((n_held,), kernels.NOBODY, dtype=torch.long, device=device)
        self._at = np.full(len(self._sizes), -1)  # first held step of each part, -1 if it is not held
        self._place = torch.from_numpy(self._at).to(device, copy=True)
        self._used = 0  # steps
        self._place_of: Tensor | None = None  # held place of every position, if all are there
        if self.resident:
            self._hold(np.arange(len(self._sizes)))
            there = (self._ids != kernels.NOBODY).nonzero()[:, 0]
            self._place_of = torch.empty(store.n, dtype=torch.long, device=device)
            self._place_of[self._ids[there]] = there

    def keys(self, positions: Int[np.ndarray, " n"]) -> Float[Tensor, "n D"]:
        """The keys of these positions as queries, on the device.

        Raises:
            NumericsError: One is NaN, infinite or too large.
        """
        keys, place = self._found(torch.from_numpy(positions).to(self.device))
        return keys[place].float()

    def _found(self, positions: Int[Tensor, " n"]) -> tuple[Tensor, Int[Tensor, " n"]]:
        """Keys as on disk, and which of them belong to these positions; copied to the device if not all are there."""
        if self._place_of is not None:
            return self._keys, self._place_of[positions]
        there = positions.cpu().numpy()
        keys = self._copied(self._index.raw(there))
        self._check(there, keys)
        return keys, torch.arange(len(keys), device=self.device)

    @torch.no_grad()
    def search(
        self,
        queries: Float[Tensor, "B D"],
        neighbours: int,
        own: Int[Tensor, " B"] | None = None,
        inputs: Int[np.ndarray, " B"] | None = None,
    ) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"]]:
        """Find the nearest keys of each query in its nearest cells, without the query's own position.

        Args:
            queries: float32, on any device.
            neighbours: K.
            own: Position of each query in the datastore, -1 for a query from outside; None if all are from outside.
            inputs: Last input token of each query, -1 if it has none; None: search in cells only.

        Returns:
            Squared distances (float32) and positions, on the device of the search, nearest first, ties by position.
            Where the cells have fewer keys, the rest is +inf and -1.
        """
        queries = queries.to(self.device)
        own = torch.full((len(queries),), -1) if own is None else own
        own = own.to(self.device)
        codes = own.new_full((len(queries), neighbours), exact_search.NONE)
        with torch.autocast(self.device.type, enabled=False):  # bfloat16 products would break the bounds
            for low in range(0, len(queries), QUERIES):
                some = slice(low, low + QUERIES)
                self._search(queries[some], own[some], None if inputs is None else inputs[some], codes[some])
        self.n_searched += len(queries)
        return exact_search.decode(codes)

    def _search(
        self, queries: Tensor, own: Tensor, inputs: Int[np.ndarray, " B"] | None, codes: Int[Tensor, "B K"]
    ) -> None:
        """Write the codes (`exact_search.encode`) of the nearest keys, nearest first."""
        probes = exact_search.nearest_cells(queries, self._centroids, self._index.nprobe, room=self._room)
        row, part = self._pairs(probes)
        turns = self._turns(part)
        for parts in turns:
            self._hold(parts)
            here = slice(None) if len(turns) == 1 else torch.isin(part, torch.from_numpy(parts).to(self.device))
            for some, pairs in self._passes(row[here], part[here], len(queries), codes.shape[1]):
                found = self._nearest(queries[some], own[some], pairs, codes.shape[1])
                if len(turns) > 1:
                    found = torch.cat([codes[some], found], 1).sort(1).values[:, : codes.shape[1]]
                codes[some] = found
        if inputs is not None:
            numbers = self._index.numbers(own.cpu().numpy(), inputs)
            for (beside, _), there, number in zip(self._index.beside, self._beside, numbers, strict=True):
                spans = (torch.from_numpy(edge).to(self.device) for edge in beside.spans(number))
                self._add(queries, own, (*there, *spans), probes, codes)

    def _add(
        self, queries: Tensor, own: Tensor, beside: tuple[Tensor, ...], probes: Tensor, codes: Int[Tensor, "B K"]
    ) -> None:
        """Keep those positions of each query's set that are nearer, in place of the last ones.

        `beside` is the positions of all sets, their cells, and where the set of each query begins and ends.
        """
        positions, cells, begin, end = beside
        widest = int((end - begin).max()) if len(begin) else 0
        if not widest:
            return
        width, n_cells = queries.shape[1], len(self._centroids)
        per_query = n_cells + widest * (_BYTES_BESIDE + width * (4 + self._keys.element_size()))
        size = max(1, self._room // per_query)
        for low in range(0, len(queries), size):
            some = slice(low, low + size)
            entry = begin[some, None] + torch.arange(widest, device=self.device)
            there = entry < end[some, None]
            entry.masked_fill_(~there, 0)
            searched = torch.zeros(len(entry), n_cells, dtype=torch.bool, device=self.device)
            searched.scatter_(1, probes[some], True)
            there &= ~searched.gather(1, cells[entry]) & (positions[entry] != own[some, None])
            row, column = there.nonzero(as_tuple=True)
            if not len(row):
                continue
            ids = positions[entry[row, column]]
            keys, place = self._found(ids)
            sq_dist = exact_search.row_distances(queries[some][row], keys, place[:, None])[:, 0]
            found = exact_search.encode(sq_dist, ids)
            nearer = found < codes[some][row, -1]
            row, found = row[nearer], found[nearer]
            count = torch.bincount(row, minlength=len(entry))
            more = codes.new_full((len(entry), int(count.max())), exact_search.NONE)
            more[row, torch.arange(len(row), device=self.device) - (count.cumsum(0) - count)[row]] = found
            rows = count.nonzero()[:, 0]
            both = torch.cat([codes[low + rows], more[rows]], 1).sort(1).values
            # What another set gave, too, has the same code.
            twice = torch.nn.functional.pad(both[:, 1:] == both[:, :-1], (1, 0))
            codes[low + rows] = both.masked_fill_(twice, exact_search.NONE).sort(1).values[:, : codes.shape[1]]

    def _pairs(self, probes: Int[Tensor, "B P"]) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
        """Query and part of every pair, in the order of queries."""
        cell = probes.flatten()
        count = self._n_parts[cell]
        pair = torch.arange(len(cell), device=self.device).repeat_interleave(count)
        number = torch.arange(len(pair), device=self.device) - (count.cumsum(0) - count)[pair]
        return pair // probes.shape[1], self._part_of_cell[cell[pair]] + number

    def _turns(self, part: Int[Tensor, " pairs"]) -> list[NDArray[np.int64]]:
        """The parts that are searched, as many at a time as the device can hold."""
        parts = np.flatnonzero(torch.bincount(part).cpu().numpy())
        total = np.cumsum(self._n_steps[parts])
        turns, low = [], 0
        while low < len(parts):
            before = total[low - 1] if low else 0
            high = int(np.searchsorted(total, before + self._capacity, side="right"))
            turns.append(parts[low:high])
            low = high
        return turns

    def _passes(
        self, row: Int[Tensor, " pairs"], part: Int[Tensor, " pairs"], n: int, neighbours: int
    ) -> Iterator[tuple[slice, _Pairs]]:
        """Cut the n queries so that the bounds of a pass fit into the memory: (queries of the pass, their pairs)."""
        steps = self._steps[part]
        total = steps.cumsum(0) - steps
        count = torch.bincount(row, minlength=n)
        edges = torch.cat([count.new_zeros(1), count.cumsum(0)])
        begin = total - torch.cat([total, total.new_zeros(1)])[edges[:-1]][row]
        widest = int((begin + steps).max()) if len(row) else 0
        size = max(1, self._room // max(1, _BYTES * _STEP * widest + _BYTES_CHOSEN * (neighbours + _MORE)))
        bounds = edges[[*range(0, n, size), n]].tolist()
        for number, low in enumerate(range(0, n, size)):
            some = slice(bounds[number], bounds[number + 1])
            if some.start < some.stop:
                yield slice(low, low + size), _Pairs(row[some] - low, part[some], begin[some], widest)

    # --- the three steps ------------------------------------------------------------------------------------------

    def _nearest(self, queries: Tensor, own: Tensor, pairs: _Pairs, neighbours: int) -> Int[Tensor, "B K"]:
        """Codes of the nearest of the keys in these pairs, nearest first."""
        fetch = min(neighbours + 1 + _MORE, pairs.steps * _STEP)
        bounds, rest = self._bounds(queries, pairs)
        near, column = exact_search.smallest(bounds, fetch)
        del bounds
        rows = torch.arange(len(queries), device=self.device)
        place = self._places(pairs, rows, column)
        codes = self._exact(queries, own, place.masked_fill_(near == torch.inf, -1))[:, :neighbours]
        codes = torch.cat([codes, codes.new_full((len(codes), neighbours - codes.shape[1]), exact_search.NONE)], 1)
        if fetch < pairs.steps * _STEP:
            last, _ = exact_search.decode(codes[:, -1])
            edge = near.amax(1) + rest[:, 0]
            # Where a bound is missing, all keys are candidates.
            unsure = (~((last < edge) | (edge == torch.inf))).nonzero()[:, 0]
            self.n_settled += len(unsure)
            everything = torch.arange(pairs.steps * _STEP, device=self.device)
            size = max(1, self._room // (_BYTES_SETTLED * len(everything)))
            for low in range(0, len(unsure), size):
                some = unsure[low : low + size]
                place = self._places(pairs, some, everything.expand(len(some), -1))
                codes[some] = self._exact(queries[some], own[some], place)[:, :neighbours]
        return codes

    def _bounds(self, queries: Tensor, pairs: _Pairs) -> tuple[Float[Tensor, "B M"], Float[Tensor, "B 1"]]:
        """Lower bounds of all distances without the query's own part, +inf where a row has fewer keys; the own part."""
        moved = queries - self._centre
        rest = exact_search.own_part(moved, tf32=True)
        moved = exact_search.to_tf32(moved)
        bounds = moved.new_full((len(queries) * pairs.steps, _STEP), torch.inf)
        order = pairs.part.argsort(stable=True)
        row = pairs.row[order]
        begin = row * pairs.steps + pairs.begin[order]
        counts = torch.bincount(pairs.part).cpu().numpy()
        parts, ends = np.flatnonzero(counts), np.cumsum(counts[counts > 0])
        steps = torch.arange(int(self._n_steps[parts].max()), device=self.device)
        low = 0
        with exact_search.product_of(tf32=True):
            for part, high in zip(parts.tolist(), ends.tolist(), strict=True):
                first, n = int(self._at[part]) * _STEP, int(self._n_steps[part])
                held = slice(first, first + n * _STEP)
                found = torch.addmm(self._norms[held], moved[row[low:high]], self._moved[held].T, alpha=-2)
                to = (begin[low:high, None] + steps[:n]).flatten()
                bounds.index_copy_(0, to, found.view(-1, _STEP))
                low = high
        return bounds.view(len(queries), -1), rest

    def _places(self, pairs: _Pairs, rows: Int[Tensor, " b"], column: Int[Tensor, "b C"]) -> Int[Tensor, "b C"]:
        """Where the keys of these columns of the bounds are held; -1 where a row has no key."""
        step = rows[:, None] * pairs.steps + column // _STEP
        begin = pairs.row * pairs.steps + pairs.begin
        pair = torch.searchsorted(begin, step, right=True).sub_(1).clamp_(min=0)
        inside = step - begin[pair]
        part = pairs.part[pair]
        there = (inside < self._steps[part]) & (pairs.row[pair] == rows[:, None])
        return ((self._place[part] + inside) * _STEP + column % _STEP).masked_fill_(~there, -1)

    def _exact(self, queries: Tensor, own: Tensor, place: Int[Tensor, "b C"]) -> Int[Tensor, "b C"]:
        """Sorted codes of the keys at these places; without the queries' own, and with `NONE` where there is no key."""
        some = place.clamp(min=0)
        ids = self._ids[some]
        codes = exact_search.encode(exact_search.row_distances(queries, self._keys, some), ids)
        gone = (place < 0) | (ids == own[:, None]) | (ids == kernels.NOBODY)
        return codes.masked_fill_(gone, exact_search.NONE).sort(1).values

    # --- the keys -------------------------------------------------------------------------------------------------

    def _hold(self, parts: NDArray[np.int64]) -> None:
        """Copy these parts to the device where they are missing; others leave when there is no room for all."""
        missing = parts[self._at[parts] < 0]
        if self._used + int(self._n_steps[missing].sum()) > self._capacity:
            self._at[:], self._used, missing = -1, 0, parts
            self._norms.fill_(torch.inf)
            self._ids.fill_(kernels.NOBODY)
        if not len(missing):
            return
        steps = np.cumsum(self._n_steps[missing])
        first = self._used + steps - self._n_steps[missing]
        # The place of every key, and its number in `positions`.
        sizes = self._sizes[missing]
        inside = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        places = np.repeat(first * _STEP, sizes) + inside
        chosen = self._index.positions[np.repeat(self._first[missing], sizes) + inside]
        for low in range(0, len(chosen), _BLOCK):
            positions = chosen[low : low + _BLOCK]
            keys = self._copied(self._index.raw(positions))
            self._check(positions, keys)
            to = torch.from_numpy(places[low : low + _BLOCK]).to(self.device)
            norms, moved = exact_search.key_parts(keys.float() - self._centre, tf32=True)
            self._keys[to], self._norms[to], self._moved[to] = keys, norms, moved
            self._ids[to] = torch.from_numpy(positions.astype(np.int64)).to(self.device)
        # Not before all are there: a bad key stops the copying.
        self._at[missing] = first
        self._used += int(steps[-1])
        self._place = torch.from_numpy(self._at).to(self.device, copy=True)

    def _copied(self, keys: NDArray[Any]) -> Tensor:
        """Keys in their format on disk, on the device."""
        found = torch.from_numpy(keys)
        return (found.pin_memory() if self.device.type == "cuda" else found).to(self.device).view(self._dtype)

    def _check(self, positions: NDArray[np.integer], keys: Tensor) -> None:
        if not float(keys.abs().amax()) < kernels.LARGEST:  # `not <` is also true for NaN
            bad = (~(keys.float().abs() < kernels.LARGEST)).any(1)
            raise self._index.store.not_finite(int(positions[bad.cpu().numpy()].min()))
