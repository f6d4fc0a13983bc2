"""Choose alpha for each task of a run: one for all, the paper's, or the best on a split that the task declares."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

from memdec.errors import ConfigError
from memdec.maths import weighing
from memdec.tasks.task import Declared, TaskSplit, declared

log = logging.getLogger("lm_eval.models.memdec.alpha")  # the `lm_eval` command only shows loggers below lm_eval

ALPHAS = tuple(round(0.05 * i, 2) for i in range(21))
TUNE = "tune"
Mode = Literal["given", "paper", "tune"]
Answer = Callable[[Sequence[Any], float], Sequence[Any]]  # (requests, alpha) -> answers


class TaskAlphas:
    """Chooses alpha for each task.

    Args:
        mode: given: `usual` for all tasks. paper: the paper's, if the task declares it, else `usual`. tune: the best of
            0, 0.05 ... 1 on the split that the task declares for tuning; without such a split, the paper's.
        usual: alpha of all tasks, or of those that declare none.

    Attributes:
        chosen: For each task: alpha and its source; if tuned, also the metric, its value and the sweep.
    """

    def __init__(self, mode: Mode, usual: float) -> None:
        self.mode, self.usual = mode, usual
        self.chosen: dict[str, dict[str, Any]] = {}

    def of(self, requests: Sequence[Any], answer: Answer) -> list[float]:
        """alpha of each request; to tune a task, `answer` is called with requests of the tuning split.

        Raises:
            ConfigError: A task must be tuned but declares neither a split nor an alpha.
        """
        says = {request.task_name: declared(request) for request in requests}
        if self.mode == "given":
            return [self.usual] * len(requests)
        if self.mode == "tune":
            wrong = [name for name, each in says.items() if each.tune_split is None and each.paper_alpha is None]
            if wrong:
                raise ConfigError(
                    "alpha=tune: expected tasks with a split to tune on or an alpha of the paper, found "
                    f"{', '.join(map(str, wrong))}; give alpha a number"
                )
        for name, each in says.items():
            if name is not None and name not in self.chosen:
                self.chosen[name] = self._choice(name, each, answer)
        return [self.usual if r.task_name is None else float(self.chosen[r.task_name]["alpha"]) for r in requests]

    def _choice(self, name: str, says: Declared, answer: Answer) -> dict[str, Any]:
        if self.mode == "tune" and says.tune_split is not None:
            return tuned(name, says, answer)
        if says.paper_alpha is None:
            found = {"alpha": self.usual, "source": "default"}
        else:
            why = "paper; no split to tune on" if self.mode == "tune" else "paper"
            found = {"alpha": float(says.paper_alpha), "source": why}
        level = logging.WARNING if self.mode == "tune" else logging.INFO
        log.log(level, "%s: alpha %g (%s)", name, found["alpha"], found["source"])
        return found


def tuned(name: str, says: Declared, answer: Answer) -> dict[str, Any]:
    """Find the alpha with the best first metric on the tuning split; alpha, metric, value, sweep and source."""
    log.info("%s: alpha is tuned on %s", name, says.tune_split)
    split = TaskSplit(name, {**says.metadata, "split": says.tune_split}, says.prompting)
    found = {alpha: split.value(answer(split.requests, alpha)) for alpha in ALPHAS}
    metric, _, higher = found[ALPHAS[0]]
    values = {alpha: value for alpha, (_, value, _) in found.items()}
    best = weighing.best_weight(values, higher=higher)
    log.info("%s: alpha %g, %s %.4g on %s", name, best, metric, values[best], says.tune_split)
    warning = weighing.at_end(f"{name}: alpha", best, ALPHAS)
    if warning is not None:
        log.warning(warning)
    return {
        "alpha": best,
        "metric": metric,
        "value": values[best],
        "sweep": {f"{alpha:g}": value for alpha, value in values.items()},
        "source": f"tuned on {says.tune_split}",
    }
