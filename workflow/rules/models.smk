# All stages that run a model reuse this rule with other inputs, outputs and options.
use rule corpus as finetune with:
    input:
        model=manifest(f"{RUN}/models/{{model}}"),
        tokens=lambda w: tokens_of(w.model, domain_of(w)),
        tuned_by=lambda w: tuned_by(w, for_model(w).finetune, f"finetuned/{w.model}"),
    output:
        manifest=built(f"{HOME}/finetuned/{{model}}"),
    log:
        f"{LOG}/finetune/{{home}}-{{seed}}-{{model}}.log",
    benchmark:
        f"{BENCHMARK}/finetune/{{home}}-{{seed}}-{{model}}.tsv"
    priority: 5
    resources:
        **computing("finetune", launched=True),
    params:
        launch=lambda w: launched(w.model),
        command="finetune",
        options=lambda w: training(
            w, w.model, options(section(for_model(w), "finetune"))
        ),
        version=VERSIONS["finetune"],


# The DAPT baseline: the same training, limited by the FLOP budget.
use rule finetune as dapt with:
    input:
        model=manifest(f"{RUN}/models/{{model}}"),
        tokens=lambda w: tokens_of(w.model, domain_of(w)),
        budget_model=budget_model,
        tuned_by=lambda w: tuned_by(
            w, getattr(for_model(w), dapt_settings(w)), f"dapt/{w.model}"
        ),
    output:
        manifest=built(f"{HOME}/dapt/{{model}}"),
    log:
        f"{LOG}/dapt/{{home}}-{{seed}}-{{model}}.log",
    benchmark:
        f"{BENCHMARK}/dapt/{{home}}-{{seed}}-{{model}}.tsv"
    resources:
        **computing("dapt", launched=True),
    params:
        options=lambda w: training(
            w,
            w.model,
            options(section(for_model(w), dapt_settings(w))),
            budget(w),
        ),


use rule finetune as lora with:
    input:
        model=manifest(f"{RUN}/models/{{model}}"),
        tokens=lambda w: tokens_of(w.model, domain_of(w)),
        match=lambda w: (
            [manifest(f"{RUN}/models/{study(w).memory_model}")]
            if for_model(w).lora.rank is None
            else []
        ),
        budget_model=budget_model,
        tuned_by=lambda w: tuned_by(w, for_model(w).lora, f"lora/{w.model}"),
    output:
        manifest=built(f"{HOME}/lora/{{model}}"),
    log:
        f"{LOG}/lora/{{home}}-{{seed}}-{{model}}.log",
    benchmark:
        f"{BENCHMARK}/lora/{{home}}-{{seed}}-{{model}}.tsv"
    priority: 0
    resources:
        **computing("lora", launched=True),
    params:
        command="lora",
        options=lambda w: training(
            w, w.model, options(section(for_model(w), "lora")), budget(w)
        ),
        roles=lambda w: [study(w).memory_model, budget_model(w)],
        version=VERSIONS["lora"],


use rule finetune as model with:
    input:
        tokenizer=lambda w: manifest(f"{RUN}/tokenizers/{MODELS[w.model].tokenizer}"),
        tokens=lambda w: (
            [tokens_of(w.model, MODELS[w.model].corpus)]
            if MODELS[w.model].corpus
            else []
        ),
    output:
        manifest=built(f"{RUN}/models/{{model}}"),
    log:
        f"{LOG}/model/{{model}}.log",
    benchmark:
        f"{BENCHMARK}/model/{{model}}.tsv"
    priority: 10
    resources:
        **computing("model"),
    params:
        launch="memdec",
        command="model",
        options=lambda w: f"{spec('models', w.model)} {CONTEXT} {compute(w.model)}",
        source=lambda w: stamp(MODELS[w.model]),
        version=VERSIONS["model"],


use rule model as fetch_model with:
    wildcard_constraints:
        model=fetched(MODELS),
    localrule: True


ruleorder: fetch_model > model
