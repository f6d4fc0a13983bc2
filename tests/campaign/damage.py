"""The damage campaign: `python tests/campaign/damage.py [--seed N] [--only WORDS]`. It damages artefacts and reads them.

Every kind of artefact is made small, by the stages. Then one thing at a time is damaged: a bit of a file, its end, all of
it, or a fact, setting or name in a manifest. What consumes the artefact runs in a forked process. It must say in one
line what is wrong, or give exactly the answer that it gives undamaged. A table and a count are printed; exit code 1 if
anything was silent, a traceback, a hang, or killed the process.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["HF_HUB_OFFLINE"] = os.environ["TQDM_DISABLE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from making import CONTEXT, made_text, spec

from memdec import config as cfg
from memdec.artefacts import artefact, doctor
from memdec.datastore import index, passages, search, targets, teacher
from memdec.datastore import keys as datastore
from memdec.datastore.keys import Datastore
from memdec.datastore.passages import Passages
from memdec.datastore.target_rows import TargetReader
from memdec.errors import MemDecError
from memdec.harness import scores
from memdec.inference.systems import SYSTEMS, Parts
from memdec.maths.sparse_rows import SparseRows
from memdec.models import loading
from memdec.results import catalogue, tables
from memdec.settings import (
    DatastoreSettings,
    FileCorpus,
    IndexSettings,
    KnnLMSettings,
    LoraSettings,
    MemorySettings,
    ModelSpec,
    PassageSettings,
    TargetSettings,
    TeacherSettings,
    TokenizerSpec,
    TrainSettings,
    parse,
)
from memdec.tasks import rows
from memdec.text import corpora, tokens
from memdec.training import adapt_vocab, stages

LIMIT = 60  # seconds for one reading
Reading = Callable[[Path], object]  # reads a world, and returns what its answer is made of


@dataclass(frozen=True)
class Case:
    """One kind of damage.

    Attributes:
        name: What is damaged, and how.
        folder: The artefact or folder, relative to the world.
        harm: Damages that folder.
        read: What consumes it.
        small: Value of `artefact.SMALL`; 0: as if all files were large.
    """

    name: str
    folder: str
    harm: Callable[[Path], None]
    read: Reading
    small: int = artefact.SMALL


# --- the world: one small artefact of every kind ------------------------------------------------------------------


def make(world: Path) -> None:
    """Make all artefacts; a minute on one core."""
    for name, seed in (("corpus", 0), ("other", 5)):
        (world / f"{name}.txt").write_text(made_text(90, seed))
        run_corpus(world, name)
    tokens.run_tokenizer(TokenizerSpec(train_on=["made"], vocab_size=300), world / "tokenizer", [world / "corpus"])
    run_tokens(world, "tokens")
    tokens.run_tokens(world / "tokenizer", world / "other", world / "other-tokens")
    stages.run_pretrain(spec(24), world / "tokenizer", world / "tokens", world / "model", context=CONTEXT)
    stages.run_pretrain(spec(16, seed=1), world / "tokenizer", world / "tokens", world / "small", context=CONTEXT)
    plain = world / "plain"  # a model from elsewhere, which the stage `model` links
    plain.mkdir()
    for file in (world / "model").iterdir():
        if file.suffix in (".json", ".safetensors") and file.name != artefact.MANIFEST:
            shutil.copy(file, plain / file.name)
    run_linked(world)
    for name in ("lora", "memory", "finetuned", "adapted"):
        TRAINED[name](world, world / name)
    run_keys(world, world / "datastore")
    for name, kind in (("index", "ivfpq"), ("flat", "ivfflat"), ("exact", "exact")):
        run_index(world, world / name, kind)
    run_targets(world, world / "targets")
    teacher.run(world / "model", world / "tokens", world / "teacher", TeacherSettings(top=8), **WINDOW)
    passages.run(world / "tokens", world / "passages", PassageSettings(passage=16))
    write_results(world)
    store(world)
    data = world / "data" / "sst2"
    data.mkdir(parents=True)
    text = "".join(json.dumps({"text": f"it is {word}", "label": i % 2}) + "\n" for i, word in enumerate("abcdef"))
    (data / "test.jsonl").write_text(text)
    entry = {"sst2/test.jsonl": {"sha256": hashlib.sha256(text.encode()).hexdigest(), "revision": "f" * 40, "rows": 6}}
    (world / "data" / rows.SOURCES).write_text(json.dumps(entry))


WINDOW: dict[str, Any] = {"context": CONTEXT, "stride": 16}


def run_corpus(world: Path, name: str = "corpus") -> None:
    corpora.run(FileCorpus(source="files", path=str(world / f"{name}.txt"), min_bytes=200), world / name)


def run_tokens(world: Path, out: str) -> None:
    tokens.run_tokens(world / "tokenizer", world / "corpus", world / out)


def run_linked(world: Path) -> None:
    entry = ModelSpec.model_validate({"family": "t", "tokenizer": "bpe", "pretrained": str(world / "plain")})
    loading.run_pretrained(entry, world / "tokenizer", world / "linked")


def run_keys(world: Path, out: Path, model: str = "model") -> None:
    datastore.run(world / model, world / "tokens", out, DatastoreSettings(), **WINDOW)


def run_index(world: Path, out: Path, kind: str) -> None:
    numbers = {"centroids": 4, "code_size": 4, "check_queries": 8, "check_neighbours": 4, "check_nprobe": [2]}
    index.run(world / "datastore", out, IndexSettings(kind=kind, **numbers))  # type: ignore[arg-type]


def run_targets(world: Path, out: Path) -> None:
    settings = TargetSettings(neighbours=8, batch_size=64)
    targets.run(world / "datastore", world / "exact", world / "tokens", out, settings)


BRIEF = {"epochs": 0.1, "learning_rate": 1e-2}
TRAINED: dict[str, Callable[[Path, Path], None]] = {
    "finetuned": lambda world, out: stages.run_finetune(
        world / "model", world / "tokens", out, TrainSettings(**BRIEF), context=CONTEXT, seed=0
    ),
    "lora": lambda world, out: stages.run_lora(
        world / "model", world / "tokens", out, LoraSettings(rank=2, **BRIEF), context=CONTEXT, seed=0
    ),
    "memory": lambda world, out: stages.run_train(
        world / "small", world / "tokens", [], out, MemorySettings(objective="ce", **BRIEF), context=CONTEXT, seed=0
    ),
    "adapted": lambda world, out: adapt_vocab.run(
        world / "small", world / "tokenizer", out, adapt_vocab.AdaptSettings(), seed=0
    ),
}


def write_results(world: Path) -> None:
    """An evaluation and cases, as their stages write them; no model is run."""
    record = {"metric": "token_perplexity", "low": 1.0, "high": 99.0, "n": 7, "lambda": None, "seed": 0, "on": "corpus"}
    record |= {"device": "cpu", "precision": "float32"}
    records = [
        record | {"method": "base", "memory": None, "value": 41.5, "alpha": None},
        record | {"method": "MemDec", "memory": "memdec", "value": 37.25, "alpha": 0.6},
    ]
    with artefact.building(world / "evaluation", "evaluation", {"memory": "memdec", "system": "MemDec"}, {}) as build:
        if build is not None:
            artefact.write_json(world / "evaluation" / "records.json", records)
            build.facts.update(corpora_sha256={"corpus": "ab"})
    words = [{"group": "one", "text": "Returns [[it]].", "target": "it", "tokens": 1, "MemDec": 12.5, "kNN": 0.5}]
    settings = {"cases": [], "neighbours": 8, "temperature": 0.5, "nprobe": 1}
    with artefact.building(world / "cases", "cases", settings, {"base": "b", "memory": "m", "index": "i"}) as build:
        if build is not None:
            artefact.write_json(world / "cases" / "records.json", words)
            build.facts["keys"] = 1234


# --- reading ------------------------------------------------------------------------------------------------------


def plain(value: object) -> object:
    """Arrays and rows as bytes, for the digest of an answer."""
    if isinstance(value, torch.Tensor):
        return plain(value.detach().numpy())
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), value.tobytes().hex()]
    if isinstance(value, SparseRows):
        return [plain(each) for each in (value.indptr, value.tokens, value.probs)]
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value


def scratch(run: Callable[[Path], object], *names: str) -> list[bytes]:
    """Files that a stage writes into a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder) / "out")
        return [(Path(folder) / "out" / name).read_bytes() for name in names]


def text_tokens(world: Path) -> object:
    return [data.hex() for data in scratch(partial(run_tokens_to, world), "train.npy", "valid.npy")]


def run_tokens_to(world: Path, out: Path) -> None:
    tokens.run_tokens(world / "tokenizer", world / "corpus", out)


def keys_of(model: str, world: Path) -> object:
    return [data.hex() for data in scratch(lambda out: run_keys(world, out, model), "keys.npy")]


def logits(system: str, world: Path) -> object:
    parts = Parts(
        base=world / "model",
        memory=world / ("adapted" if system == "adapted" else "memory"),
        lora=world / "lora",
        dapt=world / "finetuned",
        datastore=(world / "datastore",),
        index=world / "index",
        knn_lm=KnnLMSettings(weight=0.5, neighbours=4, nprobe=4),
    )
    model = SYSTEMS["MemDec" if system == "adapted" else system].build(parts)  # type: ignore[index]
    with torch.no_grad():
        return plain(model(torch.arange(20)[None]).logits)


def neighbours(folder: str, world: Path) -> object:
    kept = Datastore(world / "datastore")
    _, queries = kept.sample(8, 3)
    searcher = search.load(kept, world / folder, 2)
    near, ids = searcher.search(queries, 6)
    return plain([near, ids, searcher.rows(torch.from_numpy(near), torch.from_numpy(ids), 1.0)])


def target_rows(folder: str, world: Path) -> object:
    n, sha = (artefact.read(world / "tokens", "tokens").facts[key]["train"] for key in ("tokens", "sha256"))
    return plain(TargetReader([world / folder], sha).rows([(0, n)]))


def best_passages(world: Path) -> object:
    found = Passages(world / "passages")
    return [found.best([number, number + 1, 270]) for number in range(0, 290, 7)]


CONFIG = {
    "scale": "t", "seeds": [0], "context": 32, "stride": 16, "domains": ["corpus"], "key_model": "g", "memory_model": "g",
    "corpora": {"corpus": {"source": "docstrings", "packages": ["stdlib"]}},
    "tokenizers": {"bpe": {"train_on": ["corpus"], "vocab_size": 300}}, "systems": ["base", "MemDec"],
    "models": {"g": {"family": "G", "tokenizer": "bpe", "architecture": "gpt2", "width": 8, "layers": 1, "heads": 1,
                     "corpus": "corpus", "train": {}}},
    "cases": [{"text": "Returns [[it]]."}],
}  # fmt: skip


def table(name: str, world: Path) -> object:
    config: cfg.Config = parse(cfg.Config, CONFIG, "config")
    cell = ("corpus", "g", 0, world / ("cases" if name == "table6" else "evaluation"))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "table.csv"
        tables.run(catalogue.table(config, name), [cell], out)
        return [out.with_suffix(end).read_text() for end in (".csv", ".md")]


def store(world: Path) -> object:
    """Scores from the store; what is missing is scored again, here by a formula."""
    found = scores.ScoreStore(world / "scores", {"setting": 1})
    values = []
    for number in range(5):
        key = scores.request_key("r", [number])
        if found.get(key) is None:
            base = np.linspace(-1, -2, 7 + number, dtype=np.float32)
            found.put(key, scores.TokenScores(base, base * 2, (0.0, 0.5)))
        kept = found.get(key)
        assert kept is not None
        values.append([kept.log_p(0.4), kept.greedy])
    found.flush()
    return plain(values)


def fetched(world: Path) -> object:
    os.environ["MEMDEC_DATA"] = str(world / "data")
    return rows.load("sst2", "sst2/test.jsonl").rows.to_list()


def again(run: Callable[[Path], None], folder: str, world: Path) -> object:
    """The files of an artefact after its stage ran once more; then nothing is left of the damage."""
    run(world)
    manifest = artefact.read(world / folder, artefact.kind_of(world / folder) or "none", whole=True)
    return {name: listed.xxh3_128 for name, listed in manifest.files.items() if name != "README.md"}


READERS: dict[str, list[Reading]] = {
    "corpus": [text_tokens],
    "tokenizer": [text_tokens],
    "tokens": [partial(keys_of, "model")],
    "model": [partial(keys_of, "model")],
    "linked": [partial(keys_of, "linked")],
    "plain": [partial(keys_of, "linked")],
    "finetuned": [partial(logits, "DAPT")],
    "lora": [partial(logits, "LoRA")],
    "memory": [partial(logits, "MemDec")],
    "adapted": [partial(logits, "adapted")],
    "datastore": [partial(neighbours, "exact"), partial(neighbours, "index")],
    "index": [partial(neighbours, "index"), partial(logits, "kNN-LM")],
    "flat": [partial(neighbours, "flat")],
    "exact": [partial(neighbours, "exact")],
    "targets": [partial(target_rows, "targets")],
    "teacher": [partial(target_rows, "teacher")],
    "passages": [best_passages],
    "evaluation": [partial(table, "memories")],
    "cases": [partial(table, "table6")],
    "scores": [store],
    "data": [fetched],
}
STAGES: dict[str, Callable[[Path], None]] = {
    "corpus": run_corpus,
    "tokens": lambda world: run_tokens(world, "tokens"),
    "linked": run_linked,
    "datastore": lambda world: run_keys(world, world / "datastore"),
    "index": lambda world: run_index(world, world / "index", "ivfpq"),
    "targets": lambda world: run_targets(world, world / "targets"),
    "evaluation": write_results,
}


# --- damage -------------------------------------------------------------------------------------------------------


def flip(place: float, bit: int, file: Path) -> None:
    data = bytearray(file.read_bytes() or b" ")
    data[min(len(data) - 1, int(place * len(data)))] ^= 1 << bit
    file.write_bytes(data)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def empty(file: Path) -> None:
    file.write_bytes(b"")


def replace(other: Path, file: Path) -> None:
    file.write_bytes(other.read_bytes())


def edit(change: Callable[[dict[str, Any]], object], folder: Path) -> None:
    """Change a manifest's JSON."""
    file = folder / artefact.MANIFEST
    said = json.loads(file.read_text())
    change(said)
    file.write_text(json.dumps(said))


def file_damage(rng: random.Random) -> list[tuple[str, Callable[[Path], None]]]:
    flips = [(f"bit at {place:g}", partial(flip, place, rng.randrange(8))) for place in (0.0, 0.5, 1.0)]
    return [*flips, ("cut", cut), ("zeros", zero), ("empty", empty), ("deleted", Path.unlink)]


def on(harm: Callable[[Path], None], name: str, folder: Path) -> None:
    harm(folder / name)


def cases(world: Path, seed: int) -> Iterator[Case]:
    rng = random.Random(seed)
    yield from cases_of_files(world, rng)
    yield from cases_of_manifests(world, rng)
    yield from cases_of_stages(world, rng)


def cases_of_files(world: Path, rng: random.Random) -> Iterator[Case]:
    """Every file of every folder that something reads: three kinds of damage, and a swap where another file fits."""
    swaps = {"tokens": "other-tokens", "corpus": "other", "memory": "small", "model": "finetuned", "targets": "teacher"}
    for folder, readers in READERS.items():
        files = sorted(file.relative_to(world / folder) for file in (world / folder).rglob("*") if file.is_file())
        for number, file in enumerate(each for each in files if each.name not in (artefact.MARK, artefact.LOCK)):
            kinds = file_damage(rng)
            # The heart of an artefact gets every kind, the small files beside it three that take turns.
            heart = file.suffix in (".npy", ".safetensors", ".parquet", ".jsonl") or file.name == "records.json"
            chosen = kinds if heart and folder not in ("passages", "adapted", "plain") else kinds[number % 2 :: 3]
            for word, harm in chosen:
                yield Case(f"{folder}/{file}: {word}", folder, partial(on, harm, str(file)), readers[0])
            if heart and folder not in ("scores", "data"):
                harm = partial(flip, 0.7, rng.randrange(8))
                name = f"{folder}/{file}: bit at 0.7, a large file"
                yield Case(name, folder, partial(on, harm, str(file)), readers[-1], small=0)
            other = world / swaps.get(folder, "") / file
            if folder in swaps and other.is_file() and other.read_bytes() != (world / folder / file).read_bytes():
                yield Case(
                    f"{folder}/{file}: swapped", folder, partial(on, partial(replace, other), str(file)), readers[0]
                )


FACTS = ("width", "positions", "begin", "end", "vocab_size", "entries", "passages", "tokens", "keys", "dtype")


def cases_of_manifests(world: Path, rng: random.Random) -> Iterator[Case]:
    """Edited facts, settings, inputs and lists of files; also with a checksum that fits, as code with a fault would write it."""
    for folder, readers in READERS.items():
        if not (world / folder / artefact.MARK).is_file():
            continue
        said = json.loads((world / folder / artefact.MANIFEST).read_text())
        edits: list[tuple[str, Callable[[dict[str, Any]], object]]] = []
        for part in ("facts", "settings", "inputs"):
            for key in rng.sample(sorted(said[part]), min(2, len(said[part]))):
                edits.append((f"{part}.{key}", partial(other_value, part, key)))
        edits.append(("kind", lambda said: said.update(kind="corpus" if said["kind"] != "corpus" else "model")))
        edits.append(
            ("files without one", lambda said: said["files"].popitem() if said["files"] else said.update(files=0))
        )
        for word, change in edits:
            yield Case(f"{folder}: edited {word}", folder, partial(edit, change), readers[0])
        # An old manifest of `cases` has only its own word for the number in the caption.
        for key in sorted(set(said["facts"]) & set(FACTS)) if folder != "cases" else []:
            for factor in (0.5, 2, 1000):
                change = partial(scaled, key, factor)
                name = f"{folder}: fact {key} x {factor:g}, signed"
                yield Case(name, folder, partial(edit, change), readers[-1])
            name = f"{folder}: no fact {key}, signed"
            yield Case(name, folder, partial(edit, partial(lost, key)), readers[-1])


def other_value(part: str, key: str, said: dict[str, Any]) -> None:
    value = said[part][key]
    said[part][key] = value + 1 if isinstance(value, int | float) else f"{value}x"


def scaled(key: str, factor: float, said: dict[str, Any]) -> None:
    value = said["facts"][key]
    said["facts"][key] = int(value * factor) + 1 if isinstance(value, int) else "float64" if key == "dtype" else {}
    said["checksum"] = artefact.signature(said)


def lost(key: str, said: dict[str, Any]) -> None:
    del said["facts"][key]
    said["checksum"] = artefact.signature(said)


def cases_of_stages(world: Path, rng: random.Random) -> Iterator[Case]:
    """Damage after which the stage itself runs again: marks, locks, leftovers, cut and lost files, broken .npy."""
    for folder, run in STAGES.items():
        repair = partial(again, run, folder)
        there = sorted(json.loads((world / folder / artefact.MANIFEST).read_text())["files"])
        there = [name for name in there if not (world / folder / name).is_symlink()]  # another source is another model
        harms: list[tuple[str, Callable[[Path], object]]] = [
            ("mark emptied", lambda path: (path / artefact.MARK).write_bytes(b"")),
            ("mark flipped", lambda path: flip(0.5, 7, path / artefact.MARK)),
            (
                "mark emptied, manifest lost",
                lambda path: [empty(path / artefact.MARK), (path / artefact.MANIFEST).unlink()],
            ),
            ("lock lost", lambda path: (path / artefact.LOCK).unlink(missing_ok=True)),
            ("manifest lost", lambda path: (path / artefact.MANIFEST).unlink()),
            ("manifest cut", lambda path: cut(path / artefact.MANIFEST)),
            ("work and temporaries left", leave),
            ("killed before the mark", lambda path: [shutil.rmtree(path), path.mkdir(), begin(path)]),
            *((f"{name} flipped", partial(on, partial(flip, 0.6, rng.randrange(8)), name)) for name in there[:4]),
            *((f"{name} lost, no manifest", partial(lose, name)) for name in there[-2:]),
        ]
        for word, harm in harms:
            yield Case(f"{folder} made again: {word}", folder, harm, repair)  # type: ignore[arg-type]


def leave(path: Path) -> None:
    """What a process leaves that is killed after it wrote the manifest."""
    (path / artefact.WORK / "checkpoint-3").mkdir(parents=True)
    (path / artefact.WORK / "rows").write_bytes(b"half")
    (path / ".records.json.4194304").write_text("half")


def begin(path: Path) -> None:
    (path / f".{artefact.MARK}.4194304").write_text("ha")
    (path / artefact.LOCK).touch()


def lose(name: str, path: Path) -> None:
    (path / artefact.MANIFEST).unlink()
    (path / name).unlink()


# --- one case -----------------------------------------------------------------------------------------------------


def answer(read: Reading, world: Path) -> str:
    return hashlib.sha256(json.dumps(plain(read(world)), default=plain, sort_keys=True).encode()).hexdigest()


def in_child(read: Reading, world: Path, small: int) -> dict[str, str]:
    """What a reading gives in a process of its own."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        for number in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        signal.alarm(LIMIT)
        artefact.SMALL = small
        said: dict[str, str] = {}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                said["answer"] = answer(read, world)
            except MemDecError as error:
                said["error"] = str(error)
            except BaseException:
                said["traceback"] = traceback.format_exc()
        said["warned"] = "; ".join(str(each.message) for each in caught if issubclass(each.category, UserWarning))
        with os.fdopen(send, "w") as pipe:
            json.dump(said, pipe)
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return {"hang" if number == signal.SIGALRM else "abort": signal.Signals(number).name}
    found: dict[str, str] = json.loads(text)
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Without the output of the stages, some of which is written by compiled code."""
    kept = [os.dup(number) for number in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in (1, 2):
            os.dup2(nowhere, number)
        yield
    finally:
        sys.stdout.flush()
        for number, old in zip((1, 2), kept, strict=True):
            os.dup2(old, number)


def verdict(case: Case, said: dict[str, str], right: str, world: Path) -> str:
    for word in ("abort", "hang", "traceback"):
        if word in said:
            return word
    if "error" in said:
        return "one line" if said["error"].strip() and "\n" not in said["error"] else "several lines"
    if said["answer"] == right:
        return "right answer"
    if case.small == 0 and doctor.run(world / case.folder)[1]:
        return "found by doctor"
    return "SILENT"


GOOD = ("one line", "right answer", "found by doctor")


def run_case(case: Case, world: Path, right: str) -> tuple[str, str]:
    """The verdict on one case, and what was said; all is as before afterwards."""
    folders = ["linked", "plain"] if case.folder == "linked" else [case.folder]  # links lead to `plain`
    for name in folders:
        shutil.copytree(world / name, world / f"kept-{name}", symlinks=True)
    try:
        case.harm(world / case.folder)
        said = in_child(case.read, world, case.small)
        return verdict(case, said, right, world), json.dumps(said)
    finally:
        for name in folders:
            shutil.rmtree(world / name, ignore_errors=True)
            (world / f"kept-{name}").rename(world / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="run only the cases whose name has these words")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="damage-") as scratch_folder:
        world, begun = Path(scratch_folder) / "world", time.monotonic()
        world.mkdir()
        with quiet():
            make(world)
        chosen = [case for case in cases(world, given.seed) if given.only in case.name]
        print(f"made everything in {time.monotonic() - begun:.0f} s; {len(chosen)} kinds of damage", flush=True)
        rights: dict[Reading, str] = {}
        verdicts: Counter[tuple[str, str]] = Counter()
        for case in chosen:
            if case.read not in rights:
                undamaged = in_child(case.read, world, case.small)
                assert "answer" in undamaged, (case.name, undamaged)
                rights[case.read] = undamaged["answer"]
        for case in chosen:
            found, said = run_case(case, world, rights[case.read])
            verdicts[case.folder, found] += 1
            if found not in GOOD:
                print(f"{found}: {case.name}: {said[-1500:]}", flush=True)
    words = [*GOOD, *sorted({word for _, word in verdicts} - set(GOOD))]
    print(f"{'':12}" + "".join(f"{word:>17}" for word in words))
    for folder in dict.fromkeys(folder for folder, _ in verdicts):
        print(f"{folder:12}" + "".join(f"{verdicts[folder, word]:17}" for word in words))
    bad = sum(n for (_, word), n in verdicts.items() if word not in GOOD)
    print(f"{len(chosen)} kinds of damage, {bad} not found, in {time.monotonic() - begun:.0f} s")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
