# With `keep_keys: false`, keys and indexes that only targets are made from are removed once these are there. It happens on
# the way to `results/all` alone: a single table does not say what else will be made from them. Snakemake's `temp()` cannot
# do it: an artefact is its manifest here, and keys that are made again would make everything behind them again.
if not CONFIG.keep_keys and APART:
    raise WorkflowError(
        "keep_keys: expected true without a shared folder, found false; leave it out, and remove the keys from the storage"
    )


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
                if memory.own and memory.targets in ("knn", "mixture"):
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


rule free_keys:
    input:
        unpack(lambda w: removable()[w.home, int(w.seed), w.key]),
    output:
        f"{HOME}/keys/{{key}}/freed.json",
    log:
        f"{LOG}/free/{{home}}-{{seed}}-{{key}}.log",
    priority: 10
    localrule: True
    conda:
        "../../environment.yml"
    params:
        inputs=named,
    shell:
        "memdec free {params.inputs} --out {output:q} > {log:q} 2>&1"
