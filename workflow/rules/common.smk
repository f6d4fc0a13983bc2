# Helpers of all rules. Paths are results/<scale>/...: a folder per artefact, whose manifest.json is written last.
import glob
import json
import os
import re
import shlex

from memdec.artefacts import resources as machine
from memdec.artefacts.artefact import VERSIONS
from memdec.inference.systems import SYSTEMS
from memdec.results import catalogue, figure_catalogue

RUN = f"results/{CONFIG.scale}"
LOG = f"{RUN}/logs"
BENCHMARK = f"{RUN}/benchmarks"
HOME = f"{RUN}/{{domain}}/seed{{seed}}"
MODELS = CONFIG.models
MEMORIES = {name: CONFIG.variant(name) for name in CONFIG.memory_names}
# Parts (fields of `Parts`) that the systems of the config need.
NEEDED = {part for name in CONFIG.systems for part in SYSTEMS[name].needs}
# Whether jobs that run a model request a GPU. `auto` looks at this machine. If jobs run on other machines, set
# `compute: {device: cuda}` in the config, or the resource in the profile: `set-resources: {train: {gpu: 1}, ...}`.
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
    table="[^./]+",  # `results/table3.cells.csv` is a file of table3


# Each shard of a stage is a folder i-of-n; `--set-scatter targets=8` overrides the number in the config.
scattergather:
    keys=CONFIG.datastore.shards,
    targets=CONFIG.targets.shards,
    teacher=CONFIG.teacher.shards,


# Every word of a command that comes from the config or from a path goes through `words`. A `params` value with such words
# is a function, because Snakemake reads braces in a plain string as wildcards; `{name:q}` quotes files in a `shell:` line.
def words(*parts):
    """Format words for the shell, each quoted, so that no character of a config value has a meaning there."""
    return shlex.join(map(str, parts))


def options(settings, *leave):
    """Format a section of the config as command line options, without the names in `leave`."""
    found = []
    for name, value in settings.items():
        if name in leave or value is None:
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, list) else [value]
            found += [word for v in values for word in (f"--{flag}", v)]
    return words(*found)


def section(name):
    """What the config says in a section, as typed and checked values."""
    found = getattr(CONFIG, name)
    return {} if found is None else found.model_dump(mode="json", exclude_unset=True)


def shard(wildcards):
    """Format the scatter item i-of-n as command line options."""
    number, total = wildcards.scatteritem.split("-of-")
    return words("--shard", int(number) - 1, "--shards", total)


def named(wildcards, input):
    """Format named inputs as command line options; for a manifest.json, pass the folder of the artefact."""
    found = []
    for name, paths in input.items():
        for path in [paths] if isinstance(paths, str) else paths:
            folder, file = os.path.split(path)
            place = folder if file == "manifest.json" else path
            found += [f"--{name.replace('_', '-')}", place]
    return words(*found)


def spec(kind, name):
    """Format one entry of the config as an option with JSON."""
    entry = getattr(CONFIG, kind)[name].model_dump(mode="json", exclude_unset=True)
    return words("--spec", json.dumps(entry, sort_keys=True))


def local_files(entry):
    """The local files that an entry of the config is made from: its texts, or a pretrained model."""
    if isinstance(entry, typed.FileCorpus):
        named = [entry.path] if entry.path is not None else entry.paths.values()
    else:
        named = [getattr(entry, "pretrained", None), getattr(entry, "path", None)]
    for name in named:
        if not isinstance(name, str):  # a file in a wheel is known by its sha256
            continue
        if os.path.isdir(name):
            yield from (file.path for file in os.scandir(name))
        else:
            yield from (
                [name] if os.path.isfile(name) else glob.glob(name, recursive=True)
            )


def stamp(entry):
    """Names, sizes and times of local files, so that Snakemake notices other ones; the job compares their content."""
    return [
        (file, os.stat(file).st_size, os.stat(file).st_mtime_ns)
        for file in sorted(local_files(entry))
        if os.path.isfile(file)
    ]


def training(wildcards, *settings):
    """Options of a stage that trains on a domain."""
    return " ".join([*settings, CONTEXT, words("--seed", wildcards.seed), COMPUTE])


def sharded(wildcards, name):
    """Options of a stage that runs one job per shard."""
    return f"{options(section(name), 'shards')} {shard(wildcards)}"


def manifest(folder):
    return f"{folder}/manifest.json"


def home(wildcards):
    return f"{RUN}/{wildcards.domain}/seed{wildcards.seed}"


def tokens_of(model, domain):
    return manifest(f"{RUN}/tokens/{MODELS[model].tokenizer}/{domain}")


CONTEXT = words("--context", CONFIG.context)
WINDOW = words("--context", CONFIG.context, "--stride", CONFIG.stride)
COMPUTE = options(section("compute"))
DEVICE = options(section("compute"), "precision")


# --- budget ---------------------------------------------------------------------------------------------------------

BUDGET = (
    [manifest(f"{RUN}/models/{CONFIG.budget.model}")]
    if CONFIG.budget is not None
    else []
)


def budget(share=1.0):
    """Option with the FLOP budget, in epochs of the model in the input `budget_model`."""
    if CONFIG.budget is None:
        return ""
    return words("--budget-epochs", f"{CONFIG.budget.epochs * share:g}")


# --- keys and memories ----------------------------------------------------------------------------------------------


def key_name(wildcards):
    """Name of the model that makes the keys; the suffix `UNTUNED` means the model before fine-tuning."""
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
    """Model from which the training of a memory starts."""
    memory = MEMORIES[wildcards.memory]
    if memory.adapt is not None:
        return manifest(f"{home(wildcards)}/adapted/{memory.name}")
    if memory.tuned_start:
        return manifest(f"{home(wildcards)}/finetuned/{memory.memory_model}")
    return manifest(f"{RUN}/models/{memory.memory_model}")


def memory_targets(wildcards):
    """All shards of the targets that a memory is trained on."""
    memory = MEMORIES[wildcards.memory]
    keys = f"{home(wildcards)}/keys/{memory.keys}"
    return {
        "knn": gather.targets(f"{keys}/targets/{{scatteritem}}/manifest.json"),
        "teacher": gather.teacher(f"{keys}/teacher/{{scatteritem}}/manifest.json"),
        "none": [],
    }[memory.targets]


def memory_bases(wildcards):
    """Base models for evaluations during training; none if there are no such evaluations."""
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

# Without its own settings or a budget, DAPT is the same training as that of the key models, so its folder is reused.
DAPT = "finetuned" if CONFIG.dapt is None and CONFIG.budget is None else "dapt"


def evaluated_memory(wildcards):
    memory = MEMORIES[wildcards.memory]
    if memory.other_domain:
        other = CONFIG.next_domain(wildcards.domain)
        return manifest(f"{RUN}/{other}/seed{wildcards.seed}/memory/{typed.DEFAULT_MEMORY}")
    return manifest(
        f"{home(wildcards)}/{DAPT}/{memory.memory_model}"
        if memory.dapt
        else f"{home(wildcards)}/memory/{memory.name}"
    )


def control(wildcards):
    """Option that allows a memory of another domain."""
    return ["--control"] if MEMORIES[wildcards.memory].other_domain else []


# Corpora of general text, to measure forgetting.
GENERAL = [manifest(f"{RUN}/corpora/{name}") for name in CONFIG.forgetting]


def own_keys(wildcards):
    """Datastore and index made with the base itself, for the kNN-LM."""
    if "datastore" not in NEEDED:
        return {}
    return keys_and_index(wildcards, f"{wildcards.model}{typed.UNTUNED}")


def keys_of_memory(wildcards):
    """Datastore and index whose targets trained a memory."""
    return keys_and_index(wildcards, MEMORIES[wildcards.memory].keys)


def keys_and_index(wildcards, key):
    keys = f"{home(wildcards)}/keys/{key}"
    return {
        "datastore": gather.keys(f"{keys}/datastore/{{scatteritem}}/manifest.json"),
        "index": manifest(f"{keys}/index"),
    }


def evaluation(wildcards):
    return " ".join(
        [
            options(section("evaluate")),
            WINDOW,
            words("--seed", wildcards.seed),
            COMPUTE,
        ]
    )


def passages_of(wildcards):
    if "passages" not in NEEDED:
        return []
    tokenizer = MODELS[wildcards.model].tokenizer
    return [manifest(f"{RUN}/passages/{tokenizer}/{wildcards.domain}")]


# --- tables -----------------------------------------------------------------------------------------------------------


def table_of(wildcards):
    """Definition of a table; an unknown name stops Snakemake with a one-line error."""
    try:
        return catalogue.table(CONFIG, wildcards.table)
    except ConfigError as error:
        raise WorkflowError(str(error)) from None


def part_folder(part):
    """Where an artefact that a table is made from is; nothing else says so."""
    if part.kind == "corpus":
        return f"{RUN}/corpora/{part.domain}"
    if part.kind == "harness" and part.system == "base":  # the same for all domains and seeds
        return f"{RUN}/harness/{part.suite}/{part.model}"
    kind = part.kind if part.suite is None else f"{part.kind}/{part.suite}"
    return f"{RUN}/{part.domain}/seed{part.seed}/{kind}/{part.name}/{part.model}"


def table_parts(wildcards):
    return [manifest(part_folder(part)) for part in table_of(wildcards).parts]


def table_cells(wildcards):
    """Format the parts of a table as command line options."""
    cells = []
    for part in table_of(wildcards).parts:
        where = f"{part.domain}:{part.model}:{part.seed}"
        cells += ["--cell", f"{where}:{part_folder(part)}"]
    return words(*cells)
