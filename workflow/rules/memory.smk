KEYS = gather.keys(
    f"{HOME}/keys/{{key}}/datastore/{{scatteritem}}/manifest.json", allow_missing=True
)


use rule finetune as datastore with:
    input:
        model=key_model,
        tokens=key_tokens,
    output:
        manifest=f"{HOME}/keys/{{key}}/datastore/{{scatteritem}}/manifest.json",
    log:
        f"{LOG}/datastore/{{domain}}-{{seed}}-{{key}}-{{scatteritem}}.log",
    benchmark:
        f"{BENCHMARK}/datastore/{{domain}}-{{seed}}-{{key}}-{{scatteritem}}.tsv"
    params:
        command="datastore",
        options=lambda w: f"{sharded(w, 'datastore')} {WINDOW} {COMPUTE}",
        version=VERSIONS["datastore"],


use rule finetune as index with:
    input:
        datastore=KEYS,
    output:
        manifest=f"{HOME}/keys/{{key}}/index/manifest.json",
    log:
        f"{LOG}/index/{{domain}}-{{seed}}-{{key}}.log",
    benchmark:
        f"{BENCHMARK}/index/{{domain}}-{{seed}}-{{key}}.tsv"
    params:
        command="index",
        options=lambda w: f"{options(section('index'))} {DEVICE}",
        version=VERSIONS["index"],


use rule finetune as targets with:
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
    params:
        command="targets",
        options=lambda w: f"{sharded(w, 'targets')} {DEVICE}",
        version=VERSIONS["targets"],


use rule finetune as teacher with:
    input:
        model=key_model,
        tokens=key_tokens,
    output:
        manifest=f"{HOME}/keys/{{key}}/teacher/{{scatteritem}}/manifest.json",
    log:
        f"{LOG}/teacher/{{domain}}-{{seed}}-{{key}}-{{scatteritem}}.log",
    benchmark:
        f"{BENCHMARK}/teacher/{{domain}}-{{seed}}-{{key}}-{{scatteritem}}.tsv"
    params:
        command="teacher",
        options=lambda w: f"{sharded(w, 'teacher')} {WINDOW} {COMPUTE}",
        version=VERSIONS["teacher"],


use rule corpus as adapt with:
    input:
        memory=lambda w: manifest(f"{home(w)}/memory/{MEMORIES[w.memory].adapt}"),
        tokenizer=lambda w: manifest(f"{RUN}/tokenizers/{MEMORIES[w.memory].tokenizer}"),
    output:
        manifest=f"{HOME}/adapted/{{memory}}/manifest.json",
    log:
        f"{LOG}/adapt/{{domain}}-{{seed}}-{{memory}}.log",
    benchmark:
        f"{BENCHMARK}/adapt/{{domain}}-{{seed}}-{{memory}}.tsv"
    priority: 5
    resources:
        cpu=lambda wildcards, threads: threads,
        mem_mb=2000,
        runtime=600,
    params:
        command="adapt-vocab",
        options=lambda w: f"{options(section('adapt'))} {words('--seed', w.seed)}",
        version=VERSIONS["adapt-vocab"],


use rule finetune as train with:
    input:
        model=memory_start,
        tokens=lambda w: manifest(
            f"{RUN}/tokens/{MEMORIES[w.memory].tokenizer}/{w.domain}"
        ),
        targets=memory_targets,
        base=memory_bases,
        budget_model=BUDGET,
    output:
        manifest=f"{HOME}/memory/{{memory}}/manifest.json",
    log:
        f"{LOG}/train/{{domain}}-{{seed}}-{{memory}}.log",
    benchmark:
        f"{BENCHMARK}/train/{{domain}}-{{seed}}-{{memory}}.tsv"
    params:
        command="train",
        options=lambda w: training(
            w, memory_options(w), budget(MEMORIES[w.memory].share)
        ),
        version=VERSIONS["memory"],
