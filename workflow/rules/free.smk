# With `keep_keys: false`, keys and indexes that only targets are made from are removed once these are there. It happens on
# the way to `results/all` alone: a single table does not say what else will be made from them. Snakemake's `temp()` cannot
# do it: an artefact is its manifest here, and keys that are made again would make everything behind them again.
if not CONFIG.keep_keys and APART:
    raise WorkflowError(
        "keep_keys: expected true without a shared folder, found false; leave it out, and remove the keys from the storage"
    )


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
