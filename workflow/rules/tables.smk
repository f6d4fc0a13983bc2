rule resolved_config:
    output:
        config_file(None),
    log:
        f"{LOG}/config.log",
    localrule: True
    conda:
        "../../environment.yml"
    params:
        config=lambda w: resolved(None),
    shell:
        "printf '%s' {params.config} > {output:q} 2> {log:q}"


use rule resolved_config as resolved_study with:
    output:
        config_file("{study}"),
    log:
        f"{LOG}/studies/{{study}}.log",
    params:
        config=lambda w: resolved(w.study),


# memdec/results/catalogue.py defines the tables and their parts.
rule table:
    input:
        config=lambda w: config_file(table_of(w).config.study_name),
        parts=table_parts,
    output:
        csv=report(
            "results/{table}.csv", caption="../report/table.rst", category="Tables"
        ),
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
