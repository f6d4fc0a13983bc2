"""`memdec check`: tables against a baseline."""

import json
from pathlib import Path
from typing import Any

import pytest

from memdec.errors import ArtifactError, ConfigError, IncomparableError
from memdec.results import cells as table_cells
from memdec.results import regression
from memdec.results.cells import Cell
from memdec.results.cells import write as write_cells

FACTS: dict[str, Any] = {
    "scale": "reduced",
    "corpora_sha256": {"sklearn": "ab"},
    "rows_sha256": {"dcpmi_cb_kl": "cd"},
    "versions": {"torch": "2.13.0+cpu", "python": "3.11.7"},
    "config": {"seeds": [1]},
    "machine": "M",
    "commit": "abc",
}
BASE, MIXED = "table3: GPT-2 / gpt2-S / base / sklearn", "table3: GPT-2 / gpt2-S / MemDec / sklearn"
ACCURACY = "table2: gpt2-S / MemDec / CB"


def wide(folder: Path, base: str, mixed: str, text: str = "", **facts: Any) -> Path:
    """table3.csv as it is without table3.cells.csv."""
    folder.mkdir(exist_ok=True)
    path = folder / "table3.csv"
    header = "family,model,method,sklearn,sklearn_n,sklearn_alpha,note"
    lines = [f"GPT-2,gpt2-S,base,{base},100,,", f"GPT-2,gpt2-S,MemDec,{mixed},100,0.6,{text}"]
    path.write_text("\n".join([header, *lines]) + "\n")
    path.with_suffix(".provenance.json").write_text(json.dumps(FACTS | facts))
    return path


def long(folder: Path, value: float, n: int = 200, facts: dict[str, Any] | None = None, **more: Any) -> Path:
    """table2.csv with table2.cells.csv, whose wide form would say something else."""
    folder.mkdir(exist_ok=True)
    path = folder / "table2.csv"
    path.write_text("model,method,CB,CB_n\ngpt2-S,MemDec,1,1\n")
    plain = {"table": "table2", "row": "gpt2-S / MemDec", "column": "CB", "unit": "percent", "value": value, "n": n}
    gap = Cell(table="table2", row="gpt2-S / LoRA", column="CB", note="not run: LoRA")
    write_cells(folder / "table2.cells.csv", [Cell.model_validate(plain | more), gap])
    path.with_suffix(".provenance.json").write_text(json.dumps(FACTS | (facts or {})))
    return path


def words(lines: list[regression.Line]) -> dict[str, str]:
    return {line.cell: line.word for line in lines}


def test_a_number_that_is_made_from_others_has_no_line(tmp_path: Path) -> None:
    """A small difference of two large cells would have the tolerance of a small number."""
    baseline = tmp_path / "base.json"
    regression.update([long(tmp_path / "a", 50.0)], baseline, "first")
    derived = Cell(table="table2", row="gpt2-S / gap", column="CB", unit="percent", value=0.1, low=-1.0, high=1.2)
    path = tmp_path / "a" / "table2.cells.csv"
    write_cells(path, [*table_cells.read(path), derived])
    lines, moved = regression.compare([tmp_path / "a" / "table2.csv"], baseline)
    assert (moved, words(lines)) == (False, {ACCURACY: "ok"})


def test_the_check_sees_what_moved_and_nothing_else(tmp_path: Path) -> None:
    baseline = tmp_path / "base.json"
    regression.update([wide(tmp_path / "a", "90", "61")], baseline, "first")
    lines, moved = regression.compare([wide(tmp_path / "b", "90.4", "61.2")], baseline)
    assert (moved, words(lines)) == (False, {BASE: "ok", MIXED: "ok"})
    lines, moved = regression.compare([wide(tmp_path / "c", "90", "61.4")], baseline)
    assert (moved, words(lines)) == (True, {BASE: "ok", MIXED: "MOVED"})
    assert str(lines[1]) == f"MOVED   {MIXED}: 61.000 -> 61.400 (+0.400, tolerance ±0.305)"
    lines, moved = regression.compare([wide(tmp_path / "d", "90", "", "not run: sklearn")], baseline)
    assert (moved, words(lines)) == (True, {BASE: "ok", MIXED: "MISSING"})
    lines, moved = regression.compare([wide(tmp_path / "e", "90", "61"), long(tmp_path / "e", 50.0)], baseline)
    assert (moved, words(lines)) == (False, {BASE: "ok", MIXED: "ok", ACCURACY: "NEW"})


def test_the_tolerance_is_three_deviations_over_seeds_and_the_file_says_of_which(tmp_path: Path) -> None:
    baseline, table = tmp_path / "base.json", wide(tmp_path / "a", "90", "60")
    others = [wide(tmp_path / name, "90", value) for name, value in (("s1", "61"), ("s2", "62"))]
    regression.update([table], baseline, "first", others)
    known = json.loads(baseline.read_text())
    assert known["cells"][MIXED]["sd"] == pytest.approx(1.0)
    assert known["cells"][MIXED]["tolerance"] == pytest.approx(3.0, abs=1e-4)
    assert known["cells"][BASE]["tolerance"] == pytest.approx(0.45, abs=1e-4)
    assert known["noise"] == [{"table": "table3", "seeds": [1], "machine": "M", "commit": "abc"}] * 2
    regression.update([wide(tmp_path / "b", "90", "70")], baseline, "a better model")
    known = json.loads(baseline.read_text())
    assert known["cells"][MIXED]["value"] == 70
    assert known["cells"][MIXED]["tolerance"] == pytest.approx(3.0, abs=1e-4)
    assert len(known["noise"]) == 2


def test_every_update_keeps_its_reason(tmp_path: Path) -> None:
    baseline, table = tmp_path / "base.json", wide(tmp_path / "a", "90", "60")
    for reason in ("", "  "):
        with pytest.raises(ConfigError, match="--reason: expected why"):
            regression.update([table], baseline, reason)
    assert not baseline.exists()
    for reason in ("first", "because"):
        regression.update([table], baseline, reason)
    updates = json.loads(baseline.read_text())["updates"]
    assert [each["reason"] for each in updates] == ["first", "because"]
    assert all(each["commit"] and len(each["date"]) == 10 for each in updates)


def test_an_update_or_check_takes_all_tables_of_the_baseline(tmp_path: Path) -> None:
    baseline, facts = tmp_path / "base.json", {"rows_sha256": {}}
    one, other = wide(tmp_path / "a", "90", "60", **facts), long(tmp_path / "a", 50.0)
    regression.update([one, other], baseline, "first")
    before = baseline.read_bytes()
    with pytest.raises(ConfigError, match=r"base.json: expected all of its tables, found none of table2, whose cells"):
        regression.update([one], baseline, "second")
    assert baseline.read_bytes() == before
    with pytest.raises(IncomparableError, match="found no table with the rows of dcpmi_cb_kl; give all tables"):
        regression.compare([one], baseline)


@pytest.mark.parametrize(("value", "word"), [(50.5, "ok"), (49.5, "ok"), (50.51, "MOVED"), (49.0, "MOVED")], ids=str)
def test_accuracies_are_read_from_the_cells_and_one_row_may_turn(tmp_path: Path, value: float, word: str) -> None:
    baseline = tmp_path / "base.json"
    regression.update([long(tmp_path / "a", 50.0)], baseline, "first")
    lines, moved = regression.compare([long(tmp_path / "b", value)], baseline)
    assert words(lines) == {ACCURACY: word}
    assert moved == (word == "MOVED")


def test_a_mean_over_seeds_has_their_noise(tmp_path: Path) -> None:
    baseline = tmp_path / "base.json"
    regression.update([long(tmp_path / "a", 50.0, seeds=4, sd=2.0)], baseline, "first")
    assert json.loads(baseline.read_text())["cells"][ACCURACY]["tolerance"] == pytest.approx(3.0, abs=1e-4)


def test_an_accuracy_of_zero_has_a_tolerance(tmp_path: Path) -> None:
    baseline = tmp_path / "base.json"
    regression.update([long(tmp_path / "a", 0.0)], baseline, "first")
    assert not regression.compare([long(tmp_path / "b", 0.0)], baseline)[1]
    assert regression.compare([long(tmp_path / "c", 2.0)], baseline)[1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"corpora_sha256": {"sklearn": "xx"}}, "corpus sklearn"),
        ({"rows_sha256": {"dcpmi_cb_kl": "xx"}}, "rows of dcpmi_cb_kl"),
        ({"versions": {"torch": "2.12.0"}}, r"torch 2\.12\.0 \(baseline 2\.13\.0\+cpu\)"),
    ],
)
def test_other_text_rows_or_versions_are_not_compared(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    regression.update([wide(tmp_path / "a", "90", "60")], tmp_path / "base.json", "first")
    with pytest.raises(IncomparableError, match=f"found other {said}; the comparison would mean nothing") as caught:
        regression.compare([wide(tmp_path / "b", "90", "60", **change)], tmp_path / "base.json")
    assert caught.value.exit_code == 3
    regression.update([wide(tmp_path / "b", "90", "60", **change)], tmp_path / "base.json", "new text")
    assert not regression.compare([wide(tmp_path / "b", "90", "60", **change)], tmp_path / "base.json")[1]


def test_another_build_of_a_version_is_the_same(tmp_path: Path) -> None:
    regression.update([wide(tmp_path / "a", "90", "60")], tmp_path / "base.json", "first")
    other = wide(tmp_path / "b", "90", "60", versions={"torch": "2.13.0+cu130"})
    assert not regression.compare([other], tmp_path / "base.json")[1]


def test_the_committed_baseline_is_one_with_both_kinds_of_numbers() -> None:
    known = regression._read(Path(__file__).resolve().parents[1] / "regression" / "reduced.json")
    assert known.scale == "reduced"
    assert {cell.unit for cell in known.cells.values()} == {"perplexity", "percent"}
    assert known.noise
    assert known.rows.keys() == {"dcpmi_rte_kp", "memdec_usmle"}
    assert all(0 < cell.tolerance < max(cell.value, 20) / 3 for cell in known.cells.values())


# --- bad input ----------------------------------------------------------------------------------------------------


def test_a_baseline_of_another_scale_is_no_baseline(tmp_path: Path) -> None:
    table, other = wide(tmp_path / "a", "90", "60"), wide(tmp_path / "b", "90", "60", scale="mini")
    regression.update([table], tmp_path / "base.json", "first")
    for call in (
        lambda: regression.compare([other], tmp_path / "base.json"),
        lambda: regression.update([other], tmp_path / "base.json", "why"),
        lambda: regression.update([table], tmp_path / "base.json", "why", [other]),
    ):
        with pytest.raises(
            ConfigError, match=r"expected one scale, found (reduced and mini|mini and reduced)"
        ) as caught:
            call()
        assert caught.value.exit_code == 2


@pytest.mark.parametrize("value", ["nan", "inf", "-", "1 2"])
def test_a_number_that_is_none_is_named(tmp_path: Path, value: str) -> None:
    table = wide(tmp_path / "a", "90", value)
    with pytest.raises(ArtifactError, match=f"expected a finite number for {MIXED}, found {value}; run") as caught:
        regression.update([table], tmp_path / "base.json", "first")
    assert caught.value.exit_code == 2


def test_nan_in_cells_is_named(tmp_path: Path) -> None:
    path = long(tmp_path / "a", 50.0).with_name("table2.cells.csv")
    path.write_text(path.read_text().replace("50.0", "nan"))
    with pytest.raises(ArtifactError, match=r"line 2: expected a cell, found value: .*nan"):
        regression.cells([tmp_path / "a" / "table2.csv"])


def test_two_values_for_a_cell_are_not_chosen_from(tmp_path: Path) -> None:
    table = wide(tmp_path / "a", "90", "60")
    table.write_text(table.read_text().replace("MemDec", "base"))
    with pytest.raises(ArtifactError, match="expected one value for each cell, found two for table3"):
        regression.cells([table])
    again = wide(tmp_path / "b", "90", "60")
    with pytest.raises(ArtifactError, match="give each table once"):
        regression.cells([again, again])


@pytest.mark.parametrize("kind", ["rows", "corpora"])
def test_rows_that_changed_between_two_tables_are_named(tmp_path: Path, kind: str) -> None:
    changed = {"rows_sha256": {"dcpmi_cb_kl": "xx"}} if kind == "rows" else {"corpora_sha256": {"sklearn": "xx"}}
    tables = [wide(tmp_path / "a", "90", "60"), long(tmp_path / "a", 50.0, facts=changed)]
    name = "dcpmi_cb_kl" if kind == "rows" else "sklearn"
    with pytest.raises(ArtifactError, match=f"found other {name}, which changed since one of them was made") as caught:
        regression.update(tables, tmp_path / "base.json", "first")
    assert caught.value.exit_code == 2


def test_files_that_are_not_there_or_no_baseline_are_named(tmp_path: Path) -> None:
    table = wide(tmp_path / "a", "90", "60")
    with pytest.raises(ArtifactError, match=r"base\.json: expected a baseline, found .*--update --reason"):
        regression.compare([table], tmp_path / "base.json")
    (tmp_path / "base.json").write_text('{"scale": "reduced", "cells": {}}')
    with pytest.raises(ArtifactError, match=r"expected a baseline, found .*updates"):
        regression.compare([table], tmp_path / "base.json")
    table.with_suffix(".provenance.json").unlink()
    with pytest.raises(ArtifactError, match=r"expected the provenance of table3\.csv"):
        regression.facts([table])
    table.unlink()
    with pytest.raises(ArtifactError, match=r"table3\.csv: expected a table, found"):
        regression.cells([table])
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ArtifactError, match="expected labels and a column NAME with NAME_n"):
        regression.cells([tmp_path / "x.csv"])
