use rule finetune as evaluate with:
    input:
        base=f"{RUN}/models/{{model}}/manifest.json",
        corpus=f"{RUN}/corpora/{{domain}}/manifest.json",
        memory=evaluated_memory,
        also=GENERAL,
    output:
        manifest=f"{HOME}/evaluation/{{memory}}/{{model}}/manifest.json",
    log:
        f"{LOG}/evaluate/{{domain}}-{{seed}}-{{memory}}-{{model}}.log",
    benchmark:
        f"{BENCHMARK}/evaluate/{{domain}}-{{seed}}-{{memory}}-{{model}}.tsv"
    priority: 0
    params:
        command="evaluate",
        options=lambda w: f"{words('--name', w.memory, *control(w))} {evaluation(w)}",
        version=VERSIONS["evaluation"],


use rule evaluate as evaluate_systems with:
    input:
        unpack(own_keys),
        base=f"{RUN}/models/{{model}}/manifest.json",
        corpus=f"{RUN}/corpora/{{domain}}/manifest.json",
        lora=[f"{HOME}/lora/{{model}}/manifest.json"] if "lora" in NEEDED else [],
        dapt=[f"{HOME}/{DAPT}/{{model}}/manifest.json"] if "dapt" in NEEDED else [],
        passages=passages_of,
        also=GENERAL,
    output:
        manifest=f"{HOME}/evaluation/systems/{{model}}/manifest.json",
    log:
        f"{LOG}/evaluate_systems/{{domain}}-{{seed}}-{{model}}.log",
    benchmark:
        f"{BENCHMARK}/evaluate_systems/{{domain}}-{{seed}}-{{model}}.tsv"
    params:
        options=evaluation,


use rule evaluate as cases with:
    input:
        unpack(keys_of_memory),
        config=f"{RUN}/config.json",
        base=f"{RUN}/models/{{model}}/manifest.json",
        memory=f"{HOME}/memory/{{memory}}/manifest.json",
    output:
        manifest=f"{HOME}/cases/{{memory}}/{{model}}/manifest.json",
    log:
        f"{LOG}/cases/{{domain}}-{{seed}}-{{memory}}-{{model}}.log",
    benchmark:
        f"{BENCHMARK}/cases/{{domain}}-{{seed}}-{{memory}}-{{model}}.tsv"
    params:
        command="cases",
        options="",
        version=VERSIONS["cases"],
