"""Targets of a store full of identical keys, and the reader over any spans (the real store is in test_stages.py)."""

from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import write_store, write_tokens
from numpy.typing import NDArray

from memdec import artifacts, datastore, index, targets, tokens
from memdec.config import DatastoreSettings, IndexSettings, TargetSettings
from memdec.errors import ArtifactError, MemDecError, NumericsError
from memdec.targets import TargetReader

N, V = 60, 11


def made_store(folder: Path, keys: NDArray[np.floating]) -> tuple[list[Path], Path, Path]:
    """(store, index, stream) of given keys over a fixed stream: the real artefacts, without a model."""
    stream = write_tokens(folder / "tokens", np.random.default_rng(0).integers(0, V, N).astype(np.uint16))
    store = write_store(folder / "store", keys, stream)
    index.run(store, folder / "index", IndexSettings())
    return store, folder / "index", stream


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Path, Path]:
    """60 keys of which only 8 differ: every position has identical twins."""
    keys = np.random.default_rng(1).integers(0, 2, (N, 3)).astype(np.float16)
    return made_store(tmp_path_factory.mktemp("twins"), keys)


def run(made: tuple[list[Path], Path, Path], out: Path, **changes: object) -> TargetReader:
    chosen = TargetSettings.model_validate({"neighbours": N - 1, "temperature": 0.7} | changes)
    folders = [out / str(shard) for shard in range(chosen.shards)]
    for shard, folder in enumerate(folders):
        targets.run(*made, folder, chosen, shard=shard)
    return TargetReader(folders, artifacts.read(made[2], "tokens").facts["sha256"]["train"])


def dense(reader: TargetReader, n: int = N, width: int = V) -> NDArray[np.float64]:
    rows = reader.rows([(0, n)])
    assert len(rows) == n
    out = np.zeros((n, width))
    out[np.repeat(np.arange(n), np.diff(rows.indptr)), rows.tokens] = rows.probs
    return out


def brute(made: tuple[list[Path], Path, Path], temperature: float) -> NDArray[np.float64]:
    """All positions but oneself, in a plain double loop."""
    keys, values = np.load(made[0][0] / "keys.npy").astype(np.float64), np.load(made[2] / "train.npy")
    out = np.zeros((N, V))
    for i in range(N):
        for j in range(N):
            if i != j:
                out[i, values[j]] += np.exp(-((keys[i] - keys[j]) ** 2).sum() / temperature)
    return out / out.sum(1, keepdims=True)


def test_fault_1_identical_keys_count_and_oneself_does_not(made: tuple[list[Path], Path, Path], tmp_path: Path) -> None:
    found = run(made, tmp_path)
    np.testing.assert_allclose(dense(found), brute(made, 0.7), atol=1e-7)
    assert found.rows([(0, N)]).tokens.dtype == np.uint16
    assert found.rows([(0, N)]).probs.dtype == np.float32


@pytest.mark.parametrize("changes", [{"shards": 3}, {"shards": 7}, {"shards": N}, {"batch_size": 7}, {"batch_size": 1}])
def test_shards_and_batches_change_nothing(
    made: tuple[list[Path], Path, Path], tmp_path: Path, changes: dict[str, int]
) -> None:
    one, other = (run(made, tmp_path / name, **c).rows([(0, N)]) for name, c in (("a", {}), ("b", changes)))
    np.testing.assert_array_equal(one.indptr, other.indptr)
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_allclose(one.probs, other.probs, atol=1e-7)


def test_top_and_threshold_reach_the_rows(made: tuple[list[Path], Path, Path], tmp_path: Path) -> None:
    full = brute(made, 0.7)
    rows = run(made, tmp_path / "top", top=3).rows([(0, N)])
    assert np.diff(rows.indptr).tolist() == [3] * N
    best = -np.sort(-full, axis=1)[:, :3]
    found = -np.sort(-rows.probs.reshape(N, 3), axis=1)
    np.testing.assert_allclose(found, best / best.sum(1, keepdims=True), atol=1e-6)
    cut = np.where(full > 0.1, full, 0)
    np.testing.assert_allclose(
        dense(run(made, tmp_path / "cut", threshold=0.1)), cut / cut.sum(1, keepdims=True), atol=1e-6
    )


def test_float16_keys_of_a_model_against_brute_force(base_folder: Path, token_folder: Path, tmp_path: Path) -> None:
    datastore.run(base_folder, token_folder, tmp_path / "d", DatastoreSettings(), context=32, stride=16)
    index.run([tmp_path / "d"], tmp_path / "i", IndexSettings())
    keys, values = np.load(tmp_path / "d" / "keys.npy"), tokens.load_stream(token_folder, "train")
    assert keys.dtype == np.float16
    n = len(keys)
    chosen = TargetSettings(neighbours=30, temperature=2.0, shards=n // 20)
    targets.run([tmp_path / "d"], tmp_path / "i", token_folder, tmp_path / "t", chosen, shard=5)
    manifest = artifacts.read(tmp_path / "t", "targets")
    begin, end = manifest.facts["begin"], manifest.facts["end"]
    assert end - begin >= 20
    indptr, ids, probs = (np.load(tmp_path / "t" / f"{name}.npy") for name in ("indptr", "tokens", "probs"))
    assert len(indptr) == end - begin + 1
    plain = keys.astype(np.float64)
    for row, position in enumerate(range(begin, end)):
        sq_dist = ((plain - plain[position]) ** 2).sum(1)
        sq_dist[position] = np.inf
        near = np.argsort(sq_dist, kind="stable")[:30]
        weight = np.exp(-sq_dist[near] / 2)
        expected = np.bincount(values[near], weights=weight / weight.sum(), minlength=300)
        found = np.zeros(300)
        found[ids[indptr[row] : indptr[row + 1]]] = probs[indptr[row] : indptr[row + 1]]
        np.testing.assert_allclose(found, expected, atol=2e-5)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, N - 1), st.integers(1, N)), min_size=1, max_size=4))
def test_rows_of_spans_are_slices(
    readers: tuple[TargetReader, NDArray[np.float64]], lengths: list[tuple[int, int]]
) -> None:
    reader, full = readers
    spans = [(first, min(N, first + length)) for first, length in lengths]
    rows = reader.rows(spans)
    found = np.zeros((len(rows), V))
    found[np.repeat(np.arange(len(rows)), np.diff(rows.indptr)), rows.tokens] = rows.probs
    np.testing.assert_array_equal(found, np.concatenate([full[a:b] for a, b in spans]))
    assert rows.indptr[0] == 0
    assert rows.indptr[-1] == len(rows.tokens) == len(rows.probs)


@pytest.fixture(scope="module")
def readers(
    made: tuple[list[Path], Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[TargetReader, NDArray[np.float64]]:
    """Seven shards, and all their rows read shard by shard."""
    reader = run(made, tmp_path_factory.mktemp("shards"), shards=7)
    edges = [*reader.begins.tolist(), N]
    parts = [reader.rows([span]) for span in pairwise(edges)]
    full = np.zeros((N, V))
    for begin, part in zip(edges, parts, strict=False):
        for row in range(len(part)):
            low, high = part.indptr[row : row + 2]
            full[begin + row, part.tokens[low:high]] = part.probs[low:high]
    np.testing.assert_allclose(full.sum(1), 1, atol=1e-6)
    return reader, full


def test_a_shard_given_twice_and_a_half_written_one_are_refused(
    made: tuple[list[Path], Path, Path], tmp_path: Path
) -> None:
    run(made, tmp_path, shards=2)
    digest = artifacts.read(made[2], "tokens").facts["sha256"]["train"]
    zero, one = tmp_path / "0", tmp_path / "1"
    with pytest.raises(ArtifactError, match="give every shard once"):
        TargetReader([zero, zero, one], digest)
    (one / artifacts.MANIFEST).unlink()
    with pytest.raises(ArtifactError, match="unfinished"):
        TargetReader([zero, one], digest)


def test_fault_12_nan_keys_are_an_error_that_names_them_and_not_a_target(tmp_path: Path) -> None:
    keys = np.random.default_rng(2).random((N, 3)).astype(np.float32)
    made = made_store(tmp_path / "good", keys)
    on_disk = np.lib.format.open_memmap(made[0][0] / "keys.npy", mode="r+")
    on_disk[17, 1] = np.nan
    on_disk.flush()
    with pytest.raises(NumericsError, match="found NaN or inf at position 17"):
        run(made, tmp_path / "t", neighbours=5)
    with pytest.raises(ArtifactError, match="unfinished"):
        artifacts.read(tmp_path / "t" / "0", "targets")
    with pytest.raises(NumericsError, match="found NaN or inf at position 17"):
        made_store(tmp_path / "bad", np.asarray(on_disk))
    with pytest.raises(ArtifactError, match="unfinished"):
        artifacts.read(tmp_path / "bad" / "index", "index")


def test_an_index_or_a_stream_of_other_keys_is_refused(made: tuple[list[Path], Path, Path], tmp_path: Path) -> None:
    store, index_folder, stream = made_store(tmp_path, np.random.default_rng(3).random((N, 3)).astype(np.float32))
    with pytest.raises(ArtifactError, match="found one of other keys"):
        run((store, made[1], stream), tmp_path / "a")
    (tmp_path / "other").mkdir()
    with artifacts.building(tmp_path / "other" / "tokens", "tokens", {"other": 1}, {}) as build:
        assert build is not None
        build.facts.update(sha256={"train": "0" * 32})
    with pytest.raises(ArtifactError, match="found keys of other tokens"):
        run((store, index_folder, tmp_path / "other" / "tokens"), tmp_path / "b")


# --- bugs; drop the mark with the fix -----------------------------------------------------------------------------


def test_more_shards_than_positions_are_refused_or_empty(made: tuple[list[Path], Path, Path], tmp_path: Path) -> None:
    try:
        np.testing.assert_allclose(dense(run(made, tmp_path, shards=N + 1)), brute(made, 0.7), atol=1e-7)
    except MemDecError:
        return


def test_a_span_beyond_the_end_ends(readers: tuple[TargetReader, NDArray[np.float64]]) -> None:
    try:
        pieces = list(islice(readers[0]._pieces(N - 1, N + 1), 10))
    except (MemDecError, IndexError, ValueError):
        return
    assert len(pieces) <= 2
