rule evaluate:
    input:
        base=f"{RUN}/models/{{model}}/manifest.json",
        corpus=f"{RUN}/corpora/{{domain}}/manifest.json",
        memory=f"{RUN}/{{domain}}/seed{{seed}}/memory/manifest.json",
        lora=f"{RUN}/{{domain}}/seed{{seed}}/lora/{{model}}/manifest.json",
    output:
        f"{RUN}/{{domain}}/seed{{seed}}/evaluation/{{model}}/records.json",
        manifest=f"{RUN}/{{domain}}/seed{{seed}}/evaluation/{{model}}/manifest.json",
    log:
        f"{LOG}/evaluate/{{domain}}-{{seed}}-{{model}}.log",
    benchmark:
        f"{BENCHMARK}/evaluate/{{domain}}-{{seed}}-{{model}}.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=600,
    params:
        options=options("evaluate"),
        window=WINDOW,
        stage=STAGE["evaluate"],
    shell:
        "OMP_NUM_THREADS={threads} memdec evaluate --base $(dirname {input.base}) "
        "--corpus $(dirname {input.corpus}) --memory $(dirname {input.memory}) --lora $(dirname {input.lora}) "
        "{params.options} {params.window} --seed {wildcards.seed} --out $(dirname {output.manifest}) > {log} 2>&1"
