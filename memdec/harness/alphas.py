"""Tasks of lm-eval at many alphas from one pass of the models, and the best alpha of a task."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

ALPHAS = tuple(round(0.05 * i, 2) for i in range(21))
_FEWSHOT_SEED = 1234  # lm-eval's default


def best_alpha(model: Any, task: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """The alpha with the best value of a task's first metric: alpha, metric, value, and all values by alpha.

    Args:
        model: `memdec-interp` with a score store.
        task: Name of the task.
        metadata: Of the task; says the split.
    """
    rows, better = evaluated(model, [task], ALPHAS, metadata, None)
    first = [row for row in rows if row["metric"] == rows[0]["metric"]]
    best = best_of(first, first[0], better)
    return {
        **{key: best[key] for key in ("alpha", "metric", "value")},
        "sweep": {f"{row['alpha']:g}": row["value"] for row in first},
    }


def evaluated(
    model: Any, tasks: Sequence[str], alphas: Sequence[float], metadata: dict[str, Any], limit: int | None
) -> tuple[list[dict[str, Any]], dict[tuple[str, str], bool]]:
    """Rows of the table, and of each (task, metric) whether higher is better."""
    from lm_eval import evaluate
    from lm_eval.tasks import TaskManager

    from memdec import HARNESS_TASKS

    loaded = TaskManager(include_path=str(HARNESS_TASKS), metadata=metadata).load(list(tasks))
    rows: list[dict[str, Any]] = []
    better: dict[tuple[str, str], bool] = {}
    for number, alpha in enumerate(alphas):
        model.set_alpha(alpha)
        for task in loaded["tasks"].values():  # as `simple_evaluate` does, for every alpha alike
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)
        with _quiet(number > 0):
            results = evaluate(model, loaded, limit=limit, bootstrap_iters=0, log_samples=False)
        assert results is not None
        for task, values in results["results"].items():
            for name, value in values.items():
                metric = name.split(",")[0]
                if not isinstance(value, int | float) or metric.endswith("_stderr") or "," not in name:
                    continue
                stderr = values.get(name.replace(metric, f"{metric}_stderr"))
                stderr = stderr if isinstance(stderr, int | float) else None
                rows.append({"task": task, "metric": metric, "alpha": alpha, "value": float(value), "stderr": stderr})
                better[task, metric] = bool(results["higher_is_better"].get(task, {}).get(metric, True))
    return rows, better


@contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """Without what lm-eval logs of every run."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    if quiet:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def best_of(rows: Sequence[dict[str, Any]], row: dict[str, Any], better: dict[tuple[str, str], bool]) -> dict[str, Any]:
    """The row of the same task and metric with the best value; of equals that of the smallest alpha."""
    key = row["task"], row["metric"]
    same = [each for each in rows if (each["task"], each["metric"]) == key]
    return max(same, key=lambda each: (each["value"] if better[key] else -each["value"], -each["alpha"]))
