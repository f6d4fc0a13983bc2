"""Publish a run: `python -m docs.publish RESULTS` copies its tables to results/reference/SCALE and fills the pages.

RESULTS is the folder `results` of a run. Of every table and figure there, and of the claims, go those files
that people and pages read: not the items of the bootstrap, and no LaTeX. Files of tables that RESULTS lacks stay as they
are. All tables must be of one scale.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from docs import build
from memdec.errors import ConfigError

ENDINGS = (".csv", ".cells.csv", ".md", ".svg", ".provenance.json")
BESIDE = ("claims.csv", "claims.md")


def publish(results: Path, reference: Path) -> list[Path]:
    """Copy the files; return the new ones.

    Raises:
        ConfigError: There is no table, or the tables are of several scales.
    """
    tables = sorted(results.glob("*.provenance.json"))
    scales = {_scale(file) for file in tables}
    if len(scales) != 1:
        raise ConfigError(
            f"{results}: expected tables of one scale, found {', '.join(sorted(scales)) or 'no table'}; give the folder "
            "`results` of one run"
        )
    names = [file.name.removesuffix(".provenance.json") for file in tables]
    for name in names:  # those of an earlier run would stay beside what is new
        there = {end for end in ENDINGS if (results / f"{name}{end}").is_file()}
        if ".csv" not in there or not there & {".md", ".svg"}:
            raise ConfigError(
                f"{results}: expected {name}.csv, and {name}.md or {name}.svg, beside its provenance, found no such files; "
                "make them again"
            )
    files = [results / f"{name}{ending}" for name in names for ending in ENDINGS]
    files += [results / name for name in BESIDE]
    out = reference / scales.pop()
    out.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copyfile(file, out / file.name)) for file in files if file.is_file()]


def _scale(file: Path) -> str:
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["scale"])
    except (ValueError, KeyError):
        raise ConfigError(f"{file}: expected provenance with a scale, found other text; make the table again") from None


def main() -> int:
    """Copy the files, and write the pages that show them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    try:
        found = publish(parser.parse_args().results, build.ROOT / "results" / "reference")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"published {len(found)} files in {found[0].parent}")
    return build.write()


if __name__ == "__main__":
    sys.exit(main())
