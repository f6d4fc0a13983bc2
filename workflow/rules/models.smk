rule model:
    input:
        tokenizer=lambda w: manifest(f"{RUN}/tokenizers/{MODELS[w.model]['tokenizer']}"),
        tokens=lambda w: (
            [
                manifest(
                    f"{RUN}/tokens/{MODELS[w.model]['tokenizer']}/{MODELS[w.model]['corpus']}"
                )
            ]
            if MODELS[w.model].get("corpus")
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
    params:
        spec=lambda w: spec("models", w.model),
        tokens=lambda w, input: (
            f"--tokens {os.path.dirname(input.tokens[0])}" if input.tokens else ""
        ),
        context=CONTEXT,
        stage=STAGE["model"],
    shell:
        "OMP_NUM_THREADS={threads} memdec model --spec {params.spec} --tokenizer $(dirname {input.tokenizer}) "
        "{params.tokens} {params.context} --out $(dirname {output.manifest}) > {log} 2>&1"


rule finetune:
    input:
        model=f"{RUN}/models/{{model}}/manifest.json",
        tokens=f"{RUN}/tokens/{TOKENIZER}/{{domain}}/manifest.json",
    output:
        f"{RUN}/{{domain}}/seed{{seed}}/finetuned/{{model}}/model.safetensors",
        manifest=f"{RUN}/{{domain}}/seed{{seed}}/finetuned/{{model}}/manifest.json",
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
    params:
        options=options("finetune"),
        context=CONTEXT,
        stage=STAGE["finetune"],
    shell:
        "OMP_NUM_THREADS={threads} memdec finetune --model $(dirname {input.model}) "
        "--tokens $(dirname {input.tokens}) {params.options} {params.context} --seed {wildcards.seed} "
        "--out $(dirname {output.manifest}) > {log} 2>&1"


rule lora:
    input:
        model=f"{RUN}/models/{{model}}/manifest.json",
        tokens=f"{RUN}/tokens/{TOKENIZER}/{{domain}}/manifest.json",
    output:
        f"{RUN}/{{domain}}/seed{{seed}}/lora/{{model}}/adapter_model.safetensors",
        manifest=f"{RUN}/{{domain}}/seed{{seed}}/lora/{{model}}/manifest.json",
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
    params:
        options=options("lora"),
        context=CONTEXT,
        stage=STAGE["lora"],
    shell:
        "OMP_NUM_THREADS={threads} memdec lora --model $(dirname {input.model}) "
        "--tokens $(dirname {input.tokens}) {params.options} {params.context} --seed {wildcards.seed} "
        "--out $(dirname {output.manifest}) > {log} 2>&1"
