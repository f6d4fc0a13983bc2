use rule finetune as fidelity with:
    input:
        memory=evaluated_memory,
        targets=own_targets,
        tokens=own_tokens,
    output:
        manifest=built(f"{HOME}/fidelity/{{memory}}"),
    log:
        f"{LOG}/fidelity/{{home}}-{{seed}}-{{memory}}.log",
    benchmark:
        f"{BENCHMARK}/fidelity/{{home}}-{{seed}}-{{memory}}.tsv"
    priority: 0
    resources:
        **computing("fidelity"),
    params:
        launch="memdec",
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
        manifest=built(f"{HOME}/shapes/{{memory}}"),
    log:
        f"{LOG}/shapes/{{home}}-{{seed}}-{{memory}}.log",
    benchmark:
        f"{BENCHMARK}/shapes/{{home}}-{{seed}}-{{memory}}.tsv"
    resources:
        **computing("shapes"),
    params:
        command="shapes",
        options=lambda w: compared(w, "shapes"),
        version=VERSIONS["shapes"],


# Times mean nothing while other jobs run, so it takes all processors and starts last.
use rule finetune as latency with:
    input:
        unpack(lambda w: behind_keys(w, f"{w.model}{typed.UNTUNED}")),
        base=manifest(f"{RUN}/models/{{model}}"),
        memory=evaluated_memory,
        tokens=lambda w: tokens_of(w.model, domain_of(w)),
        passages=PARTS["passages"],
        datastore=PARTS["datastore"],
        index=PARTS["index"],
    output:
        manifest=built(f"{HOME}/latency/{{memory}}/{{model}}"),
    log:
        f"{LOG}/latency/{{home}}-{{seed}}-{{memory}}-{{model}}.log",
    benchmark:
        f"{BENCHMARK}/latency/{{home}}-{{seed}}-{{memory}}-{{model}}.tsv"
    priority: -10
    threads: workflow.cores
    resources:
        **computing("latency"),
    params:
        launch="memdec",
        command="latency",
        inputs=lambda w, input: " ".join(
            [
                named(
                    w,
                    {
                        name: input[name]
                        for name in ("base", "memory", "tokens", "passages")
                    },
                ),
                datastore_and_index(w, input),
            ]
        ),
        options=latency_options,
        version=VERSIONS["latency"],


# memdec/results/figure_catalogue.py defines the figures and their parts.
use rule table as figure with:
    input:
        config=CONFIG_FILE,
        parts=lambda w: part_manifests(figure_of(w)),
        table=lambda w: [f"results/{name}.cells.csv" for name in figure_of(w).tables],
    output:
        main="results/{figure}.csv",
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
    resources:
        **requested("figure"),
    params:
        command="figure",
        options=lambda w, input: " ".join(
            [
                words("--name", w.figure),
                part_cells(figure_of(w), input.parts),
                named(w, {"table": input.table}),
            ]
        ),
        reads=lambda w: content(paper.FOLDER / f"{w.figure}.csv"),
        caption=lambda w: figure_of(w).caption,
        version=VERSIONS["figure"],
