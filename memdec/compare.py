"""`memdec compare`: two runs of lm-eval with --log_samples, row by row.

Reads results files and the samples beside them (`samples_<task>_<date>.jsonl`). Rows are paired by their number, and a
task is compared only where both runs had the same documents and version.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from memdec import artifacts, statistics
from memdec.errors import CorpusError, IncomparableError

COLUMNS = (
    "task", "metric", "a", "a_low", "a_high", "b", "b_low", "b_high", "difference", "low", "high", "p", "test", "n",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class TaskRun:
    """One task of one run.

    Attributes:
        file: Its samples.
        version: Of the task.
        reported: Metric with filter (`acc,none`) to the value of the results file.
    """

    file: Path
    version: Any
    reported: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Sample:
    """A row of a samples file: its line, what names the document, and its metrics (`acc,none`)."""

    line: int
    document: str
    values: dict[str, Any]


def compare(run_a: Path, run_b: Path) -> pd.DataFrame:
    """Every metric of every task that both runs have; columns `COLUMNS`.

    The difference is B - A. Interval and p-value are empty where the metric is not the mean of its rows (perplexity, F1
    over a whole set): `test` says so. Outcomes 0 and 1 are tested by McNemar, others by sign flips.

    Args:
        run_a: Results file, or folder with results files at any depth.
        run_b: The other one.

    Raises:
        CorpusError: Something is missing or cannot be read; names file and row.
        IncomparableError: No common task, or other documents or versions; names file and row.
    """
    first, second = read_run(run_a), read_run(run_b)
    common = [task for task in first if task in second]
    if not common:
        raise IncomparableError(
            f"{run_a} and {run_b}: expected a common task, found {sorted(first)} and {sorted(second)}"
        )
    table = [row for task in common for row in _compare_task(task, first[task], second[task])]
    return pd.DataFrame(table, columns=list(COLUMNS))


def shown(rows: pd.DataFrame) -> str:
    """The rows for a terminal."""
    lines = [
        {
            "task": row["task"],
            "metric": row["metric"],
            "A": f"{row['a']:.4g}",
            "B": f"{row['b']:.4g}",
            "B - A": f"{row['difference']:+.4g}",
            "95 %": "-" if np.isnan(row["low"]) else f"{row['low']:+.4g} to {row['high']:+.4g}",
            "p": "-" if np.isnan(row["p"]) else f"{row['p']:.3g}",
            "n": row["n"],
            "test": row["test"],
        }
        for row in rows.to_dict("records")
    ]
    return pd.DataFrame(lines).to_string(index=False)


def read_run(path: Path) -> dict[str, TaskRun]:
    """Tasks of a run that have samples.

    Raises:
        CorpusError: No results or samples, or a task in two results files.
    """
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    found: dict[str, TaskRun] = {}
    for file in files:
        results = _results(file, needed=not path.is_dir())
        date = file.stem.rpartition("_")[2]
        for task, values in results.get("results", {}).items():
            samples = file.with_name(f"samples_{task}_{date}.jsonl")
            if not samples.is_file():
                continue  # a group, or a run without samples
            if task in found:
                raise CorpusError(
                    f"{path}: expected one run of {task}, found {found[task].file.name} and {samples.name}; give the results file"
                )
            numbers = {key: float(value) for key, value in values.items() if _is_number(value)}
            found[task] = TaskRun(samples, results.get("versions", {}).get(task), numbers)
    if not found:
        raise CorpusError(
            f"{path}: expected results of lm_eval with samples beside them, found none; run it with --output_path and "
            "--log_samples"
        )
    return found


def _results(file: Path, needed: bool) -> dict[str, Any]:
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorpusError(f"{file}: expected a results file of lm_eval, found {error}") from None
    if isinstance(results, dict) and isinstance(results.get("results"), dict):
        return results
    if needed:
        raise CorpusError(f"{file}: expected a results file of lm_eval, found JSON without results")
    return {}


def read_samples(file: Path) -> dict[tuple[str, int], Sample]:
    """Rows by filter and number of the document.

    Raises:
        CorpusError: Names file and row.
    """
    found: dict[tuple[str, int], Sample] = {}
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            try:
                row = json.loads(line)
                key = str(row["filter"]), int(row["doc_id"])
                values = {f"{metric},{key[0]}": row[metric] for metric in row["metrics"]}
                sample = Sample(number, _document(row["doc"]), values)
            except (ValueError, KeyError, TypeError) as error:
                raise CorpusError(f"{file}, row {number}: expected a sample of lm_eval, found {error!r}") from None
            if key in found:
                raise CorpusError(f"{file}, row {number}: expected every document once, found {key[1]} again")
            found[key] = sample
    return found


def _document(doc: Mapping[str, Any]) -> str:
    """Hash of a document. Not lm-eval's, which also covers token counts that our tasks add from the model's tokenizer."""
    return artifacts.digest({key: value for key, value in doc.items() if not key.endswith("_tokens")})


def _compare_task(task: str, run_a: TaskRun, run_b: TaskRun) -> list[dict[str, Any]]:
    if run_a.version != run_b.version:
        raise IncomparableError(
            f"{task}: expected one version of the task, found {run_a.version} in {run_a.file} and {run_b.version} in "
            f"{run_b.file}; run one of them again"
        )
    a, b = read_samples(run_a.file), read_samples(run_b.file)
    for key in [*a, *b]:
        if key not in a or key not in b:
            there, other = (run_a.file, run_b.file) if key in a else (run_b.file, run_a.file)
            line = (a.get(key) or b[key]).line
            raise IncomparableError(
                f"{there}, row {line}: expected document {key[1]} in both runs, found none in {other}; use the same --limit"
            )
        if a[key].document != b[key].document:
            raise IncomparableError(
                f"{run_b.file}, row {b[key].line}: expected the same document {key[1]} as {run_a.file}, row {a[key].line}, "
                "found another; evaluate both on the same rows"
            )
    metrics = dict.fromkeys(metric for sample in a.values() for metric in sample.values)
    return [
        _compare_metric(task, metric, run_a, run_b, *_values(metric, a, b))
        for metric in metrics
        if metric in run_a.reported and metric in run_b.reported
    ]


def _values(
    metric: str, a: Mapping[tuple[str, int], Sample], b: Mapping[tuple[str, int], Sample]
) -> tuple[list[Any], list[Any]]:
    keys = [key for key, sample in a.items() if metric in sample.values and metric in b[key].values]
    return [a[key].values[metric] for key in keys], [b[key].values[metric] for key in keys]


def _compare_metric(
    task: str, metric: str, run_a: TaskRun, run_b: TaskRun, a: list[Any], b: list[Any]
) -> dict[str, Any]:
    name, _, filtered = metric.partition(",")
    row: dict[str, Any] = dict.fromkeys(COLUMNS, np.nan)
    row |= {"task": task, "metric": name if filtered == "none" else metric, "n": len(a)}
    row |= {"a": run_a.reported[metric], "b": run_b.reported[metric]}
    row["difference"] = row["b"] - row["a"]
    if len(a) < 2:
        return row | {"test": "none: one row"}
    if not (_is_mean(a, row["a"]) and _is_mean(b, row["b"])):
        return row | {"test": "none: not the mean of its rows"}
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    row["a_low"], row["a_high"] = statistics.mean_interval(first)
    row["b_low"], row["b_high"] = statistics.mean_interval(second)
    row["low"], row["high"] = statistics.mean_interval(second - first)
    if statistics.is_binary(first) and statistics.is_binary(second):
        return row | {"test": "McNemar", "p": statistics.mcnemar(first, second)}
    return row | {"test": "sign flips", "p": statistics.sign_flips(first, second)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))


def _is_mean(values: list[Any], reported: float) -> bool:
    return all(_is_number(value) for value in values) and bool(
        np.isclose(np.mean(values), reported, rtol=1e-6, atol=1e-9)
    )
