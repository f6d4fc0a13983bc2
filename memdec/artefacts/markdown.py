"""Write Markdown tables, for result tables, latency, model cards and the pages of `docs/`.

`DataFrame.to_markdown` is not used. It does not escape pipes, and it aligns numbers by their last digit, so a bold one
or one with an interval moves its decimal point.
"""

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"[^.\d]*\d[\d,]*(?=\.\d)?")  # up to the decimal point, with what stands before the first digit


def table(header: Sequence[str], rows: Sequence[Sequence[str]], n_words: int) -> str:
    """A GitHub table; the first `n_words` columns are text, the others are numbers and right-aligned.

    In a table with numbers, the source is padded so that their decimal points stand below each other.
    """
    lines = [[cell.replace("|", r"\|").replace("\n", " ") for cell in row] for row in (header, *rows)]
    columns = []
    for number, (head, *body) in enumerate(zip(*lines, strict=True)):
        if n_words == len(header):
            columns.append([head, "---", *body])
            continue
        below = body if number < n_words else aligned(body)
        width = max(3, len(head), *map(len, below))
        rule = "-" * width if number < n_words else "-" * (width - 1) + ":"
        fit = str.ljust if number < n_words else str.rjust
        columns.append([fit(head, width), rule, *(fit(cell, width) for cell in below)])
    return "\n".join("| " + " | ".join(line) + " |" for line in zip(*columns, strict=True))


def aligned(cells: Sequence[str]) -> list[str]:
    """Pad the cells of a column to one width, with the decimal point of each cell's first number in one place."""
    found = [_NUMBER.match(cell) for cell in cells]
    ends = [match.end() if match else len(cell) for match, cell in zip(found, cells, strict=True)]
    before = max(ends, default=0)
    after = max((len(cell) - end for cell, end in zip(cells, ends, strict=True)), default=0)
    return [cell[:end].rjust(before) + cell[end:].ljust(after) for cell, end in zip(cells, ends, strict=True)]


def number(value: float, sign: str = "") -> str:
    """A number with four significant digits; none of those before the decimal point is rounded away.

    Args:
        value: The number.
        sign: "+" puts a sign before positive ones, too.
    """
    return f"{value:{sign},.0f}" if 1000 <= abs(value) < 1e15 else f"{value:{sign}.4g}"


def escaped(text: str) -> str:
    """A name as Markdown that shows it as it is: no markup, links or HTML, on one line.

    Only what would be markup is changed, so that ordinary names stay readable. A character that cannot be seen, such as
    one that turns the direction of the text, is replaced by its code.
    """
    text = re.sub(r"\s+", " ", text).strip()
    text = "".join(c if c.isprintable() else f"U+{ord(c):04X}" for c in text)
    active = r"[\\`*~\[\]]" if re.search(r"\][(\[:]", text) else r"[\\`*~]"  # a link, or only brackets
    text = re.sub(active, r"\\\g<0>", text)
    text = re.sub(r"(?<![^\W_])_+|_+(?![^\W_])", lambda match: r"\_" * len(match[0]), text)
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text)
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)
