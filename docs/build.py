"""Generated text: `python -m docs.build [--check]`.

README.md and docs/*.md: a block between `<!-- generated: FILE -->` and `<!-- end -->` is the file that a rule wrote. With
`<!-- generated: FILE, rows: PATTERN -->` it has only the rows of the table in which the pattern is found. Of a CSV file it is
a table of the columns in `<!-- generated: FILE.csv, columns: NAME NAME -->`, with four digits of each number.
environment.yml: the pins of constraints.txt for conda users, with faiss-gpu in the place of faiss-cpu.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from memdec.artefacts import markdown

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(
    r"(<!-- generated: (\S+?)(?:, columns: ([\w ]+?))?(?:, rows: (.+?))? -->\n).*?(<!-- end -->)", re.DOTALL
)


def filled(text: str) -> str:
    """The text with every block replaced by the file it names."""
    return BLOCK.sub(lambda m: m[1] + chosen(_table(ROOT / m[2], (m[3] or "").split()), m[4]) + "\n" + m[5], text)


def _table(path: Path, columns: Sequence[str]) -> str:
    """The text of a file, or a table of these columns of a CSV file: words first, then numbers."""
    if not columns:
        return path.read_text(encoding="utf-8").strip()
    shown = pd.read_csv(path)[list(columns)]
    words = sum(not pd.api.types.is_numeric_dtype(kind) for kind in shown.dtypes)
    rows = [
        [f"{cell:.4g}" if isinstance(cell, float) else f"{cell:,}" if isinstance(cell, int) else cell for cell in row]
        for row in shown.astype(object).itertuples(index=False)
    ]
    return markdown.table([name.replace("_", " ") for name in columns], rows, words)


def chosen(table: str, pattern: str | None) -> str:
    """The table with its head, the rows that have the pattern (None: all), and what stands below it.

    Raises:
        ValueError: No row has it.
    """
    if pattern is None:
        return table
    lines = table.splitlines()
    kept = [line for n, line in enumerate(lines) if n < 2 or line[:1] != "|" or re.search(pattern, line)]
    if not any(line[:1] == "|" for line in kept[2:]):
        raise ValueError(f"expected rows with {pattern!r}, found none; correct the block's `rows:`")
    return "\n".join(kept)


def environment() -> str:
    """environment.yml from constraints.txt."""
    pins = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line]
    pip = "\n".join(f"      - {pin}" for pin in pins if not pin.startswith("faiss-cpu"))
    return (
        "# Generated from constraints.txt by `python -m docs.build`: the same pins for conda users with a GPU.\n"
        "# conda env create -f environment.yml && conda run -n memdec pip install --no-deps -e .\n"
        "name: memdec\nchannels:\n  - conda-forge\ndependencies:\n"
        "  - python=3.12\n  - pip\n  - pip:\n" + pip + "\n"
    )


def main() -> int:
    """Write the files, or with --check exit 1 when one is stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    return write(check=parser.parse_args().check)


def write(*, check: bool = False) -> int:
    """Write the files; with `check` write none, and return 1 if one is stale."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    wanted = {page: filled(page.read_text(encoding="utf-8")) for page in pages}
    wanted[ROOT / "environment.yml"] = environment()
    stale = [path for path, text in wanted.items() if path.read_text(encoding="utf-8") != text]
    for path in stale:
        if check:
            print(f"{path.name}: stale; run `python -m docs.build`", file=sys.stderr)
        else:
            path.write_text(wanted[path], encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
