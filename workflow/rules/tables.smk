rule resolved_config:
    output:
        f"{RUN}/config.json",
    log:
        f"{LOG}/config.log",
    localrule: True
    conda:
        "../../environment.yml"
    params:
        config=shlex.quote(json.dumps(config)),
    shell:
        "printf '%s' {params.config} > {output} 2> {log}"


rule table3:
    input:
        config=config_file,
        cells=[
            f"{RUN}/{domain}/seed{seed}/evaluation/{model}/manifest.json"
            for domain, model, seed in CELLS
        ],
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
        cells=" ".join(
            f"--cell {domain}:{model}:{seed}:{RUN}/{domain}/seed{seed}/evaluation/{model}"
            for domain, model, seed in CELLS
        ),
        stage=STAGE["table"],
    shell:
        "memdec table --config {input.config} {params.cells} --out {output.csv} > {log} 2>&1"
