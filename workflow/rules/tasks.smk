# Tasks of lm-eval: one job is one system around one base over all tasks of a suite, with its models loaded once.
use rule evaluate as harness with:
    input:
        base=suite_base,
        memory=evaluated_memory,
        evaluation=tuned_memory,
    output:
        manifest=built(f"{HOME}/harness/{{suite}}/{{memory}}/{{model}}"),
    log:
        f"{LOG}/harness/{{home}}-{{seed}}-{{suite}}-{{memory}}-{{model}}.log",
    benchmark:
        f"{BENCHMARK}/harness/{{home}}-{{seed}}-{{suite}}-{{memory}}-{{model}}.tsv"
    resources:
        **computing("harness"),
    params:
        command="harness",
        options=lambda w: " ".join([words("--name", w.memory), tasks(w)]),
        source=suite_rows,
        version=VERSIONS["harness"],


use rule harness as harness_system with:
    input:
        unpack(system_parts),
        base=suite_base,
        evaluation=tuned_system,
    output:
        manifest=built(
            f"{HOME}/harness/{{suite}}/{typed.WITHOUT_MEMORY}/{{system}}/{{model}}"
        ),
    log:
        f"{LOG}/harness/{{home}}-{{seed}}-{{suite}}-{{system}}-{{model}}.log",
    benchmark:
        f"{BENCHMARK}/harness/{{home}}-{{seed}}-{{suite}}-{{system}}-{{model}}.tsv"
    resources:
        **computing("harness_system"),
    params:
        options=lambda w: tasks(w),


# The base alone depends on no domain and no seed.
use rule harness as harness_base with:
    input:
        base=suite_base,
    output:
        manifest=built(f"{RUN}/harness/{{suite}}/{{model}}"),
    log:
        f"{LOG}/harness/{{suite}}-{{model}}.log",
    benchmark:
        f"{BENCHMARK}/harness/{{suite}}-{{model}}.tsv"
    resources:
        **computing("harness_base"),
    params:
        options=lambda w: tasks(w),
