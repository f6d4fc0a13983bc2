"""The lines of a table for programs, and the items that tests of differences need."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memdec.artefacts import artefact
from memdec.errors import ArtifactError
from memdec.harness.scores import TokenScores
from memdec.results import cells, items, scores
from memdec.results.cells import Cell

ROOT = Path(__file__).resolve().parents[2]


def cell(**more: Any) -> Cell:
    return Cell.model_validate({"table": "table2", "row": "gpt2-S / MemDec", "column": "SST2", "value": 0.5} | more)


def test_the_schema_of_the_cells_is_fresh() -> None:
    path = ROOT / "workflow" / "schemas" / "cells.schema.json"
    assert json.loads(path.read_text()) == cells.json_schema(), f"stale; run `memdec schema {path} --of cells`"


def test_cells_are_read_as_they_were_written(tmp_path: Path) -> None:
    full = {"low": 0.4, "high": 0.6, "n": 200, "seeds": 2, "sd": 0.01, "alpha": "0.3 0.4", "lambda": "0.25"}
    full |= {"labels": {"a, b": 3, 'c"': 197}, "constant": False, "lower_is_better": False, "p_base": 1e-4}
    both = [cell(**full), cell(column="MR", value=None, note="not run: no suite has it")]
    cells.write(tmp_path / "t.cells.csv", both)
    assert cells.read(tmp_path / "t.cells.csv") == both
    with (tmp_path / "t.cells.csv").open() as file:
        assert tuple(next(csv.reader(file))) == cells.COLUMNS
    assert ",".join(cells.COLUMNS) == (
        "table,study,row,family,model,method,memory,column,domain,task,metric,unit,lower_is_better,value,low,high,n,"
        "seeds,sd,alpha,lambda,temperature,learning_rate,p_base,best_other,p_best,labels,constant,paper,verdict,note"
    )


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (",0.5,", ",nan,", "line 2: expected a cell, found value: Input should be a finite number"),
        (",0.5,", ",high,", "line 2: expected a cell, found value: Input should be a valid number"),
        (",0.5,", ",,", "line 2: expected a cell, found note: expected the reason why the cell has no value"),
        ("SST2", "MR", "expected one cell in a place, found two in row gpt2-S / MemDec, column MR"),
        ("p_best", "p_worst", "expected the columns .*, found no p_best; make the table again"),
    ],
)
def test_a_fault_in_a_cell_is_named(tmp_path: Path, old: str, new: str, says: str) -> None:
    path = tmp_path / "t.cells.csv"
    cells.write(path, [cell(), cell(column="MR", value=0.25)])
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ArtifactError, match=says):
        cells.read(path)
    with pytest.raises(ArtifactError, match=r"expected cells of a table, found: .*; make the table again"):
        cells.read(tmp_path / "none.csv")
    with pytest.raises(ArtifactError, match="found two in row gpt2-S / MemDec, column SST2"):
        cells.write(path, [cell(), cell()])


def test_items_of_a_perplexity_are_its_windows_at_the_weight_of_the_record(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base, memory = np.log(rng.uniform(0.01, 1, 10)), np.log(rng.uniform(0.01, 1, 10))
    mixed = np.log(0.6 * np.exp(memory) + 0.4 * np.exp(base))
    record = {"method": "MemDec", "on": "torch", "seed": 3, "alpha": 0.6, "value": math.exp(-mixed.mean())}
    with artefact.building(tmp_path / "e", "evaluation", {"stride": 4}, {}) as build:
        assert build is not None
        artefact.write_json(tmp_path / "e" / "records.json", [record])
        scores.write(tmp_path / "e", TokenScores(base, memory), "test", None)
    found = items.of_evaluation(tmp_path / "e", record)
    assert (found.seed, found.kind, list(found.counts)) == (3, "perplexity", [4, 4, 2])
    assert found.sums == pytest.approx([-mixed[:4].sum(), -mixed[4:8].sum(), -mixed[8:].sum()])
    assert items.of_evaluation(tmp_path / "e", record, weight=0.0).value == pytest.approx(math.exp(-base.mean()))
    with pytest.raises(ArtifactError, match="expected scores with the perplexity 1 of MemDec, found"):
        items.of_evaluation(tmp_path / "e", record | {"value": 1.0})


def test_scores_are_not_kept_of_every_evaluation(tmp_path: Path) -> None:
    """A table reads each text once, and keeps the sums of its windows."""
    items._scored.cache_clear()
    for name in ("a", "b", "a", "b"):
        with artefact.building(tmp_path / name, "evaluation", {"stride": 4}, {}) as build:
            if build is not None:
                artefact.write_json(tmp_path / name / "records.json", [{"on": "torch"}])
                scores.write(tmp_path / name, TokenScores(np.log(np.full(10, 0.5)), None), "test", None)
        record = {"method": "base", "on": "torch", "seed": 0, "value": 2.0}
        assert items.of_evaluation(tmp_path / name, record).value == pytest.approx(2.0)
    assert items._scored.cache_info().currsize == 1
    assert items._scored.cache_info().misses == 2


def write_samples(folder: Path, task: str, rows: list[dict[str, Any]], metrics: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    listed = [{"metric": name, "aggregation": how} for name, how in metrics.items()]
    results = {"results": {task: {}}, "configs": {task: {"metric_list": listed}}}
    artefact.write_json(folder / "results_2026.json", results)
    lines = [
        {"doc_id": number, "doc": {"text": str(number)}, "filter": "none", "metrics": list(row), **row}
        for number, row in enumerate(rows)
    ]
    (folder / f"samples_{task}_2026.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_items_of_a_task_are_its_rows(tmp_path: Path) -> None:
    rows = [{"acc": 1.0, "micro_f1": [0, 0]}, {"acc": 0.0, "micro_f1": [1, 0]}, {"acc": 1.0, "micro_f1": [1, 1]}]
    rows = [row | {"largest": [0, 1]} for row in rows]
    how = {"acc": "mean", "micro_f1": "def micro_f1(items):\n ...", "largest": "def largest_share(items):\n ..."}
    write_samples(tmp_path, "t", rows, how)

    def of(metric: str, value: float) -> items.Items:
        return items.of_samples(tmp_path, {"task": "t", "metric": metric, "seed": 1, "value": value})

    accuracy = of("acc", 2 / 3)
    assert (accuracy.kind, list(accuracy.sums), list(accuracy.counts)) == ("mean", [1, 0, 1], [1, 1, 1])
    micro = of("micro_f1", 2 / 3)
    assert (micro.kind, micro.averages, len(micro)) == ("other", ("micro",), 3)
    assert micro.labels is not None
    assert micro.labels.tolist() == [[0, 0], [1, 0], [1, 1]]
    assert len(of("largest", 0.5)) == 0
    with pytest.raises(ArtifactError, match=r"expected rows of t with acc 0\.5, found 0\.666"):
        of("acc", 0.5)
