"""Index kind `cells`: exact distances to all keys of the nearest cells, and no compression.

The index is the centroids (`trained.safetensors`) and the cell of each key (`codes.npy`, one to three bytes). When it is
loaded, positions are sorted by cell, 4 bytes each. The keys stay where they are: the keys of a cell are gathered when
queries search it, once for many queries. `memdec.maths.cell_join` compares them on the CPU, `device_cells` on a GPU.

A query is also compared with positions that are likely neighbours in other cells: those after its last input token if
that is rare, and in some datastores those of its own place in a window (`candidates`).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray

from memdec.artefacts import arrays, devices
from memdec.datastore import candidates, ivf
from memdec.datastore.keys import Datastore
from memdec.maths import cell_join, exact_search
from memdec.settings import IndexSettings

Pair = tuple[NDArray[np.float32], NDArray[np.int64]]
Parts = list[tuple[int, NDArray[Any]]]


class CellSearch:
    """The cells of a folder's index.

    Args:
        store: The keys that it was made from.
        settings: Settings of the index.
        folder: Folder of the index.
        parts: (first position, keys) of each shard of the datastore, as `kernels.bits`.
        by_place: Whether positions of the query's own place in a window are candidates (`candidates.by_place`).

    Attributes:
        store: The keys.
        centroids: Centroids, float32, shape (C, D).
        starts: Cell c has the keys positions[starts[c] : starts[c + 1]].
        positions: Positions of the keys, cell after cell.
        nprobe: Number of cells that a query searches.
        beside: Sets of positions that are candidates beside those of the cells, and the cell of each of their positions.
    """

    def __init__(
        self, store: Datastore, settings: IndexSettings, folder: Path, parts: Parts, *, by_place: bool = False
    ) -> None:
        self.store, self._parts, self.nprobe = store, parts, 1
        self.centroids = ivf.load_trained(folder, store, settings)["centroids"].astype(np.float32)
        codes = arrays.load(folder / ivf.CODES, np.uint8, (store.n, ivf.cell_bytes(settings.centroids)))
        cells = np.empty(store.n, np.int32)
        for first in range(0, store.n, ivf.PER_CALL):
            block = codes[first : first + ivf.PER_CALL]
            cells[first : first + len(block)] = ivf.cells_of(block, settings.centroids, folder)
        self.starts, self.positions = cell_join.grouped(cells, settings.centroids)
        sets = [candidates.rare_tokens(store.values, store.facts["vocab_size"])]
        if by_place:
            sets.append(candidates.same_place(store.places, store.n))
        self.beside = [(each, cells[each.positions]) for each in sets]

    def set_nprobe(self, nprobe: int) -> None:
        """Search the nearest `nprobe` cells from now on."""
        self.nprobe = nprobe

    def search(
        self,
        queries: Float[np.ndarray, "B D"],
        own: Int[np.ndarray, " B"],
        neighbours: int,
        inputs: Int[np.ndarray, " B"] | None = None,
    ) -> Pair:
        """The nearest keys without the queries' own positions, as `cell_join.nearest`.

        Args:
            queries: float32, finite.
            own: Position of each query, -1 if it is no key.
            neighbours: K.
            inputs: Last input token of each query, -1 if it has none; None: search in cells only, without `beside`.

        Raises:
            NumericsError: A key that is compared is NaN, infinite or too large.
        """
        probes, beside = cell_join.nearest_cells(queries, self.centroids, self.nprobe), []
        if inputs is not None:
            for (sets, cells), number in zip(self.beside, self.numbers(own, inputs), strict=True):
                begin, end = sets.spans(number)
                chosen = np.where(begin < end, number, -1)
                beside.append(cell_join.Beside(chosen, sets.edges, sets.positions, cells, sets.set_of))
        try:
            return cell_join.nearest(queries, own, probes, self.starts, self.positions, self._parts, neighbours, beside)
        except cell_join.BadKeyError as error:
            raise self.store.not_finite(error.position) from None

    def numbers(self, own: Int[np.ndarray, " B"], inputs: Int[np.ndarray, " B"]) -> list[Int[np.ndarray, " B"]]:
        """The set of each query in each of `beside`: its last input token, and its place; -1 for none."""
        if len(self.beside) == 1:
            return [inputs]
        return [inputs, np.where(own < 0, -1, self.store.places(own))]

    def order(self, begin: int, end: int) -> Int[np.ndarray, " n"]:
        """The positions [begin, end) in the order of their cells."""
        return self.positions[(self.positions >= begin) & (self.positions < end)].astype(np.int64)

    def keys(self, positions: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n D"]:
        """The keys of these positions as queries, in float32.

        Raises:
            NumericsError: One is NaN, infinite or too large.
        """
        return self.store.wide(self.raw(positions), positions)

    def raw(self, positions: Int[np.ndarray, " n"]) -> NDArray[Any]:
        """The keys of these positions in their format on disk (`kernels.bits`)."""
        room = np.empty((len(positions), self.store.width), self._parts[0][1].dtype)
        return cell_join.gathered(self._parts, positions, room)


class Assigner:
    """Finds the cell of each key, as the codes of the index; with the interface of `ivf.Encoder`."""

    def __init__(
        self, store: Datastore, settings: IndexSettings, folder: Path, device: torch.device | None = None
    ) -> None:
        self._device = devices.pick_for(device)
        self._centroids = ivf.load_trained(folder, store, settings)["centroids"].astype(np.float32)
        self._there = torch.from_numpy(self._centroids).to(self._device)
        self.code_size = ivf.cell_bytes(settings.centroids)

    def codes(self, keys: Float[np.ndarray, "n D"]) -> NDArray[np.uint8]:
        """The number of the nearest centroid, lowest byte first, (n, code_size)."""
        if self._device.type == "cpu":
            cells = cell_join.nearest_cells(keys, self._centroids, 1)
        else:
            queries, room = torch.from_numpy(keys).to(self._device), devices.free_memory(self._device) // 2
            cells = exact_search.nearest_cells(queries, self._there, 1, room=room).cpu().numpy()
        return np.ascontiguousarray(cells.astype("<i8").view(np.uint8).reshape(-1, 8)[:, : self.code_size])
