# Helpers of all rules. Paths: results/<scale>/..., one folder per artefact, manifest.json written last.
import json
import os
import re
import shlex

from memdec import catalogue, resources as machine
from memdec.artifacts import VERSIONS

RUN = f"results/{CONFIG.scale}"
LOG = f"{RUN}/logs"
BENCHMARK = f"{RUN}/benchmarks"
HOME = f"{RUN}/{{domain}}/seed{{seed}}"
MODELS = CONFIG.models
MEMORIES = {name: CONFIG.variant(name) for name in CONFIG.memory_names}
SYSTEMS = set(CONFIG.systems)
# Whether jobs that compute ask for a GPU. With `auto` this machine decides, so where jobs run on other machines the config
# has `compute: {device: cuda}`, or the profile sets the resource: `set-resources: {train: {gpu: 1}, ...}`.
GPU = int(
    CONFIG.compute.device == "cuda"
    or CONFIG.compute.device == "auto"
    and machine.has_gpu()
)


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


def named(wildcards, input):
    """The inputs by their names, as command line options; an artefact is given as its folder."""
    words = []
    for name, paths in input.items():
        for path in [paths] if isinstance(paths, str) else paths:
            folder, file = os.path.split(path)
            place = folder if file == "manifest.json" else path
            words.append(f"--{name.replace('_', '-')} {place}")
    return " ".join(words)


def spec(kind, name):
    """One entry of the config as a command line option with JSON."""
    entry = getattr(CONFIG, kind)[name].model_dump(mode="json", exclude_unset=True)
    return f"--spec {shlex.quote(json.dumps(entry, sort_keys=True))}"


def training(wildcards, *settings):
    """Options of a training on a domain."""
    return " ".join([*settings, CONTEXT, f"--seed {wildcards.seed}", COMPUTE])


def sharded(wildcards, name):
    """Options of a stage whose shards are jobs of their own."""
    return f"{options(section(name), 'shards')} {shard(wildcards)}"


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


def budget(share=1.0):
    """With the input `budget_model`: at most so many operations."""
    if CONFIG.budget is None:
        return ""
    return f"--budget-epochs {CONFIG.budget.epochs * share:g}"


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
        return {}
    return keys_and_index(wildcards, f"{wildcards.model}{typed.UNTUNED}")


def keys_of_memory(wildcards):
    """Datastore and index that a memory was trained on."""
    return keys_and_index(wildcards, MEMORIES[wildcards.memory].keys)


def keys_and_index(wildcards, key):
    keys = f"{home(wildcards)}/keys/{key}"
    return {
        "datastore": gather.keys(f"{keys}/datastore/{{scatteritem}}/manifest.json"),
        "index": manifest(f"{keys}/index"),
    }


def evaluation(wildcards):
    return f"{options(section('evaluate'))} {WINDOW} --seed {wildcards.seed} {COMPUTE}"


def passages_of(wildcards):
    if "In-Context RAG" not in SYSTEMS:
        return []
    tokenizer = MODELS[wildcards.model].tokenizer
    return [manifest(f"{RUN}/passages/{tokenizer}/{wildcards.domain}")]


# --- tables -----------------------------------------------------------------------------------------------------------


def table_of(wildcards):
    """What is in a table; says what is wrong where there is no such table."""
    try:
        return catalogue.table(CONFIG, wildcards.table)
    except ConfigError as error:
        raise WorkflowError(str(error)) from None


def part_folder(kind, part):
    return f"{RUN}/{part.domain}/seed{part.seed}/{kind}/{part.name}/{part.model}"


def table_parts(wildcards):
    table = table_of(wildcards)
    return [manifest(part_folder(table.kind, part)) for part in table.parts]


def table_cells(wildcards):
    """What a table is made from as command line options."""
    table = table_of(wildcards)
    return " ".join(
        f"--cell {part.domain}:{part.model}:{part.seed}:{part_folder(table.kind, part)}"
        for part in table.parts
    )
