"""The search of a GPU, run by the CPU: its torch operations against brute force in float64 and today's CPU search."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making import write_store, write_tokens
from numpy.typing import NDArray

from memdec.artefacts import artefact
from memdec.datastore import device_search, index, search, target_rows, targets
from memdec.datastore.device_search import DeviceSearch
from memdec.datastore.keys import Datastore
from memdec.datastore.target_rows import TargetReader
from memdec.errors import ArtifactError, NumericsError
from memdec.maths import exact_search
from memdec.settings import IndexSettings, TargetSettings

CPU = torch.device("cpu")
Pair = tuple[NDArray[np.float64], NDArray[np.int64]]


def a_store(folder: Path, keys: NDArray[np.floating], edges: list[int] | None = None) -> Datastore:
    return Datastore(
        write_store(folder / "s", keys, write_tokens(folder / "t", np.zeros(len(keys), np.uint16)), edges=edges)
    )


def brute(queries: NDArray[Any], keys: NDArray[Any], neighbours: int, own: NDArray[np.int64]) -> Pair:
    """Distances in float64 and positions, nearest first, ties by position."""
    wide, asked = keys.astype(np.float64), queries.astype(np.float64)
    sq_dist, ids = np.full((len(asked), neighbours), np.inf), np.full((len(asked), neighbours), -1)
    for row, query in enumerate(asked):
        found = ((wide - query) ** 2).sum(1)
        order = np.argsort(found, kind="stable")
        order = order[order != own[row]][:neighbours]
        sq_dist[row, : len(order)], ids[row, : len(order)] = found[order], order
    return sq_dist, ids


def agree(found: Any, expected: Pair, queries: NDArray[Any], keys: NDArray[Any]) -> None:
    """The same neighbours, but where two squared distances differ by less than 3e-7, a few roundings of float32."""
    sq_dist, ids = found
    np.testing.assert_allclose(sq_dist, expected[0], rtol=3e-7)
    np.testing.assert_array_equal(ids < 0, expected[1] < 0)
    for row in (ids != expected[1]).any(1).nonzero()[0]:
        assert len(set(ids[row].tolist())) == len(set(expected[1][row].tolist()))
        apart = ((keys[ids[row]].astype(np.float64) - queries[row].astype(np.float64)) ** 2).sum(1)
        np.testing.assert_allclose(np.where(ids[row] < 0, np.inf, apart), expected[0][row], rtol=3e-7)


def spread(kind: str, n: int = 700, width: int = 24) -> NDArray[np.float16]:
    """Keys of which many are equal or equally far, or that the product has a hard time with."""
    rng = np.random.default_rng(3)
    if kind == "twins":  # 81 different keys, each many times
        return rng.integers(0, 3, (n, 4)).astype(np.float16)
    if kind == "equal":
        return np.ones((n, width), np.float16)
    keys = rng.normal(size=(n, width))
    if kind == "far":  # a common offset, a wide column, and single keys far away
        keys += 30
        keys[:, 3] *= 10
        keys[[5, 600]] *= 20
    return keys.astype(np.float16)


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("kind", ["normal", "twins", "equal", "far"])
@pytest.mark.parametrize("room", [None, 150_000, 40_000])
def test_the_neighbours_are_those_of_brute_force_whatever_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, tf32: bool, room: int | None
) -> None:
    monkeypatch.setattr(device_search, "_MORE_TF32", 40)
    keys = spread(kind)
    store = a_store(tmp_path, keys, [0, 211, 400, 700])
    found = DeviceSearch(store, CPU, tf32=tf32, room=room)
    assert found.resident == (room is None or keys.nbytes < 0.6 * room)
    assert (found._n_keys < 700) == (room is not None)
    own = np.arange(100, 350)
    own[:40] = -1
    for neighbours in (1, 20, 690, 699):
        sq_dist, ids = found.search(
            torch.from_numpy(keys[100:350].astype(np.float32)), neighbours, torch.from_numpy(own)
        )
        expected = brute(keys[100:350], keys, neighbours, own)
        agree((sq_dist.numpy(), ids.numpy()), expected, keys[100:350], keys)
        if kind in ("twins", "equal"):  # whole numbers: nothing is rounded
            np.testing.assert_array_equal(ids.numpy(), expected[1])
    assert found.n_searched == 1000
    if kind == "normal" and not tf32:
        assert found.n_settled < 10
    if kind == "equal":
        assert found.n_settled == 500  # all, but where nearly all keys are candidates anyway


@pytest.mark.parametrize("room", [None, 60_000])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_keys_of_any_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, room: int | None) -> None:
    keys = torch.randn(500, 17, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    store = a_store(tmp_path, (keys.float() if dtype == "bfloat16" else keys).numpy(), [0, 100, 500])
    if dtype == "bfloat16":  # numpy has none, so the test's writer has neither
        store.settings = store.settings.model_copy(update={"dtype": dtype})
        bits = keys.view(torch.int16).numpy()
        store.parts = [(0, bits[:100]), (100, bits[100:])]
    wide = keys.float()
    found = DeviceSearch(store, CPU, room=room).search(wide[:60], 30, torch.arange(60))
    agree([x.numpy() for x in found], brute(wide[:60].numpy(), wide.numpy(), 30, np.arange(60)), wide[:60], wide)


def test_a_search_goes_on_in_float32_where_tf32_cannot_tell_the_keys_apart(tmp_path: Path) -> None:
    keys = 100 + np.random.default_rng(0).normal(size=(600, 24)).astype(np.float32) * 1e-3
    keys[::2] *= -1  # two far clusters: the centre is in neither, and all distances within one are below the slack
    found = DeviceSearch(a_store(tmp_path, keys), CPU, tf32=True)
    for _ in range(2):
        near = [x.numpy() for x in found.search(torch.from_numpy(keys[:50]), 100, torch.arange(50))]
        agree(near, brute(keys[:50], keys, 100, np.arange(50)), keys[:50], keys)
        assert not found.tf32


def test_autocast_reaches_no_product(tmp_path: Path) -> None:
    found = DeviceSearch(a_store(tmp_path, spread("normal")), CPU)
    queries = torch.randn(30, 24, generator=torch.Generator().manual_seed(0))
    plain = found.search(queries, 20)
    with torch.autocast("cpu", torch.bfloat16):
        inside = found.search(queries, 20)
    assert all(torch.equal(one, other) for one, other in zip(plain, inside, strict=True))
    assert found.n_settled == 0


def test_fewer_keys_than_neighbours_and_no_queries(tmp_path: Path) -> None:
    found = DeviceSearch(a_store(tmp_path, spread("normal", 5)), CPU)
    sq_dist, ids = found.search(torch.zeros(2, 24), 9, torch.tensor([3, -1]))
    assert ids.tolist()[0][4:] == [-1] * 5
    assert sorted(ids[0, :4].tolist()) == [0, 1, 2, 4]
    assert sorted(ids[1, :5].tolist()) == [0, 1, 2, 3, 4]
    assert torch.isinf(sq_dist[0, 4:]).all()
    assert found.search(torch.zeros(0, 24), 9)[0].shape == (0, 9)


@pytest.mark.parametrize("room", [None, 20_000])
@pytest.mark.parametrize("bad", [np.nan, -np.inf, 1e18])
def test_a_broken_key_is_named(tmp_path: Path, room: int | None, bad: float) -> None:
    keys = np.random.default_rng(0).normal(size=(5000, 8)).astype(np.float32)
    keys[4321, 5] = bad
    with pytest.raises(NumericsError, match="found NaN, inf or a larger one at position 4321"):
        DeviceSearch(a_store(tmp_path, keys), CPU, room=room).search(torch.zeros(1, 8), 3)


# --- the parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("kind", ["normal", "twins", "far"])
def test_no_distance_is_below_its_bound_nor_far_above_it(kind: str, tf32: bool) -> None:
    keys = torch.from_numpy(spread(kind).astype(np.float32))
    moved = keys - keys.median(0).values
    asked = exact_search.to_tf32(moved) if tf32 else moved
    bounds = exact_search.lower_bounds(asked, moved, tf32=tf32) + exact_search.own_part(moved, tf32=tf32)
    exact = torch.cdist(keys.double(), keys.double(), compute_mode="donot_use_mm_for_euclid_dist") ** 2
    norms = moved.double().square().sum(1)
    assert (bounds <= exact).all()
    assert (bounds >= exact - 2 * exact_search.slack(keys.shape[1], tf32=tf32) * (norms + norms[:, None])).all()


def test_tf32_has_eleven_bits() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 1e3
    rounded = exact_search.to_tf32(values[None])[0]
    assert ((rounded - values).abs() <= values.abs() * 2.0**-11).all()
    mantissa, _ = torch.frexp(rounded)
    assert (mantissa * 2**11 == (mantissa * 2**11).round()).all()
    assert torch.equal(exact_search.to_tf32(rounded[None])[0], rounded)


@pytest.mark.parametrize("n", [1, 10, 50, 51, 203, 5000])
@pytest.mark.parametrize("keep", [1, 7, 50])
def test_two_levels_find_the_smallest(n: int, keep: int) -> None:
    for values in (torch.rand(9, n), torch.randint(0, 5, (9, n)).float(), torch.full((9, n), torch.inf)):
        near, column = exact_search.smallest(values, keep)
        assert torch.equal(near.sort(1).values, values.sort(1).values[:, :keep])
        assert torch.equal(values.gather(1, column), near)
        assert all(len(set(row)) == len(row) for row in column.tolist())


def test_codes_sort_by_distance_and_position() -> None:
    sq_dist, ids = torch.tensor([2.5, 0.0, 2.5, 3e38]), torch.tensor([9, 4_294_967_294, 3, 0])
    codes = torch.cat([exact_search.encode(sq_dist, ids), torch.tensor([exact_search.NONE])]).sort().values
    found = exact_search.decode(codes)
    assert found[0].tolist() == [0.0, 2.5, 2.5, pytest.approx(3e38), np.inf]
    assert found[1].tolist() == [4_294_967_294, 3, 9, 0, -1]


def test_the_precision_of_products_is_as_before() -> None:
    flags = torch.backends.cuda.matmul
    before = flags.fp32_precision
    with exact_search.product_of(tf32=True):
        assert flags.fp32_precision == "tf32"
        with exact_search.product_of(tf32=False):
            assert flags.fp32_precision == "ieee"
        assert flags.fp32_precision == "tf32"
    assert flags.fp32_precision == before
    assert not flags.allow_tf32  # the older name can still be read


# --- search and targets by it ---------------------------------------------------------------------------------------

N = 300
Made = tuple[list[Path], Path, Path]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """(store, index, stream) of 300 keys in two shards, with twins."""
    rng = np.random.default_rng(1)
    stream = write_tokens(tmp_path / "tokens", rng.integers(0, 11, N).astype(np.uint16))
    keys = rng.normal(size=(N, 6)).astype(np.float16)
    keys[::7] = keys[3]
    store = write_store(tmp_path / "store", keys, stream, edges=[0, 120, N])
    index.run(store, tmp_path / "index", IndexSettings())
    return store, tmp_path / "index", stream


@pytest.fixture
def by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search of a GPU on the CPU, with batches of 64 and keys that do not fit."""

    def there(self: search.Searcher) -> DeviceSearch:
        if self._on_device is None:
            self._on_device = DeviceSearch(self.store, CPU, room=4_000)
        return self._on_device

    monkeypatch.setattr(search.Searcher, "on_device", property(there))
    monkeypatch.setattr(device_search, "QUERIES", 64)


def rows(made: Made, out: Path, **changes: Any) -> list[dict[str, NDArray[Any]]]:
    chosen = TargetSettings.model_validate({"neighbours": 20, "temperature": 0.7, "batch_size": 16} | changes)
    folders = [out / str(shard) for shard in range(chosen.shards)]
    for shard, folder in enumerate(folders):
        targets.run(*made, folder, chosen, shard=shard)
    found = TargetReader(folders, artefact.read(made[2], "tokens").facts["sha256"]["train"]).rows([(0, N)])
    return {name: np.asarray(getattr(found, name)) for name in ("indptr", "tokens", "probs")}


def test_targets_are_those_of_the_cpu(made: Made, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    ours = rows(made, tmp_path / "cpu", top=5)
    half = rows(made, tmp_path / "cpu-half", dtype="float16")
    request.getfixturevalue("by_device")
    np.testing.assert_allclose(rows(made, tmp_path / "half", dtype="float16")["probs"], half["probs"], atol=1e-3)
    assert Datastore(made[0]).n * 12 > 0.6 * 4_000  # the keys stream
    found = rows(made, tmp_path / "device", top=5)
    np.testing.assert_array_equal(found["indptr"], ours["indptr"])
    np.testing.assert_array_equal(found["tokens"], ours["tokens"])
    np.testing.assert_allclose(found["probs"], ours["probs"], atol=1e-6)
    searcher = search.load(Datastore(made[0]), made[1])
    queries = np.load(made[0][0] / "keys.npy")[:50].astype(np.float32)
    here = searcher.search(queries, 20, np.arange(50))
    request.getfixturevalue("monkeypatch").undo()
    for one, other in zip(here, searcher.search(queries, 20, np.arange(50)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@pytest.mark.usefixtures("by_device")
def test_shards_and_batches_change_no_bit_of_the_targets(made: Made, tmp_path: Path) -> None:
    whole = rows(made, tmp_path / "whole")
    for number, changes in enumerate(({"shards": 3}, {"shards": 7}, {"batch_size": 100}, {"batch_size": 1000})):
        found = rows(made, tmp_path / str(number), **changes)
        for name, values in whole.items():
            np.testing.assert_array_equal(found[name], values)


@pytest.mark.usefixtures("by_device")
@pytest.mark.parametrize("calls", [1, 2])
def test_a_killed_shard_goes_on_and_gives_the_same_bits(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    monkeypatch.setattr(target_rows, "_CHECKPOINT", 0.0)
    chosen = TargetSettings(neighbours=9, temperature=0.7, shards=2, batch_size=16)
    targets.run(*made, tmp_path / "whole", chosen, shard=1)
    real, seen = DeviceSearch.search, []

    def killed(self: DeviceSearch, queries: torch.Tensor, neighbours: int, own: torch.Tensor) -> Any:
        seen.append(int(own[0]))
        if len(seen) == calls + 1:
            raise KeyboardInterrupt
        return real(self, queries, neighbours, own)

    monkeypatch.setattr(DeviceSearch, "search", killed)
    with pytest.raises(KeyboardInterrupt):
        targets.run(*made, tmp_path / "killed", chosen, shard=1)
    with pytest.raises(ArtifactError, match="unfinished"):
        artefact.read(tmp_path / "killed", "targets")
    targets.run(*made, tmp_path / "killed", chosen, shard=1)
    assert seen[calls : calls + 2] == [128 + 64 * calls] * 2  # positions 150 .. 299 on the grid of batches of 64
    for name in ("indptr", "tokens", "probs"):
        one, other = ((tmp_path / run / f"{name}.npy").read_bytes() for run in ("whole", "killed"))
        assert one == other


def test_an_error_of_the_writer_is_the_error_of_the_run(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = target_rows.RowWriter.append, []

    def full(self: target_rows.RowWriter, *batch: Any) -> None:
        seen.append(len(batch[0]))
        if len(seen) == 3:
            raise OSError("no space left")
        real(self, *batch)

    monkeypatch.setattr(target_rows.RowWriter, "append", full)
    with pytest.raises(OSError, match="no space left"):
        rows(made, tmp_path / "t")
    assert len(seen) == 3  # nothing is written after it
