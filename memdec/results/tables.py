"""Write tables as CSV, cells, Markdown and LaTeX, with a provenance file beside them.

`catalogue` defines the tables, `sheet` computes their numbers. The wide CSV has a line per row and for each column the
number and `<column>_<extra>`; `<table>.cells.csv` has a line per cell (`cells`). docs/tables.md explains both.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
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
from memdec.results import catalogue, cells, items
from memdec.results.layout import Column, Measured, Table
from memdec.results.sheet import Number, Record, Sheet, select, smaller
from memdec.settings import DEFAULT_ALPHA, portable

Given = tuple[str, str, int, Path]  # domain (or corpus), model, seed, folder
CONSTANT = "\u2020"  # beside the number of a system that predicts one label for every row
# Extra columns that every table of several systems has in the wide CSV, after all others.
_TESTS = ("p_base", "p_best")
_GAPS = 6  # reasons for empty cells in the text below a table


@dataclass(frozen=True, slots=True)
class Grid:
    """The visible table: cells as text, labels first, then numbers."""

    header: list[str]
    n_labels: int
    rows: list[list[str]]


def run(table: Table, given: Sequence[Given], out: Path) -> None:
    """Stage `table`: make a table from the folders of its parts.

    It writes `out` (.csv) and, beside it, .cells.csv, .items.npz, .md, .tex and .provenance.json.
    """
    if not isinstance(table, Measured):
        _marked_words(table, given, out)
        return
    records = load_records(table.config, given, table.records)
    sheet = Sheet(table, records)
    sheet.test()
    cells.write(out.with_suffix(".cells.csv"), sheet.cells())
    items.write(out.with_suffix(".items.npz"), sheet.items())
    facts = _facts(given) | {"rows_sha256": {each["task"]: each["rows"] for each in records if each.get("rows")}}
    write(out, wide(sheet), grid(sheet), note(sheet), table.name, table.config, facts)


def _facts(given: Sequence[Given]) -> dict[str, Any]:
    """Recipes of the folders and hashes of the corpora, for the provenance file.

    Raises:
        ArtifactError: Two folders know a corpus of one name with other text.
    """
    corpora: dict[str, str] = {}
    parts = {}
    for domain, model, seed, folder in given:
        manifest = _manifest(folder)
        said = manifest.facts.get("corpora_sha256", {})
        if manifest.kind == "corpus":
            said = {domain: manifest.facts["sha256"]}
        for name, sha in said.items():
            if corpora.setdefault(name, sha) != sha:
                raise ArtifactError(
                    f"{folder}: expected one text of {name} in all folders, found another; run it again"
                )
        what = manifest.settings.get("memory") or manifest.settings.get("system") or manifest.kind
        parts[f"{domain}/{model}/{seed}/{what}"] = manifest.recipe
    return {"corpora_sha256": corpora, "evaluations": parts}


def _manifest(folder: Path) -> artefact.Manifest:
    """The manifest of a part, after a check of its files."""
    kind = artefact.kind_of(folder)
    return artefact.read(folder, kind if kind in ("harness", "corpus") else "evaluation")


def _marked_words(table: Table, given: Sequence[Given], out: Path) -> None:
    """Write Table 6; the highest probability of each row is bold."""
    from memdec.results.explain import percent  # imports torch, which takes seconds and which no other table needs

    if len(given) != 1:
        raise ConfigError(f"{table.name}: expected one --cell with a folder of kind cases, found {len(given)}")
    *_, folder = given[0]
    manifest = artefact.read(folder, "cases")
    frame = pd.DataFrame(_records(folder / "records.json"))
    systems = [name for name in frame.columns if name not in ("group", "text", "target", "tokens")]
    rows, lines = [], []
    for _, row in frame.iterrows():
        numbers = [row[system] for system in systems]
        text = str(row["text"]).replace("[[", "[").replace("]]", "]")
        best = numbers.index(max(numbers))
        shown = [f"**{percent(p / 100)}**" if i == best else percent(p / 100) for i, p in enumerate(numbers)]
        rows.append([str(row["group"]), text, *shown])
        lines += [_word(table, row, system) for system in systems]
    cells.write(out.with_suffix(".cells.csv"), lines)
    items.write(out.with_suffix(".items.npz"), {})  # one word is no sample of words
    below = (
        f"Probability in percent of the word in brackets, scale `{table.config.scale}`: memory, kNN distribution of "
        f"the keys that it was made with ({manifest.facts['keys']:,} keys, k {manifest.settings['neighbours']}, temperature "
        f"{manifest.settings['temperature']:g}) and base model {table.config.key_model}. A word of several tokens has the "
        "product of their probabilities."
    )
    write(out, frame, Grid(["Group", "Text", *systems], 2, rows), below, table.name, table.config, manifest.inputs)


def _word(table: Table, row: Any, system: str) -> cells.Cell:
    """A line for programs of the probability of a marked word under one distribution."""
    about = {"row": f"{row['group']} / {row['text']}", "column": system, "metric": "probability", "unit": "percent"}
    at = {"study": table.config.study_name, "domain": table.config.domains[0], "model": table.config.key_model}
    return cells.Cell.model_validate({"table": table.name, "value": float(row[system]), **about, **at})


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


def load_records(config: Config, given: Sequence[Given], file: str = "records.json") -> list[Record]:
    """Load the records, one for each measured number; the base, which folders of all seeds have, once.

    Raises:
        ArtifactError: A record is of another seed or domain, has no finite number, or is there twice with other numbers; or
            the rows of a task, or what a model is, are not the same in all folders.
    """
    found: dict[tuple[Any, ...], Record] = {}
    rows: dict[str, tuple[str, Path]] = {}
    bases: dict[tuple[str, str], tuple[str, Path]] = {}
    for domain, model, seed, folder in given:
        manifest = _manifest(folder)
        kind = manifest.kind
        _check_base(folder, model, manifest, bases)
        for record in _sizes(folder) if kind == "corpus" else _records(folder / file):
            if record.get("seed") != seed and not (kind == "harness" and record["method"] == "base"):
                raise ArtifactError(
                    f"{folder}: expected records of seed {seed}, found seed {record.get('seed')}; run it again"
                )
            if kind == "evaluation" and file == "records.json" and record["on"] != domain:
                raise ArtifactError(
                    f"{folder}: expected records on {domain}, found {record['on']}; give the folder of {domain}, or its own domain"
                )
            family = config.models[model].family if model in config.models else None
            record = {**record, "domain": domain, "family": family, "model": model, "folder": folder}
            _check_number(record)
            _check_rows(record, rows)
            is_base = record["method"] == "base"
            key = tuple(record.get(name) for name in _CELL if not (is_base and name == "seed"))
            first = found.setdefault(key, record)
            same = is_base and math.isclose(first["value"], record["value"], rel_tol=1e-6)
            if first is not record and not same:
                raise ArtifactError(
                    f"{folder}: expected one record of {record['method']} with {model} on {domain}, seed {seed}, found "
                    f"another one in {first['folder']}; give one of them, or run it again"
                )
    return list(found.values())


_CELL = ("domain", "model", "method", "memory", "seed", "on", "task", "metric")  # what no two records have in common


def _records(file: Path) -> list[Record]:
    with outside(ArtifactError, file, "records in JSON", "run the stage that made the folder again"):
        return [dict(record) for record in json.loads(file.read_text(encoding="utf-8"))]


def _sizes(folder: Path) -> list[Record]:
    """The sizes of a corpus, as records."""
    splits = artefact.read(folder, "corpus").facts["splits"]
    sizes = {f"{name} bytes": said["bytes"] for name, said in splits.items()}
    sizes["documents"] = sum(said["documents"] for said in splits.values())
    return [{"method": "corpus", "seed": 0, "metric": name, "value": float(size)} for name, size in sizes.items()]


def _check_base(
    folder: Path, model: str, manifest: artefact.Manifest, known: dict[tuple[str, str], tuple[str, Path]]
) -> None:
    """Check that the folders of a model were made with one base."""
    own = manifest.inputs.get("base")
    if own is None:
        return
    base, first = known.setdefault((manifest.kind, model), (own, folder))
    if base != own:
        raise ArtifactError(
            f"{folder}: expected the base model {model} as in {first}, found another one; give each folder with its own "
            "model, or run the older one again"
        )


def _check_number(record: Record) -> None:
    for name in ("value", "low", "high"):
        number = record.get(name)
        known = isinstance(number, int | float) and math.isfinite(number)
        if not known and (name == "value" or number is not None):
            raise ArtifactError(
                f"{record['folder']}: expected a finite {name} of {record.get('metric')} for {record.get('method')}, found "
                f"{number}; run it again"
            )


def _check_rows(record: Record, known: dict[str, tuple[str, Path]]) -> None:
    """Check that a task has the same rows as in the folders before."""
    if record.get("rows") is None:
        return
    sha, folder = known.setdefault(str(record["task"]), (str(record["rows"]), record["folder"]))
    if sha != record["rows"]:
        raise ArtifactError(
            f"{record['folder']}: expected the rows of {record['task']} as in {folder}, found other ones; the rows changed "
            "since, or 'limit' differs: run the older one again"
        )


# --- the wide CSV -----------------------------------------------------------------------------------------------------


def wide(sheet: Sheet) -> pd.DataFrame:
    """The wide CSV: means over seeds; a cell without a run is empty, and the column `note` says so."""
    return pd.DataFrame([_line(sheet, place) for place in range(len(sheet.numbers))])


def _line(sheet: Sheet, place: int) -> dict[str, Any]:
    numbers, measured = sheet.numbers[place], sheet.table.measured
    line: dict[str, Any] = {
        **sheet.table.rows[place].labels,
        **{heading: number.value for heading, number in numbers.items()},
    }
    for heading in measured:
        line |= {f"{heading}_{extra}": _extra(extra, numbers[heading]) for extra in sheet.table.extra}
    seeds = {record["seed"] for heading in measured for record in numbers[heading].records}
    missing = [heading for heading in measured if numbers[heading].value is None]
    line["seeds"] = " ".join(str(seed) for seed in sorted(seeds))
    line["note"] = f"not run: {', '.join(missing)}" if missing else ""
    tested = [heading for heading, column in measured.items() if column.lower_is_better is not None]
    tested = [] if sheet.table.alphas else tested
    return line | {f"{heading}_{test}": getattr(numbers[heading], test) for heading in tested for test in _TESTS}


def _extra(name: str, number: Number) -> Any:
    """Value of an extra column of the wide CSV for one cell."""
    if name in ("alpha", "lambda"):
        return number.weights.get(name, "")
    if name == "labels":
        return None if number.labels is None else json.dumps(number.labels, ensure_ascii=False)
    return getattr(number, name)


# --- the visible table ------------------------------------------------------------------------------------------------


def grid(sheet: Sheet) -> Grid:
    """Make the visible table; the best value of each group and column is bold."""
    table = sheet.table
    labels = list(dict.fromkeys(label for row in table.rows for label in row.labels))
    shown = [
        heading
        for heading, column in table.columns.items()
        if isinstance(column, Column) and column.of == "alpha" and any(map(_has_paper(sheet, heading), _places(sheet)))
    ]
    header = [label.capitalize() for label in labels]
    for heading in table.columns:
        header += [heading, f"{heading}, paper"] if heading in shown else [heading]
    rows = []
    for place, numbers in enumerate(sheet.numbers):
        line = [table.rows[place].labels.get(label, "") for label in labels]
        for heading, number in numbers.items():
            line.append(cell(number, sheet.best(number)))
            if heading in shown:
                printed = sheet.paper(place, heading)
                line.append("–" if printed is None else f"{printed:.{number.decimals}f}")
        rows.append(line)
    return Grid(header, len(labels), rows)


def _places(sheet: Sheet) -> Iterable[int]:
    return range(len(sheet.numbers))


def _has_paper(sheet: Sheet, heading: str) -> Any:
    return lambda place: sheet.paper(place, heading) is not None


def cell(number: Number, best: bool) -> str:
    """Format a number for the visible table."""
    if number.value is None:
        return "–"
    text = f"{number.value:z,.{number.decimals}f}" + (CONSTANT if number.constant else "")
    return f"**{text}**" if best else text


def note(sheet: Sheet) -> str:
    """The text below the table."""
    table, config = sheet.table, sheet.table.config
    numbers = [number for row in sheet.numbers for number in row.values()]
    records = [record for number in numbers for record in number.records]
    is_text = not any(record.get("task") for record in records)
    seeds = ", ".join(str(seed) for seed in config.seeds)
    sentences = [f"{table.what}, scale `{config.scale}`, seed {seeds}."]
    if any(number.n is not None for number in numbers):
        sentences += _counted(sheet, records, is_text)
        sentences += _chosen(records, config) if is_text and not table.alphas else _of_suites(sheet, records)
        sentences += _intervals(table, numbers, is_text)
        sentences += _adapters(records)
    if any(number.constant for number in numbers):
        sentences.append(f"{CONSTANT} One label was predicted for every row, at one seed or more.")
    if any(number.p_best is not None or number.p_base is not None for number in numbers):
        sentences.append("Paired tests against the base and against the best other system are in the CSV, too.")
    gaps = [number.note.removeprefix("not run: ") for number in numbers if number.value is None and not number.group]
    gaps = _joined(gap for gap in gaps if not gap.startswith("a number that"))
    if gaps:
        more = [f"{len(gaps) - _GAPS} more, see the cells"] if len(gaps) > _GAPS else []
        sentences.append(f"– Not run: {'; '.join([*gaps[:_GAPS], *more])}.")
    return " ".join(sentences)


def _joined(gaps: Iterable[str]) -> list[str]:
    """Reasons, each once; those that differ in their last word only are one."""
    found: dict[str, dict[str, None]] = {}
    for gap in gaps:
        same, _, last = gap.rpartition(" ")
        found.setdefault(same, {})[last] = None
    return [f"{same} {', '.join(last)}" for same, last in found.items()]


def _counted(sheet: Sheet, records: Sequence[Record], is_text: bool) -> list[str]:
    """Sentences with the numbers of test tokens or rows."""
    if is_text:
        by = {domain: select(records, {"domain": domain}) for domain in sheet.table.config.domains}
        what = "Test tokens"
    else:
        by = {heading: [r for row in sheet.numbers for r in row[heading].records] for heading in sheet.table.measured}
        what = "Rows"
    listed = ", ".join(f"{name} {_counts(r['n'] for r in some)}" for name, some in by.items() if some)
    limits = {record["limit"] for record in records if record.get("limit") is not None}
    limited = (
        [f"At most {_counts(limits)} rows of a task were run, from all over its file (`limit`)."] if limits else []
    )
    return [f"{what}: {listed}.", *limited]


def _chosen(records: Sequence[Record], config: Config) -> list[str]:
    """Sentences that say which weights were chosen, and which of them are the end of their grid."""
    grids = {"alpha": config.evaluate.alphas, "lambda": config.evaluate.lambdas}
    sentences = []
    for name in catalogue.weights(config):
        values = sorted({float(record[name]) for record in records if record.get(name) is not None})
        if not values:
            continue
        sentences.append(f"{name.capitalize()} tuned on valid (chosen: {', '.join(f'{value:g}' for value in values)}).")
        ends = [f"{value:g}" for value in values if weighing.at_end(name, value, grids[name]) is not None]
        if ends:
            is_are = "is" if len(ends) == 1 else "are"
            sentences.append(f"{name.capitalize()} {' and '.join(ends)} {is_are} at the end of the grid.")
    rates = sorted({float(record["learning_rate"]) for record in records if record.get("learning_rate") is not None})
    if rates:
        sentences.append(f"Learning rates tuned on valid (chosen: {', '.join(f'{rate:g}' for rate in rates)}).")
    return sentences


def _adapters(records: Sequence[Record]) -> list[str]:
    """A sentence that names the bases whose LoRA adapter is smaller than the memory."""
    shares = {
        model: smaller(select(records, {"model": model})) for model in dict.fromkeys(r.get("model") for r in records)
    }
    named = ", ".join(f"{model} {100 * share:.0f} %" for model, share in shares.items() if share is not None)
    return [f"LoRA has fewer parameters than the memory, as a larger rank adds nothing: {named}."] if named else []


def _of_suites(sheet: Sheet, records: Sequence[Record]) -> list[str]:
    """A sentence with the weights of the memory in a table of tasks."""
    values = sorted({float(record["alpha"]) for record in records if record.get("alpha") is not None})
    suites = {part.suite for part in sheet.table.parts if part.suite is not None}
    how = {sheet.table.config.suites[name].alpha for name in suites if name in sheet.table.config.suites}
    printed = f"as the paper prints it for a task, else {DEFAULT_ALPHA:g}"
    said = {"paper": printed, "valid": "tuned on the valid text", "tune": "tuned on rows"}
    if not values or not suites:
        return []
    ways = " or ".join(sorted(said.get(str(each), "given") for each in how))
    return [f"Alpha {ways}: {', '.join(f'{value:g}' for value in values)}."]


def _intervals(table: Measured, numbers: Sequence[Number], is_text: bool) -> list[str]:
    """A sentence with the farthest end of an interval from its value."""
    known = [
        (n, max(n.high - n.value, n.value - n.low))
        for n in numbers
        if n.records and n.value is not None and n.low is not None and n.high is not None
    ]
    if not known:
        return []
    where = "the CSV" if "low" in table.extra else "the records"
    if is_text:
        widest = max(far / number.value for number, far in known if number.value)
        return [
            f"95 % bootstrap intervals over stretches of the test text are within ±{100 * widest:.1f} % of each value; they are in {where}."
        ]
    widest = max(far for _, far in known)
    return [f"95 % bootstrap intervals over rows are within ±{widest:.3g} {_points(known[0][0])}; they are in {where}."]


def _points(number: Number) -> str:
    return "points" if number.unit == "percent" else "of each value"


def _counts(values: Iterable[Any]) -> str:
    """Format numbers of tokens or rows; each tokenizer has one."""
    return " or ".join(f"{value:,}" for value in sorted({int(value) for value in values if value is not None}))


def markdown(shown: Grid) -> str:
    """The table as GitHub Markdown."""
    n = shown.n_labels
    rows = [[*map(escaped, row[:n]), *row[n:]] for row in shown.rows]
    return write_markdown([escaped(head) for head in shown.header], rows, n)


# What pandas leaves as it is, although LaTeX's standard fonts show other characters for it.
_LATEX = str.maketrans(
    {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "–": "--", CONSTANT: r"\textdagger{}"}
)


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
