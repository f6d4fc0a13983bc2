# A memory beside a base, whose scores are those of its own evaluation.
use rule finetune as evaluate with:
    input:
        base=f"{RUN}/models/{{model}}/manifest.json",
        corpus=f"{RUN}/corpora/{{domain}}/manifest.json",
        base_evaluation=f"{HOME}/evaluation/systems/base/{{model}}/manifest.json",
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


# One system without a memory, by its slug (`System.slug`): the base alone, DAPT, LoRA, the kNN-LM or In-Context RAG.
use rule evaluate as evaluate_systems with:
    input:
        unpack(system_parts),
        base=f"{RUN}/models/{{model}}/manifest.json",
        corpus=f"{RUN}/corpora/{{domain}}/manifest.json",
        also=GENERAL,
    output:
        manifest=f"{HOME}/evaluation/systems/{{system}}/{{model}}/manifest.json",
    log:
        f"{LOG}/evaluate_systems/{{domain}}-{{seed}}-{{system}}-{{model}}.log",
    benchmark:
        f"{BENCHMARK}/evaluate_systems/{{domain}}-{{seed}}-{{system}}-{{model}}.tsv"
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
