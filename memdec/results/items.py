"""One measured number at one seed, with the items it is made of: what paired tests and intervals of differences need.

The items of a perplexity are the windows of the test text, those of a task its rows. `of_evaluation` reads them from the
scores that `memdec evaluate` stores, `of_samples` from the samples of a harness folder. `write` puts those of all cells of
a table beside it, so that what is computed from a table later needs neither models nor evaluations.
"""

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from memdec.artefacts import artefact
from memdec.errors import ArtifactError, outside
from memdec.maths import statistics
from memdec.maths.paired import Average

Kind = Literal["perplexity", "mean", "other"]


@dataclass(frozen=True, slots=True, eq=False)
class Items:
    """One measured number at one seed.

    Attributes:
        seed: Seed of everything after the base models.
        value: The number: a perplexity, or a metric as lm-eval gives it (accuracies from 0 to 1).
        sums: perplexity: the sum of -log p (nats) of each window; mean: the score of each row; other: empty, (N,).
        counts: perplexity: the tokens of each window; mean: ones; other: empty, (N,).
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


def perplexity(seed: int, log_p: NDArray[np.floating], window: int) -> Items:
    """The items of a perplexity, from the log-probability (nats) of every scored token and the tokens of a window."""
    sums, counts = statistics.window_sums(log_p, window)
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


def of_evaluation(folder: Path, record: Mapping[str, Any], window: int, weight: float | None = None) -> Items:
    """The items of a record of an evaluation.

    Args:
        folder: The evaluation.
        record: One of its records; `scores` says where in the score store of the folder its text is.
        window: Scored tokens of a window (`stride`).
        weight: Weight of the second distribution; default: that of the record, whose value is then compared.

    Raises:
        ArtifactError: The scores are not there, or do not give the value of the record.
    """
    place = record.get("scores")
    if place is None:  # an evaluation of an earlier version, or one made by hand
        return only(int(record["seed"]), float(record["value"]))
    scores = _store(folder / "scores" / str(place["store"])).get(bytes.fromhex(place["text"]))
    if scores is None:
        raise ArtifactError(
            f"{folder}: expected the scores of {record['method']} on {record.get('on')}, found none in "
            f"scores/{place['store']}; run the evaluation again"
        )
    own = next((float(record[name]) for name in ("alpha", "lambda") if record.get(name) is not None), 0.0)
    found = perplexity(int(record["seed"]), scores.log_p(own if weight is None else weight), window)
    if weight is None and not math.isclose(found.value, record["value"], rel_tol=1e-6):
        raise ArtifactError(
            f"{folder}: expected scores with the perplexity {record['value']:g} of {record['method']}, found "
            f"{found.value:g}; run the evaluation again"
        )
    return found


@lru_cache(maxsize=64)
def _store(folder: Path) -> Any:
    from memdec.harness.scores import ScoreStore  # its arithmetic imports torch

    file = folder / "manifest.json"
    with outside(ArtifactError, file, "the setting of a score store", "run the evaluation again"):
        return ScoreStore(folder.parent, json.loads(file.read_text(encoding="utf-8"))["setting"])


def of_samples(folder: Path, task: str, metric: str, seed: int, value: float) -> Items:
    """The items of a metric of a task, from the samples of a harness folder (`samples_<task>.jsonl`).

    A metric that is neither a mean of rows nor an F1 has only its value.

    Raises:
        ArtifactError: The samples do not give the value.
        CorpusError: A row cannot be read.
    """
    from memdec.results import compare

    file, results = folder / f"samples_{task}.jsonl", folder / "results.json"
    with outside(ArtifactError, results, "results of lm-eval", "run the stage harness again"):
        listed = json.loads(results.read_text(encoding="utf-8"))["configs"][task].get("metric_list") or []
        named = {each["metric"]: compare.function_name(each.get("aggregation") or "mean") for each in listed}
    rows = compare.read_samples(file)
    values = [row.values[f"{metric},none"] for _, row in sorted(rows.items()) if f"{metric},none" in row.values]
    aggregation = named.get(metric, "mean")
    found = only(seed, value)
    if aggregation == "mean" and values and all(isinstance(each, int | float) for each in values):
        found = mean(seed, values)
    elif aggregation in compare.F1_AVERAGES and values:
        found = f1(seed, value, np.asarray(values, np.int64), compare.F1_AVERAGES[aggregation])
    if not math.isclose(found.value, value, rel_tol=1e-6, abs_tol=1e-9):
        raise ArtifactError(
            f"{file}: expected rows with {metric} {value:g} as in records.json, found {found.value:g}; run the stage "
            "harness again"
        )
    return found


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
    arrays = {
        "sums": [each.sums for _, each in found],
        "counts": [each.counts for _, each in found],
        "labels": [each.labels.ravel() for _, each in found if each.labels is not None],
    }
    whole = {name: np.concatenate([np.empty(0, kind), *arrays[name]]).astype(kind) for name, kind in _ARRAYS.items()}
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
