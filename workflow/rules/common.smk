# Helpers of all rules. Paths: results/<scale>/..., one folder per artefact, manifest.json written last.
import json
import os
import shlex

import psutil
from pathlib import Path

from memdec import artifacts
from memdec.errors import ArtifactError

RUN = f"results/{config['scale']}"
LOG = f"{RUN}/logs"
BENCHMARK = f"{RUN}/benchmarks"
MODELS = config["models"]
TOKENIZER = MODELS[config["key_model"]]["tokenizer"]
# A stage whose results change for the same settings gets a new number; its rules then run again.
STAGE = dict(corpus=1, tokenizer=1, tokens=1, model=1, finetune=1, lora=1, datastore=2)
STAGE |= dict(index=2, targets=2, train=1, evaluate=1, table=1)


wildcard_constraints:
    corpus="[^/]+",
    domain="[^/]+",
    model="[^/]+",
    tokenizer="[^/]+",
    seed="[0-9]+",


# Shards of a stage are folders i-of-n; `--set-scatter targets=8` overrides the config.
scattergather:
    keys=config.get("datastore", {}).get("shards", 1),
    targets=config.get("targets", {}).get("shards", 1),


# On this machine `--cores` counts CPUs that are there, so --cores 8 on two CPUs starts two jobs at a time; memory
# likewise. Cluster executors keep their own limits.
if workflow.local_exec and workflow.global_resources["_cores"].value is not None:
    workflow.register_resource(
        "_cores", min(workflow.cores, len(os.sched_getaffinity(0)))
    )
    if "mem_mb" not in workflow.global_resources:
        workflow.register_resource(
            "mem_mb", int(psutil.virtual_memory().total / 2**20 * 0.9)
        )


def options(section, *leave):
    """Settings of one section of the config as command line options."""
    words = []
    for name, value in config.get(section, {}).items():
        if name in leave or value is None:
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, list) else [value]
            words += [f"--{flag} {v}" for v in values]
    return " ".join(words)


def shard(wildcards):
    """The shard of a scatter item i-of-n as command line options."""
    number, total = wildcards.scatteritem.split("-of-")
    return f"--shard {int(number) - 1} --shards {total}"


def folders(flag, manifests):
    return " ".join(f"--{flag} {os.path.dirname(path)}" for path in manifests)


def spec(section, name):
    """One entry of the config as JSON for the shell."""
    return shlex.quote(json.dumps(config[section][name], sort_keys=True))


def manifest(folder):
    return f"{folder}/manifest.json"


WINDOW = f"--context {config.get('context', 1024)} --stride {config.get('stride', 512)}"
CONTEXT = f"--context {config.get('context', 1024)}"


CELLS = [
    (domain, model, seed)
    for domain in config["domains"]
    for model in MODELS
    for seed in config.get("seeds", [0])
]


# Snakemake does not look at a missing intermediate file when everything after it is there. An artefact of a finished
# table that is gone or cut is made again, with what depends on it, as if it had been named with --forcerun.
def damaged():
    if not os.path.isfile("results/table3.csv"):
        return []
    kinds = {
        "corpus": [f"{RUN}/corpora/{name}" for name in config["corpora"]],
        "tokenizer": [f"{RUN}/tokenizers/{name}" for name in config["tokenizers"]],
        "tokens": [
            f"{RUN}/tokens/{TOKENIZER}/{domain}" for domain in config["domains"]
        ],
        "model": [f"{RUN}/models/{name}" for name in MODELS],
    }
    for domain, seed in {(domain, seed) for domain, _, seed in CELLS}:
        home = f"{RUN}/{domain}/seed{seed}"
        kinds["model"].append(f"{home}/finetuned/{config['key_model']}")
        for kind, names in {
            "datastore": gather.keys("datastore/{scatteritem}"),
            "index": ["index"],
            "targets": gather.targets("targets/{scatteritem}"),
            "memory": ["memory"],
            "lora": [f"lora/{name}" for name in MODELS],
            "evaluation": [f"evaluation/{name}" for name in MODELS],
        }.items():
            kinds.setdefault(kind, []).extend(f"{home}/{name}" for name in names)
    lost = []
    for kind, paths in kinds.items():
        for folder in paths:
            try:
                artifacts.read(Path(folder), kind)
            except ArtifactError:
                lost.append(manifest(folder))
    return lost


def config_file(wildcards):
    # Runs while the graph is built, before it is decided what has to run; the command line's own --forcerun is read
    # earlier, so there is no setting to extend.
    workflow.dag.forcefiles.update(damaged())
    return f"{RUN}/config.json"
