rule model:
    input:
        tokenizer=lambda w: manifest(f"{RUN}/tokenizers/{MODELS[w.model].tokenizer}"),
        tokens=lambda w: (
            [tokens_of(w.model, MODELS[w.model].corpus)]
            if MODELS[w.model].corpus
            else []
        ),
    output:
        f"{RUN}/models/{{model}}/config.json",
        manifest=f"{RUN}/models/{{model}}/manifest.json",
    log:
        f"{LOG}/model/{{model}}.log",
    benchmark:
        f"{BENCHMARK}/model/{{model}}.tsv"
    priority: 10
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=600,
        gpu=GPU,
    params:
        spec=lambda w: spec("models", w.model),
        tokens=lambda w, input: (
            f"--tokens {os.path.dirname(input.tokens[0])}" if input.tokens else ""
        ),
        context=CONTEXT,
        compute=COMPUTE,
        stage=STAGE["model"],
    shell:
        "OMP_NUM_THREADS={threads} memdec model --spec {params.spec} --tokenizer $(dirname {input.tokenizer}) "
        "{params.tokens} {params.context} {params.compute} --out $(dirname {output.manifest}) > {log} 2>&1"


rule finetune:
    input:
        model=f"{RUN}/models/{{model}}/manifest.json",
        tokens=lambda w: tokens_of(w.model, w.domain),
    output:
        f"{HOME}/finetuned/{{model}}/model.safetensors",
        manifest=f"{HOME}/finetuned/{{model}}/manifest.json",
    log:
        f"{LOG}/finetune/{{domain}}-{{seed}}-{{model}}.log",
    benchmark:
        f"{BENCHMARK}/finetune/{{domain}}-{{seed}}-{{model}}.tsv"
    priority: 5
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=600,
        gpu=GPU,
    params:
        options=options(section("finetune")),
        context=CONTEXT,
        compute=COMPUTE,
        stage=STAGE["finetune"],
    shell:
        "OMP_NUM_THREADS={threads} memdec finetune --model $(dirname {input.model}) "
        "--tokens $(dirname {input.tokens}) {params.options} {params.context} --seed {wildcards.seed} "
        "{params.compute} --out $(dirname {output.manifest}) > {log} 2>&1"


# The baseline: the same training, under the budget.
use rule finetune as dapt with:
    input:
        model=f"{RUN}/models/{{model}}/manifest.json",
        tokens=lambda w: tokens_of(w.model, w.domain),
        budget=BUDGET,
    output:
        f"{HOME}/dapt/{{model}}/model.safetensors",
        manifest=f"{HOME}/dapt/{{model}}/manifest.json",
    log:
        f"{LOG}/dapt/{{domain}}-{{seed}}-{{model}}.log",
    benchmark:
        f"{BENCHMARK}/dapt/{{domain}}-{{seed}}-{{model}}.tsv"
    params:
        options=lambda w, input: (
            options(section("finetune" if CONFIG.dapt is None else "dapt"))
            + f" {budget(input)}"
        ),
        context=CONTEXT,
        compute=COMPUTE,
        stage=STAGE["finetune"],


rule lora:
    input:
        model=f"{RUN}/models/{{model}}/manifest.json",
        tokens=lambda w: tokens_of(w.model, w.domain),
        match=(
            [manifest(f"{RUN}/models/{CONFIG.memory_model}")]
            if CONFIG.lora.rank is None
            else []
        ),
        budget=BUDGET,
    output:
        f"{HOME}/lora/{{model}}/adapter_model.safetensors",
        manifest=f"{HOME}/lora/{{model}}/manifest.json",
    log:
        f"{LOG}/lora/{{domain}}-{{seed}}-{{model}}.log",
    benchmark:
        f"{BENCHMARK}/lora/{{domain}}-{{seed}}-{{model}}.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=600,
        gpu=GPU,
    params:
        options=options(section("lora")),
        match=lambda w, input: folders("match", input.match),
        budget=lambda w, input: budget(input),
        context=CONTEXT,
        compute=COMPUTE,
        stage=STAGE["lora"],
    shell:
        "OMP_NUM_THREADS={threads} memdec lora --model $(dirname {input.model}) "
        "--tokens $(dirname {input.tokens}) {params.options} {params.match} {params.budget} {params.context} "
        "--seed {wildcards.seed} {params.compute} --out $(dirname {output.manifest}) > {log} 2>&1"
