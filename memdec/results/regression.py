"""`memdec check`: check whether a change of code or model changed the perplexities of a known run.

The baseline holds the value of every table cell, a relative tolerance measured from other seeds, and the corpus hashes
and package versions that must be the same. `memdec check` prints every change.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from memdec.artefacts import artefact
from memdec.errors import ArtifactError, IncomparableError

MIN_TOLERANCE = 0.005  # relative, because processors round differently
SAME = ("torch", "transformers", "tokenizers", "faiss-cpu", "peft")  # packages whose versions can change the numbers
NOISE_FACTOR = 3.0  # half-width of the tolerance in standard deviations over seeds


def cells(table: Path) -> dict[str, float]:
    """Read the perplexities of a table3.csv; the keys are `model/method/domain`."""
    try:
        frame = pd.read_csv(table)
        domains = [column.removesuffix("_alpha") for column in frame.columns if column.endswith("_alpha")]
        return {
            f"{row['model']}/{row['method']}/{domain}": float(row[domain])
            for _, row in frame.iterrows()
            for domain in domains
            if pd.notna(row[domain])
        }
    except (OSError, ValueError, KeyError, pd.errors.ParserError) as error:
        raise ArtifactError(f"{table}: expected a table3.csv, found {error}; make it with snakemake") from None


def _provenance(table: Path) -> dict[str, Any]:
    path = table.with_suffix(".provenance.json")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {
            "scale": data["scale"],
            "corpora": data["corpora_sha256"],
            "versions": {name: data["versions"].get(name) for name in SAME},
        }
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(
            f"{path}: expected the provenance of {table.name}, found {error!r}; make the table again"
        ) from None


def write(table: Path, noise: Sequence[Path], baseline: Path) -> None:
    """Write a baseline; `noise` are tables of the same config with other seeds, to measure the tolerance."""
    values = cells(table)
    others = [cells(path) for path in noise]
    tolerance = {}
    for name, value in values.items():
        sample = pd.Series([value, *(other[name] for other in others)])
        spread = float(sample.std()) / value if len(sample) > 1 else 0.0
        tolerance[name] = round(max(MIN_TOLERANCE, NOISE_FACTOR * spread), 4)
    rows = {name: {"value": round(value, 4), "tolerance": tolerance[name]} for name, value in values.items()}
    artefact.write_json(baseline, {**_provenance(table), "tables": 1 + len(others), "cells": rows})


def compare(table: Path, baseline: Path) -> tuple[list[str], bool]:
    """Compare a table with a baseline: one line for each cell, and whether any changed by more than its tolerance.

    Raises:
        IncomparableError: Corpora or package versions differ from the baseline's.
    """
    try:
        known = json.loads(baseline.read_text(encoding="utf-8"))
        expected: dict[str, dict[str, float]] = known["cells"]
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(
            f"{baseline}: expected a baseline, found {error!r}; make one with `memdec check --write`"
        ) from None
    ours = _provenance(table)
    differ = [f"corpus {n}" for n in known["corpora"] if known["corpora"][n] != ours["corpora"].get(n)]
    differ += [
        f"{name} {ours['versions'].get(name)} (baseline {version})"
        for name, version in known["versions"].items()
        if (version or "").split("+")[0] != (ours["versions"].get(name) or "").split("+")[0]
    ]
    if differ:
        raise IncomparableError(
            f"{table}: expected the text and versions of {baseline}, found other {', '.join(differ)}; the comparison "
            "would mean nothing; make a new baseline with `memdec check --write`"
        )
    found = cells(table)
    lines, moved = [], False
    for name, cell in expected.items():
        value = found.get(name)
        if value is None:
            lines.append(f"MISSING {name}: baseline {cell['value']:.3f}")
            moved = True
            continue
        change = value / cell["value"] - 1
        beyond = abs(change) > cell["tolerance"]
        moved |= beyond
        word = "MOVED  " if beyond else "ok     "
        lines.append(
            f"{word} {name}: {cell['value']:.3f} -> {value:.3f} ({change:+.2%}, tolerance ±{cell['tolerance']:.2%})"
        )
    extra = sorted(set(found) - set(expected))
    lines += [f"NEW     {name}: {found[name]:.3f}" for name in extra]
    return lines, moved
