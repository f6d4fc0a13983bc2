"""Stage `fidelity`: how well a memory imitates the kNN distributions that it was trained on.

On a sample of the training positions it compares p_mem with the stored targets: match of the most likely token, KL,
total variation and Pearson correlation (`memdec.maths.fidelity` defines them). Each is a mean over all positions, over
those whose target has one token, and over those with several. Only tokens with a probability of `floor` or more count
for this split, since far neighbours give almost every target a few tokens of no weight. The measures and the split are
those of Memory Decoder at Scale (arXiv 2607.27919). They say how well the memory learned its training positions, not how
well it generalises.

The targets are as they were trained on: cut to their `top` tokens and renormalised, if the run does so. The facts give
the share of rows that may have been cut, and an upper bound of the mass that they lack; that bound is also the most by
which the cut can change a total variation.

Output: `records.json`, a number per measure and group with its 95 % bootstrap interval over windows, and `windows.csv`,
the sums of each window, for paired comparisons of memories on the same positions.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from memdec.artefacts import artefact
from memdec.maths import fidelity
from memdec.results.positions import Positions, plain_settings, window_means
from memdec.settings import AUTO, DEFAULT_MEMORY, Compute, SampleSettings

ROWS = ("all", "one token", "several tokens")  # groups of positions, by the entries of their target


def run(
    memory: Path,
    targets: Sequence[Path],
    stream: Path,
    out: Path,
    settings: SampleSettings,
    *,
    context: int,
    stride: int,
    name: str = DEFAULT_MEMORY,
    control: bool = False,
    compute: Compute = AUTO,
) -> None:
    """Compare a memory with targets.

    Args:
        memory: Memory folder, or a model in its place.
        targets: All shards of the targets.
        stream: Token stream that the targets belong to.
        out: Output folder.
        settings: Size of the sample, and so on.
        context: Most tokens that the memory sees at once.
        stride: Tokens scored per window.
        name: Name of the memory in the records.
        control: Negative control: the memory is one of another corpus. Without this, such a memory is refused.
        compute: Device, and number type of the memory's weights.

    Raises:
        ArtifactError: Targets, tokens and memory are of different tokens or texts; found before the memory is loaded.
    """
    positions = Positions(targets, stream, context, stride, settings)
    known = positions.check_memory(memory, control)
    plain = {**plain_settings(settings, context, stride, compute), "memory": name, "control": control}
    with artefact.building(out, "fidelity", plain, positions.inputs | {"memory": known.recipe}) as build:
        if build is None:
            return
        table, cut = _measured(positions, memory, settings.floor, compute)
        several = table["entries"].to_numpy() != 1
        groups = dict(zip(ROWS, (np.ones(len(table), bool), ~several, several), strict=True))
        window = table["window"].to_numpy()
        records = [
            {"memory": name, "metric": metric, "rows": rows, "imitates": positions.imitates, "seed": settings.seed}
            | window_means(table[metric].to_numpy(), window, use, settings.resamples, settings.seed)
            for metric in fidelity.MEASURES
            for rows, use in groups.items()
        ]
        artefact.write_json(out / "records.json", records)
        sums = [
            table[use].groupby("window")[list(fidelity.MEASURES)].sum().assign(n=table[use].groupby("window").size())
            for use in groups.values()
        ]
        windows = pd.concat(dict(zip(groups, sums, strict=True)), names=["rows"])
        artefact.write_text(out / "windows.csv", windows.to_csv())
        build.facts.update(positions.facts, one_token=float((~several).mean()), **cut)


def _measured(
    positions: Positions, memory: Path, floor: float, compute: Compute
) -> tuple[pd.DataFrame, dict[str, float]]:
    """A line per position with its window, the tokens of its target and the measures; and what is known of the cut."""
    made = positions.made
    parts, cuts = [], []
    for block in positions.blocks([memory], compute):
        found = fidelity.fidelity(block.log_p[0], block.rows)
        entries = fidelity.sparse_shape(block.rows, floor)["entries"]
        parts.append(pd.DataFrame({"window": block.window, "entries": entries, **found}))
        if positions.imitates == "p_kNN":
            cuts.append(fidelity.cut(block.rows, made["neighbours"], made["top"], made["threshold"]))
    missing = np.concatenate(cuts) if cuts else np.zeros(0)
    facts = {"rows_cut": float((missing > 0).mean()), "missing_at_most": float(missing.mean())} if cuts else {}
    return pd.concat(parts, ignore_index=True), facts
