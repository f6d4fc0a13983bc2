rule resolved_config:
    output:
        f"{RUN}/config.json",
    log:
        f"{LOG}/config.log",
    localrule: True
    conda:
        "../../environment.yml"
    params:
        config=shlex.quote(
            json.dumps(CONFIG.model_dump(mode="json", exclude_unset=True))
        ),
    shell:
        "printf '%s' {params.config} > {output} 2> {log}"


rule table3:
    input:
        config=config_file("table3"),
        cells=[manifest(folder) for *_, folder in CELLS["table3"]],
    output:
        csv=report(
            "results/table3.csv", caption="../report/table3.rst", category="Tables"
        ),
        markdown="results/table3.md",
        latex="results/table3.tex",
        provenance="results/table3.provenance.json",
    log:
        f"{LOG}/table3.log",
    benchmark:
        f"{BENCHMARK}/table3.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=500,
        runtime=10,
    params:
        command="table",
        cells=cells("table3"),
        stage=STAGE["table"],
    shell:
        "memdec {params.command} --config {input.config} {params.cells} --out {output.csv} > {log} 2>&1"


use rule table3 as table1 with:
    input:
        config=config_file("table1"),
        cells=[manifest(folder) for *_, folder in CELLS["table1"]],
    output:
        csv=report(
            "results/table1.csv", caption="../report/table1.rst", category="Tables"
        ),
        markdown="results/table1.md",
        latex="results/table1.tex",
        provenance="results/table1.provenance.json",
    log:
        f"{LOG}/table1.log",
    benchmark:
        f"{BENCHMARK}/table1.tsv"
    params:
        command="table --number 1",
        cells=cells("table1"),
        stage=STAGE["table"],


use rule table3 as memories with:
    input:
        config=config_file("memories"),
        cells=[manifest(folder) for *_, folder in CELLS["memories"]],
    output:
        csv=report(
            "results/memories.csv", caption="../report/memories.rst", category="Tables"
        ),
        markdown="results/memories.md",
        latex="results/memories.tex",
        provenance="results/memories.provenance.json",
    log:
        f"{LOG}/memories.log",
    benchmark:
        f"{BENCHMARK}/memories.tsv"
    params:
        command="memories",
        cells=cells("memories"),
        stage=STAGE["table"],


if CONFIG.forgetting:

    use rule table3 as forgetting with:
        input:
            config=config_file("memories"),
            cells=[manifest(folder) for *_, folder in CELLS["memories"]],
        output:
            csv=report(
                "results/forgetting.csv",
                caption="../report/forgetting.rst",
                category="Tables",
            ),
            markdown="results/forgetting.md",
            latex="results/forgetting.tex",
            provenance="results/forgetting.provenance.json",
        log:
            f"{LOG}/forgetting.log",
        benchmark:
            f"{BENCHMARK}/forgetting.tsv"
        params:
            command="forgetting",
            cells=cells("memories"),
            stage=STAGE["table"],


if OTHERS:

    use rule table3 as table4 with:
        input:
            config=config_file("table4"),
            cells=[manifest(folder) for *_, folder in CELLS["table4"]],
        output:
            csv=report(
                "results/table4.csv", caption="../report/table4.rst", category="Tables"
            ),
            markdown="results/table4.md",
            latex="results/table4.tex",
            provenance="results/table4.provenance.json",
        log:
            f"{LOG}/table4.log",
        benchmark:
            f"{BENCHMARK}/table4.tsv"
        params:
            command="table --number 4",
            cells=cells("table4"),
            stage=STAGE["table"],


if CONFIG.cases:
    CASE = f"{RUN}/{CONFIG.domains[0]}/seed{CONFIG.seeds[0]}"
    KEYS_OF_CASE = f"{CASE}/keys/{CONFIG.variant(typed.DEFAULT_MEMORY).keys}"

    rule table6:
        input:
            config=config_file("table6"),
            base=f"{RUN}/models/{CONFIG.key_model}/manifest.json",
            memory=f"{CASE}/memory/{typed.DEFAULT_MEMORY}/manifest.json",
            datastore=gather.keys(
                f"{KEYS_OF_CASE}/datastore/{{scatteritem}}/manifest.json"
            ),
            index=f"{KEYS_OF_CASE}/index/manifest.json",
        output:
            csv=report(
                "results/table6.csv", caption="../report/table6.rst", category="Tables"
            ),
            markdown="results/table6.md",
            latex="results/table6.tex",
            provenance="results/table6.provenance.json",
        log:
            f"{LOG}/table6.log",
        benchmark:
            f"{BENCHMARK}/table6.tsv"
        conda:
            "../../environment.yml"
        threads: 1
        resources:
            mem_mb=2000,
            runtime=60,
            gpu=GPU,
        params:
            datastore=lambda w, input: folders("datastore", input.datastore),
            stage=STAGE["table"],
        shell:
            "OMP_NUM_THREADS={threads} memdec cases --config {input.config} --base $(dirname {input.base}) "
            "--memory $(dirname {input.memory}) {params.datastore} --index $(dirname {input.index}) "
            "--out {output.csv} > {log} 2>&1"
