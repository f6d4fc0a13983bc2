HOME = f"{RUN}/{{domain}}/seed{{seed}}"
KEYS = gather.keys(
    f"{HOME}/datastore/{{scatteritem}}/manifest.json", allow_missing=True
)


rule datastore:
    input:
        model=f"{HOME}/finetuned/{config['key_model']}/manifest.json",
        tokens=f"{RUN}/tokens/{TOKENIZER}/{{domain}}/manifest.json",
    output:
        manifest=f"{HOME}/datastore/{{scatteritem}}/manifest.json",
    log:
        f"{LOG}/datastore/{{domain}}-{{seed}}-{{scatteritem}}.log",
    benchmark:
        f"{BENCHMARK}/datastore/{{domain}}-{{seed}}-{{scatteritem}}.tsv"
    priority: 5
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=600,
    params:
        options=options("datastore", "shards"),
        shard=shard,
        window=WINDOW,
        stage=STAGE["datastore"],
    shell:
        "OMP_NUM_THREADS={threads} memdec datastore --model $(dirname {input.model}) "
        "--tokens $(dirname {input.tokens}) {params.options} {params.shard} {params.window} "
        "--out $(dirname {output.manifest}) > {log} 2>&1"


rule index:
    input:
        datastore=KEYS,
    output:
        manifest=f"{HOME}/index/manifest.json",
    log:
        f"{LOG}/index/{{domain}}-{{seed}}.log",
    benchmark:
        f"{BENCHMARK}/index/{{domain}}-{{seed}}.tsv"
    priority: 5
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=1500,
        runtime=600,
    params:
        options=options("index"),
        datastore=lambda w, input: folders("datastore", input.datastore),
        stage=STAGE["index"],
    shell:
        "OMP_NUM_THREADS={threads} memdec index {params.datastore} {params.options} "
        "--out $(dirname {output.manifest}) > {log} 2>&1"


rule targets:
    input:
        datastore=KEYS,
        index=f"{HOME}/index/manifest.json",
        tokens=f"{RUN}/tokens/{TOKENIZER}/{{domain}}/manifest.json",
    output:
        manifest=f"{HOME}/targets/{{scatteritem}}/manifest.json",
    log:
        f"{LOG}/targets/{{domain}}-{{seed}}-{{scatteritem}}.log",
    benchmark:
        f"{BENCHMARK}/targets/{{domain}}-{{seed}}-{{scatteritem}}.tsv"
    priority: 5
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=1500,
        runtime=600,
    params:
        options=options("targets", "shards"),
        shard=shard,
        datastore=lambda w, input: folders("datastore", input.datastore),
        stage=STAGE["targets"],
    shell:
        "OMP_NUM_THREADS={threads} memdec targets {params.datastore} --index $(dirname {input.index}) "
        "--tokens $(dirname {input.tokens}) {params.options} {params.shard} "
        "--out $(dirname {output.manifest}) > {log} 2>&1"


rule train:
    input:
        model=f"{RUN}/models/{config['memory_model']}/manifest.json",
        tokens=f"{RUN}/tokens/{TOKENIZER}/{{domain}}/manifest.json",
        targets=gather.targets(
            f"{HOME}/targets/{{scatteritem}}/manifest.json", allow_missing=True
        ),
    output:
        f"{HOME}/memory/model.safetensors",
        manifest=f"{HOME}/memory/manifest.json",
    log:
        f"{LOG}/train/{{domain}}-{{seed}}.log",
    benchmark:
        f"{BENCHMARK}/train/{{domain}}-{{seed}}.tsv"
    priority: 5
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=600,
    params:
        options=options("memory"),
        context=CONTEXT,
        targets=lambda w, input: folders("targets", input.targets),
        stage=STAGE["train"],
    shell:
        "OMP_NUM_THREADS={threads} memdec train --model $(dirname {input.model}) "
        "--tokens $(dirname {input.tokens}) {params.targets} {params.options} {params.context} "
        "--seed {wildcards.seed} --out $(dirname {output.manifest}) > {log} 2>&1"
