"""Stage `harness`: run one system around one base model over a suite of lm-eval tasks, and keep every row.

The models are loaded once for all tasks. The scores of base and memory are stored, so that a killed run goes on where
it was. Rows come from MEMDEC_DATA or the Hub; where rows are missing, nothing is loaded.

Output: `results_<date>.json` and `samples_<task>_<date>.jsonl` as `lm_eval --log_samples --output_path
OUT/results.json` writes them, `scores/`, and `records.json`: one record for each task and metric, with its 95 %
bootstrap interval over rows, the labels that were predicted, and a hash of the rows.

In the samples of a DCPMI task, the label words and the answers that are the same in every row are written once
(`_thinned`).
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

from memdec import HARNESS_TASKS
from memdec.artefacts import artefact, devices
from memdec.errors import ArtifactError, ConfigError, ResourceError, RowsMissingError
from memdec.harness.base_lm import WrappedLM
from memdec.harness.baselines import of_system
from memdec.inference.systems import SYSTEMS, Parts
from memdec.maths import paired, statistics
from memdec.models import loading
from memdec.results import compare
from memdec.results.score import reached_size
from memdec.settings import (
    AUTO,
    DEFAULT_MEMORY,
    Compute,
    KnnLMSettings,
    RetrievalSettings,
    SearchSettings,
    Suite,
    SystemName,
)
from memdec.tasks import needed, rows
from memdec.tasks.task import RowsTask

log = logging.getLogger(__name__)
RESAMPLES = 2000  # of rows, for an interval
RECORDS = "records.json"

Sample = dict[str, Any]  # a row of a samples file


def run(
    base: str,
    suite: Suite,
    out: Path,
    *,
    seed: int,
    memory: str | None = None,
    name: str = DEFAULT_MEMORY,
    evaluation: Path | None = None,
    lora: Path | None = None,
    dapt: Path | None = None,
    datastore: Sequence[Path] = (),
    index: Path | None = None,
    passages: Path | None = None,
    compute: Compute = AUTO,
) -> None:
    """Run one system over the tasks of a suite.

    Args:
        base: Base model, folder or Hub id; without another part it is the system.
        suite: The tasks, the weight of the memory, and how many rows are read.
        out: Output folder.
        seed: Seed of the run; it is written into the records, and draws the resamples of the intervals.
        memory: Memory, or a model after DAPT in its place: the system is MemDec.
        name: Name of the memory in the records.
        evaluation: Evaluation of the system, as `memdec evaluate` makes it: it has the alpha, or the lambda and tau, that
            were tuned on valid text.
        lora: LoRA adapter of the base: the system is LoRA.
        dapt: The base after DAPT: the system is DAPT.
        datastore: Shards of a datastore made with the base; with `index`, the system is the kNN-LM.
        index: Index over the datastore.
        passages: Passages: the system is In-Context RAG.
        compute: Device, and number type of the models' weights.

    Raises:
        ConfigError: More than one system is described, or a task or weight does not exist.
        CorpusError: Rows of a task are missing or damaged.
        ArtifactError: A part does not fit the base.
    """
    parts = Parts(
        base=base, dapt=dapt, lora=lora, memory=memory, datastore=tuple(datastore), index=index, passages=passages,
        dtype=devices.precision(compute), device=str(devices.pick(compute, spread=True)), spread=compute.device == "all",
    )  # fmt: skip
    system = SYSTEMS[_system(parts)]
    parts, alpha = _weighted(system.name, parts, suite, name, evaluation)
    system.check_parts(parts)
    tasks, hashes = _all_tasks(suite, base)
    settings = {
        **suite.model_dump(mode="json", exclude={"batch_size"}),
        "versions": {task: each.VERSION for task, each in tasks.items()},
        "definitions": {task: needed.definition(task) for task in tasks},
        "memory": name if system.name == "MemDec" else None,
        "weight": parts.knn_lm.weight if system.weight == "lambda" else alpha,
        "numbers": system.numbers(parts),
        "seed": seed,
        "precision": parts.dtype,
    }
    inputs = {part: _identity(parts.of(part)) for part in {"base", *system.needs} if part != "datastore"}
    with artefact.building(out, "harness", settings, inputs | hashes) as build:
        if build is None:
            return
        for old in [*out.glob("results_*.json"), *out.glob("samples_*.jsonl")]:
            old.unlink()  # of a run that was killed while it wrote
        more = {"alpha": alpha} if system.name == "MemDec" else {}
        scores = str(out / "scores")
        model = of_system(system.name, parts, batch_size=suite.batch_size, scores=scores, **more)
        results, samples = _evaluated(model, parts, tasks, suite, out)
        common = {
            "method": system.name,
            "memory": settings["memory"],
            "model": base.rstrip("/").rpartition("/")[2],
            "seed": seed,
            "limit": suite.limit,
            "device": devices.described(model.device),
            "precision": parts.dtype,
            "size": None if parts.lora is None else reached_size(Path(parts.lora)),
        }
        records = []
        for task, each in tasks.items():
            used = _weight_of(model, task)
            about = {"alpha": None, "lambda": None} | ({system.weight: used} if system.weight is not None else {})
            records += [
                record | common | about | {"rows": hashes[f"rows {task}"]}
                for record in _records(each, results, samples[task], seed)
            ]
        artefact.write_json(out / RECORDS, records)
        build.facts.update(
            tasks=list(tasks),
            rows={task: len(samples[task]) for task in tasks},
            requests_cut=model.n_cut,
            evaluation=None if evaluation is None else artefact.read(evaluation, "evaluation").recipe,
        )


def _system(parts: Parts) -> SystemName:
    """The one system that the parts describe.

    Raises:
        ConfigError: They describe several.
    """
    extra = {part: system.name for system in SYSTEMS.values() for part in system.needs if part != "base"}
    given = [part for part in extra if parts.of(part)]
    found = list(dict.fromkeys(extra[part] for part in given))
    if len(found) > 1:
        flags = ", ".join(f"--{part}" for part in given)
        raise ConfigError(f"memdec harness: expected the parts of one system, found {flags}; run each system by itself")
    return found[0] if found else "base"


def _weighted(
    system: SystemName, parts: Parts, suite: Suite, name: str, evaluation: Path | None
) -> tuple[Parts, float | str | None]:
    """The parts with lambda, tau and so on as the suite says; and alpha as `MemDecInterp` takes it."""
    valid = suite.alpha == "valid"
    if valid and SYSTEMS[system].weight is not None and evaluation is None:
        raise ConfigError(
            f"memdec harness: expected --evaluation with the weight of {system} that was tuned on valid text (alpha: valid), "
            "found none; give the folder that `memdec evaluate` made, or another alpha"
        )
    alpha = None if suite.alpha in ("paper", "valid") else suite.alpha
    if evaluation is None:
        return parts, alpha
    manifest = artefact.read(evaluation, "evaluation")
    _check_evaluation(evaluation, manifest, parts)
    tuned = _tuned(evaluation, system, name if system == "MemDec" else None)
    if system == "kNN-LM":
        said = {field: manifest.settings[field] for field in SearchSettings.model_fields}
        weight = tuned["lambda"] if valid else KnnLMSettings().weight
        parts = replace(parts, knn_lm=KnnLMSettings(weight=weight, temperature=tuned["temperature"], **said))
    if system == "In-Context RAG":
        said = {field: manifest.settings[field] for field in RetrievalSettings.model_fields}
        parts = replace(parts, retrieval=RetrievalSettings(**said))
    return parts, float(tuned["alpha"]) if valid and system == "MemDec" else alpha


def _check_evaluation(folder: Path, manifest: artefact.Manifest, parts: Parts) -> None:
    """Check that an evaluation is of these parts, not of another base, memory, datastore or scale."""
    for part in ("base", "memory", "index", "passages", "lora", "dapt"):
        stated = manifest.inputs.get(part)
        if parts.of(part) and stated is not None and stated != _identity(parts.of(part)):
            raise ArtifactError(
                f"{folder}: expected an evaluation of {parts.of(part)}, found one of another {part}; check the paths"
            )


def _tuned(folder: Path, system: SystemName, memory: str | None) -> dict[str, Any]:
    """The record of a system in an evaluation."""
    records = json.loads((folder / RECORDS).read_text(encoding="utf-8"))
    found = [each for each in records if each["method"] == system and memory in (None, each["memory"])]
    if len(found) != 1:
        what = system if memory is None else f"{system} with the memory {memory}"
        raise ArtifactError(
            f"{folder / RECORDS}: expected one record of {what}, found {len(found)}; evaluate this system, or check --name"
        )
    record: dict[str, Any] = found[0]
    return record


def _identity(part: Any) -> str:
    """Recipe of an artefact, or hash of a model folder or Hub id."""
    path = Path(part)
    kind = artefact.kind_of(path)
    if kind is not None and path.is_dir():
        return artefact.read(path, kind, whole=kind in ("model", "memory", "lora")).recipe
    return loading.model_identity(str(part))


# --- tasks and rows -------------------------------------------------------------------------------------------------


def load_tasks(
    names: Sequence[str], base: str, split: str | None = None
) -> tuple[dict[str, RowsTask], dict[str, RowsMissingError]]:
    """Load tasks and the tasks of groups, with all of their rows.

    Args:
        names: Tasks and groups.
        base: Folder or Hub id of the model whose tokenizer counts tokens.
        split: Another split than the scored one.

    Returns:
        The tasks; and for those whose rows are neither in MEMDEC_DATA nor on the Hub, the error.

    Raises:
        ConfigError: A name is no task or group of ours.
        CorpusError: Rows are damaged.
    """
    metadata = {"pretrained": base} | ({} if split is None else {"split": split})
    # lm-eval's own 14,000 task files take ten seconds to index, and none of them is needed.
    manager = TaskManager(include_path=str(HARNESS_TASKS), include_defaults=False, metadata=metadata)
    found: dict[str, RowsTask] = {}
    missing: dict[str, RowsMissingError] = {}
    for name in needed.leaves(names):
        try:
            with rows.without_hub() if missing else nullcontext():
                found[name] = manager.load([name])["tasks"][name]
        except RowsMissingError as error:
            missing[name] = error
    return found, missing


def _all_tasks(suite: Suite, base: str) -> tuple[dict[str, RowsTask], dict[str, str]]:
    """The tasks of a suite, and hashes of the rows that they read: those that are scored, and those that alpha is tuned on.

    Raises:
        RowsMissingError: Rows of some tasks are missing; the message names all of these tasks.
    """
    tasks, missing = load_tasks(suite.tasks, base)
    hashes = {f"rows {name}": _rows_hash(task, suite.limit) for name, task in tasks.items()}
    by_split: dict[str, list[str]] = {}
    for name, task in tasks.items() if suite.alpha == "tune" else ():
        if task.config.metadata.get("tune_split"):
            by_split.setdefault(task.config.metadata["tune_split"], []).append(name)
    for split, names in by_split.items():
        others, lost = load_tasks(names, base, split)
        missing |= {f"{name} ({split})": error for name, error in lost.items()}
        hashes |= {f"{split} rows {name}": _rows_hash(task, None) for name, task in others.items()}
    if missing:
        folders = " ".join(f"--task {folder}" for folder in dict.fromkeys(error.task for error in missing.values()))
        raise RowsMissingError(
            f"memdec harness: expected rows of every task in MEMDEC_DATA or on the Hub, found none of {', '.join(missing)}; run "
            f"`memdec data fetch {folders}`, or leave these tasks out of the suite"
        )
    return tasks, hashes


def _rows_hash(task: RowsTask, limit: int | None) -> str:
    """Hash of the rows that are read; numbers of tokens do not count, as they depend on the tokenizer."""
    docs = task.eval_docs.select(rows.spread(len(task.eval_docs), limit))
    docs = docs.remove_columns([column for column in docs.column_names if column.endswith("_tokens")])
    return artefact.digest([json.dumps(row, default=str, sort_keys=True) for row in docs.to_list()])


# --- lm-eval --------------------------------------------------------------------------------------------------------


def _evaluated(
    model: WrappedLM, parts: Parts, tasks: dict[str, RowsTask], suite: Suite, out: Path
) -> tuple[dict[str, Any], dict[str, list[Sample]]]:
    """Results and samples of lm-eval, which are also written as its command line writes them."""
    named = {"pretrained": str(parts.base)} | {
        part: str(parts.of(part)) for part in model.system.needs if part != "base"
    }
    tracker = EvaluationTracker(output_path=str(out / "results.json"))
    manager = TaskManager(include_path=str(HARNESS_TASKS), include_defaults=False)
    read = rows.samples(tasks, suite.limit)
    found = simple_evaluate(
        model=model, model_args=named, tasks=list(tasks.values()), task_manager=manager, samples=read,
        batch_size=suite.batch_size, device=parts.device, bootstrap_iters=0, log_samples=True, evaluation_tracker=tracker,
    )  # fmt: skip
    assert found is not None
    results: dict[str, Any] = dict(found)
    samples: dict[str, list[Sample]] = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for task, each in samples.items():
        # The tracker makes texts of the answers where they stand, and logs its errors instead of raising them.
        tracker.save_results_samples(task_name=task, samples=_thinned(each))
        _check_written(out / f"samples_{task}_{tracker.date_id}.jsonl", len(each))
    return results, samples


def _thinned(samples: Sequence[Sample]) -> list[Sample]:
    """Copies of the samples of a task; for DCPMI without what repeats in every row.

    Each row of such a task asks for hundreds of words after its prompt, after the premise, and after a colon. Written
    plainly, all rows of Yahoo are over a gigabyte. So the words stand in the task's metadata (`scored_words` in the
    results file), the answers after premise and colon in the first row, and answers that no filter changed only under
    `resps`.
    """
    if not samples or len(samples[0]["arguments"][0]) != 3:
        return [dict(sample) for sample in samples]
    return [
        sample
        | {
            "arguments": [(context, "scored_words", limit) for context, _, limit in sample["arguments"]],
            "resps": sample["resps"] if not number else [sample["resps"][0], [], []],
            "filtered_resps": [],
        }
        for number, sample in enumerate(samples)
    ]


def _check_written(file: Path, n_rows: int) -> None:
    found = file.read_bytes().count(b"\n") if file.is_file() else 0
    if found != n_rows:
        raise ResourceError(f"{file}: expected {n_rows} rows, found {found}; check the disk and run it again")


def _weight_of(model: WrappedLM, task: str) -> float:
    """The weight of the second distribution that a task had."""
    chosen = model.get_model_info().get("alphas", {})
    return float(chosen[task]["alpha"]) if task in chosen else float(model.weight)


# --- records --------------------------------------------------------------------------------------------------------


def _records(task: RowsTask, results: dict[str, Any], samples: Sequence[Sample], seed: int) -> list[dict[str, Any]]:
    """One record for each metric of a task that can be better or worse."""
    name = task.task_name
    predicted = task.predictions(samples)
    labels = None
    if predicted is not None:
        known, chosen = predicted
        labels = dict.fromkeys(known, 0) | dict(Counter(chosen))
    found = []
    for metric, higher in task.higher_is_better().items():
        value = results["results"][name].get(f"{metric},none")
        if higher is None or value is None:
            continue
        low, high = interval(task.aggregation()[metric], [sample[metric] for sample in samples], seed)
        chosen_by = None if metric.startswith("acc_") else labels  # acc_sum and the like choose other labels
        found.append(
            {
                "task": name,
                "metric": metric,
                "value": float(value),
                "low": low,
                "high": high,
                "n": len(samples),
                "higher_is_better": bool(higher),
                "labels": chosen_by,
                "constant": chosen_by is not None and len(samples) > 1 and max(chosen_by.values()) == len(samples),
            }
        )
    return found


def interval(
    aggregation: Callable[[Sequence[Any]], float], items: Sequence[Any], seed: int
) -> tuple[float | None, float | None]:
    """95 % bootstrap interval of a metric over rows; (None, None) for a single row.

    Args:
        aggregation: The task's function from the items of all rows to the value.
        items: What the metric keeps of each row: a number, or the correct and the predicted label.
        seed: Of the resamples.
    """
    if len(items) < 2:
        return None, None
    name = aggregation.__name__
    if name == "mean":
        return statistics.mean_interval(items, n_resamples=RESAMPLES, seed=seed)
    rng = np.random.default_rng(seed)
    if name in compare.F1:  # counts of equal items are enough, and a hundred times as fast
        columns = np.array(items, np.int64).T
        kinds, counts = np.unique(columns, axis=1, return_counts=True)
        *groups, gold, predicted = kinds
        drawn = rng.multinomial(len(items), counts / len(items), size=RESAMPLES)
        group = groups[0] if groups else np.zeros_like(gold)
        found = [paired.grouped_f1(drawn, gold, predicted, average, group) for average in compare.F1[name]]
        replicates = np.mean(found, axis=0)
    else:
        drawn = rng.integers(0, len(items), size=(RESAMPLES, len(items)))
        replicates = np.array([aggregation([items[i] for i in draw]) for draw in drawn.tolist()])
    low, high = statistics.percentiles(replicates, 0.95)
    return float(low), float(high)
