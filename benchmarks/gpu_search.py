"""Exact search on CUDA and on this machine's CPU: `python -m benchmarks.gpu_search [--out results/gpu_search.csv]`.

1,024 neighbours of a store's own keys, without themselves, among a million keys of width 768: random ones about a common
offset, float16 on disk. Queries per second of the whole search with exact distances, host to host, after a first call; on
CUDA with products in TF32 and in float32, whose neighbours are compared.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.run import write
from memdec import index
from memdec.config import DatastoreSettings, IndexSettings
from memdec.datastore import Datastore
from memdec.device_search import DeviceSearch

COLUMNS = ["search", "keys", "width", "neighbours", "queries_per_s", "times_cpu", "settled", "device"]


class Made(Datastore):
    """Random keys on disk, without the artefacts around them."""

    def __init__(self, folder: Path, n: int, width: int) -> None:
        self.folder, self.n, self.width = folder, n, width
        self.settings = DatastoreSettings(dtype="float16")
        keys = np.lib.format.open_memmap(folder / "keys.npy", mode="w+", dtype=np.float16, shape=(n, width))
        rng = np.random.default_rng(0)
        centre = rng.normal(size=width)
        for first in range(0, n, 65_536):
            block = keys[first : first + 65_536]
            block[:] = rng.standard_normal(block.shape, np.float32) + centre
        self.parts = [(0, keys)]


def rate(work: Callable[[], object], n: int) -> float:
    """Queries per second of a call with n queries, after one that is not counted."""
    work()
    begin = time.perf_counter()
    work()
    return n / (time.perf_counter() - begin)


def main() -> None:
    """Measure and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--neighbours", type=int, default=1024)
    parser.add_argument("--queries", type=int, default=32_768)
    parser.add_argument("--cpu-queries", type=int, default=1024, help="a batch of the targets on CPU")
    parser.add_argument("--out", type=Path, default=Path("results/gpu_search.csv"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu_search needs a CUDA device; found none. On CPU: make bench-search")
    rows: list[dict[str, object]] = []
    plain = {"keys": args.keys, "width": args.width, "neighbours": args.neighbours}
    with tempfile.TemporaryDirectory() as folder:
        store = Made(Path(folder), args.keys, args.width)
        queries = next(store.blocks(0, args.queries, args.queries))[1].copy()
        few, own = queries[: args.cpu_queries], np.arange(args.queries)
        searcher = index.Searcher(store, IndexSettings(), Path(folder), torch.device("cpu"))
        cpu = rate(lambda: searcher.search(few, args.neighbours, own[: len(few)]), len(few))
        cpu_name = f"{os.cpu_count()} CPUs, {torch.get_num_threads()} threads"
        rows.append({"search": "CPU", **plain, "queries_per_s": f"{cpu:.0f}", "times_cpu": 1, "device": cpu_name})
        found = []
        for tf32 in (True, False):
            there = DeviceSearch(store, torch.device("cuda"), tf32=tf32)

            def work(there: DeviceSearch = there) -> list[torch.Tensor]:
                near = there.search(torch.from_numpy(queries), args.neighbours, torch.from_numpy(own))
                return [x.cpu() for x in near]

            speed = rate(work, args.queries)
            found.append(work())
            rows.append(
                {
                    "search": "CUDA, TF32" if tf32 else "CUDA, float32",
                    **plain,
                    "queries_per_s": f"{speed:.0f}",
                    "times_cpu": f"{speed / cpu:.0f}",
                    "settled": f"{there.n_settled / there.n_searched:.2%}",
                    "device": torch.cuda.get_device_name(),
                }
            )
        if not all(torch.equal(one, other) for one, other in zip(*found, strict=True)):
            sys.exit("the neighbours in TF32 and in float32 differ")
    write(args.out, COLUMNS, rows)


if __name__ == "__main__":
    main()
