"""`memdec claims`: every claim of the paper that is an order or a ratio, and what the tables of a run say about it.

`claims.yaml` has the claims. A claim names a table, the cells that it compares (left and right) by their roles, and a
relation. Roles such as `smallest` are looked up in the config, so one file serves every scale.

A claim is about an effect: the ratio left / right or the difference left - right. Its 95 % interval comes from a
bootstrap over seeds and items that draws the same seeds and items for both sides. A comparison

- holds if the interval lies on the claimed side of the bound;
- fails if it lies on the other side;
- is undecided otherwise.

Most claims make several comparisons, such as one for each base model and domain. The claim holds if all hold, and fails
if one fails. With m comparisons one fails by chance more often, so to fail takes an interval of level 1 - 0.05 / m.
"""

import csv
import io
import itertools
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator

from memdec import plain
from memdec.artefacts import artefact, markdown
from memdec.config import Config, Memory
from memdec.errors import ArtifactError, ConfigError, IncomparableError, outside
from memdec.inference.systems import SYSTEMS
from memdec.maths import paired, statistics
from memdec.results import catalogue, cells, figure_catalogue, items
from memdec.results.cells import Cell
from memdec.results.items import Items
from memdec.results.layout import Derived, Measured
from memdec.settings import Settings, TableName, describe

FILE = Path(__file__).with_suffix(".yaml")
COLUMNS = (
    "claim", "text", "source", "version", "table", "left", "right", "relation", "effect", "low", "high", "n", "seeds",
    "verdict", "reason",
)  # fmt: skip
VERDICTS = ("holds", "fails", "undecided", "not run")
AVERAGE = "Avg"  # column of means; a claim computes means itself, from the measured columns
RANKS = {"smallest": 0, "first": 0, "second": 1, "third": 2, "largest": -1, "last": -1}
PAIRED = ("family", "model", "domain", "task", "metric")  # in which both sides of a comparison agree
CLOSE = 1e-6  # relative difference between the value of a cell and that of its items; rounding is smaller

Floats = NDArray[np.float64]
Texts = str | list[str]


class Selector(Settings):
    """The cells of one side. A field is a name, a pattern with `*`, a role, or a list of these; without it all fit."""

    method: Texts | None = Field(None, description="system; MemDec means the main memory unless `memory` says another")
    model: Texts | None = Field(None, description="base model; smallest, second, largest of its family")
    memory: Texts | None = Field(
        None,
        description="main; objective:NAME, targets:NAME, size:RANK, keys:RANK: differs from main only in this; "
        "attached-dapt; other-domain; neighbours",
    )
    domain: Texts | None = Field(None, description="domain; first, second, third, last of the config")
    task: Texts | None = None
    metric: Texts | None = None
    row: Texts | None = None
    column: Texts | None = Field(None, description="heading; first, second, last of the table")
    alpha: tuple[float, float] | None = Field(None, description="least and highest alpha")
    pick: Literal["best"] | None = Field(None, description="of the cells of each comparison only the best one")
    over: dict[str, Any] | None = Field(None, description="fields of the cell that each cell is divided by")
    minus: dict[str, Any] | None = Field(None, description="fields of the cell that is subtracted from each cell")

    @model_validator(mode="after")
    def _has_one_other(self) -> Self:
        if self.over is not None and self.minus is not None:
            raise ValueError("minus: expected only one of over and minus, found both")
        self.other()
        return self

    def fixed(self) -> set[str]:
        """Names of the fields that it says something about, also those of `over` and `minus`."""
        return set(self.model_fields_set) - {"over", "minus", "pick"}

    def other(self) -> "Selector | None":
        """The cells that its cells are divided by, or that are subtracted; None if there are none."""
        fields = self.over if self.over is not None else self.minus
        if fields is None:
            return None
        own = self.model_dump(exclude_unset=True, exclude={"over", "minus", "pick"})
        if "method" in fields:
            own.pop("memory", None)
        return Selector.model_validate(own | fields)

    def __str__(self) -> str:
        parts = [" or ".join(_listed(self.method))] if self.method is not None else []
        for name in ("memory", "model", "domain", "task", "metric", "row", "column"):
            if (value := getattr(self, name)) is not None:
                parts.append(f"{name} {' or '.join(_listed(value))}")
        parts += [f"alpha {self.alpha[0]:g} to {self.alpha[1]:g}"] if self.alpha is not None else []
        text = ", ".join(parts) or "every cell"
        text = f"the best of: {text}" if self.pick else text
        sign, fields = ("/", self.over) if self.over is not None else ("-", self.minus)
        return text if fields is None else f"({text}) {sign} ({Selector.model_validate(fields)})"


class Claim(Settings):
    """One claim of the paper."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]
    text: str = Field(description="the claim in our words")
    source: str = Field(description="where the paper makes it")
    version: list[Literal["v1", "v2", "camera-ready", "ours"]] = Field(
        min_length=1, description="versions of the paper that make it; ours: not a claim of the paper"
    )
    table: TableName
    left: Selector
    right: Selector | None = Field(None, description="None: the left side alone is compared with the bound")
    relation: Annotated[str, Field(pattern=r"^(<|>|<=|>=|within)( -?\d+(\.\d+)?)?$")]
    measure: Literal["ratio", "difference", "spread"] = Field(
        "ratio",
        description="of left and right, in the unit of the cells; spread: ratio, after each quotient (`over`) below 1 is turned over",
    )
    mean: list[str] = Field(
        default=[], description="fields over which both sides are averaged before they are compared"
    )
    by: list[str] = Field(default=[], description=f"fields in which both sides agree besides {', '.join(PAIRED)}")
    small: str = Field("", description="why a small scale may give something else")

    @model_validator(mode="after")
    def _has_a_bound(self) -> Self:
        if " " not in self.relation and (self.relation == "within" or self.right is None):
            raise ValueError(f"relation: expected a number after {self.relation}, found none")
        if self.measure == "spread" and any(side and side.over is None for side in (self.left, self.right)):
            raise ValueError("measure: expected over on every side of a spread, found none")
        for name in (*self.mean, *self.by):
            if name not in Cell.model_fields:
                raise ValueError(f"mean: expected columns of a cells file, found {name}")
        return self

    @property
    def neutral(self) -> float:
        """The effect where both sides are equal."""
        return 0.0 if self.measure == "difference" else 1.0

    @property
    def averaged(self) -> set[str]:
        """Fields in which the cells of one average differ."""
        return {*self.mean, *(["column"] if self.mean else []), *(["metric"] if "task" in self.mean else [])}

    def __str__(self) -> str:
        what = "left" if self.right is None else self.measure
        return f"{what} {self.relation if ' ' in self.relation else f'{self.relation} {self.neutral:g}'}"


class Verdict(NamedTuple):
    """What a run says about a claim; the fields are columns of claims.csv."""

    effect: float | None
    low: float | None
    high: float | None
    n: int | None
    seeds: str
    verdict: str
    reason: str


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number with its bootstrap replicates (R,), or None where it has no interval."""

    value: float
    drawn: Floats | None


class Term(NamedTuple):
    """A cell, and the one that it is divided by or that is subtracted from it."""

    cell: Cell
    other: Cell | None
    divided: bool

    @property
    def cells(self) -> list[Cell]:
        """Both cells."""
        return [self.cell] if self.other is None else [self.cell, self.other]


Key = tuple[tuple[str, Any], ...]
Comparison = tuple[Key, list[tuple[Term, Term | None]]]  # what it is about, and the terms that are averaged


# --- reading ------------------------------------------------------------------------------------------------------


def load(path: Path = FILE) -> list[Claim]:
    """Read claims.

    Raises:
        ConfigError: The file is no list of claims, names an unknown table, or has an id twice.
    """
    data, found = plain.read(path), []
    if not isinstance(data, list):
        raise ConfigError(f"{path}: expected a list of claims, found {type(data).__name__}; see docs/claims.md")
    for number, each in enumerate(data, 1):
        name = each.get("id", number) if isinstance(each, dict) else number
        try:
            found.append(Claim.model_validate(each))
        except ValidationError as error:
            raise ConfigError(f"{path}: claim {name}: {describe(error, Claim)}; see docs/claims.md") from None
    twice = [name for name, n in Counter(claim.id for claim in found).items() if n > 1]
    if twice:
        raise ConfigError(f"{path}: expected every id once, found {twice[0]} twice; rename one of them")
    return found


@dataclass(frozen=True)
class Table:
    """The cells of a table, and the items of those that have some."""

    cells: list[Cell]
    items: Mapping[tuple[str, str], Sequence[Items]]


def read_tables(paths: Iterable[Path], config: Config) -> dict[str, Table]:
    """Read cells files and the items beside them (`<table>.cells.csv`, `<table>.items.npz`), and figures 4 and 6.

    Raises:
        ArtifactError: A file cannot be read, a table is given twice, or items and cells have other values.
        ConfigError: A model or memory of a cell is not in the config.
        IncomparableError: A table is of another scale.
    """
    found: dict[str, Table] = {}
    for path in paths:
        stem = path.name.removesuffix(".csv").removesuffix(".cells")
        with outside(ArtifactError, path, "the cells of a table, or Figure 4 or 6 as .csv", "make it again"):
            read = FIGURES[stem](path, config) if stem in FIGURES else cells.read(path)
        _check_scale(path.with_name(f"{stem}.provenance.json"), config)
        beside = path.with_name(f"{stem}.items.npz")
        table = Table(read, items.read(beside) if beside.is_file() else {})
        for cell in read:
            _check_cell(path, cell, table, config)
        for name in dict.fromkeys([cell.table for cell in read] or [stem]):
            if name in found:
                raise ArtifactError(f"{path}: expected each table once, found {name} again; give one file for it")
            found[name] = Table([cell for cell in read if cell.table == name], table.items)
    return found


def _of_figure4(path: Path, _config: Config) -> list[Cell]:
    """Figure 4 as cells: a row per system, a column per number of generated tokens; of several stores the largest."""
    found = {}
    for line in sorted(_lines(path), key=lambda line: float(line["size"] or 0)):
        ends = {"value": line["ratio_to_base"], "low": line["ratio_low"], "high": line["ratio_high"]}
        cell = {
            "table": "figure4",
            "row": line["kind"] or line["system"],
            "method": line["kind"] or line["system"],
            "column": line["n_tokens"],
            "metric": "ratio_to_base",
            "unit": "ratio",
            "lower_is_better": True,
            "note": "" if line["ratio_to_base"] else "the interval of a time includes 0; measure it on an idle machine",
        }
        found[cell["row"], cell["column"]] = cell | {name: text for name, text in ends.items() if text}
    ordered = sorted(found.values(), key=lambda cell: int(str(cell["column"])))
    return [Cell.model_validate(cell) for cell in ordered]


def _of_figure6(path: Path, config: Config) -> list[Cell]:
    """Figure 6 as cells: a row per model and distribution, which stands in `method`, a column per measure."""
    return [
        Cell.model_validate(
            {
                "table": "figure6",
                "row": f"{line['model']} / {line['memory']} / {line['distribution']}",
                "family": config.models[line["model"]].family if line["model"] in config.models else None,
                "method": line["distribution"],
                "column": line["metric"],
                "lower_is_better": None,
            }
            | {
                name: line[name]
                for name in ("model", "memory", "domain", "metric", "value", "low", "high", "n", "seeds")
            }
        )
        for line in _lines(path)
    ]


def _lines(path: Path) -> list[dict[str, str]]:
    return [dict(line) for line in csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))]


FIGURES = {"figure4": _of_figure4, "figure6": _of_figure6}


def _check_scale(file: Path, config: Config) -> None:
    if not file.is_file():
        return
    with outside(ArtifactError, file, "the provenance of a table", "make the table again"):
        scale = plain.read(file)["scale"]
    if scale != config.scale:
        raise IncomparableError(f"{file}: expected a table of scale {config.scale}, found {scale}; give its config")


def _check_cell(path: Path, cell: Cell, table: Table, config: Config) -> None:
    study = config.study_for(cell.table)
    for what, name, known in (("model", cell.model, study.models), ("memory", cell.memory, study.memory_names)):
        if name is not None and name not in known:
            raise ConfigError(
                f"{path}: row {cell.row}, column {cell.column}: expected a {what} of the config "
                f"({', '.join(known)}), found {name}; give the config that the table was made with"
            )
    measured = table.items.get((cell.row, cell.column), [])
    if not measured or cell.value is None:
        return
    value = float(np.mean([each.value for each in measured])) * _scale(cell)
    if not np.isclose(value, cell.value, rtol=CLOSE, atol=CLOSE):
        raise ArtifactError(
            f"{path}: row {cell.row}, column {cell.column}: expected the value of its items ({value:g}), found "
            f"{cell.value:g}; make the table again"
        )


def _scale(cell: Cell) -> float:
    """Factor from the values of items, which are as lm-eval gives them, to the unit of the cell."""
    return 100.0 if cell.unit == "percent" else 1.0


# --- which cells a selector means ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Roles:
    """The measured cells of a table by their roles in a study; means and differences of them are left out."""

    study: Config
    cells: list[Cell]

    @classmethod
    def of(cls, study: Config, name: str, cells: Iterable[Cell]) -> "Roles":
        """The roles of a table."""
        columns, rows = _derived(study, name)
        return cls(study, _with_metric([cell for cell in cells if cell.column not in columns and cell.row not in rows]))

    @cached_property
    def _families(self) -> dict[str | None, list[str]]:
        """Base models of each family in the table, the smallest first."""
        names = dict.fromkeys((cell.family, cell.model) for cell in self.cells if cell.model is not None)
        families: dict[str | None, list[str]] = {}
        for family, model in names:
            families.setdefault(family, []).append(str(model))
        return {family: self._by_size(models) for family, models in families.items()}

    @cached_property
    def _columns(self) -> list[str]:
        """Headings of the table."""
        return list(dict.fromkeys(cell.column for cell in self.cells))

    @cached_property
    def _memories(self) -> dict[str, Memory]:
        return {name: self.study.variant(name) for name in self.study.memory_names}

    @cached_property
    def _mains(self) -> dict[str, str | None]:
        """For each base model the memory that the study is about: the first one with its tokenizer."""
        found = {model: self.study.memory_for(model) for model in self.study.models}
        return {model: None if memory is None else memory.name for model, memory in found.items()}

    def _by_size(self, models: Iterable[str]) -> list[str]:
        """Models, the smallest first: by width and layers where the config has both for all, else in its order."""
        listed = sorted(models, key=list(self.study.models).index)
        specs = [self.study.models[model] for model in listed]
        sizes = {m: s.width**2 * s.layers for m, s in zip(listed, specs, strict=True) if s.width and s.layers}
        return sorted(listed, key=lambda model: sizes[model]) if len(sizes) == len(listed) else listed

    def select(self, selector: Selector) -> list[Cell]:
        """The cells that fit."""
        return [cell for cell in self.cells if self._fits(cell, selector)]

    def _fits(self, cell: Cell, selector: Selector) -> bool:
        for name in ("method", "task", "metric", "row"):
            if not _matches(getattr(cell, name), getattr(selector, name)):
                return False
        family = self._families.get(cell.family, [])
        return (
            _matches(cell.model, selector.model, family if len(family) > 1 else [])
            and _matches(cell.domain, selector.domain, self.study.domains)
            and _matches(cell.column, selector.column, self._columns)
            and self._has_memory(cell, selector)
            and (selector.alpha is None or selector.alpha[0] <= _number(cell.alpha) <= selector.alpha[1])
        )

    def _has_memory(self, cell: Cell, selector: Selector) -> bool:
        if selector.memory is None:
            only = selector.method == "MemDec"
            return not only or cell.memory is None or cell.memory == self._main(cell)
        return any(cell.memory is not None and self._is(cell.memory, role, cell) for role in _listed(selector.memory))

    def _main(self, cell: Cell) -> str | None:
        return self._mains[cell.model or self.study.bases[0]]

    def _is(self, name: str, role: str, cell: Cell) -> bool:
        """Whether a memory has a role."""
        main = self._main(cell)
        if main is None or role in ("main", name):
            return name in (main, role)
        memory, first = self._memories[name], self._memories[main]
        controls = {"attached-dapt": memory.dapt, "other-domain": memory.other_domain, "neighbours": memory.neighbours}
        if role in controls:
            return controls[role]
        kind, _, value = role.partition(":")
        if kind == "objective":
            return memory.train.objective == value and _alike(memory, first, {"targets"}, {"objective"})
        if kind == "targets":
            return memory.targets == value and _alike(memory, first, {"targets"}, set())
        if kind not in _SIZES or value not in RANKS:
            return fnmatchcase(name, role)
        field, settings = _SIZES[kind]
        there = {each.memory for each in self.cells if each.memory is not None}
        fitting = {each for each in there if _alike(self._memories[each], first, {field}, settings)}
        sizes = self._by_size({getattr(self._memories[each], field) for each in fitting})
        return name in fitting and _ranked(getattr(memory, field), value, sizes if len(sizes) > 1 else [])


# Roles by the size of a model -> the model, and settings of the training that may differ with it.
_SIZES: dict[str, tuple[str, set[str]]] = {
    "size": ("memory_model", {"learning_rate", "epochs", "batch_size", "warmup"}),
    "keys": ("key_model", set()),
}


def _with_metric(found: Sequence[Cell]) -> list[Cell]:
    """Cells that were not run have no metric; they get the only one of their column, or else of the table."""
    of_column: dict[str, set[str]] = {}
    for cell in found:
        if cell.metric is not None:
            of_column.setdefault(cell.column, set()).add(cell.metric)
    of_table = set().union(*of_column.values())
    return [
        cell.model_copy(update={"metric": next(iter(known))})
        if cell.metric is None and len(known := of_column.get(cell.column, of_table)) == 1
        else cell
        for cell in found
    ]


def _derived(study: Config, name: str) -> tuple[set[str], set[str]]:
    """Columns and rows of a table that are computed from others, as the catalogue says."""
    try:
        made = catalogue.table(study, name)
    except ConfigError:  # a figure, or a table of another config
        return {AVERAGE}, set()
    if not isinstance(made, Measured):
        return {AVERAGE}, set()
    rows = {" / ".join(row.labels.values()) for row in made.rows if isinstance(row, Derived)}
    return {AVERAGE, *made.columns} - set(made.measured), rows


def _alike(memory: Memory, main: Memory, besides: set[str], settings: set[str]) -> bool:
    """Whether two memories differ in nothing but these fields and these settings of their training."""
    one, other = (
        each.model_dump(exclude={"name", "models", "watched", "train", *besides})
        | {"train": each.train.model_dump(exclude=settings)}
        for each in (memory, main)
    )
    return one == other


def _listed(value: Texts) -> list[str]:
    return [value] if isinstance(value, str) else value


def _matches(text: str | None, wanted: Texts | None, order: Sequence[str] = ()) -> bool:
    """Whether a text is one of those that are wanted: equal to it, fitting its pattern, or of its rank in `order`."""
    if wanted is None:
        return True
    return text is not None and any(fnmatchcase(text, each) or _ranked(text, each, order) for each in _listed(wanted))


def _ranked(text: str, rank: str, order: Sequence[str]) -> bool:
    place = RANKS.get(rank)
    return place is not None and place < len(order) and len(order) > 0 and order[place] == text


def _number(alpha: str | None) -> float:
    """An alpha as a number; NaN, which is in no range, if there is none or several."""
    try:
        return float(alpha or "nan")
    except ValueError:
        return float("nan")


# --- which cells are compared -------------------------------------------------------------------------------------


def comparisons(claim: Claim, roles: Roles) -> list[Comparison]:
    """Everything that a claim compares.

    Raises:
        ConfigError: Several cells of the right side fit one cell of the left side.
    """
    fixed = claim.left.fixed() | (claim.right.fixed() if claim.right is not None else set())
    names = [*(name for name in PAIRED if name not in fixed), *claim.by]
    # Where the other fields do not tell cells apart, as with numbers of tokens, the heading does.
    for fields in (names, names if "column" in fixed else [*names, "column"]):
        left = _terms(claim, claim.left, fields, roles)
        right = {} if claim.right is None else _terms(claim, claim.right, fields, roles)
        several = next(((key, terms) for key, terms in right.items() if len(terms) > 1), None)
        if several is None:
            break
    else:
        key, terms = several  # type: ignore[misc]
        two = " and ".join(f"{term.cell.row} / {term.cell.column}" for term in terms[:2])
        raise ConfigError(
            f"claim {claim.id}: expected one cell of {claim.table} on the right side for {_said(key)}, found {two}; say "
            "more about it"
        )
    groups: dict[Key, list[tuple[Term, Term | None]]] = {}
    for key, terms in left.items():
        other = right[key][0] if key in right else None
        for term in terms:
            is_itself = term == other and claim.right is not None and claim.right.pick is None
            if is_itself or (claim.right is not None and other is None):
                continue
            kept = tuple((name, value) for name, value in key if name not in claim.averaged)
            if len(terms) > 1:
                kept += (("row", term.cell.row), ("alpha", term.cell.alpha), ("column", term.cell.column))
            groups.setdefault(kept, []).append((term, other))
    return list(groups.items())


def _key(cell: Cell, names: Iterable[str]) -> Key:
    known = {cell.model, cell.domain, cell.method, cell.memory}
    return tuple((name, None if name == "column" and cell.column in known else getattr(cell, name)) for name in names)


def _terms(claim: Claim, selector: Selector, names: Sequence[str], roles: Roles) -> dict[Key, list[Term]]:
    """The terms of one side, by what both sides agree in."""
    other = selector.other()
    changed = selector.over or selector.minus or {}
    inner = [name for name in (*PAIRED, *(["column"] if "column" in names else [])) if name not in changed]
    below: dict[Key, list[Cell]] = {}
    for cell in roles.select(other) if other is not None else []:
        below.setdefault(_key(cell, inner), []).append(cell)
    found: dict[Key, list[Term]] = {}
    for cell in roles.select(selector):
        under = below.get(_key(cell, inner), [])
        if len(under) > 1 and "column" in inner:
            two = " and ".join(f"{each.row} / {each.column}" for each in under[:2])
            raise ConfigError(
                f"claim {claim.id}: expected one cell of {claim.table} beside {cell.row} / {cell.column}, found {two}; "
                "say more about it"
            )
        if other is None or under:
            term = Term(cell, under[0] if under else None, selector.over is not None)
            found.setdefault(_key(cell, names), []).append(term)
    return {key: _best(terms) if selector.pick else terms for key, terms in found.items()}


def _best(terms: list[Term]) -> list[Term]:
    run = [term for term in terms if term.cell.value is not None]
    sign = -1 if run and run[0].cell.lower_is_better is False else 1
    return sorted(run, key=lambda term: sign * (term.cell.value or 0.0))[:1]


def _said(key: Key) -> str:
    return ", ".join(str(value) for _, value in key if value is not None) or "the only comparison"


# --- values with intervals ----------------------------------------------------------------------------------------

_ALIKE = {name for name, system in SYSTEMS.items() if not system.seeded}  # the same at every seed


class Draws:
    """Bootstrap replicates of the cells of all tables; each cell is resampled once."""

    def __init__(self, tables: Mapping[str, Table]) -> None:
        self._tables = tables
        self._known: dict[tuple[str, str, str], Floats] = {}

    def items(self, cell: Cell) -> list[Items]:
        """The items of a cell, one `Items` a seed; empty if they are too few or not known."""
        found = self._tables[cell.table].items.get((cell.row, cell.column), [])
        resampled = [each for each in found if len(each) > 1]
        return resampled if len(resampled) == len(found) else []

    def seeds(self, cell: Cell) -> list[int]:
        """Seeds that matter; a system that is the same at every seed has none, although its value stands under one."""
        return [] if cell.method in _ALIKE else sorted({each.seed for each in self.items(cell)})

    def of(self, cell: Cell, seeds: Sequence[int]) -> Quantity:
        """A cell at some of its seeds; at all of them if it has none of these."""
        measured = self.items(cell)
        if not measured:
            return Quantity(float(cell.value or 0.0), self._of_interval(cell))
        own = sorted({each.seed for each in measured})
        chosen = [seed for seed in own if seed in seeds] or own
        value = float(np.mean([each.value for each in measured if each.seed in chosen])) * _scale(cell)
        drawn = self._by_item(cell, measured)
        of_seed = [
            drawn[:, [each.seed == seed for each in measured]].mean(1) for seed in chosen
        ]  # Table 7: mean of models
        number = zlib.crc32(repr(chosen).encode())
        return Quantity(value, paired.over_seeds(np.stack(of_seed, axis=1), seed=number) * _scale(cell))

    def _by_item(self, cell: Cell, measured: Sequence[Items]) -> Floats:
        """Replicates over items, a column for each `Items`. Cells of the same task or text draw the same items."""
        if cell.place not in self._known:
            kinds: dict[bytes, list[int]] = {}
            for number, each in enumerate(measured):
                kinds.setdefault(repr(len(each)).encode() + each.counts.tobytes(), []).append(number)
            if len(kinds) > 1 and cell.model is not None:  # a mean over models can have several tokenizers
                raise ArtifactError(
                    f"{cell.table}: row {cell.row}, column {cell.column}: expected the same items at every seed, found "
                    f"{' and '.join(str(len(each)) for each in measured)}; evaluate all seeds on the same text"
                )
            drawn = np.empty((paired.N_RESAMPLES, len(measured)))
            for kind, places in kinds.items():
                seed = zlib.crc32(repr((cell.domain, cell.task)).encode() + kind)
                drawn[:, places] = _resampled([measured[place] for place in places], seed)
            self._known[cell.place] = drawn
        return self._known[cell.place]

    def _of_interval(self, cell: Cell) -> Floats | None:
        """Replicates of a cell of which only the interval is known: normal on each side, independent of all others.

        Both sides of a comparison are then drawn apart, which gives a wider interval than pairs of the same items.
        """
        if cell.value is None or cell.low is None or cell.high is None:
            return None
        rng = np.random.default_rng(zlib.crc32(repr(cell.place).encode()))
        normal = rng.standard_normal(paired.N_RESAMPLES) / 1.96
        return cell.value + np.where(normal < 0, normal * (cell.value - cell.low), normal * (cell.high - cell.value))


def _resampled(measured: Sequence[Items], seed: int) -> Floats:
    """Replicates over the same items of each, (R, S)."""
    first = measured[0]
    labels = [each.labels for each in measured if each.labels is not None]
    if labels:
        return paired.f1_by_item(labels, first.averages, seed=seed)
    of = np.exp if first.kind == "perplexity" else np.asarray
    return paired.ratios_by_item([each.sums for each in measured], first.counts, of, seed=seed)


def _combined(one: Quantity, other: Quantity, ratio: bool) -> Quantity:
    drawn = None
    with np.errstate(divide="ignore", invalid="ignore"):  # not finite where a draw has 0 below; `_judged` says so
        value = float(np.divide(one.value, other.value)) if ratio else one.value - other.value
        if one.drawn is not None and other.drawn is not None:
            drawn = one.drawn / other.drawn if ratio else one.drawn - other.drawn
    return Quantity(value, drawn)


def _spread(ratio: Quantity) -> Quantity:
    """How far apart two numbers are as a ratio, whichever is the larger: 1 or more."""
    drawn = None if ratio.drawn is None else np.maximum(ratio.drawn, 1 / ratio.drawn)
    return Quantity(max(ratio.value, 1 / ratio.value), drawn)


def _averaged(quantities: Sequence[Quantity]) -> Quantity:
    drawn = [each.drawn for each in quantities if each.drawn is not None]
    whole = np.mean(drawn, axis=0) if len(drawn) == len(quantities) else None
    return Quantity(float(np.mean([each.value for each in quantities])), whole)


# --- verdicts -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """One comparison with its verdict.

    Attributes:
        key: What it is about.
        effect: Ratio or difference.
        interval: Its 95 % interval; None: there is none.
        word: holds, fails or undecided.
        distance: How far the effect is beyond the bound; negative on the claimed side.
        n: Items that are drawn on the left side.
        seeds: Seeds of both sides.
        notes: What must be known about it.
    """

    key: Key
    effect: float
    interval: tuple[float, float] | None
    word: str
    distance: float
    n: int
    seeds: list[int]
    notes: list[str]


@dataclass(frozen=True)
class Bound:
    """The values of the effect that a claim allows."""

    low: float
    high: float
    closed: bool

    @classmethod
    def of(cls, relation: str, neutral: float) -> "Bound":
        """From a relation such as `< 0.85`; without a number the bound is the effect of no difference."""
        sign, _, text = relation.partition(" ")
        number = float(text) if text else neutral
        if sign == "within":
            return cls(neutral - number, neutral + number, True)
        closed = sign.endswith("=")
        return cls(-np.inf, number, closed) if sign.startswith("<") else cls(number, np.inf, closed)

    def holds(self, low: float, high: float) -> bool:
        """Whether an interval lies inside."""
        if self.closed:
            return self.low <= low and high <= self.high
        return self.low < low and high < self.high

    def fails(self, low: float, high: float) -> bool:
        """Whether an interval lies outside."""
        return high < self.low or low > self.high

    def distance(self, value: float) -> float:
        """How far a value is outside; negative inside."""
        return max(self.low - value, value - self.high)


def judge(claim: Claim, roles: Roles, draws: Draws) -> Verdict:
    """The verdict on a claim by the cells of its table."""
    for side in filter(None, (claim.left, claim.right, claim.left.other(), claim.right and claim.right.other())):
        if not roles.select(side):
            ranked = "; smallest and largest take two base models of a family" if side.model in RANKS else ""
            return _not_run(f"{claim.table} of this config has no cell for: {side}{ranked}")
    groups = comparisons(claim, roles)
    if not groups:
        return _not_run(f"{claim.table} of this config has no two cells of {claim.left} and {claim.right} that differ")
    complete, lacking = [], []
    for key, terms in groups:
        run = [pair for pair in terms if not _lacking(pair)]
        lacking += [cell for pair in terms for cell in _lacking(pair)]
        complete += [(key, run)] if run else []
    if not complete:
        return _not_run(lacking[0].note)
    several = [_judged(claim, key, terms, draws, len(complete)) for key, terms in complete]
    return _whole(claim, several, lacking, roles.study.scale)


def _lacking(pair: tuple[Term, Term | None]) -> list[Cell]:
    return [cell for term in pair if term is not None for cell in term.cells if cell.value is None]


def _not_run(reason: str) -> Verdict:
    return Verdict(None, None, None, None, "", "not run", reason)


def _judged(
    claim: Claim, key: Key, terms: Sequence[tuple[Term, Term | None]], draws: Draws, n_comparisons: int
) -> Judged:
    used = [cell for pair in terms for term in pair if term is not None for cell in term.cells]
    seeds, notes = _common_seeds(used, draws)
    sides: list[list[Quantity]] = [[], []]
    for pair in terms:
        for side, term in zip(sides, pair, strict=True):
            if term is not None:
                value = _value(term, draws, seeds)
                side.append(_spread(value) if claim.measure == "spread" else value)
    left = _averaged(sides[0])
    effect = _combined(left, _averaged(sides[1]), claim.measure != "difference") if sides[1] else left
    bound = Bound.of(claim.relation, claim.neutral)
    notes += _notes(terms, draws)
    n = sum(len(draws.items(term.cell)[0]) if draws.items(term.cell) else 0 for term, _ in terms)
    distance = bound.distance(effect.value)
    if effect.drawn is None or not np.isfinite(effect.drawn).all():
        why = "no interval is known" if effect.drawn is None else "some draws divide by 0"
        return Judged(key, effect.value, None, "undecided", distance, n, seeds, [*notes, why])
    low, high = _interval(effect.drawn, paired.LEVEL)
    wide = _interval(effect.drawn, 1 - (1 - paired.LEVEL) / n_comparisons)
    word = "holds" if bound.holds(low, high) else "fails" if bound.fails(*wide) else "undecided"
    return Judged(key, effect.value, (low, high), word, distance, n, seeds, notes)


def _interval(drawn: Floats, level: float) -> tuple[float, float]:
    low, high = statistics.percentiles(drawn, level)
    return float(low), float(high)


def _value(term: Term, draws: Draws, seeds: Sequence[int]) -> Quantity:
    own = draws.of(term.cell, seeds)
    return own if term.other is None else _combined(own, draws.of(term.other, seeds), term.divided)


def _common_seeds(used: Iterable[Cell], draws: Draws) -> tuple[list[int], list[str]]:
    """Seeds that all cells have, and a note if there are none although cells have seeds."""
    several = [set(found) for cell in used if (found := draws.seeds(cell))]
    if not several:
        return [], []
    common = sorted(set.intersection(*several))
    return (common, []) if common else (sorted(set.union(*several)), ["the sides have no seed in common"])


def _notes(terms: Sequence[tuple[Term, Term | None]], draws: Draws) -> list[str]:
    """What weakens a comparison: no pairs of items, a constant predictor."""
    notes = []
    used = [cell for pair in terms for term in pair if term is not None for cell in term.cells]
    if len(used) > 1:
        if any(not draws.items(cell) for cell in used):
            notes.append("not paired: the intervals of the cells are drawn apart, which is wider")
        elif any(not _same_items(pair, draws) for pair in terms):
            notes.append("not paired: the two sides have other items")
    if any(cell.constant for cell in used):
        notes.append("a system that predicts one label only is among them")
    return notes


def _same_items(pair: tuple[Term, Term | None], draws: Draws) -> bool:
    measured = [draws.items(cell)[0] for term in pair if term is not None for cell in term.cells]
    places = {(cell.domain, cell.task) for term in pair if term is not None for cell in term.cells}
    return len(places) == 1 and all(
        len(one) == len(other) and np.array_equal(one.counts, other.counts)
        for one, other in itertools.pairwise(measured)
    )


def _whole(claim: Claim, several: list[Judged], lacking: Sequence[Cell], scale: str) -> Verdict:
    """The verdict on all comparisons; effect and interval are those of the worst one."""
    rank = ("fails", "undecided", "holds").index
    worst = min(several, key=lambda each: (rank(each.word), -each.distance))
    counts = Counter(each.word for each in several)
    seeds = " ".join(map(str, worst.seeds))
    parts = []
    if len(several) > 1:
        found = ", ".join(f"{counts[word]} {word}" for word in ("holds", "fails", "undecided") if counts[word])
        parts.append(f"{len(several)} comparisons: {found}; shown is the least favourable: {_said(worst.key)}")
    parts += worst.notes
    if worst.n and len(worst.seeds) == 1:
        parts.append("one seed, so items alone are drawn")
    if lacking:
        parts.append(f"{len(lacking)} cells have no value, such as {lacking[0].row}: {lacking[0].note}")
    if worst.word != "holds" and scale != "paper" and claim.small:
        parts.append(f"at this scale: {claim.small}")
    low, high = worst.interval if worst.interval is not None else (None, None)
    return Verdict(worst.effect, low, high, worst.n or None, seeds, worst.word, "; ".join(parts))


# --- the file -----------------------------------------------------------------------------------------------------


def run(config: Config, paths: Sequence[Path], out: Path, file: Path = FILE) -> list[tuple[Claim, Verdict]]:
    """Write claims.csv, a line for each claim in the order of the file, and the same for people beside it (.md).

    Args:
        config: Config of the run.
        paths: Cells files of its tables; claims about other tables are not run.
        out: CSV file.
        file: The claims.

    Raises:
        MemDecError: A file cannot be read or does not fit the config (`load`, `read_tables`).
    """
    claims, tables = load(file), read_tables(paths, config)
    draws, roles = Draws(tables), {}
    for name, table in tables.items():
        roles[name] = Roles.of(config.study_for(name), name, table.cells)
    found = [
        (claim, judge(claim, roles[claim.table], draws) if claim.table in tables else _not_made(claim.table, config))
        for claim in claims
    ]
    artefact.write_text(out.with_suffix(".md"), _markdown(found))
    artefact.write_text(out, _csv(found))
    return found


def _not_made(table: str, config: Config) -> Verdict:
    try:
        made = figure_catalogue.figure if table in figure_catalogue.FIGURES else catalogue.table
        made(config.study_for(table), table)
    except ConfigError as error:
        return _not_run(str(error))
    return _not_run(f"{table} was not given; snakemake results/{table}.csv makes it")


def _csv(found: Iterable[tuple[Claim, Verdict]]) -> str:
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(COLUMNS)
    for claim, verdict in found:
        right = "" if claim.right is None else str(claim.right)
        head = (claim.id, claim.text, claim.source, " ".join(claim.version), claim.table, str(claim.left), right)
        lines.writerow([*head, str(claim), *("" if each is None else each for each in verdict)])
    return text.getvalue()


def _markdown(found: Sequence[tuple[Claim, Verdict]]) -> str:
    head = ["Verdict", "Claim", "Table", "Effect (95 % interval)"]
    rows = [
        [verdict.verdict, markdown.escaped(claim.text), claim.table, _effect(verdict) or "–"]
        for claim, verdict in found
    ]
    return f"{markdown.table(head, rows, len(head))}\n\n{_total(found)}. Reasons are in the CSV.\n"


def shown(found: Sequence[tuple[Claim, Verdict]]) -> str:
    """One line for each claim, for the terminal, and a line of counts."""
    lines = [f"{verdict.verdict:9}  {claim.id}: {_effect(verdict) or verdict.reason}" for claim, verdict in found]
    return "\n".join([*lines, _total(found)])


def _total(found: Sequence[tuple[Claim, Verdict]]) -> str:
    counts = Counter(verdict.verdict for _, verdict in found)
    return f"{len(found)} claims: {', '.join(f'{counts[word]} {word}' for word in VERDICTS)}"


def _effect(verdict: Verdict) -> str:
    if verdict.effect is None:
        return ""
    interval = (
        ""
        if verdict.low is None or verdict.high is None
        else f" ({markdown.number(verdict.low)} to {markdown.number(verdict.high)})"
    )
    return f"{markdown.number(verdict.effect)}{interval}"
