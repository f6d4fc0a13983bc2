"""`memdec compare`: compare two lm-eval runs that were made with --log_samples, row by row.

It reads results files and the samples files beside them (`samples_<task>_<date>.jsonl`). Rows are paired by document
number. A task is compared only if both runs have the same documents and the same task version.

A perplexity task has one long document. Its items are the windows of the rolling evaluation, which our models log; both
runs must have the same windows and the same token ids.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from memdec.artefacts import artefact, markdown
from memdec.errors import CorpusError, IncomparableError
from memdec.maths import paired, statistics
from memdec.maths.paired import Average, Paired

COLUMNS = (
    "task", "metric", "a", "a_low", "a_high", "b", "b_low", "b_high", "difference", "low", "high", "p", "test", "n",
)  # fmt: skip

# Aggregation functions that compute F1 from rows (correct, predicted) or (question, correct, predicted).
F1: dict[str, tuple[Average, ...]] = {
    "weighted_f1": ("weighted",),
    "micro_f1": ("micro",),
    "macro_f1": ("macro",),
    "micro_macro_mean": ("micro", "macro"),
    "headline_f1": ("weighted",),
}
# Aggregation functions of rows (log-likelihood, units): ours, then lm-eval's.
_RATIOS: dict[str, Callable[[Any], Any]] = {
    "perplexity_of_sums": lambda mean: np.exp(-mean),
    "bits_of_sums": lambda mean: -mean / np.log(2),
    "weighted_perplexity": lambda mean: np.exp(-mean),
    "bits_per_byte": lambda mean: -mean / np.log(2),
}


# Metrics of a text -> what its windows are counted in (`memdec.tasks.perplexity.rolling_results`).
_UNITS = {"token_perplexity": "tokens", "word_perplexity": "words", "bits_per_byte": "bytes"}


@dataclass(frozen=True, slots=True)
class TaskRun:
    """One task of one run.

    Attributes:
        file: Its samples file.
        version: Version of the task.
        reported: Metric with filter (`acc,none`) -> value in the results file.
        aggregations: Metric -> name of the function that aggregates its rows.
    """

    file: Path
    version: Any
    reported: Mapping[str, float]
    aggregations: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Sample:
    """A row of a samples file: its line number, a hash of the document, and its metrics (`acc,none`)."""

    line: int
    document: str
    values: dict[str, Any]


def compare(run_a: Path, run_b: Path) -> pd.DataFrame:
    """Compare every metric of every task that both runs have; the columns are `COLUMNS`.

    The difference is B - A. `memdec.maths.paired` gives intervals and p-values for means, F1 and perplexities. For
    values that are aggregated in another way they are empty, and `test` says so.

    Args:
        run_a: Results file, or folder with results files at any depth.
        run_b: The second run; give `run_a` again for the intervals of one run.

    Raises:
        CorpusError: A file or row is missing or cannot be read; the message names it.
        IncomparableError: There is no common task, or documents or versions differ; the message names file and row.
    """
    first, second = read_run(run_a), read_run(run_b)
    common = [task for task in first if task in second]
    if not common:
        raise IncomparableError(
            f"{run_a} and {run_b}: expected a common task, found {sorted(first)} and {sorted(second)}"
        )
    table = [row for task in common for row in _compare_task(task, first[task], second[task])]
    return pd.DataFrame(table, columns=list(COLUMNS))


def shown_alone(rows: pd.DataFrame) -> str:
    """Format the rows of one run for the terminal."""
    lines = [
        {
            "task": row["task"],
            "metric": row["metric"],
            "value": markdown.number(row["a"]),
            "95 %": "-" if np.isnan(row["a_low"]) else markdown.number(row["a_low"]),
            "": "" if np.isnan(row["a_low"]) else f"to {markdown.number(row['a_high'])}",
            "n": row["n"],
        }
        for row in rows.to_dict("records")
    ]
    return _aligned(lines, "value", "95 %", "")


def shown(rows: pd.DataFrame) -> str:
    """Format the rows of a comparison for the terminal."""
    lines = [
        {
            "task": row["task"],
            "metric": row["metric"],
            "A": markdown.number(row["a"]),
            "B": markdown.number(row["b"]),
            "B - A": markdown.number(row["difference"], "+"),
            "95 %": "-" if np.isnan(row["low"]) else markdown.number(row["low"], "+"),
            "": "" if np.isnan(row["low"]) else f"to {markdown.number(row['high'], '+')}",
            "p": "-" if np.isnan(row["p"]) else f"{row['p']:.3g}",
            "n": row["n"],
            "test": row["test"],
        }
        for row in rows.to_dict("records")
    ]
    return _aligned(lines, "A", "B", "B - A", "95 %", "", "p")


def _aligned(lines: Sequence[Mapping[str, Any]], *names: str) -> str:
    """The lines as a table for the terminal; the decimal points of the named columns stand below each other."""
    table = pd.DataFrame(lines)
    for name in names:
        table[name] = markdown.aligned(list(table[name]))
    return table.to_string(index=False)


def read_run(path: Path) -> dict[str, TaskRun]:
    """Read the tasks of a run that have a samples file.

    Raises:
        CorpusError: There are no results or no samples, or a task is in two results files.
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
            listed = results.get("configs", {}).get(task, {}).get("metric_list") or []
            names = {each["metric"]: _function(each.get("aggregation") or "mean") for each in listed}
            found[task] = TaskRun(samples, results.get("versions", {}).get(task), numbers, names)
    if not found:
        raise CorpusError(
            f"{path}: expected results of lm_eval with samples beside them, found none; run it with --output_path and "
            "--log_samples"
        )
    return found


def _function(aggregation: str) -> str:
    """Name of an aggregation function; lm-eval writes the source code of functions that a task defines."""
    match = re.match(r"def (\w+)\(", aggregation)
    return match[1] if match else aggregation


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
    """Read a samples file; its rows by filter and document number.

    Raises:
        CorpusError: A row is unreadable or repeated; the message names file and row.
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
    """Hash of a document; lm-eval's hash would include token counts, which depend on the model's tokenizer."""
    return artefact.digest({key: value for key, value in doc.items() if not key.endswith("_tokens")})


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
    _check_windows(task, run_a, run_b, a, b)
    metrics = dict.fromkeys(metric for sample in a.values() for metric in sample.values)
    return [
        _compare_metric(task, metric, run_a, run_b, *_items(metric, a, b))
        for metric in metrics
        if metric in run_a.reported and metric in run_b.reported and _name(metric) != "windows"
    ]


def _name(metric: str) -> str:
    """A metric without its filter."""
    return metric.partition(",")[0]


def _told(sample: Sample) -> dict[str, Any] | None:
    """What a sample says about the windows of its text."""
    return next((value for metric, value in sample.values.items() if _name(metric) == "windows"), None)


def _check_windows(
    task: str, run_a: TaskRun, run_b: TaskRun, a: Mapping[tuple[str, int], Sample], b: Mapping[tuple[str, int], Sample]
) -> None:
    """Check that both runs scored the same tokens in the same windows.

    Raises:
        IncomparableError: They did not; the message says what differs.
    """
    for key in a:
        here, there = _scored(a[key]), _scored(b[key])
        for name in here.keys() & there.keys():
            if here[name] != there[name]:
                what, advice = _MUST_AGREE[name]
                raise IncomparableError(
                    f"{task}: expected one {what} for both runs, found {here[name]} in {run_a.file} and {there[name]} in "
                    f"{run_b.file}; {advice}"
                )


_MUST_AGREE = {
    "tokens": ("tokenizer", "compare models of one tokenizer"),
    "ids": ("tokenizer", "compare models of one tokenizer"),
    "windows": ("kind of windows", "evaluate both with the same context= and stride="),
}


def _scored(sample: Sample) -> dict[str, str]:
    """What a perplexity task scored, in words, as far as the sample tells: number of tokens, their ids, windows."""
    found = {}
    for metric, value in sample.values.items():
        if _name(metric) == "token_perplexity" and isinstance(value, list) and len(value) == 2:
            found["tokens"] = f"{value[1]} tokens"
    told = _told(sample)
    if told is not None:
        found["ids"] = f"token ids with hash {told['ids'][:8]}"
        found["windows"] = f"context {told['context']} with stride {told['stride']}"
    return found


def _items(
    metric: str, a: Mapping[tuple[str, int], Sample], b: Mapping[tuple[str, int], Sample]
) -> tuple[list[Any], list[Any]]:
    """The paired values of a metric: of each document, or of neighbouring windows if both runs tell them."""
    unit = _UNITS.get(_name(metric))
    told = [(_told(a[key]), _told(b[key])) for key in sorted(a)]
    if unit is None or any(each is None or unit not in each for pair in told for each in pair):
        return _values(metric, a, b)
    found: tuple[list[Any], list[Any]] = ([], [])
    n_tokens = sum(each["stride"] * len(each["log_p"]) for each, _ in told if each is not None)
    for pair in told:
        for items, each in zip(found, pair, strict=True):
            assert each is not None
            size = statistics.item_tokens(n_tokens, each["stride"]) // each["stride"]
            sums = (statistics.window_sums(np.asarray(each[name]), size)[0] for name in ("log_p", unit))
            items.extend(map(list, zip(*sums, strict=True)))
    return found


def _values(
    metric: str, a: Mapping[tuple[str, int], Sample], b: Mapping[tuple[str, int], Sample]
) -> tuple[list[Any], list[Any]]:
    keys = [key for key, sample in sorted(a.items()) if metric in sample.values and metric in b[key].values]
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
    names = {run.aggregations.get(name, "mean") for run in (run_a, run_b)}
    found = _paired(names.pop(), a, b) if len(names) == 1 else None
    if found is None or not np.allclose([found.a, found.b], [row["a"], row["b"]], rtol=1e-6, atol=1e-9):
        return row | {"test": "none: no test for values of this kind"}
    row["a_low"], row["a_high"] = found.a_interval
    row["b_low"], row["b_high"] = found.b_interval
    row["low"], row["high"] = found.interval
    return row | {"p": found.p, "test": found.test}


def _paired(aggregation: str, a: list[Any], b: list[Any]) -> Paired | None:
    """Compare with the method that fits the aggregation; None if there is no such method for these values."""
    if aggregation == "mean" and all(_is_number(value) for value in [*a, *b]):
        return paired.means(a, b)
    try:
        first, second = np.asarray(a, np.float64).T, np.asarray(b, np.float64).T
        if aggregation in _RATIOS and (first[1] == second[1]).all() and (first[1] > 0).all():
            return paired.ratios(first[0], second[0], first[1], _RATIOS[aggregation])
        if aggregation in F1 and (first[:-1] == second[:-1]).all():
            *groups, gold = first[:-1]
            return paired.f1(gold, first[-1], second[-1], F1[aggregation], *groups)
    except (ValueError, IndexError):  # rows with different numbers of values
        pass
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))
