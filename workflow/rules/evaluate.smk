# A memory reads the texts once, whatever the number of bases that it is put beside.
use rule finetune as score with:
    input:
        unpack(neighbours_instead),
        corpus=lambda w: manifest(f"{RUN}/corpora/{domain_of(w)}"),
        memory=evaluated_memory,
        also=general,
    output:
        manifest=built(f"{HOME}/scores/{{memory}}"),
    log:
        f"{LOG}/score/{{home}}-{{seed}}-{{memory}}.log",
    benchmark:
        f"{BENCHMARK}/score/{{home}}-{{seed}}-{{memory}}.tsv"
    priority: 0
    resources:
        **computing("score"),
    params:
        launch="memdec",
        command="score",
        options=lambda w: f"{words(*control(w))} {scoring(w)} {WINDOW} {compute(model_of(w))}",
        version=VERSIONS["scores"],


use rule corpus as evaluate with:
    input:
        base=base_evaluation,
        scored=manifest(f"{HOME}/scores/{{memory}}"),
    output:
        manifest=built(f"{HOME}/evaluation/{{memory}}/{{model}}"),
    log:
        f"{LOG}/evaluate/{{home}}-{{seed}}-{{memory}}-{{model}}.log",
    benchmark:
        f"{BENCHMARK}/evaluate/{{home}}-{{seed}}-{{memory}}-{{model}}.tsv"
    resources:
        **requested("evaluate"),
    params:
        command="mix",
        options=lambda w: f"{words('--name', w.memory, '--seed', w.seed)} {mixing(w)}",
        version=VERSIONS["evaluation"],


use rule score as evaluate_systems with:
    input:
        unpack(system_parts),
        base=manifest(f"{RUN}/models/{{model}}"),
        corpus=lambda w: manifest(f"{RUN}/corpora/{domain_of(w)}"),
        also=general,
    output:
        manifest=built(f"{HOME}/evaluation/{typed.WITHOUT_MEMORY}/{{system}}/{{model}}"),
    log:
        f"{LOG}/evaluate_systems/{{home}}-{{seed}}-{{system}}-{{model}}.log",
    benchmark:
        f"{BENCHMARK}/evaluate_systems/{{home}}-{{seed}}-{{system}}-{{model}}.tsv"
    resources:
        **computing("evaluate_systems"),
    params:
        command="evaluate",
        options=evaluation,
        version=VERSIONS["evaluation"],


use rule score as cases with:
    input:
        unpack(lambda w: keys_and_index(w, memory(w).keys)),
        config=CONFIG_FILE,
        base=manifest(f"{RUN}/models/{{model}}"),
        memory=evaluated_memory,
        calibration=lambda w: calibration(w, memory(w).keys),
    output:
        manifest=built(f"{HOME}/cases/{{memory}}/{{model}}"),
    log:
        f"{LOG}/cases/{{home}}-{{seed}}-{{memory}}-{{model}}.log",
    benchmark:
        f"{BENCHMARK}/cases/{{home}}-{{seed}}-{{memory}}-{{model}}.tsv"
    resources:
        **computing("cases"),
    params:
        command="cases",
        options="",
        version=VERSIONS["cases"],
