# All stages that run a model reuse this rule with other inputs, outputs and options.
use rule corpus as finetune with:
    input:
        model=f"{RUN}/models/{{model}}/manifest.json",
        tokens=lambda w: tokens_of(w.model, w.domain),
    output:
        manifest=f"{HOME}/finetuned/{{model}}/manifest.json",
    log:
        f"{LOG}/finetune/{{domain}}-{{seed}}-{{model}}.log",
    benchmark:
        f"{BENCHMARK}/finetune/{{domain}}-{{seed}}-{{model}}.tsv"
    priority: 5
    resources:
        cpu=lambda wildcards, threads: threads,
        mem_mb=2000,
        runtime=600,
        gpu=GPU,
    params:
        command="finetune",
        options=lambda w: training(w, options(section("finetune"))),
        version=VERSIONS["finetune"],


# The DAPT baseline: the same training, limited by the FLOP budget.
use rule finetune as dapt with:
    input:
        model=f"{RUN}/models/{{model}}/manifest.json",
        tokens=lambda w: tokens_of(w.model, w.domain),
        budget_model=BUDGET,
    output:
        manifest=f"{HOME}/dapt/{{model}}/manifest.json",
    log:
        f"{LOG}/dapt/{{domain}}-{{seed}}-{{model}}.log",
    benchmark:
        f"{BENCHMARK}/dapt/{{domain}}-{{seed}}-{{model}}.tsv"
    params:
        options=lambda w: training(
            w,
            options(section("finetune" if CONFIG.dapt is None else "dapt")),
            budget(),
        ),


use rule finetune as lora with:
    input:
        model=f"{RUN}/models/{{model}}/manifest.json",
        tokens=lambda w: tokens_of(w.model, w.domain),
        match=(
            [manifest(f"{RUN}/models/{CONFIG.memory_model}")]
            if CONFIG.lora.rank is None
            else []
        ),
        budget_model=BUDGET,
    output:
        manifest=f"{HOME}/lora/{{model}}/manifest.json",
    log:
        f"{LOG}/lora/{{domain}}-{{seed}}-{{model}}.log",
    benchmark:
        f"{BENCHMARK}/lora/{{domain}}-{{seed}}-{{model}}.tsv"
    priority: 0
    params:
        command="lora",
        options=lambda w: training(w, options(section("lora")), budget()),
        version=VERSIONS["lora"],


use rule finetune as model with:
    input:
        tokenizer=lambda w: manifest(f"{RUN}/tokenizers/{MODELS[w.model].tokenizer}"),
        tokens=lambda w: (
            [tokens_of(w.model, MODELS[w.model].corpus)]
            if MODELS[w.model].corpus
            else []
        ),
    output:
        manifest=f"{RUN}/models/{{model}}/manifest.json",
    log:
        f"{LOG}/model/{{model}}.log",
    benchmark:
        f"{BENCHMARK}/model/{{model}}.tsv"
    priority: 10
    params:
        command="model",
        options=lambda w: f"{spec('models', w.model)} {CONTEXT} {COMPUTE}",
        source=lambda w: stamp(MODELS[w.model]),
        version=VERSIONS["model"],
