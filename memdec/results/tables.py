"""Tables as pivots of evaluation records: CSV (the contract), Markdown and LaTeX, with a provenance file beside them.

Table 1 of the paper: one domain, a row per method, a column per base model and their mean. Tables 3 and 4: rows (family,
model, method), one column per domain and their mean; 4 has the models of other tokenizers. The mini scale adds, per
domain, the number of test tokens, the tuned alpha and the 95 % bootstrap interval over test windows. `memories` has a row
for every memory of the config beside every other system, and the standard deviation over seeds.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from memdec.artefacts import artefact, provenance
from memdec.artefacts.markdown import table as write_markdown
from memdec.settings import FORGETTING, portable
from memdec.config import Config
from memdec.errors import ArtifactError, ConfigError

Cell = tuple[str, str, int, Path]  # domain, model, seed, evaluation folder


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: its labels, and which records are in it (equal in every field that is given)."""

    labels: dict[str, str]
    where: dict[str, str]


@dataclass(frozen=True, slots=True)
class Table:
    """What is in a table.

    Attributes:
        name: As in file names.
        config: Of the run.
        rows: Its lines.
        columns: Heading and records of each column.
        best_of: Label whose equal rows are compared, so that the best of them is in bold; None: all rows.
        extra: Further CSV columns of each column.
    """

    name: str
    config: Config
    rows: list[Row]
    columns: dict[str, dict[str, str]]
    best_of: str | None
    extra: tuple[str, ...]
    records: str = "records.json"  # file of each evaluation


@dataclass(frozen=True, slots=True)
class Grid:
    """Cells as a person reads them: labels first, then numbers."""

    header: list[str]
    n_labels: int
    rows: list[list[str]]


def numbered(config: Config, number: int) -> Table:
    """Table 1 (first domain), 3 (models with the tokenizer of the key model) or 4 (the others), each with the first memory
    of its tokenizer.

    Raises:
        ConfigError: Another number.
    """
    if number not in (1, 3, 4):
        raise ConfigError(
            f"--number: expected 1, 3 or 4, found {number}; `memdec memories` makes the table of all memories"
        )
    own = config.models[config.key_model].tokenizer
    models = [name for name in config.bases if (config.models[name].tokenizer == own) == (number != 4)]
    if number == 1:
        where = {"domain": config.domains[0]}
        rows = [Row({"method": method}, where | _method(config, models[0], method)) for method in config.systems]
        columns = {model: {"model": model} for model in models}
        return Table("1", config, rows, columns, None, ("n", "alpha", "low", "high"))
    rows = [
        _row(config, model, "method", method, _method(config, model, method))
        for model in models
        for method in config.systems
    ]
    return Table(str(number), config, rows, _domains(config), "model", ("n", "alpha", "low", "high"))


def memories(config: Config) -> Table:
    """All systems and all memories of every model."""
    return Table("memories", config, _all_rows(config), _domains(config), "model", ("sd", "alpha", "n", "low", "high"))


def forgetting(config: Config) -> Table:
    """The same on general text: what was made for a domain, at the weights tuned there."""
    columns = {
        f"{domain} on {on}": {"domain": domain, "on": on} for domain in config.domains for on in config.forgetting
    }
    extra = ("sd", "alpha", "n", "low", "high")
    return Table("forgetting", config, _all_rows(config), columns, "model", extra, FORGETTING)


def _all_rows(config: Config) -> list[Row]:
    variants = [config.variant(name) for name in config.memory_names]
    rows = []
    for model in config.bases:
        for method in config.systems:
            if method != "MemDec":
                rows.append(_row(config, model, "system", method, {"method": method}))
                continue
            for v in variants:
                if model in v.models:
                    where = {"method": method, "memory": v.name}
                    rows.append(_row(config, model, "system", f"MemDec: {v.name}", where))
    return rows


def _domains(config: Config) -> dict[str, dict[str, str]]:
    return {domain: {"domain": domain} for domain in config.domains}


def _row(config: Config, model: str, heading: str, label: str, where: dict[str, str]) -> Row:
    labels = {"family": config.models[model].family, "model": model, heading: label}
    return Row(labels, {"model": model} | where)


def _method(config: Config, model: str, method: str) -> dict[str, str]:
    """Records of a method; of the memories the first one of the model's tokenizer."""
    memory = config.memory_for(model) if method == "MemDec" else None
    return {"method": method} | ({"memory": memory.name} if memory is not None else {})


def run(table: Table, cells: Sequence[Cell], out: Path) -> None:
    """Stage `table`: a table from evaluation folders.

    Writes `out` (.csv) and, beside it, .md, .tex and .provenance.json.
    """
    records = load_records(table.config, cells, table.records)
    manifests = [artefact.read(folder, "evaluation") for *_, folder in cells]
    facts = {
        "corpora_sha256": {name: sha for m in manifests for name, sha in m.facts["corpora_sha256"].items()},
        "evaluations": {
            f"{domain}/{model}/{seed}/{manifest.settings['memory'] or 'systems'}": manifest.recipe
            for (domain, model, seed, _), manifest in zip(cells, manifests, strict=True)
        },
    }
    write(out, pivot(table, records), grid(table, records), note(table, records), table.name, table.config, facts)


def write(
    out: Path, frame: pd.DataFrame, shown: Grid, below: str, name: str, config: Config, facts: dict[str, Any]
) -> None:
    """Write a table.

    Args:
        out: CSV file; .md, .tex and .provenance.json are put beside it.
        frame: All columns, for the CSV.
        shown: What a person reads.
        below: Text under the Markdown.
        name: Of the table.
        config: Of the run.
        facts: What the numbers were made from.
    """
    artefact.write_text(out, frame.to_csv(index=False))
    artefact.write_text(out.with_suffix(".md"), f"{markdown(shown)}\n\n{below}\n")
    artefact.write_text(out.with_suffix(".tex"), latex(shown))
    settings = portable(config.model_dump(mode="json"))
    provenance_ = {
        "table": name,
        "scale": config.scale,
        "config": settings,
        "config_sha256": artefact.digest(settings),
        **facts,
        "versions": provenance.versions(),
        "machine": provenance.machine(),
        "commit": provenance.git_commit(Path(__file__).parent),
    }
    artefact.write_json(out.with_suffix(".provenance.json"), provenance_)


def load_records(config: Config, cells: Sequence[Cell], file: str = "records.json") -> pd.DataFrame:
    """One row per measured number; the base, which every evaluation has, once."""
    rows: list[dict[str, Any]] = []
    for domain, model, seed, folder in cells:
        artefact.read(folder, "evaluation")
        for record in json.loads((folder / file).read_text(encoding="utf-8")):
            if record["seed"] != seed:
                raise ArtifactError(
                    f"{folder}: expected records of seed {seed}, found seed {record['seed']}; run it again"
                )
            rows.append({"domain": domain, "family": config.models[model].family, "model": model, **record})
    return pd.DataFrame(rows).drop_duplicates(["domain", "model", "method", "memory", "seed", "on"])


def pivot(table: Table, records: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds; a cell that no run gave is empty and its reason stands in `note`."""
    return pd.DataFrame([_line(table, row, records) for row in table.rows])


def _line(table: Table, row: Row, records: pd.DataFrame) -> dict[str, Any]:
    chosen = _where(records, row.where)
    cells = {column: _where(chosen, where) for column, where in table.columns.items()}
    missing = [column for column, cell in cells.items() if cell.empty]
    line: dict[str, Any] = dict(row.labels)
    for column, cell in cells.items():
        line[column] = cell["value"].mean() if len(cell) else None
    line["Avg"] = None if missing else sum(line[column] for column in cells) / len(cells)
    for column, cell in cells.items():
        line |= {f"{column}_{extra}": _extra(extra, cell) for extra in table.extra}
    line["seeds"] = " ".join(str(seed) for seed in sorted(set(chosen["seed"])))
    line["note"] = f"not run: {', '.join(missing)}" if missing else ""
    return line


def _where(records: pd.DataFrame, where: dict[str, str]) -> pd.DataFrame:
    """Records with these values."""
    for field, value in where.items():
        records = records[records[field] == value]
    return records


def _extra(name: str, cell: pd.DataFrame) -> Any:
    """A further column of one model, method and domain; `cell` has a record per seed."""
    if name == "alpha":
        return _join(cell["alpha"].dropna())
    if name == "sd":
        return cell["value"].std() if len(cell) > 1 else None
    if cell.empty:
        return None
    return int(cell["n"].iloc[0]) if name == "n" else cell[name].mean()


def _join(values: Sequence[float] | Any) -> str:
    return " ".join(dict.fromkeys(f"{value:g}" for value in values))


def grid(table: Table, records: pd.DataFrame) -> Grid:
    """What a person reads: the best of a group and column in bold."""
    frame, columns = pivot(table, records), [*table.columns, "Avg"]
    group = frame[table.best_of] if table.best_of else pd.Series("", index=frame.index)
    best = frame[columns].astype(float).groupby(group).transform("min")
    labels = list(table.rows[0].labels)
    rows = []
    for (_, row), (_, least) in zip(frame.iterrows(), best.iterrows(), strict=True):
        numbers = [(row[column], row[column] == least[column]) for column in columns]
        rows.append([*(str(row[label]) for label in labels), *(cell(*number) for number in numbers)])
    return Grid([*(label.capitalize() for label in labels), *columns], len(labels), rows)


def cell(value: float | None, best: bool) -> str:
    """A number as a table shows it."""
    if pd.isna(value):
        return "–"
    return f"**{value:.2f}**" if best else f"{value:.2f}"


def note(table: Table, records: pd.DataFrame) -> str:
    """What stands below the table."""
    config, shown = table.config, records[_shown(table, records)]
    alphas = sorted({f"{value:g}" for value in shown["alpha"].dropna()})
    seeds = ", ".join(str(seed) for seed in config.seeds)
    counts = {domain: shown[shown["domain"] == domain]["n"] for domain in config.domains}
    n = ", ".join(f"{domain} {_counts(counts[domain])}" for domain in config.domains if len(counts[domain]))
    width = ((shown["high"] - shown["low"]) / 2 / shown["value"]).max()
    what = f"Test perplexity on {', '.join(config.forgetting)}" if table.records == FORGETTING else "Test perplexity"
    return (
        f"{what} per token (lower is better), scale `{config.scale}`, seed {seeds}. "
        f"Test tokens: {n}. Alpha tuned on valid (chosen: {', '.join(alphas)}). "
        f"95 % bootstrap intervals over test windows are within ±{100 * width:.1f} % of each value; they are in the "
        f"{'CSV' if 'low' in table.extra else 'records'}."
    )


def _shown(table: Table, records: pd.DataFrame) -> pd.Series:
    """Which records are in a cell of the table."""
    shown = pd.Series(False, index=records.index)
    for row in table.rows:
        for where in table.columns.values():
            shown[_where(records, row.where | where).index] = True
    return shown


def _counts(values: Sequence[int] | Any) -> str:
    """Numbers of test tokens: one for each tokenizer."""
    return " or ".join(f"{value:,}" for value in sorted({int(value) for value in values}))


def markdown(shown: Grid) -> str:
    """The table as GitHub Markdown."""
    return write_markdown(shown.header, shown.rows, shown.n_labels)


def latex(shown: Grid) -> str:
    """The table as a LaTeX tabular (booktabs)."""
    frame = pd.DataFrame(shown.rows, columns=shown.header).replace("–", "--")
    bold = frame.map(lambda text: len(text) > 4 and text.startswith("**") and text.endswith("**"))
    plain = frame.where(~bold, frame.map(lambda text: text[2:-2]))
    style = plain.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis="columns")
    style = style.apply(lambda _: bold.map(lambda is_bold: "textbf:--rwrap" if is_bold else ""), axis=None)
    columns = "l" * shown.n_labels + "r" * (len(shown.header) - shown.n_labels)
    return str(style.to_latex(hrules=True, column_format=columns))
