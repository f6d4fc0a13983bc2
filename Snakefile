# Memory Decoder Bench: everything that is measured is a file, and every file has one rule.
from snakemake.exceptions import WorkflowError
from snakemake.utils import min_version, validate

from memdec import settings as typed
from memdec.config import Config
from memdec.errors import ConfigError

min_version("9.0")


if not workflow.overwrite_configfiles:

    configfile: f"{workflow.basedir}/config/mini.yaml"


try:
    CONFIG = typed.parse(Config, config, "config")
except ConfigError as error:
    raise WorkflowError(str(error)) from None
validate(
    config, f"{workflow.basedir}/workflow/schemas/config.schema.json", set_default=False
)


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/corpora.smk"
include: "workflow/rules/models.smk"
include: "workflow/rules/memory.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/tables.smk"


rule all:
    default_target: True
    input:
        "results/table3.csv",
        ["results/table4.csv"] if OTHERS else [],
    localrule: True
