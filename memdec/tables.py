"""Tables as pivots of evaluation records: CSV (the contract), Markdown and LaTeX, with a provenance file beside them.

Table 3 of the paper: rows (family, model, method), one column per domain and their mean. The mini scale adds, per
domain, the number of test tokens, the tuned alpha and the 95 % bootstrap interval over test windows.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from memdec import artifacts, provenance
from memdec.config import Config
from memdec.errors import ArtifactError

METHODS = ("base", "LoRA", "MemDec")


def run_table3(config: Config, folders: dict[tuple[str, str, int], Path], out: Path) -> None:
    """Stage `table`: Table 3 from evaluation folders, keyed by (domain, model, seed).

    Writes `out` (.csv) and, beside it, .md, .tex and .provenance.json.
    """
    records = load_records(config, folders)
    table = table3(config, records)
    artifacts.write_text(out, table.to_csv(index=False))
    artifacts.write_text(out.with_suffix(".md"), markdown(config, records))
    artifacts.write_text(out.with_suffix(".tex"), latex(config, records))
    manifests = {"/".join(map(str, key)): artifacts.read(path, "evaluation") for key, path in folders.items()}
    sources = {name: manifest.recipe for name, manifest in manifests.items()}
    corpora = {name: sha for manifest in manifests.values() for name, sha in manifest.facts["corpora_sha256"].items()}
    facts = {
        "table": "3",
        "scale": config.scale,
        "config": config.model_dump(mode="json"),
        "config_sha256": artifacts.digest(config.model_dump(mode="json")),
        "corpora_sha256": corpora,
        "evaluations": sources,
        "versions": provenance.versions(),
        "machine": provenance.machine(),
        "commit": provenance.git_commit(Path.cwd()),
    }
    artifacts.write_json(out.with_suffix(".provenance.json"), facts)


def load_records(config: Config, folders: dict[tuple[str, str, int], Path]) -> pd.DataFrame:
    """One row per measured number."""
    rows: list[dict[str, Any]] = []
    for (domain, model, seed), folder in folders.items():
        artifacts.read(folder, "evaluation")
        for record in json.loads((folder / "records.json").read_text(encoding="utf-8")):
            if record["seed"] != seed:
                raise ArtifactError(
                    f"{folder}: expected records of seed {seed}, found seed {record['seed']}; run it again"
                )
            rows.append({"domain": domain, "family": config.models[model].family, "model": model, **record})
    return pd.DataFrame(rows)


def table3(config: Config, records: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds; a cell that no run gave is empty and its reason stands in `note`."""
    rows = []
    for model, spec in config.models.items():
        for method in METHODS:
            row: dict[str, Any] = {"family": spec.family, "model": model, "method": method}
            chosen = records[(records["model"] == model) & (records["method"] == method)]
            by_domain = {domain: chosen[chosen["domain"] == domain] for domain in config.domains}
            missing = [domain for domain, cell in by_domain.items() if cell.empty]
            for domain, cell in by_domain.items():
                row[domain] = cell["value"].mean() if len(cell) else None
            row["Avg"] = None if missing else sum(row[domain] for domain in config.domains) / len(config.domains)
            for domain, cell in by_domain.items():
                row |= {
                    f"{domain}_n": int(cell["n"].iloc[0]) if len(cell) else None,
                    f"{domain}_alpha": _join(cell["alpha"].dropna()),
                    f"{domain}_low": cell["low"].mean() if len(cell) else None,
                    f"{domain}_high": cell["high"].mean() if len(cell) else None,
                }
            row["seeds"] = " ".join(str(seed) for seed in sorted(set(chosen["seed"])))
            row["note"] = f"not run: {', '.join(missing)}" if missing else ""
            rows.append(row)
    return pd.DataFrame(rows)


def _join(values: Sequence[float] | Any) -> str:
    return " ".join(dict.fromkeys(f"{value:g}" for value in values))


def _printed(config: Config, records: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Header and cells as a person reads them: value with its interval; the best method of a model and domain in bold."""
    table = table3(config, records)
    header = ["Family", "Model", "Method", *config.domains, "Avg"]
    rows = []
    for _, row in table.iterrows():
        cells = [str(row["family"]), str(row["model"]), str(row["method"])]
        for column in [*config.domains, "Avg"]:
            value = row[column]
            if pd.isna(value):
                cells.append("–")
                continue
            best = table[table["model"] == row["model"]][column].min()
            cells.append(f"**{value:.2f}**" if value == best else f"{value:.2f}")
        rows.append(cells)
    return header, rows


def markdown(config: Config, records: pd.DataFrame) -> str:
    """Table 3 as GitHub Markdown."""
    header, rows = _printed(config, records)
    lines = [header, ["---"] * 3 + ["---:"] * (len(header) - 3), *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    alphas = sorted({f"{value:g}" for value in records["alpha"].dropna()})
    seeds = ", ".join(str(seed) for seed in config.seeds)
    n = ", ".join(f"{d} {int(records[records['domain'] == d]['n'].iloc[0]):,}" for d in config.domains)
    width = ((records["high"] - records["low"]) / 2 / records["value"]).max()
    return (
        f"{table}\n\nTest perplexity per token (lower is better), scale `{config.scale}`, seed {seeds}. "
        f"Test tokens: {n}. Alpha tuned on valid (chosen: {', '.join(alphas)}). "
        f"95 % bootstrap intervals over test windows are within ±{100 * width:.1f} % of each value; they are in the CSV.\n"
    )


def latex(config: Config, records: pd.DataFrame) -> str:
    """Table 3 as a LaTeX tabular (booktabs)."""
    header, rows = _printed(config, records)

    def line(cells: list[str]) -> str:
        plain = [cell.replace("_", r"\_").replace("–", "--") for cell in cells]
        return " & ".join(rf"\textbf{{{c[2:-2]}}}" if c.startswith("**") else c for c in plain) + r" \\"

    body = [line(row) for row in rows]
    columns = "lll" + "r" * (len(header) - 3)
    return "\n".join(
        [
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            line(header),
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )
