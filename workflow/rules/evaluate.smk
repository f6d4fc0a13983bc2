use rule finetune as evaluate with:
    input:
        unpack(neighbours_instead),
        base=f"{RUN}/models/{{model}}/manifest.json",
        corpus=lambda w: manifest(f"{RUN}/corpora/{domain_of(w)}"),
        memory=evaluated_memory,
        base_evaluation=base_evaluation,
        also=general,
    output:
        manifest=f"{HOME}/evaluation/{{memory}}/{{model}}/manifest.json",
    log:
        f"{LOG}/evaluate/{{home}}-{{seed}}-{{memory}}-{{model}}.log",
    benchmark:
        f"{BENCHMARK}/evaluate/{{home}}-{{seed}}-{{memory}}-{{model}}.tsv"
    priority: 0
    params:
        command="evaluate",
        options=lambda w: f"{words('--name', w.memory, *control(w))} {evaluation(w)}",
        version=VERSIONS["evaluation"],


use rule evaluate as evaluate_systems with:
    input:
        unpack(system_parts),
        base=f"{RUN}/models/{{model}}/manifest.json",
        corpus=lambda w: manifest(f"{RUN}/corpora/{domain_of(w)}"),
        also=general,
    output:
        manifest=f"{HOME}/evaluation/{typed.WITHOUT_MEMORY}/{{system}}/{{model}}/manifest.json",
    log:
        f"{LOG}/evaluate_systems/{{home}}-{{seed}}-{{system}}-{{model}}.log",
    benchmark:
        f"{BENCHMARK}/evaluate_systems/{{home}}-{{seed}}-{{system}}-{{model}}.tsv"
    params:
        options=evaluation,


use rule evaluate as cases with:
    input:
        unpack(lambda w: keys_and_index(w, memory(w).keys)),
        config=CONFIG_FILE,
        base=f"{RUN}/models/{{model}}/manifest.json",
        memory=lambda w: manifest(f"{at(w, 'memory')}/memory/{w.memory}"),
        calibration=lambda w: calibration(w, memory(w).keys),
    output:
        manifest=f"{HOME}/cases/{{memory}}/{{model}}/manifest.json",
    log:
        f"{LOG}/cases/{{home}}-{{seed}}-{{memory}}-{{model}}.log",
    benchmark:
        f"{BENCHMARK}/cases/{{home}}-{{seed}}-{{memory}}-{{model}}.tsv"
    params:
        command="cases",
        options="",
        version=VERSIONS["cases"],
