"""What a table is: rows and columns that select records, numbers derived from others, and the artefacts it is made from.

`catalogue` makes the tables of a config. A record is one measured number (`records.json` of an evaluation or a harness
folder, or what a corpus manifest says). A row and a column each name values of record fields; a cell is the mean over
the records that have all of them.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from memdec.config import Config
from memdec.inference.systems import SYSTEMS
from memdec.settings import WITHOUT_MEMORY, SystemName

PERPLEXITY = "Test perplexity per token (lower is better)"
Kind = Literal[
    "evaluation", "harness", "corpus", "cases", "latency", "shapes", "fidelity", "memory", "finetuned"
]  # fmt: skip
How = Literal["mean", "best", "difference", "sum", "relative"]


class Part(NamedTuple):
    """One artefact that a table or figure is made from.

    `workflow/rules/common.smk` says where it is (`part_folder`), and nothing else does.
    """

    kind: Kind
    domain: str  # corpus that the system was made for; of kind corpus: the corpus itself
    model: str = ""  # base model
    seed: int = 0
    system: SystemName = "base"
    memory: str | None = None  # of MemDec
    suite: str | None = None  # of kind harness
    study: str | None = None  # default: the study of the table or figure

    @property
    def name(self) -> str:
        """Folder of its system inside that of the kind, or of the suite: that of the memory, or `systems`/slug."""
        return self.memory or f"{WITHOUT_MEMORY}/{SYSTEMS[self.system].slug}"


def seeds_of(config: Config, system: SystemName) -> list[int]:
    """Seeds that a system is run with: the first, if nothing in it differs by seed."""
    return config.seeds if SYSTEMS[system].seeded else config.seeds[:1]


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table.

    Attributes:
        labels: What the row shows, by heading.
        where: Field values that select its records.
        paper: Its row labels in the table of the paper; None: the paper has no such row.
    """

    labels: dict[str, str]
    where: dict[str, str]
    paper: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Column:
    """One column with measured numbers.

    Attributes:
        where: Field values that select its records.
        unit: Unit of the numbers, after `factor`.
        lower_is_better: Direction; None: no value is better than another.
        of: Field of the records that is shown: the value, or the weight that it was measured at.
        factor: The field is multiplied by it (100 makes percent).
        decimals: Digits after the decimal point in the visible table.
        paper: Its heading in the paper; default: as here.
    """

    where: dict[str, str]
    unit: str = "perplexity"
    lower_is_better: bool | None = True
    of: Literal["value", "alpha"] = "value"
    factor: float = 1.0
    decimals: int = 2
    paper: str | None = None


@dataclass(frozen=True, slots=True)
class Derived:
    """A row or column with numbers that are computed from others.

    Attributes:
        how: mean, sum; best: the highest, or the lowest where lower is better; difference: first minus second; relative: a
            column's value divided by the best in that column.
        of: Columns (headings) or rows (places, from 0) that it is made from.
        labels: Of a row.
        paper: Row labels or column heading in the paper.
        lower_is_better: Direction; default: as the numbers it is made from, and none for a difference.
    """

    how: How
    of: tuple[str, ...] | tuple[int, ...]
    labels: dict[str, str] = field(default_factory=dict)
    paper: dict[str, str] | str | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """The contents of a table.

    Attributes:
        name: Its name, also in file names.
        config: Config of the run; of one study, if the config has studies.
        caption: Caption in the report.
        parts: Artefacts that it is made from.
    """

    name: str
    config: Config
    caption: str
    parts: list[Part]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured(Table):
    """A table of numbers.

    Attributes:
        rows: Its rows; a derived row is made from rows before it.
        columns: Its columns by heading; a derived column is made from columns before it.
        extra: Further values of each measured column in the wide CSV, in this order.
        records: File with the records in each folder.
        alphas: Weights at which the stored scores of MemDec are mixed, each as a record with the field `weight`.
        what: First words of the text below the table.
        gaps: Why a cell cannot have a value, by row and column heading; else it was not run.
    """

    rows: list[Row | Derived]
    columns: dict[str, Column | Derived]
    extra: tuple[str, ...] = ()
    records: str = "records.json"
    alphas: tuple[float, ...] = ()
    what: str = PERPLEXITY
    gaps: dict[tuple[int, str], str] = field(default_factory=dict)

    @property
    def measured(self) -> dict[str, Column]:
        """The columns with measured numbers."""
        return {name: column for name, column in self.columns.items() if isinstance(column, Column)}
