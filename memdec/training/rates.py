"""The choice of a learning rate on valid, within the budget of the training.

Candidates are tried from the smallest up, each from the same start for a part of the updates and with its own decay to
0, until one is worse on valid than the one before. The best is trained in full. All of it counts against the budget, so
systems that are tuned in this way can be compared at the same cost.
"""

import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from memdec.artefacts import artefact
from memdec.errors import ConfigError
from memdec.settings import TrainSettings
from memdec.training import checkpoints, fitting

log = logging.getLogger(__name__)
S = TypeVar("S", bound=TrainSettings)
_RESULT = "tried.json"


def train(
    make: Callable[[], Any],
    settings: S,
    task: fitting.Task,
    work: Path,
    known: Mapping[str, Any] | None = None,
) -> tuple[Any, dict[str, Any], fitting.LossTrainer]:
    """Try the candidates for the learning rate, if there are any, and train with the best; `fitting.fit` without them.

    Args:
        make: Makes the model at its start.
        settings: Those of the training; `learning_rates` are the candidates.
        task: The data of the training; its ceiling holds for trials and training together.
        work: Folder for checkpoints and for the results of trials, from which the same call resumes.
        known: Facts of the same training with another seed. Its learning rate is taken, and this training has what its trials
            have left of the ceiling.

    Returns:
        The trained model; the facts of `fitting.fit`, of which `flops` includes the trials, with `learning_rate` and
        `trials`; and the trainer.

    Raises:
        ConfigError: The loss of every candidate diverged.
    """
    if not settings.learning_rates:
        model = make()
        return model, *fitting.fit(model, settings, task, work)
    if known is not None:
        rate, spent = known["learning_rate"], sum(trial["flops"] for trial in known["trials"])
        model = make()
        facts, trainer = fitting.fit(model, _with_rate(settings, rate), _without(task, spent), work)
        return model, facts | {"flops_ceiling": task.ceiling, "learning_rate": rate, "trials": []}, trainer
    rates = sorted(settings.learning_rates)
    share = settings.trial / (1 + len(rates) * settings.trial)  # of the ceiling for one trial, if all are needed
    trials: list[dict[str, Any]] = []
    for rate in rates:
        trials.append(_tried(make, settings, rate, _limited(task, share), work))
        if len(trials) > 1 and _score(trials[-1]) > _score(trials[-2]):
            break
    best = min(trials, key=_score)
    if best["score"] is None:
        tried = ", ".join(f"{trial['learning_rate']:g}" for trial in trials)
        raise ConfigError(
            f"learning_rates: expected one at which the loss stays finite, found none of {tried}; lower them"
        )
    if len(rates) > 1 and best["learning_rate"] in (rates[0], rates[-1]):
        log.warning(
            "warning: learning rate: the best of %g to %g is %g, the end of the grid; try %s ones",
            rates[0], rates[-1], best["learning_rate"], "smaller" if best["learning_rate"] == rates[0] else "larger",
        )  # fmt: skip
    spent = sum(trial["flops"] for trial in trials)
    model = make()
    facts, trainer = fitting.fit(model, _with_rate(settings, best["learning_rate"]), _without(task, spent), work)
    facts |= {
        "flops": facts["flops"] + spent,
        "flops_ceiling": task.ceiling,
        "learning_rate": best["learning_rate"],
        "trials": trials,
    }
    return model, facts, trainer


def _tried(make: Callable[[], Any], settings: S, rate: float, task: fitting.Task, work: Path) -> dict[str, Any]:
    """Result of a trial; read from `work` if an earlier run finished it."""
    folder = work / f"rate-{rate:g}"
    whole = checkpoints.facts(folder) is not None
    if broadcast_object_list([whole])[0]:  # process 0 decides: others may see the files later
        found: dict[str, Any] = json.loads((folder / _RESULT).read_text(encoding="utf-8"))
        return found
    trial = _with_rate(settings, rate).model_copy(update={"epochs": settings.epochs * settings.trial})
    result: dict[str, Any] = {"learning_rate": rate, "score": None}
    first = PartialState().is_main_process
    try:
        facts, _ = fitting.fit(make(), trial, task, folder, work, settings.trial)
        score = facts["evaluations"][-1]["score"]  # NaN if the last update made the weights infinite
        result |= {"score": score if math.isfinite(score) else None}
        result |= {"flops": facts["flops"], "updates": facts["updates"]}
    except fitting.DivergedError as error:
        result |= {"flops": error.flops, "updates": error.updates}
        if first:
            log.warning("warning: learning rate %g is left out: %s", rate, error)
    if first:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        artefact.write_json(folder / _RESULT, result)
        checkpoints.seal(folder, {})
    return result


def _score(trial: dict[str, Any]) -> float:
    """What a trial reached on valid; smaller is better, and a loss that diverged is the worst."""
    return math.inf if trial["score"] is None else float(trial["score"])


def _with_rate(settings: S, rate: float) -> S:
    return settings.model_copy(update={"learning_rate": rate, "learning_rates": []})


def _without(task: fitting.Task, spent: float) -> fitting.Task:
    return task if task.ceiling is None else replace(task, ceiling=task.ceiling - spent)


def _limited(task: fitting.Task, share: float) -> fitting.Task:
    return task if task.ceiling is None else replace(task, ceiling=task.ceiling * share)
