"""Sweeps over alpha against runs at one alpha."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from making import made_text
from typer.testing import CliRunner

from memdec import cli
from memdec.errors import ConfigError
from memdec.harness.models import MemDecInterp
from memdec.results import sweep
from memdec.settings import SPLITS, FileCorpus
from memdec.text import corpora

ALPHAS = [0.0, 0.35, 1.0]


def test_a_sweep_equals_runs_at_each_alpha_and_runs_the_models_once(
    base_folder: Path, small_folder: Path, corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"batch_size": 4, "device": "cpu"}
    run = (str(base_folder), str(small_folder), ["memdec_ppl"], tmp_path / "s")
    sweep.run(*run, alphas=ALPHAS, corpus=corpus_folder, **arguments)
    table = pd.read_csv(tmp_path / "s" / "sweep.csv")
    found = table[table["metric"] == "token_perplexity"].set_index("alpha")["value"]
    assert list(found.index) == ALPHAS
    for alpha in ALPHAS:
        best = sweep.tune(str(base_folder), str(small_folder), corpus_folder, split="test", alphas=[alpha], **arguments)
        assert found[alpha] == pytest.approx(best[alpha], rel=2e-6)
    assert "token_perplexity" in sweep.shown(tmp_path / "s")
    assert (tmp_path / "s" / "sweep.png").stat().st_size > 5000
    facts = json.loads((tmp_path / "s" / "manifest.json").read_text())["facts"]
    (best_row,) = (row for row in facts["best"] if row["metric"] == "token_perplexity")
    assert best_row["value"] == found.min()

    monkeypatch.setattr(MemDecInterp, "_load", lambda _: pytest.fail("a model was loaded"))
    (tmp_path / "s" / "manifest.json").unlink()  # as if it had been killed at the end
    sweep.run(*run, alphas=ALPHAS, corpus=corpus_folder, **arguments)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "s" / "sweep.csv"), table)


def test_a_sweep_is_measured_again_where_the_text_behind_the_same_folder_or_variable_is_another(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    row = {"task": "memdec_ppl", "metric": "total", "alpha": 0.0, "value": 1.0, "stderr": None}
    monkeypatch.setattr(sweep, "_evaluate", lambda *_: (runs.append(1) or [row], {("memdec_ppl", "total"): True}))
    monkeypatch.setattr(sweep, "_draw", lambda *_: None)
    monkeypatch.setattr(sweep, "MemDecInterp", lambda **_: None)
    monkeypatch.setattr(sweep, "model_identity", str)

    def make(name: str, seed: int) -> Path:
        for split in SPLITS:
            (tmp_path / f"{split}.txt").write_text(f"{split} {made_text(4, seed)}")
        paths = {split: str(tmp_path / f"{split}.txt") for split in SPLITS}
        corpora.run(FileCorpus(source="files", paths=paths, min_bytes=100), tmp_path / name)
        return tmp_path / name

    def n_runs(corpus: Path | None) -> int:
        sweep.run(str(tokenizer_folder), "m", ["memdec_ppl"], tmp_path / "s", alphas=[0.0], corpus=corpus)
        return len(runs)

    assert [n_runs(make("c", 0)), n_runs(tmp_path / "c"), n_runs(make("c", 1))] == [1, 1, 2]
    monkeypatch.setenv("MEMDEC_CORPUS", str(tmp_path / "c"))
    assert n_runs(None) == 2
    monkeypatch.setenv("MEMDEC_CORPUS", str(make("d", 0)))
    assert [n_runs(None), n_runs(None)] == [3, 3]


def test_each_filter_of_a_task_has_its_own_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gsm8k reads the number of an answer in two ways: one falls with alpha, the other rises."""
    model = SimpleNamespace(set_weight=lambda alpha: setattr(model, "alpha", alpha))

    def evaluated(model: Any, *_: object, **__: object) -> dict[str, Any]:
        strict = {"exact_match,strict-match": 0.1 + model.alpha, "exact_match_stderr,strict-match": 0.01}
        loose = {"exact_match,flexible-extract": 0.5 - model.alpha / 2, "exact_match_stderr,flexible-extract": 0.02}
        plain = {"alias": "gsm8k", "length,none": 7, "length_stderr,none": "N/A"}
        better = {"exact_match": True, "length": False}
        return {"results": {"gsm8k": strict | loose | plain}, "higher_is_better": {"gsm8k": better}}

    monkeypatch.setattr(sweep, "evaluate", evaluated)
    rows, better = sweep._evaluate(model, {"tasks": {}}, [0.0, 0.5], None)
    assert {metric: [row["value"] for row in rows if row["metric"] == metric] for _, metric in better} == {
        "exact_match,strict-match": [0.1, 0.6],
        "exact_match,flexible-extract": [0.5, 0.25],
        "length": [7, 7],
    }
    assert [row["stderr"] for row in rows] == [0.01, 0.02, None] * 2
    assert list(better.values()) == [True, True, False]
    assert [sweep._best(rows, row, better)["alpha"] for row in rows[:2]] == [0.5, 0.0]
    (tmp_path / "sweep.csv").write_text(sweep._csv(rows))
    assert [line.split() for line in sweep.shown(tmp_path).splitlines()[-2:]] == [["0", "0.1"], ["0.5", "0.6"]]
    sweep._draw(rows, better, tmp_path)
    assert "exact match, strict-match" in (tmp_path / "sweep.svg").read_text()


@pytest.mark.parametrize(("tasks", "indexed"), [(["memdec_ppl"], [False]), (["memdec_ppl", "arc_easy"], [False, True])])
def test_the_tasks_of_lm_eval_are_indexed_only_for_one_of_them(
    monkeypatch: pytest.MonkeyPatch, tasks: list[str], indexed: list[bool]
) -> None:
    made = []

    class Manager:
        all_tasks = ("memdec_ppl",)

        def __init__(self, include_defaults: bool = True, **_: object) -> None:
            made.append(include_defaults)

    monkeypatch.setattr(sweep, "TaskManager", Manager)
    sweep._manager(tasks, {})
    assert made == indexed


def test_tune_prints_the_best_alpha(base_folder: Path, small_folder: Path, corpus_folder: Path) -> None:
    command = ["tune", "--base", base_folder, "--memory", small_folder, "--corpus", corpus_folder, "--device", "cpu"]
    result = CliRunner().invoke(cli.app, [*map(str, command), "--alpha", "0.2", "--alpha", "0.9", "--alpha", "0"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["sweep"].keys() == {"0", "0.2", "0.9"}
    assert found["perplexity"] == min(found["sweep"].values()) == found["sweep"][f"{found['alpha']:g}"]
    assert found["split"] == "valid"


def test_tune_reads_the_valid_text(base_folder: Path, dapt_folder: Path, corpus_folder: Path) -> None:
    how = {"alphas": [0.5, 0.95], "device": "cpu"}
    found = sweep.tune(str(base_folder), str(dapt_folder), corpus_folder, **how)  # type: ignore[arg-type]
    on_test = sweep.tune(str(base_folder), str(dapt_folder), corpus_folder, split="test", **how)  # type: ignore[arg-type]
    assert (list(found), list(on_test)) == ([0.95, 0.5], [0.5, 0.95])


@pytest.mark.parametrize(
    ("change", "message"),
    [({"alphas": []}, "at least one task and one alpha"), ({"alphas": [1.2]}, "expected a number from 0")],
)
def test_bad_sweeps(base_folder: Path, tmp_path: Path, change: dict[str, list[float]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep.run(str(base_folder), str(base_folder), ["memdec_ppl"], tmp_path / "s", **change)  # type: ignore[arg-type]
