"""Index kind `cells`: neighbours of the searched cells are exact, and targets have the same bits however they are made."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from making import signed, write_store, write_tokens
from safetensors.numpy import load_file

from memdec.artefacts import arrays, artefact
from memdec.datastore import candidates, index, search, target_rows, targets
from memdec.datastore.keys import Datastore
from memdec.datastore.target_rows import TargetReader
from memdec.errors import ArtifactError, ConfigError, NumericsError
from memdec.maths import cell_join
from memdec.maths.windows import windows
from memdec.settings import IndexSettings, TargetSettings

N, D, V, CELLS = 900, 7, 30, 12
SETTINGS = IndexSettings(kind="cells", centroids=CELLS, check_neighbours=20, check_queries=32, check_nprobe=[1, CELLS])
CHOSEN = {"neighbours": 25, "temperature": 0.7, "nprobe": 3}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys in clusters, in three shards (`store`) and in one (`whole`), and their indexes.

    The keys are multiples of 1/4, so that all distances are exact, with many ties.
    """
    folder, rng = tmp_path_factory.mktemp("cells"), np.random.default_rng(0)
    keys = np.round(rng.normal(size=(30, D)) * 8)[rng.integers(0, 30, N)] / 4 + rng.integers(0, 2, (N, D))
    stream = write_tokens(folder / "tokens", rng.integers(0, V, N).astype(np.uint16))
    for name, edges in (("store", [0, 100, 640, N]), ("whole", [0, N])):
        write_store(folder / name, keys.astype(np.float16), stream, edges=edges)
        with warnings.catch_warnings(action="ignore"):
            index.run(parts(folder / name), folder / f"index-{name}", SETTINGS)
    index.run(parts(folder / "store"), folder / "exact", IndexSettings(check_queries=1))
    return folder


def parts(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def made(home: Path, out: Path, *, kind: str = "index-store", store: str = "store", **changes: Any) -> TargetReader:
    chosen = TargetSettings.model_validate(CHOSEN | changes)
    folders = [out / str(shard) for shard in range(chosen.shards)]
    for shard, folder in enumerate(folders):
        targets.run(parts(home / store), home / kind, home / "tokens", folder, chosen, shard=shard)
    return TargetReader(folders, artefact.read(home / "tokens", "tokens").facts["sha256"]["train"])


def equal(one: TargetReader, other: TargetReader) -> None:
    ours, theirs = one.rows([(0, N)]), other.rows([(0, N)])
    for name in ("indptr", "tokens", "probs"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize(("most", "k"), [(256, 25), (256, 400), (30, 400)])
@pytest.mark.parametrize("by_place", [False, True])
def test_neighbours_are_the_nearest_of_the_nearest_cells_and_of_the_other_candidates(
    home: Path, monkeypatch: pytest.MonkeyPatch, by_place: bool, most: int, k: int
) -> None:
    """Everything again in float64: assignment of keys, cells of a query, distances, the order of ties.

    With k = 400 all keys that a query meets are its neighbours.
    """
    monkeypatch.setattr(candidates, "MOST", most)
    searcher = search.Searcher(Datastore(parts(home / "store")), SETTINGS, home / "index-store", by_place=by_place)
    searcher.set_nprobe(3)
    place = np.concatenate([np.arange(each.first, each.end) - each.begin for each in windows(N, 16, 8)])
    own, queries = searcher.store.sample(40, 5)
    keys = np.concatenate([block.copy() for _, block in searcher.store.blocks(0, N, 500)]).astype(np.float64)
    centroids = load_file(home / "index-store" / "trained.safetensors")["centroids"].astype(np.float64)
    cell = ((keys[:, None] - centroids) ** 2).sum(-1).argmin(1)
    assert np.load(home / "index-store" / "codes.npy")[:, 0].tolist() == cell.tolist()
    values = searcher.store.values.astype(int)
    rare = np.bincount(values[:-1], minlength=V) <= most
    assert rare.all() == (most == 256)
    assert rare.any()
    no_key, no_token = np.full(40, -1), np.full(40, -1)
    for me, inputs, (sq_dist, ids) in (
        (own, no_token, searcher.search(queries, k, own, released=True)),
        (own, no_token, [found.numpy() for found in searcher.near_keys(own, k, released=True)]),
        (own, np.where(own > 0, values[own - 1], -1), [found.numpy() for found in searcher.near_keys(own, k)]),
        (own, np.where(own > 0, values[own - 1], -1), searcher.search(queries, k, own)),
        (no_key, no_token, searcher.search(queries, k)),
        (no_key, np.arange(40) % V, searcher.search(queries, k, inputs=np.arange(40) % V)),
    ):
        for row in range(40):
            query = queries[row].astype(np.float64)
            near = ((query - centroids) ** 2).sum(1).argsort(kind="stable")[:3]
            after = (np.append(-1, values[:-1]) == inputs[row]) & bool(rare[inputs[row]])
            after[0] = False
            level = (place == place[me[row]]) & bool(by_place and me[row] >= 0 and inputs is not no_token)
            there = [at for at in np.flatnonzero(np.isin(cell, near) | after | level) if at != me[row]]
            true = sorted((float(((keys[at] - query) ** 2).sum()), at) for at in there)[:k]
            missing = [(np.inf, -1)] * (k - len(true))
            assert list(zip(sq_dist[row].tolist(), ids[row].tolist(), strict=True)) == true + missing


def test_keys_and_rows_beyond_the_memory_are_read_without_read_ahead(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, advised = made(home, tmp_path / "plain"), []
    one = arrays.scattered

    def scattered(found: Any) -> Any:
        fresh = one(found)
        advised.append([there is not each for there, each in zip(fresh, found, strict=True)])
        return fresh

    monkeypatch.setattr(arrays, "scattered", scattered)
    monkeypatch.setattr("memdec.artefacts.resources.free_memory", lambda: 1000)
    equal(made(home, tmp_path / "scattered"), plain)
    assert advised == [[True] * 3] * 2  # the keys of three shards; the three arrays of the rows in the order of cells


def test_keys_of_the_same_place_are_candidates_where_most_of_p_knn_is_on_them(tmp_path: Path) -> None:
    """Keys of which the place in the window decides, as those of an untrained model with absolute positions."""
    rng = np.random.default_rng(0)
    stream = write_tokens(tmp_path / "tokens", rng.integers(0, V, N).astype(np.uint16))
    place = np.concatenate([np.arange(each.first, each.end) - each.begin for each in windows(N, 16, 8)])
    keys = {"place": 9 * rng.normal(size=(16, D))[place] + rng.normal(size=(N, D)), "none": rng.normal(size=(N, D))}
    for name, each in keys.items():
        store = write_store(tmp_path / name, each.astype(np.float32), stream)
        for cells in (40, 70):  # of one place are some 112 keys: those of 5 cells, and of 9
            folder = tmp_path / f"{name}-{cells}"
            with warnings.catch_warnings(action="ignore"):
                index.run(store, folder, SETTINGS.model_copy(update={"centroids": cells}))
            facts = artefact.read(folder, "index").facts
            assert facts["by_place"] == (name == "place" and cells == 40)
            share = facts["check"]["same_place"]
            assert share > 0.9 if name == "place" else share < 0.5
            assert len(search.load(Datastore(store), folder, 1).cells.beside) == 1 + facts["by_place"]
    recall = {cells: artefact.read(tmp_path / f"place-{cells}", "index").facts["check"]["nprobe"] for cells in (40, 70)}
    assert recall[40]["1"]["rescored"]["recall"] == 1 > recall[70]["1"]["rescored"]["recall"]


def test_all_cells_give_the_rows_of_exact_search(home: Path, tmp_path: Path) -> None:
    ours, exact = (made(home, tmp_path / kind, kind=kind, nprobe=CELLS) for kind in ("index-store", "exact"))
    equal(ours, exact)
    check = artefact.read(home / "index-store", "index").facts["check"]["nprobe"]
    assert check[str(CELLS)]["rescored"]["recall"] > 0.99
    assert check["1"]["rescored"]["recall"] < check[str(CELLS)]["rescored"]["recall"]


@pytest.mark.parametrize("changes", [{"shards": 3}, {"shards": 7}, {"batch_size": 5}, {"store": "whole"}])
def test_shards_and_batches_change_no_bit(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    whole = made(home, tmp_path / "a")
    monkeypatch.setattr(targets, "_CELL_QUERIES", 64)
    equal(whole, made(home, tmp_path / "b", **changes))


@pytest.mark.parametrize("where", ["searched", "copied"])
def test_a_killed_shard_goes_on_and_gives_the_same_bits(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    whole = made(home, tmp_path / "whole")
    monkeypatch.setattr(target_rows, "_CHECKPOINT", 0.0)
    monkeypatch.setattr(targets, "_CELL_QUERIES", 100)
    real, rows = target_rows.RowWriter.append, []

    def killed(self: target_rows.RowWriter, *batch: Any) -> None:
        rows.append(self.n)
        if len(rows) == (5 if where == "searched" else 13):
            raise KeyboardInterrupt
        real(self, *batch)

    monkeypatch.setattr(target_rows.RowWriter, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        made(home, tmp_path / "killed", batch_size=100)
    assert rows[-1] == (400 if where == "searched" else 300)
    equal(made(home, tmp_path / "killed", batch_size=100), whole)
    assert rows[len(rows) - 14 if where == "searched" else 13] == (400 if where == "searched" else 300)
    assert not (tmp_path / "killed" / "0" / "work").exists()


def test_rows_for_other_queries_remove_nothing(home: Path, tmp_path: Path) -> None:
    """The same keys as queries of another datastore: a query finds itself at distance 0."""
    store = Datastore(parts(home / "store"))
    searcher = search.load(store, home / "index-store", 3)
    own, queries = store.sample(30, 1)
    sq_dist, ids = searcher.search(queries, 5)
    assert (sq_dist[:, 0] == 0).all()
    twins = [np.flatnonzero(found == me).size == 1 or found[0] < me for found, me in zip(ids, own, strict=True)]
    assert all(twins)  # only five twins before it can push it out
    one = [searcher.search(queries[i : i + 1], 5) for i in range(30)]
    np.testing.assert_array_equal(ids, np.concatenate([near for _, near in one]))


def test_short_rows_are_counted(home: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"\d+ of 900 rows have fewer than 300 neighbours in the 1 cells searched"):
        made(home, tmp_path, neighbours=300, nprobe=1)
    assert artefact.read(tmp_path / "0", "targets").facts["short_rows"] > 0


def test_a_streamed_datastore_is_refused(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Datastore.__init__

    def streamed(self: Datastore, *given: Any) -> None:
        real(self, *given)
        self.parts = []

    monkeypatch.setattr(Datastore, "__init__", streamed)
    with pytest.raises(
        ArtifactError, match="expected stored keys, found a streamed datastore; use kind ivfpq or ivfflat"
    ):
        index.run(parts(home / "store"), tmp_path / "i", SETTINGS)


def built(folder: Path, keys: Any, **settings: Any) -> Path:
    """A home as above, of these keys, with 30 tokens that repeat."""
    stream = write_tokens(folder / "tokens", np.arange(len(keys), dtype=np.uint16) % V)
    write_store(folder / "store", keys, stream, edges=[0, len(keys) // 3, len(keys)])
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        index.run(parts(folder / "store"), folder / "index-store", IndexSettings(**SETTINGS.model_dump() | settings))
        index.run(parts(folder / "store"), folder / "exact", IndexSettings(check_queries=1, check_neighbours=1))
    return folder


def test_fewer_keys_than_cells_are_refused_before_any_work(home: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"^index: expected at least 4096 training keys for 4096 centroids, found 900; lower 'centroids', raise "
        r"'sample', or use kind exact$",
    ):
        index.run(parts(home / "store"), tmp_path / "i", IndexSettings(kind="cells"))
    assert not (tmp_path / "i").exists()


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_cell_with_most_keys_takes_no_more_memory_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """Half of all keys, or all of them, are copies of one: they are one cell, in which a query compares with each."""
    rng, n = np.random.default_rng(0), 6000
    keys = (np.round(rng.normal(size=(n, D)) * 8) / 4).astype(np.float16)  # all distances are exact
    same = rng.permutation(n)[: int(share * n)]
    keys[same] = keys[same[0]]
    home = built(tmp_path, keys)
    counts = np.bincount(np.load(home / "index-store" / "codes.npy")[:, 0], minlength=CELLS)
    assert counts.max() >= share * n
    monkeypatch.setattr(cell_join, "_HELD", 700)
    real, held = cell_join.gathered, []

    def gathered(shards: Any, positions: Any, out: Any) -> Any:
        if len(positions) and out.base is not None:  # the keys that queries are compared with; not the queries
            held.append(len(positions))
        return real(shards, positions, out)

    monkeypatch.setattr(cell_join, "gathered", gathered)
    ours = made(home, tmp_path / "cells", nprobe=CELLS)
    assert max(held) <= 700
    exact = made(home, tmp_path / "e", kind="exact")
    for name in ("indptr", "tokens", "probs"):
        np.testing.assert_array_equal(getattr(ours.rows([(0, n)]), name), getattr(exact.rows([(0, n)]), name))
    assert artefact.read(tmp_path / "cells" / "0", "targets").facts["short_rows"] == 0


def test_thousands_of_equal_keys_are_neighbours_by_position(tmp_path: Path) -> None:
    """With one cell searched, too: equal keys are in one cell. No key is its own neighbour."""
    keys = np.zeros((4000, D), np.float16)
    keys[:1000] = np.arange(1, 1001)[:, None] * 0.5
    home = built(tmp_path, keys)
    searcher = search.load(Datastore(parts(home / "store")), home / "index-store", 1)
    own = np.array([1000, 1010, 3999])
    sq_dist, ids = searcher.search(np.zeros((3, D), np.float32), 20, own)
    assert (sq_dist == 0).all()
    assert ids.tolist() == [[at for at in range(1000, 1022) if at != me][:20] for me in own]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_key_that_is_no_number_is_named(home: Path, tmp_path: Path, bad: float) -> None:
    """By the index, and by the targets where the key turned bad behind the index."""
    shutil.copytree(home / "store", tmp_path / "store")
    keys = np.lib.format.open_memmap(tmp_path / "store" / "1" / "keys.npy", mode="r+")
    keys[7, 3] = bad
    keys.flush()
    signed(tmp_path / "store" / "1")
    message = (
        r"expected finite keys below 1e\+17, found NaN, inf or a larger one at position 107; run `memdec datastore`"
    )
    with pytest.raises(NumericsError, match=message):
        index.run(parts(tmp_path / "store"), tmp_path / "i", SETTINGS)
    for name in ("index-store", "tokens"):
        (tmp_path / name).symlink_to(home / name)
    with pytest.raises(NumericsError, match=message):
        made(tmp_path, tmp_path / "t")


def test_a_row_without_any_neighbour_is_named(tmp_path: Path) -> None:
    """A key that is alone in its cell and whose token is not rare: one cell has nothing for it."""
    keys = np.random.default_rng(0).normal(size=(8000, D)).astype(np.float16)
    keys[5000] = 3000
    home = built(tmp_path, keys, centroids=125)  # so many that all keys train them
    with pytest.raises(
        NumericsError, match=r"for position 5000, but it has no neighbour: search more cells \(nprobe\)"
    ):
        made(home, tmp_path / "t", nprobe=1)
    made(home, tmp_path / "more", nprobe=2)
