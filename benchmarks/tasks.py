"""Run zero-shot and domain tasks with the models of a finished run: `python -m benchmarks.tasks RESULTS [--limit 12]`.

RESULTS is results/<scale> of a Snakemake run with DAPT, LoRA and MemDec. The nine DCPMI tasks and the thirteen domain
tasks run on some rows of each, by `memdec.results.harness`, with each task's alpha of the paper, or else 0.6. A task
without rows under MEMDEC_DATA gets a line that says so. An accuracy on few rows only shows that the code runs; it is not
a result.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd

from memdec.artefacts import artefact
from memdec.results import harness
from memdec.settings import DEFAULT_MEMORY, Suite

DCPMI = [f"dcpmi_{name}_kp" for name in ("sst2", "mr", "cr", "rt", "hyp", "cb", "rte", "agn", "yahoo")]
TINY = ["dcpmi_cb_kl", "memdec_scotus"]  # a tiny tokenizer has no label word as one token, which _kp needs
COLUMNS = ["task", "metric", "n", "base", "DAPT", "LoRA", "MemDec", "alpha", "note"]
BATCH = 16  # prompts of 2,048 tokens and a vocabulary of 50,000 are 6 GB of logits in float32


def base_folder(results: Path) -> Path:
    """The first base model."""
    config = json.loads((results / "config.json").read_text(encoding="utf-8"))
    return results / "models" / str((config.get("evaluated") or list(config["models"]))[0])


def systems(results: Path) -> dict[str, dict[str, Any]]:
    """Parts of each system of the first base model, the most important first, in case of a time limit."""
    config = json.loads((results / "config.json").read_text(encoding="utf-8"))
    home = results / config["domains"][0] / f"seed{config.get('seeds', [0])[0]}"
    name = base_folder(results).name
    tuned = next(home / kind / name for kind in ("dapt", "finetuned") if (home / kind / name).is_dir())
    memory = str(home / "memory" / DEFAULT_MEMORY)
    return {"base": {}, "MemDec": {"memory": memory}, "DAPT": {"dapt": tuned}, "LoRA": {"lora": home / "lora" / name}}


def metric(task: str) -> str:
    """The metric that the paper reports for a task."""
    return "acc" if task.startswith("dcpmi") else "score"


def main() -> int:
    """Evaluate and write the CSV after each system; return 1 on a failure, or if no task has rows (unless --tiny)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--limit", type=int, default=12, help="rows of each task")
    parser.add_argument("--tiny", action="store_true", help="two rows of two tasks")
    parser.add_argument("--out", type=Path, default=Path("results/gpu/tasks.csv"))
    args = parser.parse_args()
    names, limit = (TINY, 2) if args.tiny else ([*DCPMI, "memdec_domain"], args.limit)
    base = str(base_folder(args.results))
    loaded, missing = harness.load_tasks(names, base)
    rows: dict[str, dict[str, Any]] = {name: {"task": name, "metric": metric(name)} for name in [*loaded, *missing]}
    for name, error in missing.items():
        rows[name] |= {"n": "0", "note": f"no rows: {str(error).split(';')[0]}"}

    def write() -> None:
        table = pd.DataFrame(list(rows.values()), columns=COLUMNS)
        artefact.write_text(args.out, table.to_csv(index=False, lineterminator="\n"))

    args.out.parent.mkdir(parents=True, exist_ok=True)
    write()
    failed = not loaded and not args.tiny
    suite = Suite(tasks=list(loaded) or TINY, limit=limit, batch_size=BATCH)
    for system, parts in systems(args.results).items() if loaded else ():
        begin, folder = time.perf_counter(), args.results / "tasks" / system
        try:
            harness.run(base, suite, folder, seed=0, **parts)
        except Exception as error:  # after any error, the other systems still run
            failed = True
            for name in loaded:
                why = f"{system}: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
                rows[name]["note"] = "; ".join(filter(None, [rows[name].get("note"), why]))
        else:
            for record in json.loads((folder / "records.json").read_text(encoding="utf-8")):
                row = rows[record["task"]]
                if record["metric"] == row["metric"]:
                    row |= {system: f"{record['value']:.4f}", "n": str(record["n"])}
                    row |= {"alpha": record["alpha"]} if system == "MemDec" else {}
        write()
        print(f"{system}: {time.perf_counter() - begin:.0f} s", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
