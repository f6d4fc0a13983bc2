rule resolved_config:
    output:
        f"{RUN}/config.json",
    log:
        f"{LOG}/config.log",
    localrule: True
    conda:
        "../../environment.yml"
    params:
        config=lambda w: words(
            json.dumps(CONFIG.model_dump(mode="json", exclude_unset=True))
        ),
    shell:
        "printf '%s' {params.config} > {output:q} 2> {log:q}"


# memdec/results/catalogue.py defines the tables and their parts.
rule table:
    input:
        config=f"{RUN}/config.json",
        parts=table_parts,
    output:
        csv=report(
            "results/{table}.csv", caption="../report/table.rst", category="Tables"
        ),
        cells="results/{table}.cells.csv",
        items="results/{table}.items.npz",
        markdown="results/{table}.md",
        latex="results/{table}.tex",
        provenance="results/{table}.provenance.json",
    log:
        f"{LOG}/{{table}}.log",
    benchmark:
        f"{BENCHMARK}/{{table}}.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        cpu=1,
        mem_mb=500,
        runtime=10,
    params:
        cells=table_cells,
        caption=lambda w: table_of(w).caption,
        version=VERSIONS["table"],
    shell:
        "memdec table --name {wildcards.table:q} --config {input.config:q} {params.cells} --out {output.csv:q} "
        "> {log:q} 2>&1"
