"""Write Markdown tables, for result tables, latency, model cards and the pages of `docs/`.

`DataFrame.to_markdown` is not used. It pads every column to its widest cell, so one longer name changes every line, and
it does not escape pipes.
"""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], n_words: int) -> str:
    """A GitHub table; the first `n_words` columns are text, the others are numbers and right-aligned."""
    rule = ["---"] * n_words + ["---:"] * (len(header) - n_words)
    head, *body = ([cell.replace("|", r"\|").replace("\n", " ") for cell in row] for row in (header, *rows))
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *body))
