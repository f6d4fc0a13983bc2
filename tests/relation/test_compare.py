"""`memdec compare` on runs of lm-eval: pairing, tests, and what must not be compared."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from scipy.stats import binomtest

from memdec import HARNESS_TASKS, cli
from memdec.errors import CorpusError, IncomparableError
from memdec.harness.models import MemDecInterp
from memdec.maths import statistics
from memdec.results import compare
from memdec.tasks import qa

TASKS = ["pubmedqa", "memdec_nq", "memdec_ppl", "memdec_fpb", "memdec_headline"]


@pytest.fixture(scope="module")
def runs(
    base_folder: Path, small_folder: Path, corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The same tasks by the base and by the memory, as `lm_eval --output_path --log_samples` writes them."""
    folder = tmp_path_factory.mktemp("runs")
    words = ["returns the matrix", "scales", "of size 4.", "the window", "reads the token", "9", "kernel"]
    rows = [
        {"input": f"The {words[-1]} {i}", "options": [words[(i + j * j) % 7] for j in range(3)], "gold_index": i % 3}
        for i in range(30)
    ]
    model = MemDecInterp(pretrained=str(base_folder), memory=str(small_folder), alpha=0.0, device="cpu", batch_size=8)
    asked = [f"what does the {word} return" for word in ("matrix", "token", "kernel 3", "it", "window of size 8", "a")]
    prompts = [(qa.prompt({"question": each}), {"until": ["\n"], "max_gen_toks": 15}) for each in asked]
    said = model.generate_until(
        [Instance(request_type="generate_until", doc={}, arguments=each, idx=0) for each in prompts]
    )  # with one more word the base has a part of the answer
    questions = [{"question": q, "answer": [f"{text} indeed"]} for q, text in zip(asked, said, strict=True)]
    headlines = [row | {"class_id": i % 3} for i, row in enumerate(rows)]
    for task, file, docs in (
        ("pubmedqa", "adaptllm_schema", rows), ("fpb", "adaptllm_schema", rows),
        ("headline", "adaptllm_schema", headlines), ("nq", "validation", questions),
    ):  # fmt: skip
        (folder / "data" / task).mkdir(parents=True)
        (folder / "data" / task / f"{file}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    metadata = {"pretrained": str(base_folder), "corpus": str(corpus_folder)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMDEC_DATA", str(folder / "data"))
        for name, alpha in (("a", 0.0), ("b", 1.0)):
            model.set_weight(alpha)
            manager = TaskManager(include_path=str(HARNESS_TASKS), include_defaults=False, metadata=metadata)
            found = simple_evaluate(
                model=model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, log_samples=True
            )
            assert found is not None
            tracker = EvaluationTracker(output_path=str(folder / name))
            tracker.general_config_tracker.model_name_sanitized = "model"
            samples = found.pop("samples")
            tracker.save_results_aggregated(found, samples)
            for task, each in samples.items():
                tracker.save_results_samples(task, each)
    return folder / "a", folder / "b"


def lines_of(run: Path, task: str) -> list[dict[str, Any]]:
    (file,) = run.rglob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def edited(run: Path, out: Path, task: str, change: Callable[[list[dict[str, Any]]], object]) -> Path:
    """A copy of a run with other samples of one task."""
    out.mkdir()
    for file in run.rglob("*_*.json*"):
        (out / file.name).write_text(file.read_text())
    (samples,) = out.glob(f"samples_{task}_*.jsonl")
    lines = lines_of(run, task)
    change(lines)
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out


def test_two_runs_equal_plain_arithmetic_on_their_samples(runs: tuple[Path, Path]) -> None:
    rows = compare.compare(*runs).set_index(["task", "metric"])
    assert set(rows.index.get_level_values(0)) == set(TASKS)
    for task, metric, test in (("pubmedqa", "acc", "McNemar"), ("memdec_nq", "f1", "sign flips")):
        a, b = ([line[metric] for line in lines_of(run, task)] for run in runs)
        row = rows.loc[task, metric]
        assert (row["n"], row["test"]) == (len(a), test)
        assert (row["a"], row["b"]) == pytest.approx((np.mean(a), np.mean(b)))
        assert row["difference"] == pytest.approx(np.mean(b) - np.mean(a))
        assert row["low"] <= row["difference"] <= row["high"]
        assert (row["a_low"], row["a_high"]) == statistics.mean_interval(a)
        gaps = np.subtract(b, a)
        if test == "McNemar":
            assert (gaps != 0).sum() > 0
            assert row["p"] == pytest.approx(binomtest(int((gaps > 0).sum()), int((gaps != 0).sum())).pvalue)
        else:
            assert row["p"] == pytest.approx(statistics.sign_flips(a, b))
    for task, metric in (
        ("memdec_fpb", "weighted_f1"),
        ("memdec_headline", "headline_f1"),
        ("memdec_headline", "score"),
    ):
        row = rows.loc[task, metric]
        assert row["test"] == "exchanged predictions"
        assert row["a_low"] <= row["a"] <= row["a_high"]
        assert row["low"] <= row["difference"] <= row["high"]
        assert 0 < row["p"] <= 1
        assert row["a"] != rows.loc[task, "acc"]["a"]
    alone = rows.loc["memdec_ppl", "loglikelihood"]
    assert (alone["n"], alone["test"]) == (1, "none: one row")
    assert np.isnan([alone["low"], alone["p"]]).all()


def test_the_other_way_round_is_the_mirror_and_a_run_equals_itself(runs: tuple[Path, Path]) -> None:
    there, back = compare.compare(*runs), compare.compare(*reversed(runs))
    np.testing.assert_allclose(there["difference"], -back["difference"])
    np.testing.assert_allclose(there["low"], -back["high"])
    np.testing.assert_allclose(there["p"], back["p"])
    (file,) = runs[0].rglob("results_*.json")
    same = compare.compare(runs[0], file)  # folder or file
    assert (same["difference"] == 0).all()
    assert set(same["p"].dropna()) == {1.0}


def test_rows_are_paired_by_number_whatever_their_order_and_token_counts(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    def change(lines: list[dict[str, Any]]) -> None:
        lines.reverse()
        for line in lines:  # what another tokenizer would have counted
            line["doc"]["option_tokens"] = [9, 9, 9]
            line["doc_hash"] = "other"

    other = edited(runs[1], tmp_path / "other", "pubmedqa", change)
    pd.testing.assert_frame_equal(compare.compare(runs[0], other), compare.compare(*runs))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda lines: lines[3]["doc"].update(input="Q"), IncomparableError, r"row 3: expected the same document 3 as .*, row 3, found another"),
        (lambda lines: lines.pop(5), IncomparableError, r"row 5: expected document 5 in both runs, found none in .*; use the same --limit"),
        (lambda lines: lines.append(lines[2]), CorpusError, "row 30: expected every document once, found 2 again"),
        (lambda lines: lines[4].pop("acc"), CorpusError, r"row 4: expected a sample of lm_eval, found KeyError\('acc'\)"),
    ],
)  # fmt: skip
def test_other_rows_are_refused(
    change: Callable[[list[dict[str, Any]]], object], kind: type[Exception], message: str,
    runs: tuple[Path, Path], tmp_path: Path,
) -> None:  # fmt: skip
    other = edited(runs[1], tmp_path / "other", "pubmedqa", change)
    with pytest.raises(kind, match=rf"samples_pubmedqa_\S+\.jsonl, {message}"):
        compare.compare(runs[0], other)


def test_a_value_that_its_rows_do_not_give_is_shown_without_a_test(runs: tuple[Path, Path], tmp_path: Path) -> None:
    changes: list[tuple[str, str, Any]] = [
        ("pubmedqa", "acc", [1, 2]), ("pubmedqa", "acc", 0.3), ("pubmedqa", "acc", None),
        ("memdec_fpb", "weighted_f1", [1, 1]), ("memdec_fpb", "weighted_f1", [1]), ("memdec_headline", "headline_f1", [1, 1]),
    ]  # fmt: skip
    for number, (task, metric, value) in enumerate(changes):

        def change(lines: list[dict[str, Any]], metric: str = metric, value: Any = value) -> None:
            for line in lines:
                line[metric] = value

        other = edited(runs[1], tmp_path / str(number), task, change)
        rows = compare.compare(runs[0], other).set_index(["task", "metric"])
        assert rows.loc[(task, metric), "test"] == "none: no test for values of this kind"
        assert rows.loc[(task, "acc_sum"), "test"] == "McNemar"


def test_perplexity_of_several_documents(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """As lm-eval's own wikitext has them: a row per document."""
    copies = []
    for name, run, steps in (("a", runs[0], (0.0, 1.0, -2.0)), ("b", runs[1], (3.0, -1.0, 0.0))):
        (line,) = lines_of(run, "memdec_ppl")
        line["metrics"].remove("windows")
        total, count = line["token_perplexity"]
        docs = [line | {"doc_id": i, "token_perplexity": [total + step, count]} for i, step in enumerate(steps)]

        def several(lines: list[dict[str, Any]], docs: list[dict[str, Any]] = docs) -> None:
            lines[:] = docs

        copy = edited(run, tmp_path / name, "memdec_ppl", several)
        (file,) = copy.glob("results_*.json")
        results = json.loads(file.read_text())
        value = float(np.exp(-(3 * total + sum(steps)) / (3 * count)))
        results["results"]["memdec_ppl"]["token_perplexity,none"] = value
        file.write_text(json.dumps(results))
        copies.append((copy, value))
    rows = compare.compare(copies[0][0], copies[1][0]).set_index(["task", "metric"])
    row = rows.loc["memdec_ppl", "token_perplexity"]
    assert (row["test"], row["n"], row["a"], row["b"]) == ("sign flips", 3, copies[0][1], copies[1][1])
    assert row["low"] <= row["difference"] <= row["high"]


def test_runs_that_cannot_be_read_or_do_not_belong_together(runs: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match="expected results of lm_eval with samples beside them, found none"):
        compare.compare(tmp_path / "empty", runs[0])
    with pytest.raises(CorpusError, match=r"none\.json: expected a results file of lm_eval"):
        compare.compare(runs[0], tmp_path / "none.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(CorpusError, match="found JSON without results"):
        compare.compare(runs[0], tmp_path / "list.json")
    with pytest.raises(
        CorpusError, match=r"expected one run of \w+, found samples_\S+ and samples_\S+; give the results file"
    ):
        compare.compare(runs[0].parent, runs[0])
    other = edited(runs[1], tmp_path / "version", "pubmedqa", lambda lines: None)
    (file,) = other.glob("results_*.json")
    results = json.loads(file.read_text())
    file.write_text(json.dumps(results | {"versions": results["versions"] | {"pubmedqa": 2.0}}))
    with pytest.raises(
        IncomparableError, match=r"pubmedqa: expected one version of the task, found 1\.0 in .* and 2\.0 in"
    ):
        compare.compare(runs[0], other)
    for samples in other.glob("samples_[!p]*"):
        samples.unlink()
    (tmp_path / "rest").mkdir()
    for samples in runs[0].rglob("*_*.json*"):
        if "pubmedqa" not in samples.name:
            (tmp_path / "rest" / samples.name).write_text(samples.read_text())
    with pytest.raises(IncomparableError, match="expected a common task"):
        compare.compare(tmp_path / "rest", other)


def test_the_command_prints_and_writes_the_rows(
    runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["memdec", "compare", *map(str, runs), "--csv", str(tmp_path / "c.csv")])
    cli.main()
    lines = capsys.readouterr().out.splitlines()
    table = pd.read_csv(tmp_path / "c.csv")
    assert tuple(table.columns) == compare.COLUMNS
    assert len(lines) == len(table) + 1
    assert lines[0].split() == ["task", "metric", "A", "B", "B", "-", "A", "95", "%", "p", "n", "test"]
    monkeypatch.setattr(sys, "argv", ["memdec", "compare", str(runs[0])])
    cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["task", "metric", "value", "95", "%", "n"]
    assert len(lines) == len(table) + 1
    other = edited(runs[1], tmp_path / "o", "pubmedqa", lambda lines: lines.pop())
    monkeypatch.setattr(sys, "argv", ["memdec", "compare", str(runs[0]), str(other)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 3
    assert "use the same --limit" in capsys.readouterr().err
