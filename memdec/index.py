"""Stage `index`: the search structure over the keys of a datastore, and the one search that all readers use.

exact: no data of its own; all keys stream past in blocks, or stay on the GPU where there is one (`device_search`). flat: FAISS Flat, all keys in
memory. ivfflat, ivfpq: FAISS, only the nearest cells; on all GPUs where FAISS has them. Training sees a random sample,
filling sees every key once, so a streamed datastore gives the same index as a stored one.

Output: `trained.safetensors` (centroids, codebooks, rotation) and `codes.npy` [N, bytes] (cell and code of each key).
The manifest holds recall@k against exact search in float64 and the total variation of p_kNN, measured on a sample of
queries at several nprobe: with exact distances (rescored) and with those of the index (released).
"""

import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from memdec import artifacts, devices, kernels, knn, resources
from memdec.config import IndexSettings, parse
from memdec.datastore import Datastore, is_array
from memdec.device_search import DeviceSearch
from memdec.errors import ArtifactError, ConfigError
from memdec.search import Nearest

_BLOCK = 2048  # keys per block of exact search: its distances stay in the cache
_ADD = 65_536  # keys per FAISS call
_CHECKPOINT = 60.0  # seconds between two marks to resume from
_EXACT = 0.999  # recall below which exact search is worth a warning; ties cost some
_POINTS = 39  # training keys per centroid below which FAISS warns
_MORE = 16  # candidates fetched beyond k, so that rounding cannot decide who is the last neighbour
_TOKENS = 1 << 22  # tokens per block of a count, which NumPy takes as 64-bit integers
_SAME_TOKEN = 256  # most positions of an input token that are all candidates for its queries
_TEMPERATURES = (1.0, 16.0)  # of the total variation in the manifest
_Pair = tuple[NDArray[np.float32], NDArray[np.int64]]


def run(
    datastore: Path | Sequence[Path],
    out: Path,
    settings: IndexSettings,
    device: torch.device | None = None,
) -> None:
    """Train and fill the index over all keys, and measure how near to exact its search is.

    `device`: of k-means and search; None for a GPU where there is one.
    """
    store = Datastore(datastore)
    _check(store, settings)
    with artifacts.building(out, "index", settings, {"datastore": store.recipe}) as build:
        if build is None:
            return
        if settings.kind.startswith("ivf"):
            _train(store, out, settings, device)
        facts = _fill(store, out, settings, build.work, device)
        build.facts.update(keys=store.n, width=store.width, bytes_per_key=sum(_sizes(out)) / store.n, **facts)
        build.facts["device"] = devices.described(search_device(device))


def _sizes(out: Path) -> list[int]:
    return [path.stat().st_size for path in (out / "codes.npy", out / "trained.safetensors") if path.exists()]


def _check(store: Datastore, settings: IndexSettings) -> None:
    """Everything that would fail, or be worthless, after hours of work."""
    kind, d, n = settings.kind, store.width, store.n
    if settings.opq and kind != "ivfpq":
        raise ConfigError(f"index: expected opq with kind ivfpq alone, found kind {kind}; set `opq: false`")
    if kind in ("exact", "flat"):
        if not store.parts:
            raise ConfigError(
                f"index: expected stored keys for kind {kind}, found a streamed datastore; use kind ivfpq or ivfflat"
            )
        if kind == "flat":
            resources.check_memory(4.0 * n * d, "index of kind flat", "use kind exact or ivfpq")
        return
    sample = min(settings.sample, n)
    if kind == "ivfpq" and d % settings.code_size:
        fits = [m for m in range(1, d + 1) if d % m == 0]
        near = sorted(sorted(fits, key=lambda m: abs(m - settings.code_size))[:3])
        raise ConfigError(
            f"index: expected a code_size that divides the key width {d}, found {settings.code_size}; nearest: "
            f"{', '.join(map(str, near))}"
        )
    least = max(settings.centroids, 256 if kind == "ivfpq" else 1)
    if sample < least:
        raise ConfigError(
            f"index: expected at least {least} training keys for {settings.centroids} centroids, found {sample}; lower "
            "'centroids', raise 'sample', or use kind exact"
        )
    if sample < _POINTS * settings.centroids:
        warnings.warn(
            f"index: {sample} training keys for {settings.centroids} centroids; at least {_POINTS * settings.centroids} "
            "are usual, fewer make worse cells",
            stacklevel=2,
        )
    code = _code_bytes(store, settings)
    # In memory a key has its code and a 64-bit position; while training, the sample lies there in float32.
    resources.check_memory(
        max(n * (code + 8.0), 8.0 * sample * d), f"index of kind {kind}", "lower 'sample' or 'code_size'"
    )


def _code_bytes(store: Datastore, settings: IndexSettings) -> int:
    return settings.code_size if settings.kind == "ivfpq" else store.width * _flat_type(store)[1]


def _flat_type(store: Datastore) -> tuple[Any, int]:
    """Scalar quantiser that keeps keys as they are on disk, and its bytes per dimension."""
    kinds = faiss.ScalarQuantizer
    return {"float16": (kinds.QT_fp16, 2), "bfloat16": (kinds.QT_bf16, 2), "float32": (None, 4)}[store.settings.dtype]


# --- an IVF index and its parts -----------------------------------------------------------------------------------


def _train(store: Datastore, out: Path, settings: IndexSettings, device: torch.device | None) -> None:
    """Write `trained.safetensors`, unless a killed run has."""
    path = out / "trained.safetensors"
    if _is_trained(path, store, settings):
        return
    _, keys = store.sample(settings.sample, settings.seed)
    trained: dict[str, NDArray[Any]] = {}
    if settings.opq:
        opq = faiss.OPQMatrix(store.width, settings.code_size)
        codebooks = faiss.ProductQuantizer(store.width, settings.code_size, 8)
        codebooks.cp.min_points_per_centroid = 1  # said before, in our words
        opq.pq = codebooks
        rng = np.random.default_rng(settings.seed)
        some = rng.choice(len(keys), min(len(keys), 256 * 256), replace=False)
        opq.train(np.ascontiguousarray(keys[np.sort(some)]))
        trained["rotation"] = faiss.vector_to_array(opq.A).reshape(store.width, store.width)
        keys = _rotate(keys, trained)
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
        index = _empty(store, settings, trained)
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


def _n_gpus(device: torch.device | None) -> int:
    """GPUs that FAISS may use."""
    on_gpu = hasattr(faiss, "index_cpu_to_all_gpus") and search_device(device).type == "cuda"
    return faiss.get_num_gpus() if on_gpu else 0


def _rotate(keys: NDArray[np.float32], trained: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
    if "rotation" not in trained:
        return np.ascontiguousarray(keys)
    return np.ascontiguousarray(keys @ trained["rotation"].T)


def _empty(store: Datastore, settings: IndexSettings, trained: dict[str, NDArray[Any]]) -> Any:
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
        kind, _ = _flat_type(store)
        index = (
            faiss.IndexIVFFlat(cells, store.width, n_cells)
            if kind is None
            else faiss.IndexIVFScalarQuantizer(cells, store.width, n_cells, kind, faiss.METRIC_L2, False)
        )
        index.is_trained = True
    return index


def _fill(
    store: Datastore, out: Path, settings: IndexSettings, work: Path, device: torch.device | None
) -> dict[str, Any]:
    """One pass over all keys: write the codes, and find the true neighbours of the check's queries on the way."""
    own, queries = store.sample(min(settings.check_queries, store.n), settings.seed + 1)
    neighbours = min(settings.check_neighbours, store.n - 1)
    truth = Nearest(torch.from_numpy(queries).double(), neighbours + 1)
    trained, encoder, codes = {}, None, None
    if settings.kind.startswith("ivf"):
        trained = load_file(out / "trained.safetensors")
        encoder = _empty(store, settings, trained)
    mark, done = work / "filled.safetensors", 0
    shape = (store.n, encoder.sa_code_size()) if encoder is not None else (0, 0)
    if mark.is_file() and (encoder is None or is_array(out / "codes.npy", np.dtype(np.uint8), shape)):
        state = load_file(mark)
        done = int(state.pop("done")[0])
        truth.restore(state)
    if encoder is not None:
        if not done:
            resources.check_disk(out, shape[0] * shape[1], "the codes")
            np.lib.format.open_memmap(out / "codes.npy", mode="w+", dtype=np.uint8, shape=shape)
        codes = np.lib.format.open_memmap(out / "codes.npy", mode="r+")
    last = time.monotonic()
    bar = tqdm(total=store.n, initial=done, desc="index", unit="key", unit_scale=True, mininterval=2)
    for first, keys in store.blocks(done, store.n, _ADD):
        if encoder is not None and codes is not None:
            codes[first : first + len(keys)] = encoder.sa_encode(_rotate(keys, trained))
        for low in range(0, len(keys), _BLOCK):
            truth.update(torch.from_numpy(keys[low : low + _BLOCK]), first + low)
        bar.update(len(keys))
        if time.monotonic() - last > _CHECKPOINT:
            if codes is not None:
                codes.flush()
            part = mark.with_suffix(".part")
            save_file({**truth.state(), "done": np.array([first + len(keys)])}, part)
            part.replace(mark)
            last = time.monotonic()
    bar.close()
    if codes is not None:
        codes.flush()
    sq_dist, ids = truth.result()
    true = knn.drop_self(sq_dist.numpy(), ids.numpy(), own, neighbours)
    return {
        "check": {
            "queries": len(own),
            "neighbours": neighbours,
            "nprobe": _measure(store, out, settings, queries, own, true, device),
        }
    }


def _measure(
    store: Datastore,
    out: Path,
    settings: IndexSettings,
    queries: NDArray[np.float32],
    own: NDArray[np.int64],
    true: _Pair,
    device: torch.device | None,
) -> dict[str, Any]:
    """Recall and total variation of the filled index against the true neighbours, by nprobe and kind of distances."""
    searcher, neighbours = Searcher(store, settings, out, device), true[1].shape[1]
    results: dict[str, Any] = {}
    cells = sorted({min(nprobe, settings.centroids) for nprobe in settings.check_nprobe})
    for nprobe in cells if settings.kind.startswith("ivf") else ["all"]:
        if isinstance(nprobe, int):
            searcher.set_nprobe(nprobe)
        results[str(nprobe)] = {}
        for name, released in (("rescored", False), ("released", True)):
            if released or store.parts:
                near = searcher.search(queries, neighbours, own, released=released)
                results[str(nprobe)][name] = {
                    "recall": knn.recall(near[1], true[1]),
                    "total_variation": {str(t): _variation(store, near, true, t) for t in _TEMPERATURES},
                }
    if settings.kind in ("exact", "flat") and results["all"]["rescored"]["recall"] < _EXACT:
        warnings.warn(
            f"index: exact search found {results['all']['rescored']['recall']:.4f} of the true neighbours; distances between "
            "the keys are lost in float32, look at the key point",
            stacklevel=2,
        )
    return results


def _variation(store: Datastore, near: _Pair, true: _Pair, temperature: float) -> float:
    """Mean total variation between the p_kNN of two sets of neighbours; 1 for a row that has none."""
    there = np.asarray(np.isfinite(near[0]).any(1))
    ours, theirs = (_rows(store, sq_dist[there], ids[there], temperature) for sq_dist, ids in (near, true))
    return float((knn.total_variation(ours, theirs).sum() + (~there).sum()) / len(there))


def _rows(store: Datastore, sq_dist: NDArray[np.float32], ids: NDArray[np.int64], temperature: float) -> knn.SparseRows:
    values = torch.from_numpy(store.values[np.maximum(ids, 0)].astype(np.int64))
    counts, tokens, probs = (x.numpy() for x in knn.aggregate(torch.from_numpy(sq_dist), values, temperature))
    return knn.SparseRows(np.concatenate([[0], np.cumsum(counts)]), tokens, probs)


# --- search -------------------------------------------------------------------------------------------------------


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
        self._centre = np.zeros(store.width, np.float32)
        # Candidates lie anywhere: in memory they take half the time of a memory map, for its pages are small.
        in_memory = sum(keys.nbytes for _, keys in store.parts) < resources.free_memory() / 10
        self._parts = [(first, kernels.bits(np.array(keys) if in_memory else keys)) for first, keys in store.parts]
        if settings.kind == "flat":
            self._index = faiss.IndexFlatL2(store.width)
            for _, keys in tqdm(store.blocks(0, store.n, _ADD), desc="load index", unit="block", mininterval=2):
                if not self._index.ntotal:
                    self._centre = torch.from_numpy(keys).median(0).values.numpy()  # as in `Nearest`
                self._index.add(keys - self._centre)
        elif settings.kind != "exact":
            self._trained = load_file(folder / "trained.safetensors")
            self._index = _empty(store, settings, self._trained)
            codes = np.load(folder / "codes.npy", mmap_mode="r", allow_pickle=False)
            for first in tqdm(range(0, store.n, _ADD), desc="load index", unit="block", mininterval=2):
                block = np.ascontiguousarray(codes[first : first + _ADD])
                self._index.add_sa_codes(block, np.arange(first, first + len(block)))
            if store.parts:
                self._same_token = _SameToken(store.values, store.facts["vocab_size"])
        if self._index is not None and _n_gpus(device):
            options = faiss.GpuMultipleClonerOptions()
            options.shard = True
            options.useFloat16 = settings.kind == "ivfpq"  # tables of 64-byte codes fit a GPU's shared memory only so
            self._index = faiss.index_cpu_to_all_gpus(self._index, options)

    def set_nprobe(self, nprobe: int) -> None:
        """Search the nearest `nprobe` cells of an ivf index; nothing for the other kinds.

        Raises:
            ConfigError: There are fewer.
        """
        if not self.settings.kind.startswith("ivf"):
            return
        if nprobe > self.settings.centroids:
            raise ConfigError(
                f"search: expected nprobe of at most {self.settings.centroids} centroids, found {nprobe}; lower 'nprobe'"
            )
        space = faiss.GpuParameterSpace() if _n_gpus(self._device) else faiss.ParameterSpace()
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
    ) -> _Pair:
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

    def _candidates(self, queries: NDArray[np.float32], fetch: int) -> _Pair:
        if self._index is not None:
            found: _Pair = self._index.search(_rotate(queries - self._centre, self._trained), fetch)
            return found
        if (there := self.on_device) is not None:
            near, positions = there.search(torch.from_numpy(queries), fetch)
            return near.cpu().numpy(), positions.cpu().numpy()
        nearest = Nearest(torch.from_numpy(queries), fetch)
        for first, keys in self.store.blocks(0, self.store.n, _BLOCK):
            nearest.update(torch.from_numpy(keys), first)
        sq_dist, ids = nearest.result()
        return sq_dist.numpy(), ids.numpy()


def check_same(store: Datastore, folder: Path) -> artifacts.Manifest:
    """Manifest of an index that was made from the keys of a datastore.

    Raises:
        ArtifactError: The index is not whole, or of other keys.
    """
    manifest = artifacts.read(folder, "index")
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
