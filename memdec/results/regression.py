"""`memdec check`: check whether a change of code or model moved the numbers of a known run, perplexities and accuracies.

The baseline is one JSON file for a run. It holds the value and tolerance of every table cell, what the tolerance was
measured from, the hashes of texts and task rows and the package versions that must be the same, and the reason of every
update. `memdec check` prints a line for each cell.

A table is read from `<table>.cells.csv`, or where there is none from the columns of `<table>.csv`. The provenance file
is beside it.
"""

import csv
import datetime
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field

from memdec.artefacts import artefact, provenance
from memdec.errors import ArtifactError, ConfigError, IncomparableError, MemDecError, outside
from memdec.results import cells as table_cells
from memdec.settings import Settings, parse

FLOOR = 0.005  # lowest tolerance as a fraction of the value, because processors round differently
WHOLE = {"percent": 100.0, "fraction": 1.0}  # a score of all rows right; rounding may also turn one row
NOISE_FACTOR = 3.0  # half-width of the tolerance in standard deviations over seeds
SAME = ("torch", "transformers", "tokenizers", "faiss-cpu", "peft", "lm-eval")  # their versions can change the numbers
_TABLES = "make the table again"


class Known(Settings):
    """One cell of a baseline."""

    value: float = Field(description="the number, in the unit of the table")
    unit: str | None = Field(None, description="its unit; none where the table does not say it")
    sd: float | None = Field(None, ge=0, description="seed noise: standard deviation of the value over seeds")
    tolerance: float = Field(gt=0, description="most that the value may differ, in its unit")


class Noise(Settings):
    """One table that the seed noise was measured from."""

    table: str
    seeds: list[int]
    machine: str | None
    commit: str | None


class Update(Settings):
    """One update of a baseline."""

    date: str = Field(description="day, UTC")
    commit: str | None = Field(description="commit of the code; + means with local changes")
    reason: str = Field(min_length=1)


class Facts(Settings):
    """What must be the same in two runs, so that their numbers can be compared."""

    scale: str
    corpora: dict[str, str] = Field(description="hash of each corpus")
    rows: dict[str, str] = Field(default_factory=dict, description="hash of the rows of each task")
    versions: dict[str, str | None] = Field(description="version of each package; none: not installed")


class Baseline(Facts):
    """A baseline file."""

    noise_factor: float = Field(description="tolerance in standard deviations")
    noise: list[Noise] = Field(description="tables that the standard deviations were measured from; none: not measured")
    updates: list[Update] = Field(min_length=1, description="the newest last")
    cells: dict[str, Known]


class Value(NamedTuple):
    """What a table says in one cell."""

    value: float
    unit: str | None = None
    n: int | None = None  # rows or tokens
    seeds: int | None = None
    sd: float | None = None  # over these seeds


class Line(NamedTuple):
    """The comparison of one cell."""

    word: str  # ok, MOVED, MISSING or NEW
    cell: str
    text: str

    def __str__(self) -> str:
        return f"{self.word:<7} {self.cell}: {self.text}"


def compare(results: Sequence[Path], baseline: Path) -> tuple[list[Line], bool]:
    """Compare tables with a baseline: a line for each cell, and whether any moved by more than its tolerance.

    A cell of the baseline that no table has counts as moved. A cell that the baseline does not have does not.

    Raises:
        ConfigError: The baseline is of another scale.
        IncomparableError: Texts, task rows or package versions differ from the baseline's.
        ArtifactError: A table or the baseline is damaged.
    """
    known, ours, found = _read(baseline), facts(results), cells(results)
    _check_scale(baseline, known, ours)
    lacking = [f"the text of {name}" for name in known.corpora if name not in ours.corpora]
    lacking += [f"the rows of {name}" for name in known.rows if name not in ours.rows]
    if lacking:
        raise IncomparableError(
            f"{_names(results)}: expected all tables of {baseline}, found no table with {', '.join(lacking)}; give all tables"
        )
    if differ := _differences(known, ours):
        raise IncomparableError(
            f"{_names(results)}: expected the text, task rows and versions of {baseline}, found other {', '.join(differ)}; the "
            "comparison would mean nothing; make the baseline anew with `memdec check --update --reason`"
        )
    lines = []
    for name, cell in known.cells.items():
        if name not in found:
            lines.append(Line("MISSING", name, f"baseline {cell.value:.4g}"))
            continue
        change = found[name].value - cell.value
        word = "MOVED" if abs(change) > cell.tolerance else "ok"
        shown = f"{cell.value:.3f} -> {found[name].value:.3f} ({change:+.3f}, tolerance ±{cell.tolerance:.3f})"
        lines.append(Line(word, name, shown))
    lines += [Line("NEW", name, f"{found[name].value:.3f}") for name in found if name not in known.cells]
    return lines, any(line.word in ("MOVED", "MISSING") for line in lines)


def update(results: Sequence[Path], baseline: Path, reason: str, noise: Sequence[Path] = ()) -> None:
    """Write the values of tables into a baseline, with the reason; a baseline that is not there is made.

    Args:
        results: All tables of the baseline.
        baseline: The file.
        reason: Why the numbers may differ from those before.
        noise: The same tables with other seeds, to measure the noise. Without them a known cell keeps its standard
            deviation. A new cell has that of its own seeds, or no more than the lowest tolerance.

    Raises:
        ConfigError: There is no reason; the baseline or a table of `noise` is of another scale; or a table is not given of
            which the baseline has cells.
    """
    if not reason.strip():
        raise ConfigError("--reason: expected why the numbers changed, found nothing; give it with --update")
    ours, found, others = facts(results), cells(results), [(table, cells([table])) for table in noise]
    before = _read(baseline) if baseline.exists() else None
    if before is not None:
        _check_scale(baseline, before, ours)
        lacking = dict.fromkeys(map(_table, before.cells)).keys() - {_stem(table) for table in results}
        if lacking:
            raise ConfigError(
                f"{baseline}: expected all of its tables, found none of {', '.join(sorted(lacking))}, whose cells would be "
                "dropped; give all tables, or remove the file first"
            )
    for table in noise:
        _check_scale(table, ours, facts([table]))
    known = {}
    for name, each in found.items():
        sample = [each.value, *(values[name].value for _, values in others if name in values)]
        old = before.cells.get(name) if before is not None else None
        sd = _noise(each, sample, old.sd if old is not None else None)
        plain = {"value": each.value, "sd": sd, "tolerance": _tolerance(each, sd)}
        rounded = {field: None if number is None else round(number, 6) for field, number in plain.items()}
        known[name] = Known(unit=each.unit, **rounded)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    commit = provenance.git_commit(Path(__file__).parent)
    made = Baseline(
        **ours.model_dump(),
        noise_factor=NOISE_FACTOR,
        noise=[_origin(table) for table in noise] or (before.noise if before is not None else []),
        updates=[
            *(before.updates if before is not None else []),
            Update(date=today, commit=commit, reason=reason.strip()),
        ],
        cells=known,
    )
    artefact.write_json(baseline, made.model_dump(mode="json"))


def _noise(value: Value, sample: Sequence[float], before: float | None) -> float | None:
    """Standard deviation over seeds; None if nothing is known about it."""
    if len(sample) > 1:
        return float(np.std(sample, ddof=1))
    if before is None and value.sd is not None and value.seeds is not None and value.seeds > 1:
        return value.sd / math.sqrt(value.seeds)  # the value is a mean over seeds
    return before


def _tolerance(value: Value, sd: float | None) -> float:
    """The larger of the noise and what rounding on another processor may do."""
    one_row = WHOLE[value.unit] / value.n if value.unit in WHOLE and value.n else 0.0
    return max(NOISE_FACTOR * (sd or 0.0), FLOOR * abs(value.value), one_row) + 1e-5  # numbers are rounded in the file


# --- reading ------------------------------------------------------------------------------------------------------


def cells(results: Sequence[Path]) -> dict[str, Value]:
    """Read the cells of tables that have a value, by `table: row / column`.

    Raises:
        ArtifactError: A table is not there, or has a number that is not finite, or two values for one cell.
    """
    found: dict[str, Value] = {}
    for table in results:
        path = _beside(table, ".cells.csv")
        for name, value in (_long(path) if path.exists() else _wide(_beside(table, ".csv"))).items():
            if name in found:
                raise ArtifactError(f"{table}: expected each table once, found {name} twice; give each table once")
            found[name] = value
    return found


def _long(path: Path) -> dict[str, Value]:
    """The measured cells. A mean or difference of cells has an interval but no n: it moves only if they do."""
    return {
        _name(cell.table, cell.row, cell.column): Value(cell.value, cell.unit, cell.n, cell.seeds, cell.sd)
        for cell in table_cells.read(path)
        if cell.value is not None and (cell.n is not None or cell.low is None)
    }


def _wide(path: Path) -> dict[str, Value]:
    """Cells of a table that has only columns: those with another column `<name>_n`, after the labels of the row."""
    with outside(ArtifactError, path, "a table", _TABLES):
        header, *lines = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8")))) or [[]]
    columns = [name for name in header if f"{name}_n" in header]
    if not columns or header.index(columns[0]) == 0:
        raise ArtifactError(
            f"{path}: expected labels and a column NAME with NAME_n, found {', '.join(header)}; {_TABLES}"
        )
    found: dict[str, Value] = {}
    for line in lines:
        row = dict(zip(header, line, strict=False))
        labels = " / ".join(line[: header.index(columns[0])])
        for column in columns:
            if not (text := row.get(column, "")):
                continue  # not run
            name = _name(path.stem, labels, column)
            if name in found:
                raise ArtifactError(f"{path}: expected one value for each cell, found two for {name}; {_TABLES}")
            found[name] = Value(
                _number(path, name, text), n=int(float(row[f"{column}_n"])) if row[f"{column}_n"] else None
            )
    return found


def _number(path: Path, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ArtifactError(
            f"{path}: expected a finite number for {name}, found {text}; run what it is made from again"
        )
    return value


def _name(table: str, row: str, column: str) -> str:
    return f"{table}: {row} / {column}"


def _table(name: str) -> str:
    return name.split(": ", 1)[0]


def facts(results: Sequence[Path]) -> Facts:
    """What tables were made from, of all tables together.

    Raises:
        ArtifactError: A table has no provenance, or two tables were made from other text or rows.
        ConfigError: They are of several scales.
    """
    read = [(table, _provenance(table)) for table in results]
    (first, made), *rest = read
    for table, other in rest:
        _check_scale(table, made, other)
        for kind in ("corpora", "rows", "versions"):
            mine, theirs = getattr(made, kind), getattr(other, kind)
            for name in mine.keys() & theirs.keys():
                if mine[name] != theirs[name]:
                    raise ArtifactError(
                        f"{table}: expected the {kind} of {first}, found other {name}, which changed since one of them was made; "
                        "make both tables again"
                    )
        made = made.model_copy(update={"corpora": other.corpora | made.corpora, "rows": other.rows | made.rows})
    return made


def _provenance(table: Path) -> Facts:
    path = _beside(table, ".provenance.json")
    with outside(ArtifactError, path, f"the provenance of {table.name}", _TABLES):
        data = json.loads(path.read_text(encoding="utf-8"))
        return Facts(
            scale=data["scale"],
            corpora=data.get("corpora_sha256", {}),  # Table 6 has none
            rows=data.get("rows_sha256", {}),
            versions={name: data["versions"].get(name) for name in SAME},
        )


def _origin(table: Path) -> Noise:
    data: dict[str, Any] = json.loads(_beside(table, ".provenance.json").read_text(encoding="utf-8"))
    seeds = data.get("config", {}).get("seeds", [])
    return Noise(table=_stem(table), seeds=seeds, machine=data.get("machine"), commit=data.get("commit"))


def _beside(table: Path, ending: str) -> Path:
    """File of a table, of which `.csv` or `.cells.csv` was given."""
    return table.with_name(_stem(table) + ending)


def _stem(table: Path) -> str:
    return table.name.removesuffix(".csv").removesuffix(".cells")


def _names(results: Sequence[Path]) -> str:
    return ", ".join(str(table) for table in results)


def _read(baseline: Path) -> Baseline:
    try:
        data = json.loads(baseline.read_text(encoding="utf-8"))
        known: Baseline = parse(Baseline, data, str(baseline))
    except (OSError, ValueError, MemDecError) as error:
        raise ArtifactError(
            f"{baseline}: expected a baseline, found {error}; make one with `memdec check --update --reason`"
        ) from None
    return known


def _check_scale(where: Path, one: Facts, other: Facts) -> None:
    if one.scale != other.scale:
        raise ConfigError(
            f"{where}: expected one scale, found {one.scale} and {other.scale}; give the baseline and tables of one config"
        )


def _differences(known: Facts, ours: Facts) -> list[str]:
    """What differs from the baseline; a local build of a version (`+cpu`) is the same version."""

    def version(text: str | None) -> str:
        return (text or "").split("+")[0]

    differ = [f"corpus {name}" for name, sha in known.corpora.items() if ours.corpora.get(name) != sha]
    differ += [f"rows of {name}" for name, sha in known.rows.items() if ours.rows.get(name) != sha]
    return differ + [
        f"{name} {ours.versions.get(name)} (baseline {was})"
        for name, was in known.versions.items()
        if version(was) != version(ours.versions.get(name))
    ]
