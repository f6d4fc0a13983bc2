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
from dataclasses import dataclass
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
from memdec.results import catalogue, claims, curves, figure_catalogue
from memdec.results import cells as lines_of_tables
from memdec.results.curves import SIGNS
from memdec.results.report_charts import Chart, Plain, headline, loss_curves, manifests, weight_curves
from memdec.results.report_grids import grid, titled

_NUMBERS = {"effect", "low", "high"}


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
    there = [name for name in _named(results, ".cells.csv") if _is_of(config, name)]
    cells = {name: lines_of_tables.read(results / f"{name}.cells.csv") for name in there}
    origins = {name: _origin(results / f"{name}.provenance.json", config.scale) for name in cells}
    grids = [grid(config, name, cells.get(name, []), _command(given, results, name)) for name in _tables(cells)]
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
        headline=headline(cells),
        grids=grids,
        figures=_figures(config, results, given),
        weights=weight_curves(config, scale),
        losses=loss_curves(config, scale),
        latency=_latency(scale),
        cost=_cost(scale / "benchmarks"),
        origins=_origins(origins),
        commit=", ".join(sorted({str(origin.get("commit")) for origin in origins.values()})),
        machine=", ".join(sorted({str(origin.get("machine")) for origin in origins.values()})),
        title=titled,
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
    return sorted(found, key=lambda claim: claim["verdict"] == "not run")


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


def _is_of(config: Config, name: str) -> bool:
    """Whether a table is one of the config's studies, if it has any; another one there is of an earlier config."""
    listed = {each for study in config.studies.values() for each in study.tables}
    return not listed or name in listed or name not in catalogue.TABLES


def _tables(there: Iterable[str]) -> list[str]:
    """Tables that are there or that the catalogue has, numbered ones first."""
    return sorted({*there, *catalogue.TABLES}, key=lambda name: (not re.fullmatch(r"table\d+", name), _natural(name)))


# --- figures, latency, cost and origin ------------------------------------------------------------------------------


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
        says = f"{caption or titled(name)} The numbers are below."
        found[name] = Chart(caption, Markup(svg), says, numbers=_numbers(numbers, titled(name)))
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
    for folder, _ in manifests(scale, "latency"):
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


def _cost(folder: Path) -> Plain | None:
    """What the jobs of every rule cost, from Snakemake's benchmark files."""
    jobs: dict[str, list[dict[str, float]]] = {}
    for file in sorted(folder.rglob("*.tsv")):
        place = file.relative_to(folder).parts
        rule = place[0] if len(place) > 1 else re.sub(r"\d+$", "", file.stem)
        with outside(ArtifactError, file, "a benchmark file of Snakemake", "delete it"):
            frame = pd.read_csv(file, sep="\t", na_values=["-", "NA"])[["s", "cpu_time", "max_rss"]].astype(float)
        jobs.setdefault(rule, []).extend(
            {str(name): value for name, value in row.items()} for row in frame.fillna(0).to_dict("records")
        )
    if not jobs:
        return None
    rows = sorted(
        ([name, *_sums(each)] for name, each in jobs.items()), key=lambda row: -float(row[2].replace(",", ""))
    )
    return Plain(
        ["Rule", "Jobs", "Wall time (s)", "CPU time (s)", "Longest job (s)", "Most memory (MB)"],
        rows,
        total=["All rules", *_sums([job for each in jobs.values() for job in each])],
        caption="Cost per rule, the largest wall time first",
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
                values.setdefault((str(name), str(value)), []).append(titled(table))
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
