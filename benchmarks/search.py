"""Measure each index: `python -m benchmarks.search [--out results/search.csv] [--folder build/search]`.

The datastore has 300,000 keys (256 wide, float16) of a four-layer GPT-2. The text is the documentation inside installed
packages, with a BPE of 50,257 tokens, windows of 512 and k = 1024; the released search was measured in the same
setting. Model `random` has its initial weights; `trained` was trained on the text for one epoch. `--datastore` measures
other keys instead.

`--plan cells` compares kind `cells` with FAISS at 2,048 cells (`--cells`), and with the defaults of IVFPQ: 4,096 cells.

Recall and total variation come from the index manifests (1,024 queries against exact search in float64). Speed is CPU
time of one thread, the median of the repeats. Each repeat asks for other keys, in the order of cells, as targets do.
All kinds get the same queries; FAISS searches them one by one. `speed_to_default` compares with re-ranked IVFPQ at the
same nprobe. `rows_per_s` is `memdec targets` from its start to the rows on the disk: those of one shard of eight.
"""

import argparse
import csv
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from memdec.artefacts import artefact
from memdec.artefacts.provenance import machine
from memdec.datastore import index, search, targets
from memdec.datastore import keys as datastore
from memdec.settings import (
    DatastoreSettings,
    DocstringCorpus,
    IndexSettings,
    ModelSpec,
    TargetSettings,
    TokenizerSpec,
    TrainSettings,
)
from memdec.text import corpora, tokens
from memdec.training import stages

COLUMNS = [
    "model", "index", "nprobe", "distances", "queries_per_s", "speed_to_released", "speed_to_default", "recall_1024", "tv_tau_1", "tv_tau_16",
    "bytes_per_token", "rows_per_s", "keys", "machine",
]  # fmt: skip
DEFAULT = "ivfpq 4096/64"
PLANS: dict[str, dict[str, dict[str, Any]]] = {  # the order of the queries is that of the first kind
    "search": {
        "cells {cells}": {"kind": "cells"},
        "exact": {"kind": "exact"},
        DEFAULT: {"kind": "ivfpq", "centroids": 4096},
        "ivfpq {cells}/64, opq": {"kind": "ivfpq", "opq": True},
        "ivfflat {cells}": {"kind": "ivfflat"},
    },
    "cells": {
        "cells {cells}": {"kind": "cells"},
        "ivfflat {cells}": {"kind": "ivfflat"},
        DEFAULT: {"kind": "ivfpq", "centroids": 4096},
    },
}
CELLS = {"search": 4096, "cells": 2048}
NPROBE = {"search": [32, 128], "cells": [8, 32, 34, 64]}
BYTES, K, CONTEXT = 1_250_000, 1024, 512
SHARDS, SHARD = 8, 3  # of the targets that are made end to end
GPT2 = ModelSpec(
    family="GPT-2",
    tokenizer="bpe",
    architecture="gpt2",
    width=256,
    layers=4,
    heads=4,
    corpus="part",
    train=TrainSettings(epochs=1, learning_rate=1e-3, warmup=0.1),
)


def made(folder: Path) -> dict[str, Path]:
    """Make the datastores from the text of installed packages."""
    packages = ["stdlib", "torch", "pandas", "sklearn", "networkx", "nltk"]
    text = DocstringCorpus(source="docstrings", packages=packages, max_bytes={"valid": 20_000, "test": 20_000})
    corpora.run(text, folder / "text")
    tokens.run_tokenizer(TokenizerSpec(train_on=["text"], vocab_size=50_257), folder / "bpe", [folder / "text"])
    corpora.run(text.model_copy(update={"max_bytes": {**text.max_bytes, "train": BYTES}}), folder / "part")
    tokens.run_tokens(folder / "bpe", folder / "part", folder / "tokens")
    words = artefact.read(folder / "bpe", "tokenizer")
    with artefact.building(folder / "random", "model", {"seed": 0}, {"tokenizer": words.recipe}) as build:
        if build is not None:
            from transformers import GPT2Config, GPT2LMHeadModel

            torch.manual_seed(0)
            GPT2LMHeadModel(GPT2Config(n_embd=256, n_layer=4, n_head=4)).save_pretrained(folder / "random")
            tokens.load_tokenizer(str(folder / "bpe")).save_pretrained(folder / "random")
            build.facts.update(tokenizer_sha256=words.facts["sha256"])
    stages.run_pretrain(GPT2, folder / "bpe", folder / "tokens", folder / "trained", context=CONTEXT)
    stores = {}
    for name in ("random", "trained"):
        stores[name] = folder / f"keys-{name}"
        settings = DatastoreSettings(batch_size=8)
        datastore.run(folder / name, folder / "tokens", stores[name], settings, context=CONTEXT, stride=CONTEXT)
    return stores


def rows(
    model: str, keys: Path, stream: Path, plan: str, cells: int, repeats: int, n_queries: int
) -> list[dict[str, object]]:
    """Measure the kinds of a plan over a datastore: a row for each, nprobe and kind of distances.

    Kind `cells` has exact distances alone.
    """
    store, found = datastore.Datastore(keys), []
    order, plain_speed = np.arange(store.n), {}
    for name, changes in PLANS[plan].items():
        settings = IndexSettings.model_validate(
            {"centroids": cells, **changes, "check_queries": 1024, "check_nprobe": NPROBE[plan]}
        )
        home = keys.with_name(f"{keys.name}-{artefact.digest(settings.model_dump(mode='json'))[:8]}")
        torch.set_num_threads(os.cpu_count() or 1)
        faiss.omp_set_num_threads(os.cpu_count() or 1)
        with warnings.catch_warnings(action="ignore"):
            index.run(keys, home, settings)
        torch.set_num_threads(1)
        faiss.omp_set_num_threads(1)
        searcher, facts = search.load(store, home), artefact.read(home, "index").facts
        if searcher.cells is not None:
            order = searcher.cells.order(0, store.n)
        for nprobe, check in facts["check"]["nprobe"].items():
            if nprobe != "all":
                searcher.set_nprobe(int(nprobe))
            speed = _speed(searcher, order, repeats, n_queries)
            if name == DEFAULT:
                plain_speed[nprobe] = speed[False]
            for released, kind in ((True, "released"), (False, "rescored")):
                if released and settings.kind == "cells":
                    continue
                variation = check[kind]["total_variation"][str(min(K, store.n - 1))]
                found.append(
                    {
                        "model": model,
                        "index": name.format(cells=cells),
                        "nprobe": nprobe,
                        "distances": "of the index" if released else "exact",
                        "queries_per_s": speed[released],
                        "speed_to_released": f"{speed[released] / speed[True]:.2f}",
                        "recall_1024": f"{check[kind]['recall']:.4f}",
                        "tv_tau_1": f"{variation['1']:.4f}",
                        "tv_tau_16": f"{variation['16']:.4f}",
                        "bytes_per_token": f"{facts['bytes_per_key']:.1f}",
                        "rows_per_s": "" if released else f"{_end_to_end(keys, home, stream, nprobe):.0f}",
                        "keys": store.n,
                        "machine": machine(),
                    }
                )
    for row in found:
        twin, ours = plain_speed.get(row["nprobe"]), row["queries_per_s"]
        row |= {"queries_per_s": f"{ours:.0f}", "speed_to_default": f"{ours / twin:.2f}" if twin else ""}
    return found


def _speed(searcher: search.Searcher, order: NDArray[np.int64], repeats: int, n_queries: int) -> dict[bool, float]:
    """Queries per CPU second with the index's own distances (True) and with exact ones (False)."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for repeat in range(repeats):
        low = repeat * max(0, len(order) - n_queries) // repeats
        own = np.sort(order[low : low + n_queries])
        queries = np.concatenate([next(searcher.store.blocks(at, at + 1, 1))[1].copy() for at in own.tolist()])
        for released, found in seconds.items():
            start = time.process_time()
            searcher.search(queries, min(K, searcher.store.n - 1), own, released=released)
            found.append((time.process_time() - start) / len(own))
    return {released: 1 / statistics.median(found[1:]) for released, found in seconds.items()}


def _end_to_end(keys: Path, home: Path, stream: Path, nprobe: str) -> float:
    """Rows of targets per CPU second, as `memdec targets` makes them."""
    n = datastore.Datastore(keys).n
    settings = TargetSettings(
        neighbours=min(K, n - 1), nprobe=None if nprobe == "all" else int(nprobe), shards=min(SHARDS, n)
    )
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        start = time.process_time()
        targets.run(keys, home, stream, Path(folder) / "targets", settings, shard=min(SHARD, settings.shards - 1))
        seconds = time.process_time() - start
        made_here = artefact.read(Path(folder) / "targets", "targets").facts
    return float((made_here["end"] - made_here["begin"]) / seconds)


def main() -> None:
    """Measure and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/search"), help="folder for datastores and indexes")
    parser.add_argument("--repeats", type=int, default=4, help="repeats; the first is a warm-up")
    parser.add_argument("--queries", type=int, default=4096)
    parser.add_argument("--plan", choices=PLANS, default="search", help="which kinds, and how many cells they search")
    parser.add_argument("--cells", type=int, help="cells of each index but the default one; search: 4096, cells: 2048")
    parser.add_argument("--datastore", type=Path, action="append", help="keys to measure instead; repeat")
    parser.add_argument("--tokens", type=Path, help="token stream of these keys")
    parser.add_argument("--out", type=Path, default=Path("results/search.csv"))
    args = parser.parse_args()
    if bool(args.datastore) != bool(args.tokens):
        parser.error("expected --datastore and --tokens together; give both, or none for the keys of this benchmark")
    stores = {keys.name: keys for keys in args.datastore} if args.datastore else made(args.folder)
    stream = args.tokens or args.folder / "tokens"
    cells = args.cells or CELLS[args.plan]
    found = [
        row
        for name, keys in stores.items()
        for row in rows(name, keys, stream, args.plan, cells, args.repeats, args.queries)
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    main()
