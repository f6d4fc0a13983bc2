"""Artefacts: damage of the same size, wrong facts, kills at the wrong moment, full disks, and what must not be replaced."""

import itertools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making import CONTEXT, made_text, run_memdec, sign, signed, write_store, write_tokens

from memdec.artefacts import arrays, artefact, doctor
from memdec.artefacts.resources import one_line_when_disk_is_full
from memdec.datastore import index, passages, search, target_rows, targets
from memdec.datastore import keys as datastore
from memdec.datastore.keys import Datastore
from memdec.datastore.passages import Passages
from memdec.datastore.target_rows import TargetReader
from memdec.errors import ArtifactError, CorpusError, MemDecError, ResourceError
from memdec.harness.scores import ScoreStore, TokenScores, request_key
from memdec.models import loading
from memdec.settings import (
    DatastoreSettings,
    FileCorpus,
    IndexSettings,
    LoraSettings,
    ModelSpec,
    PassageSettings,
    TargetSettings,
    TrainSettings,
)
from memdec.tasks import rows
from memdec.text import corpora, tokens

ROOT = Path(__file__).resolve().parents[2]
N = 300
NEVER = 4_194_304  # larger than any process number


def flip(file: Path, place: float = 0.6) -> None:
    """Change one bit of a file."""
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 4
    file.write_bytes(data)


def forked(work: Callable[[], object], limit: int | None = None) -> str:
    """How work ends in a process of its own: "done", the message of a MemDecError, a traceback, or "killed".

    `limit` is the largest file that the process may write: the next byte fails as on a full disk.
    """
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            work()
            said = "done"
        except MemDecError as error:
            said = str(error)
        except BaseException:
            said = traceback.format_exc()
        os.write(send, said.encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return "killed" if os.WIFSIGNALED(status) else said


def thing(path: Path, value: int = 1, *, files: int = 1, crash: str = "") -> bool:
    """Build an artefact of kind `thing`; whether it was built."""
    with artefact.building(path, "thing", {"value": value}, {}) as build:
        if build is None:
            return False
        (build.work / "checkpoint").write_text("half")
        for number in range(files):
            (path / f"{number}.txt").write_text(f"{value} " * 20)
        if crash:
            raise RuntimeError(crash)
    return True


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens, a datastore, one index of each kind, targets, and passages over a corpus; no model is run."""
    home = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    stream = write_tokens(home / "tokens", rng.integers(0, 50, N).astype(np.uint16))
    write_store(home / "store", rng.normal(size=(N, 6)).astype(np.float16), stream, vocab=50)
    store = [home / "store" / "0"]
    numbers = {"centroids": 4, "code_size": 3, "check_queries": 8, "check_neighbours": 4, "check_nprobe": [2]}
    for kind in ("exact", "cells", "ivfpq", "ivfflat"):
        index.run(store, home / kind, IndexSettings(kind=kind, **numbers))  # type: ignore[arg-type]
    chosen = TargetSettings(neighbours=9, batch_size=32)
    targets.run(store, home / "exact", stream, home / "targets", chosen)
    return home


@pytest.fixture
def copy(world: Path, tmp_path: Path) -> Path:
    """The world, to damage; paths from one artefact to another stay those of the original."""
    return Path(shutil.copytree(world, tmp_path / "world"))


def near(world: Path, kind: str) -> Any:
    store = Datastore(world / "store" / "0")
    _, queries = store.sample(8, 3)
    return search.load(store, world / kind, 2).search(queries, 6)[1]


def rows_of(world: Path) -> Any:
    sha = artefact.read(world / "tokens", "tokens").facts["sha256"]["train"]
    return TargetReader([world / "targets"], sha).rows([(0, N)]).probs


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "store/0/keys.npy": ("expected the content that was written", lambda world: near(world, "exact")),
    "tokens/train.npy": (
        "expected the content that was written",
        lambda world: tokens.load_stream(world / "tokens", "train"),
    ),
    "ivfpq/codes.npy": ("expected the content that was written", lambda world: near(world, "ivfpq")),
    "ivfpq/trained.safetensors": ("expected the content that was written", lambda world: near(world, "ivfpq")),
    "cells/codes.npy": ("expected the content that was written", lambda world: near(world, "cells")),
    "ivfflat/codes.npy": ("expected the content that was written", lambda world: near(world, "ivfflat")),
    **{
        f"targets/{name}.npy": ("expected the content that was written", rows_of)
        for name in ("indptr", "tokens", "probs")
    },
}


# --- A: damage of the same size, and wrong facts ------------------------------------------------------------------


@pytest.mark.parametrize("file", READERS)
@pytest.mark.parametrize("place", [0.3, 0.9])
def test_a_flipped_bit_is_found_by_what_reads_the_file(copy: Path, file: str, place: float) -> None:
    message, read = READERS[file]
    before = np.array(read(copy))
    flip(copy / file, place)
    with pytest.raises(ArtifactError, match=f"{re.escape(str(copy / file))}: {message}"):
        read(copy)
    flip(copy / file, place)
    np.testing.assert_array_equal(np.array(read(copy)), before)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_flipped_bit_of_a_model_is_found(base_folder: Path, short_tokens: Path, tmp_path: Path, file: str) -> None:
    shutil.copytree(base_folder, tmp_path / "model")
    flip(tmp_path / "model" / file)
    with pytest.raises(ArtifactError, match=f"{file}: expected the content that was written"):
        datastore.run(tmp_path / "model", short_tokens, tmp_path / "d", DatastoreSettings(), context=CONTEXT, stride=16)


@pytest.mark.parametrize("kind", ["exact", "cells", "ivfpq", "ivfflat"])
@pytest.mark.parametrize("fact", [{"width": 3}, {"width": 600}, {"positions": 10, "end": 10}, {"width": None}])
def test_a_wrong_fact_is_an_error_and_not_a_crash(copy: Path, kind: str, fact: dict[str, Any]) -> None:
    """With a manifest that fits its checksum only shapes can tell."""
    signed(copy / "store" / "0", **fact)
    said = forked(lambda: near(copy, kind))
    assert re.search(r"keys\.npy: expected float16 of shape \(\d+, (\d+|any)\), found|width", said), said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("folder", "fact", "message"),
    [
        ("targets", {"entries": 7}, r"tokens.npy: expected .* of shape \(7\), found"),
        ("targets", {"end": 299}, "expected shards up to position 300, found them up to 299"),
        ("targets", {"begin": "0"}, "expected positions from 'begin' to 'end'"),
        ("store/0", {"positions": 299}, "expected positions from 'begin' to 'end'"),
        ("store/0", {"vocab_size": 20}, "expected tokens below its vocabulary of 20, found"),
    ],
)
def test_wrong_counts_are_one_line(copy: Path, folder: str, fact: dict[str, Any], message: str) -> None:
    signed(copy / folder, **fact)
    with pytest.raises(ArtifactError, match=message):
        _ = near(copy, "ivfpq") if folder == "store/0" else rows_of(copy)


def test_a_missing_fact_is_one_line(copy: Path) -> None:
    file = copy / "store" / "0" / artefact.MANIFEST
    said = json.loads(file.read_text())
    del said["facts"]["width"]
    sign(file, said)
    with pytest.raises(ArtifactError, match="expected the fact 'width', found none"):
        near(copy, "exact")


def test_cells_and_codebooks_of_another_index_do_not_reach_compiled_code(copy: Path) -> None:
    for kind in ("ivfpq", "cells"):
        codes = np.load(copy / kind / "codes.npy")
        codes[7, 0] = 200
        np.save(copy / kind / "codes.npy", codes)
        signed(copy / kind)
        assert "expected cells below 4, found cell 200" in forked(lambda kind=kind: near(copy, kind))
    shutil.copy(copy / "ivfflat" / "trained.safetensors", copy / "ivfpq")
    signed(copy / "ivfpq")
    assert "expected arrays {'centroids': (4, 6), 'codebooks': (1536,)}" in forked(lambda: near(copy, "ivfpq"))


@pytest.mark.parametrize(
    "change",
    [
        lambda said: said["facts"].update(width=7),
        lambda said: said["settings"].update(dtype="float32"),
        lambda said: said["inputs"].update(model="another"),
        lambda said: said["files"].pop("keys.npy"),
        lambda said: said.update(recipe="0" * 32),
        lambda said: said.update(checksum="0" * 32),
        lambda said: said.update(checksum=None),
        lambda said: said.pop("checksum"),
    ],
)
def test_an_edited_manifest_is_an_error(copy: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = copy / "store" / "0" / artefact.MANIFEST
    said = json.loads(file.read_text())
    change(said)
    file.write_text(json.dumps(said))
    with pytest.raises(
        ArtifactError, match=r"expected the manifest as it was written|one that is .* edited \(checksum"
    ):
        Datastore(copy / "store" / "0")


def test_a_folder_of_others_is_not_called_unfinished(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        ArtifactError, match=r"expected a folder that `memdec tokenizer` made, found one that memdec did not"
    ):
        artefact.read(tmp_path, "tokenizer")


@pytest.mark.parametrize(
    "what", ["empty", "cut header", "broken header", "pickle", "archive", "objects", "huge", "Fortran"]
)
def test_an_array_that_is_none_is_one_line(copy: Path, what: str) -> None:
    file = copy / "store" / "0" / "keys.npy"
    whole = file.read_bytes()
    if what in ("pickle", "archive", "objects", "Fortran"):
        values = np.load(file)
        with file.open("wb") as out:
            if what == "archive":
                np.savez(out, values)
            elif what == "Fortran":
                np.save(out, np.asfortranarray(values))
            else:
                np.save(out, values.astype(object), allow_pickle=True)
        if what == "pickle":
            file.write_bytes(values.dumps())
    else:
        broken = whole.replace(b"'descr'", b"'desc\xff'")
        huge = whole.replace(b"(300, 6)", b"(9**99,)")
        file.write_bytes({"empty": b"", "cut header": whole[:40], "broken header": broken, "huge": huge}[what])
    signed(copy / "store" / "0")
    with pytest.raises(ArtifactError, match=r"keys\.npy: expected") as caught:
        Datastore(copy / "store" / "0")
    assert "\n" not in str(caught.value)


def test_scores_are_read_only_as_they_were_written(tmp_path: Path) -> None:
    def scored(setting: int, value: float) -> ScoreStore:
        store = ScoreStore(tmp_path, {"setting": setting})
        store.put(request_key("r", [1]), TokenScores(np.full(50, value, np.float32), None))
        store.flush()
        return store

    key = request_key("r", [1])
    one, other = scored(1, -1.0), scored(2, -2.0)
    assert one.folder is not None
    assert other.folder is not None
    (part,) = one.folder.glob("*.safetensors")
    (theirs,) = other.folder.glob("*.safetensors")
    flip(part, 0.9)  # one bit of a log-probability
    with pytest.warns(UserWarning, match="not whole, its scores are made again"):
        assert ScoreStore(tmp_path, {"setting": 1}).get(key) is None
    assert not part.exists()
    shutil.copy(theirs, one.folder)  # a whole part of another setting
    with pytest.warns(UserWarning, match="its scores are made again"):
        assert ScoreStore(tmp_path, {"setting": 1}).get(key) is None
    mine = one.folder / "mine.safetensors"
    mine.write_bytes(theirs.read_bytes())
    with pytest.warns(UserWarning, match="not of this store"):
        assert ScoreStore(tmp_path, {"setting": 1}).get(key) is None
    assert mine.exists()  # somebody's own file
    assert ScoreStore(tmp_path, {"setting": 2}).get(key) is not None


def test_fetched_rows_that_changed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "sst2" / "test.jsonl"
    artefact.write_text(file, '{"text": "good", "label": 1}\n')
    artefact.write_json(tmp_path / rows.SOURCES, {"sst2/test.jsonl": {"sha256": artefact.sha256(file)}})
    monkeypatch.setenv("MEMDEC_DATA", str(tmp_path))
    assert rows.load("sst2", "sst2/test.jsonl").rows[0]["label"] == 1
    file.write_text('{"text": "good", "label": 0}\n')
    with pytest.raises(CorpusError, match="expected the file that was fetched"):
        rows.load("sst2", "sst2/test.jsonl")
    artefact.write_json(tmp_path / rows.SOURCES, {})  # the user's own file
    assert rows.load("sst2", "sst2/test.jsonl").rows[0]["label"] == 0


def test_the_doctor_hashes_large_files_and_what_links_lead_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere.bin").write_bytes(b"weights " * 100)
    with artefact.building(tmp_path / "r" / "a", "thing", {}, {}) as build:
        assert build is not None
        (tmp_path / "r" / "a" / "weights.bin").symlink_to(tmp_path / "elsewhere.bin")
        (tmp_path / "r" / "a" / "keys.bin").write_bytes(b"keys " * 100)
    monkeypatch.setattr(artefact, "SMALL", 100)
    artefact.read(tmp_path / "r" / "a", "thing", whole=True)
    for file in (tmp_path / "elsewhere.bin", tmp_path / "r" / "a" / "keys.bin"):
        flip(file)
    artefact.read(tmp_path / "r" / "a", "thing")  # above the limit: by size
    with pytest.raises(ArtifactError, match=r"keys\.bin: expected the content"):
        artefact.read(tmp_path / "r" / "a", "thing", whole=True)
    lines, n_damaged = doctor.run(tmp_path / "r")
    assert n_damaged == 1
    assert [re.findall(r"/(\w+\.bin): expected the content", line) for line in lines] == [
        ["keys.bin"],
        ["weights.bin"],
        [],
    ]


def test_files_and_folders_are_on_the_disk_before_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    sync, move = os.fsync, Path.replace

    def seen(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    def moved(self: Path, target: Path) -> Path:
        synced.append(f"-> {target}")
        return move(self, target)

    monkeypatch.setattr(os, "fsync", seen)
    monkeypatch.setattr(Path, "replace", moved)
    thing(tmp_path / "a", files=3)
    last = synced.index(f"-> {tmp_path / 'a' / artefact.MANIFEST}")
    before = synced[:last]
    assert {str(tmp_path / "a" / f"{number}.txt") for number in range(3)} | {str(tmp_path / "a")} <= set(before)
    assert str(tmp_path / "a") in synced[last:]  # and the name of the manifest after it


# --- A: what a killed run resumes from ----------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["probs.npy", "tokens.npy", "indptr.npy", "work/rows"])
def test_targets_do_not_go_on_from_changed_rows(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    monkeypatch.setattr(target_rows, "_CHECKPOINT", 0.0)
    made = [world / "store" / "0"], world / "exact", world / "tokens"
    calls, real = [], search.Searcher.search

    def killed(self: search.Searcher, *given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(self, *given, **named)

    monkeypatch.setattr(search.Searcher, "search", killed)
    with pytest.raises(KeyboardInterrupt):
        targets.run(*made, tmp_path / "t", TargetSettings(neighbours=9, batch_size=32))
    assert (tmp_path / "t" / "work" / "rows").is_file()
    flip(tmp_path / "t" / harm, 0.5)
    targets.run(*made, tmp_path / "t", TargetSettings(neighbours=9, batch_size=32))
    for name in ("indptr", "tokens", "probs"):
        assert (tmp_path / "t" / f"{name}.npy").read_bytes() == (world / "targets" / f"{name}.npy").read_bytes()


def test_keys_do_not_go_on_from_changed_ones(
    base_folder: Path, short_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datastore, "_CHUNK", 3)
    real, calls = datastore.Forward.keys, []

    def run(out: Path) -> bytes:
        datastore.run(base_folder, short_tokens, out, DatastoreSettings(batch_size=4), context=CONTEXT, stride=16)
        return (out / "keys.npy").read_bytes()

    def killed(self: datastore.Forward, number: int) -> Any:
        calls.append(number)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return real(self, number)

    whole = run(tmp_path / "whole")
    monkeypatch.setattr(datastore.Forward, "keys", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "d")
    keys = np.lib.format.open_memmap(tmp_path / "d" / "keys.npy", mode="r+")
    keys.view(np.uint16)[70, 3] ^= 1  # in the first chunk, which is marked as finished
    keys.flush()
    assert run(tmp_path / "d") == whole
    assert calls[11:14] == [0, 1, 2]  # that chunk again
    assert calls[14] == 9  # and then what was missing


@pytest.mark.parametrize("harm", ["codes.npy", "work/filled"])
def test_an_index_does_not_go_on_from_changed_codes(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    numbers = {"centroids": 4, "code_size": 3, "check_queries": 8, "check_neighbours": 4, "check_nprobe": [2]}
    settings = IndexSettings(kind="ivfpq", **numbers)  # type: ignore[arg-type]
    monkeypatch.setattr(index, "_CHECKPOINT", 0.0)
    monkeypatch.setattr(index, "PER_CALL", 64)
    real, seen = Datastore.blocks, []

    def killed(self: Datastore, begin: int, end: int, size: int) -> Iterator[Any]:
        for first, keys in real(self, begin, end, size):
            if (size, end) == (64, N):
                seen.append(first)
                if len(seen) == 4:
                    raise KeyboardInterrupt
            yield first, keys

    monkeypatch.setattr(Datastore, "blocks", killed)
    with pytest.raises(KeyboardInterrupt):
        index.run([world / "store" / "0"], tmp_path / "i", settings)
    flip(tmp_path / "i" / harm, 0.3)
    index.run([world / "store" / "0"], tmp_path / "i", settings)
    assert seen[3:5] == [192, 0]
    assert (tmp_path / "i" / "codes.npy").read_bytes() == (world / "ivfpq" / "codes.npy").read_bytes()


# --- B: kills at the wrong moment ---------------------------------------------------------------------------------


def leave(path: Path, names: dict[str, str]) -> None:
    path.mkdir(parents=True)
    for name, text in names.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text)


@pytest.mark.parametrize(
    "left",
    [
        {".memdec.lock": ""},
        {f"..memdec.{NEVER}": "ab"},
        {f"..memdec.{NEVER}": "", ".memdec.lock": ""},
        {".memdec": ""},
        {".memdec": "\x00" * 32, "0.txt": "half", ".memdec.lock": ""},
        {".memdec": "", "work/checkpoint": "half", f".0.txt.{NEVER}": "ha"},
    ],
)
def test_a_folder_claimed_at_the_wrong_moment_is_ours(tmp_path: Path, left: dict[str, str]) -> None:
    leave(tmp_path / "a", left)
    with artefact.keeping():
        assert thing(tmp_path / "a")
    assert list(artefact.read(tmp_path / "a", "thing").files) == ["0.txt"]
    names = {file.name for file in (tmp_path / "a").iterdir()}
    assert names == {"0.txt", artefact.MANIFEST, artefact.MARK, artefact.LOCK}


@pytest.mark.parametrize(
    "mine", [{"thesis.tex": "x"}, {".notes.2024": "x"}, {".memdec.lock": "", "a.part": "x"}, {"work/model.bin": "x"}]
)
def test_the_files_of_others_are_never_deleted(tmp_path: Path, mine: dict[str, str]) -> None:
    leave(tmp_path / "a", mine)
    with pytest.raises(ArtifactError, match="found other files"):
        thing(tmp_path / "a")
    assert all((tmp_path / "a" / name).read_text() == text for name, text in mine.items())


def test_a_kill_while_work_is_removed_leaves_a_whole_artefact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            thing(tmp_path / "a")
    artefact.read(tmp_path / "a", "thing")
    assert (tmp_path / "a" / "work" / "checkpoint").exists()
    (tmp_path / "a" / f".records.json.{NEVER}").write_text("half")
    assert not thing(tmp_path / "a")  # not made again
    names = {file.name for file in (tmp_path / "a").iterdir()}
    assert names == {"0.txt", artefact.MANIFEST, artefact.MARK, artefact.LOCK}


def test_a_kill_while_old_files_are_removed_leaves_nothing_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError):
        thing(tmp_path / "a", 1, files=3, crash="killed")
    removed: list[Path] = []
    real = artefact._remove

    def killed(path: Path) -> None:
        if len(removed) == 2:
            raise KeyboardInterrupt
        removed.append(path)
        real(path)

    with monkeypatch.context() as patched:
        patched.setattr(artefact, "_remove", killed)
        with pytest.raises(KeyboardInterrupt):
            thing(tmp_path / "a", 2)
    with artefact.building(tmp_path / "a", "thing", {"value": 1}, {}) as build:  # the first recipe again
        assert build is not None
        assert {file.name for file in build.path.iterdir()} == {artefact.MARK, artefact.LOCK}


def test_temporary_files_of_dead_writers_go(tmp_path: Path) -> None:
    old, fresh, alive = (tmp_path / f".table.csv.{number}" for number in (NEVER, NEVER + 1, os.getppid()))
    for file in (old, fresh, alive):
        file.write_text("half")
    for file in (old, alive):
        os.utime(file, (0, 0))
    artefact.write_text(tmp_path / "table.csv", "whole")
    assert {file.name for file in tmp_path.iterdir()} == {"table.csv", fresh.name, alive.name}


def lock(folder: Path) -> Path:
    found = folder / ".snakemake" / "locks" / "0.output.lock"
    artefact.write_text(found, "results/table3.csv\n")
    return found


@pytest.mark.parametrize("other", ["", "here", "elsewhere"])
def test_a_stale_lock_of_snakemake_is_removed_and_that_of_a_live_one_is_not(tmp_path: Path, other: str) -> None:
    """Snakemake is a script here that says its arguments; the other one is `sleep` under that name."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "snakemake").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "bin" / "snakemake").chmod(0o755)
    (tmp_path / "bin" / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "bin" / "python3").chmod(0o755)
    folder, found = tmp_path / "run", lock(tmp_path / "run")
    process = None
    if other:
        (tmp_path / "live").mkdir()
        (tmp_path / "live" / "snakemake").symlink_to(shutil.which("sleep") or "sleep")
        where = folder if other == "here" else tmp_path
        process = subprocess.Popen([tmp_path / "live" / "snakemake", "60"], cwd=where)
    try:
        env = {**os.environ, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        command = [ROOT / "workflow" / "run.sh", folder, "--cores", "1", "--", "results/table3.csv"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    finally:
        if process is not None:
            process.kill()
            process.wait()
    assert found.exists() == (other == "here")
    assert done.stdout.split() == [
        "--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder), "--cores", "1", "--", "results/table3.csv",
    ]  # fmt: skip


def test_rules_declare_manifests_only() -> None:
    """A checkpoint in several files has no file `model.safetensors`; how many there are depends on its size."""
    text = "\n".join(path.read_text() for path in sorted((ROOT / "workflow" / "rules").glob("*.smk")))
    outputs = re.findall(r"\n    output:\n((?:        .*\n)+)", text)
    assert len(outputs) > 15
    files = {file for block in outputs for file in re.findall(r"[\w{}]+\.\w+(?=\")", block)}
    tables = {"{table}.csv", "cells.csv", "items.npz", "{table}.md", "{table}.tex", "provenance.json", "table.rst"}
    figures = {"{figure}.csv", "{figure}.svg", "{figure}.png"}
    assert files == {"claims.csv", "claims.md", "report.html", "freed.json"} | tables | figures
    artefacts = [block for block in outputs if "built(" in block]  # its manifest, or without a shared folder all of it
    assert len(artefacts) > 15
    assert all(re.fullmatch(r" +manifest=built\((?:.|\n)*\),\n", block) for block in artefacts)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_every_stage_can_run_again_where_its_manifest_is_lost(
    base_folder: Path, tokenizer_folder: Path, short_tokens: Path, tmp_path: Path
) -> None:
    """As under Snakemake, which deletes the outputs of a rule before it runs it again."""
    from memdec.training import adapt_vocab, stages

    (tmp_path / "text.txt").write_text(made_text(60, 0))
    source = tmp_path / "source"
    shutil.copytree(base_folder, source, ignore=shutil.ignore_patterns(artefact.MANIFEST, ".memdec*"))
    linked = ModelSpec.model_validate({"family": "t", "tokenizer": "bpe", "pretrained": str(source)})
    brief = {"context": CONTEXT, "seed": 0}
    settings = {"epochs": 0.1, "learning_rate": 1e-2}
    window = {"context": CONTEXT, "stride": 16}
    runs: dict[str, Callable[[Path], object]] = {
        "corpus": lambda out: corpora.run(
            FileCorpus(source="files", path=str(tmp_path / "text.txt"), min_bytes=100), out
        ),
        "tokens": lambda out: tokens.run_tokens(tokenizer_folder, tmp_path / "corpus", out),
        "linked": lambda out: loading.run_pretrained(linked, tokenizer_folder, out),
        "datastore": lambda out: datastore.run(base_folder, short_tokens, out, DatastoreSettings(), **window),  # type: ignore[arg-type]
        "index": lambda out: index.run(tmp_path / "datastore", out, IndexSettings()),
        "targets": lambda out: targets.run(
            tmp_path / "datastore", tmp_path / "index", short_tokens, out, TargetSettings(neighbours=8)
        ),
        "passages": lambda out: passages.run(short_tokens, out, PassageSettings(passage=16)),
        "adapted": lambda out: adapt_vocab.run(base_folder, tokenizer_folder, out, adapt_vocab.AdaptSettings(), seed=0),
        "finetuned": lambda out: stages.run_finetune(
            base_folder, short_tokens, out, TrainSettings(**settings), **brief
        ),  # type: ignore[arg-type]
        "lora": lambda out: stages.run_lora(base_folder, short_tokens, out, LoraSettings(rank=2, **settings), **brief),  # type: ignore[arg-type]
    }
    for name, run in runs.items():
        out = tmp_path / name
        run(out)
        kind = artefact.kind_of(out) or ""
        before = artefact.read(out, kind)
        (out / artefact.MANIFEST).unlink()
        if name == "linked":  # a link that leads nowhere any more
            (out / "config.json").unlink()
            (out / "config.json").symlink_to(tmp_path / "gone.json")
        run(out)
        after = artefact.read(out, kind)
        assert {file: listed for file, listed in after.files.items() if file != "README.md"} == {
            file: listed for file, listed in before.files.items() if file != "README.md"
        }, name
        assert after.recipe == before.recipe


def test_by_hand_only_overwrite_replaces_what_other_settings_made(
    short_tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p"
    words = ["passages", "--tokens", short_tokens, "--out", out]
    assert run_memdec(capsys, *words, "--passage", 9)[0] == 0
    before = artefact.read(out, "passages")
    assert run_memdec(capsys, *words, "--passage", 9)[0] == 0  # the same again
    code, _, text = run_memdec(capsys, *words, "--passage", 12)
    assert code == 2
    assert re.search(r"found a passages artefact made with other settings.*give --overwrite.*\n$", text)
    assert text.count("\n") == 1
    assert artefact.read(out, "passages") == before
    assert run_memdec(capsys, *words, "--passage", 12, "--overwrite")[0] == 0
    assert artefact.read(out, "passages").settings == {"passage": 12}


def test_progress_is_not_replaced_by_hand_but_a_folder_without_it_is(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        thing(tmp_path / "a", 1, crash="killed")
    with artefact.keeping():
        with pytest.raises(ArtifactError, match=r"found an unfinished thing artefact .* give --overwrite"):
            thing(tmp_path / "a", 2)
        assert (tmp_path / "a" / "work" / "checkpoint").exists()
        assert thing(tmp_path / "a", 1)
        shutil.rmtree(tmp_path / "a" / "work", ignore_errors=True)
        (tmp_path / "a" / artefact.MANIFEST).unlink()
        assert thing(tmp_path / "a", 2)  # nothing to resume from: an attempt that failed


# --- D: full disks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(122, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed"),
    ],
)
def test_every_library_s_full_disk_is_one_line(tmp_path: Path, error: Exception) -> None:
    def write() -> None:
        try:
            raise error
        finally:
            raise KeyError("on the way out")

    with (
        pytest.raises(ResourceError, match=f"{tmp_path}: expected room on the disk, found it full") as caught,
        one_line_when_disk_is_full(tmp_path),
    ):
        write()
    assert "\n" not in str(caught.value)
    with pytest.raises(KeyError), one_line_when_disk_is_full(tmp_path):
        raise KeyError("another error")


@pytest.mark.parametrize(
    "stage", ["corpus", "tokens", "passages", "datastore", "index", "targets", "finetune", "claim"]
)
def test_a_full_disk_is_one_line_and_the_next_run_goes_on(
    base_folder: Path, corpus_folder: Path, tokenizer_folder: Path, short_tokens: Path, world: Path, tmp_path: Path,
    stage: str,
) -> None:  # fmt: skip
    from memdec.training import stages

    (tmp_path / "text.txt").write_text(made_text(200, 0))
    numbers = {"centroids": 4, "code_size": 3, "check_queries": 8, "check_neighbours": 4, "check_nprobe": [2]}
    settings = TrainSettings(epochs=0.2, learning_rate=1e-2)

    def run(out: Path) -> None:
        torch.set_num_threads(1)
        store, window = [world / "store" / "0"], {"context": CONTEXT, "stride": 16}
        if stage == "corpus":
            corpora.run(FileCorpus(source="files", path=str(tmp_path / "text.txt"), min_bytes=100), out)
        elif stage == "tokens":
            tokens.run_tokens(tokenizer_folder, corpus_folder, out)
        elif stage == "passages":
            passages.run(short_tokens, out, PassageSettings(passage=16))
        elif stage == "datastore":
            datastore.run(base_folder, short_tokens, out, DatastoreSettings(), **window)  # type: ignore[arg-type]
        elif stage == "index":
            index.run(store, out, IndexSettings(kind="ivfpq", **numbers))  # type: ignore[arg-type]
        elif stage == "targets":
            targets.run(store, world / "exact", world / "tokens", out, TargetSettings(neighbours=64))
        elif stage == "finetune":
            stages.run_finetune(base_folder, short_tokens, out, settings, context=CONTEXT, seed=0)
        else:
            thing(out)

    out, limit = tmp_path / "full", {"claim": 10, "index": 1000}.get(stage, 4000)
    said = forked(lambda: run(out), limit=limit)
    assert re.match(rf"{out}.*: expected room on the disk, found it full \(.*\); free some and run", said), said
    assert "\n" not in said
    assert not (out / artefact.MANIFEST).exists()
    run(out)
    run(tmp_path / "whole")
    kind = artefact.kind_of(out) or ""
    found, whole = (artefact.read(folder, kind).files for folder in (out, tmp_path / "whole"))
    assert {name: each for name, each in found.items() if name != "README.md"} == {
        name: each for name, each in whole.items() if name != "README.md"
    }


def test_room_is_reserved_before_a_memory_map_is_written(tmp_path: Path) -> None:
    """Writing to a memory map of a full disk would kill the process."""
    arrays.allocate(tmp_path / "a.npy", np.float16, (1000, 64))
    assert (tmp_path / "a.npy").stat().st_blocks * 512 >= 128_000
    assert arrays.load(tmp_path / "a.npy", np.float16, (1000, None)).shape == (1000, 64)


def test_arrays_beyond_the_memory_are_read_without_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(8000, dtype=np.float32).reshape(1000, 8)
    np.save(tmp_path / "a.npy", values)
    plain = arrays.load(tmp_path / "a.npy", np.float32, (None, 8))
    assert arrays.scattered([plain])[0] is plain

    def advice(found: Any) -> bool:
        """Whether the map of an array has the flag of random reads."""
        place, maps = found.ctypes.data, Path("/proc/self/smaps").read_text().split("VmFlags:")
        for each, flags in itertools.pairwise(maps):
            begin, end = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) ", each, re.MULTILINE)[-1]
            if int(begin, 16) <= place < int(end, 16):
                return "rr" in flags.split("\n")[0].split()
        raise AssertionError("no map")

    monkeypatch.setattr(arrays.resources, "free_memory", lambda: 31_999)
    (found,) = arrays.scattered([plain])
    assert (advice(found), advice(plain)) == (True, False)
    np.testing.assert_array_equal(found, values)


def test_too_many_open_files_are_no_damage(tmp_path: Path) -> None:
    """The soft limit is raised where it may be; where it may not, the message does not say to delete good arrays."""
    n = 40
    for shard in range(n):
        with artefact.building(tmp_path / str(shard), "targets", {"shard": shard}, {"a": "b"}) as build:
            for name, values in (
                ("indptr", np.arange(11)),
                ("tokens", np.zeros(10, "u2")),
                ("probs", np.ones(10, "f2")),
            ):
                np.save(tmp_path / str(shard) / f"{name}.npy", values)
            assert build is not None
            build.facts.update(begin=shard * 10, end=shard * 10 + 10, entries=10, positions=n * 10, tokens_sha256="x")

    def read(fixed: bool = False) -> None:
        low, most = len(os.listdir("/proc/self/fd")) + n, resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (low, low if fixed else most))
        TargetReader([tmp_path / str(shard) for shard in range(n)], "x")

    assert forked(read) == "done"
    assert re.search(
        r"npy: expected a file that can be opened, found: Too many open files; raise `ulimit -n`$",
        forked(lambda: read(True)),
    )


def test_passages_are_checked(short_tokens: Path, tmp_path: Path) -> None:
    passages.run(short_tokens, tmp_path / "p", PassageSettings(passage=16))
    found = Passages(tmp_path / "p").best([5, 6, 7])
    for name in sorted(artefact.read(tmp_path / "p", "passages").files):
        flip(tmp_path / "p" / name)
        with pytest.raises(ArtifactError, match=f"{name}: expected the content that was written"):
            Passages(tmp_path / "p")
        flip(tmp_path / "p" / name)
    assert Passages(tmp_path / "p").best([5, 6, 7]) == found


@pytest.mark.parametrize("value", [1, 2])
def test_a_job_waits_for_the_job_that_a_killed_snakemake_left(value: int, tmp_path: Path) -> None:
    """The same settings: what that one made is taken. Others: it is replaced. By hand, it is refused."""
    code = (
        "import pathlib, sys, time; from memdec.artefacts import artefact; out = pathlib.Path(sys.argv[1])\n"
        "with artefact.building(out, 'thing', {'value': 1}, {}) as build:\n"
        "    (out / 'work').mkdir(); print('at work', flush=True); time.sleep(1); (out / 'by.txt').write_text('left')"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as left:
        assert left.stdout is not None
        assert left.stdout.readline() == "at work\n"
        with (
            artefact.keeping(),
            pytest.raises(ArtifactError, match="another process at work"),
            artefact.building(tmp_path, "thing", {"value": value}, {}),
        ):
            pass
        with artefact.waiting(), artefact.building(tmp_path, "thing", {"value": value}, {}) as build:
            assert (build is None) == (value == 1)
            if build is not None:
                (tmp_path / "by.txt").write_text("new")
    assert (tmp_path / "by.txt").read_text() == ("left" if value == 1 else "new")
    assert artefact.read(tmp_path, "thing").settings == {"value": value}
