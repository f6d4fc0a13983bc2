rule corpus:
    input:
        lambda w: [
            manifest(f"{RUN}/corpora/{name}")
            for name in CONFIG.corpora[w.corpus].disjoint_from
        ],
    output:
        expand(
            f"{RUN}/corpora/{{corpus}}/{{split}}.parquet",
            split=["train", "valid", "test"],
            allow_missing=True,
        ),
        manifest=f"{RUN}/corpora/{{corpus}}/manifest.json",
    log:
        f"{LOG}/corpus/{{corpus}}.log",
    benchmark:
        f"{BENCHMARK}/corpus/{{corpus}}.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=1500,
        runtime=30,
    params:
        spec=lambda w: spec("corpora", w.corpus),
        against=lambda w, input: " ".join(
            f"--against {os.path.dirname(f)}" for f in input
        ),
        stage=STAGE["corpus"],
    shell:
        "OMP_NUM_THREADS={threads} memdec corpus --spec {params.spec} {params.against} "
        "--out $(dirname {output.manifest}) > {log} 2>&1"


rule tokenizer:
    input:
        lambda w: [
            manifest(f"{RUN}/corpora/{name}")
            for name in CONFIG.tokenizers[w.tokenizer].train_on or []
        ],
    output:
        f"{RUN}/tokenizers/{{tokenizer}}/tokenizer.json",
        manifest=f"{RUN}/tokenizers/{{tokenizer}}/manifest.json",
    log:
        f"{LOG}/tokenizer/{{tokenizer}}.log",
    benchmark:
        f"{BENCHMARK}/tokenizer/{{tokenizer}}.tsv"
    conda:
        "../../environment.yml"
    threads: 2
    resources:
        mem_mb=1500,
        runtime=60,
    params:
        spec=lambda w: spec("tokenizers", w.tokenizer),
        corpora=lambda w, input: " ".join(
            f"--corpus {os.path.dirname(f)}" for f in input
        ),
        stage=STAGE["tokenizer"],
    shell:
        "RAYON_NUM_THREADS={threads} OMP_NUM_THREADS={threads} memdec tokenizer --spec {params.spec} "
        "{params.corpora} --out $(dirname {output.manifest}) > {log} 2>&1"


rule tokens:
    input:
        corpus=f"{RUN}/corpora/{{corpus}}/manifest.json",
        tokenizer=f"{RUN}/tokenizers/{{tokenizer}}/manifest.json",
    output:
        expand(
            f"{RUN}/tokens/{{tokenizer}}/{{corpus}}/{{split}}.npy",
            split=["train", "valid", "test"],
            allow_missing=True,
        ),
        manifest=f"{RUN}/tokens/{{tokenizer}}/{{corpus}}/manifest.json",
    log:
        f"{LOG}/tokens/{{tokenizer}}/{{corpus}}.log",
    benchmark:
        f"{BENCHMARK}/tokens/{{tokenizer}}/{{corpus}}.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=1500,
        runtime=120,
    params:
        stage=STAGE["tokens"],
    shell:
        "RAYON_NUM_THREADS={threads} OMP_NUM_THREADS={threads} memdec tokens "
        "--tokenizer $(dirname {input.tokenizer}) --corpus $(dirname {input.corpus}) "
        "--out $(dirname {output.manifest}) > {log} 2>&1"
