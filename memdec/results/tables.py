"""Write tables from evaluation records as CSV, Markdown and LaTeX, with a provenance file beside them.

`catalogue` defines the tables. The CSV is the full table. It adds to each column the number of test tokens, the tuned
weights, the 95 % bootstrap interval over test windows and, in some tables, the standard deviation over seeds.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from memdec.artefacts import artefact, provenance
from memdec.artefacts.markdown import escaped
from memdec.artefacts.markdown import table as write_markdown
from memdec.config import Config
from memdec.errors import ArtifactError, ConfigError, outside
from memdec.maths import weighing
from memdec.results import catalogue
from memdec.results.catalogue import Perplexities, Row, Table
from memdec.settings import FORGETTING, portable

Cell = tuple[str, str, int, Path]  # domain, model, seed, evaluation folder


@dataclass(frozen=True, slots=True)
class Grid:
    """The visible table: cells as text, labels first, then numbers."""

    header: list[str]
    n_labels: int
    rows: list[list[str]]


def run(table: Table, cells: Sequence[Cell], out: Path) -> None:
    """Stage `table`: make a table from the folders of its parts.

    It writes `out` (.csv) and, beside it, .md, .tex and .provenance.json.
    """
    if isinstance(table, Perplexities):
        _perplexities(table, cells, out)
    else:
        _marked_words(table, cells, out)


def _perplexities(table: Perplexities, cells: Sequence[Cell], out: Path) -> None:
    records = load_records(table.config, cells, table.records)
    manifests = [artefact.read(folder, table.kind) for *_, folder in cells]
    facts = {
        "corpora_sha256": {name: sha for m in manifests for name, sha in m.facts["corpora_sha256"].items()},
        "evaluations": {
            f"{domain}/{model}/{seed}/{manifest.settings['memory'] or manifest.settings['system']}": manifest.recipe
            for (domain, model, seed, _), manifest in zip(cells, manifests, strict=True)
        },
    }
    write(out, pivot(table, records), grid(table, records), note(table, records), table.name, table.config, facts)


def _marked_words(table: Table, cells: Sequence[Cell], out: Path) -> None:
    """Write Table 6; the highest probability of each row is bold."""
    from memdec.results.explain import percent  # imports torch, which takes seconds and which no other table needs

    if len(cells) != 1:
        raise ConfigError(f"{table.name}: expected one --cell with a folder of kind {table.kind}, found {len(cells)}")
    *_, folder = cells[0]
    manifest = artefact.read(folder, table.kind)
    frame = pd.DataFrame(_records(folder / "records.json"))
    systems = [name for name in frame.columns if name not in ("group", "text", "target", "tokens")]
    rows = []
    for _, row in frame.iterrows():
        numbers = [row[system] for system in systems]
        text = str(row["text"]).replace("[[", "[").replace("]]", "]")
        best = numbers.index(max(numbers))
        shown = [f"**{percent(p / 100)}**" if i == best else percent(p / 100) for i, p in enumerate(numbers)]
        rows.append([str(row["group"]), text, *shown])
    below = (
        f"Probability in percent of the word in brackets, scale `{table.config.scale}`: memory, kNN distribution that it "
        f"was trained on ({manifest.facts['keys']:,} keys, k {manifest.settings['neighbours']}, temperature "
        f"{manifest.settings['temperature']:g}) and base model {table.config.key_model}. A word of several tokens has the "
        "product of their probabilities."
    )
    write(out, frame, Grid(["Group", "Text", *systems], 2, rows), below, table.name, table.config, manifest.inputs)


def write(
    out: Path, frame: pd.DataFrame, shown: Grid, below: str, name: str, config: Config, facts: Mapping[str, Any]
) -> None:
    """Write a table.

    Args:
        out: CSV file; .md, .tex and .provenance.json are written beside it.
        frame: All columns, for the CSV.
        shown: The visible table, for Markdown and LaTeX.
        below: Text below the Markdown table.
        name: Name of the table.
        config: Config of the run.
        facts: Recipes and hashes of the inputs, for the provenance file.
    """
    artefact.write_text(out, frame.to_csv(index=False))
    artefact.write_text(out.with_suffix(".md"), f"{markdown(shown)}\n\n{below}\n")
    artefact.write_text(out.with_suffix(".tex"), latex(shown))
    settings = portable(config.model_dump(mode="json"))
    provenance_ = {
        "table": name.removeprefix("table"),
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
    """Load the records, one row per measured number; the base, which every evaluation has, appears once."""
    rows: list[dict[str, Any]] = []
    for domain, model, seed, folder in cells:
        artefact.read(folder, "evaluation")
        for record in _records(folder / file):
            if record.get("seed") != seed:
                raise ArtifactError(
                    f"{folder}: expected records of seed {seed}, found seed {record.get('seed')}; run it again"
                )
            rows.append({"domain": domain, "family": config.models[model].family, "model": model, **record})
    return pd.DataFrame(rows).drop_duplicates(["domain", "model", "method", "memory", "seed", "on"])


def _records(file: Path) -> list[dict[str, Any]]:
    with outside(ArtifactError, file, "records in JSON", "run the evaluation again"):
        return [dict(record) for record in json.loads(file.read_text(encoding="utf-8"))]


def pivot(table: Perplexities, records: pd.DataFrame) -> pd.DataFrame:
    """Make the CSV table: means over seeds; a cell without a run is empty, and the column `note` says so."""
    return pd.DataFrame([_line(table, row, records) for row in table.rows])


def _line(table: Perplexities, row: Row, records: pd.DataFrame) -> dict[str, Any]:
    chosen = _where(records, row.where)
    cells = {column: _where(chosen, where) for column, where in table.columns.items()}
    missing = [column for column, cell in cells.items() if cell.empty]
    line: dict[str, Any] = dict(row.labels)
    for column, cell in cells.items():
        line[column] = cell["value"].mean() if len(cell) else None
    if _has_average(table):
        line["Avg"] = None if missing else sum(line[column] for column in cells) / len(cells)
    for column, cell in cells.items():
        line |= {f"{column}_{extra}": _extra(extra, cell) for extra in table.extra}
    line["seeds"] = " ".join(str(seed) for seed in sorted(set(chosen["seed"])))
    line["note"] = f"not run: {', '.join(missing)}" if missing else ""
    return line


def _has_average(table: Perplexities) -> bool:
    """Whether a table has the column Avg; the mean of one column would only repeat it."""
    return len(table.columns) > 1


def _where(records: pd.DataFrame, where: dict[str, str]) -> pd.DataFrame:
    """Records whose fields have these values."""
    for field, value in where.items():
        records = records[records[field] == value]
    return records


def _extra(name: str, cell: pd.DataFrame) -> Any:
    """Value of an extra CSV column of one cell; `cell` has a record per seed."""
    if name in ("alpha", "lambda"):
        return _join(cell[name].dropna())
    if name == "sd":
        return cell["value"].std() if len(cell) > 1 else None
    if cell.empty:
        return None
    return int(cell["n"].iloc[0]) if name == "n" else cell[name].mean()


def _join(values: Sequence[float] | Any) -> str:
    return " ".join(dict.fromkeys(f"{value:g}" for value in values))


def grid(table: Perplexities, records: pd.DataFrame) -> Grid:
    """Make the visible table; the best value of each group and column is bold."""
    frame, columns = pivot(table, records), [*table.columns, *(["Avg"] if _has_average(table) else [])]
    group = frame[table.best_of] if table.best_of else pd.Series("", index=frame.index)
    best = frame[columns].astype(float).groupby(group).transform("min")
    labels = list(table.rows[0].labels)
    rows = []
    for (_, row), (_, least) in zip(frame.iterrows(), best.iterrows(), strict=True):
        numbers = [(row[column], row[column] == least[column]) for column in columns]
        rows.append([*(str(row[label]) for label in labels), *(cell(*number) for number in numbers)])
    return Grid([*(label.capitalize() for label in labels), *columns], len(labels), rows)


def cell(value: float | None, best: bool) -> str:
    """Format a number for the visible table."""
    if pd.isna(value):
        return "–"
    return f"**{value:.2f}**" if best else f"{value:.2f}"


def note(table: Perplexities, records: pd.DataFrame) -> str:
    """The text below the table."""
    config, shown = table.config, records[_shown(table, records)]
    seeds = ", ".join(str(seed) for seed in config.seeds)
    counts = {domain: shown[shown["domain"] == domain]["n"] for domain in config.domains}
    n = ", ".join(f"{domain} {_counts(counts[domain])}" for domain in config.domains if len(counts[domain]))
    width = ((shown["high"] - shown["low"]) / 2 / shown["value"]).max()
    what = f"Test perplexity on {', '.join(config.forgetting)}" if table.records == FORGETTING else "Test perplexity"
    return (
        f"{what} per token (lower is better), scale `{config.scale}`, seed {seeds}. "
        f"Test tokens: {n}. {_chosen(shown, config)}"
        f"95 % bootstrap intervals over test windows are within ±{100 * width:.1f} % of each value; they are in the "
        f"{'CSV' if 'low' in table.extra else 'records'}."
    )


def _chosen(shown: pd.DataFrame, config: Config) -> str:
    """Sentences that say which weights were chosen, and which of them are the end of their grid."""
    grids = {"alpha": config.evaluate.alphas, "lambda": config.evaluate.lambdas}
    sentences = []
    for name in catalogue.weights(config):
        values = sorted({float(value) for value in shown[name].dropna()})
        if not values:
            continue
        sentences.append(
            f"{name.capitalize()} tuned on valid (chosen: {', '.join(f'{value:g}' for value in values)}). "
        )
        ends = [f"{value:g}" for value in values if weighing.at_end(name, value, grids[name]) is not None]
        if ends:
            sentences.append(
                f"{name.capitalize()} {' and '.join(ends)} {'is' if len(ends) == 1 else 'are'} at the end of the grid. "
            )
    return "".join(sentences)


def _shown(table: Perplexities, records: pd.DataFrame) -> pd.Series:
    """Whether each record is in a cell of the table."""
    shown = pd.Series(False, index=records.index)
    for row in table.rows:
        for where in table.columns.values():
            shown[_where(records, row.where | where).index] = True
    return shown


def _counts(values: Sequence[int] | Any) -> str:
    """Format the numbers of test tokens; each tokenizer has one."""
    return " or ".join(f"{value:,}" for value in sorted({int(value) for value in values}))


def markdown(shown: Grid) -> str:
    """The table as GitHub Markdown."""
    n = shown.n_labels
    rows = [[*map(escaped, row[:n]), *row[n:]] for row in shown.rows]
    return write_markdown([escaped(head) for head in shown.header], rows, n)


# What pandas leaves as it is, although LaTeX's standard fonts show other characters for it.
_LATEX = str.maketrans({"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "–": "--"})


def latex(shown: Grid) -> str:
    """The table as a LaTeX tabular (booktabs).

    Numbers are right-aligned and have equally many decimals, so their decimal points stand below each other.
    """
    frame = pd.DataFrame(shown.rows, columns=shown.header).map(lambda text: " ".join(text.split()))
    bold = frame.map(lambda text: len(text) > 4 and text.startswith("**") and text.endswith("**"))
    bold.iloc[:, : shown.n_labels] = False  # a label is a name, whatever it looks like
    plain = frame.where(~bold, frame.map(lambda text: text[2:-2]))
    style = plain.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis="columns")
    style = style.apply(lambda _: bold.map(lambda is_bold: "textbf:--rwrap" if is_bold else ""), axis=None)
    columns = "l" * shown.n_labels + "r" * (len(shown.header) - shown.n_labels)
    text = str(style.to_latex(hrules=True, column_format=columns)).translate(_LATEX)
    return re.sub(r"^(?=[*\[])", "{}", text, flags=re.MULTILINE)  # else the end of the line before would take it
