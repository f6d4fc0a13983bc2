"""`memdec report`: write every result of a run as one HTML page that needs no other file and no network.

Inputs, all below the folder `results`: `claims.csv`; `<table>.cells.csv` with `<table>.provenance.json` beside it;
`figure*.svg`; and of `<scale>/` the records of evaluations (curves of alpha and lambda), the manifests of trained models
(curves of the loss), the folders of `memdec latency`, and the benchmark files of Snakemake (cost). What is not there is
named in the page with the command that makes it. `report.html.j2` is the page, `report.css` and `report.js` are put into
it; without the script it only lacks sorting and filters.
"""

import base64
import hashlib
import json
import math
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from memdec.artefacts import artefact, provenance
from memdec.config import Config
from memdec.errors import ArtifactError, ConfigError, on_one_line, outside
from memdec.inference.systems import SYSTEMS
from memdec.results import catalogue, claims, curves, figure_catalogue
from memdec.results import cells as lines_of_tables
from memdec.results.cells import Cell
from memdec.results.curves import PER_CHART, SIGNS, Dot, Line
from memdec.results.layout import Measured

_NUMBERS = {"effect", "low", "high"}
_FOLDERS = {  # of trained models, by the name of the folder that they are in; the order of the page
    "memory": "Memories",
    "lora": "LoRA adapters",
    "dapt": "DAPT baselines",
    "finetuned": "Key models, fine-tuned on the domain",
    "models": "Base models, from scratch",
}


# --- what the page shows --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Value:
    """One cell of a table.

    Attributes:
        text: The value, or the reason why there is none.
        sort: What it is sorted by; None: it comes last.
        interval: Its 95 % interval, or "".
        paper: The printed value, or "".
        verdict: How the two compare, or "".
        facts: What else is known, by name.
        best: Whether it is the best of its model and column.
        run: Whether there is a value.
        constant: Whether the system gave every row the same label.
    """

    text: str
    sort: float | None
    interval: str = ""
    paper: str = ""
    verdict: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)
    best: bool = False
    run: bool = True
    constant: bool = False


@dataclass(frozen=True, slots=True)
class Grid:
    """A table of the paper: labels of a row, then a value for each column."""

    name: str
    title: str
    caption: str
    about: list[str]  # what all cells have in common
    labels: list[str]
    columns: list[tuple[str, str]]  # heading, and its metric if the columns have several
    rows: list[tuple[list[str], list[Value | None]]]
    n_run: int
    n_cells: int
    why: str = ""  # nothing was run: the reason
    command: str = ""  # nothing was run: the command that makes it

    @property
    def grouped(self) -> bool:
        """Whether the first label is that of several rows, which then stand together."""
        firsts = [labels[0] for labels, _ in self.rows]
        return len(self.labels) > 1 and all(firsts.count(first) > 1 for first in firsts)


@dataclass(frozen=True, slots=True)
class Plain:
    """A simple table: its header, and rows of text; columns after the first `n_words` are numbers."""

    header: list[str]
    rows: list[list[str]]
    n_words: int = 1
    total: list[str] = field(default_factory=list)
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart with its legend, and its numbers as a table."""

    title: str
    svg: Markup
    says: str  # what it shows, for those who do not see it
    legend: list[tuple[str, int]] = field(default_factory=list)
    numbers: Plain | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Charts below one heading; `open` ones are shown at once."""

    title: str
    charts: list[Chart]
    open: bool = True


def run(config: Config, given: Sequence[Path], results: Path, out: Path) -> None:
    """Write the page.

    Args:
        config: Config of the run.
        given: Files that it is from, for the commands in the page; none: the default config.
        results: Folder of the run's results.
        out: HTML file.

    Raises:
        MemDecError: A file of the results cannot be read, or is of another scale.
    """
    if not results.is_dir():
        raise ConfigError(
            f"{results}: expected a folder with results, found none; make one with snakemake {results}/table3.csv"
        )
    artefact.write_text(out, page(config, given, results))


def page(config: Config, given: Sequence[Path], results: Path) -> str:
    """The text of the page; arguments as for `run`."""
    scale = results / config.scale
    cells = {name: lines_of_tables.read(results / f"{name}.cells.csv") for name in _named(results, ".cells.csv")}
    origins = {name: _origin(results / f"{name}.provenance.json", config.scale) for name in cells}
    grids = [_grid(config, name, cells.get(name, []), _command(given, results, name)) for name in _tables(cells)]
    said = _claims(results / "claims.csv")
    script, where = _packaged("report.js"), ["--results", str(results), "--out", f"{results}/report.html"]
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_visible
    )
    return environment.from_string(_packaged("report.html.j2")).render(
        scale=config.scale,
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=Markup(_packaged("report.css")),
        signs=SIGNS,
        claims=said,
        counts={verdict: sum(claim["verdict"] == verdict for claim in said) for verdict in claims.VERDICTS},
        headline=_headline(cells),
        grids=grids,
        figures=_figures(config, results, given),
        weights=_weight_curves(config, scale),
        losses=_loss_curves(config, scale),
        latency=_latency(scale),
        cost=_cost(scale / "benchmarks"),
        origins=_origins(origins),
        commit=", ".join(sorted({str(origin.get("commit")) for origin in origins.values()})),
        machine=", ".join(sorted({str(origin.get("machine")) for origin in origins.values()})),
        title=_title,
        command=partial(_command, given, results),
        folder=str(results / config.scale),
        itself=shlex.join(["memdec", "report", *(word for file in given for word in ("--config", str(file))), *where]),
    )


def _visible(value: Any) -> Any:
    """Text on one line and without characters that cannot be seen; markup is left as it is."""
    return on_one_line(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _packaged(name: str) -> str:
    return resources.files("memdec.results").joinpath(name).read_text(encoding="utf-8")


def _named(results: Path, end: str) -> list[str]:
    """Names of the files with this end, Table 3 before Table 10."""
    return sorted((file.name.removesuffix(end) for file in results.glob(f"*{end}")), key=_natural)


def _natural(name: str) -> list[Any]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def _command(given: Sequence[Path], results: Path, name: str) -> str:
    """The command that makes a table or figure, from the folder that holds `results`."""
    config = ["--configfile", *map(str, given)] if given else []
    return shlex.join(["snakemake", "--cores", "8", *config, "--", f"{results}/{name}.csv"])


# --- reading --------------------------------------------------------------------------------------------------------


def _read(file: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a CSV file; numbers as float, None where they are empty."""
    again = f"delete it and make it again with snakemake {shlex.quote(str(file))}"
    with outside(ArtifactError, file, "a CSV table in UTF-8", again):
        frame = pd.read_csv(file, dtype=str, keep_default_na=False)
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise ArtifactError(f"{file}: expected the column {missing[0]}, found {', '.join(frame.columns)}; {again}")
    rows: list[dict[str, Any]] = frame[list(columns)].to_dict("records")  # type: ignore[assignment]
    for number, row in enumerate(rows, 2):
        for name in _NUMBERS & set(columns):
            row[name] = _number(row[name], f"{file}: line {number}: {name}", again)
    return rows


def _number(text: str, where: str, again: str) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ArtifactError(f"{where}: expected a finite number, found {text[:40]!r}; {again}")
    return value


def _claims(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    found = _read(file, claims.COLUMNS)
    for number, claim in enumerate(found, 2):
        if claim["verdict"] not in claims.VERDICTS:
            raise ArtifactError(
                f"{file}: line {number}: expected a verdict of {', '.join(claims.VERDICTS)}, found {claim['verdict']!r}; "
                "delete it and make it again"
            )
        claim["shown"] = _with_interval(claim["effect"], claim["low"], claim["high"])
    return found


def _with_interval(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return ""
    shown = f"{value:.3g}" if low is None or high is None else f"{value:.3g} [{low:.3g}, {high:.3g}]"
    return shown.replace("-", "−")


def _origin(file: Path, scale: str) -> dict[str, Any]:
    """Where a table is from: its `.provenance.json`."""
    with outside(ArtifactError, file, "JSON beside its table", "make the table again"):
        found = dict(json.loads(file.read_text(encoding="utf-8")))
    if found.get("scale") != scale:
        raise ArtifactError(
            f"{file}: expected a table of scale {scale}, found scale {found.get('scale')}; give --config of that run"
        )
    return found


def _manifests(scale: Path, *kinds: str) -> Iterable[tuple[Path, artefact.Manifest]]:
    """Artefacts of these kinds below a folder; one that is unfinished or damaged is an error."""
    for file in sorted(scale.rglob(artefact.MANIFEST)):
        kind = artefact.kind_of(file.parent)
        if kind in kinds:
            yield file.parent, artefact.read(file.parent, kind)


# --- tables ---------------------------------------------------------------------------------------------------------


def _tables(there: Iterable[str]) -> list[str]:
    """Tables that are there or that the catalogue has, numbered ones first."""
    return sorted({*there, *catalogue.TABLES}, key=lambda name: (not re.fullmatch(r"table\d+", name), _natural(name)))


def _title(name: str) -> str:
    return re.sub(r"^(table|figure)(\d+)$", r"\1 \2", name).capitalize()


def _grid(config: Config, name: str, cells: Sequence[Cell], command: str) -> Grid:
    """A table of the page; one that was not run has no columns, and says why."""
    title, caption, headings, cannot = _title(name), "", list[str](), ""
    try:
        table = catalogue.table(config.study_for(name), name)
        caption = table.caption
        headings = list(table.rows[0].labels) if isinstance(table, Measured) and table.rows else []
    except ConfigError as error:
        cannot = str(error).removeprefix(f"{name}: ")
    run_ = [cell for cell in cells if cell.value is not None]
    if not run_:
        notes = "; ".join(dict.fromkeys(cell.note for cell in cells)) or cannot
        return Grid(name, title, caption, [], [], [], [], 0, len(cells), notes, "" if notes else command)
    heads = {_column(cell): cell for cell in cells}
    metrics = {_metric(cell) for cell in heads.values()}
    one = metrics.pop() if len(metrics) == 1 else ""
    rows: dict[str, dict[tuple[str, str | None], Cell]] = {}
    for cell in cells:
        rows.setdefault(cell.row, {})[_column(cell)] = cell
    digits = {key: _digits([cell.value for cell in run_ if _column(cell) == key]) for key in heads}
    (names, labels, common), best = _labels(list(rows), headings), _best(run_)
    shown = [
        (
            labels[row],
            [_value(found[key], digits[key], id(found[key]) in best) if key in found else None for key in heads],
        )
        for row, found in rows.items()
    ]
    columns = [(cell.column, "" if one else _metric(cell)) for cell in heads.values()]
    about = [text for text in (common, one) if text]
    return Grid(name, title, caption, about, names, columns, shown, len(run_), len(cells))


def _column(cell: Cell) -> tuple[str, str | None]:
    return cell.column, cell.metric


def _metric(cell: Cell) -> str:
    """What a column measures, e.g. `acc (%), higher is better`."""
    name = cell.metric or ""
    if cell.unit and cell.unit not in name:
        name = f"{name} ({cell.unit})" if name else cell.unit
    better = {True: "lower is better", False: "higher is better", None: ""}[cell.lower_is_better]
    return ", ".join(filter(None, [name.replace("_", " "), better]))


def _labels(rows: Sequence[str], headings: Sequence[str]) -> tuple[list[str], dict[str, list[str]], str]:
    """Headings of the labels that tell rows apart, these labels of each row, and what all rows have in common.

    Args:
        rows: The labels of each row, joined as in `Cell.row`.
        headings: Of the labels.
    """
    parts = {row: row.split(" / ") for row in rows}
    if any(len(labels) != len(headings) for labels in parts.values()):
        return ["Row"], {row: [row] for row in rows}, ""
    values = [list(dict.fromkeys(labels[place] for labels in parts.values())) for place in range(len(headings))]
    told = [place for place, head in enumerate(headings) if head == "family" and "model" in headings]  # by the model
    same = [place for place in range(len(headings)) if len(values[place]) == 1 and len(rows) > 1]
    kept = [place for place in range(len(headings)) if place not in (*told, *same)] or [len(headings) - 1]
    common = ", ".join(f"{headings[place]}: {values[place][0]}" for place in same if place not in (*told, *kept))
    names = [headings[place].capitalize() for place in kept]
    return names, {row: [labels[place] for place in kept] for row, labels in parts.items()}, common


def _best(run_: Sequence[Cell]) -> set[int]:
    """The best values of each column and model, by `id`, where there are several to choose from."""
    groups: dict[tuple[str | None, ...], list[Cell]] = {}
    for cell in run_:
        if cell.lower_is_better is not None:
            groups.setdefault((cell.column, cell.metric, cell.model), []).append(cell)
    found = set()
    for group in groups.values():
        top = (min if group[0].lower_is_better else max)(cell.value for cell in group if cell.value is not None)
        found |= {id(cell) for cell in group if cell.value == top and len(group) > 1}
    return found


def _digits(values: Iterable[float | None]) -> int:
    """Decimals that all values of a column are shown with."""
    return 2 if max((abs(value) for value in values if value is not None), default=0) >= 1 else 3


def _value(cell: Cell, digits: int, best: bool) -> Value:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:,.{digits}f}".replace("-", "−")

    printed = [number(cell.paper), cell.verdict or ""] if cell.paper is not None else ["", ""]
    if cell.value is None:
        return Value("not run", None, paper=printed[0], facts=[("Why", cell.note)], run=False)
    interval = "" if cell.low is None or cell.high is None else f"{number(cell.low)} to {number(cell.high)}"
    facts = {
        "95 % interval": interval,
        "n": "" if cell.n is None else f"{cell.n:,}",
        "Seeds": str(cell.seeds or ""),
        "SD over seeds": number(cell.sd),
        "Alpha": cell.alpha or "",
        "Lambda": cell.lambda_ or "",
        "Against base": _p(cell.p_base),
        f"Against {cell.best_other}": _p(cell.p_best),
        "Predicted labels": ", ".join(f"{name}: {count:,}" for name, count in (cell.labels or {}).items()),
        "Constant": "every row got the same label" if cell.constant else "",
        "Printed in the paper": " ".join(filter(None, printed)),
        "Study": cell.study or "",
        "Note": cell.note,
    }
    told = [(name, text) for name, text in facts.items() if text]
    return Value(number(cell.value), cell.value, interval, *printed, told, best, constant=bool(cell.constant))


def _p(value: float | None) -> str:
    return "" if value is None else "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


# --- charts ---------------------------------------------------------------------------------------------------------


def _headline(cells: dict[str, list[Cell]]) -> Chart | None:
    """Every system on every model: the mean over the domains in Table 3, else what Table 1 or another table has."""
    for name in dict.fromkeys(["table3", "table1", *cells]):
        run_ = [each for each in cells.get(name, []) if each.value is not None and each.model and each.method]
        if not run_:
            continue
        by_model = all(each.column == each.model for each in run_)
        columns = [each.column for each in run_]
        column = "Avg" if "Avg" in columns else columns[0]
        alike = [each for each in run_ if each.metric == run_[0].metric and (by_model or each.column == column)]
        shown = list({(each.model, each.method): each for each in reversed(alike)}.values())[::-1]  # the first memory
        methods = [each for each in SYSTEMS if any(each == cell.method for cell in shown)]
        dots = [
            Dot(cell.model or "", method, cell.value or 0, cell.low, cell.high, number)
            for number, method in enumerate(methods)
            for cell in shown
            if cell.method == method
        ]
        order = list(dict.fromkeys(cell.model for cell in shown))
        dots.sort(key=lambda dot: order.index(dot.row))
        where = "" if by_model else ", mean of its columns" if column == "Avg" else f", {column}"
        svg = curves.dots(dots, _metric(shown[0]).capitalize(), "headline")
        says = f"Values of {_title(name)}{where}; the numbers are in the table."
        legend = [(method, number) for number, method in enumerate(methods)]
        return Chart(f"{_title(name)}: every system on every model{where}", Markup(svg), says, legend)
    return None


def _weight_curves(config: Config, scale: Path) -> list[Group]:
    """Perplexity on the valid text against the weight of the memory or of p_kNN, a line per base model."""
    found: dict[tuple[str, str, str, str], list[Line]] = {}
    bases, memories = _names(config, "bases"), _names(config, "memory_names")
    for folder, _ in _manifests(scale, "evaluation"):
        home, model = _home(scale, folder), folder.name
        for record in _records(folder / "records.json"):
            sweep = record.get("valid_sweep")
            if not sweep:
                continue
            points = sorted((float(weight), float(value)) for weight, value in sweep.items())
            name = "lambda" if record.get("lambda") is not None else "alpha"
            key = (home, str(record["on"]), str(record.get("memory") or record["method"]), name)
            x, y = zip(*points, strict=True)
            found.setdefault(key, []).append(
                Line(model, x, y, _place(bases, model), chosen=record[name], seed=_seed(folder))
            )
    groups: dict[str, list[Chart]] = {}
    order = sorted(found, key=lambda key: (_place(memories, key[2]), _place(config.domains, key[1]), key))
    for number, (home, on, which, name) in enumerate(order):
        lines = sorted(found[home, on, which, name], key=lambda line: line.look)
        x = {"alpha": "Alpha (weight of the memory, no unit)", "lambda": "Lambda (weight of p_kNN, no unit)"}[name]
        place = on if home == on else f"{on} ({home})"
        for part, few in enumerate(_few(lines)):
            svg = curves.lines(few, x, "Perplexity per token, valid text", f"weight{number}-{part}")
            chart = _chart(f"{which}, {place}", svg, few, [name.capitalize(), "Perplexity on valid text"])
            groups.setdefault(which, []).append(chart)
    return [Group(which, charts, number == 0) for number, (which, charts) in enumerate(groups.items())]


def _loss_curves(config: Config, scale: Path) -> list[Group]:
    """Loss against updates for every training: on the valid text, and dashed the mean of what was minimised."""
    names = [*_names(config, "memory_names"), *_names(config, "models")]
    found: dict[tuple[str, str], dict[str, list[Line]]] = {}
    for folder, manifest in _manifests(scale, "model", "memory", "lora"):
        facts, stage = manifest.facts, folder.parent.name
        if not facts.get("evaluations") or stage not in _FOLDERS:
            continue
        with outside(ArtifactError, folder, "losses in its manifest", "make it again"):
            valid = sorted({float(each["step"]): float(each["loss"]) for each in facts["evaluations"]}.items())
            losses = [(float(each["step"]), float(each["loss"])) for each in facts.get("losses", [])]
        lines = found.setdefault((stage, _home(scale, folder)), {}).setdefault(folder.name, [])
        for points, dashed in ((losses, True), (valid, False)):
            if points:
                x, y = zip(*points, strict=True)
                lines.append(Line(folder.name, x, y, 0, dashed, seed=_seed(folder)))
    groups: dict[str, list[Chart]] = {stage: [] for stage in _FOLDERS}
    order = sorted(found, key=lambda key: (_place(config.domains, key[1].split("/")[-1]), key))
    for number, (stage, home) in enumerate(order):
        by_name = found[stage, home]
        lines = [
            replace(line, look=look)
            for look, name in enumerate(sorted(by_name, key=lambda name: _place(names, name)))
            for line in by_name[name]
        ]
        for part, few in enumerate(_few(lines)):
            svg = curves.lines(few, "Updates (number)", "Loss (nats per token)", f"loss{number}-{part}")
            title = _FOLDERS[stage] if home == "." else f"{_FOLDERS[stage]}: {home}"
            solid = [line for line in few if not line.dashed]
            groups[stage].append(_chart(title, svg, solid, ["Updates", "Loss on valid text"]))
    return [Group(_FOLDERS[stage], charts, stage == next(iter(_FOLDERS))) for stage, charts in groups.items() if charts]


def _names(config: Config, field_: str) -> list[str]:
    """Names in the config and all its studies, in their order."""
    return list(dict.fromkeys(name for study in config.every_study().values() for name in getattr(study, field_)))


def _place(names: Sequence[str], name: str) -> int:
    """Place of a name in a list; names that are not in it come last."""
    return names.index(name) if name in names else len(names)


def _few(lines: Sequence[Line]) -> Iterable[list[Line]]:
    """Lines in lists of at most as many names as there are colours."""
    names = list(dict.fromkeys(line.label for line in lines))
    for begin in range(0, len(names), PER_CHART):
        yield [line for line in lines if line.label in names[begin : begin + PER_CHART]]


def _chart(title: str, svg: str, lines: Sequence[Line], header: list[str]) -> Chart:
    legend = list(dict.fromkeys((line.label, line.look % PER_CHART) for line in lines))
    several = len({line.seed for line in lines}) > 1
    rows = [
        [f"{line.label}, {line.seed}" if several else line.label, f"{x:g}", f"{y:.4g}"]
        for line in lines
        for x, y in zip(line.x, line.y, strict=True)
    ]
    says = f"{header[1]} against {header[0].lower()}; the numbers are below."
    return Chart(title, Markup(svg), says, legend, Plain(["Name", *header], rows, caption=title))


def _seed(folder: Path) -> str:
    """The seed in a path, or ""."""
    return next((part for part in reversed(folder.parts) if re.fullmatch(r"seed\d+", part)), "")


def _home(scale: Path, folder: Path) -> str:
    """The part of a path between the scale and the seed, e.g. the domain; `.` if there is no seed."""
    parts = folder.relative_to(scale).parts
    seeds = [number for number, part in enumerate(parts) if re.fullmatch(r"seed\d+", part)]
    return "/".join(parts[: seeds[0]]) if seeds else "."


def _records(file: Path) -> list[dict[str, Any]]:
    with outside(ArtifactError, file, "records in JSON", "run the evaluation again"):
        return [dict(record) for record in json.loads(file.read_text(encoding="utf-8"))]


def _figures(config: Config, results: Path, given: Sequence[Path]) -> dict[str, Chart | tuple[str, str]]:
    """For each figure of the paper the chart with its numbers, or why it is not there and the command that makes it."""
    found: dict[str, Chart | tuple[str, str]] = {}
    for name in figure_catalogue.FIGURES:
        caption, why, file = "", "make it with", results / f"{name}.svg"
        try:
            caption = figure_catalogue.figure(config.study_for(name), name).caption
        except ConfigError as error:
            why = str(error).removeprefix(f"{name}: ")
        if not file.is_file():
            found[name] = (why, _command(given, results, name) if caption else "")
            continue
        again = "delete it and make it again"
        with outside(ArtifactError, file, "SVG in UTF-8", again):
            svg = curves.adaptive(file.read_text(encoding="utf-8"), name, file)
        with outside(ArtifactError, file.with_suffix(".csv"), "the numbers of the figure", again):
            numbers = pd.read_csv(file.with_suffix(".csv"))
        says = f"{caption or _title(name)} The numbers are below."
        found[name] = Chart(caption, Markup(svg), says, numbers=_numbers(numbers, _title(name)))
    return found


def _numbers(frame: pd.DataFrame, caption: str) -> Plain:
    """Numbers of a figure: columns of text first, then the others with four digits."""
    words = [name for name in frame.columns if not pd.api.types.is_numeric_dtype(frame[name])]
    ordered = frame[[*words, *(name for name in frame.columns if name not in words)]]
    rows = [
        ["" if pd.isna(each) else f"{each:.4g}" if isinstance(each, float) else str(each) for each in row]
        for row in ordered.itertuples(index=False)
    ]
    return Plain(
        [str(name).replace("_", " ") for name in ordered.columns], rows, len(words), caption=f"{caption}: numbers"
    )


def _latency(scale: Path) -> list[Plain]:
    """A table for every measurement: the whole time for the largest number of new tokens."""
    found = []
    header = ["System", "Seconds [95 % interval]", "Tokens/s", "Ratio to base [95 % interval]"]
    for folder, _ in _manifests(scale, "latency"):
        with outside(ArtifactError, folder / "latency.csv", "latencies", "measure again with memdec latency"):
            total = pd.read_csv(folder / "latency.csv").query("phase == 'total'")
            last = total[total["n_tokens"] == total["n_tokens"].max()]
            rows = [
                [
                    str(row["system"]),
                    f"{row['seconds']:.3g} [{row['seconds_low']:.3g}, {row['seconds_high']:.3g}]",
                    f"{row['tokens_per_s']:,.0f}",
                    f"{row['ratio_to_base']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]",
                ]
                for _, row in last.iterrows()
            ]
            first = last.iloc[0]
            where = f"{first['machine']}, {first['device']}"
        what = f"{first['n_tokens']} new tokens after {first['prompt_tokens']}"
        found.append(Plain(header, rows, caption=f"{folder.relative_to(scale)}: {what}, {where}"))
    return found


# --- cost and origin ------------------------------------------------------------------------------------------------


def _cost(folder: Path) -> Plain | None:
    """What the jobs of every rule cost, from Snakemake's benchmark files."""
    jobs: dict[str, list[dict[str, float]]] = {}
    for file in sorted(folder.rglob("*.tsv")):
        place = file.relative_to(folder).parts
        rule = place[0] if len(place) > 1 else re.sub(r"\d+$", "", file.stem)
        with outside(ArtifactError, file, "a benchmark file of Snakemake", "delete it"):
            frame = pd.read_csv(file, sep="\t", na_values=["-", "NA"])[["s", "cpu_time", "max_rss"]].astype(float)
        jobs.setdefault(rule, []).extend(frame.fillna(0).to_dict("records"))
    if not jobs:
        return None
    rows = sorted(
        ([name, *_sums(each)] for name, each in jobs.items()), key=lambda row: -float(row[3].replace(",", ""))
    )
    return Plain(
        ["Rule", "Jobs", "Wall time (s)", "CPU time (s)", "Longest job (s)", "Most memory (MB)"],
        rows,
        total=["All rules", *_sums([job for each in jobs.values() for job in each])],
        caption="Cost per rule, the largest CPU time first",
    )


def _sums(jobs: Sequence[dict[str, float]]) -> list[str]:
    wall, cpu = (sum(job[name] for job in jobs) for name in ("s", "cpu_time"))
    longest, memory = (max(job[name] for job in jobs) for name in ("s", "max_rss"))
    return [f"{len(jobs):,}", f"{wall:,.1f}", f"{cpu:,.1f}", f"{longest:,.1f}", f"{memory:,.0f}"]


@dataclass(frozen=True, slots=True)
class Origins:
    """Versions, machines and hashes of all tables; `tables` says for each value which tables have it."""

    facts: Plain
    versions: Plain
    corpora: Plain
    evaluations: Plain


def _origins(found: dict[str, dict[str, Any]]) -> Origins:
    def by_value(pick: Any, head: list[str], caption: str) -> Plain:
        """Rows (name, value, tables); a table is named where not all have the same."""
        values: dict[tuple[str, str], list[str]] = {}
        for table, origin in found.items():
            for name, value in pick(origin).items():
                values.setdefault((str(name), str(value)), []).append(_title(table))
        rows = [[*key, "all" if len(tables) == len(found) else ", ".join(tables)] for key, tables in values.items()]
        return Plain([*head, "Tables"], rows, 3, caption=caption)

    return Origins(
        by_value(
            lambda origin: {
                "Commit": origin.get("commit"),
                "Machine": origin.get("machine"),
                "Config": origin.get("config_sha256"),
            },
            ["What", "Value"],
            "Code, machine and hash of the config",
        ),
        by_value(
            lambda origin: origin.get("versions", provenance.versions()),
            ["Package", "Version"],
            "Versions of Python and of the packages",
        ),
        by_value(
            lambda origin: origin.get("corpora_sha256", {}), ["Corpus", "Hash of its text"], "Hashes of the corpora"
        ),
        by_value(lambda origin: origin.get("evaluations", {}), ["Evaluation", "Recipe"], "Recipes of the evaluations"),
    )
