"""How true and how fast each index is: `python -m benchmarks.search [--out results/search.csv] [--folder build/search]`.

300,000 keys (256 wide, float16) of a four-layer GPT-2 over the documentation inside installed packages, BPE of 50,257
tokens, windows of 512, k = 1024: the setting in which the released search was measured. `random` has the weights it was
born with; `trained` has seen the text once. Recall and total variation are those of the index manifests (1,024 queries
against exact search in float64); speed is CPU time of one thread on other queries, both kinds of distances in turn, the
median of the repeats.
"""

import argparse
import csv
import os
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from memdec.artefacts import artefact
from memdec.artefacts.provenance import machine
from memdec.datastore import index, search
from memdec.datastore import keys as datastore
from memdec.settings import DatastoreSettings, DocstringCorpus, IndexSettings, ModelSpec, TokenizerSpec, TrainSettings
from memdec.text import corpora, tokens
from memdec.training import stages

COLUMNS = [
    "model", "index", "nprobe", "distances", "queries_per_s", "speed_to_released", "recall_1024", "tv_tau_1", "tv_tau_16",
    "bytes_per_token", "keys", "machine",
]  # fmt: skip
KINDS = {
    "exact": {"kind": "exact"},
    "ivfpq 4096/64": {"kind": "ivfpq"},
    "ivfpq 4096/64, opq": {"kind": "ivfpq", "opq": True},
    "ivfflat 4096": {"kind": "ivfflat"},
}
BYTES, K, CONTEXT = 1_250_000, 1024, 512
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
    """The datastores, from nothing but installed packages."""
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


def rows(model: str, keys: Path, repeats: int, n_queries: int) -> Iterator[dict[str, object]]:
    """Two rows per index: with its own distances and with exact ones."""
    store = datastore.Datastore(keys)
    own, queries = store.sample(n_queries, 7)
    for name, plain in KINDS.items():
        home = keys.with_name(f"{keys.name}-{artefact.digest(plain)[:8]}")
        torch.set_num_threads(os.cpu_count() or 1)
        index.faiss.omp_set_num_threads(os.cpu_count() or 1)
        with warnings.catch_warnings(action="ignore"):
            index.run(
                keys, home, IndexSettings.model_validate({**plain, "check_queries": 1024, "check_nprobe": [32, 128]})
            )
        torch.set_num_threads(1)
        index.faiss.omp_set_num_threads(1)
        searcher, facts = search.load(store, home), artefact.read(home, "index").facts
        for nprobe, check in facts["check"]["nprobe"].items():
            if nprobe != "all":
                searcher.set_nprobe(int(nprobe))
            seconds: dict[bool, list[float]] = {True: [], False: []}
            for _ in range(repeats):
                for released, found in seconds.items():
                    start = time.process_time()
                    searcher.search(queries, K, own, released=released)
                    found.append(time.process_time() - start)
            speed = {released: n_queries / statistics.median(found[1:]) for released, found in seconds.items()}
            for released, kind in ((True, "released"), (False, "rescored")):
                yield {
                    "model": model,
                    "index": name,
                    "nprobe": nprobe,
                    "distances": "of the index" if released else "exact",
                    "queries_per_s": f"{speed[released]:.0f}",
                    "speed_to_released": f"{speed[released] / speed[True]:.2f}",
                    "recall_1024": f"{check[kind]['recall']:.4f}",
                    "tv_tau_1": f"{check[kind]['total_variation']['1.0']:.4f}",
                    "tv_tau_16": f"{check[kind]['total_variation']['16.0']:.4f}",
                    "bytes_per_token": f"{facts['bytes_per_key']:.1f}",
                    "keys": store.n,
                    "machine": machine(),
                }


def main() -> None:
    """Measure and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build/search"), help="where what is made stays")
    parser.add_argument("--repeats", type=int, default=4, help="the first one warms up")
    parser.add_argument("--queries", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=Path("results/search.csv"))
    args = parser.parse_args()
    found = [row for model, keys in made(args.folder).items() for row in rows(model, keys, args.repeats, args.queries)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    main()
