def own_targets(wildcards):
    """All shards of the kNN targets of the keys that belong to a memory, whatever it was trained on."""
    keys = f"{at(wildcards, 'targets')}/keys/{memory(wildcards).keys}"
    return gather.targets(f"{keys}/targets/{{scatteritem}}/manifest.json")


def own_tokens(wildcards):
    return tokens_of(memory(wildcards).key_model, domain_of(wildcards))


def own_key_model(wildcards):
    """The model that gives a memory's keys."""
    found = memory(wildcards)
    tuned = f"{at(wildcards, 'finetuned')}/finetuned"
    return manifest(f"{tuned if found.tuned else f'{RUN}/models'}/{found.key_model}")


def compared(wildcards, name):
    """Options of the stages that compare a memory with its targets."""
    who = words("--name", wildcards.memory, *control(wildcards))
    given = options(section(study(wildcards), name), "seed")
    return f"{who} {given} {WINDOW} {words('--seed', wildcards.seed)} {COMPUTE}"


use rule finetune as fidelity with:
    input:
        memory=evaluated_memory,
        targets=own_targets,
        tokens=own_tokens,
    output:
        manifest=f"{HOME}/fidelity/{{memory}}/manifest.json",
    log:
        f"{LOG}/fidelity/{{home}}-{{seed}}-{{memory}}.log",
    benchmark:
        f"{BENCHMARK}/fidelity/{{home}}-{{seed}}-{{memory}}.tsv"
    priority: 0
    params:
        command="fidelity",
        options=lambda w: compared(w, "fidelity"),
        version=VERSIONS["fidelity"],


use rule fidelity as shapes with:
    input:
        model=own_key_model,
        memory=evaluated_memory,
        targets=own_targets,
        tokens=own_tokens,
    output:
        manifest=f"{HOME}/shapes/{{memory}}/manifest.json",
    log:
        f"{LOG}/shapes/{{home}}-{{seed}}-{{memory}}.log",
    benchmark:
        f"{BENCHMARK}/shapes/{{home}}-{{seed}}-{{memory}}.tsv"
    params:
        command="shapes",
        options=lambda w: compared(w, "shapes"),
        version=VERSIONS["shapes"],


def latency_options(wildcards, input):
    """Options of a measurement; a datastore and its index are one option."""
    stores = "+".join(os.path.dirname(store) for store in input.datastore)
    knn = words("--knn", f"{stores}:{os.path.dirname(input.index)}")
    return f"{knn} {options(section(study(wildcards), 'latency'))} {COMPUTE}"


# Times mean nothing while other jobs run, so it takes all processors and starts last.
use rule finetune as latency with:
    input:
        base=f"{RUN}/models/{{model}}/manifest.json",
        memory=evaluated_memory,
        tokens=lambda w: tokens_of(w.model, domain_of(w)),
        passages=PARTS["passages"],
        datastore=PARTS["datastore"],
        index=PARTS["index"],
    output:
        manifest=f"{HOME}/latency/{{memory}}/{{model}}/manifest.json",
    log:
        f"{LOG}/latency/{{home}}-{{seed}}-{{memory}}-{{model}}.log",
    benchmark:
        f"{BENCHMARK}/latency/{{home}}-{{seed}}-{{memory}}-{{model}}.tsv"
    priority: -10
    threads: workflow.cores
    params:
        command="latency",
        inputs=lambda w, input: named(
            w, {name: input[name] for name in ("base", "memory", "tokens", "passages")}
        ),
        options=latency_options,
        version=VERSIONS["latency"],


def figure_of(wildcards):
    """Definition of a figure in its study; one that cannot be stops Snakemake with a one-line error."""
    try:
        return figure_catalogue.figure(CONFIG, wildcards.figure)
    except ConfigError as error:
        raise WorkflowError(str(error)) from None


ruleorder: claims > figure > table


# memdec/results/figure_catalogue.py defines the figures and their parts.
use rule table as figure with:
    input:
        config=CONFIG_FILE,
        parts=lambda w: part_manifests(figure_of(w)),
        table=lambda w: [f"results/{name}.cells.csv" for name in figure_of(w).tables],
    output:
        csv="results/{figure}.csv",
        svg=report(
            "results/{figure}.svg",
            caption="../report/table.rst",
            category="Figures",
            labels={"figure": "{figure}"},
        ),
        png="results/{figure}.png",
        provenance="results/{figure}.provenance.json",
    log:
        f"{LOG}/{{figure}}.log",
    benchmark:
        f"{BENCHMARK}/{{figure}}.tsv"
    wildcard_constraints:
        figure="|".join(figure_catalogue.FIGURES),
    params:
        command="figure",
        options=lambda w, input: " ".join(
            [
                words("--name", w.figure),
                part_cells(figure_of(w)),
                named(w, {"table": input.table}),
            ]
        ),
        caption=lambda w: figure_of(w).caption,
        version=VERSIONS["figure"],
