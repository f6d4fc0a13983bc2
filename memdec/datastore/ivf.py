"""FAISS indexes with cells (IVF): the search visits only the nearest cells.

`ivfflat` holds the keys in the number type of the datastore, `ivfpq` holds codes of a few bytes. Files:
`trained.safetensors` (centroids, codebooks, rotation) and `codes.npy` [N, bytes] (cell and code of each key). The
centroids of kind `cells` come from here, too; its search does not (`memdec.datastore.cells`). This is the only module
that imports faiss.
"""

import os
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from memdec.artefacts import arrays, artefact, devices
from memdec.datastore.keys import Datastore
from memdec.errors import ArtifactError, ConfigError, outside
from memdec.maths import cell_join
from memdec.settings import IndexSettings

PER_CALL = 65_536  # keys per FAISS call
TRAINED, CODES = "trained.safetensors", "codes.npy"
_GPU_CODES = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96)  # bytes of its kernels
_GPU_MOST = 2048  # neighbours, and cells, of a search by FAISS on a GPU
Pair = tuple[NDArray[np.float32], NDArray[np.int64]]
Trained = dict[str, NDArray[Any]]


class IvfIndex:
    """The index of a folder with all its keys, on all GPUs if FAISS supports them.

    Args:
        store: The keys that it was made from.
        settings: Settings of the index.
        folder: Folder of the index.
        device: Where to search; None means a GPU if there is one.
    """

    def __init__(self, store: Datastore, settings: IndexSettings, folder: Path, device: torch.device | None) -> None:
        self._trained = load_trained(folder, store, settings)
        index = empty(store, settings, self._trained)
        codes = arrays.load(folder / CODES, np.uint8, (store.n, int(index.sa_code_size())))
        for first in tqdm(range(0, store.n, PER_CALL), desc="load index", unit="block", mininterval=2):
            block = np.ascontiguousarray(codes[first : first + PER_CALL])
            if settings.centroids > 1:  # FAISS leaves out the number of an only cell
                cells_of(block, settings.centroids, folder)  # FAISS would write beyond its lists
            # By a name, as FAISS up to 1.13 keeps no reference, and would read freed memory.
            positions = np.arange(first, first + len(block))
            index.add_sa_codes(block, positions)
        self._on_gpu = bool(_n_gpus(device))
        if self._on_gpu:
            options = faiss.GpuMultipleClonerOptions()
            options.shard = True
            options.useFloat16 = settings.kind == "ivfpq"  # so that tables of 64-byte codes fit a GPU's shared memory
            index = faiss.index_cpu_to_all_gpus(index, options)
        self._index = index

    def set_nprobe(self, nprobe: int) -> None:
        """Search the nearest `nprobe` cells from now on."""
        self._check_gpu("nprobe", nprobe)
        space = faiss.GpuParameterSpace() if self._on_gpu else faiss.ParameterSpace()
        space.set_index_parameter(self._index, "nprobe", nprobe)

    def search(self, queries: Float[np.ndarray, "B D"], fetch: int) -> Pair:
        """Distances by the index, and positions, of the nearest `fetch` keys; -1 if the cells have fewer."""
        self._check_gpu("neighbours with what is fetched to re-rank", fetch)
        found: Pair = self._index.search(rotate(queries, self._trained), fetch)
        return found

    def _check_gpu(self, what: str, found: int) -> None:
        if self._on_gpu and found > _GPU_MOST:
            raise ConfigError(
                f"{what}: expected at most {_GPU_MOST}, which is FAISS's limit on a GPU, found {found}; lower it, or search "
                "with device cpu"
            )


class Encoder:
    """Encodes keys with the trained centroids and codebooks."""

    def __init__(self, store: Datastore, settings: IndexSettings, folder: Path) -> None:
        self._trained = load_trained(folder, store, settings)
        self._index = empty(store, settings, self._trained)
        self.code_size = int(self._index.sa_code_size())

    def codes(self, keys: Float[np.ndarray, "n D"]) -> NDArray[np.uint8]:
        """Cell and code of each key, (n, code_size)."""
        found: NDArray[np.uint8] = self._index.sa_encode(rotate(keys, self._trained))
        return found


def load_trained(folder: Path, store: Datastore, settings: IndexSettings) -> Trained:
    """Centroids, codebooks and rotation; FAISS copies them without looking at their sizes.

    Raises:
        ArtifactError: The file is damaged, or of another index.
    """
    path = folder / TRAINED
    with outside(ArtifactError, path, "a safetensors file", "run `memdec index` again"):
        found = load_file(path)
    d, pq = store.width, settings.kind == "ivfpq"
    wanted: dict[str, tuple[int, ...]] = {"centroids": (settings.centroids, d)}
    wanted |= {"codebooks": (256 * d,)} if pq else {}
    wanted |= {"rotation": (d, d)} if settings.opq else {}
    shapes = {name: each.shape for name, each in found.items()}
    if shapes != wanted or not all(each.dtype in arrays.FLOATS for each in found.values()):
        raise ArtifactError(f"{path}: expected arrays {wanted}, found {shapes}; run `memdec index` again")
    return found


def cell_bytes(n_cells: int) -> int:
    """Bytes of the number of a cell, with which every code begins."""
    return (max(n_cells - 1, 1).bit_length() + 7) // 8


def cells_of(codes: NDArray[np.uint8], n_cells: int, folder: Path) -> NDArray[np.int64]:
    """The cell of every code.

    Raises:
        ArtifactError: There is no such cell.
    """
    n_bytes = cell_bytes(n_cells)
    cells: NDArray[np.int64] = codes[:, :n_bytes].astype(np.int64) @ (256 ** np.arange(n_bytes))
    if (cells >= n_cells).any():
        raise ArtifactError(
            f"{folder / CODES}: expected cells below {n_cells}, found cell {cells.max()}; run `memdec index` again"
        )
    return cells


def code_bytes(store: Datastore, settings: IndexSettings) -> int:
    """Bytes of the code of one key, without the number of its cell."""
    if settings.kind == "cells":
        return 0
    return settings.code_size if settings.kind == "ivfpq" else store.width * _scalar_type(store)[1]


def empty(store: Datastore, settings: IndexSettings, trained: Trained) -> Any:
    """Make a FAISS index with these centroids and codebooks, but without keys."""
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
    """Scalar quantiser for the number type of the stored keys (None: float32), and bytes per dimension."""
    kinds = faiss.ScalarQuantizer
    return {"float16": (kinds.QT_fp16, 2), "bfloat16": (kinds.QT_bf16, 2), "float32": (None, 4)}[store.settings.dtype]


def check_gpu(store: Datastore, settings: IndexSettings, device: torch.device | None) -> None:
    """Check beforehand what FAISS refuses on a GPU when it gets the finished index.

    Raises:
        ConfigError: Its search cannot have this number type of the keys, or codes of this size.
    """
    if not _n_gpus(device):
        return
    if settings.kind == "ivfflat" and store.settings.dtype == "bfloat16":
        raise ConfigError(
            "index: expected keys in float16 or float32 for FAISS on a GPU, found bfloat16; choose another `dtype` of the "
            "datastore, kind cells, or `device: cpu`"
        )
    if settings.kind == "ivfpq" and settings.code_size not in _GPU_CODES:
        raise ConfigError(
            f"index: expected a code_size of {', '.join(map(str, _GPU_CODES))} for FAISS on a GPU, found "
            f"{settings.code_size}; choose one that divides the key width {store.width}, kind cells, or `device: cpu`"
        )


def _n_gpus(device: torch.device | None) -> int:
    """Number of GPUs that FAISS may use."""
    on_gpu = hasattr(faiss, "index_cpu_to_all_gpus") and devices.pick_for(device).type == "cuda"
    return faiss.get_num_gpus() if on_gpu else 0


def rotate(keys: NDArray[np.float32], trained: Trained) -> NDArray[np.float32]:
    if "rotation" not in trained:
        return np.ascontiguousarray(keys)
    return np.ascontiguousarray(keys @ trained["rotation"].T)


# --- training -----------------------------------------------------------------------------------------------------


def train(store: Datastore, out: Path, settings: IndexSettings, device: torch.device | None) -> None:
    """Train the index and write `trained.safetensors`, unless a killed run has written it already."""
    path = out / TRAINED
    if _is_trained(path, store, settings):
        return
    rounds, sample = settings.training
    _, keys = store.sample(sample, settings.seed)
    trained: Trained = {}
    if settings.opq:
        opq = faiss.OPQMatrix(store.width, settings.code_size)
        codebooks = faiss.ProductQuantizer(store.width, settings.code_size, 8)
        codebooks.cp.min_points_per_centroid = 1  # no FAISS warning: `index` has checked the sample already
        opq.pq = codebooks
        rng = np.random.default_rng(settings.seed)
        some = rng.choice(len(keys), min(len(keys), 256 * 256), replace=False)
        opq.train(np.ascontiguousarray(keys[np.sort(some)]))
        trained["rotation"] = faiss.vector_to_array(opq.A).reshape(store.width, store.width)
        keys = rotate(keys, trained)
    clustering = faiss.Clustering(store.width, settings.centroids)
    clustering.seed, clustering.min_points_per_centroid, clustering.verbose = settings.seed, 1, True
    clustering.niter = rounds
    cells = faiss.IndexFlatL2(store.width)
    on_gpu = faiss.index_cpu_to_all_gpus(cells) if _n_gpus(device) else cells
    clustering.train(keys, on_gpu)
    centroids = faiss.vector_to_array(clustering.centroids).reshape(-1, store.width)
    if settings.kind == "cells":
        centroids = centroids[cell_join.side_by_side(centroids)]
    # Residuals are computed from the centroids as stored, so storing them in half the bytes loses no accuracy.
    with np.errstate(over="ignore"):
        narrow = centroids.astype(np.float16 if store.settings.dtype == "float16" else np.float32)
    trained["centroids"] = narrow if np.isfinite(narrow).all() else centroids
    if settings.kind == "ivfpq":
        index = empty(store, settings, trained)
        index.pq.cp.min_points_per_centroid, index.pq.cp.seed = 1, settings.seed
        index.train(keys)
        trained["codebooks"] = faiss.vector_to_array(index.pq.centroids)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(trained, part, metadata={"xxh3_128": _hash(trained)})
    part.replace(path)


def _is_trained(path: Path, store: Datastore, settings: IndexSettings) -> bool:
    """Whether an undamaged file is there, from a killed run or from one whose folder was damaged later."""
    try:
        with safe_open(path, "numpy") as file:
            stated = (file.metadata() or {}).get("xxh3_128")
        return stated == _hash(load_trained(path.parent, store, settings))
    except (OSError, SafetensorError, ArtifactError):
        return False


def _hash(trained: Trained) -> str:
    return artefact.digest({name: arrays.content_hash(trained[name]) for name in sorted(trained)})
