# Helpers of the rules that run tasks, and that make tables and figures: which artefacts they are made from, and where.
# --- tasks ------------------------------------------------------------------------------------------------------------


def tuning(system, suite):
    """Kind of the evaluation whose weight and settings a system takes to the tasks of a suite, if it takes any."""
    tuned = system.weight == "alpha" and CONFIG.suites[suite].alpha == "valid"
    return ("evaluation",) if tuned or system.slug in SEARCHING else ()


# Their temperature and queries are settings of the evaluation.
SEARCHING = [
    slug for slug, each in BY_SLUG.items() if {"index", "passages"} & {*each.needs}
]


def tuned_memory(wildcards):
    if not tuning(SYSTEMS["MemDec"], wildcards.suite):
        return []
    place = at(wildcards, *memory_kinds(memory(wildcards)), "evaluation")
    return manifest(f"{place}/evaluation/{wildcards.memory}/{wildcards.model}")


def tuned_system(wildcards):
    system = BY_SLUG[wildcards.system]
    if not tuning(system, wildcards.suite):
        return []
    place = at(wildcards, *system_kinds(system), "evaluation")
    folder = f"{place}/evaluation/{typed.WITHOUT_MEMORY}"
    return manifest(f"{folder}/{wildcards.system}/{wildcards.model}")


def suite_rows(wildcards):
    """What Snakemake notices about a suite: definitions of its tasks and their rows. It is asked before any job starts.

    Raises:
        WorkflowError: There are none of a task; in a dry run that is a warning.
    """
    suite = CONFIG.suites[wildcards.suite]
    if (fault := rows_missing(wildcards.suite)) is not None and not workflow.dryrun:
        raise WorkflowError(fault)
    return [
        *map(needed.definition, needed.leaves(suite.tasks)),
        *content(*needed.found(suite.tasks, tune=suite.alpha == "tune")),
    ]


@functools.cache
def rows_missing(suite):
    """What rows a suite lacks here, or None; in a dry run it is also said, once."""
    found = CONFIG.suites[suite]
    try:
        needed.check(
            found.tasks, tune=found.alpha == "tune", ask_hub=not workflow.dryrun
        )
    except ConfigError as error:
        fault = f"suites.{suite}: {error}"
        if workflow.dryrun:
            logger.warning(fault)
        return fault
    return None


def tasks(wildcards):
    """Options of a run over the tasks of a suite."""
    seed = words("--seed", wildcards.get("seed", 0))
    return " ".join([spec("suites", wildcards.suite), seed, compute(wildcards.model)])


def suite_base(wildcards):
    suite_rows(wildcards)
    return manifest(f"{RUN}/models/{wildcards.model}")


# --- tables -----------------------------------------------------------------------------------------------------------


def table_of(wildcards):
    """Definition of a table in its study; an unknown name stops Snakemake with a one-line error."""
    try:
        return catalogue.table(CONFIG, wildcards.table)
    except ConfigError as error:
        raise WorkflowError(str(error)) from None


def part_folder(config, part):
    """Folder of an artefact that a table or figure of a study is made from; nothing else says where it is."""
    config = config if part.study is None else STUDIES[part.study]
    if part.kind == "corpus":
        return f"{RUN}/corpora/{part.domain}"
    if part.kind == "harness" and part.system == "base":
        return f"{RUN}/harness/{part.suite}/{part.model}"
    if part.kind == "finetuned":
        place = home(config.study_name, part.domain, "finetuned")
        return f"{RUN}/{place}/seed{part.seed}/finetuned/{part.model}"
    system = SYSTEMS[part.system]
    kinds = system_kinds(system)
    if part.memory is not None:
        kinds = memory_kinds(config.variant(part.memory))
    if part.kind == "harness":
        place = home(
            config.study_name, part.domain, *kinds, *tuning(system, part.suite)
        )
        return f"{RUN}/{place}/seed{part.seed}/harness/{part.suite}/{part.name}/{part.model}"
    place = home(config.study_name, part.domain, *kinds, part.kind)
    folder = f"{RUN}/{place}/seed{part.seed}/{part.kind}/{part.name}"
    around = part.kind not in ("fidelity", "memory", "shapes")  # a base model
    return f"{folder}/{part.model}" if around else folder


def part_cells(made, paths):
    """Format the parts of a table or figure, which are in these input files, as command line options."""
    cells = []
    for part, path in zip(made.parts, paths, strict=True):
        where = f"{part.domain}:{part.model}:{part.seed}"
        cells += ["--cell", f"{where}:{folder_of(path)}"]
    return words(*cells)


def part_manifests(made):
    return [manifest(part_folder(made.config, part)) for part in made.parts]


def wanted(kind):
    """Names of the tables or figures that some study fills; without studies, of all that the config can fill."""
    known = {"table": catalogue.TABLES, "figure": figure_catalogue.FIGURES}[kind]
    if CONFIG.studies:
        named = [name for study in CONFIG.studies.values() for name in study.tables]
        return sorted({name for name in named if name in known}, key=[*known].index)
    return [name for name, make in known.items() if can_be_filled(make)]


def can_be_filled(make):
    try:
        make(CONFIG)
    except ConfigError:
        return False
    return True


# --- figures ----------------------------------------------------------------------------------------------------------


def own_targets(wildcards):
    """All shards of the kNN targets of the keys that belong to a memory, whatever it was trained on."""
    return targets(wildcards, memory(wildcards).keys)


def own_tokens(wildcards):
    return key_tokens(wildcards, memory(wildcards).keys)


def own_key_model(wildcards):
    """The model that gives a memory's keys."""
    return key_model(wildcards, memory(wildcards).keys)


def compared(wildcards, name):
    """Options of the stages that compare a memory with its targets."""
    who = words("--name", wildcards.memory, *control(wildcards))
    given = options(section(study(wildcards), name), "seed")
    on = compute(memory(wildcards).key_model)
    return f"{who} {given} {WINDOW} {words('--seed', wildcards.seed)} {on}"


# A parameter that takes `input` is not compared with that of the last run, so settings are in one of their own.
def latency_options(wildcards):
    """Options of a measurement."""
    on = compute(wildcards.model)
    return f"{options(section(study(wildcards), 'latency'))} {on}"


def datastore_and_index(wildcards, input):
    """A datastore and its index, which are one option."""
    stores = "+".join(folder_of(store) for store in input.datastore)
    return words("--knn", f"{stores}:{folder_of(input.index)}")


def figure_of(wildcards):
    """Definition of a figure in its study; one that cannot be stops Snakemake with a one-line error."""
    try:
        return figure_catalogue.figure(CONFIG, wildcards.figure)
    except ConfigError as error:
        raise WorkflowError(str(error)) from None


# --- keys that are removed ----------------------------------------------------------------------------------------------


@functools.cache
def removable():
    """Datastores that nothing in the config reads for long: for (home, seed, key), the inputs of `free_keys`."""
    found, read_again, compared = {}, set(), []
    for name, config in STUDIES.items():
        if name is None and CONFIG.studies:
            continue
        for domain in config.domains:
            for seed, memory in product(config.seeds, config.memory_names):
                memory = config.variant(memory)
                store = (home(name, domain, "datastore"), seed, memory.keys)
                # The kNN-LM of a base, and its latency, read the keys of the model as it was before tuning.
                if (
                    memory.neighbours
                    or not memory.tuned
                    or config.cases
                    and domain == config.domains[0]
                ):
                    read_again.add(store)
                made = made_for(name, domain, seed, memory)
                if (
                    memory.own
                    and not memory.ready
                    and memory.targets in ("knn", "mixture")
                ):
                    parts = found.setdefault(store, {each: set() for each in made})
                    for each, files in made.items():
                        parts[each].update(files)
                else:
                    compared.append((store, made["targets"]))
    # Fidelity and shapes compare a memory with the targets of its keys, whatever it was trained on.
    for store, files in compared:
        if store in found and not found[store]["targets"].issuperset(files):
            read_again.add(store)
    return {
        store: {each: sorted(files) for each, files in parts.items()}
        for store, parts in found.items()
        if store not in read_again
    }


def made_for(study, domain, seed, memory):
    """The keys of a memory, and what is made from them before it is trained."""

    def place(kind):
        return f"{RUN}/{home(study, domain, kind)}/seed{seed}/keys/{memory.keys}/{kind}"

    chosen = STUDIES[study].calibrate is not None
    return {
        "datastore": gather.keys(manifest(f"{place('datastore')}/{{scatteritem}}")),
        "index": [manifest(place("index"))],
        "targets": gather.targets(manifest(f"{place('targets')}/{{scatteritem}}")),
        "beside": [manifest(place("calibration"))] if chosen else [],
    }


def freed():
    """What says that keys were removed; nothing if they are to be kept."""
    stores = [] if CONFIG.keep_keys else removable()
    return [
        f"{RUN}/{home}/seed{seed}/keys/{key}/freed.json" for home, seed, key in stores
    ]
