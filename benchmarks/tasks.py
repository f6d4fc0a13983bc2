"""Run zero-shot and domain tasks with the models of a finished run: `python -m benchmarks.tasks RESULTS [--limit 12]`.

RESULTS is results/<scale> of a Snakemake run with DAPT, LoRA and MemDec. The nine DCPMI tasks and the thirteen domain
tasks run on the first rows of each. Base, DAPT and LoRA run through lm-eval's `hf`, MemDec through `memdec-interp` with
its default alpha (the paper's for a task that has one, else 0.6). A task without rows under MEMDEC_DATA gets a line
that says so. An accuracy on few rows only shows that the code runs; it is not a result.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from memdec import HARNESS_TASKS
from memdec.artefacts import artefact, devices
from memdec.errors import MemDecError
from memdec.settings import DEFAULT_MEMORY

DCPMI = [f"dcpmi_{name}_kp" for name in ("sst2", "mr", "cr", "rt", "hyp", "cb", "rte", "agn", "yahoo")]
DOMAIN = [
    "memdec_chemprot", "memdec_mqp", "pubmedqa", "memdec_rct", "memdec_usmle",
    "memdec_fiqa_sa", "memdec_fpb", "memdec_headline", "memdec_ner", "memdec_convfinqa",
    "memdec_scotus", "memdec_casehold", "memdec_unfair_tos",
]  # fmt: skip
TINY = ["dcpmi_cb_kl", "memdec_scotus"]  # a tiny tokenizer has no label word as one token, which _kp needs
COLUMNS = ["task", "metric", "n", "base", "DAPT", "LoRA", "MemDec", "alpha", "note"]
BATCH = 16  # prompts of 2,048 tokens and a vocabulary of 50,000 are 6 GB of logits in float32


def base_folder(results: Path) -> Path:
    """The first base model."""
    config = json.loads((results / "config.json").read_text(encoding="utf-8"))
    return results / "models" / str((config.get("evaluated") or list(config["models"]))[0])


def systems(results: Path) -> dict[str, Callable[[], Any]]:
    """lm-eval arguments of each system of the first base model, the most important first, in case of a time limit."""
    config = json.loads((results / "config.json").read_text(encoding="utf-8"))
    home = results / config["domains"][0] / f"seed{config.get('seeds', [0])[0]}"
    base, name = str(base_folder(results)), base_folder(results).name
    tuned = next(home / kind / name for kind in ("dapt", "finetuned") if (home / kind / name).is_dir())
    kwargs = {"batch_size": BATCH, "dtype": devices.precision(), "device": str(devices.pick())}

    def plain(folder: str, **more: str) -> Any:
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=folder, **more, **kwargs)

    def mixed() -> Any:
        from memdec.harness.models import MemDecInterp

        return MemDecInterp(pretrained=base, memory=str(home / "memory" / DEFAULT_MEMORY), **kwargs)

    return {
        "base": lambda: plain(base),
        "MemDec": mixed,
        "DAPT": lambda: plain(str(tuned)),
        "LoRA": lambda: plain(base, peft=str(home / "lora" / name)),
    }


def score(model: Any, task: str, loaded: dict[str, Any], limit: int) -> tuple[float, int]:
    """Value of a task's metric and the number of rows."""
    from lm_eval import evaluate

    for each in loaded["tasks"].values():  # as `simple_evaluate` does
        if each.get_config("num_fewshot") is None:
            each.set_config("num_fewshot", 0)
        each.set_fewshot_seed(seed=1234)
    results = evaluate(model, loaded, limit=limit, bootstrap_iters=0, log_samples=False)
    return float(results["results"][task][f"{metric(task)},none"]), int(results["n-samples"][task]["effective"])


def metric(task: str) -> str:
    """The metric that the paper reports for a task."""
    return "acc" if task.startswith("dcpmi") else "score"


def main() -> int:
    """Evaluate and write the CSV after each task; return 1 on a failure, or if no task has rows (unless --tiny)."""
    from lm_eval.tasks import TaskManager

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--limit", type=int, default=12, help="rows of each task")
    parser.add_argument("--tiny", action="store_true", help="two rows of two tasks")
    parser.add_argument("--out", type=Path, default=Path("results/gpu/tasks.csv"))
    args = parser.parse_args()
    names, limit = (TINY, 2) if args.tiny else (DCPMI + DOMAIN, args.limit)
    made = systems(args.results)
    # None of lm-eval's own tasks is needed; loading them reads thousands of files.
    words = {"tokenizer": str(base_folder(args.results))}
    manager = TaskManager(include_path=str(HARNESS_TASKS), include_defaults=False, metadata=words)
    rows: dict[str, dict[str, Any]] = {name: {"task": name, "metric": metric(name)} for name in names}
    loaded: dict[str, Any] = {}

    def write() -> None:
        table = pd.DataFrame(list(rows.values()), columns=COLUMNS)
        artefact.write_text(args.out, table.to_csv(index=False, lineterminator="\n"))

    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        try:
            loaded[name] = manager.load([name])
        except MemDecError as error:
            rows[name] |= {"n": "0", "note": f"no rows: {str(error).split(';')[0]}"}
    write()
    failed = not loaded and not args.tiny
    for system, make in made.items() if loaded else ():
        begin = time.perf_counter()
        model = make()
        for name, task in loaded.items():
            try:
                value, n = score(model, name, task, limit)
                rows[name] |= {system: f"{value:.4f}", "n": str(n)}
            except Exception as error:  # after any error, the other tasks still run
                failed = True
                why = f"{system}: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
                rows[name]["note"] = "; ".join(filter(None, [rows[name].get("note"), why]))
            if system == "MemDec":
                known = model.get_model_info().get("alphas") or {}
                rows[name]["alpha"] = known.get(name, {}).get("alpha", model.weight)
            write()
        print(f"{system}: {time.perf_counter() - begin:.0f} s", flush=True)
        del model
        gc.collect()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
