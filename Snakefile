# `snakemake` in this folder finds this file and profiles/default. The workflow is where the workflow catalogue wants it.
include: "workflow/Snakefile"


rule default:
    default_target: True
    input:
        rules.all.input,
    localrule: True
