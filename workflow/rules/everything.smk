TABLES = expand("results/{table}.cells.csv", table=wanted("table"))
FIGURES = expand("results/{figure}.svg", figure=wanted("figure"))
# Figures with numbers that no table has.
MEASURED = expand(
    "results/{figure}.csv",
    figure=[name for name in wanted("figure") if name in ("figure4", "figure6")],
)


# Every claim of the paper that the tables and figures of this scale can speak about.
use rule table as claims with:
    input:
        config=CONFIG_FILE,
        tables=TABLES,
        figures=MEASURED,
    output:
        main=report(
            "results/claims.csv",
            caption="../report/table.rst",
            category="Claims",
        ),
        markdown="results/claims.md",
    log:
        f"{LOG}/claims.log",
    benchmark:
        f"{BENCHMARK}/claims.tsv"
    resources:
        **requested("claims"),
    params:
        command="claims",
        options=lambda w, input: words(*input.tables, *input.figures),
        reads=lambda w: content(judged.FILE),
        caption="What the tables say about each claim of the paper.",
        version=VERSIONS["claims"],


use rule table as report_page with:
    input:
        config=CONFIG_FILE,
        tables=TABLES,
        figures=FIGURES,
        claims="results/claims.csv",
    output:
        main="results/report.html",
    log:
        f"{LOG}/report.log",
    benchmark:
        f"{BENCHMARK}/report.tsv"
    resources:
        **requested("report_page"),
    params:
        command="report",
        options="",
        reads=lambda w: content(*sorted(judged.FILE.parent.glob("report.*"))),
        caption="",
        version=VERSIONS["report"],


# The whole paper, as far as the studies of the config go.
rule everything:
    input:
        tables=expand("results/{table}.csv", table=wanted("table")),
        figures=FIGURES,
        claims="results/claims.csv",
        page="results/report.html",
        freed=freed(),
    output:
        "results/all",
    log:
        f"{LOG}/all.log",
    localrule: True
    conda:
        "../../environment.yml"
    shell:
        "printf '%s\\n' {input:q} > {output:q} 2> {log:q}"
