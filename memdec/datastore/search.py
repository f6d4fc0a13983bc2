"""Nearest neighbours among the keys of a datastore: the one search that all readers use.

exact: all keys pass by in blocks, or stay on the GPU (`device_search`). ivfflat and ivfpq: FAISS searches the nearest
cells only (`ivf`). Whatever finds the candidates, they are ordered by exact distances taken from the keys themselves.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from memdec.artefacts import artefact, devices, resources
from memdec.datastore.device_search import DeviceSearch
from memdec.datastore.keys import Datastore
from memdec.errors import ArtifactError, ConfigError
from memdec.maths import kernels, knn
from memdec.maths.exact_search import Nearest
from memdec.settings import IndexSettings, SearchSettings, parse

BLOCK = 2048  # keys per block of exact search: its distances stay in the cache
_MORE = 16  # candidates fetched beyond k, so that rounding cannot decide who is the last neighbour
_TOKENS = 1 << 22  # tokens per block of a count, which NumPy takes as 64-bit integers
_SAME_TOKEN = 256  # most positions of an input token that are all candidates for its queries
Pair = tuple[NDArray[np.float32], NDArray[np.int64]]


class _SameToken:
    """Positions whose key was read at the same input token, for tokens that are rare in the datastore.

    The keys nearest to that of a rare token are mostly those of the same token, but they are too few to have a cell of
    their own: nearly all that the nearest cells miss, and that matters, is here.
    """

    def __init__(self, values: NDArray[np.integer], vocab_size: int) -> None:
        inputs, counts = values[:-1], np.zeros(vocab_size, np.int64)
        blocks = range(0, len(inputs), _TOKENS)
        for first in blocks:
            counts += np.bincount(inputs[first : first + _TOKENS], minlength=vocab_size)
        rare = counts <= _SAME_TOKEN
        positions = np.concatenate(
            [first + 1 + np.flatnonzero(rare[inputs[first : first + _TOKENS]]) for first in blocks]
        )
        self._positions = positions[np.argsort(values[positions - 1], kind="stable")]
        self._edges = np.concatenate([[0], np.cumsum(np.where(rare, counts, 0))])

    def of(self, inputs: Int[np.ndarray, " B"]) -> Int[np.ndarray, "B C"]:
        """Positions with these input tokens (-1 for none), filled up with -1."""
        begin, end = self._edges[inputs], self._edges[np.maximum(inputs, -1) + 1]
        end = np.where(inputs < 0, begin, end)
        places = begin[:, None] + np.arange(int((end - begin).max()))
        there = places < end[:, None]
        return np.where(there, self._positions[np.where(there, places, 0)] if there.any() else -1, -1)


class Searcher:
    """Nearest neighbours of any queries among the keys of a datastore.

    Args:
        store: The keys.
        settings: Of the index.
        folder: Where its files are.
        device: Of the search; None for a GPU where there is one.
    """

    def __init__(
        self, store: Datastore, settings: IndexSettings, folder: Path, device: torch.device | None = None
    ) -> None:
        self.store, self.settings, self._device = store, settings, device
        self._on_device: DeviceSearch | None = None
        self._values: Tensor | None = None
        self._ivf: Any = None
        self._same_token: _SameToken | None = None
        # Candidates lie anywhere: in memory they take half the time of a memory map, for its pages are small.
        in_memory = sum(keys.nbytes for _, keys in store.parts) < resources.free_memory() / 10
        self._parts = [(first, kernels.bits(np.array(keys) if in_memory else keys)) for first, keys in store.parts]
        if settings.is_ivf:
            from memdec.datastore.ivf import IvfIndex  # exact search needs no faiss

            self._ivf = IvfIndex(store, settings, folder, device)
            if store.parts:
                self._same_token = _SameToken(store.values, store.facts["vocab_size"])

    def set_nprobe(self, nprobe: int) -> None:
        """Search the nearest `nprobe` cells of an ivf index; nothing for the other kinds.

        Raises:
            ConfigError: There are fewer.
        """
        check_cells(self.settings, nprobe)
        if self._ivf is not None:
            self._ivf.set_nprobe(nprobe)

    @property
    def on_device(self) -> DeviceSearch | None:
        """The search on another device than the CPU, with its keys there from the first use on; None without one."""
        device = devices.pick_for(self._device)
        if self.settings.kind != "exact" or not self.store.parts or device.type == "cpu":
            return None
        if self._on_device is None:
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
        """As `search`, but the result stays on the device of the search, and its exact distances are taken there.

        They differ from those of the CPU in their last bits: the order of the sum is another.
        """
        if (there := self.on_device) is not None:
            return there.search(torch.from_numpy(queries), neighbours, None if own is None else torch.from_numpy(own))
        sq_dist, ids = self.search(queries, neighbours, own, inputs=inputs, released=released)
        return torch.from_numpy(sq_dist), torch.from_numpy(ids)

    def search(
        self,
        queries: Float[np.ndarray, "B D"],
        neighbours: int,
        own: Int[np.ndarray, " B"] | None = None,
        *,
        inputs: Int[np.ndarray, " B"] | None = None,
        released: bool = False,
    ) -> Pair:
        """The nearest neighbours of each query, without the position it stands for.

        Args:
            queries: float32.
            neighbours: How many, at most the number of keys that are not the query's own.
            own: Position of each query in the datastore; None for queries from outside.
            inputs: For queries from outside, the token at which each key was read (the one before its position), -1 if
                unknown.
            released: Give the distances of the index, and the neighbours in their order. Otherwise more candidates are
                fetched, those with the same rare input token join them, and all are ordered by their exact distance;
                that makes the result independent of the batch, too.

        Returns:
            Squared distances (float32) and positions, shape (B, neighbours), nearest first, ties by position; +inf and
            -1 where the index found fewer.

        Raises:
            ArtifactError: There are no stored keys to take distances from.
        """
        if not released:
            self.store.require_stored("set `released: true` (targets), or store the keys")
        if own is None:
            own = np.full(len(queries), -1)
        elif self._same_token is not None:
            inputs = np.where(own > 0, self.store.values[np.maximum(own, 1) - 1].astype(np.int64), -1)
        fetch = min(neighbours + 1 + (0 if released else _MORE), self.store.n)
        sq_dist, ids = self._candidates(np.ascontiguousarray(queries, dtype=np.float32), fetch)
        if not released:
            if self._same_token is not None and inputs is not None:
                ids = np.concatenate([ids, self._same_token.of(inputs)], axis=1)
            sq_dist = knn.exact_distances(queries, self._parts, ids)
        return knn.drop_self(sq_dist, ids, own, neighbours)

    def rows(
        self, sq_dist: Float[Tensor, "B K"], ids: Int[Tensor, "B K"], temperature: float, **cut: Any
    ) -> tuple[Int[Tensor, " B"], Int[Tensor, " nnz"], Float[Tensor, " nnz"]]:
        """p_kNN from neighbours, as `knn.aggregate` gives it, on their device.

        Args:
            sq_dist: Squared distances.
            ids: Positions in the datastore, -1 where there is none.
            temperature: tau.
            cut: `top` and `threshold` of `knn.aggregate`.
        """
        return knn.aggregate(sq_dist, self._tokens_of(ids), temperature, **cut)

    def _tokens_of(self, ids: Int[Tensor, "B K"]) -> Int[Tensor, "B K"]:
        """Token of each position, any where there is none; the stream goes to another device once."""
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
    """Manifest of an index that was made from the keys of a datastore.

    Raises:
        ArtifactError: The index is not whole, or of other keys.
    """
    manifest = artefact.read(folder, "index")
    if manifest.inputs["datastore"] != store.recipe:
        raise ArtifactError(
            f"{folder}: expected an index of {store.folder}, found one of other keys (another model, text or settings); "
            "run `memdec index` again"
        )
    return manifest


def check_cells(settings: IndexSettings, nprobe: int) -> None:
    """An index must have the cells that are to be searched.

    Raises:
        ConfigError: There are fewer.
    """
    if (fault := settings.cells_fault(nprobe)) is not None:
        raise ConfigError(f"nprobe: {fault}; lower 'nprobe'")


def check(store: Datastore, folder: Path, wanted: SearchSettings, *, own: bool = False) -> artefact.Manifest:
    """Manifest of an index that can give the neighbours that are wanted; nothing is loaded.

    Args:
        store: The keys.
        folder: The index.
        wanted: k and nprobe.
        own: The queries are the keys themselves, none of which is its own neighbour.

    Raises:
        ArtifactError: The index is not whole, or of other keys.
        ConfigError: More neighbours than keys, or more cells than the index has.
    """
    manifest = check_same(store, folder)
    check_cells(parse(IndexSettings, manifest.settings, str(folder)), wanted.nprobe)
    check_neighbours(store, wanted.neighbours, own=own)
    return manifest


def check_neighbours(store: Datastore, neighbours: int, *, own: bool = False) -> None:
    """A datastore must have as many neighbours as are wanted; `own` as in `check`.

    Raises:
        ConfigError: It has fewer.
    """
    most = store.n - own
    if neighbours > most:
        raise ConfigError(
            f"neighbours: expected at most {most} ({store.n} keys of {store.folder}), found {neighbours}; lower it"
        )


def load(store: Datastore, folder: Path, nprobe: int = 32, device: torch.device | None = None) -> Searcher:
    """The search over a datastore with an index that was made from its keys; `device` as for `Searcher`."""
    settings: IndexSettings = parse(IndexSettings, check_same(store, folder).settings, str(folder))
    searcher = Searcher(store, settings, folder, device)
    searcher.set_nprobe(nprobe)
    return searcher
