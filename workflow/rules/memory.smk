use rule finetune as datastore with:
    input:
        model=key_model,
        tokens=key_tokens,
    output:
        manifest=built(f"{HOME}/keys/{{key}}/datastore/{{scatteritem}}"),
    log:
        f"{LOG}/datastore/{{home}}-{{seed}}-{{key}}-{{scatteritem}}.log",
    benchmark:
        f"{BENCHMARK}/datastore/{{home}}-{{seed}}-{{key}}-{{scatteritem}}.tsv"
    resources:
        **computing("datastore", launched=True),
    params:
        launch=lambda w: launched(key_name(w.key)),
        command="datastore",
        options=lambda w: f"{sharded(w, 'datastore')} {WINDOW} {compute(key_name(w.key))}",
        version=VERSIONS["datastore"],


use rule finetune as index with:
    input:
        unpack(lambda w: behind_keys(w, w.key)),
        datastore=lambda w: datastore(w, w.key),
    output:
        manifest=built(f"{HOME}/keys/{{key}}/index"),
    log:
        f"{LOG}/index/{{home}}-{{seed}}-{{key}}.log",
    benchmark:
        f"{BENCHMARK}/index/{{home}}-{{seed}}-{{key}}.tsv"
    resources:
        **computing("index"),
    params:
        launch="memdec",
        command="index",
        options=lambda w: f"{options(section(study(w), 'index'))} {DEVICE}",
        version=[VERSIONS["index"], VERSIONS["cells"]],


# What the key model's kNN-LM says on valid about the settings of the targets.
use rule finetune as calibrate with:
    input:
        unpack(lambda w: behind_keys(w, w.key)),
        model=key_model,
        datastore=lambda w: datastore(w, w.key),
        index=lambda w: index(w, w.key),
        tokens=key_tokens,
    output:
        manifest=built(f"{HOME}/keys/{{key}}/calibration"),
    log:
        f"{LOG}/calibrate/{{home}}-{{seed}}-{{key}}.log",
    benchmark:
        f"{BENCHMARK}/calibrate/{{home}}-{{seed}}-{{key}}.tsv"
    resources:
        **computing("calibrate"),
    params:
        launch="memdec",
        command="calibrate",
        options=lambda w: " ".join(
            [
                options(section(study(w), "calibrate")),
                cells_searched(study(w).targets),
                WINDOW,
                compute(key_name(w.key)),
            ]
        ),
        version=VERSIONS["calibration"],


use rule finetune as targets with:
    input:
        unpack(lambda w: behind_keys(w, w.key)),
        datastore=lambda w: datastore(w, w.key),
        index=lambda w: index(w, w.key),
        tokens=key_tokens,
        calibration=calibration,
    output:
        manifest=built(f"{HOME}/keys/{{key}}/targets/{{scatteritem}}"),
    log:
        f"{LOG}/targets/{{home}}-{{seed}}-{{key}}-{{scatteritem}}.log",
    benchmark:
        f"{BENCHMARK}/targets/{{home}}-{{seed}}-{{key}}-{{scatteritem}}.tsv"
    resources:
        **computing("targets"),
    params:
        launch="memdec",
        command="targets",
        options=lambda w: f"{sharded(w, 'targets')} {DEVICE}",
        version=VERSIONS["targets"],


use rule finetune as teacher with:
    input:
        model=key_model,
        tokens=key_tokens,
        calibration=calibration,
    output:
        manifest=built(f"{HOME}/keys/{{key}}/teacher/{{scatteritem}}"),
    log:
        f"{LOG}/teacher/{{home}}-{{seed}}-{{key}}-{{scatteritem}}.log",
    benchmark:
        f"{BENCHMARK}/teacher/{{home}}-{{seed}}-{{key}}-{{scatteritem}}.tsv"
    resources:
        **computing("teacher"),
    params:
        launch="memdec",
        command="teacher",
        options=lambda w: f"{sharded(w, 'teacher', 'knn_weight')} {WINDOW} {compute(key_name(w.key))}",
        version=VERSIONS["teacher"],


# The kNN-LM of the key model as the teacher.
use rule teacher as mixture with:
    input:
        model=key_model,
        tokens=key_tokens,
        targets=lambda w: targets(w, w.key),
        calibration=calibration,
    output:
        manifest=built(f"{HOME}/keys/{{key}}/mixture/{{scatteritem}}"),
    log:
        f"{LOG}/mixture/{{home}}-{{seed}}-{{key}}-{{scatteritem}}.log",
    benchmark:
        f"{BENCHMARK}/mixture/{{home}}-{{seed}}-{{key}}-{{scatteritem}}.tsv"
    resources:
        **computing("mixture"),
    params:
        options=lambda w: f"{sharded(w, 'teacher')} {WINDOW} {compute(key_name(w.key))}",


use rule corpus as adapt with:
    input:
        memory=lambda w: memory_folder(w, memory_study(w).variant(memory(w).adapt)),
        tokenizer=lambda w: manifest(f"{RUN}/tokenizers/{memory(w).tokenizer}"),
    output:
        manifest=built(f"{HOME}/adapted/{{memory}}"),
    log:
        f"{LOG}/adapt/{{home}}-{{seed}}-{{memory}}.log",
    benchmark:
        f"{BENCHMARK}/adapt/{{home}}-{{seed}}-{{memory}}.tsv"
    priority: 5
    resources:
        **requested("adapt"),
    params:
        command="adapt-vocab",
        options=lambda w: f"{options(section(study(w), 'adapt'))} {words('--seed', w.seed)}",
        version=VERSIONS["adapt-vocab"],


use rule finetune as train with:
    input:
        model=memory_start,
        tokens=lambda w: manifest(f"{RUN}/tokens/{memory(w).tokenizer}/{domain_of(w)}"),
        targets=memory_targets,
        base=memory_bases,
        budget_model=budget_model,
        tuned_by=lambda w: tuned_by(w, memory(w).train, f"memory/{w.memory}"),
    output:
        manifest=built(f"{HOME}/memory/{{memory}}"),
    log:
        f"{LOG}/train/{{home}}-{{seed}}-{{memory}}.log",
    benchmark:
        f"{BENCHMARK}/train/{{home}}-{{seed}}-{{memory}}.tsv"
    resources:
        **computing("train", launched=True),
    params:
        launch=lambda w: launched(memory(w).memory_model),
        command="train",
        options=lambda w: training(
            w,
            memory(w).memory_model,
            memory_options(w),
            budget(w, memory(w).share),
        ),
        roles=lambda w: [memory_start(w), memory_bases(w), budget_model(w)],
        version=lambda w: VERSIONS[
            "bild" if memory(w).train.objective == "bild" else "memory"
        ],
