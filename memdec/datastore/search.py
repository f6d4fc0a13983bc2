"""Nearest neighbours among the keys of a datastore: the one search that all readers use.

exact: all keys pass by in blocks, or stay on the GPU (`device_search`). ivfflat and ivfpq: FAISS searches the nearest
cells only, on all GPUs where FAISS has them.
"""

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor
from tqdm import tqdm

from memdec.artefacts import artefact, devices, resources
from memdec.datastore.device_search import DeviceSearch
from memdec.datastore.keys import Datastore
from memdec.errors import ArtifactError, ConfigError
from memdec.maths import kernels, knn
from memdec.maths.exact_search import Nearest
from memdec.settings import IndexSettings, parse

BLOCK = 2048  # keys per block of exact search: its distances stay in the cache
PER_CALL = 65_536  # keys per FAISS call
_MORE = 16  # candidates fetched beyond k, so that rounding cannot decide who is the last neighbour
_TOKENS = 1 << 22  # tokens per block of a count, which NumPy takes as 64-bit integers
_SAME_TOKEN = 256  # most positions of an input token that are all candidates for its queries
Pair = tuple[NDArray[np.float32], NDArray[np.int64]]


def flat_type(store: Datastore) -> tuple[Any, int]:
    """Scalar quantiser that keeps keys as they are on disk, and its bytes per dimension."""
    kinds = faiss.ScalarQuantizer
    return {"float16": (kinds.QT_fp16, 2), "bfloat16": (kinds.QT_bf16, 2), "float32": (None, 4)}[store.settings.dtype]


def n_gpus(device: torch.device | None) -> int:
    """GPUs that FAISS may use."""
    on_gpu = hasattr(faiss, "index_cpu_to_all_gpus") and search_device(device).type == "cuda"
    return faiss.get_num_gpus() if on_gpu else 0


def rotate(keys: NDArray[np.float32], trained: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
    if "rotation" not in trained:
        return np.ascontiguousarray(keys)
    return np.ascontiguousarray(keys @ trained["rotation"].T)


def empty_index(store: Datastore, settings: IndexSettings, trained: dict[str, NDArray[Any]]) -> Any:
    """The FAISS index with these cells and codebooks, without keys."""
    cells = faiss.IndexFlatL2(store.width)
    cells.add(trained["centroids"].astype(np.float32))
    n_cells = len(trained["centroids"])
    index: Any
    if settings.kind == "ivfpq":
        index = faiss.IndexIVFPQ(cells, store.width, n_cells, settings.code_size, 8)
        if "codebooks" in trained:
            faiss.copy_array_to_vector(trained["codebooks"], index.pq.centroids)
            index.is_trained = True
            index.precompute_table()
    else:
        kind, _ = flat_type(store)
        index = (
            faiss.IndexIVFFlat(cells, store.width, n_cells)
            if kind is None
            else faiss.IndexIVFScalarQuantizer(cells, store.width, n_cells, kind, faiss.METRIC_L2, False)
        )
        index.is_trained = True
    return index


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


def search_device(asked: torch.device | None) -> torch.device:
    """Where search runs: on the device asked for, else on a GPU where there is one."""
    return asked or devices.pick()


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
        self._index: Any = None
        self._trained: dict[str, NDArray[Any]] = {}
        self._same_token: _SameToken | None = None
        # Candidates lie anywhere: in memory they take half the time of a memory map, for its pages are small.
        in_memory = sum(keys.nbytes for _, keys in store.parts) < resources.free_memory() / 10
        self._parts = [(first, kernels.bits(np.array(keys) if in_memory else keys)) for first, keys in store.parts]
        if settings.kind != "exact":
            self._trained = load_file(folder / "trained.safetensors")
            self._index = empty_index(store, settings, self._trained)
            codes = np.load(folder / "codes.npy", mmap_mode="r", allow_pickle=False)
            for first in tqdm(range(0, store.n, PER_CALL), desc="load index", unit="block", mininterval=2):
                block = np.ascontiguousarray(codes[first : first + PER_CALL])
                self._index.add_sa_codes(block, np.arange(first, first + len(block)))
            if store.parts:
                self._same_token = _SameToken(store.values, store.facts["vocab_size"])
        if self._index is not None and n_gpus(device):
            options = faiss.GpuMultipleClonerOptions()
            options.shard = True
            options.useFloat16 = settings.kind == "ivfpq"  # tables of 64-byte codes fit a GPU's shared memory only so
            self._index = faiss.index_cpu_to_all_gpus(self._index, options)

    def set_nprobe(self, nprobe: int) -> None:
        """Search the nearest `nprobe` cells of an ivf index; nothing for exact search.

        Raises:
            ConfigError: There are fewer.
        """
        if not self.settings.kind.startswith("ivf"):
            return
        if nprobe > self.settings.centroids:
            raise ConfigError(
                f"search: expected nprobe of at most {self.settings.centroids} centroids, found {nprobe}; lower 'nprobe'"
            )
        space = faiss.GpuParameterSpace() if n_gpus(self._device) else faiss.ParameterSpace()
        space.set_index_parameter(self._index, "nprobe", nprobe)

    @property
    def on_device(self) -> DeviceSearch | None:
        """The search on another device than the CPU, with its keys there from the first use on; None without one."""
        device = search_device(self._device)
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
            ConfigError: There are no stored keys to take distances from.
        """
        if not released and not self._parts:
            raise ConfigError(
                "search: expected stored keys to take the distances from, found a streamed datastore; set `released: true` "
                "(targets), or store the keys"
            )
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

    def _candidates(self, queries: NDArray[np.float32], fetch: int) -> Pair:
        if self._index is not None:
            found: Pair = self._index.search(rotate(queries, self._trained), fetch)
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


def load(store: Datastore, folder: Path, nprobe: int = 32, device: torch.device | None = None) -> Searcher:
    """The search over a datastore with an index that was made from its keys; `device` as for `Searcher`."""
    settings: IndexSettings = parse(IndexSettings, check_same(store, folder).settings, str(folder))
    searcher = Searcher(store, settings, folder, device)
    searcher.set_nprobe(nprobe)
    return searcher
