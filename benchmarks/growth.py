"""How each stage grows with its input: `python -m benchmarks.growth [--only STAGE] [--out results/growth.csv]`.

Every stage runs on 1, 4 and 16 times the same input: documentation text of installed packages, a byte-level BPE of 2,048
tokens trained on it, and a GPT-2 of two layers, 64 wide, with its initial weights. Each size is measured in a
new process with one thread, which first does the same on a small input, so that imports and compiled loops are not
counted. CPU seconds are the median of the repeats; memory is the growth of the peak during the first of them. The exponent is the slope of the line through
the logarithms of size and time: 1 means linear.

An index of fixed cells per key has 4 and 16 times the cells. Then a query compares with as many keys as before, so
targets are linear; k-means and the choice of cells are not, and their exponent is shown beside that of fixed cells.
"""

import argparse
import json
import math
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.run import peak_mb, write
from memdec.artefacts import artefact
from memdec.artefacts.provenance import machine

TIMES = (1, 4, 16)
LIMIT = 1.1  # exponent that a stage may have at most
COLUMNS = [
    "stage", "unit", *(f"{what}_{times}" for what in ("n", "cpu_s", "peak_mb") for times in TIMES), "exponent", "machine",
]  # fmt: skip
PACKAGES = ["stdlib", "torch", "pandas", "sklearn", "networkx", "nltk", "scipy", "numpy", "matplotlib"]
CONTEXT, VOCABULARY, WORDS_BYTES = 256, 2048, 1_000_000
CELLS, KEYS_PER_CELL = 64, 160  # at least 39 keys train a cell, else FAISS warns
NEIGHBOURS, NPROBE = 256, 8
REQUEST = 16  # tokens of a request in the score store

Work = Callable[[Path], None]


@dataclass(frozen=True)
class Stage:
    """A stage; `make(folder, n)` prepares an input of about n units and returns its true size and the work on it."""

    name: str
    unit: str
    n: int  # at 1x
    warm: int  # size of the run before, which is not measured
    make: Callable[[Path, int], tuple[int, Work]]


# --- inputs -----------------------------------------------------------------------------------------------------------


def _documents(folder: Path) -> Iterator[str]:
    """Documentation text of the packages as JSON Lines, shuffled, so that every size has the same mixture."""
    from memdec.settings import DocstringCorpus
    from memdec.text import corpora

    file = folder / "documents.jsonl"
    if not file.is_file():
        small = {"valid": 20_000, "test": 20_000}
        corpora.run(DocstringCorpus(source="docstrings", packages=PACKAGES, max_bytes=small), folder / "documents")
        texts = corpora.load(folder / "documents", "train")
        random.Random(0).shuffle(texts)
        artefact.write_text(file, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    with file.open(encoding="utf-8") as lines:
        yield from lines


def _text(folder: Path, name: str, sizes: Mapping[str, int]) -> dict[str, Path]:
    """A JSON Lines file for each name, of about so many bytes; no document is in two of them."""
    found = {each: folder / f"{name}-{each}.jsonl" for each in sizes}
    if not all(file.is_file() for file in found.values()):
        rest = _documents(folder)
        for each, size in sizes.items():
            lines: list[str] = []
            while size > 0:
                if (line := next(rest, None)) is None:
                    sys.exit(f"benchmarks.growth: expected {size} more bytes of documentation text, found none")
                lines.append(line)
                size -= len(line)
            artefact.write_text(found[each], "".join(lines))
    return found


def _corpus(folder: Path, n: int) -> Path:
    """A corpus of n bytes that is split here."""
    from memdec.settings import FileCorpus
    from memdec.text import corpora

    file = _text(folder, f"text-{n}", {"all": n})["all"]
    corpora.run(FileCorpus(source="files", path=str(file), min_bytes=1), folder / f"corpus-{n}")
    return folder / f"corpus-{n}"


def _words(folder: Path) -> Path:
    from memdec.settings import TokenizerSpec
    from memdec.text import tokens

    out = folder / "words"
    spec = TokenizerSpec(train_on=["text"], vocab_size=VOCABULARY)
    tokens.run_tokenizer(spec, out, [_corpus(folder, WORDS_BYTES)])
    return out


def _stream(folder: Path, corpus: Path) -> Path:
    from memdec.text import tokens

    out = folder / f"tokens-{corpus.name}"
    tokens.run_tokens(_words(folder), corpus, out)
    return out


def _model(folder: Path) -> Path:
    """A small GPT-2 with its initial weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from memdec.text import tokens

    words, out = artefact.read(_words(folder), "tokenizer"), folder / "model"
    with artefact.building(out, "model", {"seed": 0}, {"tokenizer": words.recipe}) as build:
        if build is not None:
            torch.manual_seed(0)
            shape = GPT2Config(vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=64, n_layer=2, n_head=4)
            GPT2LMHeadModel(shape).save_pretrained(out)
            tokens.load_tokenizer(str(folder / "words")).save_pretrained(out)
            build.facts.update(tokenizer_sha256=words.facts["sha256"])
    return out


def _keys(folder: Path, n: int) -> Path:
    out = folder / f"keys-{n}"
    _datastore(folder, n)[1](out)
    return out


def _index_of(folder: Path, n: int, cells: int) -> Path:
    out = folder / f"index-{n}-{cells}"
    _index(lambda _: cells, folder, n)[1](out)
    return out


# --- stages -----------------------------------------------------------------------------------------------------------


def _read(folder: Path, n: int) -> tuple[int, Work]:
    """Read, deduplicate and split text."""
    from memdec.settings import FileCorpus
    from memdec.text import corpora

    file = _text(folder, f"text-{n}", {"all": n})["all"]
    return file.stat().st_size, partial(corpora.run, FileCorpus(source="files", path=str(file), min_bytes=1))


def _tokenize(folder: Path, n: int) -> tuple[int, Work]:
    """Encode all text of a corpus."""
    from memdec.text import tokens

    corpus, words = _corpus(folder, n), _words(folder)
    size = sum(each["bytes"] for each in artefact.read(corpus, "corpus").facts["splits"].values())
    return size, partial(tokens.run_tokens, words, corpus)


def _datastore(folder: Path, n: int) -> tuple[int, Work]:
    """Compute and write keys of a text of n bytes."""
    from memdec.datastore import keys
    from memdec.settings import DatastoreSettings

    stream = _stream(folder, _corpus(folder, n))
    model, settings = _model(folder), DatastoreSettings()

    def work(out: Path) -> None:
        keys.run(model, stream, out, settings, context=CONTEXT, stride=CONTEXT // 2)

    return artefact.read(stream, "tokens").facts["tokens"]["train"], work


def _cells(n: int) -> int:
    """Cells for n keys at fixed cells per key."""
    return max(NPROBE, n // KEYS_PER_CELL)


def _index(cells: Callable[[int], int], folder: Path, n: int) -> tuple[int, Work]:
    """Train cells, assign all keys, and measure recall."""
    from memdec.datastore import index
    from memdec.settings import IndexSettings

    store = _keys(folder, n)
    size = artefact.read(store, "datastore").facts["positions"]
    settings = IndexSettings(
        kind="cells", centroids=cells(size), check_queries=64, check_neighbours=NEIGHBOURS, check_nprobe=[NPROBE]
    )
    return size, lambda out: index.run(store, out, settings)


def _targets(folder: Path, n: int) -> tuple[int, Work]:
    """Search and aggregate the neighbours of every key."""
    from memdec.datastore import targets
    from memdec.settings import TargetSettings

    store, stream = _keys(folder, n), _stream(folder, _corpus(folder, n))
    size = artefact.read(store, "datastore").facts["positions"]
    index = _index_of(folder, n, _cells(size))
    settings = TargetSettings(neighbours=NEIGHBOURS, nprobe=NPROBE)
    return size, lambda out: targets.run(store, index, stream, out, settings)


def _scores(folder: Path, n: int) -> tuple[int, Work]:
    """Put n requests into a score store, write them, and read them again."""
    from memdec.harness.scores import ScoreStore, TokenScores, request_key

    def work(out: Path) -> None:
        store = ScoreStore(out, {})
        for number in range(n):
            log_p = np.full(REQUEST, -float(number))
            store.put(request_key("request", [number]), TokenScores(log_p, log_p - 1, (0.0, 1.0)))
        store.flush()
        if len(ScoreStore(out, {})) != n:
            sys.exit(f"benchmarks.growth: expected {n} requests in {out}, found {len(ScoreStore(out, {}))}")

    return n, work


def _evaluate(folder: Path, n: int) -> tuple[int, Work]:
    """Tune a memory's weight on valid and measure the mixture on test; the memory is the base after DAPT."""
    from memdec.results import evaluate
    from memdec.settings import EvaluateSettings, FileCorpus, TrainSettings
    from memdec.text import corpora
    from memdec.training import stages

    files = _text(folder, f"evaluated-{n}", {"valid": n // 4, "test": n, "train": 20_000})
    corpus, base, memory = folder / f"evaluated-{n}", _model(folder), folder / f"memory-{n}"
    corpora.run(
        FileCorpus(source="files", paths={split: str(file) for split, file in files.items()}, min_bytes=1), corpus
    )
    stream = _stream(folder, corpus)
    stages.run_finetune(base, stream, memory, TrainSettings(epochs=1), context=CONTEXT, seed=0)
    counts = artefact.read(stream, "tokens").facts["tokens"]

    def work(out: Path) -> None:
        stride = CONTEXT // 2
        evaluate.run(base, corpus, out, EvaluateSettings(), context=CONTEXT, stride=stride, seed=0, memory=memory)

    return counts["valid"] + counts["test"], work


STAGES = [
    Stage("corpus", "bytes", 500_000, 50_000, _read),
    Stage("tokens", "bytes", 500_000, 50_000, _tokenize),
    Stage("datastore", "tokens", 37_500, 37_500, _datastore),
    Stage("index, fixed cells", "keys", 37_500, 37_500, partial(_index, lambda _: CELLS)),
    Stage("index, fixed cells per key", "keys", 37_500, 37_500, partial(_index, _cells)),
    Stage("targets, fixed cells per key", "keys", 37_500, 37_500, _targets),
    Stage("score store", "requests", 20_000, 100, _scores),
    Stage("evaluate", "tokens", 37_500, 37_500, _evaluate),
]


# --- measuring --------------------------------------------------------------------------------------------------------


def _stage(name: str) -> Stage:
    return next(stage for stage in STAGES if stage.name == name)


def prepare(name: str, folder: Path, sizes: Sequence[int]) -> None:
    """Make the inputs of a stage, in a process of its own: the memory that they take is not that of the stage."""
    for n in sizes:
        _stage(name).make(folder, n)


def measure(name: str, folder: Path, n: int, repeats: int) -> tuple[int, float, float]:
    """Size of the input, median CPU seconds, and growth of the peak memory (MB) in the first run, in this process."""
    torch.set_num_threads(1)
    stage, seconds, grown = _stage(name), [], []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        stage.make(folder, stage.warm)[1](Path(scratch) / "warm")
        size, work = stage.make(folder, n)
        for repeat in range(repeats):
            before, start = peak_mb(reset=True), time.process_time()
            work(Path(scratch) / str(repeat))
            seconds.append(time.process_time() - start)
            grown.append(peak_mb() - before)
            shutil.rmtree(Path(scratch) / str(repeat))
    return size, statistics.median(seconds), grown[0]


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of the least-squares line through log(seconds) over log(sizes)."""
    return float(np.polyfit([math.log(n) for n in sizes], [math.log(s) for s in seconds], 1)[0])


def row(stage: Stage, folder: Path, repeats: int) -> dict[str, object]:
    """Make one row of the CSV."""
    sizes = [stage.n * times for times in TIMES]
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        pool.apply(prepare, (stage.name, folder, [stage.warm, *sizes]))
        runs = [pool.apply(measure, (stage.name, folder, n, repeats)) for n in sizes]
    columns = {}
    for times, (n, seconds, grown) in zip(TIMES, runs, strict=True):
        columns |= {f"n_{times}": n, f"cpu_s_{times}": f"{seconds:.4g}", f"peak_mb_{times}": f"{grown:.0f}"}
    counts, times, _ = zip(*runs, strict=True)
    slope = f"{exponent(counts, times):.2f}"
    return {"stage": stage.name, "unit": stage.unit, **columns, "exponent": slope, "machine": machine()}


def main() -> None:
    """Measure and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=[stage.name for stage in STAGES], action="append", help="stage; repeat")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("build/growth"), help="folder for inputs, which are kept")
    parser.add_argument("--out", type=Path, default=Path("results/growth.csv"))
    args = parser.parse_args()
    # Processes that are started take these over; a thread that waits would count as work.
    os.environ.update(dict.fromkeys(["OMP_NUM_THREADS", "RAYON_NUM_THREADS", "NUMBA_NUM_THREADS"], "1"))
    args.folder.mkdir(parents=True, exist_ok=True)
    stages = [stage for stage in STAGES if args.only is None or stage.name in args.only]
    rows: list[dict[str, object]] = []
    for stage in tqdm(stages, desc="growth"):
        rows.append(row(stage, args.folder, args.repeats))
        write(args.out, COLUMNS, rows)  # so that a run that is stopped leaves what it has


if __name__ == "__main__":
    main()
