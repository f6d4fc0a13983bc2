"""Stage `figure`: draw the figures of `figure_catalogue` as .svg and .png, with the drawn numbers as .csv beside them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure as Drawing

from memdec.artefacts import artefact, provenance
from memdec.errors import ArtifactError, ConfigError, outside
from memdec.results import cells as lines_of_tables
from memdec.results import figures, gains, paper
from memdec.results.figure_catalogue import Figure
from memdec.results.task_tables import memory_of

Cell = tuple[str, str, int, Path]  # domain, model, seed, folder
_BARS = ("base", "LoRA", "MemDec")


def run(made: Figure, cells: Sequence[Cell], tables: Sequence[Path], out: Path) -> None:
    """Stage `figure`: draw a figure from the folders of its parts or from tables.

    It writes `out` (.csv) and, beside it, .svg, .png and .provenance.json.

    Raises:
        ConfigError: Another number of folders or tables than the figure is made from.
        ArtifactError: A folder or table is not what it should be.
    """
    if len(tables) != len(made.tables) or (not cells) != (not made.parts):
        wanted = [f"--table with the cells of {name}" for name in made.tables]
        wanted += [f"--cell with folders of kind {made.kind or 'its parts'}"] if made.parts else []
        raise ConfigError(
            f"{made.name}: expected {' and '.join(wanted)}, found {len(tables)} tables and {len(cells)} cells; give them"
        )
    recipes: dict[str, str] = {}
    if made.kind:
        manifests = [artefact.read(folder, made.kind) for *_, folder in cells]
        recipes = {
            f"{domain}/{model}/{seed}/{manifest.settings.get('memory') or made.kind}": manifest.recipe
            for (domain, model, seed, _), manifest in zip(cells, manifests, strict=True)
        }
    elif made.parts:
        recipes = gains.recipes(made, cells)
    recipes |= {path.name: artefact.file_digest(path) for path in tables if path.is_file()}
    numbers_of, draw = DRAWN[made.name]
    numbers = numbers_of(made, cells, tables)
    figures.save(draw(numbers), out.with_suffix(""))
    artefact.write_text(out, numbers.to_csv(index=False))
    facts = {"figure": made.name, "scale": made.config.scale, "caption": made.caption, "inputs": recipes}
    said = {"versions": provenance.versions(), "commit": provenance.git_commit(Path(__file__).parent)}
    artefact.write_json(out.with_suffix(".provenance.json"), facts | said)


# --- the numbers of each figure -----------------------------------------------------------------------------------


def _of_table3(made: Figure, _cells: Sequence[Cell], tables: Sequence[Path]) -> pd.DataFrame:
    """A line per model and method: value, interval, tokens."""
    domain, config = made.config.domains[0], made.config
    wanted = {base: memory_of(config, base) for base in config.bases}
    names = ["domain", "family", "model", "method", "value", "low", "high", "n", "seeds", "paper"]
    lines = [
        cell.model_dump(include=set(names))
        for cell in lines_of_tables.read(tables[0])
        if cell.domain == domain and cell.model in wanted and cell.method in _BARS and cell.value is not None
        if cell.method != "MemDec" or cell.memory in (None, wanted[cell.model])
    ]
    if not lines:
        raise ArtifactError(
            f"{tables[0]}: expected perplexities of {', '.join(_BARS)} on {domain}, found none; make Table 3 of this config"
        )
    table = pd.DataFrame(lines, columns=names)
    if twice := table[table.duplicated(["model", "method"])]["model"].tolist():
        raise ArtifactError(
            f"{tables[0]}: expected one cell for a model and method, found two for {twice[0]}; make it again"
        )
    return table


def _of_latency(made: Figure, cells: Sequence[Cell], _tables: Sequence[Path]) -> pd.DataFrame:
    """The rows of `memdec latency` for whole texts (phase total), a line per system and number of tokens."""
    (*_, folder), *more = cells
    if more:
        raise ConfigError(f"{made.name}: expected one --cell, found {len(cells)}")
    table = pd.DataFrame(_json(folder / "records.json"))
    methods = table["kind"].fillna(table["system"])
    ratios = methods.map(lambda method: _printed(made, {"method": method}, "overhead")).astype(float)
    return table.assign(paper_ratio=ratios)[table["phase"] == "total"].reset_index(drop=True)


def _of_examples(made: Figure, cells: Sequence[Cell], _tables: Sequence[Path]) -> pd.DataFrame:
    """A line per example and token: the three probabilities; the text before it and the token that follows."""
    (*_, folder), *more = cells
    if more:
        raise ConfigError(f"{made.name}: expected one --cell, found {len(cells)}")
    return pd.DataFrame(
        [
            {"example": number, "position": example["position"], "before": example["before"], "next": example["next"]}
            | token
            for number, example in enumerate(_json(folder / "examples.json"), 1)
            for token in example["tokens"]
        ]
    )


def _of_shapes(made: Figure, cells: Sequence[Cell], _tables: Sequence[Path]) -> pd.DataFrame:
    """A line per key model, distribution and measure, smaller key models first; means over seeds."""
    table = _records(made, cells).drop(columns="parameters")
    manifests = {model: artefact.read(path, made.kind) for _, model, _, path in cells}
    floors = {manifest.settings["floor"] for manifest in manifests.values()}
    if len(floors) > 1:
        raise ArtifactError(f"{made.name}: expected shapes of one floor, found {sorted(floors)}; make them again")
    table["parameters"] = table["model"].map({m: each.facts["parameters"]["p_LM"] for m, each in manifests.items()})
    table["floor"] = floors.pop()
    found = _over_seeds(table, ["model", "parameters", "memory", "distribution", "metric", "floor"])
    is_top = (found["distribution"] == "p_kNN") & (found["metric"] == "top1")
    percent = found["model"].map(lambda model: _printed(made, {"model": model, "method": "kNN"}, "top1_probability"))
    found["paper"] = (percent.astype(float) / 100).where(is_top)
    return found.sort_values("parameters", kind="stable", ignore_index=True)


def _of_fidelity(made: Figure, cells: Sequence[Cell], _tables: Sequence[Path]) -> pd.DataFrame:
    """A line per memory, measure and group of positions, in the order of the config; means over seeds."""
    return _over_seeds(_records(made, cells), ["memory", "metric", "rows"])


Numbers = Callable[[Figure, Sequence[Cell], Sequence[Path]], pd.DataFrame]

# For each figure: from its folders and files to the numbers, the columns of the CSV; and from the numbers to the figure.
DRAWN: dict[str, tuple[Numbers, Callable[[pd.DataFrame], Drawing]]] = {
    "figure2": (_of_table3, figures.bars),
    "figure4": (_of_latency, figures.latency),
    "figure5": (_of_examples, figures.examples),
    "figure6": (_of_shapes, figures.shapes),
    "fidelity": (_of_fidelity, figures.fidelity),
    "gains": (lambda made, cells, _tables: gains.numbers(made, cells), figures.gains),
}


# --- shared -------------------------------------------------------------------------------------------------------


def _records(made: Figure, cells: Sequence[Cell]) -> pd.DataFrame:
    """The records of all folders with the domain and model of each.

    Raises:
        ArtifactError: Records of another seed, a number that is not finite, or two folders with the same records.
    """
    rows: list[dict[str, Any]] = []
    for domain, model, seed, folder in cells:
        for record in _json(folder / "records.json"):
            if record["seed"] != seed:
                raise ArtifactError(
                    f"{folder}: expected records of seed {seed}, found seed {record['seed']}; run it again"
                )
            if any(record[name] != record[name] for name in ("value", "low", "high")):
                raise ArtifactError(f"{folder}: expected finite numbers, found NaN in {record['metric']}; run it again")
            rows.append({"model": model, "domain": domain, **record})
    table = pd.DataFrame(rows)
    names = [name for name in ("domain", "memory", "distribution", "metric", "rows", "seed") if name in table]
    if table.duplicated(names).any():
        twice = table[table.duplicated(names)].iloc[0]
        raise ArtifactError(
            f"{made.name}: expected one number for each of {', '.join(names)}, found two for {twice['memory']}, "
            f"{twice['metric']}, seed {twice['seed']}; give each --cell once"
        )
    return table


def _over_seeds(table: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Means of value, low and high over seeds, the standard deviation of the value, and the number of positions."""
    groups = table.groupby(["domain", *names], sort=False, dropna=False)
    found = groups[["value", "low", "high"]].mean()
    found["sd"], found["seeds"], found["n"] = groups["value"].std(), groups.size(), groups["n"].min()
    return found.reset_index()


def _printed(made: Figure, row: dict[str, str], column: str) -> float | None:
    """The number that the paper prints for this figure, if it prints one."""
    found = paper.printed(made.name, row, column) if paper.FOLDER.is_dir() else []
    return next((each.value for each in found if each.value is not None), None)


def _json(file: Path) -> list[dict[str, Any]]:
    with outside(ArtifactError, file, "records in JSON", "run the stage again"):
        return [dict(record) for record in json.loads(file.read_text(encoding="utf-8"))]
