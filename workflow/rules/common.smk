# Helpers of all rules. Paths are results/<scale>/...: a folder per artefact, whose manifest.json is written last.
import functools
import glob
import json
import math
import os
import re
import shlex
import sys
from itertools import product

from snakemake.logging import logger

from memdec.artefacts import sources
from memdec.artefacts.artefact import VERSIONS, digest
from memdec.artefacts.provenance import package_folder, package_version, python_files
from memdec.artefacts.stamps import Stamps
from memdec.inference.systems import SYSTEMS
from memdec.planning import plan, rates
from memdec.planning.costs import Costs, Job
from memdec.planning.sizes import UnknownSizeError
from memdec.results import catalogue, figure_catalogue, paper
from memdec.results import claims as judged
from memdec.tasks import needed

RUN = f"results/{CONFIG.scale}"
LOG = f"{RUN}/logs"
CONFIG_FILE = f"{RUN}/config.json"
STAMPS = Stamps(Path(".snakemake/memdec-hashes.json"))
BENCHMARK = f"{RUN}/benchmarks"
# What is made for a domain: `home` is the domain, or STUDY/DOMAIN for a study with settings of its own (`at`).
HOME = f"{RUN}/{{home}}/seed{{seed}}"
MODELS = CONFIG.models
STUDIES = CONFIG.every_study()  # None is the common part
MEMORIES = {name for study in STUDIES.values() for name in study.memory_names}
# Whether jobs that run a model request a GPU. `auto` looks at this machine. If jobs run on other machines, set
# `compute: {device: cuda}` in the config, or the resource in the profile: `set-resources: {train: {gpu: 1}, ...}`.
GPU = int(plan.uses_gpu(CONFIG))


wildcard_constraints:
    corpus="[^/]+",
    home=f"({'|'.join(re.escape(f'{name}/') for name in CONFIG.studies)})?[^/]+",
    key="[^/]+",
    memory="|".join(re.escape(name) for name in sorted(MEMORIES)),
    model="[^/]+",
    tokenizer="[^/]+",
    seed="[0-9]+",
    system="|".join(system.slug for system in SYSTEMS.values()),
    suite="[^/]+",
    # `results/table3.cells.csv` is a file of table3; claims and figures have rules of their own.
    table=f"(?!({'|'.join(['claims', *figure_catalogue.FIGURES])})\\.)[^./]+",


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


def section(config, name):
    """A section of the config as typed and checked values, with defaults: another default is noticed, too."""
    found = getattr(config, name)
    return {} if found is None else found.model_dump(mode="json", exclude_none=True)


def cells_searched(targets):
    """How many cells of the index the targets search, as an option: their number, or the bound that chooses it."""
    if targets.max_tv is not None:
        return words("--max-tv", targets.max_tv)
    return words("--nprobe", targets.nprobe or typed.NPROBE)


def shard(wildcards):
    """Format the scatter item i-of-n as command line options."""
    number, total = wildcards.scatteritem.split("-of-")
    return words("--shard", int(number) - 1, "--shards", total)


def named(wildcards, input):
    """Format named inputs as command line options; for a manifest.json, pass the folder of the artefact."""
    found = []
    for name, paths in input.items():
        if name == "beside":
            continue
        for path in [paths] if isinstance(paths, str) else paths:
            folder, file = os.path.split(path)
            place = folder if file == "manifest.json" else path
            found += [f"--{name.replace('_', '-')}", place]
    return words(*found)


def spec(kind, name):
    """Format one entry of the config as an option with JSON."""
    entry = getattr(CONFIG, kind)[name].model_dump(
        mode="json", exclude_unset=True, exclude={"shape", "expected_bytes"}
    )
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
        if os.path.isdir(name) and isinstance(entry, typed.HubCorpus):
            yield from sources.visible(Path(name))
        elif os.path.isdir(name):
            yield from sorted(
                sources.deciding(
                    Path(name), weights=not isinstance(entry, typed.TokenizerSpec)
                )
            )
        else:
            files = [name] if os.path.isfile(name) else glob.glob(name, recursive=True)
            if isinstance(entry, typed.FileCorpus) and not files:
                gone(name)
            yield from sorted(map(Path, files))


@functools.cache
def gone(name):
    """Stop, as Snakemake would remove a finished corpus before the job finds no text; a dry run only warns.

    Raises:
        WorkflowError: This is no dry run.
    """
    fault = f"corpora: expected text in {name}, found no such file; put it there, or change the config"
    if (
        workflow.is_main_process and not workflow.dryrun
    ):  # a job on another machine may not see it
        raise WorkflowError(fault)
    logger.warning(fault)


def stamp(entry):
    """What Snakemake notices about the source of an entry: names and content of its files."""
    if isinstance(entry, typed.DocstringCorpus):
        return [of_package(name) for name in entry.packages]
    return content(*local_files(entry))


@functools.cache
def of_package(name):
    """Name, version and content of a package whose docstrings are read, and the Python that parses them."""
    folder = package_folder(name)
    files = [] if folder is None else python_files(folder)
    found = [str(file.relative_to(folder)) for file in files]
    hashes = digest(list(zip(found, STAMPS.of(files))))
    return name, package_version(name), hashes, sys.version_info[:2]


def content(*files):
    """Names and hashes of the files that are there: a copy, a fresh checkout or another folder changes nothing."""
    there = [Path(file) for file in files if os.path.isfile(file)]
    return list(zip([file.name for file in there], STAMPS.of(there)))


def training(wildcards, model, *settings):
    """Options of a stage that trains a model on a domain."""
    return " ".join(
        [*settings, CONTEXT, words("--seed", wildcards.seed), compute(model)]
    )


def tuned_by(wildcards, settings, place):
    """The same training with the first seed, whose learning rate the other seeds take."""
    first = first_seed(wildcards)
    if not settings.learning_rates or int(wildcards.seed) == first:
        return []
    return [manifest(f"{RUN}/{wildcards.home}/seed{first}/{place}")]


def sharded(wildcards, name, *leave):
    """Options of a stage that runs one job per shard, without the names in `leave`."""
    return f"{options(section(study(wildcards), name), 'shards', *leave)} {shard(wildcards)}"


def fetched(entries):
    """A pattern for the names of entries that need the network, or local files where no folder is shared."""
    names = [
        re.escape(name)
        for name, entry in entries.items()
        if isinstance(entry, typed.HubCorpus)
        or APART
        and isinstance(entry, typed.FileCorpus)
        or getattr(entry, "pretrained", None) is not None
    ]
    return "|".join(names) or "(?!)"  # which matches nothing


# Without a shared folder (`--default-storage-provider`) only the inputs and outputs of a job are copied, so there an
# artefact is its whole folder. With one it is the manifest: Snakemake would empty a folder that is an output before a
# retry, with the checkpoints from which the stage resumes.
APART = workflow.storage_settings.default_storage_provider is not None
FOLDER = "{output.manifest:q}" if APART else '"$(dirname {output.manifest:q})"'


def manifest(folder):
    """What stands for an artefact among the inputs of a rule."""
    return folder if APART else f"{folder}/manifest.json"


def built(folder):
    """What stands for an artefact among the outputs of a rule."""
    return directory(folder) if APART else manifest(folder)


def beside(*paths):
    """Artefacts that another one names and a stage reads without an option: they must travel, and no more."""
    return {"beside": [*paths]} if APART else {}


def folder_of(path):
    """Folder of the artefact that an input stands for."""
    return path if APART else os.path.dirname(path)


def tokens_of(model, domain):
    return manifest(f"{RUN}/tokens/{MODELS[model].tokenizer}/{domain}")


CONTEXT = words("--context", CONFIG.context)
WINDOW = words("--context", CONFIG.context, "--stride", CONFIG.stride)
DEVICE = options(section(CONFIG, "compute"), "precision")


def compute(model):
    """Device and precision of a job with a model."""
    return options(section(settings_for(None, model), "compute"))


def launched(model):
    """What starts a stage that several processes can share."""
    found = CONFIG.per_model.get(model, configs.ForModel())
    if found.launch is None:
        return "memdec"
    if found.launch == "torchrun":
        start = ("torchrun", "--standalone", "--nproc-per-node", found.gpus)
    else:
        start = ("accelerate", "launch", "--num_processes", found.gpus)
        start += ("--config_file", os.path.abspath(found.launch))
    return words(*start, "-m", "memdec.cli")


COSTS = Costs(CONFIG, rates.load(), Path(RUN), gpu=bool(GPU))
UNKNOWN = {
    "mem_mb": 8000,
    "disk_mb": 1000,
    "runtime": 600,
}  # of a job whose model or text nothing gives the size of


def requested(rule):
    """Memory, disk and minutes that a job of a rule requests, by the formulas of `memdec plan`; a retry asks for more."""

    def request(name, of):
        def asked(wildcards, attempt):
            try:
                cost = COSTS.of(Job(rule, dict(wildcards.items())))
            except UnknownSizeError:
                return UNKNOWN[name] * attempt
            return math.ceil(of(cost)) * attempt

        return asked

    return {
        "cpu": lambda wildcards, threads: threads,
        "mem_mb": request("mem_mb", lambda cost: 1.25 * cost.memory / 1e6),
        # Without a shared folder the inputs are copied first.
        "disk_mb": request(
            "disk_mb",
            lambda cost: 10 + (2 * cost.disk + 1.25 * cost.reads * APART) / 1e6,
        ),
        # Processors differ by a factor of three, and a job that is stopped is lost work.
        "runtime": request("runtime", lambda cost: 30 + 3 * cost.seconds / 60),
    }


def computing(rule, launched=False):
    """The same for a job that runs models, and its GPUs; several processes can share a stage with `launched`."""

    def gpu(wildcards):
        return GPU * CONFIG.gpus(model_of(wildcards), launched=launched)

    return {**requested(rule), "gpu": gpu}


def model_of(wildcards):
    """Name of the model that a job runs."""
    if "model" in wildcards.keys():
        return wildcards.model
    if "key" in wildcards.keys():
        return key_name(wildcards.key)
    found = memory(wildcards)
    return found.key_model if found.neighbours else found.memory_model


# --- studies ---------------------------------------------------------------------------------------------------------


def domain_of(wildcards):
    return os.path.basename(wildcards.home)


def study_of(wildcards):
    """Name of the study of a home; None: the common part."""
    return os.path.dirname(wildcards.home) or None


def study(wildcards):
    """Config of the study of a home."""
    return STUDIES[study_of(wildcards)]


@functools.cache
def settings_for(study, model):
    return STUDIES[study].for_model(model)


def for_model(wildcards, model=None):
    """Config of the study of a home for jobs with a model; default: that of the job."""
    return settings_for(study_of(wildcards), model or wildcards.model)


@functools.cache
def home(study, domain, *kinds):
    """The home with the artefacts of these kinds that a study needs; studies with the same settings share it."""
    owner = configs.owner(STUDIES, study, *kinds)
    return domain if owner is None else f"{owner}/{domain}"


def at(wildcards, *kinds, seed=None):
    """Folder with the artefacts of these kinds for the study, domain and seed of a job, or for another seed."""
    place = home(study_of(wildcards), domain_of(wildcards), *kinds)
    return f"{RUN}/{place}/seed{wildcards.seed if seed is None else seed}"


def first_seed(wildcards):
    """The seed that has what all seeds of a study share."""
    return study(wildcards).seeds[0]


# --- budget ---------------------------------------------------------------------------------------------------------


def budget_model(wildcards):
    limit = study(wildcards).budget
    return [] if limit is None else [manifest(f"{RUN}/models/{limit.model}")]


def budget(wildcards, share=1.0):
    """Option with the FLOP budget, in epochs of the model in the input `budget_model`."""
    limit = study(wildcards).budget
    return (
        "" if limit is None else words("--budget-epochs", f"{limit.epochs * share:g}")
    )


# --- keys and memories ----------------------------------------------------------------------------------------------


def key_name(key):
    """Name of the model that makes the keys; the suffix `UNTUNED` means the model before fine-tuning."""
    return key.removesuffix(typed.UNTUNED)


def key_model(wildcards, key=None):
    key = key or wildcards.key
    name = key_name(key)
    return manifest(
        f"{at(wildcards, 'finetuned')}/finetuned/{name}"
        if name == key
        else f"{RUN}/models/{name}"
    )


def key_tokens(wildcards, key=None):
    return tokens_of(key_name(key or wildcards.key), domain_of(wildcards))


def behind_keys(wildcards, key):
    """What a datastore names: its model, for new keys, and its tokens, which are the values."""
    return beside(key_model(wildcards, key), key_tokens(wildcards, key))


def of_keys(wildcards, key, kind):
    """Folder of what is made from the keys of a model; of a model as it is, they are the same for all seeds."""
    shared = key.endswith(typed.UNTUNED)
    seed = first_seed(wildcards) if shared else wildcards.seed
    return f"{at(wildcards, kind, seed=seed)}/keys/{key}/{kind}"


def datastore(wildcards, key):
    """All shards of a datastore."""
    shards = of_keys(wildcards, key, "datastore")
    return gather.keys(manifest(f"{shards}/{{scatteritem}}"))


def targets(wildcards, key):
    """All shards of the kNN targets of a key model."""
    shards = of_keys(wildcards, key, "targets")
    return gather.targets(manifest(f"{shards}/{{scatteritem}}"))


def index(wildcards, key):
    return manifest(of_keys(wildcards, key, "index"))


def keys_and_index(wildcards, key):
    return {
        "datastore": datastore(wildcards, key),
        "index": index(wildcards, key),
        **behind_keys(wildcards, key),
    }


def memory_study(wildcards):
    """Config of the first study with the memory of a job that is made from the same artefacts."""
    domain = domain_of(wildcards)
    for name, config in STUDIES.items():
        if domain not in config.domains or wildcards.memory not in config.memory_names:
            continue
        kinds = memory_kinds(config.variant(wildcards.memory))
        if home(name, domain, *kinds) == home(study_of(wildcards), domain, *kinds):
            return config
    raise WorkflowError(
        f"{wildcards.home}: expected a memory of a study of this domain, found {wildcards.memory}; see 'memories' of the "
        "config"
    )


def memory(wildcards):
    return memory_study(wildcards).variant(wildcards.memory)


def memory_start(wildcards):
    """Model from which the training of a memory starts."""
    found = memory(wildcards)
    if found.adapt is not None:
        return manifest(f"{at(wildcards, 'memory')}/adapted/{found.name}")
    if found.tuned_start:
        return manifest(f"{at(wildcards, 'finetuned')}/finetuned/{found.memory_model}")
    return manifest(f"{RUN}/models/{found.memory_model}")


def memory_targets(wildcards):
    """All shards of the targets that a memory is trained on."""
    found = memory(wildcards)
    if found.targets == "none":
        return []
    kind = "targets" if found.targets == "knn" else found.targets
    shards = of_keys(wildcards, found.keys, kind)
    parts = gather.targets if kind == "targets" else gather.teacher
    return parts(manifest(f"{shards}/{{scatteritem}}"))


def calibration(wildcards, key=None):
    """The choice of the targets' settings; none if the config states them."""
    if study(wildcards).calibrate is None:
        return []
    return [manifest(of_keys(wildcards, key or wildcards.key, "calibration"))]


def memory_bases(wildcards):
    """Base models for evaluations during training; none if there are no such evaluations."""
    return [manifest(f"{RUN}/models/{name}") for name in memory(wildcards).watched]


def memory_options(wildcards):
    return options(memory(wildcards).train.model_dump(mode="json", exclude_none=True))


# --- evaluations ----------------------------------------------------------------------------------------------------


def dapt_settings(wildcards):
    """Name of the section with the training of DAPT."""
    return "finetune" if for_model(wildcards).dapt is None else "dapt"


def dapt(wildcards, model):
    """A model after DAPT. Without its own settings or a budget, DAPT is the training of the key models: one folder."""
    config = for_model(wildcards, model)
    kind = "finetuned" if config.dapt is None and config.budget is None else "dapt"
    return manifest(f"{at(wildcards, kind)}/{kind}/{model}")


def evaluated_memory(wildcards):
    """The memory, or the model that is mixed in as one; `control` allows one of another domain."""
    found = memory(wildcards)
    if found.neighbours:
        return []
    if found.dapt:
        return dapt(wildcards, found.memory_model)
    if not found.other_domain:
        return memory_folder(wildcards, found)
    config = memory_study(wildcards)
    default, domain = config.variant(typed.DEFAULT_MEMORY), config.next_domain(
        domain_of(wildcards)
    )
    if default.ready:
        return manifest(f"{RUN}/models/{default.ready[domain]}")
    other = home(config.study_name, domain, "memory")
    return manifest(f"{RUN}/{other}/seed{wildcards.seed}/memory/{default.name}")


def memory_folder(wildcards, found):
    """A memory of its own: one that is trained here, or a model that is one already."""
    if found.ready:
        return manifest(f"{RUN}/models/{found.ready[domain_of(wildcards)]}")
    return manifest(f"{at(wildcards, 'memory')}/memory/{found.name}")


def neighbours_instead(wildcards):
    """What stands in the place of a memory that is p_kNN itself."""
    found = memory(wildcards)
    if not found.neighbours:
        return {}
    return {
        **keys_and_index(wildcards, found.keys),
        "key_model": key_model(wildcards, found.keys),
    }


def control(wildcards):
    return ["--control"] if memory(wildcards).other_domain else []


def general(wildcards):
    """Corpora of general text, to measure forgetting."""
    return [manifest(f"{RUN}/corpora/{name}") for name in study(wildcards).forgetting]


def passages(wildcards):
    tokenizer = MODELS[wildcards.model].tokenizer
    return manifest(f"{RUN}/passages/{tokenizer}/{domain_of(wildcards)}")


# Where each part of a system is (fields of `Parts`); the kNN-LM has keys made with the base itself.
PARTS = {
    "lora": lambda w: manifest(f"{at(w, 'lora')}/lora/{w.model}"),
    "dapt": lambda w: dapt(w, w.model),
    "datastore": lambda w: datastore(w, f"{w.model}{typed.UNTUNED}"),
    "index": lambda w: index(w, f"{w.model}{typed.UNTUNED}"),
    "passages": passages,
}
BY_SLUG = {system.slug: system for system in SYSTEMS.values()}


def system_parts(wildcards):
    """Parts of a system besides the base and a memory."""
    needed = BY_SLUG[wildcards.system].needs
    parts = {name: PARTS[name](wildcards) for name in needed if name in PARTS}
    if "datastore" in parts:
        parts |= behind_keys(wildcards, f"{wildcards.model}{typed.UNTUNED}")
    return parts


def system_kinds(system):
    """Kinds of the artefacts that a system is made from."""
    return tuple(name for name in system.needs if name in configs.MADE_OF)


def memory_kinds(memory):
    if memory.neighbours:
        return ("finetuned", "datastore", "index")
    return ("memory", "dapt") if memory.dapt else ("memory",)


def base_evaluation(wildcards):
    """The evaluation of the base alone, with the scores of its tokens; one for all seeds."""
    place = at(wildcards, "evaluation", seed=first_seed(wildcards))
    folder = f"{place}/evaluation/{typed.WITHOUT_MEMORY}"
    return manifest(f"{folder}/{SYSTEMS['base'].slug}/{wildcards.model}")


def some_of(config, names):
    """What a config says of an evaluation, as far as it decides the numbers of a stage, or their speed."""
    said = section(config, "evaluate")
    return options({name: value for name, value in said.items() if name in names})


def scoring(wildcards):
    searched = typed.SEARCHED if memory(wildcards).neighbours else ()
    return some_of(study(wildcards), {"batch_size", *searched})


def mixing(wildcards):
    grid = "lambdas" if memory(wildcards).neighbours else "alphas"
    return some_of(for_model(wildcards), {"resamples", grid})


def evaluation(wildcards):
    return " ".join(
        [
            some_of(
                for_model(wildcards),
                {"batch_size", *typed.of_system(BY_SLUG[wildcards.system].name)},
            ),
            WINDOW,
            words("--seed", wildcards.seed),
            compute(wildcards.model),
        ]
    )
