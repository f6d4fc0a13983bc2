"""`memdec doctor`: what is cut is found, named with all that hangs on it, and not read any more."""

from pathlib import Path

import pytest

from memdec import cli
from memdec.artefacts import artefact, doctor
from memdec.errors import ArtifactError, ConfigError


def make(path: Path, kind: str, inputs: dict[str, str] | None = None, **facts: str) -> str:
    """A whole artefact with one file; its recipe."""
    with artefact.building(path, kind, {"name": path.name}, inputs or {}) as build:
        assert build is not None
        (path / "data.txt").write_text("whole")
        build.facts.update(facts)
    return build.recipe


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A chain: tokens, two shards of a datastore that share the recipe of their keys, index, targets, memory."""
    tokens = make(tmp_path / "tokens", "tokens")
    for shard in ("1-of-2", "2-of-2"):
        make(tmp_path / "datastore" / shard, "datastore", {"tokens": tokens}, keys_recipe="keys")
    index = make(tmp_path / "index", "index", {"datastore": "keys"})
    targets = make(tmp_path / "targets", "targets", {"datastore": "keys", "index": index})
    make(tmp_path / "memory", "memory", {"tokens": tokens, "targets 0": targets})
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "train.log").write_text("no artefact")
    return tmp_path


def damage(folder: Path, how: str) -> None:
    manifest = folder / artefact.MANIFEST
    if how == "short file":
        (folder / "data.txt").write_text("who")
    elif how == "no file":
        (folder / "data.txt").unlink()
    else:
        manifest.write_text(manifest.read_text()[: {"cut manifest": 40, "empty manifest": 0}[how]])


def test_what_is_whole_is_said_to_be_and_left(results: Path) -> None:
    assert doctor.run(results) == ([f"{results}: 6 artefacts, 0 damaged, 0 unfinished"], 0)
    artefact.read(results / "index", "index")


@pytest.mark.parametrize("how", ["short file", "no file", "cut manifest", "empty manifest"])
@pytest.mark.parametrize(
    ("name", "with_it"),
    [
        ("memory", []),
        ("index", ["index", "targets", "memory"]),
        ("datastore/1-of-2", ["index", "targets", "memory"]),
    ],
)
def test_damage_is_named_with_all_that_hangs_on_it(results: Path, how: str, name: str, with_it: list[str]) -> None:
    damage(results / name, how)
    lines, n_damaged = doctor.run(results)
    assert n_damaged == 1
    assert lines[0].startswith(f"{results / name}: damaged; {results / name}")
    again = lines[0].partition("will be made again")[2].removeprefix(" with ")
    if "manifest" in how and (name.startswith("datastore") or not with_it):  # the keys are named there alone
        assert again == "what was made from it"
        return
    assert set(again.split(", ")) - {""} == {str(results / other) for other in with_it if other != name}
    with pytest.raises(ArtifactError, match="unfinished"):
        artefact.read(results / name, artefact.kind_of(results / name) or "index")
    assert (results / name / artefact.MARK).is_file()  # still ours, so that the stage may build there
    assert doctor.run(results)[1] == 0


def test_results_on_another_disk_are_looked_at(results: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    home = tmp_path_factory.mktemp("home")
    (home / "results").mkdir()
    (home / "results" / "mini").symlink_to(results)
    (results / "round").symlink_to(results)  # a circle
    damage(results / "memory", "short file")
    lines, n_damaged = doctor.run(home / "results")
    assert n_damaged == 1
    assert lines[-1] == f"{home / 'results'}: 6 artefacts, 1 damaged, 0 unfinished"


def test_work_in_progress_is_no_damage(results: Path) -> None:
    with artefact.building(results / "index", "index", {"new": 1}, {}) as build:
        assert build is not None
        (build.work / "checkpoint").write_text("half")
        (results / "index" / "data.txt").write_text("whole")
        lines, n_damaged = doctor.run(results)
        assert (n_damaged, len(lines)) == (0, 2)
        assert lines[0] == f"{results / 'index'}: unfinished; left for the command that makes it"
        assert (build.work / "checkpoint").is_file()
    damage(results / "index", "short file")
    with artefact.locked(results / "index"):  # a process is about to build it again
        assert doctor.run(results)[1] == 0
    assert doctor.run(results)[1] == 1


def test_the_files_of_others_are_left(results: Path) -> None:
    other = results / "site" / artefact.MANIFEST
    other.parent.mkdir()
    for text in ('{"icons": []}', "cut"):
        other.write_text(text)
        assert doctor.run(results)[1] == 0
        assert other.read_text() == text
    (results / "memory" / artefact.MARK).unlink()  # an artefact from elsewhere
    damage(results / "memory", "no file")
    assert doctor.run(results)[1] == 1


def test_the_command_says_it_by_its_exit_code(
    results: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["memdec", "doctor", str(results)])
    cli.main()
    assert "6 artefacts, 0 damaged" in capsys.readouterr().out
    damage(results / "index", "no file")
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert "index: damaged; " in capsys.readouterr().out
    with pytest.raises(ConfigError, match="expected a folder with artefacts, found none"):
        doctor.run(results / "nowhere")
