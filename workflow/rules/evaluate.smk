rule evaluate:
    input:
        base=f"{RUN}/models/{{model}}/manifest.json",
        corpus=f"{RUN}/corpora/{{domain}}/manifest.json",
        memory=evaluated_memory,
    output:
        f"{HOME}/evaluation/{{memory}}/{{model}}/records.json",
        manifest=f"{HOME}/evaluation/{{memory}}/{{model}}/manifest.json",
    log:
        f"{LOG}/evaluate/{{domain}}-{{seed}}-{{memory}}-{{model}}.log",
    benchmark:
        f"{BENCHMARK}/evaluate/{{domain}}-{{seed}}-{{memory}}-{{model}}.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=600,
    params:
        options=options(section("evaluate")),
        window=WINDOW,
        stage=STAGE["evaluate"],
    shell:
        "OMP_NUM_THREADS={threads} memdec evaluate --base $(dirname {input.base}) "
        "--corpus $(dirname {input.corpus}) --memory $(dirname {input.memory}) --name {wildcards.memory} "
        "{params.options} {params.window} --seed {wildcards.seed} --out $(dirname {output.manifest}) > {log} 2>&1"


rule evaluate_systems:
    input:
        base=f"{RUN}/models/{{model}}/manifest.json",
        corpus=f"{RUN}/corpora/{{domain}}/manifest.json",
        lora=[f"{HOME}/lora/{{model}}/manifest.json"] if "LoRA" in SYSTEMS else [],
        dapt=[f"{HOME}/{DAPT}/{{model}}/manifest.json"] if "DAPT" in SYSTEMS else [],
        knn=knn_queries,
    output:
        f"{HOME}/evaluation/systems/{{model}}/records.json",
        manifest=f"{HOME}/evaluation/systems/{{model}}/manifest.json",
    log:
        f"{LOG}/evaluate_systems/{{domain}}-{{seed}}-{{model}}.log",
    benchmark:
        f"{BENCHMARK}/evaluate_systems/{{domain}}-{{seed}}-{{model}}.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=600,
    params:
        options=options(section("evaluate")),
        lora=lambda w, input: folders("lora", input.lora),
        dapt=lambda w, input: folders("dapt", input.dapt),
        knn=lambda w, input: knn_option(input),
        window=WINDOW,
        stage=STAGE["evaluate"],
    shell:
        "OMP_NUM_THREADS={threads} memdec evaluate --base $(dirname {input.base}) "
        "--corpus $(dirname {input.corpus}) {params.lora} {params.dapt} {params.knn} "
        "{params.options} {params.window} --seed {wildcards.seed} --out $(dirname {output.manifest}) > {log} 2>&1"
