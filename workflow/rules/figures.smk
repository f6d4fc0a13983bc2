def own_targets(wildcards):
    """All shards of the kNN targets of the keys that belong to a memory, whatever it was trained on."""
    keys = f"{home(wildcards)}/keys/{MEMORIES[wildcards.memory].keys}"
    return gather.targets(f"{keys}/targets/{{scatteritem}}/manifest.json")


def own_tokens(wildcards):
    return tokens_of(MEMORIES[wildcards.memory].key_model, wildcards.domain)


def own_key_model(wildcards):
    """The model that gives a memory's keys."""
    memory = MEMORIES[wildcards.memory]
    folder = f"{home(wildcards)}/finetuned" if memory.tuned else f"{RUN}/models"
    return manifest(f"{folder}/{memory.key_model}")


def compared(wildcards, name):
    """Options of the stages that compare a memory with its targets."""
    named = words("--name", wildcards.memory, *control(wildcards))
    return f"{named} {options(section(name), 'seed')} {WINDOW} {words('--seed', wildcards.seed)} {COMPUTE}"


use rule finetune as fidelity with:
    input:
        memory=evaluated_memory,
        targets=own_targets,
        tokens=own_tokens,
    output:
        manifest=f"{HOME}/fidelity/{{memory}}/manifest.json",
    log:
        f"{LOG}/fidelity/{{domain}}-{{seed}}-{{memory}}.log",
    benchmark:
        f"{BENCHMARK}/fidelity/{{domain}}-{{seed}}-{{memory}}.tsv"
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
        f"{LOG}/shapes/{{domain}}-{{seed}}-{{memory}}.log",
    benchmark:
        f"{BENCHMARK}/shapes/{{domain}}-{{seed}}-{{memory}}.tsv"
    params:
        command="shapes",
        options=lambda w: compared(w, "shapes"),
        version=VERSIONS["shapes"],


def latency_options(wildcards, input):
    """Options of a measurement; a datastore and its index are one option."""
    stores = "+".join(os.path.dirname(store) for store in input.datastore)
    knn = words("--knn", f"{stores}:{os.path.dirname(input.index)}")
    return f"{knn} {options(section('latency'))} {COMPUTE}"


# Times mean nothing while other jobs run, so it takes all processors and starts last.
use rule finetune as latency with:
    input:
        base=f"{RUN}/models/{{model}}/manifest.json",
        memory=f"{HOME}/memory/{{memory}}/manifest.json",
        tokens=lambda w: tokens_of(w.model, w.domain),
        passages=lambda w: manifest(
            f"{RUN}/passages/{MODELS[w.model].tokenizer}/{w.domain}"
        ),
        datastore=lambda w: keys_and_index(w, f"{w.model}{typed.UNTUNED}")["datastore"],
        index=lambda w: keys_and_index(w, f"{w.model}{typed.UNTUNED}")["index"],
    output:
        manifest=f"{HOME}/latency/{{memory}}/{{model}}/manifest.json",
    log:
        f"{LOG}/latency/{{domain}}-{{seed}}-{{memory}}-{{model}}.log",
    benchmark:
        f"{BENCHMARK}/latency/{{domain}}-{{seed}}-{{memory}}-{{model}}.tsv"
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
    """Definition of a figure; one that cannot be stops Snakemake with a one-line error."""
    try:
        return figure_catalogue.figure(CONFIG, wildcards.figure)
    except ConfigError as error:
        raise WorkflowError(str(error)) from None


def figure_folder(made, part):
    """Folder of one part; latency depends on the base model, too."""
    base = f"/{part.model}" if made.kind == "latency" else ""
    return f"{RUN}/{part.domain}/seed{part.seed}/{made.kind}/{part.name}{base}"


def figure_cells(wildcards):
    made = figure_of(wildcards)
    cells = []
    for part in made.parts:
        where = f"{part.domain}:{part.model}:{part.seed}"
        cells += ["--cell", f"{where}:{figure_folder(made, part)}"]
    return words(*cells)


ruleorder: figure > table


# memdec/results/figure_catalogue.py defines the figures and their parts.
rule figure:
    input:
        config=f"{RUN}/config.json",
        parts=lambda w: [
            manifest(figure_folder(figure_of(w), part)) for part in figure_of(w).parts
        ],
        tables=lambda w: [
            f"results/{name}.cells.csv" for name in figure_of(w).tables
        ],
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
    wildcard_constraints:
        figure="|".join(figure_catalogue.FIGURES),
    log:
        f"{LOG}/{{figure}}.log",
    benchmark:
        f"{BENCHMARK}/{{figure}}.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        cpu=1,
        mem_mb=500,
        runtime=10,
    params:
        cells=figure_cells,
        tables=lambda w, input: words(
            *(word for path in input.tables for word in ("--table", path))
        ),
        caption=lambda w: figure_of(w).caption,
        version=VERSIONS["figure"],
    shell:
        "memdec figure --name {wildcards.figure:q} --config {input.config:q} {params.cells} {params.tables} "
        "--out {output.csv:q} > {log:q} 2>&1"
