"""Targets of a store full of identical keys, and the reader over any spans (the real store is in test_stages.py)."""

import json
import os
import shutil
import tracemalloc
from collections import namedtuple
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import signed, write_store, write_tokens
from numpy.typing import NDArray

from memdec.artefacts import artefact
from memdec.datastore import index, search, target_rows, targets
from memdec.datastore import keys as datastore
from memdec.datastore.target_rows import TargetReader
from memdec.errors import ArtifactError, ConfigError, MemDecError, NumericsError, ResourceError
from memdec.settings import DatastoreSettings, IndexSettings, TargetSettings
from memdec.text import tokens

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
    return TargetReader(folders, artefact.read(made[2], "tokens").facts["sha256"]["train"])


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
    manifest = artefact.read(tmp_path / "t", "targets")
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


@settings(max_examples=min(40, settings().max_examples))
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
    digest = artefact.read(made[2], "tokens").facts["sha256"]["train"]
    zero, one = tmp_path / "0", tmp_path / "1"
    with pytest.raises(ArtifactError, match="give every shard once"):
        TargetReader([zero, zero, one], digest)
    (one / artefact.MANIFEST).unlink()
    with pytest.raises(ArtifactError, match="unfinished"):
        TargetReader([zero, one], digest)


def test_fault_12_nan_keys_are_an_error_that_names_them_and_not_a_target(tmp_path: Path) -> None:
    keys = np.random.default_rng(2).random((N, 3)).astype(np.float32)
    made = made_store(tmp_path / "good", keys)
    on_disk = np.lib.format.open_memmap(made[0][0] / "keys.npy", mode="r+")
    on_disk[17, 1] = np.nan
    on_disk.flush()
    signed(made[0][0])
    with pytest.raises(NumericsError, match="found NaN, inf or a larger one at position 17"):
        run(made, tmp_path / "t", neighbours=5)
    with pytest.raises(ArtifactError, match="unfinished"):
        artefact.read(tmp_path / "t" / "0", "targets")
    with pytest.raises(NumericsError, match="found NaN, inf or a larger one at position 17"):
        made_store(tmp_path / "bad", np.asarray(on_disk))
    with pytest.raises(ArtifactError, match="unfinished"):
        artefact.read(tmp_path / "bad" / "index", "index")


def test_an_index_or_a_stream_of_other_keys_is_refused(made: tuple[list[Path], Path, Path], tmp_path: Path) -> None:
    store, index_folder, stream = made_store(tmp_path, np.random.default_rng(3).random((N, 3)).astype(np.float32))
    with pytest.raises(ArtifactError, match="found one of other keys"):
        run((store, made[1], stream), tmp_path / "a")
    (tmp_path / "other").mkdir()
    with artefact.building(tmp_path / "other" / "tokens", "tokens", {"other": 1}, {}) as build:
        assert build is not None
        build.facts.update(sha256={"train": "0" * 32})
    with pytest.raises(ArtifactError, match="found keys of other tokens"):
        run((store, index_folder, tmp_path / "other" / "tokens"), tmp_path / "b")


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path: Path) -> None:
    peaks, rng = [], np.random.default_rng(0)
    for n in (1500, 6000, 6000):  # the first one warms up
        home = tmp_path / str(len(peaks))
        stream = write_tokens(home / "tokens", rng.integers(0, 2000, n).astype(np.uint16))
        store = write_store(home / "store", rng.normal(size=(n, 4)).astype(np.float16), stream)
        index.run(store, home / "index", IndexSettings(check_queries=1))
        shards = 1 if len(peaks) == 2 else 6000 // 500  # all rows at once, or a twelfth of them
        tracemalloc.start()
        targets.run(
            store, home / "index", stream, home / "t", TargetSettings(neighbours=300, shards=shards, batch_size=250)
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (home / "t" / "probs.npy").stat().st_size > 5e6
    assert peaks[2] < peaks[1] + 1e6


# --- kills, storage, streamed keys, other queries ------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("calls", [1, 4, 7])
def test_fault_9_a_shard_killed_in_its_middle_goes_on_and_gives_the_same_bits(
    made: tuple[list[Path], Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, calls: int
) -> None:
    monkeypatch.setattr(target_rows, "_CHECKPOINT", 0.0)
    chosen = TargetSettings(neighbours=9, temperature=0.7, shards=2, batch_size=4, dtype=dtype)
    targets.run(*made, tmp_path / "whole", chosen, shard=1)
    real, seen = search.Searcher.search, []

    def killed(self: search.Searcher, queries: NDArray[np.float32], *rest: Any, **named: Any) -> Any:
        seen.append(int(rest[1][0]))
        if len(seen) == calls + 1:
            raise KeyboardInterrupt
        return real(self, queries, *rest, **named)

    monkeypatch.setattr(search.Searcher, "search", killed)
    with pytest.raises(KeyboardInterrupt):
        targets.run(*made, tmp_path / "killed", chosen, shard=1)
    with pytest.raises(ArtifactError, match="unfinished"):
        artefact.read(tmp_path / "killed", "targets")
    with (tmp_path / "killed" / "probs.npy").open("ab") as file:
        file.write(b"written after the last mark")
    targets.run(*made, tmp_path / "killed", chosen, shard=1)
    assert seen[calls : calls + 2] == [28 + 4 * calls] * 2  # positions 30 .. 59 on the grid of batches of 4
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert artefact.read(tmp_path / "killed", "targets") == artefact.read(tmp_path / "whole", "targets")


@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_a_mark_beside_a_damaged_file_means_nothing(
    made: tuple[list[Path], Path, Path], tmp_path: Path, harm: str
) -> None:
    """Snakemake deletes what a failed job has declared; what is left must not be taken for what was there."""
    run(made, tmp_path / "whole", neighbours=9)
    run(made, tmp_path / "t", neighbours=9)
    folder = tmp_path / "t" / "0"
    (folder / "manifest.json").unlink()
    (folder / "work").mkdir()
    entries = len(np.load(folder / "probs.npy"))
    (folder / "work" / "rows.json").write_text(json.dumps({"rows": N, "entries": entries, "short": 0}))
    if harm == "gone":
        (folder / "indptr.npy").unlink()
    else:
        os.truncate(folder / "probs.npy", 300)
    run(made, tmp_path / "t", neighbours=9)
    assert files(folder) == files(tmp_path / "whole" / "0")


def test_the_datastore_as_its_own_queries_is_itself(made: tuple[list[Path], Path, Path], tmp_path: Path) -> None:
    chosen = TargetSettings(neighbours=9, temperature=0.7)
    for name, queries in (("a", ()), ("b", made[0])):
        targets.run(*made, tmp_path / name, chosen, queries=queries)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_shards_give_the_same_bits(made: tuple[list[Path], Path, Path], tmp_path: Path) -> None:
    whole = run(made, tmp_path / "1", neighbours=9, batch_size=8).rows([(0, N)])
    for shards in (3, 7):
        parts = run(made, tmp_path / str(shards), neighbours=9, batch_size=8, shards=shards).rows([(0, N)])
        for name in ("indptr", "tokens", "probs"):
            np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))


def test_fault_9_a_finished_shard_is_not_made_again(made: tuple[list[Path], Path, Path], tmp_path: Path) -> None:
    run(made, tmp_path)
    before = (tmp_path / "0" / "probs.npy").stat().st_mtime_ns
    run(made, tmp_path)
    assert (tmp_path / "0" / "probs.npy").stat().st_mtime_ns == before


def test_fault_5_float16_rows_hold_no_zero_and_sum_to_one_when_read(tmp_path: Path) -> None:
    """One neighbour so far away that float16 cannot tell its probability from zero."""
    keys = np.zeros((N, 1), np.float32)
    keys[: N // 2, 0] = np.linspace(0, 3, N // 2)
    keys[-1] = 5
    made = made_store(tmp_path, keys)
    wide = run(made, tmp_path / "float32", temperature=0.6)
    found = run(made, tmp_path / "float16", temperature=0.6, dtype="float16")
    raw = np.load(tmp_path / "float16" / "0" / "probs.npy")
    assert raw.dtype == np.float16
    assert (raw > 0).all()
    assert len(raw) < len(wide.rows([(0, N)]).probs)
    rows = found.rows([(0, N)])
    sums = np.add.reduceat(rows.probs, rows.indptr[:-1], dtype=np.float64)
    np.testing.assert_allclose(sums, 1, atol=1e-6)
    np.testing.assert_allclose(dense(found), dense(wide), atol=5e-4)


def test_rows_with_fewer_neighbours_are_right_and_a_row_with_none_is_named(
    tmp_path: Path,
) -> None:
    """Two far clusters in two cells of which one is searched: 5 positions have 4 neighbours, not the 30 asked for."""
    keys = np.random.default_rng(0).random((N, 2)).astype(np.float16)
    keys[:5] += 1000
    stream = write_tokens(tmp_path / "tokens", np.arange(N).astype(np.uint16) % V)
    store = write_store(tmp_path / "store", keys, stream)
    ivf = IndexSettings(kind="ivfflat", centroids=2, check_neighbours=3)
    with pytest.warns(UserWarning, match="60 training keys for 2 centroids"):
        index.run(store, tmp_path / "index", ivf)
    made = (store, tmp_path / "index", stream)
    for released in (False, True):
        with pytest.warns(UserWarning, match=r"\d+ of 60 rows have fewer than 30 neighbours in the 1 cells searched"):
            found = dense(run(made, tmp_path / f"t{released}", neighbours=30, nprobe=1, released=released))
        assert artefact.read(tmp_path / f"t{released}" / "0", "targets").facts["short_rows"] >= 5
        for i in range(5):
            weights = np.zeros(V)
            for j in set(range(5)) - {i}:
                weights[j % V] += np.exp(-((keys[i].astype(float) - keys[j].astype(float)) ** 2).sum() / 0.7)
            np.testing.assert_allclose(found[i], weights / weights.sum(), atol=1e-3 if released else 1e-6)
    keys[1:5] -= 1000
    store = write_store(tmp_path / "lonely", keys, stream)
    with pytest.warns(UserWarning, match="60 training keys"):
        index.run(store, tmp_path / "lonely-index", ivf)
    for released in (False, True):
        with pytest.raises(
            NumericsError, match=r"for position 0, but it has no neighbour: search more cells \(nprobe\)"
        ):
            run((store, tmp_path / "lonely-index", stream), tmp_path / "l", neighbours=3, nprobe=1, released=released)


PQ = IndexSettings(kind="ivfpq", centroids=16, code_size=6, check_neighbours=30)


@pytest.fixture(scope="module")
def modes(base_folder: Path, token_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model's keys of train, stored and streamed; those of valid; and one index of the first."""
    root = tmp_path_factory.mktemp("modes")
    window = {"context": 32, "stride": 16}
    for name, changes in (("stored", {}), ("streamed", {"stored": False}), ("valid", {"split": "valid"})):
        datastore.run(base_folder, token_folder, root / name, DatastoreSettings(batch_size=4, **changes), **window)
    index.run(root / "stored", root / "index", PQ)
    index.run(root / "stored", root / "exact", IndexSettings(check_neighbours=30))
    return {path.name: path for path in root.iterdir()}


@pytest.mark.slow
def test_streamed_keys_give_the_targets_of_stored_ones(
    modes: dict[str, Path], token_folder: Path, tmp_path: Path
) -> None:
    chosen = TargetSettings(neighbours=40, temperature=4, nprobe=4, released=True, shards=3, batch_size=500)
    for name in ("stored", "streamed"):
        for shard in range(3):
            out = tmp_path / name / str(shard)
            targets.run(modes[name], modes["index"], token_folder, out, chosen, shard=shard)
    for shard in "012":
        assert files(tmp_path / "stored" / shard) == files(tmp_path / "streamed" / shard)
    many = TargetSettings(neighbours=9, nprobe=17)
    with pytest.raises(ConfigError, match=r"nprobe: expected at most 16 cells .*, found 17"):
        targets.run(modes["stored"], modes["index"], token_folder, tmp_path / "x", many)
    with pytest.raises(ArtifactError, match="set `released: true` for the distances of the index, or store the keys"):
        targets.run(
            modes["streamed"], modes["index"], token_folder, tmp_path / "x", TargetSettings(neighbours=9, nprobe=4)
        )


@pytest.mark.slow
def test_the_batch_size_changes_nothing_in_approximate_search(
    modes: dict[str, Path], token_folder: Path, tmp_path: Path
) -> None:
    for size in (64, 1000):
        chosen = TargetSettings(neighbours=40, temperature=4, nprobe=4, batch_size=size)
        targets.run(modes["stored"], modes["index"], token_folder, tmp_path / str(size), chosen)
    assert files(tmp_path / "64") == files(tmp_path / "1000")


def test_rows_of_another_split_are_searched_without_removal(
    modes: dict[str, Path], token_folder: Path, tmp_path: Path
) -> None:
    chosen = TargetSettings(neighbours=20, temperature=2)
    targets.run(modes["stored"], modes["exact"], token_folder, tmp_path / "t", chosen, queries=modes["valid"])
    reader = TargetReader([tmp_path / "t"], artefact.read(token_folder, "tokens").facts["sha256"]["valid"])
    keys, asked = (np.load(modes[name] / "keys.npy").astype(np.float64) for name in ("stored", "valid"))
    values = tokens.load_stream(token_folder, "train")
    found = dense(reader, len(asked), 300)
    for position in range(0, len(asked), 17):
        sq_dist = ((keys - asked[position]) ** 2).sum(1)
        near = np.argsort(sq_dist, kind="stable")[:20]
        weight = np.exp(-(sq_dist[near] - sq_dist[near[0]]) / 2)
        np.testing.assert_allclose(found[position], np.bincount(values[near], weight / weight.sum(), 300), atol=2e-5)


# --- bad input ----------------------------------------------------------------------------------------------------


def test_queries_of_another_model_are_refused(modes: dict[str, Path], token_folder: Path, tmp_path: Path) -> None:
    keys = np.random.default_rng(0).random((N, 24)).astype(np.float16)
    stream = write_tokens(tmp_path / "tokens", np.zeros(N, np.uint16))
    other = write_store(tmp_path / "other", keys, stream, model="another")
    with pytest.raises(ArtifactError, match="expected queries by the model and key point of"):
        targets.run(
            modes["stored"], modes["exact"], token_folder, tmp_path / "t", TargetSettings(neighbours=5), queries=other
        )
    exact = IndexSettings(check_neighbours=5)
    index.run(other, tmp_path / "i", exact)
    with pytest.raises(ArtifactError, match=r"found one of other keys \(another model, text or settings\)"):
        targets.run(modes["stored"], tmp_path / "i", token_folder, tmp_path / "t", TargetSettings(neighbours=5))


def test_a_value_outside_the_vocabulary_is_named(tmp_path: Path) -> None:
    values = np.zeros(N, np.uint16)
    values[41] = 900
    stream = write_tokens(tmp_path / "tokens", values)
    store = write_store(
        tmp_path / "store", np.random.default_rng(0).random((N, 3)).astype(np.float16), stream, vocab=900
    )
    index.run(store, tmp_path / "index", IndexSettings())
    with pytest.raises(ConfigError, match="below the vocabulary of 900, found 900 at position 41"):
        run((store, tmp_path / "index", stream), tmp_path / "t")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"neighbours": N}, rf"neighbours: expected at most {N - 1} \({N} keys of .*\), found {N}"),
        ({"shards": N + 1}, f"expected at most {N} shards for {N} positions, found {N + 1}"),
    ],
)
def test_more_than_there_is_is_refused(
    made: tuple[list[Path], Path, Path], tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(made, tmp_path, **changes)


def test_too_little_disk_is_said_after_the_first_batch(
    made: tuple[list[Path], Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("U", "total used free")(10**6, 10**6, 100))
    with pytest.raises(ResourceError, match=r"free disk for the other 50 rows; set 'top' or 'threshold', found 100 B"):
        run(made, tmp_path, batch_size=10)


def test_a_span_beyond_the_end_ends(readers: tuple[TargetReader, NDArray[np.float64]]) -> None:
    try:
        pieces = list(islice(readers[0]._pieces(N - 1, N + 1), 10))
    except (MemDecError, IndexError, ValueError):
        return
    assert len(pieces) <= 2
