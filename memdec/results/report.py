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
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
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
from memdec.results import catalogue, curves
from memdec.results.curves import PER_CHART, SIGNS, Dot, Line

VERDICTS = ("holds", "fails", "undecided", "not run")  # of claims
_CLAIM = "claim text source version table left right relation effect low high n seeds verdict reason".split()
_CELL = (
    "table study row family model method memory column domain task metric unit lower_is_better value low high n seeds sd "
    "alpha lambda p_base best_other p_best labels constant paper verdict note"
).split()
_NUMBERS = {"effect", "low", "high", "value", "sd", "p_base", "p_best", "paper"}
_LABELS = ("family", "model", "method", "memory")
_FIGURES = {
    "figure2": "Perplexity of every model with and without its memory (the paper's Figure 2)",
    "figure4": "Latency against generated tokens (the paper's Figure 4)",
    "figure5": "Shape of the distributions of kNN, language model and memory (the paper's Figure 5)",
    "figure6": "Shape of the distributions by model size (the paper's Figure 6)",
}
_FOLDERS = {
    "models": "Base models, from scratch",
    "finetuned": "Key models, fine-tuned on the domain",
    "dapt": "DAPT baselines",
    "lora": "LoRA adapters",
    "memory": "Memories",
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
    labels: list[str]
    columns: list[tuple[str, str]]  # heading, and metric with unit and direction
    rows: list[tuple[list[str], list[Value | None]]]
    n_run: int
    n_cells: int
    why: str = ""  # nothing was run: the reason
    command: str = ""


@dataclass(frozen=True, slots=True)
class Plain:
    """A simple table: its header, and rows of text; columns after the first `n_words` are numbers."""

    header: list[str]
    rows: list[list[str]]
    n_words: int = 1
    total: list[str] = field(default_factory=list)


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


def run(config: Config, given: Path, results: Path, out: Path) -> None:
    """Write the page.

    Args:
        config: Config of the run.
        given: File that it is from; the page shows it in its commands.
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


def page(config: Config, given: Path, results: Path) -> str:
    """The text of the page; arguments as for `run`."""
    scale = results / config.scale
    cells = {name: _cells(results / f"{name}.cells.csv") for name in _named(results, ".cells.csv")}
    origins = {name: _origin(results / f"{name}.provenance.json", config.scale) for name in cells}
    grids = [
        _grid(config, name, cells.get(name, []), _command(given, results, name)) for name in _all_tables(config, cells)
    ]
    claims = _claims(results / "claims.csv")
    script, looks = _packaged("report.js"), _packaged("report.css")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_packaged("report.html.j2")).render(
        scale=config.scale,
        script=Markup(script),  # noqa: S704
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=Markup(looks),  # noqa: S704
        signs=SIGNS,
        claims=claims,
        counts={verdict: sum(claim["verdict"] == verdict for claim in claims) for verdict in VERDICTS},
        claims_command=_command(given, results, "claims"),
        headline=_headline(config, cells),
        grids=grids,
        figures=_figures(results, given),
        weights=_weight_curves(config, scale),
        losses=_loss_curves(config, scale),
        latency=_latency(scale),
        cost=_cost(scale / "benchmarks"),
        origins=_origins(origins),
        commands=[(grid.title, _command(given, results, grid.name)) for grid in grids],
        config_file=shlex.quote(str(given)),
        results=shlex.quote(str(results)),
    )


def _packaged(name: str) -> str:
    return resources.files("memdec.results").joinpath(name).read_text(encoding="utf-8")


def _named(results: Path, end: str) -> list[str]:
    """Names of the files with this end, Table 3 before Table 10."""
    return sorted((file.name.removesuffix(end) for file in results.glob(f"*{end}")), key=_natural)


def _natural(name: str) -> list[Any]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def _command(given: Path, results: Path, name: str) -> str:
    return f"snakemake --cores 8 --configfile {shlex.quote(str(given))} -- {shlex.quote(f'{results}/{name}.csv')}"


# --- reading --------------------------------------------------------------------------------------------------------


def _read(file: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a CSV file: text without characters that cannot be seen; numbers as float, None where they are empty."""
    again = f"delete it and make it again with snakemake {shlex.quote(str(file))}"
    with outside(ArtifactError, file, "a CSV table in UTF-8", again):
        frame = pd.read_csv(file, dtype=str, keep_default_na=False)
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise ArtifactError(f"{file}: expected the column {missing[0]}, found {', '.join(frame.columns)}; {again}")
    rows = [{name: on_one_line(text) for name, text in row.items()} for row in frame[list(columns)].to_dict("records")]
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
    claims = _read(file, _CLAIM)
    for number, claim in enumerate(claims, 2):
        if claim["verdict"] not in VERDICTS:
            raise ArtifactError(
                f"{file}: line {number}: expected a verdict of {', '.join(VERDICTS)}, found {claim['verdict']!r}; "
                "delete it and make it again"
            )
        claim["shown"] = _with_interval(claim["effect"], claim["low"], claim["high"])
    order = {verdict: place for place, verdict in enumerate(VERDICTS)}
    return sorted(claims, key=lambda claim: order[claim["verdict"]])


def _with_interval(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return ""
    shown = f"{value:.3g}"
    return shown if low is None or high is None else f"{shown} [{low:.3g}, {high:.3g}]"


def _cells(file: Path) -> list[dict[str, Any]]:
    cells = _read(file, _CELL)
    twice = [
        key for key, n in Counter((cell["row"], cell["column"], cell["metric"]) for cell in cells).items() if n > 1
    ]
    if twice:
        row, column, _ = twice[0]
        raise ArtifactError(
            f"{file}: expected one line for row {row!r} and column {column!r}, found two; make it again"
        )
    return cells


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


def _all_tables(config: Config, cells: Iterable[str]) -> list[str]:
    """Tables that are there or that the catalogue has, numbered ones first."""
    names = sorted({*cells, *catalogue.TABLES}, key=_natural)
    return sorted(names, key=lambda name: not re.fullmatch(r"table\d+", name))


def _title(name: str) -> str:
    return re.sub(r"^(table|figure)(\d+)$", r"\1 \2", name).capitalize()


def _grid(config: Config, name: str, cells: Sequence[dict[str, Any]], command: str) -> Grid:
    caption, why = "", ""
    try:
        caption = catalogue.table(config, name).caption
    except ConfigError as error:
        why = str(error)
    if not cells:
        return Grid(
            name, _title(name), caption, [], [], [], 0, 0, why or "It has not been made.", "" if why else command
        )
    labels = _label_columns(cells)
    metrics = {(cell["column"], cell["metric"]): cell for cell in cells}
    best = _best(cells)
    rows: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for cell in cells:
        rows.setdefault(cell["row"], {})[cell["column"], cell["metric"]] = cell
    digits = {key: _digits([c["value"] for c in cells if (c["column"], c["metric"]) == key]) for key in metrics}
    shown = []
    for row in rows.values():
        first = next(iter(row.values()))
        values = [_value(row[key], digits[key], id(row[key]) in best) if key in row else None for key in metrics]
        shown.append(([first[label] for label in labels], values))
    n_run = sum(cell["value"] is not None for cell in cells)
    reasons = Counter(cell["note"] or "no reason given" for cell in cells if cell["value"] is None)
    why = "" if n_run else "; ".join(reasons)
    return Grid(
        name,
        _title(name),
        caption,
        labels,
        [_heading(*key, cell) for key, cell in metrics.items()],
        shown,
        n_run,
        len(cells),
        why,
    )


def _heading(column: str, metric: str, cell: dict[str, Any]) -> tuple[str, str]:
    better = {"true": "lower is better", "false": "higher is better"}.get(cell["lower_is_better"].lower(), "")
    unit = cell["unit"] if cell["unit"] not in ("", metric) else ""
    return column, ", ".join(filter(None, [" ".join(filter(None, [metric, unit and f"({unit})"])), better]))


def _label_columns(cells: Sequence[dict[str, Any]]) -> list[str]:
    """Fields that name the rows: those with one value in each row, without those with one in the whole table."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        rows.setdefault(cell["row"], []).append(cell)
    first = [row[0] for row in rows.values()]
    own = [name for name in _LABELS if all(len({cell[name] for cell in row}) == 1 for row in rows.values())]
    telling = [name for name in own if len({cell[name] for cell in first}) > 1]
    for name, by in (("family", "model"), ("memory", "method")):  # told by the other one already
        if {name, by} <= set(telling) and len({(cell[name], cell[by]) for cell in first}) == len(
            {cell[by] for cell in first}
        ):
            telling.remove(name)
    return (
        telling if telling and len({tuple(cell[name] for name in telling) for cell in first}) == len(rows) else ["row"]
    )


def _best(cells: Sequence[dict[str, Any]]) -> set[int]:
    """The best value of each column and model, if there are several to choose from."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for cell in cells:
        if cell["value"] is not None and cell["lower_is_better"]:
            groups.setdefault((cell["column"], cell["metric"], cell["model"]), []).append(cell)
    found = set()
    for group in groups.values():
        choose = min if group[0]["lower_is_better"].lower() == "true" else max
        top = choose(cell["value"] for cell in group)
        found |= {id(cell) for cell in group if cell["value"] == top and len(group) > 1}
    return found


def _digits(values: Iterable[float | None]) -> int:
    """Decimals that all values of a column are shown with."""
    return 2 if max((abs(value) for value in values if value is not None), default=0) >= 1 else 3


def _value(cell: dict[str, Any], digits: int, best: bool) -> Value:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:,.{digits}f}"

    if cell["value"] is None:
        return Value(
            "not run", None, paper=number(cell["paper"]), facts=[("Why", cell["note"] or "no reason given")], run=False
        )
    interval = f"{number(cell['low'])} to {number(cell['high'])}" if cell["low"] is not None else ""
    facts = {
        "95 % interval": interval,
        "n": cell["n"],
        "Seeds": cell["seeds"],
        "SD over seeds": number(cell["sd"]),
        "Alpha": cell["alpha"],
        "Lambda": cell["lambda"],
        "Against base": _p(cell["p_base"]),
        f"Against {cell['best_other'] or 'the best other'}": _p(cell["p_best"]),
        "Predicted labels": _labels(cell["labels"]),
        "Constant": "every row got the same label" if _true(cell["constant"]) else "",
        "Printed": " ".join(filter(None, [number(cell["paper"]), cell["verdict"]]))
        if cell["paper"] is not None
        else "",
        "Note": cell["note"],
    }
    return Value(
        number(cell["value"]),
        cell["value"],
        interval,
        number(cell["paper"]),
        cell["verdict"] if cell["paper"] is not None else "",
        [(name, text) for name, text in facts.items() if text],
        best,
        constant=_true(cell["constant"]),
    )


def _true(text: str) -> bool:
    return text.lower() == "true"


def _p(value: float | None) -> str:
    return "" if value is None else "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _labels(text: str) -> str:
    """Predicted labels and their counts, from JSON; other text is shown as it is."""
    try:
        found = json.loads(text) if text else {}
    except ValueError:
        return text
    return ", ".join(f"{name}: {count}" for name, count in found.items()) if isinstance(found, dict) else text


# --- charts ---------------------------------------------------------------------------------------------------------


def _headline(config: Config, cells: dict[str, list[dict[str, Any]]]) -> Chart | None:
    """Every system on every model: the mean over the domains in Table 3, else what Table 1 or another table has."""
    for name in dict.fromkeys(["table3", "table1", *cells]):
        run_ = [cell for cell in cells.get(name, []) if cell["value"] is not None and cell["model"] and cell["method"]]
        if not run_:
            continue
        column = next((cell["column"] for cell in run_ if cell["column"] == "Avg"), run_[0]["column"])
        of_models = {cell["column"] for cell in run_} <= {cell["model"] for cell in run_}
        metric = run_[0]["metric"]
        shown = [cell for cell in run_ if cell["metric"] == metric and (of_models or cell["column"] == column)]
        methods = list(
            dict.fromkeys([*(m for m in SYSTEMS if m in {c["method"] for c in shown}), *(c["method"] for c in shown)])
        )
        dots = [
            Dot(cell["model"], cell["method"], cell["value"], cell["low"], cell["high"], methods.index(cell["method"]))
            for cell in sorted(shown, key=lambda cell: methods.index(cell["method"]))
        ]
        order = list(dict.fromkeys(cell["model"] for cell in shown))
        dots.sort(key=lambda dot: order.index(dot.row))
        head, what = _heading(column, metric, shown[0])
        where = "" if of_models else f", {'mean of the columns' if column == 'Avg' else head}"
        return Chart(
            f"{_title(name)}: every system on every model{where}",
            Markup(curves.dots(dots, what.capitalize(), "headline")),  # noqa: S704
            f"Values of {_title(name)}; the numbers are in the table.",
            [(method, number) for number, method in enumerate(methods)],
        )
    return None


def _weight_curves(config: Config, scale: Path) -> list[Group]:
    """Perplexity on the valid text against the weight of the memory or of p_kNN, a line per base model."""
    found: dict[tuple[str, str, str, str], list[Line]] = {}
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
            look = config.bases.index(model) if model in config.bases else len(found.get(key, []))
            found.setdefault(key, []).append(Line(on_one_line(model), x, y, look, chosen=record[name]))
    groups: dict[str, list[Chart]] = {}
    for number, ((home, on, which, name), lines) in enumerate(found.items()):
        x = {"alpha": "Alpha (weight of the memory, no unit)", "lambda": "Lambda (weight of p_kNN, no unit)"}[name]
        place = on if home == on else f"{on} ({home})"
        for part, few in enumerate(_few(lines)):
            svg = curves.lines(few, x, "Perplexity per token, valid text", f"weight{number}-{part}")
            chart = _chart(on_one_line(f"{which}, {place}"), svg, few, [name.capitalize(), "Perplexity on valid text"])
            groups.setdefault(which, []).append(chart)
    return [Group(on_one_line(which), charts, number == 0) for number, (which, charts) in enumerate(groups.items())]


def _loss_curves(config: Config, scale: Path) -> list[Group]:
    """Loss against updates for every training: on the valid text, and dashed the mean of what was minimised."""
    found: dict[tuple[str, str], list[Line]] = {}
    for folder, manifest in _manifests(scale, "model", "memory", "lora"):
        facts = manifest.facts
        if "evaluations" not in facts or folder.parent.name not in _FOLDERS:
            continue
        lines = found.setdefault((folder.parent.name, _home(scale, folder.parent)), [])
        look = len({line.label for line in lines})
        label = on_one_line(folder.name)
        points = sorted({float(each["step"]): float(each["loss"]) for each in facts["evaluations"]}.items())
        losses = [(float(each["step"]), float(each["loss"])) for each in facts.get("losses", [])]
        if losses:
            lines.append(Line(label, *zip(*losses, strict=True), look, dashed=True))
        lines.append(Line(label, *zip(*points, strict=True), look))
    groups: dict[str, list[Chart]] = {}
    for number, ((stage, home), lines) in enumerate(found.items()):
        for part, few in enumerate(_few(lines)):
            svg = curves.lines(few, "Updates (number)", "Loss (nats per token)", f"loss{number}-{part}")
            title = _FOLDERS[stage] if home == "." else f"{_FOLDERS[stage]}: {home}"
            solid = [line for line in few if not line.dashed]
            groups.setdefault(stage, []).append(
                _chart(on_one_line(title), svg, solid, ["Updates", "Loss on valid text"])
            )
    order = [stage for stage in ("memory", "lora", "dapt", "finetuned", "models") if stage in groups]
    return [Group(_FOLDERS[stage], groups[stage], number == 0) for number, stage in enumerate(order)]


def _few(lines: Sequence[Line]) -> Iterable[list[Line]]:
    """Lines in lists of at most as many names as there are colours."""
    names = list(dict.fromkeys(line.label for line in lines))
    for begin in range(0, len(names), PER_CHART):
        yield [line for line in lines if line.label in names[begin : begin + PER_CHART]]


def _chart(title: str, svg: str, lines: Sequence[Line], header: list[str]) -> Chart:
    legend = list(dict.fromkeys((line.label, line.look % PER_CHART) for line in lines))
    rows = [[line.label, f"{x:g}", f"{y:.4g}"] for line in lines for x, y in zip(line.x, line.y, strict=True)]
    says = f"{header[1]} against {header[0].lower()}; the numbers are below."
    return Chart(title, Markup(svg), says, legend, Plain(["Name", *header], rows))  # noqa: S704


def _home(scale: Path, folder: Path) -> str:
    """The part of a path between the scale and the seed, e.g. the domain; `.` if there is no seed."""
    parts = folder.relative_to(scale).parts
    seeds = [number for number, part in enumerate(parts) if re.fullmatch(r"seed\d+", part)]
    return "/".join(parts[: seeds[0]]) if seeds else "."


def _records(file: Path) -> list[dict[str, Any]]:
    with outside(ArtifactError, file, "records in JSON", "run the evaluation again"):
        return [dict(record) for record in json.loads(file.read_text(encoding="utf-8"))]


def _figures(results: Path, given: Path) -> dict[str, Chart | str]:
    """For each figure of the paper the chart, or the command that makes it."""
    found: dict[str, Chart | str] = {}
    for name, title in _FIGURES.items():
        file = results / f"{name}.svg"
        if not file.is_file():
            found[name] = _command(given, results, name)
            continue
        with outside(ArtifactError, file, "SVG in UTF-8", "delete it and make it again"):
            svg = curves.adaptive(file.read_text(encoding="utf-8"), name, file)
        found[name] = Chart(title, Markup(svg), f"{title}; its numbers are in {name}.csv.")  # noqa: S704
    return found


def _latency(scale: Path) -> list[tuple[str, Plain]]:
    """A table for every measurement of latency: the whole time for the largest number of new tokens."""
    found = []
    for folder, _ in _manifests(scale, "latency"):
        with outside(
            ArtifactError, folder / "latency.csv", "a table of latencies", "measure again with memdec latency"
        ):
            total = pd.read_csv(folder / "latency.csv").query("phase == 'total'")
            last = total[total["n_tokens"] == total["n_tokens"].max()]
            rows = [
                [
                    on_one_line(str(row["system"])),
                    f"{row['seconds']:.3g} [{row['seconds_low']:.3g}, {row['seconds_high']:.3g}]",
                    f"{row['tokens_per_s']:,.0f}",
                    f"{row['ratio_to_base']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]",
                ]
                for _, row in last.iterrows()
            ]
            first = last.iloc[0]
            title = (
                f"{first['n_tokens']} new tokens after {first['prompt_tokens']}, {first['machine']}, {first['device']}"
            )
        header = ["System", "Seconds [95 % interval]", "Tokens/s", "Ratio to base [95 % interval]"]
        found.append((on_one_line(title), Plain(header, rows)))
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
        jobs.setdefault(on_one_line(rule), []).extend(frame.fillna(0).to_dict("records"))
    if not jobs:
        return None
    rows = sorted(
        ([name, *_sums(each)] for name, each in jobs.items()), key=lambda row: -float(row[3].replace(",", ""))
    )
    return Plain(
        ["Rule", "Jobs", "Wall time (s)", "CPU time (s)", "Longest job (s)", "Most memory (MB)"],
        rows,
        total=["All rules", *_sums([job for each in jobs.values() for job in each])],
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
    def by_value(pick: Any, head: list[str]) -> Plain:
        """Rows (name, value, tables); a table is named where not all have the same."""
        values: dict[tuple[str, str], list[str]] = {}
        for table, origin in found.items():
            for name, value in pick(origin).items():
                values.setdefault((on_one_line(str(name)), on_one_line(str(value))), []).append(_title(table))
        rows = [[*key, "all" if len(tables) == len(found) else ", ".join(tables)] for key, tables in values.items()]
        return Plain([*head, "Tables"], rows, 3)

    return Origins(
        by_value(
            lambda origin: {
                "Commit": origin.get("commit"),
                "Machine": origin.get("machine"),
                "Config": origin.get("config_sha256"),
            },
            ["What", "Value"],
        ),
        by_value(lambda origin: origin.get("versions", provenance.versions()), ["Package", "Version"]),
        by_value(lambda origin: origin.get("corpora_sha256", {}), ["Corpus", "Hash of its text"]),
        by_value(lambda origin: origin.get("evaluations", {}), ["Evaluation", "Recipe"]),
    )
