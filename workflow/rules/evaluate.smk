rule evaluate:
    input:
        base=RUN + "/models/{model}/manifest.json",
        corpus=RUN + "/corpora/{domain}/manifest.json",
        memory=RUN + "/{domain}/seed{seed}/memory/manifest.json",
        lora=RUN + "/{domain}/seed{seed}/lora/{model}/manifest.json",
    output:
        RUN + "/{domain}/seed{seed}/evaluation/{model}/records.json",
        manifest=RUN + "/{domain}/seed{seed}/evaluation/{model}/manifest.json",
    log:
        LOG + "/evaluate/{domain}-{seed}-{model}.log",
    benchmark:
        BENCHMARK + "/evaluate/{domain}-{seed}-{model}.tsv"
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
