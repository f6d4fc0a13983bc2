KEYS = gather.keys(
    f"{HOME}/keys/{{key}}/datastore/{{scatteritem}}/manifest.json", allow_missing=True
)


rule datastore:
    input:
        model=key_model,
        tokens=key_tokens,
    output:
        manifest=f"{HOME}/keys/{{key}}/datastore/{{scatteritem}}/manifest.json",
    log:
        f"{LOG}/datastore/{{domain}}-{{seed}}-{{key}}-{{scatteritem}}.log",
    benchmark:
        f"{BENCHMARK}/datastore/{{domain}}-{{seed}}-{{key}}-{{scatteritem}}.tsv"
    priority: 5
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=600,
        gpu=GPU,
    params:
        options=options(section("datastore"), "shards"),
        shard=shard,
        window=WINDOW,
        compute=COMPUTE,
        stage=STAGE["datastore"],
    shell:
        "OMP_NUM_THREADS={threads} memdec datastore --model $(dirname {input.model}) "
        "--tokens $(dirname {input.tokens}) {params.options} {params.shard} {params.window} "
        "{params.compute} --out $(dirname {output.manifest}) > {log} 2>&1"


rule index:
    input:
        datastore=KEYS,
    output:
        manifest=f"{HOME}/keys/{{key}}/index/manifest.json",
    log:
        f"{LOG}/index/{{domain}}-{{seed}}-{{key}}.log",
    benchmark:
        f"{BENCHMARK}/index/{{domain}}-{{seed}}-{{key}}.tsv"
    priority: 5
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=1500,
        runtime=600,
        gpu=GPU,
    params:
        options=options(section("index")),
        datastore=lambda w, input: folders("datastore", input.datastore),
        compute=DEVICE,
        stage=STAGE["index"],
    shell:
        "OMP_NUM_THREADS={threads} memdec index {params.datastore} {params.options} "
        "{params.compute} --out $(dirname {output.manifest}) > {log} 2>&1"


rule targets:
    input:
        datastore=KEYS,
        index=f"{HOME}/keys/{{key}}/index/manifest.json",
        tokens=key_tokens,
    output:
        manifest=f"{HOME}/keys/{{key}}/targets/{{scatteritem}}/manifest.json",
    log:
        f"{LOG}/targets/{{domain}}-{{seed}}-{{key}}-{{scatteritem}}.log",
    benchmark:
        f"{BENCHMARK}/targets/{{domain}}-{{seed}}-{{key}}-{{scatteritem}}.tsv"
    priority: 5
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=1500,
        runtime=600,
        gpu=GPU,
    params:
        options=options(section("targets"), "shards"),
        shard=shard,
        datastore=lambda w, input: folders("datastore", input.datastore),
        compute=DEVICE,
        stage=STAGE["targets"],
    shell:
        "OMP_NUM_THREADS={threads} memdec targets {params.datastore} --index $(dirname {input.index}) "
        "--tokens $(dirname {input.tokens}) {params.options} {params.shard} "
        "{params.compute} --out $(dirname {output.manifest}) > {log} 2>&1"


rule teacher:
    input:
        model=key_model,
        tokens=key_tokens,
    output:
        manifest=f"{HOME}/keys/{{key}}/teacher/{{scatteritem}}/manifest.json",
    log:
        f"{LOG}/teacher/{{domain}}-{{seed}}-{{key}}-{{scatteritem}}.log",
    benchmark:
        f"{BENCHMARK}/teacher/{{domain}}-{{seed}}-{{key}}-{{scatteritem}}.tsv"
    priority: 5
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=600,
        gpu=GPU,
    params:
        options=options(section("teacher"), "shards"),
        shard=shard,
        window=WINDOW,
        compute=COMPUTE,
        stage=STAGE["teacher"],
    shell:
        "OMP_NUM_THREADS={threads} memdec teacher --model $(dirname {input.model}) "
        "--tokens $(dirname {input.tokens}) {params.options} {params.shard} {params.window} "
        "{params.compute} --out $(dirname {output.manifest}) > {log} 2>&1"


rule adapt:
    input:
        memory=lambda w: manifest(f"{home(w)}/memory/{MEMORIES[w.memory].adapt}"),
        tokenizer=lambda w: manifest(f"{RUN}/tokenizers/{MEMORIES[w.memory].tokenizer}"),
    output:
        f"{HOME}/adapted/{{memory}}/model.safetensors",
        manifest=f"{HOME}/adapted/{{memory}}/manifest.json",
    log:
        f"{LOG}/adapt/{{domain}}-{{seed}}-{{memory}}.log",
    benchmark:
        f"{BENCHMARK}/adapt/{{domain}}-{{seed}}-{{memory}}.tsv"
    priority: 5
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=600,
    params:
        options=options(section("adapt")),
        stage=STAGE["adapt"],
    shell:
        "OMP_NUM_THREADS={threads} memdec adapt-vocab --memory $(dirname {input.memory}) "
        "--tokenizer $(dirname {input.tokenizer}) {params.options} --seed {wildcards.seed} "
        "--out $(dirname {output.manifest}) > {log} 2>&1"


rule train:
    input:
        model=memory_start,
        tokens=lambda w: manifest(
            f"{RUN}/tokens/{MEMORIES[w.memory].tokenizer}/{w.domain}"
        ),
        targets=memory_targets,
        bases=memory_bases,
        budget=BUDGET,
    output:
        f"{HOME}/memory/{{memory}}/model.safetensors",
        manifest=f"{HOME}/memory/{{memory}}/manifest.json",
    log:
        f"{LOG}/train/{{domain}}-{{seed}}-{{memory}}.log",
    benchmark:
        f"{BENCHMARK}/train/{{domain}}-{{seed}}-{{memory}}.tsv"
    priority: 5
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=600,
        gpu=GPU,
    params:
        options=memory_options,
        context=CONTEXT,
        targets=lambda w, input: folders("targets", input.targets),
        bases=lambda w, input: folders("base", input.bases),
        budget=lambda w, input: budget(input, MEMORIES[w.memory].share),
        compute=COMPUTE,
        stage=STAGE["train"],
    shell:
        "OMP_NUM_THREADS={threads} memdec train --model $(dirname {input.model}) "
        "--tokens $(dirname {input.tokens}) {params.targets} {params.bases} {params.options} {params.budget} {params.context} "
        "--seed {wildcards.seed} {params.compute} --out $(dirname {output.manifest}) > {log} 2>&1"
