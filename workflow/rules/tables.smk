rule resolved_config:
    output:
        CONFIG_FILE,
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


# memdec/results/catalogue.py defines the tables and their parts. All that writes files from results reuses this rule.
rule table:
    input:
        config=CONFIG_FILE,
        parts=lambda w: part_manifests(table_of(w)),
    output:
        main=report(
            "results/{table}.csv",
            caption="../report/table.rst",
            category="Tables",
            labels={"table": "{table}"},
        ),
        cells="results/{table}.cells.csv",
        item_sums="results/{table}.items.npz",
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
        **requested("table"),
    params:
        command="table",
        options=lambda w, input: (
            f"{words('--name', w.table)} {part_cells(table_of(w), input.parts)}"
        ),
        reads=lambda w: content(paper.FOLDER / f"{w.table}.csv"),
        caption=lambda w: table_of(w).caption,
        version=VERSIONS["table"],
    shell:
        "memdec {params.command} --config {input.config:q} {params.options} --out {output.main:q} > {log:q} 2>&1"
