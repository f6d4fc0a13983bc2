"""Stage `index`: the search structure over the keys of a datastore, and the one search that all readers use.

exact: no data of its own; all keys stream past in blocks, or stay on the GPU where there is one (`device_search`).
ivfflat, ivfpq: FAISS, only the nearest cells; on all GPUs where FAISS has them. Training sees a random sample, filling
sees every key once, so a streamed datastore gives the same index as a stored one.

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
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from memdec.artefacts import artefact, devices, resources
from memdec.datastore.keys import Datastore, is_array
from memdec.datastore.search import (
    BLOCK,
    PER_CALL,
    Pair,
    Searcher,
    empty_index,
    flat_type,
    n_gpus,
    rotate,
    search_device,
)
from memdec.errors import ConfigError
from memdec.maths import knn, sparse_rows
from memdec.maths.exact_search import Nearest
from memdec.settings import IndexSettings

_CHECKPOINT = 60.0  # seconds between two marks to resume from
_EXACT = 0.999  # recall below which exact search is worth a warning; ties cost some
_POINTS = 39  # training keys per centroid below which FAISS warns
_TEMPERATURES = (1.0, 16.0)  # of the total variation in the manifest


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
    with artefact.building(out, "index", settings, {"datastore": store.recipe}) as build:
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
    if kind == "exact":
        if not store.parts:
            raise ConfigError(
                f"index: expected stored keys for kind {kind}, found a streamed datastore; use kind ivfpq or ivfflat"
            )
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
    return settings.code_size if settings.kind == "ivfpq" else store.width * flat_type(store)[1]


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
        keys = rotate(keys, trained)
    clustering = faiss.Clustering(store.width, settings.centroids)
    clustering.seed, clustering.min_points_per_centroid, clustering.verbose = settings.seed, 1, True
    cells = faiss.IndexFlatL2(store.width)
    on_gpu = faiss.index_cpu_to_all_gpus(cells) if n_gpus(device) else cells
    clustering.train(keys, on_gpu)
    centroids = faiss.vector_to_array(clustering.centroids).reshape(-1, store.width)
    # Residuals are taken from the centroids as they are on disk, so half of the bytes costs nothing.
    with np.errstate(over="ignore"):
        narrow = centroids.astype(np.float16 if store.settings.dtype == "float16" else np.float32)
    trained["centroids"] = narrow if np.isfinite(narrow).all() else centroids
    if settings.kind == "ivfpq":
        index = empty_index(store, settings, trained)
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
        encoder = empty_index(store, settings, trained)
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
    for first, keys in store.blocks(done, store.n, PER_CALL):
        if encoder is not None and codes is not None:
            codes[first : first + len(keys)] = encoder.sa_encode(rotate(keys, trained))
        for low in range(0, len(keys), BLOCK):
            truth.update(torch.from_numpy(keys[low : low + BLOCK]), first + low)
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
    true: Pair,
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
    if settings.kind == "exact" and results["all"]["rescored"]["recall"] < _EXACT:
        warnings.warn(
            f"index: exact search found {results['all']['rescored']['recall']:.4f} of the true neighbours; distances between "
            "the keys are lost in float32, look at the key point",
            stacklevel=2,
        )
    return results


def _variation(store: Datastore, near: Pair, true: Pair, temperature: float) -> float:
    """Mean total variation between the p_kNN of two sets of neighbours; 1 for a row that has none."""
    there = np.asarray(np.isfinite(near[0]).any(1))
    ours, theirs = (_rows(store, sq_dist[there], ids[there], temperature) for sq_dist, ids in (near, true))
    return float((sparse_rows.total_variation(ours, theirs).sum() + (~there).sum()) / len(there))


def _rows(
    store: Datastore, sq_dist: NDArray[np.float32], ids: NDArray[np.int64], temperature: float
) -> sparse_rows.SparseRows:
    values = torch.from_numpy(store.values[np.maximum(ids, 0)].astype(np.int64))
    counts, tokens, probs = (x.numpy() for x in knn.aggregate(torch.from_numpy(sq_dist), values, temperature))
    return sparse_rows.SparseRows(np.concatenate([[0], np.cumsum(counts)]), tokens, probs)


# --- search -------------------------------------------------------------------------------------------------------
