"""The search in cells of a GPU, run by the CPU: its torch operations against the compiled search of the CPU."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making import write_store, write_tokens
from numpy.typing import NDArray

from memdec.artefacts import artefact
from memdec.datastore import cells, device_cells, index, search, target_rows, targets
from memdec.datastore.device_cells import DeviceCells
from memdec.datastore.keys import Datastore
from memdec.errors import NumericsError
from memdec.maths import cell_join, exact_search
from memdec.settings import IndexSettings, TargetSettings

CPU = torch.device("cpu")
N, D, V, CELLS = 1500, 12, 30, 20


def keys_of(kind: str) -> NDArray[np.float16]:
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(N, D)) + 3 * rng.normal(size=(15, D))[rng.integers(0, 15, N)] + 5
    if kind == "twins":  # whole numbers, each key many times: nothing is rounded, and ties abound
        keys = np.round(keys)[rng.integers(0, 200, N)]
    if kind == "skewed":  # more than half of all keys are in one cell
        keys[:900] = 0.01 * rng.normal(size=(900, D))
    return keys.astype(np.float16)


def made(folder: Path, keys: NDArray[np.float16], *, by_place: bool = False) -> search.Searcher:
    """The search in 4 of 20 cells."""
    rng = np.random.default_rng(1)
    stream = write_tokens(folder / "tokens", rng.integers(0, V, len(keys)).astype(np.uint16))
    store = write_store(folder / "store", keys, stream, edges=[0, 700, N])
    chosen = IndexSettings(kind="cells", centroids=CELLS, check_queries=1, check_neighbours=20, check_nprobe=[4])
    with warnings.catch_warnings(action="ignore"):
        index.run(store, folder / "index", chosen)
    searcher = search.Searcher(Datastore(store), chosen, folder / "index", by_place=by_place)
    searcher.set_nprobe(4)
    return searcher


@pytest.mark.parametrize("beside", ["nothing", "tokens", "tokens and places"])
@pytest.mark.parametrize("kind", ["normal", "twins", "skewed"])
def test_the_neighbours_are_those_of_the_cpu_whatever_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, beside: str
) -> None:
    """Few spare candidates, so that many queries need the full search; large cells cut; cells that come and go."""
    searcher = made(tmp_path, keys_of(kind), by_place="places" in beside)
    own, queries = searcher.store.sample(400, 1)
    inputs = None if beside == "nothing" else np.random.default_rng(3).integers(-1, V, 400)
    own[:50] = -1
    monkeypatch.setattr(device_cells, "_MORE", 2)
    settled = set()
    for neighbours in (1, 60, 500):
        near, ids = searcher.cells.search(queries, own, neighbours, inputs)
        for room, largest in ((None, 1 << 15), (2_000_000, 90), (250_000, 1 << 15), (250_000, 90)):
            monkeypatch.setattr(device_cells, "_LARGEST", largest)
            ours = DeviceCells(searcher.cells, CPU, room=room)
            assert ours.resident == (room != 250_000)
            found = []
            for size in (400, 130):
                parts = [
                    ours.search(
                        torch.from_numpy(queries[at : at + size]),
                        neighbours,
                        torch.from_numpy(own[at : at + size]),
                        None if inputs is None else inputs[at : at + size],
                    )
                    for at in range(0, 400, size)
                ]
                found.append([torch.cat(each).numpy() for each in zip(*parts, strict=True)])
            for one, other in zip(*found, strict=True):
                np.testing.assert_array_equal(one, other)
            np.testing.assert_allclose(found[0][0], near, rtol=D * 2.0**-24)
            if kind == "twins":
                np.testing.assert_array_equal(found[0][1], ids)
            else:
                assert (found[0][1] == ids).mean() > 0.999
            assert ours.n_searched == 800
            settled.add(ours.n_settled > 0)
    assert True in settled


def test_queries_of_no_key_and_none_at_all(tmp_path: Path) -> None:
    searcher = made(tmp_path, keys_of("normal"))
    queries = np.random.default_rng(5).normal(size=(30, D)).astype(np.float32) + 5
    ours = DeviceCells(searcher.cells, CPU)
    near, ids = searcher.cells.search(queries, np.full(30, -1), 10)
    found = ours.search(torch.from_numpy(queries), 10)
    np.testing.assert_allclose(found[0], near, rtol=1e-6)
    np.testing.assert_array_equal(found[1], ids)
    assert [list(each.shape) for each in ours.search(torch.empty(0, D), 10)] == [[0, 10], [0, 10]]


def test_the_nearest_cells_are_those_of_the_cpu() -> None:
    rng = np.random.default_rng(0)
    centroids = np.round(rng.normal(size=(50, 6)) * 2).astype(np.float32)
    centroids[7] = centroids[40]  # a tie goes to the smaller number
    queries = np.round(rng.normal(size=(200, 6)) * 2).astype(np.float32)
    for room in (1 << 30, 50_000):
        found = exact_search.nearest_cells(torch.from_numpy(queries), torch.from_numpy(centroids), 8, room=room)
        np.testing.assert_array_equal(found, cell_join.nearest_cells(queries, centroids, 8))


def test_a_bad_key_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searcher = made(tmp_path, keys_of("normal"))
    real = searcher.cells.raw

    def broken(positions: NDArray[np.integer]) -> NDArray[Any]:
        keys: NDArray[Any] = real(positions)
        keys.view(np.float16)[positions == 1234] = np.nan
        return keys

    monkeypatch.setattr(searcher.cells, "raw", broken)
    with pytest.raises(NumericsError, match="position 1234"):
        DeviceCells(searcher.cells, CPU)
    streamed = DeviceCells(searcher.cells, CPU, room=50_000)
    with pytest.raises(NumericsError, match="position 1234"):
        streamed.keys(np.array([5, 1234]))
    monkeypatch.setattr(searcher.cells, "nprobe", CELLS)
    for _ in range(2):  # a cell whose copying was stopped does not count as there
        with pytest.raises(NumericsError, match="position 1234"):
            streamed.search(torch.zeros(1, D), 5)


@pytest.fixture
def by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search of a GPU on the CPU, with batches of 100 and cells that do not all fit; also where a key's cell is found."""

    def there(self: search.Searcher) -> DeviceCells:
        if self._on_device is None:
            self._on_device = DeviceCells(self.cells, CPU, room=100_000)
        assert isinstance(self._on_device, DeviceCells)
        return self._on_device

    def codes(self: cells.Assigner, keys: NDArray[np.float32]) -> NDArray[np.uint8]:
        found = exact_search.nearest_cells(torch.from_numpy(keys), torch.from_numpy(self._centroids), 1, room=1 << 20)
        return found.numpy().astype(np.uint8)

    monkeypatch.setattr(search.Searcher, "on_device", property(there))
    monkeypatch.setattr(cells.Assigner, "codes", codes)
    monkeypatch.setattr(device_cells, "QUERIES", 100)
    monkeypatch.setattr(targets, "_CELL_QUERIES", 50)


def rows(folder: Path, out: Path, **changes: Any) -> dict[str, NDArray[Any]]:
    chosen = TargetSettings.model_validate(
        {"neighbours": 20, "temperature": 0.7, "nprobe": 4, "batch_size": 16} | changes
    )
    folders = [out / str(shard) for shard in range(chosen.shards)]
    store = sorted((folder / "store").iterdir())
    for shard, each in enumerate(folders):
        targets.run(store, folder / "index", folder / "tokens", each, chosen, shard=shard)
    digest = artefact.read(folder / "tokens", "tokens").facts["sha256"]["train"]
    found = target_rows.TargetReader(folders, digest).rows([(0, N)])
    return {name: np.asarray(getattr(found, name)) for name in ("indptr", "tokens", "probs")}


def test_targets_are_those_of_the_cpu(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    searcher = made(tmp_path, keys_of("twins"))
    ours = rows(tmp_path, tmp_path / "cpu", top=5)
    before = np.load(tmp_path / "index" / "codes.npy")
    request.getfixturevalue("by_device")
    made(tmp_path / "again", keys_of("twins"))
    np.testing.assert_array_equal(np.load(tmp_path / "again" / "index" / "codes.npy"), before)
    for name, changes in (("one", {}), ("shards", {"shards": 3}), ("batches", {"batch_size": 333})):
        found = rows(tmp_path, tmp_path / name, top=5, **changes)
        np.testing.assert_array_equal(found["indptr"], ours["indptr"])
        np.testing.assert_array_equal(found["tokens"], ours["tokens"])
        np.testing.assert_allclose(found["probs"], ours["probs"], atol=1e-6)
    own, queries = searcher.store.sample(40, 2)
    here = searcher.search(queries, 20, own)
    request.getfixturevalue("monkeypatch").undo()
    for one, other in zip(here, searcher.search(queries, 20, own), strict=True):
        np.testing.assert_array_equal(one, other)
