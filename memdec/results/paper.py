"""The numbers that the paper prints, as data, and the verdict on a number of ours beside them.

`results/reference/paper/` has a CSV file for every table and figure, named by the numbering of arXiv v1, with one line
per printed number: `table`, `version`, the row labels of that table, `column`, `value`, `unit`, `lower_is_better`,
`source`, `note`. `version` has all versions that print this value; a cell that they print differently has several lines.
A value that is not printed is empty, and `note` says why. `numbering.csv` has the number of each table in each version.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from memdec.errors import ArtifactError, ConfigError, NumericsError, outside

FOLDER = Path(__file__).resolve().parents[2] / "results" / "reference" / "paper"  # where the package is checked out
VERSIONS = ("v1", "v2", "camera-ready")
FIXED = ("table", "version", "column", "value", "unit", "lower_is_better", "source", "note")

# Two trainings that differ only in their seed differ by about this much: over three seeds at the mini scale the standard
# deviation of a perplexity is 0.7 % with the memory in one domain, and up to 2.9 % in another
# (results/reference/mini/rivals.csv). The paper has one seed and no error bars.
RELATIVE_TOLERANCE = 0.01
ELSEWHERE = "the same quantity"  # how the note of a value begins that another table or version prints


class Printed(NamedTuple):
    """A printed value of one cell.

    Attributes:
        value: The number; None: the paper has this cell and prints no number in it.
        versions: Versions of the paper that print it.
        step: One unit of its last digit. Some printed accuracies are cut instead of rounded, so it can be off by this.
        unit: Unit of the value.
        source: Version and table.
        note: What must be known about it; of a value that is not printed: why.
    """

    value: float | None
    versions: tuple[str, ...]
    step: float
    unit: str
    source: str
    note: str


class Verdict(NamedTuple):
    """How a value of ours compares with the printed one: `match`, `near`, `off`, `better` or `not run`, and why.

    The word is empty where the paper prints no number.
    """

    word: str
    why: str


@cache
def table(name: str) -> pd.DataFrame:
    """All lines of a table or figure as text; no lines if the paper has no such table.

    Raises:
        ArtifactError: There is no folder with printed numbers, or the file cannot be read.
    """
    file = FOLDER / f"{name}.csv"
    if not FOLDER.is_dir():
        raise ArtifactError(f"{FOLDER}: expected the printed numbers of the paper, found no folder; use a checkout")
    if not file.is_file():
        return pd.DataFrame(columns=list(FIXED), dtype=str)
    with outside(ArtifactError, file, "a CSV file of printed numbers", "restore it with git"):
        return pd.read_csv(file, dtype=str, keep_default_na=False)


def labels(name: str) -> list[str]:
    """Names of the row labels of a table."""
    return [column for column in table(name).columns if column not in FIXED]


def printed(name: str, row: Mapping[str, str], column: str) -> list[Printed]:
    """The printed values of a cell; several where versions disagree, none where the paper has no such cell.

    Args:
        name: Table or figure in the numbering of arXiv v1, such as `table8`.
        row: Row labels; those that are left out can have any value.
        column: Column heading.

    Raises:
        ConfigError: The table has no such label, or the labels fit several rows.
    """
    lines, known = table(name), labels(name)
    if len(lines) and (unknown := [label for label in row if label not in known]):
        raise ConfigError(f"{name}: expected row labels among {', '.join(known)}, found {unknown[0]}; leave it out")
    chosen = lines[lines["column"] == column]
    for label, text in row.items():
        chosen = chosen[chosen[label] == text] if len(chosen) else chosen
    if len(chosen[known].drop_duplicates()) > 1:
        raise ConfigError(f"{name}: expected the labels of one row, found {dict(row)}; give more of {', '.join(known)}")
    return [_printed({str(name): str(text) for name, text in line.items()}) for line in chosen.to_dict("records")]


def _printed(line: Mapping[str, str]) -> Printed:
    text = line["value"]
    decimals = len(text.partition(".")[2])
    value = float(text) if text else None
    return Printed(value, tuple(line["version"].split()), 10.0**-decimals, line["unit"], line["source"], line["note"])


def number(name: str, version: str) -> int | None:
    """Number of a table of arXiv v1 in another version; None: that version does not have it.

    Raises:
        ConfigError: There is no such table or version.
    """
    numbers = table("numbering").set_index("table")
    if version not in VERSIONS or name not in numbers.index:
        raise ConfigError(
            f"numbering: expected a table from table1 to table{len(numbers)} and one of {', '.join(VERSIONS)}, found "
            f"{name} and {version}; use the numbering of arXiv v1"
        )
    text = str(numbers.loc[name, version])
    return int(text) if text else None


def verdict(
    value: float | None,
    low: float | None,
    high: float | None,
    printed: Sequence[Printed],
    lower_is_better: bool | None,
) -> Verdict:
    """Compare a value with what the paper prints.

    - `match`: the difference is at most the rounding of the printed number plus 1 % of it (`RELATIVE_TOLERANCE`);
    - `near`: it is larger, and at most that plus the distance from the value to the end of its interval: other test
      text of the same kind could give the printed number;
    - `better`, `off`: it is larger than all of that, in the good or in the other direction. `better` asks for a look:
      an easier text or a leak is likelier than progress.

    Where versions disagree, a match with any of them counts, then `near`, then the nearest; the reason names the version.

    Args:
        value: Our value; None: not run.
        low: Lower end of its 95 % interval over test items; None: unknown.
        high: Upper end.
        printed: The printed values (`printed`).
        lower_is_better: Direction of the metric; None: it has none, so nothing is `better`.

    Raises:
        NumericsError: The value or an end of the interval is not finite.
    """
    if any(each is not None and not math.isfinite(each) for each in (value, low, high)):
        raise NumericsError(f"verdict: expected finite numbers, found {value} ({low} to {high}); run the cell again")
    known = [(each, each.value) for each in printed if each.value is not None]
    if value is None:
        return Verdict("not run", "no value of ours")
    if not known:
        return Verdict("", printed[0].note if printed else "the paper has no such cell")
    found = [_against(value, low, high, each, number, lower_is_better) for each, number in known]
    return min(found, key=lambda each: (_ORDER.get(each[1].word, len(_ORDER)), each[0]))[1]


_ORDER = {"match": 0, "near": 1}  # all else comes after, the nearest printed value first


def _against(
    value: float, low: float | None, high: float | None, printed: Printed, number: float, lower_is_better: bool | None
) -> tuple[float, Verdict]:
    """Distance from one printed value, and the verdict."""
    gap = value - number
    close = printed.step + RELATIVE_TOLERANCE * abs(number)
    end = low if gap > 0 else high  # the end of the interval on the side of the printed value
    reach = close + (abs(value - end) if end is not None else 0.0)
    slack = 1e-9 * abs(number)  # 1.01 * 15.74 - 15.74 is not 0.01 * 15.74 to the last bit
    if abs(gap) <= close + slack:
        word, limit = "match", close
    elif abs(gap) <= reach + slack:
        word, limit = "near", reach
    else:
        is_better = lower_is_better is not None and (gap < 0) == lower_is_better
        word, limit = ("better" if is_better else "off"), reach
    relative = f" ({gap / number:+.1%})" if number else ""
    which = f"{printed.source} prints {number:g}"
    return abs(gap), Verdict(word, f"{which}; ours differs by {gap:+.3g}{relative}, tolerance {limit:.3g}")
