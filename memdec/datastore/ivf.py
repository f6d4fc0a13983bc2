"""FAISS indexes with cells (IVF): the search visits the nearest cells only.

`ivfflat` keeps keys as they are on disk, `ivfpq` codes of a few bytes. Files: `trained.safetensors` (centroids, codebooks,
rotation) and `codes.npy` [N, bytes] (cell and code of each key). This is the only module that imports faiss.
"""

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from memdec.artefacts import devices
from memdec.datastore.keys import Datastore
from memdec.settings import IndexSettings

PER_CALL = 65_536  # keys per FAISS call
TRAINED, CODES = "trained.safetensors", "codes.npy"
Pair = tuple[NDArray[np.float32], NDArray[np.int64]]
Trained = dict[str, NDArray[Any]]


class IvfIndex:
    """The filled index of a folder, on all GPUs where FAISS has them.

    Args:
        store: The keys that it was made from.
        settings: Of the index.
        folder: Where its files are.
        device: Of the search; None for a GPU where there is one.
    """

    def __init__(self, store: Datastore, settings: IndexSettings, folder: Path, device: torch.device | None) -> None:
        self._trained = load_file(folder / TRAINED)
        index = empty(store, settings, self._trained)
        codes = np.load(folder / CODES, mmap_mode="r", allow_pickle=False)
        for first in tqdm(range(0, store.n, PER_CALL), desc="load index", unit="block", mininterval=2):
            block = np.ascontiguousarray(codes[first : first + PER_CALL])
            index.add_sa_codes(block, np.arange(first, first + len(block)))
        self._on_gpu = bool(_n_gpus(device))
        if self._on_gpu:
            options = faiss.GpuMultipleClonerOptions()
            options.shard = True
            options.useFloat16 = settings.kind == "ivfpq"  # tables of 64-byte codes fit a GPU's shared memory only so
            index = faiss.index_cpu_to_all_gpus(index, options)
        self._index = index

    def set_nprobe(self, nprobe: int) -> None:
        """Visit the nearest `nprobe` cells from now on."""
        space = faiss.GpuParameterSpace() if self._on_gpu else faiss.ParameterSpace()
        space.set_index_parameter(self._index, "nprobe", nprobe)

    def search(self, queries: Float[np.ndarray, "B D"], fetch: int) -> Pair:
        """Distances of the index and positions of the nearest `fetch` keys; -1 where the cells have fewer."""
        found: Pair = self._index.search(rotate(queries, self._trained), fetch)
        return found


class Encoder:
    """Makes the codes of keys from what was trained."""

    def __init__(self, store: Datastore, settings: IndexSettings, folder: Path) -> None:
        self._trained = load_file(folder / TRAINED)
        self._index = empty(store, settings, self._trained)
        self.code_size = int(self._index.sa_code_size())

    def codes(self, keys: Float[np.ndarray, "n D"]) -> NDArray[np.uint8]:
        """Cell and code of each key, (n, code_size)."""
        found: NDArray[np.uint8] = self._index.sa_encode(rotate(keys, self._trained))
        return found


def code_bytes(store: Datastore, settings: IndexSettings) -> int:
    """Bytes of the code of a key, without its cell."""
    return settings.code_size if settings.kind == "ivfpq" else store.width * _scalar_type(store)[1]


def empty(store: Datastore, settings: IndexSettings, trained: Trained) -> Any:
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
        kind, _ = _scalar_type(store)
        index = (
            faiss.IndexIVFFlat(cells, store.width, n_cells)
            if kind is None
            else faiss.IndexIVFScalarQuantizer(cells, store.width, n_cells, kind, faiss.METRIC_L2, False)
        )
        index.is_trained = True
    return index


def _scalar_type(store: Datastore) -> tuple[Any, int]:
    """Scalar quantiser that keeps keys as they are on disk, and its bytes per dimension."""
    kinds = faiss.ScalarQuantizer
    return {"float16": (kinds.QT_fp16, 2), "bfloat16": (kinds.QT_bf16, 2), "float32": (None, 4)}[store.settings.dtype]


def _n_gpus(device: torch.device | None) -> int:
    """GPUs that FAISS may use."""
    on_gpu = hasattr(faiss, "index_cpu_to_all_gpus") and devices.pick_for(device).type == "cuda"
    return faiss.get_num_gpus() if on_gpu else 0


def rotate(keys: NDArray[np.float32], trained: Trained) -> NDArray[np.float32]:
    if "rotation" not in trained:
        return np.ascontiguousarray(keys)
    return np.ascontiguousarray(keys @ trained["rotation"].T)


# --- training -----------------------------------------------------------------------------------------------------


def train(store: Datastore, out: Path, settings: IndexSettings, device: torch.device | None) -> None:
    """Write `trained.safetensors`, unless a killed run has."""
    path = out / TRAINED
    if _is_trained(path, store, settings):
        return
    _, keys = store.sample(settings.sample, settings.seed)
    trained: Trained = {}
    if settings.opq:
        opq = faiss.OPQMatrix(store.width, settings.code_size)
        codebooks = faiss.ProductQuantizer(store.width, settings.code_size, 8)
        codebooks.cp.min_points_per_centroid = 1  # said before, in our words
        opq.pq = codebooks
        rng = np.random.default_rng(settings.seed)
        some = rng.choice(len(keys), min(len(keys), 256 * 256), replace=False)
        opq.train(np.ascontiguousarray(keys[np.sort(some)]))
        trained["rotation"] = faiss.vector_to_array(opq.A).reshape(store.width, store.width)
        keys = rotate(keys, trained)
    clustering = faiss.Clustering(store.width, settings.centroids)
    clustering.seed, clustering.min_points_per_centroid, clustering.verbose = settings.seed, 1, True
    cells = faiss.IndexFlatL2(store.width)
    on_gpu = faiss.index_cpu_to_all_gpus(cells) if _n_gpus(device) else cells
    clustering.train(keys, on_gpu)
    centroids = faiss.vector_to_array(clustering.centroids).reshape(-1, store.width)
    # Residuals are taken from the centroids as they are on disk, so half of the bytes costs nothing.
    with np.errstate(over="ignore"):
        narrow = centroids.astype(np.float16 if store.settings.dtype == "float16" else np.float32)
    trained["centroids"] = narrow if np.isfinite(narrow).all() else centroids
    if settings.kind == "ivfpq":
        index = empty(store, settings, trained)
        index.pq.cp.min_points_per_centroid, index.pq.cp.seed = 1, settings.seed
        index.train(keys)
        trained["codebooks"] = faiss.vector_to_array(index.pq.centroids)
    part = path.with_name(".trained.part")
    save_file(trained, part)
    part.replace(path)


def _is_trained(path: Path, store: Datastore, settings: IndexSettings) -> bool:
    """Whether a killed run, or one whose folder was damaged since, left a whole file."""
    try:
        return load_file(path)["centroids"].shape == (settings.centroids, store.width)
    except (OSError, SafetensorError, KeyError):
        return False
