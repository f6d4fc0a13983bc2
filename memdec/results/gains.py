"""What a memory gains over its twin on hard labels, and how good its key model, how long its text and how large it was."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from memdec.artefacts import artefact
from memdec.errors import ArtifactError, ConfigError
from memdec.maths import paired, statistics
from memdec.results import items
from memdec.results.figure_catalogue import Figure
from memdec.results.items import Items
from memdec.results.layout import Part
from memdec.settings import DEFAULT_MEMORY

Cell = tuple[str, str, int, Path]  # domain, model, seed, folder
_KINDS = {"finetuned": "model"}  # kind of the artefact, where that of the part is another


def recipes(made: Figure, cells: Sequence[Cell]) -> dict[str, str]:
    """The recipe of every folder, by study, domain, model, seed and what it is."""
    return {
        "/".join(
            map(str, filter(None, [part.study, part.domain, part.model, f"seed{part.seed}", part.kind, part.memory]))
        ): (artefact.read(folder, _KINDS.get(part.kind, part.kind)).recipe)
        for part, folder in _folders(made, cells)
    }


def numbers(made: Figure, cells: Sequence[Cell]) -> pd.DataFrame:
    """A line per study, domain and base model.

    Returns:
        Columns study, axis (what it changes), domain, model, memory and twin (test perplexities, means over seeds), value
        (gain in percent) with low and high, n (stretches of the test text), seeds, key_perplexity (of the model that gives the keys, on
        valid), tokens (of the training text), memory_parameters, key_parameters.

    Raises:
        ArtifactError: A folder is not whole, or memory and twin were measured on other windows.
        ConfigError: Other folders than the parts of the figure.
    """
    models: dict[tuple[str | None, str], dict[str, list[float]]] = {}
    measured: dict[tuple[str | None, str, str], tuple[list[Items], list[Items]]] = {}
    for part, folder in _folders(made, cells):
        if part.kind == "evaluation":
            sides = measured.setdefault((part.study, part.domain, part.model), ([], []))
            sides[part.memory != DEFAULT_MEMORY].append(_perplexity(folder))
            continue
        facts = artefact.read(folder, _KINDS.get(part.kind, part.kind)).facts
        known = models.setdefault((part.study, part.domain), {})
        if part.kind == "finetuned":
            found = {"key_perplexity": facts["valid_perplexity"], "key_parameters": facts["parameters"]}
        else:
            found = {"tokens": facts["trained_tokens"] / facts["epochs"], "memory_parameters": facts["parameters"]}
        for name, value in found.items():
            known.setdefault(name, []).append(value)
    rows = []
    for (study, domain, model), (memory, twin) in measured.items():
        means = {name: float(np.mean(values)) for name, values in models[study, domain].items()}
        head: dict[str, object] = {"study": study, "axis": made.axes[study], "domain": domain, "model": model}
        rows.append(head | _gain(memory, twin, f"{study}, {domain}, {model}") | means)
    whole = ["tokens", "memory_parameters", "key_parameters"]
    return pd.DataFrame(rows).astype(dict.fromkeys(whole, int))


def _folders(made: Figure, cells: Sequence[Cell]) -> list[tuple[Part, Path]]:
    """The folder of each part.

    Raises:
        ConfigError: They are not in the order of the parts.
    """
    given = [cell[:3] for cell in cells]
    wanted = [(part.domain, part.model, part.seed) for part in made.parts]
    if given != wanted:
        raise ConfigError(
            f"{made.name}: expected a --cell for each of {len(wanted)} parts in the order of the config, found "
            f"{len(given)}; let Snakemake make it: snakemake results/{made.name}.csv"
        )
    return [(part, folder) for part, (*_, folder) in zip(made.parts, cells, strict=True)]


def _perplexity(folder: Path) -> Items:
    artefact.read(folder, "evaluation")
    records = json.loads((folder / "records.json").read_text(encoding="utf-8"))
    record = next((each for each in records if each["method"] == "MemDec"), None)
    if record is None:
        raise ArtifactError(f"{folder}: expected a perplexity with a memory, found none; run the evaluation again")
    return items.of_evaluation(folder, record)


def _gain(memory: Sequence[Items], twin: Sequence[Items], where: str) -> dict[str, float]:
    """The gain of a memory over its twin, from both at every seed."""
    counts = memory[0].counts
    if any(not np.array_equal(each.counts, counts) for each in [*memory, *twin]) or not len(counts):
        raise ArtifactError(
            f"{where}: expected the same test text of memory and twin, found others; evaluate both again"
        )
    own, other = (float(np.mean([each.value for each in side])) for side in (memory, twin))
    drawn = [
        paired.over_seeds(paired.ratios_by_item([each.sums for each in side], counts, np.exp, seed=0), seed=0)
        for side in (memory, twin)
    ]
    low, high = statistics.percentiles(100 * (1 - drawn[0] / drawn[1]), paired.LEVEL)
    return {
        "memory": own,
        "twin": other,
        "value": 100 * (1 - own / other),
        "low": float(low),
        "high": float(high),
        "n": len(counts),
        "seeds": len(memory),
    }
