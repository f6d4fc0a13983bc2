"""Stages `sweep` and `tune`: measure lm-eval tasks at every alpha (the paper's Table 7), with one pass of the models.

At the first alpha, base and memory score the requests and the scores are stored. The other alphas read the store.
Output of a sweep: `sweep.csv` (task, metric, alpha, value, stderr), `sweep.png`, `sweep.svg`, `scores/`. A metric of
filtered answers is `metric,filter`, as lm-eval names it.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import evaluate
from lm_eval.tasks import TaskManager

from memdec import HARNESS_TASKS
from memdec.artefacts import artefact, markdown
from memdec.errors import ConfigError
from memdec.harness.alphas import ALPHAS
from memdec.harness.models import MemDecInterp
from memdec.maths import weighing
from memdec.models.loading import model_identity
from memdec.settings import Split
from memdec.tasks.rows import samples
from memdec.tasks.task import FEWSHOT_SEED, RowsTask, check_names
from memdec.text import corpora

log = logging.getLogger(__name__)
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
        out: Output folder.
        alphas: Weights of the memory.
        corpus: Corpus folder for the task `memdec_ppl`.
        split: Split of that corpus.
        limit: Use only N rows of each task, from all over its file.
        model_args: As for `memdec-interp` (dtype, device, batch_size ...).
    """
    weights = sorted({weighing.check_weight(alpha) for alpha in alphas})
    if not weights or not tasks:
        raise ConfigError("sweep: expected at least one task and one alpha, found none; give --task and --alpha")
    metadata = {"corpus": str(corpus), "split": split} if corpus is not None else {}
    loaded = _loaded(tasks, metadata | {"pretrained": base})
    plain = {"tasks": list(tasks), "alphas": weights, "split": split, "limit": limit, "versions": _versions(loaded)}
    settings = plain | {key: str(value) for key, value in model_args.items()}
    inputs = {"base": model_identity(base), "memory": model_identity(memory), **_rows(loaded)}
    with artefact.building(out, "sweep", settings, inputs) as build:
        if build is None:
            return
        model = MemDecInterp(pretrained=base, memory=memory, alpha=0.5, scores=str(out / "scores"), **model_args)
        rows, better = _evaluate(model, loaded, weights, limit)
        artefact.write_text(out / "sweep.csv", _csv(rows))
        _draw(rows, better, out)
        for task, metric in _first(better).items():
            row = next(row for row in rows if (row["task"], row["metric"]) == (task, metric))
            _warn_at_end(f"{task}, {metric}", _best(rows, row, better)["alpha"], weights)
        build.facts.update(best=[row for row in rows if row == _best(rows, row, better)])


def tune(
    base: str,
    memory: str,
    corpus: Path,
    *,
    split: Split = "valid",
    alphas: Sequence[float] = ALPHAS,
    **model_args: Any,
) -> dict[float, float]:
    """Measure the perplexity of a corpus at every alpha; sorted, lowest first."""
    weights = sorted({weighing.check_weight(alpha) for alpha in alphas})
    model = MemDecInterp(pretrained=base, memory=memory, alpha=0.5, **model_args)
    scores = model.token_scores(corpora.joined_split(corpus, split, model.tokenizer.eos_token))
    assert scores.memory is not None
    found = weighing.perplexities(scores.base, scores.memory, weights)
    _warn_at_end(f"{corpus.name}, {split}", weighing.best_weight(found), weights)
    return dict(sorted(found.items(), key=lambda pair: pair[1]))


def _warn_at_end(what: str, best: float, weights: Sequence[float]) -> None:
    warning = weighing.at_end(f"{what}: alpha", best, weights)
    if warning is not None:
        log.warning("warning: %s", warning)


def shown(out: Path) -> str:
    """Format a finished sweep for the terminal: the first metric of each task, a line per alpha."""
    import pandas as pd

    table = pd.read_csv(out / "sweep.csv")
    first = table.groupby("task", sort=False)["metric"].transform("first")
    wide = table[table["metric"] == first].pivot_table(index="alpha", columns=["task", "metric"], values="value")
    columns = {name: markdown.aligned([markdown.number(value) for value in wide[name]]) for name in wide}
    return pd.DataFrame(
        columns, index=pd.Index(markdown.aligned([f"{x:g}" for x in wide.index]), name="alpha")
    ).to_string()


def _loaded(tasks: Sequence[str], metadata: Mapping[str, Any]) -> Any:
    """The tasks with their rows, as lm-eval's `evaluate` takes them."""
    manager = _manager(tasks, metadata)
    check_names(tasks, manager.all_tasks)
    return manager.load(list(tasks))


def _versions(loaded: Any) -> dict[str, str]:
    return {name: str(task.VERSION) for name, task in loaded["tasks"].items()}


def _rows(loaded: Any) -> dict[str, str]:
    """Hashes of the rows of our tasks, which are a corpus, files in MEMDEC_DATA, or those of the Hub."""
    read = {name: task.config.metadata["rows"] for name, task in loaded["tasks"].items() if isinstance(task, RowsTask)}
    return {
        f"rows {name}": artefact.digest({split: facts["sha256"] for split, facts in splits.items()})
        for name, splits in read.items()
    }


def _evaluate(
    model: Any, loaded: Any, alphas: Sequence[float], limit: int | None
) -> tuple[list[dict[str, Any]], dict[tuple[str, str], bool]]:
    """Rows of the table, and for each (task, metric) whether higher is better."""
    read = samples(loaded["tasks"], limit)
    rows: list[dict[str, Any]] = []
    better: dict[tuple[str, str], bool] = {}
    for number, alpha in enumerate(alphas):
        model.set_weight(alpha)
        for task in loaded["tasks"].values():  # as `simple_evaluate` does; the same for every alpha
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        with _quiet(number > 0):
            results = evaluate(model, loaded, samples=read, bootstrap_iters=0, log_samples=False)
        assert results is not None
        for task, values in results["results"].items():
            for name, value in values.items():
                plain, _, rule = name.partition(",")
                if not isinstance(value, int | float) or plain.endswith("_stderr") or not rule:
                    continue
                stderr = values.get(f"{plain}_stderr,{rule}")
                stderr = stderr if isinstance(stderr, int | float) else None
                metric = plain if rule == "none" else name  # each filter of the answers has values of its own
                rows.append({"task": task, "metric": metric, "alpha": alpha, "value": float(value), "stderr": stderr})
                better[task, metric] = bool(results["higher_is_better"].get(task, {}).get(plain, True))
    return rows, better


def _manager(tasks: Sequence[str], metadata: Mapping[str, Any]) -> TaskManager:
    """Finds tasks: ours, and lm-eval's own only where one is named, as its 14,000 files take ten seconds to index."""
    place = {"include_path": str(HARNESS_TASKS), "metadata": dict(metadata)}
    ours = TaskManager(include_defaults=False, **place)
    return ours if set(tasks) <= set(ours.all_tasks) else TaskManager(**place)


@contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """Hide the log messages that lm-eval writes for every run."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    if quiet:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _best(rows: Sequence[dict[str, Any]], row: dict[str, Any], better: dict[tuple[str, str], bool]) -> dict[str, Any]:
    """The row of the same task and metric with the best value."""
    key = row["task"], row["metric"]
    same = {each["alpha"]: each for each in rows if (each["task"], each["metric"]) == key}
    values = {alpha: each["value"] for alpha, each in same.items()}
    return same[weighing.best_weight(values, higher=better[key])]


def _first(better: Mapping[tuple[str, str], bool]) -> dict[str, str]:
    """The first metric of each task."""
    found: dict[str, str] = {}
    for task, metric in better:
        found.setdefault(task, metric)
    return found


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    import pandas as pd

    return pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(index=False, lineterminator="\n")


def _draw(rows: Sequence[dict[str, Any]], better: dict[tuple[str, str], bool], out: Path) -> None:
    """Draw a panel per task with its first metric, a dashed line for the base, and a mark at the best alpha."""
    from matplotlib.figure import Figure

    panels = _first(better)
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.6 * lines), layout="constrained")
    for i, (task, metric) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(lines, columns, i)
        some = [row for row in rows if (row["task"], row["metric"]) == (task, metric)]
        alphas, values = np.array([[row["alpha"], row["value"]] for row in some]).T
        axes.plot(alphas, values, color="#0072b2", linewidth=1.6)
        best = _best(rows, some[0], better)
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
        axes.set_ylabel(metric.replace("_", " ").replace(",", ", "))
        axes.set_title(task.replace("$", r"\$"), fontsize=9)  # a dollar begins a formula
        axes.margins(y=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / "sweep.png", dpi=160)
    figure.savefig(out / "sweep.svg", metadata={"Date": None})
