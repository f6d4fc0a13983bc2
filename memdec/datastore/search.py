"""Search the nearest neighbours among the keys of a datastore; every user of neighbours searches through this module.

Exact search reads all keys in blocks, or keeps them on the GPU (`device_search`). For ivfflat and ivfpq, FAISS searches
only the nearest cells (`ivf`). In both cases the candidates are then sorted by exact distances to the stored keys. Kind
`cells` computes exact distances to all keys of the nearest cells (`cells`, and `device_cells` on a GPU). All search in
cells adds positions after the same rare token, and kind `cells` some of the same place in a window (`candidates`).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from memdec.artefacts import arrays, artefact, devices, resources
from memdec.datastore import candidates
from memdec.datastore.device_search import DeviceSearch
from memdec.datastore.keys import Datastore
from memdec.errors import ArtifactError, ConfigError
from memdec.maths import kernels, knn
from memdec.maths.exact_search import Nearest
from memdec.settings import IndexSettings, SearchSettings, parse

BLOCK = 2048  # keys per block of exact search: the distances of a block fit into the CPU cache
_MORE = 16  # candidates fetched beyond k, so that rounding does not decide which key is the k-th neighbour
Pair = tuple[NDArray[np.float32], NDArray[np.int64]]


class Searcher:
    """Finds the nearest neighbours of queries among the keys of a datastore.

    Args:
        store: The keys.
        settings: Settings of the index.
        folder: Folder of the index.
        device: Where to search; None means a GPU if there is one.
        by_place: Whether kind `cells` has positions of the query's own place as candidates (`candidates.by_place`).
    """

    def __init__(
        self,
        store: Datastore,
        settings: IndexSettings,
        folder: Path,
        device: torch.device | None = None,
        *,
        by_place: bool = False,
    ) -> None:
        self.store, self.settings, self._device = store, settings, device
        self._on_device: Any = None
        self._values: Tensor | None = None
        self._ivf: Any = None
        self._rare: candidates.Sets | None = None  # those of search in cells with FAISS
        self.cells: Any = None  # the `cells.CellSearch` of an index of this kind
        # Candidates are at random positions: reading them from memory takes half the time of a memory map, whose pages
        # are small.
        every = [keys for _, keys in store.parts]
        in_memory = sum(keys.nbytes for keys in every) < resources.free_memory() / 10
        every = [np.array(keys) for keys in every] if in_memory else arrays.scattered(every)
        self._parts = [(first, kernels.bits(keys)) for (first, _), keys in zip(store.parts, every, strict=True)]
        if settings.kind == "cells":
            from memdec.datastore.cells import CellSearch  # exact search needs no faiss

            self.store.require_stored("use kind ivfpq or ivfflat, not cells")
            self.cells = CellSearch(store, settings, folder, self._parts, by_place=by_place)
        elif settings.has_cells:
            from memdec.datastore.ivf import IvfIndex

            self._ivf = IvfIndex(store, settings, folder, device)
            if store.parts:
                self._rare = candidates.rare_tokens(store.values, store.facts["vocab_size"])

    def set_nprobe(self, nprobe: int) -> None:
        """Search the nearest `nprobe` cells from now on; no effect on an exact index.

        Raises:
            ConfigError: The index has fewer cells.
        """
        check_cells(self.settings, nprobe)
        for index in (self._ivf, self.cells):
            if index is not None:
                index.set_nprobe(nprobe)

    @property
    def on_device(self) -> Any | None:
        """The `DeviceSearch` or `DeviceCells` of a GPU, which holds keys from the first use on; None if the CPU searches."""
        device = devices.pick_for(self._device)
        if self.settings.kind not in ("exact", "cells") or not self.store.parts or device.type == "cpu":
            return None
        if self._on_device is None:
            if self.cells is not None:
                from memdec.datastore.device_cells import DeviceCells  # exact search needs no faiss

                self._on_device = DeviceCells(self.cells, device)
            else:
                self._on_device = DeviceSearch(self.store, device, tf32=device.type == "cuda")
        return self._on_device

    def near(
        self,
        queries: Float[np.ndarray, "B D"],
        neighbours: int,
        own: Int[np.ndarray, " B"] | None = None,
        *,
        inputs: Int[np.ndarray, " B"] | None = None,
        released: bool = False,
    ) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"]]:
        """As `search`, but exact distances are computed on the search device and the result stays there.

        They may differ from those of the CPU in the last bits, because the order of summation differs.
        """
        if (there := self.on_device) is not None:
            more = {} if self.cells is None else {"inputs": None if released else self._inputs(own, inputs)}
            own_there = None if own is None else torch.from_numpy(own)
            found: tuple[Tensor, Tensor] = there.search(torch.from_numpy(queries), neighbours, own_there, **more)
            return found
        sq_dist, ids = self.search(queries, neighbours, own, inputs=inputs, released=released)
        return torch.from_numpy(sq_dist), torch.from_numpy(ids)

    def near_keys(
        self, positions: Int[np.ndarray, " B"], neighbours: int, *, released: bool = False
    ) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"]]:
        """As `near` for keys of the datastore, of an index of kind `cells`."""
        if (there := self.on_device) is not None:
            own, inputs = torch.from_numpy(positions), None if released else self._inputs(positions, None)
            found: tuple[Tensor, Tensor] = there.search(there.keys(positions), neighbours, own, inputs=inputs)
            return found
        return self.near(self.cells.keys(positions), neighbours, positions, released=released)

    def search(
        self,
        queries: Float[np.ndarray, "B D"],
        neighbours: int,
        own: Int[np.ndarray, " B"] | None = None,
        *,
        inputs: Int[np.ndarray, " B"] | None = None,
        released: bool = False,
    ) -> Pair:
        """Find the nearest neighbours of each query, excluding the query's own position.

        Args:
            queries: Query vectors, float32.
            neighbours: Neighbours per query, at most the number of keys without the query's own.
            own: Position of each query in the datastore; None if the queries are not keys of the datastore.
            inputs: If the queries are not keys of the datastore: the last input token of each query, which is the token
                before its position; -1 if unknown.
            released: Use the distances of a FAISS index and its order, as the released code does. Otherwise more
                candidates are fetched, positions with the same rare input token are added, and all are sorted by exact
                distance. The result is then also independent of the batch. Kind `cells` has exact distances anyway, but
                adds these positions only then.

        Returns:
            Squared distances (float32) and positions, shape (B, neighbours), nearest first, ties by position. Where the
            index found fewer, the rest is +inf and -1.

        Raises:
            ArtifactError: The keys are not stored, so there are no exact distances.
        """
        if not released:
            self.store.require_stored("set `released: true` (targets), or store the keys")
        if self.cells is not None and self.on_device is not None:
            near, positions = self.near(queries, neighbours, own, inputs=inputs, released=released)
            return near.cpu().numpy(), positions.cpu().numpy()
        if self.cells is not None or self._rare is not None:
            inputs = None if released else self._inputs(own, inputs)
        # One more than asked for, where a query may find itself; FAISS on a GPU has a limit.
        fetch = neighbours + (0 if released and own is None else 1) + (0 if released else _MORE)
        if own is None:
            own = np.full(len(queries), -1)
        if self.cells is not None:
            found: Pair = self.cells.search(queries, own, neighbours, inputs)
            return found
        sq_dist, ids = self._candidates(np.ascontiguousarray(queries, dtype=np.float32), min(fetch, self.store.n))
        if not released or self._ivf is None:
            if self._rare is not None and inputs is not None:
                ids = np.concatenate([ids, self._rare.of(inputs)], axis=1)
            sq_dist = knn.exact_distances(queries, self._parts, ids)
        return knn.drop_self(sq_dist, ids, own, neighbours)

    def _inputs(
        self, own: Int[np.ndarray, " B"] | None, inputs: Int[np.ndarray, " B"] | None
    ) -> Int[np.ndarray, " B"] | None:
        """Last input token of each query, -1 if it has none: that before its own position, or as given; None if unknown."""
        if own is None:
            return inputs
        return np.where(own > 0, self.store.values[np.maximum(own, 1) - 1].astype(np.int64), -1)

    def rows(
        self, sq_dist: Float[Tensor, "B K"], ids: Int[Tensor, "B K"], temperature: float, **cut: Any
    ) -> tuple[Int[Tensor, " B"], Int[Tensor, " nnz"], Float[Tensor, " nnz"]]:
        """Compute p_kNN of the neighbours with `knn.aggregate`, on their device.

        Args:
            sq_dist: Squared distances.
            ids: Positions in the datastore, -1 for no neighbour.
            temperature: tau.
            cut: `top` and `threshold` of `knn.aggregate`.
        """
        return knn.aggregate(sq_dist, self._tokens_of(ids), temperature, **cut)

    def _tokens_of(self, ids: Int[Tensor, "B K"]) -> Int[Tensor, "B K"]:
        """Token of each position, arbitrary for -1; a GPU gets a copy of the token stream once."""
        if ids.device.type == "cpu":
            return torch.from_numpy(self.store.values[np.maximum(ids.numpy(), 0)].astype(np.int64))
        if self._values is None:
            self._values = torch.from_numpy(self.store.values.astype(np.int32)).to(ids.device)
        return self._values[ids.clamp(min=0)].long()

    def _candidates(self, queries: NDArray[np.float32], fetch: int) -> Pair:
        if self._ivf is not None:
            found: Pair = self._ivf.search(queries, fetch)
            return found
        if (there := self.on_device) is not None:
            near, positions = there.search(torch.from_numpy(queries), fetch)
            return near.cpu().numpy(), positions.cpu().numpy()
        nearest = Nearest(torch.from_numpy(queries), fetch)
        for first, keys in self.store.blocks(0, self.store.n, BLOCK):
            nearest.update(torch.from_numpy(keys), first)
        sq_dist, ids = nearest.result()
        return sq_dist.numpy(), ids.numpy()


def check_same(store: Datastore, folder: Path) -> artefact.Manifest:
    """Check that an index was made from the keys of this datastore, and return its manifest.

    Raises:
        ArtifactError: The index is incomplete, or was made from other keys.
    """
    manifest = artefact.read(folder, "index", whole=True)
    if manifest.inputs["datastore"] != store.recipe:
        raise ArtifactError(
            f"{folder}: expected an index of {store.folder}, found one of other keys (another model, text or settings); "
            "run `memdec index` again"
        )
    return manifest


def check_cells(settings: IndexSettings, nprobe: int) -> None:
    """Check that an index has at least `nprobe` cells.

    Raises:
        ConfigError: It has fewer.
    """
    if (fault := settings.cells_fault(nprobe)) is not None:
        raise ConfigError(f"nprobe: {fault}; lower 'nprobe'")


def check(store: Datastore, folder: Path, wanted: SearchSettings, *, own: bool = False) -> artefact.Manifest:
    """Check that an index can give the requested neighbours, and return its manifest; loads no keys.

    Args:
        store: The keys.
        folder: The index.
        wanted: k and nprobe.
        own: Whether the queries are the keys themselves; a key is not its own neighbour, so there is one less.

    Raises:
        ArtifactError: The index is incomplete, or was made from other keys.
        ConfigError: k is more than the number of keys, or nprobe more than the number of cells.
    """
    manifest = check_same(store, folder)
    check_cells(parse(IndexSettings, manifest.settings, str(folder)), wanted.nprobe)
    check_neighbours(store, wanted.neighbours, own=own)
    return manifest


def check_neighbours(store: Datastore, neighbours: int, *, own: bool = False) -> None:
    """Check that a datastore has enough keys for this many neighbours; `own` as in `check`.

    Raises:
        ConfigError: It has fewer.
    """
    most = store.n - own
    if neighbours > most:
        raise ConfigError(
            f"neighbours: expected at most {most} ({store.n} keys of {store.folder}), found {neighbours}; lower it"
        )


def load(store: Datastore, folder: Path, nprobe: int = 32, device: torch.device | None = None) -> Searcher:
    """Load the search over a datastore and its index, after checking that they match; `device` as for `Searcher`."""
    manifest = check_same(store, folder)
    settings: IndexSettings = parse(IndexSettings, manifest.settings, str(folder))
    searcher = Searcher(store, settings, folder, device, by_place=manifest.facts.get("by_place", False))
    searcher.set_nprobe(nprobe)
    return searcher
