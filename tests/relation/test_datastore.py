"""The datastore: key types, shards, processes, kills, streamed keys, and what is refused before hours are spent."""

import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making import CONTEXT, launch, write_store, write_tokens
from numpy.typing import NDArray

from memdec.artefacts import artefact, devices
from memdec.datastore import index, targets
from memdec.datastore import keys as datastore
from memdec.datastore.keys import Datastore
from memdec.errors import ArtifactError, ConfigError, ModelError, NumericsError, ResourceError
from memdec.models import keypoints, loading
from memdec.settings import Compute, DatastoreSettings, IndexSettings, TargetSettings
from memdec.text import tokens

WINDOW = {"context": CONTEXT, "stride": CONTEXT // 2}
SMALL = {"batch_size": 4}


def run(
    model: Path, stream: Path, out: Path, shard: int = 0, precision: devices.Precision = "float32", **changes: Any
) -> Path:
    settings, compute = DatastoreSettings(**{**SMALL, **changes}), Compute(precision=precision)
    datastore.run(model, stream, out, settings, **WINDOW, shard=shard, compute=compute)
    return out


def all_keys(store: Datastore, size: int = 1000) -> NDArray[np.float32]:
    return np.concatenate([keys.copy() for _, keys in store.blocks(0, store.n, size)])


@pytest.fixture(scope="module")
def whole(base_folder: Path, short_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(base_folder, short_tokens, tmp_path_factory.mktemp("whole") / "store")


@pytest.mark.parametrize("shards", [1, 3, 7])
def test_shards_give_the_same_bits(
    base_folder: Path, short_tokens: Path, whole: Path, tmp_path: Path, shards: int
) -> None:
    folders = [run(base_folder, short_tokens, tmp_path / str(i), i, shards=shards) for i in range(shards)]
    joined = np.concatenate([np.load(folder / "keys.npy") for folder in folders])
    np.testing.assert_array_equal(joined.view(np.uint16), np.load(whole / "keys.npy").view(np.uint16))
    ours, other = Datastore(folders[::-1]), Datastore(whole)
    assert ours.recipe == other.recipe  # so an index of one is an index of the other
    for size in (100, 777):
        np.testing.assert_array_equal(all_keys(ours, size), all_keys(other))
    if shards > 1:
        with pytest.raises(ArtifactError, match="give every shard once"):
            Datastore(folders[1:])


def test_a_raised_version_gives_other_keys_a_name_of_their_own(
    base_folder: Path, short_tokens: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = run(base_folder, short_tokens, tmp_path / "old", 0, shards=2)
    monkeypatch.setitem(artefact.VERSIONS, "datastore", 99)
    new = [run(base_folder, short_tokens, tmp_path / str(i), i, shards=2) for i in range(2)]
    assert Datastore(new).recipe != Datastore(whole).recipe  # so an index of the old keys is made again
    with pytest.raises(ArtifactError, match="shards of one run, found different settings, inputs or versions"):
        Datastore([old, new[1]])


@pytest.mark.slow
def test_two_processes_give_the_same_bits(base_folder: Path, short_tokens: Path, whole: Path, tmp_path: Path) -> None:
    arguments = ["--model", base_folder, "--tokens", short_tokens, "--out", tmp_path / "two"]
    arguments += ["--context", CONTEXT, "--stride", CONTEXT // 2, "--batch-size", 4]
    launch(2, "-m", "memdec.cli", "datastore", *arguments)
    assert (tmp_path / "two" / "keys.npy").read_bytes() == (whole / "keys.npy").read_bytes()
    assert artefact.read(tmp_path / "two", "datastore").recipe == artefact.read(whole, "datastore").recipe


def test_a_killed_run_goes_on_and_gives_the_same_bits(
    base_folder: Path, short_tokens: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datastore, "_CHUNK", 3)
    real, seen = datastore.Forward.keys, []

    def killed(self: datastore.Forward, number: int) -> NDArray[Any]:
        seen.append(number)
        if len(seen) == 20:
            raise KeyboardInterrupt
        return real(self, number)

    monkeypatch.setattr(datastore.Forward, "keys", killed)
    with pytest.raises(KeyboardInterrupt):
        run(base_folder, short_tokens, tmp_path / "d")
    with pytest.raises(ArtifactError, match="unfinished"):
        Datastore(tmp_path / "d")
    assert seen == list(range(20))
    run(base_folder, short_tokens, tmp_path / "d")
    assert seen[20] == 18  # six chunks of three were done
    assert (tmp_path / "d" / "keys.npy").read_bytes() == (whole / "keys.npy").read_bytes()
    assert not (tmp_path / "d" / "work").exists()


@pytest.mark.parametrize("harm", ["cut", "gone", "longer"])
def test_marks_beside_a_damaged_file_mean_nothing(
    base_folder: Path, short_tokens: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    monkeypatch.setattr(datastore, "_CHUNK", 3)
    run(base_folder, short_tokens, tmp_path / "d")
    keys, work = tmp_path / "d" / "keys.npy", tmp_path / "d" / "work"
    (tmp_path / "d" / "manifest.json").unlink()
    work.mkdir()
    for number in range(5):
        (work / f"chunk-{number}").touch()
    if harm == "gone":
        keys.unlink()
    else:
        os.truncate(keys, keys.stat().st_size + (-5000 if harm == "cut" else 100))
    run(base_folder, short_tokens, tmp_path / "d")
    assert keys.read_bytes() == (whole / "keys.npy").read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_streamed_keys_are_the_stored_ones(base_folder: Path, short_tokens: Path, tmp_path: Path, dtype: str) -> None:
    stored = Datastore(run(base_folder, short_tokens, tmp_path / "stored", dtype=dtype))
    streamed = Datastore(run(base_folder, short_tokens, tmp_path / "streamed", dtype=dtype, stored=False))
    assert stored.recipe == streamed.recipe
    assert sorted(path.name for path in (tmp_path / "streamed").iterdir()) == [
        ".memdec",
        ".memdec.lock",
        "manifest.json",
    ]
    np.testing.assert_array_equal(all_keys(streamed, 333), all_keys(stored))
    for begin, end, size in ((0, 1, 7), (50, 51, 1), (777, 1234, 100), (stored.n - 5, stored.n, 64)):
        for one, other in zip(streamed.blocks(begin, end, size), stored.blocks(begin, end, size), strict=True):
            assert one[0] == other[0]
            np.testing.assert_array_equal(one[1], other[1])
    for one, other in zip(streamed.sample(500, 3), stored.sample(500, 3), strict=True):
        np.testing.assert_array_equal(one, other)


def test_streamed_keys_are_made_where_the_stage_runs_and_their_model_is_let_go(
    base_folder: Path, short_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(base_folder, short_tokens, tmp_path / "d", stored=False)
    made, seen = datastore.Forward, []
    monkeypatch.setattr(datastore, "Forward", lambda *given: seen.append(given[-1].device) or made(*given))
    settings = IndexSettings(kind="ivfflat", centroids=2)
    index.run(folder, tmp_path / "i", settings, torch.device("cpu"))
    chosen = TargetSettings(neighbours=4, released=True, nprobe=1)
    targets.run(folder, tmp_path / "i", short_tokens, tmp_path / "t", chosen, device=torch.device("cpu"))
    assert set(seen) == {"cpu"}
    store = Datastore(folder)
    assert store.forward.point.width == store.width
    assert seen[-1] == "auto"
    store.check_model(keypoints.KeyPoint(loading.load(base_folder), store.settings.key_point))
    assert store._forward is None


def test_many_keys_in_float32_are_a_warning(
    base_folder: Path,
    short_tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    monkeypatch.setattr(datastore, "MANY", 1000)
    run(base_folder, short_tokens, tmp_path / "half")
    assert not [each for each in recwarn if "float32" in str(each.message)]
    with pytest.warns(UserWarning, match=r"keys in float32 take .* kB; float16, the released type, takes half of it"):
        run(base_folder, short_tokens, tmp_path / "full", dtype="float32")


def test_a_sample_is_random_positions_with_their_keys(whole: Path) -> None:
    store = Datastore(whole)
    positions, keys = store.sample(300, 0)
    np.testing.assert_array_equal(keys, all_keys(store)[positions])
    assert len(set(positions.tolist())) == 300
    assert not np.array_equal(positions, store.sample(300, 1)[0])
    assert len(np.unique(np.searchsorted(store.edges, positions, side="right"))) >= 20  # not one stretch of text
    positions, keys = store.sample(10 * store.n, 0)
    np.testing.assert_array_equal(positions, np.arange(store.n))


def test_bfloat16_keys_and_a_bfloat16_model(base_folder: Path, short_tokens: Path, whole: Path, tmp_path: Path) -> None:
    exact = all_keys(Datastore(whole))
    for changes, error in (
        ({"dtype": "bfloat16"}, 2**-8),
        ({"dtype": "float32"}, 2**-10),
        ({"precision": "bfloat16"}, 0.2),
    ):
        keys = all_keys(Datastore(run(base_folder, short_tokens, tmp_path / str(error), **changes)))
        assert 0 < np.abs(keys - exact).max() <= error * np.abs(exact).max()


def test_other_splits_and_key_points(base_folder: Path, short_tokens: Path, tmp_path: Path) -> None:
    store = Datastore(run(base_folder, short_tokens, tmp_path / "v", split="valid", key_point="final"))
    data = tokens.load_stream(short_tokens, "valid")
    assert store.n == len(data)
    np.testing.assert_array_equal(store.values, data)
    model = loading.load(base_folder)
    with torch.no_grad():
        ids = torch.tensor([[0, *data[: CONTEXT - 1].tolist()]])
        expected = model(ids, output_hidden_states=True).hidden_states[-1][0]
    np.testing.assert_allclose(all_keys(store)[:CONTEXT], expected, atol=2e-3)
    with pytest.raises(ModelError, match="expected key point mlp, attention, final or the path of a module"):
        run(base_folder, short_tokens, tmp_path / "x", key_point="nowhere")


# --- bad input ----------------------------------------------------------------------------------------------------


def test_fault_10_an_output_folder_in_use_is_refused_before_the_forward_pass(
    base_folder: Path, short_tokens: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a forward pass ran")

    monkeypatch.setattr(keypoints.KeyPoint, "__call__", refuse)
    before = (whole / "keys.npy").stat().st_mtime_ns
    run(base_folder, short_tokens, whole)  # the very same one is there: nothing to do
    assert (whole / "keys.npy").stat().st_mtime_ns == before
    (tmp_path / "keys.npy").write_text("mine")
    with pytest.raises(ArtifactError, match="expected an empty or new folder for the output, found other files"):
        run(base_folder, short_tokens, tmp_path)
    assert (tmp_path / "keys.npy").read_text() == "mine"


def test_fault_9_a_half_written_datastore_is_not_read(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "cut")
    with (tmp_path / "cut" / "keys.npy").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(ArtifactError, match=r"keys.npy: expected \d+ bytes, found 5000 bytes"):
        Datastore(tmp_path / "cut")
    (tmp_path / "cut" / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="unfinished"):
        Datastore(tmp_path / "cut")


def test_a_token_outside_the_vocabulary_is_named(base_folder: Path, short_tokens: Path, tmp_path: Path) -> None:
    values = np.array(tokens.load_stream(short_tokens, "train")[:400])
    values[123] = 300
    stream = write_tokens(
        tmp_path / "t", values, tokenizer=artefact.read(short_tokens, "tokens").facts["tokenizer_sha256"]
    )
    with pytest.raises(ConfigError, match="below the vocabulary of 300, found 300 at position 123 of the train split"):
        run(base_folder, stream, tmp_path / "d")


def test_a_context_longer_than_the_model_is_refused(base_folder: Path, short_tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"context: expected at most {CONTEXT} tokens .* found 40; lower 'context'"):
        datastore.run(base_folder, short_tokens, tmp_path / "d", DatastoreSettings(), context=40, stride=20)


def test_too_little_disk_is_said_before_the_work(
    base_folder: Path, short_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("U", "total used free")(10**9, 10**9, 5000))
    kilobytes = round(len(tokens.load_stream(short_tokens, "train")) * 24 * 2 / 1000)
    with pytest.raises(ResourceError, match=f"expected {kilobytes} kB of free disk for the keys .*, found 5 kB"):
        run(base_folder, short_tokens, tmp_path / "d")
    run(base_folder, short_tokens, tmp_path / "streamed", stored=False)  # needs none


@pytest.mark.parametrize(
    ("changes", "shard", "message"),
    [
        ({"shards": 2}, 2, "expected a shard from 0 to 1, found 2"),
        ({"shards": 2, "stored": False}, 0, "expected shards 1 where keys are not stored, found 2"),
        ({"shards": 5000}, 0, r"expected at most \d+ shards for \d+ forward passes, found 5000"),
    ],
)
def test_shards_that_cannot_be(
    base_folder: Path, short_tokens: Path, tmp_path: Path, changes: dict[str, Any], shard: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(base_folder, short_tokens, tmp_path / "d", shard, **changes)


def test_fault_11_bfloat16_holds_what_float16_cannot(
    base_folder: Path, short_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loading.load(base_folder)
    model.transformer.h[-1].ln_2.weight.data.fill_(1e6)
    monkeypatch.setattr(loading, "load", lambda _, dtype: model)
    with pytest.raises(
        NumericsError, match=r"at position \d+ \(beyond the range of float16; use dtype float32 or bfloat16\)"
    ):
        run(base_folder, short_tokens, tmp_path / "d")
    with pytest.raises(ArtifactError, match="unfinished"):
        Datastore(tmp_path / "d")
    assert np.abs(all_keys(Datastore(run(base_folder, short_tokens, tmp_path / "b", dtype="bfloat16")))).max() > 1e5


def test_a_streamed_datastore_whose_model_has_changed_is_refused(
    base_folder: Path, small_folder: Path, short_tokens: Path, tmp_path: Path
) -> None:
    shutil.copytree(base_folder, tmp_path / "model")
    store = run(tmp_path / "model", short_tokens, tmp_path / "d", stored=False)
    shutil.rmtree(tmp_path / "model")
    shutil.copytree(small_folder, tmp_path / "model")
    with pytest.raises(ArtifactError, match=r"expected the model that .* was made from, found another one"):
        next(Datastore(store).blocks(0, 5, 5))


def test_blocks_over_shards_of_any_length(tmp_path: Path) -> None:
    keys = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float16)
    stream = write_tokens(tmp_path / "t", np.zeros(50, np.uint16))
    store = Datastore(write_store(tmp_path / "s", keys, stream, edges=[0, 1, 2, 30, 50]))
    for begin, end, size in ((0, 50, 7), (1, 3, 1), (29, 31, 5), (3, 50, 100)):
        blocks = [(first, block.copy()) for first, block in store.blocks(begin, end, size)]
        np.testing.assert_array_equal(np.concatenate([b for _, b in blocks]), keys[begin:end].astype(np.float32))
        assert [first for first, _ in blocks] == list(range(begin, end, size))
