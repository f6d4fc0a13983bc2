"""Kind `cells` and FAISS by number and width of keys: `python -m benchmarks.cell_growth [--out results/cell-growth.csv]`.

The keys are synthetic: 500 clusters, float16. Tokens are drawn by Zipf's law from a vocabulary of 50,257, so that a query
has some 25 positions after the same rare token at any N. There are sqrt(N) cells, of which 8 are searched, and k = 1024.
Each size runs in a new process with one thread.

`us_per_row`: CPU time for neighbours and aggregation of a row, as the targets do them, over batches that are spread
evenly over all cells, the least of three passes. Writing is left out. `us_per_row_ivfflat`, `_ivfpq` and `_exact`: the
same with FAISS alone, as released (the same cells and nprobe; codes of 64 bytes), and with exact search, one batch of
1,024. `tv_...`: total variation of p_kNN at tau 1 against exact search, mean over 128 queries. `us_per_key`: CPU time
for the index of kind `cells`, with its check. `peak_mb`: growth of
the peak of the process's own memory while rows are made, from before the index is loaded. `keys_mb`: what a copy of the
keys takes, which is held in memory only where it is less than a tenth of what is free; it is not part of `peak_mb`.
"""

import argparse
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.cases import write_store
from benchmarks.run import write
from memdec.artefacts import artefact, resources
from memdec.artefacts.provenance import machine
from memdec.datastore import index, search, targets
from memdec.datastore.keys import Datastore
from memdec.settings import IndexSettings, TargetSettings

COLUMNS = [
    "n", "width", "cells", "nprobe", "us_per_row", "us_per_row_ivfflat", "us_per_row_ivfpq", "us_per_row_exact", "tv",
    "tv_ivfflat", "tv_ivfpq", "us_per_key", "peak_mb", "keys_mb", "machine",
]  # fmt: skip
SIZES, WIDTHS = (50_000, 300_000, 1_000_000, 3_000_000), (64, 256, 768)
CLUSTERS, VOCAB, NPROBE = 500, 50_257, 8
PER_CELL = 64  # keys that train a cell; more would take most of the time and not change a search
CHECK = 128  # queries of the total variation
BATCH, BATCHES, PASSES = 4096, 8, 3  # as targets search in cells
ROWS = 1024  # rows by exact search and by FAISS, which do not gain by more at a time


def made(n: int, width: int) -> Path:
    """A datastore of `n` synthetic keys, in a temporary folder."""
    rng = np.random.default_rng(0)
    centres = (rng.normal(size=(CLUSTERS, width)) * 0.7).astype(np.float32)
    cluster = rng.integers(0, CLUSTERS, n)
    keys = np.empty((n, width), np.float16)
    for low in range(0, n, BATCH):
        some = cluster[low : low + BATCH]
        keys[low : low + BATCH] = centres[some] + rng.standard_normal((len(some), width), np.float32)
    weights = 1 / (np.arange(VOCAB) + 2.7)
    values = np.searchsorted(np.cumsum(weights / weights.sum()), rng.random(n)).clip(max=VOCAB - 1)
    return write_store(keys, values.astype(np.uint16), VOCAB)[0]


def measure(n: int, width: int) -> dict[str, object]:
    """Make a datastore and an index, and measure a part of the rows, in this process."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    folder = made(n, width)
    cells = round(n**0.5)
    plain = {"centroids": cells, "sample": PER_CELL * cells, "check_queries": CHECK, "check_nprobe": [NPROBE]}
    start = time.process_time()
    index.run(folder, folder.parent / "index", IndexSettings.model_validate({"kind": "cells", **plain}))
    per_key = (time.process_time() - start) / n
    keys_mb = n * width * 2 / 2**20
    held = keys_mb * 2**20 < resources.free_memory() / 10  # as `search.Searcher` decides
    with _peak() as peak:
        searcher = search.load(Datastore(folder), folder.parent / "index", NPROBE)
        order, chosen, batches = searcher.cells.order(0, n), TargetSettings(), []
        for low in np.linspace(0, n - BATCH, BATCHES).astype(int).tolist():
            batches.append(order[low : low + BATCH])
        _pass(searcher, chosen, batches[:1])  # compiles
        seconds = min(_pass(searcher, chosen, batches) for _ in range(PASSES))
    faiss_alone: dict[str, object] = {}
    for kind in ("ivfflat", "ivfpq"):
        home = folder.parent / kind
        index.run(folder, home, IndexSettings.model_validate({"kind": kind, **plain}))
        faiss_alone[f"us_per_row_{kind}"] = f"{1e6 * _in_order(search.load(Datastore(folder), home, NPROBE), n):.1f}"
        faiss_alone[f"tv_{kind}"] = _variation(home, "released")
        shutil.rmtree(home)
    return {
        **faiss_alone,
        "tv": _variation(folder.parent / "index", "rescored"),
        "n": n,
        "width": width,
        "cells": cells,
        "nprobe": NPROBE,
        "us_per_row": f"{1e6 * seconds / (BATCHES * BATCH):.1f}",
        "us_per_row_exact": f"{1e6 * _in_order(search.Searcher(searcher.store, IndexSettings(kind='exact'), folder), n):.1f}",
        "us_per_key": f"{1e6 * per_key:.1f}",
        "peak_mb": f"{peak[0] - (keys_mb if held else 0):.0f}",
        "keys_mb": f"{keys_mb:.0f}",
        "machine": machine(),
    }


def _pass(searcher: search.Searcher, chosen: TargetSettings, batches: list[NDArray[np.int64]]) -> float:
    """CPU seconds for the rows of all batches."""
    start = time.process_time()
    for positions in batches:
        for _ in targets.in_cells(searcher, chosen, positions):
            pass
    return time.process_time() - start


def _in_order(searcher: search.Searcher, n: int) -> float:
    """CPU seconds for a row by exact search or FAISS alone, mean over a batch from the middle."""
    chosen = TargetSettings(released=searcher.settings.has_cells)
    if searcher.settings.has_cells:
        for _ in targets.in_order(searcher, searcher.store, chosen, 0, ROWS):  # reads the codes
            pass
    start = time.process_time()
    for _ in targets.in_order(searcher, searcher.store, chosen, n // 2, n // 2 + ROWS):
        pass
    return (time.process_time() - start) / ROWS


def _variation(folder: Path, kind: str) -> str:
    """The total variation at tau 1 that an index has measured."""
    found = artefact.read(folder, "index").facts["check"]["nprobe"][str(NPROBE)][kind]["total_variation"]["1024"]["1"]
    return f"{found:.4f}"


@contextmanager
def _peak() -> Iterator[list[float]]:
    """The growth of this process's own memory (MB) at its peak; pages of files that are mapped are the system's."""

    def now() -> float:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024

    done, found, before = threading.Event(), [0.0], now()

    def watch() -> None:
        while not done.wait(0.01):
            found[0] = max(found[0], now() - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def main() -> None:
    """Measure and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of keys")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--out", type=Path, default=Path("results/cell-growth.csv"))
    args = parser.parse_args()
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # memory of one size never counts for another
        both = [(n, width) for width in args.widths for n in args.sizes]
        rows: list[dict[str, object]] = []
        for one in tqdm(both, desc="cell growth"):
            rows.append(pool.apply(measure, one))
            write(args.out, COLUMNS, rows)  # what is there is kept if the rest is killed
        pool.close()
        pool.join()  # else the last process is ended before it has removed its temporary folder


if __name__ == "__main__":
    main()
