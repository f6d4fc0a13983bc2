HOME = RUN + "/{domain}/seed{seed}"


rule datastore:
    input:
        model=HOME + f"/finetuned/{config['key_model']}/manifest.json",
        tokens=RUN + f"/tokens/{TOKENIZER}" + "/{domain}/manifest.json",
    output:
        HOME + "/datastore/keys.npy",
        manifest=HOME + "/datastore/manifest.json",
    log:
        LOG + "/datastore/{domain}-{seed}.log",
    benchmark:
        BENCHMARK + "/datastore/{domain}-{seed}.tsv"
    priority: 5
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
        HOME + "/datastore/manifest.json",
    output:
        HOME + "/index/index.faiss",
        manifest=HOME + "/index/manifest.json",
    log:
        LOG + "/index/{domain}-{seed}.log",
    benchmark:
        BENCHMARK + "/index/{domain}-{seed}.tsv"
    priority: 5
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
        datastore=HOME + "/datastore/manifest.json",
        index=HOME + "/index/manifest.json",
        tokens=RUN + f"/tokens/{TOKENIZER}" + "/{domain}/manifest.json",
    output:
        expand(
            HOME.replace("{", "{{").replace("}", "}}")
            + "/targets/{{shard}}/{part}.npy",
            part=["indptr", "tokens", "probs"],
        ),
        manifest=HOME + "/targets/{shard}/manifest.json",
    log:
        LOG + "/targets/{domain}-{seed}-{shard}.log",
    benchmark:
        BENCHMARK + "/targets/{domain}-{seed}-{shard}.tsv"
    priority: 5
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
        model=RUN + f"/models/{config['memory_model']}/manifest.json",
        tokens=RUN + f"/tokens/{TOKENIZER}" + "/{domain}/manifest.json",
        targets=expand(
            HOME.replace("{", "{{").replace("}", "}}")
            + "/targets/{shard}/manifest.json",
            shard=range(SHARDS),
        ),
    output:
        HOME + "/memory/model.safetensors",
        manifest=HOME + "/memory/manifest.json",
    log:
        LOG + "/train/{domain}-{seed}.log",
    benchmark:
        BENCHMARK + "/train/{domain}-{seed}.tsv"
    priority: 5
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
