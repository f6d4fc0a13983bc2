"""The numbers of a table: from records to cells with intervals, seeds, paired tests, printed values and reasons.

    sheet = Sheet(table, records)
    sheet.numbers[row][column].value, sheet.cells()

A measured number is the mean over the seeds. It is compared within its group: the numbers of the same base model,
domain, text, task and metric. `p_base` is the paired test against the base alone, `p_best` that against the best other
number of the group (`items.p_value`). A derived number is computed from others, and its interval from resamples in which
the same items are drawn for all of them.
"""

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memdec.config import Config
from memdec.errors import ConfigError
from memdec.maths import paired, statistics
from memdec.results import items, paper
from memdec.results.cells import Cell
from memdec.results.items import Items
from memdec.results.layout import Column, Derived, How, Measured, Row

Record = dict[str, Any]
_RESAMPLES = 2000
_AS_LARGE = 0.95  # of the memory's parameters: a smaller adapter is named
TUNED = ("alpha", "lambda", "temperature", "learning_rate")  # numbers of a record that were chosen on valid
_ONE_GROUP = ("model", "domain", "on", "task", "metric")


@dataclass(slots=True, eq=False)
class Number:
    """One cell; the fields are those of `cells.Cell`, and `group` and `records`, which tests and derived numbers need."""

    unit: str
    lower_is_better: bool | None
    decimals: int = 2
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    seeds: int | None = None
    sd: float | None = None
    weights: dict[str, str] = field(default_factory=dict)
    labels: dict[str, int] | None = None
    constant: bool | None = None
    note: str = ""
    group: object = None
    records: list[Record] = field(default_factory=list)
    replicates: NDArray[np.float64] | None = None  # of `value`; only where they were needed
    p_base: float | None = None
    best_other: str | None = None
    p_best: float | None = None


class Sheet:
    """The numbers of a table.

    Args:
        table: Its definition.
        records: One dictionary for each measured number (`tables.load_records`).

    Attributes:
        numbers: For each row the number in each column, by heading.
    """

    def __init__(self, table: Measured, records: Sequence[Record]) -> None:
        self.table = table
        self._all = records if not table.alphas else [each for record in records for each in _at(record, table.alphas)]
        self._known: dict[frozenset[tuple[int, ...]], float | None] = {}  # p-values of pairs, by the numbers of records
        self.numbers: list[dict[str, Number]] = []
        for number, row in enumerate(table.rows):
            self.numbers.append({})
            for heading, column in table.columns.items():
                self.numbers[-1][heading] = self._number(number, row, heading, column)
        for heading, column in table.columns.items():
            if isinstance(column, Derived) and column.how == "relative":
                self._relative(heading, str(column.of[0]))

    def row_name(self, number: int) -> str:
        """The labels of a row in one text."""
        return " / ".join(self.table.rows[number].labels.values())

    # --- numbers ------------------------------------------------------------------------------------------------------

    def _number(self, number: int, row: Row | Derived, heading: str, column: Column | Derived) -> Number:
        if isinstance(row, Row) and isinstance(column, Column):
            chosen = select(self._all, row.where | column.where)
            where = row.where | column.where
            gap = self.table.gaps.get((number, heading)) or _left_out(self.table.config, where) or _not_run(where)
            return _measured(chosen, column, gap)
        if isinstance(column, Derived):
            of = [self.numbers[number][str(name)] for name in column.of]
            how = column.how
        else:
            assert isinstance(row, Derived)
            of = [self.numbers[int(place)][heading] for place in row.of]
            how = row.how
        return _derived(how, of)

    def _relative(self, heading: str, of: str) -> None:
        known = [row[of].value for row in self.numbers]
        best = min((value for value in known if value is not None), default=None)
        for row in self.numbers:
            value = row[of].value
            if value is not None and best is not None:
                row[heading].value = value / best

    def best(self, number: Number) -> bool:
        """Whether a number is the best of its group; equal ones are all best."""
        if number.value is None or number.lower_is_better is None:
            return False
        values = [each.value for each in self._group(number) if each.value is not None]
        return number.value == (min(values) if number.lower_is_better else max(values))

    def _group(self, number: Number) -> list[Number]:
        return self._groups.get(number.group, [])

    @cached_property
    def _groups(self) -> dict[object, list[Number]]:
        found: dict[object, list[Number]] = {}
        for row in self.numbers:
            for each in row.values():
                if each.group is not None:
                    found.setdefault(each.group, []).append(each)
        return found

    # --- tests ----------------------------------------------------------------------------------------------------------

    def test(self) -> None:
        """Fill `p_base`, `best_other` and `p_best` of every measured number."""
        names = {}
        for place, row in enumerate(self.numbers):
            for heading, each in row.items():
                names[id(each)] = (self.row_name(place), heading)
        for row in self.numbers:
            for heading, number in row.items():
                if not number.records or number.value is None or number.lower_is_better is None or self.table.alphas:
                    continue
                self._test(number, heading, names)

    def _test(self, number: Number, heading: str, names: Mapping[int, tuple[str, str]]) -> None:
        own, first = number.records, number.records[0]
        if first["method"] != "base":
            alone = select(self._all, {key: first.get(key) for key in _ONE_GROUP} | {"method": "base"})
            number.p_base = self._p_value(own, alone) if alone else None
        others = [each for each in self._group(number) if each is not number and each.value is not None]
        if others:
            sign = 1 if number.lower_is_better else -1
            best = min(others, key=lambda each: sign * each.value)  # type: ignore[operator]
            row, column = names[id(best)]
            number.best_other = row if column == heading else column
            number.p_best = self._p_value(own, best.records)

    def _p_value(self, a: list[Record], b: list[Record]) -> float | None:
        """p-value of two systems; the test has no direction, so each pair is tested once."""
        pair = frozenset(tuple(id(record) for record in records) for records in (a, b))
        if pair not in self._known:
            self._known[pair] = items.p_value(_items(a), _items(b))
        return self._known[pair]

    def items(self) -> dict[tuple[str, str], list[Items]]:
        """The items of the measured numbers that have some, by row and column: an entry for each seed and model."""
        found = {}
        for place, row in enumerate(self.numbers):
            for heading, number in row.items():
                if number.value is not None and number.group is not None:
                    found[self.row_name(place), heading] = _items(number.records)
        return {place: known for place, known in found.items() if all(map(len, known))}

    # --- cells ----------------------------------------------------------------------------------------------------------

    def cells(self) -> list[Cell]:
        """Every number as a line for programs."""
        return [
            self._cell(place, heading, number)
            for place, row in enumerate(self.numbers)
            for heading, number in row.items()
        ]

    def _cell(self, place: int, heading: str, number: Number) -> Cell:
        row, column = self.table.rows[place], self.table.columns[heading]
        where = (row.where if isinstance(row, Row) else {}) | (column.where if isinstance(column, Column) else {})
        config = self.table.config
        named = where.get("model", row.labels.get("model"))
        model = named if named in config.models else None  # a row of means has the label Average in its place
        printed = self._printed(place, heading)
        note, verdict = number.note, None
        if config.scale == "paper" and any(each.value is not None for each in printed):
            found = paper.verdict(number.value, number.low, number.high, printed, number.lower_is_better)
            verdict = found.word or None
            note = note if number.value is None else "; ".join(filter(None, (note, found.why)))
        numbers = {name: getattr(number, name) for name in ("value", "low", "high", "n", "seeds", "sd", "p_base")}
        tests = {name: getattr(number, name) for name in ("best_other", "p_best", "labels", "constant", "unit")}
        about = {name: where.get(name) for name in ("method", "memory", "domain", "task")}
        return Cell.model_validate(
            {
                "table": self.table.name,
                "study": config.study_name,
                "row": self.row_name(place),
                "family": None if model is None else config.models[model].family,
                "model": model,
                "column": heading,
                "metric": where.get("metric", number.records[0]["metric"] if number.records else None),
                "lower_is_better": number.lower_is_better,
                **{name: number.weights.get(name) or None for name in TUNED},
                "paper": _main(printed),
                "verdict": verdict,
                "note": note,
                **about,
                **numbers,
                **tests,
            }
        )

    def _printed(self, place: int, heading: str) -> list[paper.Printed]:
        """What the paper prints for a cell; nothing where its table has no such row or column, or of other parts."""
        row, column = self.table.rows[place], self.table.columns[heading]
        if not isinstance(row.paper, dict) or not paper.FOLDER.is_dir():
            return []
        named = column.paper if isinstance(column.paper, str) else heading
        found = paper.printed(self.table.name, row.paper, named)
        if isinstance(column, Derived):
            parts, how = [(place, str(name)) for name in column.of], column.how
        elif isinstance(row, Derived):
            parts, how = [(int(number), heading) for number in row.of], row.how
        else:
            return found
        if not found or not all(self.paper(*part) is not None for part in parts):
            return []
        lines = paper.table(self.table.name)
        for label, text in row.paper.items() if isinstance(column, Derived) else [("column", named)]:
            lines = lines[lines[label] == text]
        others = len(lines[[*row.paper, "column"]].drop_duplicates()) - 1
        return found if how in ("difference", "relative") or len(parts) == others else []

    def paper(self, place: int, heading: str) -> float | None:
        """The number that the paper prints for a cell, or None."""
        return _main(self._printed(place, heading))


def select(records: Iterable[Record], where: Mapping[str, Any]) -> list[Record]:
    """Records whose fields have these values."""
    return [record for record in records if all(record.get(name) == value for name, value in where.items())]


def smaller(records: Iterable[Record]) -> float | None:
    """The size of adapters that cannot be as large as the memory, as a share of it; None if they are, or should not be."""
    share = min((float(record["size"]) for record in records if record.get("size") is not None), default=1.0)
    return share if share < _AS_LARGE else None


def _left_out(config: Config, where: dict[str, str]) -> str | None:
    """Why a system is not run with a model, if the config says so."""
    model, method = where.get("model"), where.get("method")
    if model not in config.per_model or method is None or method in config.systems_of(model):
        return None
    return f"not run: systems of {model} in 'per_model' without {method}"


def _not_run(where: Mapping[str, str]) -> str:
    """Why a cell has no value if nothing better is known: what has no record."""
    what = " with ".join(where[name] for name in ("method", "memory", "model") if name in where)
    on = where.get("task") or where.get("on") or where.get("domain")
    return f"not run: no record of {what or 'it'}{f' on {on}' if on else ''} among the given folders"


def _main(printed: Sequence[paper.Printed]) -> float | None:
    """The number that the last version prints in this cell, and not elsewhere for the same thing."""
    known = [each for each in printed if each.value is not None]
    known = [each for each in known if not each.note.startswith(paper.ELSEWHERE)] or known
    last = max(known, key=lambda each: max(map(paper.VERSIONS.index, each.versions)), default=None)
    return None if last is None else last.value


def _measured(records: list[Record], column: Column, gap: str) -> Number:
    """The number of a cell: the mean over its records, which are of several seeds, and in Table 7 of several models."""
    number = Number(column.unit, column.lower_is_better, column.decimals, records=records)
    values = [record[column.of] for record in records]
    if not values or None in values:
        number.note = gap
        return number
    number.value = _mean([column.factor * value for value in values])
    seeds = dict.fromkeys(record["seed"] for record in records)
    number.seeds = len(seeds) if records[0]["method"] != "corpus" else None
    number.weights = {name: _listed(record.get(name) for record in records) for name in TUNED}
    share = smaller(records)
    if share is not None:
        number.note = f"the adapter has {100 * share:.0f} % of the memory's parameters; a larger rank would add nothing"
    by_seed = [_mean([column.factor * r[column.of] for r in records if r["seed"] == seed]) for seed in seeds]
    number.sd = float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else None
    if column.of != "value":
        return number
    number.n = None if records[0].get("n") is None else int(records[0]["n"])
    number.group = tuple(_listed(record.get(name) for record in records) for name in _ONE_GROUP)
    ends = [[float(r[name]) for r in records if r.get(name) is not None] for name in ("low", "high")]
    if all(len(each) == len(records) for each in ends):
        number.low, number.high = (column.factor * _mean(each) for each in ends)
    elif records[0].get("weight") is not None:
        _interval(number, resampled(number))
    counted = [record["labels"] for record in records if record.get("labels") is not None]
    if counted:
        names = dict.fromkeys(name for labels in counted for name in labels)
        number.labels = {name: sum(labels.get(name, 0) for labels in counted) for name in names}
        number.constant = any(record["constant"] for record in records)
    return number


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _listed(values: Iterable[object]) -> str:
    """Different values in order, with a space between."""
    known = [value for value in values if value is not None]
    return " ".join(dict.fromkeys(f"{each:g}" if isinstance(each, float) else str(each) for each in known))


def _derived(how: How, of: Sequence[Number]) -> Number:
    first = of[0]
    keeps = how in ("mean", "best")
    number = Number(first.unit, first.lower_is_better if keeps else None, first.decimals, seeds=first.seeds)
    if how == "relative":
        number.unit, number.decimals = "ratio", 3
    values = [each.value for each in of if each.value is not None]
    if len(values) < len(of):
        number.note = "not run: a number that it is made from is missing"
        return number
    number.value = first.value if how == "relative" else float(_computed(how, values, first.lower_is_better))
    if keeps and all(each.group is not None for each in of):
        number.group = (how, tuple(each.group for each in of))
    drawn = [resampled(each) for each in of] if how != "relative" else [None]
    if known := [each for each in drawn if each is not None]:
        _interval(number, _computed(how, known, first.lower_is_better) if len(known) == len(of) else None)
    return number


def _computed(how: How, values: Sequence[Any], lower_is_better: bool | None) -> Any:
    """A derived value; of arrays, for each element."""
    if how == "difference":
        return values[0] - values[1]
    if how == "best":
        return np.min(values, axis=0) if lower_is_better else np.max(values, axis=0)
    return sum(values) / (len(values) if how == "mean" else 1)


def _interval(number: Number, replicates: NDArray[np.float64] | None) -> None:
    if replicates is not None:
        number.replicates = replicates
        number.low, number.high = map(float, statistics.percentiles(replicates, paired.LEVEL))


def resampled(number: Number) -> NDArray[np.float64] | None:
    """Resamples of a number over items and seeds, (R,); None where its items are not known.

    Numbers with the same items are resampled with the same draws.
    """
    if number.replicates is None and number.records and number.value is not None:
        by_model: dict[str, list[Record]] = {}
        for record in number.records:
            by_model.setdefault(record["model"], []).append(record)
        drawn = [_replicates(_items(records), _text(records[0])) for records in by_model.values()]
        known = [each for each in drawn if each is not None]
        if len(known) == len(drawn):
            # The factor of the column, from what the items say and what is shown.
            factor = number.value / _mean([record["value"] for record in number.records]) if number.value else 1.0
            number.replicates = factor * np.mean(known, axis=0)
    return number.replicates


def _text(record: Record) -> int:
    """A number for the text or task of a record: what has the same items has the same draws, and nothing else has."""
    return zlib.crc32(repr([record.get(name) for name in ("domain", "on", "task")]).encode())


def _replicates(found: Sequence[Items], seed: int) -> NDArray[np.float64] | None:
    first = found[0]
    if first.kind == "other":
        labels = [each.labels for each in found if each.labels is not None]
        if len(labels) < len(found) or any(each.shape != labels[0].shape for each in labels):
            return None
        drawn = paired.f1_by_item(labels, first.averages, seed=seed, n_resamples=_RESAMPLES)
    elif any(not np.array_equal(each.counts, first.counts) for each in found):
        return None
    else:
        of = np.exp if first.kind == "perplexity" else np.asarray
        sums = [each.sums for each in found]
        drawn = paired.ratios_by_item(sums, first.counts, of, seed=seed, n_resamples=_RESAMPLES)
    return paired.over_seeds(drawn, seed=0)


def _items(records: Sequence[Record]) -> list[Items]:
    return [_items_of(record) for record in records]


def _items_of(record: Record) -> Items:
    folder = record.get("folder")
    if folder is None or record["method"] == "corpus":
        return items.only(int(record["seed"]), float(record["value"]))
    if record.get("task") is not None:
        return items.of_samples(folder, record)
    weight = record.get("weight")
    return items.of_evaluation(folder, record, None if weight is None else float(weight))


def _at(record: Record, alphas: Sequence[float]) -> list[Record]:
    """A record of MemDec at other weights, from its stored scores; none of other systems."""
    if record["method"] != "MemDec":
        return []
    folder: Path | None = record.get("folder")
    found = []
    for alpha in alphas:
        at = items.only(0, math.nan) if folder is None else items.of_evaluation(folder, record, alpha)
        if folder is None or at.kind != "perplexity":
            raise ConfigError(
                f"{folder or 'records'}: expected stored scores of base and memory, found none; run memdec evaluate again"
            )
        more = {"weight": f"{alpha:g}", "alpha": alpha, "value": at.value, "low": None, "high": None}
        found.append({**record, **more})
    return found
