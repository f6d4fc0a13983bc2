"""The tables of the report: cells as rows and columns, with everything that is known about each value."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from memdec.config import Config
from memdec.errors import ConfigError
from memdec.results import catalogue
from memdec.results.cells import Cell
from memdec.results.layout import Measured


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
        best: Whether it is the best of its group (`_best`).
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


def titled(name: str) -> str:
    """The name of a table or figure as people write it, e.g. `Table 3`."""
    return re.sub(r"^(table|figure)(\d+)$", r"\1 \2", name).capitalize()


def grid(config: Config, name: str, cells: Sequence[Cell], command: str) -> Grid:
    """A table of the page; one that was not run has no columns, and says why."""
    title, caption, headings, cannot = titled(name), "", list[str](), ""
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
    columns: dict[str, list[Cell]] = {}
    rows: dict[str, dict[str, Cell]] = {}
    for cell in cells:
        columns.setdefault(cell.column, []).append(cell)
        rows.setdefault(cell.row, {})[cell.column] = cell
    said = {head: _said(found) for head, found in columns.items()}
    measured = {said[cell.column] for cell in cells if cell.metric}  # a mean of columns has no metric of its own
    alike = len(measured) == 1 and len({(cell.unit, cell.lower_is_better) for cell in cells}) == 1
    one = measured.pop() if alike else ""
    digits = {head: _digits(n for cell in found for n in (cell.value, cell.paper)) for head, found in columns.items()}
    (names, labels, common), best = _labels(list(rows), headings), _best(run_)
    shown = [
        (
            labels[row],
            [_value(found[head], digits[head], id(found[head]) in best) if head in found else None for head in columns],
        )
        for row, found in rows.items()
    ]
    about = [text for text in (common, one) if text]
    heads = [(head, "" if one else text) for head, text in said.items()]
    return Grid(name, title, caption, about, names, heads, shown, len(run_), len(cells))


def _said(cells: Sequence[Cell]) -> str:
    """What a column measures; without a name if its rows have several metrics."""
    measured = [cell for cell in cells if cell.metric] or cells
    named = {metric(cell) for cell in measured}
    plain = {metric(cell.model_copy(update={"metric": None})) for cell in measured}
    return next((found.pop() for found in (named, plain) if len(found) == 1), "")


def metric(cell: Cell) -> str:
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
    """The best values by `id`, where there are several to choose from, in the groups of `Sheet.best`.

    A group has one model, domain, text, task and metric; of Table 6, one word, whose highest probability is the best.
    """
    groups: dict[tuple[str | None, ...], list[Cell]] = {}
    for cell in run_:
        on = cell.column if cell.table == "forgetting" else None  # its columns are general texts
        if cell.table == "table6":
            groups.setdefault((cell.row,), []).append(cell)
        elif cell.lower_is_better is not None:
            groups.setdefault((cell.model, cell.domain, on, cell.task, cell.metric), []).append(cell)
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

    paper, verdict = number(cell.paper), (cell.verdict or "") if cell.paper is not None else ""
    if cell.value is None:
        return Value("not run", None, paper=paper, facts=[("Why", cell.note)], run=False)
    interval = "" if cell.low is None or cell.high is None else f"{number(cell.low)} to {number(cell.high)}"
    facts = {
        "95 % interval": interval,
        "n": "" if cell.n is None else f"{cell.n:,}",
        "Seeds": str(cell.seeds or ""),
        "SD over seeds": number(cell.sd),
        "Alpha": cell.alpha or "",
        "Lambda": cell.lambda_ or "",
        "Tau": cell.temperature or "",
        "Learning rate": cell.learning_rate or "",
        "Against base": _p(cell.p_base),
        f"Against {cell.best_other}": _p(cell.p_best),
        "Predicted labels": ", ".join(f"{name}: {count:,}" for name, count in (cell.labels or {}).items()),
        "Constant": "every row got the same label" if cell.constant else "",
        "Printed in the paper": f"{paper} {verdict}".strip(),
        "Study": cell.study or "",
        "Note": cell.note,
    }
    told = [(name, text) for name, text in facts.items() if text]
    return Value(number(cell.value), cell.value, interval, paper, verdict, told, best, constant=bool(cell.constant))


def _p(value: float | None) -> str:
    return "" if value is None else "p < 0.001" if value < 0.001 else f"p = {value:.3f}"
