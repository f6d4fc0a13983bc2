"""When an artefact is made again, what goes first, and what must never go (damage is in test_artifacts.py)."""

import ast
from pathlib import Path

import pytest

from memdec.artefacts import artefact
from memdec.errors import ArtifactError
from memdec.settings import IndexSettings


def sizes(manifest: artefact.Manifest) -> dict[str, int]:
    return {name: listed.bytes for name, listed in manifest.files.items()}


def make(path: Path, settings: dict[str, object], inputs: dict[str, str] | None = None, kind: str = "thing") -> bool:
    with artefact.building(path, kind, settings, inputs or {}) as build:
        if build is None:
            return False
        (path / "sub").mkdir(exist_ok=True)
        (path / "sub" / "data.txt").write_text("x")
    return True


def test_the_old_manifest_goes_before_the_work_and_old_files_before_a_new_recipe(tmp_path: Path) -> None:
    out = tmp_path / "a"
    make(out, {"value": 1})
    (out / "sub" / "left.txt").write_text("of the first recipe")
    with artefact.building(out, "thing", {"value": 2}, {}) as build:
        assert build is not None
        assert sorted(file.name for file in out.rglob("*")) == [artefact.MARK, artefact.LOCK]
        with pytest.raises(ArtifactError, match="unfinished"):
            artefact.read(out, "thing")
        (out / "new.txt").write_text("abc")
    manifest = artefact.read(out, "thing")
    assert sizes(manifest) == {"new.txt": 3}
    assert manifest.recipe == build.recipe


def test_a_repair_of_the_same_recipe_is_not_read_before_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "a"
    make(out, {})
    (out / "sub" / "data.txt").unlink()
    with artefact.building(out, "thing", {}, {}) as build:
        assert build is not None
        (out / "sub" / "data.txt").write_text("y")  # whole again in size, but the stage is not done
        with pytest.raises(ArtifactError, match="unfinished"):
            artefact.read(out, "thing")


def test_the_recipe_is_settings_and_inputs_and_not_their_order(tmp_path: Path) -> None:
    out = tmp_path / "a"
    assert make(out, {"p": 1, "q": 2}, {"x": "1", "y": "2"})
    assert not make(out, {"q": 2, "p": 1}, {"y": "2", "x": "1"})
    assert make(out, {"p": 1, "q": 2}, {"x": "1", "y": "3"})
    assert make(out, {"p": 1, "q": 3}, {"x": "1", "y": "3"})
    assert sizes(artefact.read(out, "thing")) == {"sub/data.txt": 1}


def test_a_raised_version_makes_it_again_and_drops_the_work_of_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a"
    monkeypatch.setitem(artefact.VERSIONS, "thing", 1)
    make(out, {"value": 1})
    first = artefact.read(out, "thing")
    (out / artefact.MANIFEST).unlink()  # as Snakemake does before it runs a rule again
    (out / artefact.WORK).mkdir()
    (out / artefact.WORK / "checkpoint").write_text("of version 1")
    monkeypatch.setitem(artefact.VERSIONS, "thing", 2)
    with artefact.building(out, "thing", {"value": 1}, {}) as build:
        assert build is not None
        assert sorted(file.name for file in out.rglob("*")) == [artefact.MARK, artefact.LOCK]
    second = artefact.read(out, "thing")
    assert (first.version, second.version) == (1, 2)
    assert first.recipe != second.recipe
    monkeypatch.setitem(artefact.VERSIONS, "thing", 3)
    assert make(out, {"value": 1})  # the same command by hand
    assert not make(out, {"value": 1})


def test_the_version_is_that_of_the_stage_where_several_make_one_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_made(stage: str | None) -> bool:
        with artefact.building(tmp_path / str(stage), "model", {}, {}, stage=stage) as build:
            return build is not None

    assert is_made(None)
    assert is_made("finetune")
    monkeypatch.setitem(artefact.VERSIONS, "finetune", 99)
    assert not is_made(None)
    assert is_made("finetune")


def test_every_stage_of_the_package_has_a_version() -> None:
    calls = [
        call
        for path in sorted((Path(__file__).resolve().parents[2] / "memdec").rglob("*.py"))
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "building"
    ]
    named = {word.value.value for call in calls for word in call.keywords if isinstance(word.value, ast.Constant)}
    named |= {call.args[1].value for call in calls if isinstance(call.args[1], ast.Constant)}
    assert len(calls) > 12
    assert named <= set(artefact.VERSIONS)


def test_typed_settings_and_plain_ones_are_one_recipe(tmp_path: Path) -> None:
    with artefact.building(tmp_path / "a", "thing", IndexSettings(), {}):
        pass
    assert not make(tmp_path / "a", IndexSettings().model_dump(mode="json"))


def test_the_error_names_the_file_and_both_sizes(tmp_path: Path) -> None:
    make(tmp_path / "a", {})
    file = tmp_path / "a" / "sub" / "data.txt"
    file.write_text("longer")
    with pytest.raises(ArtifactError, match="expected 1 bytes, found 6 bytes") as caught:
        artefact.read(tmp_path / "a", "thing")
    assert str(caught.value).startswith(str(file))


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    artefact.write_json(tmp_path / "deep" / "a.json", {"n": 1})
    before = (tmp_path / "deep" / "a.json").read_text()
    with pytest.raises(TypeError):
        artefact.write_json(tmp_path / "deep" / "a.json", {"n": object()})
    assert (tmp_path / "deep" / "a.json").read_text() == before
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["a.json"]


def test_kind_of_never_raises(tmp_path: Path) -> None:
    make(tmp_path / "a", {})
    assert artefact.kind_of(tmp_path / "a") == "thing"
    for text in ("[1]", "{}", "{", ""):
        (tmp_path / "a" / artefact.MANIFEST).write_text(text)
        assert artefact.kind_of(tmp_path / "a") is None
    assert artefact.kind_of(tmp_path / "nothing") is None


def test_fault_9_a_whole_artefact_of_another_kind_is_not_wiped(tmp_path: Path) -> None:
    make(tmp_path / "a", {"value": 1}, kind="model")
    with pytest.raises(ArtifactError):
        make(tmp_path / "a", {}, kind="index")
    artefact.read(tmp_path / "a", "model")


def test_fault_9_an_input_of_the_build_is_not_wiped(tmp_path: Path) -> None:
    make(tmp_path / "a", {"value": 1}, kind="model")
    recipe = artefact.read(tmp_path / "a", "model").recipe
    with pytest.raises(ArtifactError):
        make(tmp_path / "a", {"value": 2}, {"model": recipe}, kind="model")
    artefact.read(tmp_path / "a", "model")
