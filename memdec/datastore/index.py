"""Stage `index`: build the search index over the keys of a datastore and measure how exact its search is.

An exact index has no files besides its manifest. The others (`cells`, `ivfflat`, `ivfpq`) are trained on a random
sample of the keys. Then every key is added once, so a streamed datastore gives the same index as a stored one.

Output: `trained.safetensors` (centroids, codebooks, rotation) and `codes.npy` [N, bytes] (cell and code of each key;
kind `cells` has no codes).
The manifest holds recall@k against exact search in float64, and the total variation distance between both p_kNN. They
are measured on a sample of queries at several nprobe, with exact distances (rescored) and with the index's (released).
`memdec.datastore.accuracy` measures them, and finds the nprobe for a bound.
"""

import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors.numpy import load, save
from tqdm import tqdm

from memdec.artefacts import arrays, artefact, devices, resources
from memdec.datastore import accuracy, candidates
from memdec.datastore.keys import Datastore, is_array
from memdec.datastore.search import BLOCK, Searcher
from memdec.errors import ConfigError
from memdec.maths import knn
from memdec.maths.exact_search import Nearest
from memdec.settings import FEW_KEYS, IndexSettings

PER_CALL = 65_536  # keys encoded per call
_CHECKPOINT = 60.0  # seconds between two checkpoints
_EXACT = 0.999  # warn if the recall of exact search is lower; ties between distances may cost a little
MANY = 1_000_000  # keys from which an exact search of all of them by all of them takes long on a GPU
_POINTS = 39  # training keys per centroid below which FAISS warns


def run(
    datastore: Path | Sequence[Path],
    out: Path,
    settings: IndexSettings,
    device: torch.device | None = None,
) -> None:
    """Train the index, add all keys, and measure how exact its search is.

    `device` runs k-means and search; None means a GPU if there is one.
    """
    store = Datastore(datastore, device)
    settings = settings.for_size(store.n)
    _check(store, settings, device)
    stage = "cells" if settings.kind == "cells" else None
    with artefact.building(out, "index", settings, {"datastore": store.recipe}, stage=stage) as build:
        if build is None:
            return
        if settings.has_cells:
            from memdec.datastore import ivf

            ivf.train(store, out, settings, device)
        facts = _fill(store, out, settings, build.work, device)
        build.facts.update(keys=store.n, width=store.width, bytes_per_key=sum(_sizes(out)) / store.n, **facts)
        if settings.has_cells:
            build.facts["cells"] = settings.centroids
        build.facts["device"] = devices.described(devices.pick_for(device))


def _sizes(out: Path) -> list[int]:
    return [path.stat().st_size for path in (out / "codes.npy", out / "trained.safetensors") if path.exists()]


def _check(store: Datastore, settings: IndexSettings, device: torch.device | None) -> None:
    """Check beforehand what would otherwise fail, or give a useless index, after hours of work."""
    kind, d, n = settings.kind, store.width, store.n
    if settings.opq and kind != "ivfpq":
        raise ConfigError(f"index: expected opq with kind ivfpq alone, found kind {kind}; set `opq: false`")
    if kind in ("exact", "cells"):
        store.require_stored(f"use kind ivfpq or ivfflat, not {kind}")
    if kind == "exact":
        if n > (FEW_KEYS if devices.pick_for(device).type == "cpu" else MANY):
            warnings.warn(
                f"index: exact search compares each query with all {n:,} keys: targets of every position take "
                f"{2.0 * n * n * d:.1e} operations; kinds cells, ivfflat and ivfpq search the nearest cells only",
                stacklevel=2,
            )
        return
    sample = min(settings.training[1], n)
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
            "are usual, fewer give worse cells",
            stacklevel=2,
        )
    from memdec.datastore import ivf  # exact search needs no faiss

    ivf.check_gpu(store, settings, device)
    code = ivf.code_bytes(store, settings)
    # A key takes its code and a 64-bit position in memory. Training needs the sample in float32.
    resources.check_memory(
        max(n * (code + 8.0), 8.0 * sample * d), f"index of kind {kind}", "lower 'sample' or 'code_size'"
    )


def _encoder(store: Datastore, out: Path, settings: IndexSettings, device: torch.device | None) -> Any | None:
    """What gives a key its cell and code; None for exact search, which has neither."""
    if not settings.has_cells:
        return None
    from memdec.datastore import cells, ivf  # exact search needs no faiss

    if settings.kind == "cells":
        return cells.Assigner(store, settings, out, device)
    return ivf.Encoder(store, settings, out)


def _fill(
    store: Datastore, out: Path, settings: IndexSettings, work: Path, device: torch.device | None
) -> dict[str, Any]:
    """Write the codes of all keys; the same pass finds the exact neighbours of the check's queries."""
    own, queries = store.sample(min(settings.check_queries, store.n), settings.seed + 1)
    neighbours = min(settings.check_neighbours, store.n - 1)
    truth = Nearest(torch.from_numpy(queries).double(), neighbours + 1)
    encoder, codes = _encoder(store, out, settings, device), None
    mark, done, hashed = work / "filled", 0, xxhash.xxh3_128()
    shape = (store.n, encoder.code_size) if encoder is not None else (0, 0)
    data = artefact.read_mark(mark)
    if data is not None and (encoder is None or is_array(out / "codes.npy", np.dtype(np.uint8), shape)):
        state = load(data)
        n_filled, filled = int(state.pop("done")[0]), state.pop("codes").tobytes()
        if encoder is not None:
            hashed.update(np.load(out / "codes.npy", mmap_mode="r", allow_pickle=False)[:n_filled])
        if hashed.digest() == filled:
            done = n_filled
            truth.restore(state)
        else:
            hashed.reset()
    if encoder is not None:
        if not done:
            resources.check_disk(out, shape[0] * shape[1], "the codes")
            arrays.allocate(out / "codes.npy", np.uint8, shape)
        codes = np.lib.format.open_memmap(out / "codes.npy", mode="r+")
    last = time.monotonic()
    bar = tqdm(total=store.n, initial=done, desc="index", unit="key", unit_scale=True, mininterval=2)
    for first, keys in store.blocks(done, store.n, PER_CALL):
        if encoder is not None and codes is not None:
            coded = encoder.codes(keys)
            hashed.update(coded)
            codes[first : first + len(keys)] = coded
        for low in range(0, len(keys), BLOCK):
            truth.update(torch.from_numpy(keys[low : low + BLOCK]), first + low)
        bar.update(len(keys))
        if time.monotonic() - last > _CHECKPOINT:
            if codes is not None:
                codes.flush()
            digest = np.frombuffer(hashed.digest(), np.uint8)
            artefact.write_mark(mark, save({**truth.state(), "done": np.array([first + len(keys)]), "codes": digest}))
            last = time.monotonic()
    bar.close()
    if codes is not None:
        codes.flush()
    sq_dist, ids = truth.result()
    true = knn.drop_self(sq_dist.numpy(), ids.numpy(), own, neighbours)
    checked: dict[str, Any] = {"queries": len(own), "neighbours": neighbours}
    by_place = False
    if settings.kind == "cells":
        checked["same_place"] = accuracy.same_place(store, own, true)
        by_place = candidates.by_place(checked["same_place"], store.stride, settings.centroids)
    checked["nprobe"] = measured = accuracy.measure(
        Searcher(store, settings, out, device, by_place=by_place), queries, own, true
    )
    if settings.kind == "exact" and measured["all"]["rescored"]["recall"] < _EXACT:
        warnings.warn(
            f"index: exact search found {measured['all']['rescored']['recall']:.4f} of the true neighbours; float32 "
            "cannot resolve the distances between these keys, check the key point",
            stacklevel=2,
        )
    return {"check": checked, **({"by_place": by_place} if settings.kind == "cells" else {})}
