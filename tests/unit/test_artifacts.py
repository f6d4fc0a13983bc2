"""Artefact folders: whole or not at all."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from memdec.artefacts import artefact
from memdec.errors import ArtifactError


def sizes(manifest: artefact.Manifest) -> dict[str, int]:
    return {name: listed.bytes for name, listed in manifest.files.items()}


def make(path: Path, value: int = 1, crash: bool = False) -> bool:
    with artefact.building(path, "thing", {"value": value}, {}) as build:
        if build is None:
            return False
        (build.work / "checkpoint").write_text("half")
        (path / "data.txt").write_text(str(value))
        if crash:
            raise RuntimeError("killed")
        build.facts["n"] = value
    return True


def test_manifest_is_written_last_and_the_same_again_is_skipped(tmp_path: Path) -> None:
    out = tmp_path / "a"
    assert make(out)
    manifest = artefact.read(out, "thing")
    assert manifest.facts == {"n": 1}
    assert sizes(manifest) == {"data.txt": 1}
    assert not (out / artefact.WORK).exists()
    assert not make(out)


def test_other_inputs_make_another_artefact(tmp_path: Path) -> None:
    for recipe in ("1" * 32, "2" * 32):
        with artefact.building(tmp_path / "a", "thing", {"value": 1}, {"corpus": recipe}) as build:
            assert build is not None
        assert artefact.read(tmp_path / "a", "thing").inputs == {"corpus": recipe}
    with artefact.building(tmp_path / "a", "thing", {"value": 1}, {"corpus": recipe}) as build:
        assert build is None


def test_two_builds_in_one_folder_are_refused(tmp_path: Path) -> None:
    with artefact.building(tmp_path / "a", "thing", {"value": 1}, {}) as build:
        assert build is not None
        with pytest.raises(
            ArtifactError, match="expected a folder that nobody builds in, found another process at work"
        ):
            make(tmp_path / "a", 2)
    make(tmp_path / "a", 2)  # the lock is gone with the build
    assert sizes(artefact.read(tmp_path / "a", "thing")) == {"data.txt": 1}


def test_the_lock_goes_with_its_process(tmp_path: Path) -> None:
    begin = "import os, pathlib, sys; from memdec.artefacts import artefact\n"
    code = f"{begin}with artefact.building(pathlib.Path(sys.argv[1]), 'thing', {{'value': 1}}, {{}}): os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=False).returncode == -9
    assert make(tmp_path / "a")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(number, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refused)
    assert make(tmp_path / "a")


def test_an_output_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            ArtifactError, match=r"expected a folder that can be written, found .*; choose another --out"
        ):
            make(path)


def test_a_killed_build_is_not_read_and_keeps_its_work_for_the_same_recipe_only(tmp_path: Path) -> None:
    out = tmp_path / "a"
    make(out)
    with pytest.raises(RuntimeError):
        make(out, 2, crash=True)
    with pytest.raises(ArtifactError, match="unfinished"):
        artefact.read(out, "thing")
    assert (out / "work" / "checkpoint").exists()
    with artefact.building(out, "thing", {"value": 2}, {}) as build:
        assert build is not None
        assert (out / "work" / "checkpoint").exists()
    with pytest.raises(RuntimeError):
        make(out, 3, crash=True)
    with artefact.building(out, "thing", {"value": 4}, {}) as build:
        assert build is not None
        assert not (out / "work").exists()
        assert not (out / "data.txt").exists()


def test_somebody_elses_folder_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="other files"):
        make(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("damage", ["cut", "not json", "no file", "short file", "other kind", "no folder"])
def test_damage_is_one_clear_error_and_rebuilt(tmp_path: Path, damage: str) -> None:
    out = tmp_path / "a"
    make(out)
    manifest = out / artefact.MANIFEST
    if damage == "cut":
        manifest.write_text(manifest.read_text()[:50])
    elif damage == "not json":
        manifest.write_bytes(b"\xff\xfe")
    elif damage == "no file":
        (out / "data.txt").unlink()
    elif damage == "short file":
        (out / "data.txt").write_text("")
    elif damage == "other kind":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "kind": "else"}))
    else:
        out = tmp_path / "nothing"
    with pytest.raises(ArtifactError, match=r"expected .* found") as caught:
        artefact.read(out, "thing")
    assert str(out) in str(caught.value)
    assert "\n" not in str(caught.value)
    if damage == "other kind":  # a mistyped --out must not cost an artefact
        with pytest.raises(ArtifactError, match="found one of kind else"):
            make(out)
    else:
        assert make(out)
        artefact.read(out, "thing")


def test_a_lock_of_another_user_is_no_missing_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it cannot be opened, another user may be building, so nobody else does."""
    (tmp_path / artefact.LOCK).touch()

    def refused(*args: object, **more: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    access = os.access
    monkeypatch.setattr(artefact.FileLock, "acquire", refused)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != artefact.LOCK and access(path, mode))
    with (
        pytest.raises(ArtifactError, match="found that of another user"),
        artefact.building(tmp_path, "corpus", {}, {}),
    ):
        pass
    (tmp_path / artefact.LOCK).unlink()
    with artefact.locked(tmp_path):  # a file system without locks
        pass
