"""Compare `memdec plan` with a run that was made from nothing: `python -m benchmarks.plan FOLDER TARGET... --out FILE`.

The folder is that of a finished run, with the benchmark files of its jobs. The plan is made for an empty folder, with the
rates that `memdec plan --measure` found on this machine, which should be the one that made the run.
"""

import argparse
import csv
import tempfile
from collections import defaultdict
from pathlib import Path

import pandas as pd

from memdec import config as configs
from memdec.artefacts import artefact
from memdec.planning import plan, rates

COLUMNS = [
    "rule",
    "jobs",
    "planned_s",
    "measured_s",
    "planned_mb",
    "measured_mb",
    "planned_disk_mb",
    "measured_disk_mb",
]
MIB = 2**20  # Snakemake's unit of memory


def measured(run: Path) -> dict[str, tuple[int, float, float]]:
    """Jobs, seconds, and MB of the largest job for each rule, by the benchmark files of a run."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for file in (run / "benchmarks").rglob("*.tsv"):
        with file.open(newline="") as lines:
            row = next(csv.DictReader(lines, delimiter="\t"))
        rule = file.relative_to(run / "benchmarks").parts[0].removesuffix(".tsv")
        rule = "table" if rule.startswith("table") else rule
        found[rule].append((float(row["s"]), float(row["max_rss"]) * MIB / 1e6))
    return {rule: (len(jobs), sum(s for s, _ in jobs), max(mb for _, mb in jobs)) for rule, jobs in found.items()}


def compare(folder: Path, files: list[Path], targets: list[str]) -> list[dict[str, object]]:
    """A line for each rule and one for the whole run; disk is known for the whole only."""
    config = configs.load(*files)
    run = folder / "results" / config.scale
    with tempfile.TemporaryDirectory() as empty:
        planned = plan.make(config, files, targets, Path(empty), rates.load())
    real = measured(run)
    lines: list[dict[str, object]] = []
    for rule, expected in planned.by["rule"].items():
        if rule in real:
            _, seconds, mb = real[rule]
            lines.append(_line(rule, expected, seconds, mb))
    disk = sum(file.stat().st_size for file in run.rglob("*") if file.is_file() and "logs" not in file.parts)
    total = _line("all", planned.total, sum(s for _, s, _ in real.values()), max(mb for *_, mb in real.values()))
    return [
        *lines,
        total | {"planned_disk_mb": _short(planned.total.disk / 1e6), "measured_disk_mb": _short(disk / 1e6)},
    ]


def _line(rule: str, expected: plan.Sum, seconds: float, mb: float) -> dict[str, object]:
    return {
        "rule": rule,
        "jobs": expected.jobs,
        "planned_s": _short(expected.cpu_seconds),
        "measured_s": _short(seconds),
        "planned_mb": _short(expected.memory / 1e6),
        "measured_mb": _short(mb),
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def main() -> None:
    """Write the comparison as CSV and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("targets", nargs="+")
    parser.add_argument("--config", type=Path, nargs="+", default=[configs.DEFAULT])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    lines = compare(given.folder, given.config, given.targets)
    table = pd.DataFrame(lines, columns=COLUMNS)
    artefact.write_text(given.out, table.to_csv(index=False, lineterminator="\n"))
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
