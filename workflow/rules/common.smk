# Helpers of all rules. Paths: results/<scale>/..., one folder per artefact, manifest.json written last.
import json
import os
import shlex

import psutil

RUN = f"results/{config['scale']}"
LOG = f"{RUN}/logs"
BENCHMARK = f"{RUN}/benchmarks"
MODELS = config["models"]
TOKENIZER = MODELS[config["key_model"]]["tokenizer"]
SHARDS = config.get("targets", {}).get("shards", 1)
# A stage whose results change for the same settings gets a new number; its rules then run again.
STAGE = dict(corpus=1, tokenizer=1, tokens=1, model=1, finetune=1, lora=1, datastore=1)
STAGE |= dict(index=1, targets=1, train=1, evaluate=1, table=1)


wildcard_constraints:
    corpus="[^/]+",
    domain="[^/]+",
    model="[^/]+",
    tokenizer="[^/]+",
    seed="[0-9]+",
    shard="[0-9]+",


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


def spec(section, name):
    """One entry of the config as JSON for the shell."""
    return shlex.quote(json.dumps(config[section][name], sort_keys=True))


def manifest(folder):
    return f"{folder}/manifest.json"


WINDOW = f"--context {config.get('context', 1024)} --stride {config.get('stride', 512)}"
CONTEXT = f"--context {config.get('context', 1024)}"
