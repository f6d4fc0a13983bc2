"""The index: what is in it, how true its search is, stored against streamed keys, kills, and what is refused early."""

import os
import shutil
import warnings
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from making import CONTEXT, signed, write_store, write_tokens
from numpy.typing import NDArray

from memdec.artefacts import artefact
from memdec.datastore import candidates, index, ivf, search
from memdec.datastore import keys as datastore
from memdec.datastore.keys import Datastore
from memdec.errors import ArtifactError, ConfigError, NumericsError, ResourceError
from memdec.settings import DatastoreSettings, IndexSettings

N, D, V = 3000, 24, 40
PQ = {
    "kind": "ivfpq",
    "centroids": 16,
    "code_size": 6,
    "check_neighbours": 50,
    "check_queries": 64,
    "check_nprobe": [2, 4],
}
KINDS: list[dict[str, Any]] = [
    {"kind": "exact", "check_neighbours": 50},
    {**PQ, "kind": "ivfflat"},
    PQ,
    {**PQ, "opq": True},
]
NAMES = ["exact", "ivfflat", "ivfpq", "opq"]
CASES = [
    pytest.param(kind, id=name, marks=[pytest.mark.slow] if name == "opq" else [])
    for kind, name in zip(KINDS, NAMES, strict=True)
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Keys in 60 clusters, in two shards; the token tells the cluster."""
    folder, rng = tmp_path_factory.mktemp("clusters"), np.random.default_rng(0)
    cluster = rng.integers(0, 60, N)
    keys = (rng.normal(size=(60, D)) * 2)[cluster] + rng.normal(size=(N, D)) * rng.uniform(0.1, 2, D)
    stream = write_tokens(folder / "tokens", (cluster % V).astype(np.uint16))
    return write_store(folder / "store", keys.astype(np.float16), stream, edges=[0, 1100, N])


def built(store: list[Path], out: Path, nprobe: int = 4, **settings: Any) -> search.Searcher:
    with warnings.catch_warnings(action="ignore"):
        index.run(store, out, IndexSettings(**settings))
    return search.load(Datastore(store), out, nprobe)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Indexes over the store that several tests read: `built` makes what is there already only once."""
    return tmp_path_factory.mktemp("indexes")


def checked(folder: Path, nprobe: str = "4") -> dict[str, Any]:
    """What the manifest says of the index's truth."""
    return artefact.read(folder, "index").facts["check"]["nprobe"][nprobe]


def brute(store: Datastore, queries: NDArray[np.float32], neighbours: int, own: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions by distance in float64, ties by position."""
    keys = np.concatenate([block.copy() for _, block in store.blocks(0, store.n, 500)]).astype(np.float64)
    sq_dist = ((queries[:, None].astype(np.float64) - keys[None]) ** 2).sum(-1).astype(np.float32)
    sq_dist[np.arange(len(own))[own >= 0], own[own >= 0]] = np.inf
    return np.argsort(sq_dist, axis=1, kind="stable")[:, :neighbours]


@pytest.mark.parametrize("settings", CASES)
def test_search_against_brute_force(store: list[Path], home: Path, settings: dict[str, Any]) -> None:
    searcher = built(store, home / NAMES[KINDS.index(settings)], **settings)
    own, queries = searcher.store.sample(60, 5)
    true = brute(searcher.store, queries, 20, own)
    sq_dist, ids = searcher.search(queries, 20, own)
    assert not (ids == own[:, None]).any()
    assert (np.diff(sq_dist, axis=1) >= 0).all()
    if settings["kind"] == "exact":
        np.testing.assert_array_equal(ids, true)
    else:
        assert np.mean([len(set(a) & set(b)) / 20 for a, b in zip(ids, true, strict=True)]) > 0.8
    check = checked(home / NAMES[KINDS.index(settings)], "4" if "ivf" in settings["kind"] else "all")
    for name in ("rescored", "released"):
        assert 0.8 < check[name]["recall"] <= 1
        assert 0 <= check[name]["total_variation"]["50"]["16"] < 0.2


@pytest.mark.parametrize("kind", ["ivfflat", "cells"])
def test_an_only_cell_holds_every_key(store: list[Path], tmp_path: Path, kind: str) -> None:
    searcher = built(store, tmp_path / "one", nprobe=1, kind=kind, centroids=1, check_queries=16, check_nprobe=[1])
    own, queries = searcher.store.sample(30, 5)
    _, ids = searcher.search(queries, 20, own)
    np.testing.assert_array_equal(ids, brute(searcher.store, queries, 20, own))


def test_queries_from_outside_keep_everything(store: list[Path], home: Path) -> None:
    searcher = built(store, home / "exact", **KINDS[0])
    own, queries = searcher.store.sample(30, 5)
    sq_dist, ids = searcher.search(queries, 20)
    np.testing.assert_array_equal(ids, brute(searcher.store, queries, 20, np.full(30, -1)))
    np.testing.assert_array_equal(ids[:, 0], own)
    assert (sq_dist[:, 0] == 0).all()
    every, _ = searcher.search(queries[:2], N)  # as many as there are
    assert np.isfinite(every).all()


@pytest.mark.slow
def test_fault_3_search_runs_without_a_gpu(store: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ivf, "_n_gpus", lambda device: 0)
    for settings, name in zip(KINDS, NAMES, strict=True):
        _, ids = built(store, tmp_path / name, **settings).search(np.zeros((2, D), np.float32), 5)
        assert (ids >= 0).all()


def test_fault_8_exact_distances_give_truer_rows(store: list[Path], home: Path) -> None:
    searcher = built(store, home / "ivfpq", **PQ)
    own, queries = searcher.store.sample(60, 5)
    _, ids = searcher.search(queries, 20, own)
    again, _ = searcher.search(queries, 20, own)
    keys = np.concatenate([block.copy() for _, block in searcher.store.blocks(0, N, 500)])
    np.testing.assert_allclose(again, ((queries[:, None] - keys[ids]) ** 2).sum(-1), rtol=1e-5)
    check = checked(home / "ivfpq")
    for tau in ("1", "16"):
        by = {name: check[name]["total_variation"]["50"][tau] for name in ("rescored", "released")}
        assert by["rescored"] < 0.5 * by["released"]


def test_the_measured_quality_is_what_it_says(store: list[Path], home: Path) -> None:
    """Recall and total variation again, in plain loops over the rows."""
    searcher = built(store, home / "ivfpq", **PQ)
    facts, check = artefact.read(home / "ivfpq", "index").facts["check"], checked(home / "ivfpq")
    assert (facts["queries"], facts["neighbours"], list(facts["nprobe"])) == (64, 50, ["2", "4"])
    assert checked(home / "ivfpq", "2")["rescored"]["recall"] < check["rescored"]["recall"]
    own, queries = searcher.store.sample(64, 1)
    keys = np.concatenate([block.copy() for _, block in searcher.store.blocks(0, N, 500)]).astype(np.float64)
    values, true = searcher.store.values, brute(searcher.store, queries, 50, own)
    for name, released in (("rescored", False), ("released", True)):
        sq_dist, ids = searcher.search(queries, 50, own, released=released)
        recall, variation = [], []
        for row in range(64):
            recall.append(len(set(ids[row]) & set(true[row])) / 50)
            exact = ((keys[true[row]] - queries[row]) ** 2).sum(1)
            p, q = (
                np.bincount(values[at], np.exp(-(d.astype(float) - d.min()) / 16), V)
                for d, at in ((sq_dist[row], ids[row]), (exact, true[row]))
            )
            variation.append(np.abs(p / p.sum() - q / q.sum()).sum() / 2)
        assert check[name]["recall"] == pytest.approx(np.mean(recall), abs=1e-9)
        assert check[name]["total_variation"]["50"]["16"] == pytest.approx(np.mean(variation), abs=1e-5)


def test_what_is_fetched_is_what_is_needed_and_no_more_than_a_gpu_gives(
    store: list[Path], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searcher = built(store, home / "ivfpq", **PQ)
    own, queries = searcher.store.sample(5, 2)
    fetched, real = [], ivf.IvfIndex._check_gpu
    monkeypatch.setattr(ivf.IvfIndex, "_check_gpu", lambda self, what, n: fetched.append(n) or real(self, what, n))
    searcher.search(queries, 20, released=True)
    searcher.search(queries, 20, own, released=True)
    assert fetched == [20, 21]  # a key may find itself
    monkeypatch.setattr(searcher._ivf, "_on_gpu", True)
    with pytest.raises(
        ConfigError, match="expected at most 2048, which is FAISS's limit on a GPU, found 2049; lower it"
    ):
        searcher.search(queries, 2048, own, released=True)
    with pytest.raises(ConfigError, match="nprobe: expected at most 2048"):
        searcher._ivf.set_nprobe(4096)


def test_what_faiss_refuses_on_a_gpu_is_said_before_the_keys_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = np.random.default_rng(4).normal(size=(300, 12)).astype(np.float32)
    stream = write_tokens(tmp_path / "t", (np.arange(300) % V).astype(np.uint16))
    store = write_store(tmp_path / "s", keys, stream)
    monkeypatch.setattr(ivf, "_n_gpus", lambda device: 1)
    monkeypatch.setattr(ivf, "train", None)
    with pytest.raises(ConfigError, match=r"expected a code_size of 1, 2, .* for FAISS on a GPU, found 6; choose one"):
        index.run(store, tmp_path / "i", IndexSettings(kind="ivfpq", code_size=6, centroids=1, sample=300))
    keys_of = namedtuple("keys_of", "settings")
    with pytest.raises(ConfigError, match="expected keys in float16 or float32 for FAISS on a GPU, found bfloat16"):
        ivf.check_gpu(keys_of(DatastoreSettings(dtype="bfloat16")), IndexSettings(kind="ivfflat"), None)


def test_distances_of_exact_search_are_exact_with_released_too(tmp_path: Path) -> None:
    """In float32 |k|^2 - 2 q.k loses the digits of a small distance between long keys."""
    keys = (1000 + np.random.default_rng(4).normal(size=(300, 8))).astype(np.float32)
    stream = write_tokens(tmp_path / "t", (np.arange(300) % V).astype(np.uint16))
    searcher = built(write_store(tmp_path / "long", keys, stream), tmp_path / "i")
    found = [searcher.search(keys[:20], 9, np.arange(20), released=released) for released in (False, True)]
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_missing_neighbours_are_told(store: list[Path], home: Path) -> None:
    searcher = built(store, home / "ivfpq", nprobe=1, **PQ)
    own, queries = searcher.store.sample(40, 2)
    for released in (True, False):
        sq_dist, ids = searcher.search(queries, 1500, own, released=released)
        assert ((ids == -1) == np.isinf(sq_dist)).all()
        assert (ids == -1).any()
        assert (np.diff((ids == -1).astype(int), axis=1) >= 0).all()  # at the end


@given(st.lists(st.integers(0, 6), min_size=2, max_size=40), st.integers(0, 4))
def test_positions_after_the_same_rare_token(values: list[int], limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "MOST", limit)
        found = candidates.rare_tokens(np.array(values, np.uint16), 7).of(np.arange(-1, 7))
    for row, token in zip(found, range(-1, 7), strict=True):
        after = [at + 1 for at, value in enumerate(values[:-1]) if value == token]
        assert [at for at in row if at >= 0] == (after if len(after) <= limit else [])


@pytest.mark.parametrize("kind", ["ivfpq", "cells"])
def test_positions_after_the_same_rare_token_are_candidates_of_approximate_search(tmp_path: Path, kind: str) -> None:
    """Random keys in many cells of which one is searched: nothing but the token could lead to the others."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 100, 2000).astype(np.uint16)
    keys = rng.normal(size=(2000, 6)).astype(np.float32)
    store = write_store(tmp_path / "s", keys, write_tokens(tmp_path / "t", values))
    searcher = built(store, tmp_path / "i", nprobe=1, **{**PQ, "centroids": 256, "kind": kind})
    own = np.arange(1000, 1050)
    after = [np.flatnonzero(values[:-1] == values[at - 1]) + 1 for at in own]
    for found in (
        searcher.search(keys[own], 200, own),
        searcher.search(keys[own], 200, inputs=values[own - 1].astype(np.int64)),
    ):
        for row, positions in enumerate(after):
            assert set(positions) - {own[row]} <= set(found[1][row])
            there = found[1][row][found[1][row] >= 0]
            assert len(set(there)) == len(there)
    _, ids = searcher.search(keys[own], 200)  # the token is not known
    assert not all(set(positions) <= set(row) for row, positions in zip(ids, after, strict=True))


@pytest.mark.parametrize("settings", CASES)
def test_the_batch_changes_nothing(store: list[Path], home: Path, settings: dict[str, Any]) -> None:
    searcher = built(store, home / NAMES[KINDS.index(settings)], **settings)
    own, queries = searcher.store.sample(50, 5)
    whole = searcher.search(queries, 30, own)
    for size in (1, 7):
        parts = [searcher.search(queries[i : i + size], 30, own[i : i + size]) for i in range(0, 50, size)]
        for one, other in zip(whole, zip(*parts, strict=True), strict=True):
            np.testing.assert_array_equal(one, np.concatenate(other))


@pytest.fixture(scope="module")
def modes(base_folder: Path, short_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The keys of a model, stored and streamed."""
    out = {name: tmp_path_factory.mktemp("modes") / name for name in ("stored", "streamed")}
    for name, folder in out.items():
        settings = DatastoreSettings(batch_size=4, stored=name == "stored")
        datastore.run(base_folder, short_tokens, folder, settings, context=CONTEXT, stride=CONTEXT // 2)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("opq", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_streamed_and_stored_keys_give_the_same_index(modes: dict[str, Path], tmp_path: Path, opq: bool) -> None:
    settings = {**PQ, "opq": opq, "sample": 2000, "check_neighbours": 30}
    for name, folder in modes.items():
        built([folder], tmp_path / name, **settings)
    for file in ("trained.safetensors", "codes.npy"):
        assert (tmp_path / "stored" / file).read_bytes() == (tmp_path / "streamed" / file).read_bytes()
    one, other = (artefact.read(tmp_path / name, "index") for name in modes)
    assert one.recipe == other.recipe
    assert checked(tmp_path / "stored")["released"] == checked(tmp_path / "streamed")["released"]
    assert "rescored" not in checked(tmp_path / "streamed")
    search.load(Datastore(modes["streamed"]), tmp_path / "stored", 4)  # an index of one serves the other


@pytest.mark.slow
def test_streamed_mode_needs_a_code_and_little_more(modes: dict[str, Path], tmp_path: Path) -> None:
    built([modes["streamed"]], tmp_path / "i", **PQ)
    n = Datastore(modes["streamed"]).n
    bytes_on_disk = sum(f.stat().st_size for d in (modes["streamed"], tmp_path / "i") for f in d.rglob("*"))
    facts = artefact.read(tmp_path / "i", "index").facts
    assert bytes_on_disk / n <= PQ["code_size"] + 16
    assert facts["bytes_per_key"] <= bytes_on_disk / n


@pytest.mark.parametrize("settings", [KINDS[0], PQ], ids=["exact", "ivfpq"])
def test_a_killed_fill_goes_on_and_gives_the_same_index(
    store: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    monkeypatch.setattr(index, "PER_CALL", 256)
    monkeypatch.setattr(index, "BLOCK", 256)
    monkeypatch.setattr(index, "_CHECKPOINT", 0.0)
    built(store, tmp_path / "whole", **settings)
    real, seen = Datastore.blocks, []

    def killed(self: Datastore, begin: int, end: int, size: int) -> Any:
        for first, keys in real(self, begin, end, size):
            if (size, end) == (256, N):
                seen.append(first)
                if len(seen) == 6:
                    raise KeyboardInterrupt
            yield first, keys

    monkeypatch.setattr(Datastore, "blocks", killed)
    with pytest.raises(KeyboardInterrupt):
        built(store, tmp_path / "killed", **settings)
    with pytest.raises(ArtifactError, match="unfinished"):
        search.load(Datastore(store), tmp_path / "killed")
    monkeypatch.setattr(ivf, "train", lambda *_: (tmp_path / "killed" / "trained.safetensors").stat())
    built(store, tmp_path / "killed", **settings)
    assert seen[5:7] == [1280, 1280]
    one, other = (artefact.read(tmp_path / name, "index") for name in ("whole", "killed"))
    assert one == other
    for name in one.files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


@pytest.mark.slow
def test_a_raised_version_trains_and_fills_the_index_anew(
    store: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, manifest = tmp_path / "i" / "trained.safetensors", tmp_path / "i" / artefact.MANIFEST
    built(store, tmp_path / "i", **PQ)
    whole = trained.stat().st_mtime_ns
    manifest.unlink()  # as Snakemake does before it runs a rule again
    built(store, tmp_path / "i", **PQ)
    assert trained.stat().st_mtime_ns == whole  # the same version goes on where a killed run was
    for version, is_there in ((98, False), (99, True)):  # by a rule; by hand
        monkeypatch.setitem(artefact.VERSIONS, "index", version)
        if not is_there:
            manifest.unlink()
        built(store, tmp_path / "i", **PQ)
        assert artefact.read(tmp_path / "i", "index").version == version
        assert trained.stat().st_mtime_ns > whole
        whole = trained.stat().st_mtime_ns


@pytest.mark.parametrize("file", ["trained.safetensors", "codes.npy"])
def test_an_index_whose_file_was_cut_is_made_again(store: list[Path], tmp_path: Path, file: str) -> None:
    built(store, tmp_path / "i", **PQ)
    before = {path.name: path.read_bytes() for path in (tmp_path / "i").iterdir()}
    os.truncate(tmp_path / "i" / file, 500)
    built(store, tmp_path / "i", **PQ)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "i").iterdir()}


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_common_offset_costs_exact_search_nothing(tmp_path: Path, dtype: type) -> None:
    """One very large dimension, as hidden states of real models have: |k|^2 - 2 q k alone would lose neighbours."""
    keys = np.random.default_rng(0).normal(size=(1500, 16))
    keys[:, 3] += 3000
    store = write_store(tmp_path / "s", keys.astype(dtype), write_tokens(tmp_path / "t", np.zeros(1500, np.uint16)))
    searcher = built(store, tmp_path / "i", kind="exact", check_neighbours=50)
    own, queries = searcher.store.sample(300, 1)
    np.testing.assert_array_equal(searcher.search(queries, 40, own)[1], brute(searcher.store, queries, 40, own))


def test_search_that_is_not_exact_is_a_warning(
    store: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index.knn, "recall", lambda *_: 0.91)
    with pytest.warns(UserWarning, match="exact search found 0.9100 of the true neighbours"):
        index.run(store, tmp_path / "i", IndexSettings(check_neighbours=50))


def test_opq_of_keys_at_the_edge_of_float16(tmp_path: Path) -> None:
    keys = np.random.default_rng(0).normal(size=(1000, 8))
    keys[:, :6] += 40_000  # a rotation may add them up
    store = write_store(
        tmp_path / "s", keys.astype(np.float16), write_tokens(tmp_path / "t", np.zeros(1000, np.uint16))
    )
    searcher = built(store, tmp_path / "i", **{**PQ, "code_size": 4, "opq": True})
    assert (searcher.search(keys[:5].astype(np.float32), 3)[1] >= 0).all()


# --- bad input, early ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"code_size": 7}, r"expected a code_size that divides the key width 24, found 7; nearest: 4, 6, 8"),
        ({"centroids": 3001}, r"expected at least 3001 training keys for 3001 centroids, found 3000"),
        ({"kind": "ivfflat", "opq": True}, r"expected opq with kind ivfpq alone, found kind ivfflat"),
        ({"kind": "exact", "opq": True}, r"expected opq with kind ivfpq alone, found kind exact"),
        ({"sample": 200}, r"expected at least 256 training keys for 16 centroids, found 200"),
    ],
)
def test_fault_14_settings_that_cannot_work_fail_before_the_work(
    store: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("keys were read")

    monkeypatch.setattr(Datastore, "blocks", refuse)
    with pytest.raises(ConfigError, match=message):
        index.run(store, tmp_path / "i", IndexSettings(**{**PQ, **changes}))
    assert not (tmp_path / "i").exists()


def test_exact_search_of_very_many_keys_is_a_warning(
    store: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "MANY", 2999)
    settings = IndexSettings(kind="exact", check_queries=8, check_neighbours=8)
    index.run(store, tmp_path / "few", settings, torch.device("cpu"))
    monkeypatch.setattr(index, "FEW_KEYS", 2999)
    with pytest.warns(
        UserWarning, match=r"compares each query with all 3,000 keys: .* take \d\.\de\+\d+ operations; kinds cells"
    ):
        index.run(store, tmp_path / "i", settings, torch.device("cpu"))


def test_the_number_of_keys_alone_decides_what_auto_means(
    store: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to a limit exact search, above it four cells for each root of a key; the artefact is that of the stated kind."""
    checks = {"check_queries": 8, "check_neighbours": 8}
    assert IndexSettings().kind == "auto"
    for limit, stated in ((3000, {"kind": "exact"}), (2999, {"kind": "cells", "centroids": 219})):
        monkeypatch.setattr("memdec.settings.FEW_KEYS", limit)
        with warnings.catch_warnings(action="ignore"):
            index.run(store, tmp_path / f"auto-{limit}", IndexSettings(**checks))
            index.run(store, tmp_path / f"stated-{limit}", IndexSettings(**checks, **stated))
        ours, theirs = (artefact.read(tmp_path / f"{name}-{limit}", "index") for name in ("auto", "stated"))
        assert (ours.settings, ours.recipe) == (theirs.settings, theirs.recipe)
        assert ours.settings["kind"] == stated["kind"]
        assert ours.facts.get("cells") == stated.get("centroids")


def test_fault_14_few_keys_per_centroid_are_a_warning(store: list[Path], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"3000 training keys for 100 centroids; at least 3900 are usual"):
        index.run(store, tmp_path / "i", IndexSettings(**{**PQ, "centroids": 100}))


def test_fault_14_memory_is_bounded_by_blocks_and_asked_for_before(
    store: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = Datastore.blocks

    def blocks(self: Datastore, begin: int, end: int, size: int) -> Any:
        for first, keys in real(self, begin, end, size):
            seen.append(len(keys))
            yield first, keys

    monkeypatch.setattr(index, "PER_CALL", 512)
    monkeypatch.setattr(Datastore, "blocks", blocks)
    built(store, tmp_path / "i", **{**PQ, "sample": 1000})
    assert max(seen) <= 512
    monkeypatch.setattr(psutil, "virtual_memory", lambda: namedtuple("M", "available")(1000))
    for kind in ("ivfpq", "ivfflat"):
        with pytest.raises(ResourceError, match=f"index of kind {kind}: expected .* of free memory, found 1 kB"):
            index.run(store, tmp_path / kind, IndexSettings(**{**PQ, "kind": kind}))


def test_fault_14_an_index_names_the_keys_it_was_made_from(store: list[Path], tmp_path: Path) -> None:
    built(store, tmp_path / "i", **KINDS[0])
    rng = np.random.default_rng(1)
    stream = write_tokens(tmp_path / "t", np.zeros(N, np.uint16))
    other = write_store(tmp_path / "s", rng.normal(size=(N, D)).astype(np.float16), stream, model="another")
    with pytest.raises(ArtifactError, match="found one of other keys \\(another model, text or settings\\)"):
        search.load(Datastore(other), tmp_path / "i")


def test_exact_search_of_streamed_keys_is_refused(modes: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="expected stored keys, found a streamed datastore; use kind ivfpq or"):
        index.run([modes["streamed"]], tmp_path / "exact", IndexSettings(kind="exact"))
    searcher = built([modes["streamed"]], tmp_path / "i", **PQ)
    with pytest.raises(ArtifactError, match="expected stored keys, found a streamed datastore; set `released: true`"):
        searcher.search(np.zeros((1, 24), np.float32), 5)


@pytest.mark.parametrize("size", [1e17, -3e19, 1e30])
def test_keys_too_large_for_squared_distances_are_named(tmp_path: Path, size: float) -> None:
    keys = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    keys[123, 2] = size
    store = write_store(tmp_path / "s", keys, write_tokens(tmp_path / "t", np.zeros(300, np.uint16)))
    with pytest.raises(NumericsError, match=r"below 1e\+17, found NaN, inf or a larger one at position 123"):
        built(store, tmp_path / "i", **KINDS[0])


def test_keys_with_nan_are_named(store: list[Path], tmp_path: Path) -> None:
    shutil.copytree(store[0].parent, tmp_path / "s")
    folders = [tmp_path / "s" / path.name for path in store]
    keys = np.lib.format.open_memmap(folders[1] / "keys.npy", mode="r+")
    keys[7, 3] = np.inf
    keys.flush()
    signed(folders[1])
    for settings in (KINDS[0], PQ):
        with pytest.raises(NumericsError, match="found NaN, inf or a larger one at position 1107"):
            built(folders, tmp_path / settings["kind"], **settings)
