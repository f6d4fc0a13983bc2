rule evaluate:
    input:
        base=f"{RUN}/models/{{model}}/manifest.json",
        corpus=f"{RUN}/corpora/{{domain}}/manifest.json",
        memory=evaluated_memory,
        also=GENERAL,
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
        gpu=GPU,
    params:
        options=options(section("evaluate")),
        also=lambda w, input: folders("also", input.also),
        window=WINDOW,
        compute=COMPUTE,
        stage=STAGE["evaluate"],
    shell:
        "OMP_NUM_THREADS={threads} memdec evaluate --base $(dirname {input.base}) "
        "--corpus $(dirname {input.corpus}) --memory $(dirname {input.memory}) --name {wildcards.memory} "
        "{params.also} {params.options} {params.window} --seed {wildcards.seed} {params.compute} --out $(dirname {output.manifest}) > {log} 2>&1"


rule passages:
    input:
        tokens=f"{RUN}/tokens/{{tokenizer}}/{{domain}}/manifest.json",
    output:
        manifest=f"{RUN}/passages/{{tokenizer}}/{{domain}}/manifest.json",
    log:
        f"{LOG}/passages/{{tokenizer}}-{{domain}}.log",
    benchmark:
        f"{BENCHMARK}/passages/{{tokenizer}}-{{domain}}.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=60,
    params:
        options=options(section("passages")),
        stage=STAGE["passages"],
    shell:
        "OMP_NUM_THREADS={threads} memdec passages --tokens $(dirname {input.tokens}) {params.options} "
        "--out $(dirname {output.manifest}) > {log} 2>&1"


rule evaluate_systems:
    input:
        unpack(own_keys),
        base=f"{RUN}/models/{{model}}/manifest.json",
        corpus=f"{RUN}/corpora/{{domain}}/manifest.json",
        lora=[f"{HOME}/lora/{{model}}/manifest.json"] if "LoRA" in SYSTEMS else [],
        dapt=[f"{HOME}/{DAPT}/{{model}}/manifest.json"] if "DAPT" in SYSTEMS else [],
        passages=passages_of,
        also=GENERAL,
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
        gpu=GPU,
    params:
        options=options(section("evaluate")),
        parts=lambda w, input: evaluated_parts(input),
        also=lambda w, input: folders("also", input.also),
        window=WINDOW,
        compute=COMPUTE,
        stage=STAGE["evaluate"],
    shell:
        "OMP_NUM_THREADS={threads} memdec evaluate --base $(dirname {input.base}) "
        "--corpus $(dirname {input.corpus}) {params.parts} "
        "{params.also} {params.options} {params.window} --seed {wildcards.seed} {params.compute} --out $(dirname {output.manifest}) > {log} 2>&1"
