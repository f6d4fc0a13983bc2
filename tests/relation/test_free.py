"""`memdec free`: keys go once their targets are made, nothing is made again because of that, and readers say what is gone."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from making import run_memdec, write_store, write_tokens

from memdec.artefacts import artefact, doctor
from memdec.datastore import free, index, targets
from memdec.datastore import keys as datastore
from memdec.errors import ArtifactError
from memdec.settings import IndexSettings, TargetSettings

N, WIDTH = 90, 3


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Keys, an index with cells over them, and targets in two shards."""
    random = np.random.default_rng(0)
    stream = write_tokens(tmp_path / "tokens", random.integers(0, 11, N).astype(np.uint16))
    store = write_store(tmp_path / "store", random.normal(size=(N, WIDTH)).astype(np.float16), stream)
    index.run(store, tmp_path / "index", IndexSettings(kind="ivfflat", centroids=2))
    make_targets(tmp_path)
    return tmp_path


def stores(folder: Path) -> list[Path]:
    return [path.parent for path in sorted((folder / "store").rglob("manifest.json"))]


def make_targets(folder: Path) -> None:
    settings = TargetSettings(neighbours=5, nprobe=2, shards=2)
    for shard in range(2):
        out = folder / "targets" / str(shard)
        targets.run(stores(folder), folder / "index", folder / "tokens", out, settings, shard=shard)


def run(folder: Path) -> dict[str, int]:
    shards = [folder / "targets" / str(shard) for shard in range(2)]
    free.run(stores(folder), [folder / "index"], shards, folder / "freed.json")
    found: dict[str, int] = json.loads((folder / "freed.json").read_text())
    return found


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("manifest.json")}


def test_the_large_files_go_and_the_manifests_keep_their_times(made: Path) -> None:
    before, keys = times(made), [folder / "keys.npy" for folder in stores(made)]
    n_bytes = {str(file.parent): file.stat().st_size for file in keys}
    found = run(made)
    assert n_bytes.items() <= found.items()
    assert found[str(made / "index")] > 0
    assert not any(file.exists() for file in [*keys, made / "index" / "codes.npy"])
    assert times(made) == before
    assert run(made) == dict.fromkeys(found, 0)  # again, as after a kill


def test_nothing_counts_as_damaged_and_a_lost_file_of_another_kind_still_does(made: Path) -> None:
    run(made)
    assert doctor.run(made)[1] == 0
    (made / "targets" / "0" / "probs.npy").unlink()
    assert doctor.run(made)[1] == 1


def test_keys_that_are_not_named_as_removed_count_as_lost(made: Path) -> None:
    run(made)
    (stores(made)[0] / artefact.FREED).unlink()
    assert doctor.run(made)[1] == 1


def test_a_stage_that_is_done_does_not_run_again(made: Path) -> None:
    run(made)
    store = artefact.read(stores(made)[0], "datastore", freed=True)
    with artefact.building(stores(made)[0], "datastore", store.settings, store.inputs) as build:
        assert build is None


def test_who_reads_the_keys_is_told_what_happened(made: Path) -> None:
    run(made)
    with pytest.raises(
        ArtifactError, match=r"expected keys\.npy, found that `memdec free` removed it .* delete the folder"
    ):
        datastore.Datastore(stores(made))
    with pytest.raises(
        ArtifactError, match=r"index: expected codes\.npy, trained\.safetensors, found that `memdec free`"
    ):
        artefact.read(made / "index", "index")


def test_keys_that_are_made_again_are_no_longer_named_as_removed(made: Path) -> None:
    keys = [np.load(folder / "keys.npy") for folder in stores(made)]
    run(made)
    folder = stores(made)[0]
    said = artefact.read(folder, "datastore", freed=True)
    (folder / artefact.MANIFEST).unlink()  # as Snakemake does before a job
    with artefact.building(folder, "datastore", said.settings, said.inputs) as build:
        assert build is not None
        assert not (folder / artefact.FREED).exists()
        np.save(folder / "keys.npy", keys[0])
        build.facts.update(said.facts)
    assert "keys.npy" in artefact.read(folder, "datastore").files


def test_targets_of_other_keys_remove_nothing(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = made / "other"
    write_store(other, np.ones((N, WIDTH), np.float16), made / "tokens")
    shards = [path.parent for path in other.rglob("manifest.json")]
    words = [word for shard in shards for word in ("--datastore", shard)]
    status, _, said = run_memdec(
        capsys, "free", *words, "--index", made / "index", "--targets", made / "targets" / "0", "--out", made / "f.json"
    )
    assert status == 2, said
    assert "expected targets made from the --datastore that is given, found ones from another datastore" in said
    assert all((shard / "keys.npy").exists() for shard in shards)


def test_targets_of_a_teacher_remove_nothing(made: Path) -> None:
    shutil.rmtree(made / "targets" / "1")
    with artefact.building(made / "targets" / "1", "targets", {}, {"model": "m", "tokens": "t"}, stage="teacher"):
        pass
    with pytest.raises(
        ArtifactError, match="expected targets that were made from the --datastore, found those of a teacher"
    ):
        run(made)
    assert all((shard / "keys.npy").exists() for shard in stores(made))


def test_missing_targets_remove_nothing(made: Path) -> None:
    (made / "targets" / "1" / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"targets/1"):
        run(made)
    assert all((folder / "keys.npy").exists() for folder in stores(made))
