"""One measured number at one seed, with the items it is made of: what paired tests and intervals of differences need.

The items of a perplexity are stretches of the test text, those of a task its rows. `of_evaluation` reads them from the
scores that `memdec evaluate` stores, `of_samples` from the samples of a harness folder. `write` puts those of all cells of
a table beside it, so that what is computed from a table later needs neither models nor evaluations.
"""

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from memdec.artefacts import artefact
from memdec.errors import ArtifactError, outside
from memdec.harness.scores import TokenScores
from memdec.maths import paired, statistics
from memdec.maths.paired import Average
from memdec.results import compare, scores

Kind = Literal["perplexity", "mean", "other"]


@dataclass(frozen=True, slots=True, eq=False)
class Items:
    """One measured number at one seed.

    Attributes:
        seed: Seed of everything after the base models.
        value: The number: a perplexity, or a metric as lm-eval gives it (accuracies from 0 to 1).
        sums: perplexity: the sum of -log p (nats) of each stretch; mean: the score of each row; other: empty, (N,).
        counts: perplexity: the tokens of each stretch; mean: ones; other: empty, (N,).
        kind: How the number is made: perplexity is exp(sum / count), mean is sum / count, other is neither (F1).
        labels: other: what F1 is made from, one row per item: group (if there are groups), right label, prediction.
        averages: other: how F1 is averaged over labels; the number is their mean.
    """

    seed: int
    value: float
    sums: NDArray[np.float64]
    counts: NDArray[np.int64]
    kind: Kind
    labels: NDArray[np.int64] | None = None
    averages: tuple[Average, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.sums) if self.labels is None else len(self.labels)


def perplexity(seed: int, log_p: NDArray[np.floating], stride: int) -> Items:
    """The items of a perplexity, from the log-probability (nats) of every scored token and the tokens scored per window."""
    sums, counts = statistics.window_sums(log_p, statistics.item_tokens(len(log_p), stride))
    value = math.exp(-float(sums.sum()) / int(counts.sum()))
    return Items(seed, value, -sums, counts.astype(np.int64), "perplexity")


def mean(seed: int, scores: Sequence[float] | NDArray[np.floating]) -> Items:
    """The items of a metric that is the mean over rows."""
    sums = np.asarray(scores, np.float64)
    return Items(seed, float(sums.mean()), sums, np.ones(len(sums), np.int64), "mean")


def f1(seed: int, value: float, labels: NDArray[np.integer], averages: tuple[Average, ...]) -> Items:
    """The items of an F1; `labels` has the columns group (if there are groups), right label and prediction."""
    nothing = np.empty(0)
    return Items(seed, value, nothing, nothing.astype(np.int64), "other", labels.astype(np.int64), averages)


def only(seed: int, value: float) -> Items:
    """A number whose items are not known."""
    nothing = np.empty(0)
    return Items(seed, value, nothing, nothing.astype(np.int64), "other")


def of_evaluation(folder: Path, record: Mapping[str, Any], weight: float | None = None) -> Items:
    """The items of a record of an evaluation.

    Args:
        folder: The evaluation.
        record: One of its records.
        weight: Weight of the second distribution; default: that of the record, whose value is then compared.

    Raises:
        ArtifactError: The stored scores do not give the value of the record.
    """
    own = next((float(record[name]) for name in ("alpha", "lambda") if record.get(name) is not None), 0.0)
    seed, value = int(record["seed"]), float(record["value"])
    items = _of_scores(folder, record["on"], own if weight is None else weight, seed)
    if weight is None and not math.isclose(items.value, value, rel_tol=1e-6):
        raise ArtifactError(
            f"{folder}: expected scores with the perplexity {value:g} of {record['method']}, found {items.value:g}; run the "
            "evaluation again"
        )
    return items


@cache  # of sums of stretches, which are few; they are read for the cell, its interval and every test
def _of_scores(folder: Path, on: str, weight: float, seed: int) -> Items:
    """The items of a text at a weight."""
    found, stride = _scored(folder, on)
    return perplexity(seed, found.log_p(weight), stride)


@lru_cache(maxsize=1)  # 16 bytes a token; all weights of a text are asked for one after another
def _scored(folder: Path, on: str) -> tuple[TokenScores, int]:
    """Scores of a text and the stride."""
    is_domain = all(record["on"] == on for record in json.loads((folder / "records.json").read_text(encoding="utf-8")))
    return scores.token_scores(folder, "test", None if is_domain else on)


def of_samples(folder: Path, record: Mapping[str, Any]) -> Items:
    """The items of a record of a harness folder, from its samples.

    A metric that is neither a mean of rows nor an F1 has only its value, as has a folder without samples.

    Raises:
        ArtifactError: The samples do not give the value of the record.
        CorpusError: A row cannot be read.
    """
    seed, value, metric = int(record["seed"]), float(record["value"]), str(record["metric"])
    values, aggregation = _rows(folder, str(record["task"]), metric)
    found = only(seed, value)
    if aggregation == "mean" and values and all(isinstance(each, int | float) for each in values):
        found = mean(seed, np.asarray(values, np.float64))
    elif aggregation in compare.F1 and values:
        found = f1(seed, value, np.asarray(values, np.int64), compare.F1[aggregation])
    if not math.isclose(found.value, value, rel_tol=1e-6, abs_tol=1e-9):
        raise ArtifactError(
            f"{folder}: expected rows of {record['task']} with {metric} {value:g}, found {found.value:g}; run the stage "
            "harness again"
        )
    return found


def _rows(folder: Path, task: str, metric: str) -> tuple[list[Any], str]:
    """What a metric keeps of each row, in the order of the documents, and how it is aggregated."""
    run = _runs(folder).get(task)
    if run is None:
        return [], ""
    rows = _samples(run.file)
    key = f"{metric},none"
    return [row.values[key] for _, row in sorted(rows.items()) if key in row.values], run.aggregations.get(
        metric, "mean"
    )


@lru_cache(maxsize=256)
def _runs(folder: Path) -> dict[str, compare.TaskRun]:
    return compare.read_run(folder) if any(folder.glob("samples_*.jsonl")) else {}


@lru_cache(maxsize=4)  # one holds the texts of all rows
def _samples(file: Path) -> dict[tuple[str, int], compare.Sample]:
    return compare.read_samples(file)


def p_value(a: Sequence[Items], b: Sequence[Items]) -> float | None:
    """p-value of the paired test of two systems that were measured on the same items; None if there is no such test.

    Of several seeds the mean of each item is compared: the test says whether the systems differ on other items, and
    nothing of other seeds. Means of 0 and 1 at one seed use McNemar's exact test, other means and perplexities sign
    flips. F1 exchanges the predictions of both systems at each item, those of all seeds together.

    Args:
        a: The items of the first system at each seed.
        b: The same of the second; one of them can have a single seed, as the base has.
    """
    if not a or not b or len({len(each) for each in [*a, *b]}) > 1 or not len(a[0]):
        return None
    if a[0].kind == "other":
        return _p_of_f1(a, b)
    if any((each.counts != a[0].counts).any() for each in [*a, *b]):
        return None
    first, second = (np.mean([each.sums for each in one], axis=0) for one in (a, b))
    binary = a[0].kind == "mean" and statistics.is_binary(first) and statistics.is_binary(second)
    return statistics.mcnemar(first, second) if binary else statistics.sign_flips(first, second)


def _p_of_f1(a: Sequence[Items], b: Sequence[Items]) -> float | None:
    n_seeds = max(len(a), len(b))
    first, second = (list(one) * (n_seeds // len(one)) for one in (a, b))
    labels = [each.labels for each in [*first, *second]]
    if len(first) != len(second) or any(each is None for each in labels):
        return None
    known = [each for each in labels if each is not None]
    rows = known[0][:, :-1]  # group, if there are groups, and correct label of each item
    if any(each.shape != known[0].shape or (each[:, :-1] != rows).any() for each in known):
        return None
    predicted = np.array([each[:, -1] for each in known])
    groups = np.unique(rows[:, :-1], axis=0, return_inverse=True)[1].ravel().tolist() if rows.shape[1] > 1 else None
    return paired.f1(rows[:, -1].tolist(), predicted[:n_seeds], predicted[n_seeds:], a[0].averages, groups).p


Place = tuple[str, str]  # row and column of a cell

# Fields of one `Items` that are arrays, and how they are stored.
_ARRAYS: dict[str, type[np.generic]] = {"sums": np.float64, "counts": np.int64, "labels": np.int64}


def write(path: Path, cells: Mapping[Place, Sequence[Items]]) -> None:
    """Write the items of the cells of a table as .npz: `index` is JSON, the arrays of all cells follow each other."""
    found = [(place, each) for place, several in cells.items() for each in several]
    index = [
        {
            "row": row,
            "column": column,
            "seed": each.seed,
            "value": each.value,
            "kind": each.kind,
            "averages": each.averages,
            "sums": len(each.sums),
            "labels": None if each.labels is None else each.labels.shape,
        }
        for (row, column), each in found
    ]
    arrays: dict[str, list[NDArray[Any]]] = {
        "sums": [each.sums for _, each in found],
        "counts": [each.counts for _, each in found],
        "labels": [each.labels.ravel() for _, each in found if each.labels is not None],
    }
    whole: dict[str, Any] = {
        name: np.concatenate([np.empty(0, kind), *arrays[name]]).astype(kind) for name, kind in _ARRAYS.items()
    }
    data = io.BytesIO()
    np.savez_compressed(data, index=np.frombuffer(json.dumps(index).encode(), np.uint8), **whole)
    artefact.write_bytes(path, data.getvalue())


def read(path: Path) -> dict[Place, list[Items]]:
    """Read the items of the cells of a table.

    Raises:
        ArtifactError: The file is damaged.
    """
    cells: dict[Place, list[Items]] = {}
    with outside(ArtifactError, path, "items of a table", "make the table again"):
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in (*_ARRAYS, "index")}
        index = json.loads(arrays.pop("index").tobytes())
        sizes = {"sums": [each["sums"] for each in index]}
        sizes["counts"] = sizes["sums"]
        sizes["labels"] = [math.prod(each["labels"] or [0]) for each in index]
        parts = {name: np.split(arrays[name], np.cumsum(sizes[name])) for name in _ARRAYS}
        for number, each in enumerate(index):
            if parts["sums"][number].size != each["sums"] or not np.isfinite(parts["sums"][number]).all():
                raise ValueError(f"too few or no finite numbers in row {each['row']}, column {each['column']}")
            shape = each["labels"]
            made = Items(
                each["seed"],
                each["value"],
                parts["sums"][number],
                parts["counts"][number],
                each["kind"],
                None if shape is None else parts["labels"][number].reshape(shape),
                tuple(each["averages"]),
            )
            cells.setdefault((each["row"], each["column"]), []).append(made)
    return cells
