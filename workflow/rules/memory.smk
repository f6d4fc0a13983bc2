HOME = f"{RUN}/{{domain}}/seed{{seed}}"


rule datastore:
    input:
        model=f"{HOME}/finetuned/{config['key_model']}/manifest.json",
        tokens=f"{RUN}/tokens/{TOKENIZER}/{{domain}}/manifest.json",
    output:
        f"{HOME}/datastore/keys.npy",
        manifest=f"{HOME}/datastore/manifest.json",
    log:
        f"{LOG}/datastore/{{domain}}-{{seed}}.log",
    benchmark:
        f"{BENCHMARK}/datastore/{{domain}}-{{seed}}.tsv"
    priority: 5
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=600,
    params:
        options=options("datastore"),
        window=WINDOW,
        stage=STAGE["datastore"],
    shell:
        "OMP_NUM_THREADS={threads} memdec datastore --model $(dirname {input.model}) "
        "--tokens $(dirname {input.tokens}) {params.options} {params.window} "
        "--out $(dirname {output.manifest}) > {log} 2>&1"


rule index:
    input:
        f"{HOME}/datastore/manifest.json",
    output:
        f"{HOME}/index/index.faiss",
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
        stage=STAGE["index"],
    shell:
        "OMP_NUM_THREADS={threads} memdec index --datastore $(dirname {input}) {params.options} "
        "--out $(dirname {output.manifest}) > {log} 2>&1"


rule targets:
    input:
        datastore=f"{HOME}/datastore/manifest.json",
        index=f"{HOME}/index/manifest.json",
        tokens=f"{RUN}/tokens/{TOKENIZER}/{{domain}}/manifest.json",
    output:
        expand(
            f"{HOME}/targets/{{shard}}/{{part}}.npy",
            part=["indptr", "tokens", "probs"],
            allow_missing=True,
        ),
        manifest=f"{HOME}/targets/{{shard}}/manifest.json",
    log:
        f"{LOG}/targets/{{domain}}-{{seed}}-{{shard}}.log",
    benchmark:
        f"{BENCHMARK}/targets/{{domain}}-{{seed}}-{{shard}}.tsv"
    priority: 5
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=1500,
        runtime=600,
    params:
        options=options("targets"),
        stage=STAGE["targets"],
    shell:
        "OMP_NUM_THREADS={threads} memdec targets --datastore $(dirname {input.datastore}) "
        "--index $(dirname {input.index}) --tokens $(dirname {input.tokens}) {params.options} "
        "--shard {wildcards.shard} --out $(dirname {output.manifest}) > {log} 2>&1"


rule train:
    input:
        model=f"{RUN}/models/{config['memory_model']}/manifest.json",
        tokens=f"{RUN}/tokens/{TOKENIZER}/{{domain}}/manifest.json",
        targets=expand(
            f"{HOME}/targets/{{shard}}/manifest.json",
            shard=range(SHARDS),
            allow_missing=True,
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
        targets=lambda w, input: " ".join(
            f"--targets {os.path.dirname(f)}" for f in input.targets
        ),
        stage=STAGE["train"],
    shell:
        "OMP_NUM_THREADS={threads} memdec train --model $(dirname {input.model}) "
        "--tokens $(dirname {input.tokens}) {params.targets} {params.options} {params.context} "
        "--seed {wildcards.seed} --out $(dirname {output.manifest}) > {log} 2>&1"
