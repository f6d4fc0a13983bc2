# All stages reuse this rule with other inputs, outputs and options. Their only output is the manifest, which lists the
# other files: how many files a model has depends on its size.
rule corpus:
    input:
        against=lambda w: [
            manifest(f"{RUN}/corpora/{name}")
            for name in CONFIG.corpora[w.corpus].disjoint_from
        ],
    output:
        manifest=built(f"{RUN}/corpora/{{corpus}}"),
    log:
        f"{LOG}/corpus/{{corpus}}.log",
    benchmark:
        f"{BENCHMARK}/corpus/{{corpus}}.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        **requested("corpus"),
    params:
        launch="memdec",
        command="corpus",
        inputs=named,
        options=lambda w: spec("corpora", w.corpus),
        source=lambda w: stamp(CONFIG.corpora[w.corpus]) if w.get("corpus") else [],
        version=VERSIONS["corpus"],
    shell:
        "OMP_NUM_THREADS={threads} RAYON_NUM_THREADS={threads} {params.launch} {params.command} {params.inputs} "
        f"{{params.options}} --overwrite --out {FOLDER} > {{log:q}} 2>&1"


# Nodes of a cluster often have no network. What needs one runs where Snakemake runs.
use rule corpus as fetch_corpus with:
    wildcard_constraints:
        corpus=fetched(CONFIG.corpora),
    localrule: True


ruleorder: fetch_corpus > corpus


use rule corpus as tokenizer with:
    input:
        corpus=lambda w: [
            manifest(f"{RUN}/corpora/{name}")
            for name in CONFIG.tokenizers[w.tokenizer].train_on or []
        ],
    output:
        manifest=built(f"{RUN}/tokenizers/{{tokenizer}}"),
    log:
        f"{LOG}/tokenizer/{{tokenizer}}.log",
    benchmark:
        f"{BENCHMARK}/tokenizer/{{tokenizer}}.tsv"
    threads: 2
    resources:
        **requested("tokenizer"),
    params:
        command="tokenizer",
        options=lambda w: spec("tokenizers", w.tokenizer),
        source=lambda w: stamp(CONFIG.tokenizers[w.tokenizer]),
        version=VERSIONS["tokenizer"],


use rule tokenizer as fetch_tokenizer with:
    wildcard_constraints:
        tokenizer=fetched(CONFIG.tokenizers),
    localrule: True


ruleorder: fetch_tokenizer > tokenizer


use rule corpus as tokens with:
    input:
        corpus=manifest(f"{RUN}/corpora/{{corpus}}"),
        tokenizer=manifest(f"{RUN}/tokenizers/{{tokenizer}}"),
    output:
        manifest=built(f"{RUN}/tokens/{{tokenizer}}/{{corpus}}"),
    log:
        f"{LOG}/tokens/{{tokenizer}}/{{corpus}}.log",
    benchmark:
        f"{BENCHMARK}/tokens/{{tokenizer}}/{{corpus}}.tsv"
    resources:
        **requested("tokens"),
    params:
        command="tokens",
        options="",
        version=VERSIONS["tokens"],


use rule corpus as passages with:
    input:
        tokens=manifest(f"{RUN}/tokens/{{tokenizer}}/{{domain}}"),
    output:
        manifest=built(f"{RUN}/passages/{{tokenizer}}/{{domain}}"),
    log:
        f"{LOG}/passages/{{tokenizer}}-{{domain}}.log",
    benchmark:
        f"{BENCHMARK}/passages/{{tokenizer}}-{{domain}}.tsv"
    resources:
        **requested("passages"),
    params:
        command="passages",
        options=lambda w: options(section(CONFIG, "passages")),
        version=VERSIONS["passages"],
