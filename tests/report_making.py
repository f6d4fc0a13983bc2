"""Results of a run that never ran, for tests of the report: tables, claims, evaluations, trainings, benchmark files."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd

from memdec.artefacts import artefact
from memdec.results import cells, claims, figures

LATENCY = Path(__file__).resolve().parents[1] / "results" / "reference" / "latency.csv"


def cell(**given: Any) -> dict[str, Any]:
    """One line of a `.cells.csv`; fields that are not given are empty."""
    return (
        dict.fromkeys(cells.COLUMNS, "") | {"study": "main", "lower_is_better": "true", "metric": "perplexity"} | given
    )


def claim(**given: Any) -> dict[str, Any]:
    """One line of `claims.csv`."""
    return dict.fromkeys(claims.COLUMNS, "") | {"source": "arXiv v2", "version": "v1 and v2", "table": "table3"} | given


def write_csv(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as CSV with the fields of the first one as header."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_table(results: Path, name: str, cells: list[dict[str, Any]], scale: str = "mini") -> None:
    """Write a table's cells and its provenance."""
    write_csv(results / f"{name}.cells.csv", [each | {"table": name} for each in cells])
    origin = {
        "table": name.removeprefix("table"),
        "scale": scale,
        "config_sha256": "a90ab6d6e62e9b681e5cbc8373eda48b",
        "corpora_sha256": {"torch": "e9608c0f998d5499fb5adca6a9e714cb"},
        "evaluations": {"torch/gpt2-S/0/memdec": "5c48070779e5ef892a61c14c88304c35"},
        "versions": {"python": "3.11.7", "torch": "2.13.0+cpu"},
        "machine": "Intel(R) Xeon(R) Processor, 2 CPUs",
        "commit": "53e71fcbbe5c",
    }
    (results / f"{name}.provenance.json").write_text(json.dumps(origin))


def write_evaluation(folder: Path, on: str, memory: str, best: float, top: float) -> None:
    """An evaluation of one memory whose valid perplexity is lowest at alpha `best`."""
    sweep = {alpha: top * (1 + (alpha - best) ** 2) for alpha in (0.2, 0.4, 0.6, 0.8, 0.9)}
    with artefact.building(folder, "evaluation", {"memory": memory}, {"base": str(folder)}) as build:
        assert build is not None
        record = {"method": "MemDec", "memory": memory, "on": on, "alpha": best, "lambda": None, "seed": 0}
        artefact.write_json(folder / "records.json", [record | {"valid_sweep": sweep, "value": top}])


def write_training(folder: Path, updates: int) -> None:
    """A trained memory of which only the manifest is there."""
    steps = [max(1, updates * part // 10) for part in range(1, 11)]
    curve = [3 * (1 + math.exp(-4 * step / updates)) for step in steps]
    evaluations = [
        {"step": step, "loss": 0.9 * value, "perplexity": 1} for step, value in zip(steps, curve, strict=True)
    ]
    with artefact.building(folder, "memory", {}, {"model": str(folder)}) as build:
        assert build is not None
        losses = [{"step": step, "loss": value} for step, value in zip(steps, curve, strict=True)]
        build.facts.update(evaluations=evaluations, losses=losses)


def write_latency(folder: Path) -> None:
    """The published measurement of latency."""
    with artefact.building(folder, "latency", {}, {}) as build:
        assert build is not None
        artefact.write_text(folder / "latency.csv", LATENCY.read_text(encoding="utf-8"))


def write_figure(results: Path, name: str) -> None:
    """The published measurement of latency as the figure of this name."""
    numbers = pd.read_csv(LATENCY)
    figures.save(figures.latency(numbers), results / name)
    numbers.to_csv(results / f"{name}.csv", index=False)


def write_benchmark(scale: Path, name: str, wall: float, cpu: float, memory: float) -> None:
    """A benchmark file as Snakemake writes it; a very short job has no load and no CPU time."""
    file = scale / "benchmarks" / f"{name}.tsv"
    file.parent.mkdir(parents=True, exist_ok=True)
    head = "s\th:m:s\tmax_rss\tmax_vms\tmax_uss\tmax_pss\tio_in\tio_out\tmean_load\tcpu_time"
    file.write_text(f"{head}\n{wall:.2f}\t0:00:01\t{memory}\t1\t1\t1\t0.00\t0.04\t30.99\t{cpu:.2f}\n")
