# Helpers of all rules. Paths: results/<scale>/..., one folder per artefact, manifest.json written last.
import json
import os
import re
import shlex

import psutil
from pathlib import Path

from memdec.artefacts import artefact, resources as machine
from memdec.errors import ArtifactError

RUN = f"results/{CONFIG.scale}"
LOG = f"{RUN}/logs"
BENCHMARK = f"{RUN}/benchmarks"
HOME = f"{RUN}/{{domain}}/seed{{seed}}"
MODELS = CONFIG.models
MEMORIES = {name: CONFIG.variant(name) for name in CONFIG.memory_names}
SYSTEMS = set(CONFIG.systems)
# Models whose tokenizer is not the key model's: Table 4.
OWN = [
    name
    for name in CONFIG.bases
    if MODELS[name].tokenizer == MODELS[CONFIG.key_model].tokenizer
]
OTHERS = [name for name in CONFIG.bases if name not in OWN]
# A stage whose results change for the same settings gets a new number; its rules then run again.
STAGE = dict(corpus=1, tokenizer=1, tokens=1, model=2, finetune=2, lora=2, datastore=2)
STAGE |= dict(index=2, targets=2, teacher=1, adapt=1, train=2, passages=1)
STAGE |= dict(evaluate=2, table=1)


wildcard_constraints:
    corpus="[^/]+",
    domain="[^/]+",
    key="[^/]+",
    memory="|".join(re.escape(name) for name in MEMORIES),
    model="[^/]+",
    tokenizer="[^/]+",
    seed="[0-9]+",


# Shards of a stage are folders i-of-n; `--set-scatter targets=8` overrides the config.
scattergather:
    keys=CONFIG.datastore.shards,
    targets=CONFIG.targets.shards,
    teacher=CONFIG.teacher.shards,


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


# A rule that computes takes the GPU where the config may use one, and by default only one of them runs at a time here.
HERE = workflow.local_exec
ON_GPU = CONFIG.compute.device == "cuda" or (
    CONFIG.compute.device == "auto" and (not HERE or machine.has_gpu())
)
GPU = int(ON_GPU)
if HERE and ON_GPU and "gpu" not in workflow.global_resources:
    workflow.register_resource("gpu", 1)


def options(settings, *leave):
    """Settings, as a section of the config has them, as command line options."""
    words = []
    for name, value in settings.items():
        if name in leave or value is None:
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, list) else [value]
            words += [f"--{flag} {v}" for v in values]
    return " ".join(words)


def section(name):
    return config.get(name) or {}


def shard(wildcards):
    """The shard of a scatter item i-of-n as command line options."""
    number, total = wildcards.scatteritem.split("-of-")
    return f"--shard {int(number) - 1} --shards {total}"


def folders(flag, manifests):
    return " ".join(f"--{flag} {os.path.dirname(path)}" for path in manifests)


def spec(kind, name):
    """One entry of the config as JSON for the shell."""
    entry = getattr(CONFIG, kind)[name].model_dump(mode="json", exclude_unset=True)
    return shlex.quote(json.dumps(entry, sort_keys=True))


def manifest(folder):
    return f"{folder}/manifest.json"


def home(wildcards):
    return f"{RUN}/{wildcards.domain}/seed{wildcards.seed}"


def tokens_of(model, domain):
    return manifest(f"{RUN}/tokens/{MODELS[model].tokenizer}/{domain}")


WINDOW = f"--context {CONFIG.context} --stride {CONFIG.stride}"
CONTEXT = f"--context {CONFIG.context}"
COMPUTE = options(section("compute"))
DEVICE = options(section("compute"), "precision")


# --- budget ---------------------------------------------------------------------------------------------------------

BUDGET = (
    [manifest(f"{RUN}/models/{CONFIG.budget.model}")]
    if CONFIG.budget is not None
    else []
)


def budget(input, share=1.0):
    """Options for at most the budget's operations."""
    if not input.budget:
        return ""
    epochs = CONFIG.budget.epochs * share
    return f"{folders('budget-model', input.budget)} --budget-epochs {epochs:g}"


# --- keys and memories ----------------------------------------------------------------------------------------------


def key_name(wildcards):
    """Model of a folder of keys, which are those of the plain model where the name says so."""
    return wildcards.key.removesuffix(typed.UNTUNED)


def key_model(wildcards):
    name = key_name(wildcards)
    return manifest(
        f"{home(wildcards)}/finetuned/{name}"
        if name == wildcards.key
        else f"{RUN}/models/{name}"
    )


def key_tokens(wildcards):
    return tokens_of(key_name(wildcards), wildcards.domain)


def memory_start(wildcards):
    """What the training of a memory begins with."""
    memory = MEMORIES[wildcards.memory]
    if memory.adapt is not None:
        return manifest(f"{home(wildcards)}/adapted/{memory.name}")
    if memory.tuned_start:
        return manifest(f"{home(wildcards)}/finetuned/{memory.memory_model}")
    return manifest(f"{RUN}/models/{memory.memory_model}")


def memory_targets(wildcards):
    """All shards of what a memory imitates."""
    memory = MEMORIES[wildcards.memory]
    keys = f"{home(wildcards)}/keys/{memory.keys}"
    return {
        "knn": gather.targets(f"{keys}/targets/{{scatteritem}}/manifest.json"),
        "teacher": gather.teacher(f"{keys}/teacher/{{scatteritem}}/manifest.json"),
        "none": [],
    }[memory.targets]


def memory_bases(wildcards):
    """Base models that alpha is tried with during training, where there are evaluations during training."""
    memory = MEMORIES[wildcards.memory]
    during = memory.train.keep_best or memory.train.evaluate_every is not None
    return (
        [manifest(f"{RUN}/models/{name}") for name in memory.models] if during else []
    )


def memory_options(wildcards):
    return options(
        MEMORIES[wildcards.memory].train.model_dump(mode="json", exclude_unset=True)
    )


# --- evaluations ----------------------------------------------------------------------------------------------------

# What is evaluated without a memory; the base alone comes with every evaluation.
ALONE = SYSTEMS - {"base", "MemDec"} or "MemDec" not in SYSTEMS


# DAPT without settings or a budget of its own is the training that key models have.
DAPT = "finetuned" if CONFIG.dapt is None and CONFIG.budget is None else "dapt"


def evaluated_memory(wildcards):
    memory = MEMORIES[wildcards.memory]
    return manifest(
        f"{home(wildcards)}/{DAPT}/{memory.memory_model}"
        if memory.dapt
        else f"{home(wildcards)}/memory/{memory.name}"
    )


# General text, to see what is forgotten.
GENERAL = [manifest(f"{RUN}/corpora/{name}") for name in CONFIG.forgetting]


def own_keys(wildcards):
    """Datastore and index of the base's own keys, for the kNN-LM."""
    if "kNN-LM" not in SYSTEMS:
        return {"datastore": [], "index": []}
    keys = f"{home(wildcards)}/keys/{wildcards.model}{typed.UNTUNED}"
    return {
        "datastore": gather.keys(f"{keys}/datastore/{{scatteritem}}/manifest.json"),
        "index": [manifest(f"{keys}/index")],
    }


def passages_of(wildcards):
    if "In-Context RAG" not in SYSTEMS:
        return []
    tokenizer = MODELS[wildcards.model].tokenizer
    return [manifest(f"{RUN}/passages/{tokenizer}/{wildcards.domain}")]


def evaluated_parts(input):
    """What is evaluated beside the base, as command line options."""
    names = ("lora", "dapt", "datastore", "index", "passages")
    return " ".join(folders(name, getattr(input, name)) for name in names)


def evaluations(models, memories):
    """(domain, model, seed, folder) of what is evaluated with these memories and without one."""
    parts = [(model, typed.SYSTEMS) for model in models if ALONE]
    if "MemDec" in SYSTEMS:
        parts += [(m, name) for name in memories for m in MEMORIES[name].models]
    return [
        (domain, model, seed, f"{RUN}/{domain}/seed{seed}/evaluation/{name}/{model}")
        for domain in CONFIG.domains
        for model, name in parts
        if model in models
        for seed in CONFIG.seeds
    ]


def first_memories(models):
    """The memory of each tokenizer that Tables 3 and 4 show."""
    if "MemDec" not in SYSTEMS:
        return []
    return list(dict.fromkeys(CONFIG.memory_for(model).name for model in models))


# Evaluations of each table; Table 1 has one domain.
CELLS = {
    "table1": [
        cell
        for cell in evaluations(OWN, first_memories(OWN))
        if cell[0] == CONFIG.domains[0]
    ],
    "table3": evaluations(OWN, first_memories(OWN)),
    "table4": evaluations(OTHERS, first_memories(OTHERS)),
    "memories": evaluations(CONFIG.bases, MEMORIES),
}


def cells(table):
    """The evaluations of a table as command line options."""
    return " ".join(f"--cell {d}:{m}:{seed}:{f}" for d, m, seed, f in CELLS[table])


# Snakemake does not look at a missing intermediate file when everything after it is there. An artefact of a finished
# table that is gone or cut is made again, with what depends on it, as if it had been named with --forcerun. What the
# table at hand does not need may be in the list; it changes nothing.
def damaged(table):
    if not os.path.isfile(f"results/{table}.csv"):
        return []
    kinds = {
        "corpus": [f"{RUN}/corpora/{name}" for name in CONFIG.corpora],
        "tokenizer": [f"{RUN}/tokenizers/{name}" for name in CONFIG.tokenizers],
        "tokens": [
            f"{RUN}/tokens/{tokenizer}/{domain}"
            for tokenizer in CONFIG.tokenizers
            for domain in CONFIG.domains
        ],
        "model": [f"{RUN}/models/{name}" for name in MODELS],
        "evaluation": [folder for *_, folder in CELLS.get(table, [])],
        "passages": [
            f"{RUN}/passages/{tokenizer}/{domain}"
            for tokenizer in CONFIG.tokenizers
            for domain in CONFIG.domains
        ],
    }
    keys = {memory.keys for memory in MEMORIES.values()}
    keys |= {f"{name}{typed.UNTUNED}" for name in CONFIG.bases}
    for domain in CONFIG.domains:
        for seed in CONFIG.seeds:
            for kind, pattern, names in [
                ("model", "finetuned/{}", MODELS),
                ("model", "dapt/{}", MODELS),
                ("model", "adapted/{}", MEMORIES),
                ("memory", "memory/{}", MEMORIES),
                ("lora", "lora/{}", MODELS),
                ("index", "keys/{}/index", keys),
                *[
                    ("datastore", f"keys/{{}}/datastore/{i}", keys)
                    for i in gather.keys("{scatteritem}")
                ],
                *[
                    ("targets", f"keys/{{}}/targets/{i}", keys)
                    for i in gather.targets("{scatteritem}")
                ],
                *[
                    ("targets", f"keys/{{}}/teacher/{i}", keys)
                    for i in gather.teacher("{scatteritem}")
                ],
            ]:
                place = f"{RUN}/{domain}/seed{seed}"
                kinds.setdefault(kind, []).extend(
                    f"{place}/{pattern.format(name)}" for name in names
                )
    lost = []
    for kind, paths in kinds.items():
        for folder in paths:
            try:
                artefact.read(Path(folder), kind)
            except ArtifactError:
                lost.append(manifest(folder))
    return lost


def config_file(table):
    """Input function: the resolved config, and what is lost of a table."""

    def path(wildcards):
        # Runs while the graph is built, before it is decided what has to run; the command line's own --forcerun is
        # read earlier, so there is no setting to extend.
        workflow.dag.forcefiles.update(damaged(table))
        return f"{RUN}/config.json"

    return path
