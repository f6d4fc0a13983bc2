# All stages reuse this rule with other inputs, outputs and options. Their only output is the manifest, which lists the
# other files: how many files a model has depends on its size.
rule corpus:
    input:
        against=lambda w: [
            manifest(f"{RUN}/corpora/{name}")
            for name in CONFIG.corpora[w.corpus].disjoint_from
        ],
    output:
        manifest=f"{RUN}/corpora/{{corpus}}/manifest.json",
    log:
        f"{LOG}/corpus/{{corpus}}.log",
    benchmark:
        f"{BENCHMARK}/corpus/{{corpus}}.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        cpu=lambda wildcards, threads: threads,
        mem_mb=1500,
        runtime=120,
    params:
        launch="memdec",
        command="corpus",
        inputs=named,
        options=lambda w: spec("corpora", w.corpus),
        source=lambda w: stamp(CONFIG.corpora[w.corpus]) if w.get("corpus") else [],
        version=VERSIONS["corpus"],
    shell:
        "OMP_NUM_THREADS={threads} RAYON_NUM_THREADS={threads} {params.launch} {params.command} {params.inputs} "
        '{params.options} --overwrite --out "$(dirname {output.manifest:q})" > {log:q} 2>&1'


use rule corpus as tokenizer with:
    input:
        corpus=lambda w: [
            manifest(f"{RUN}/corpora/{name}")
            for name in CONFIG.tokenizers[w.tokenizer].train_on or []
        ],
    output:
        manifest=f"{RUN}/tokenizers/{{tokenizer}}/manifest.json",
    log:
        f"{LOG}/tokenizer/{{tokenizer}}.log",
    benchmark:
        f"{BENCHMARK}/tokenizer/{{tokenizer}}.tsv"
    threads: 2
    params:
        command="tokenizer",
        options=lambda w: spec("tokenizers", w.tokenizer),
        source=lambda w: stamp(CONFIG.tokenizers[w.tokenizer]),
        version=VERSIONS["tokenizer"],


use rule corpus as tokens with:
    input:
        corpus=f"{RUN}/corpora/{{corpus}}/manifest.json",
        tokenizer=f"{RUN}/tokenizers/{{tokenizer}}/manifest.json",
    output:
        manifest=f"{RUN}/tokens/{{tokenizer}}/{{corpus}}/manifest.json",
    log:
        f"{LOG}/tokens/{{tokenizer}}/{{corpus}}.log",
    benchmark:
        f"{BENCHMARK}/tokens/{{tokenizer}}/{{corpus}}.tsv"
    params:
        command="tokens",
        options="",
        version=VERSIONS["tokens"],


use rule corpus as passages with:
    input:
        tokens=f"{RUN}/tokens/{{tokenizer}}/{{domain}}/manifest.json",
    output:
        manifest=f"{RUN}/passages/{{tokenizer}}/{{domain}}/manifest.json",
    log:
        f"{LOG}/passages/{{tokenizer}}-{{domain}}.log",
    benchmark:
        f"{BENCHMARK}/passages/{{tokenizer}}-{{domain}}.tsv"
    params:
        command="passages",
        options=lambda w: options(section(CONFIG, "passages")),
        version=VERSIONS["passages"],
