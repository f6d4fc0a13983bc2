"""Stages `sweep` and `tune`: what alpha does to any task of lm-eval (the paper's Table 7), from one pass of the models.

The first alpha scores base and memory and stores both; all others read the store. Output of a sweep: `sweep.csv` (task,
metric, alpha, value, stderr), `sweep.png`, `sweep.svg`, `scores/`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memdec.artefacts import artefact
from memdec.errors import ConfigError
from memdec.harness.alphas import ALPHAS, best_of, evaluated
from memdec.maths import mixing, statistics
from memdec.models.loading import model_identity
from memdec.settings import Split

COLUMNS = ("task", "metric", "alpha", "value", "stderr")


def run(
    base: str,
    memory: str,
    tasks: Sequence[str],
    out: Path,
    *,
    alphas: Sequence[float] = ALPHAS,
    corpus: Path | None = None,
    split: Split = "test",
    limit: int | None = None,
    **model_args: Any,
) -> None:
    """Evaluate tasks at every alpha.

    Args:
        base: Base model, folder or Hub id.
        memory: Memory decoder.
        tasks: Names of lm-eval tasks.
        out: Folder to make.
        alphas: Weights of the memory.
        corpus: Corpus folder for the task `memdec_ppl`.
        split: Its split.
        limit: Only the first so many rows of each task.
        model_args: As for `memdec-interp` (dtype, device, batch_size ...).
    """
    weights = sorted({mixing.check_weight(alpha) for alpha in alphas})
    if not weights or not tasks:
        raise ConfigError("sweep: expected at least one task and one alpha, found none; give --task and --alpha")
    plain = {"tasks": list(tasks), "alphas": weights, "corpus": str(corpus), "split": split, "limit": limit}
    settings = plain | {key: str(value) for key, value in model_args.items()}
    inputs = {"base": model_identity(base), "memory": model_identity(memory)}
    with artefact.building(out, "sweep", settings, inputs) as build:
        if build is None:
            return
        from memdec.harness.models import MemDecInterp

        metadata = {"corpus": str(corpus), "split": split} if corpus is not None else {}
        model = MemDecInterp(pretrained=base, memory=memory, alpha=0.5, scores=str(out / "scores"), **model_args)
        rows, better = evaluated(model, tasks, weights, metadata | {"pretrained": base}, limit)
        artefact.write_text(out / "sweep.csv", _csv(rows))
        _draw(rows, better, out)
        build.facts.update(best=[row for row in rows if row == best_of(rows, row, better)])


def tune(
    base: str,
    memory: str,
    corpus: Path,
    *,
    split: Split = "valid",
    alphas: Sequence[float] = ALPHAS,
    **model_args: Any,
) -> dict[float, float]:
    """Perplexity of the corpus at every alpha, lowest first."""
    from memdec.harness.models import MemDecInterp
    from memdec.text import corpora

    weights = sorted({mixing.check_weight(alpha) for alpha in alphas})
    model = MemDecInterp(pretrained=base, memory=memory, alpha=0.5, **model_args)
    separator = artefact.read(corpus, "corpus").facts["separator"]
    scores = model.token_scores(corpora.joined(corpora.load(corpus, split), separator, model.tokenizer.eos_token))
    found = {alpha: statistics.perplexity(scores.log_p(alpha)) for alpha in weights}
    return dict(sorted(found.items(), key=lambda pair: pair[1]))


def shown(out: Path) -> str:
    """The first metric of each task of a finished sweep: a line per alpha."""
    import pandas as pd

    table = pd.read_csv(out / "sweep.csv")
    first = table.groupby("task", sort=False)["metric"].transform("first")
    wide = table[table["metric"] == first].pivot_table(index="alpha", columns=["task", "metric"], values="value")
    return wide.to_string(float_format=lambda value: f"{value:.4g}")


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    import pandas as pd

    return pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(index=False, lineterminator="\n")


def _draw(rows: Sequence[dict[str, Any]], better: dict[tuple[str, str], bool], out: Path) -> None:
    """A panel per task with its first metric; the line of the base, the best alpha marked."""
    from matplotlib.figure import Figure

    panels: dict[str, str] = {}
    for task, metric in better:
        panels.setdefault(task, metric)
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.6 * lines), layout="constrained")
    for i, (task, metric) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(lines, columns, i)
        some = [row for row in rows if (row["task"], row["metric"]) == (task, metric)]
        alphas, values = np.array([[row["alpha"], row["value"]] for row in some]).T
        axes.plot(alphas, values, color="#0072b2", linewidth=1.6)
        best = best_of(rows, some[0], better)
        axes.plot(best["alpha"], best["value"], "o", color="#d55e00", markersize=5)
        axes.annotate(
            f"{best['value']:.4g} at α = {best['alpha']:g}", (best["alpha"], best["value"]), textcoords="offset points",
            xytext=(0, -12 if better[task, metric] else 8), ha="center", fontsize=8, color="#d55e00",
        )  # fmt: skip
        if alphas[0] == 0:
            axes.axhline(values[0], color="0.6", linewidth=0.9, linestyle="--")
            axes.annotate("base", (1, values[0]), xycoords=("axes fraction", "data"), xytext=(-3, 3),
                          textcoords="offset points", ha="right", fontsize=8, color="0.4")  # fmt: skip
        axes.set_xlabel("α, weight of the memory")
        axes.set_ylabel(metric.replace("_", " "))
        axes.set_title(task, fontsize=9)
        axes.margins(y=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / "sweep.png", dpi=160)
    figure.savefig(out / "sweep.svg", metadata={"Date": None})
