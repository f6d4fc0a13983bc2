"""The tables of the paper with lm-eval tasks, as data: which tasks are their columns, which systems their rows.

The records come from harness folders (`memdec harness`), each of one system over one suite of the config. A table is
filled by the first domain whose suites (`tasks` of the config) have any of its tasks. A task that no suite has leaves
its column empty.
"""

from collections.abc import Iterable, Sequence
from functools import cache

from memdec import HARNESS_TASKS, plain
from memdec.config import Config
from memdec.errors import ConfigError
from memdec.results.layout import Column, Derived, Measured, Part, Row, seeds_of
from memdec.settings import SystemName

# Heading of the paper -> its task here.
NINE = ("SST2", "MR", "CR", "RT", "HYP", "CB", "RTE", "AGN", "Yahoo")  # each in two families, `nine`
BIOMED = {
    "ChemProt": "memdec_chemprot", "MQP": "memdec_mqp", "PubMedQA": "pubmedqa", "RCT": "memdec_rct",
    "USMLE": "memdec_usmle",
}  # fmt: skip
FINANCE = {
    "FiQA_SA": "memdec_fiqa_sa", "FPB": "memdec_fpb", "Headline": "memdec_headline", "NER": "memdec_ner",
    "ConvFinQA": "memdec_convfinqa",
}  # fmt: skip
LAW = {
    "SCOTUS_micro": ("memdec_scotus", "micro_f1"),
    "SCOTUS_macro": ("memdec_scotus", "macro_f1"),
    "CaseHOLD_micro": ("memdec_casehold", "micro_f1"),
    "CaseHOLD_macro": ("memdec_casehold", "macro_f1"),
    "UNFAIR_ToS": ("memdec_unfair_tos", "acc"),
}
SHOTS = {f"shot_{n}": "memdec_casehold" + (f"_{n}shot" if n else "") for n in (0, 4, 8, 16)}
QUESTIONS = {"NQ": "memdec_nq", "HotpotQA": "memdec_hotpotqa"}
_DOMAIN_SYSTEMS: tuple[SystemName, ...] = ("base", "DAPT", "LoRA", "MemDec")


def table2(config: Config) -> Measured:
    """Make Table 2: the nine zero-shot tasks under every system."""
    columns = {heading: _percent(task, "acc") for heading, task in nine(config).items()}
    caption = (
        "Accuracy of every system on nine zero-shot tasks, scored by domain-conditional PMI (the paper's Table 2)."
    )
    systems: tuple[SystemName, ...] = ("base", "kNN-LM", "DAPT", "LoRA", "MemDec")
    return _by_system(config, "table2", caption, columns, systems, "GPT2-small", "MemDec")


def table5(config: Config) -> Measured:
    """Make Table 5: closed-book questions; the paper names no metric, so both are here."""
    columns = {}
    for heading, task in QUESTIONS.items():
        for label, metric in (("EM", "exact_match"), ("F1", "f1")):
            where = {"task": task, "metric": metric}
            columns[f"{heading} {label}"] = Column(where, "percent", False, factor=100, paper=heading)
    caption = "Exact match and F1 of every system on closed-book questions (the paper's Table 5)."
    systems: tuple[SystemName, ...] = ("base", "kNN-LM", "MemDec")
    return _by_system(config, "table5", caption, columns, systems, "Llama3-8B", "MemDec (1B)", mean=False)


def table11(config: Config) -> Measured:
    """Make Table 11: the alpha of each of the nine tasks, tuned on the rows for that."""
    tasks = nine(config)
    domain, suites = _suites(config, "table11", tasks.values())
    tuned = [name for name in suites if config.suites[name].alpha == "tune"]
    if not tuned:
        raise ConfigError(
            f"table11: expected a suite of {domain} with alpha tune, found {', '.join(suites)} with other ones; add one to "
            "'suites' and 'tasks' of the config"
        )
    models = [model for model in config.bases if memory_of(config, model) is not None]
    rows = [Row({"task": heading}, {"task": task}, {"task": heading}) for heading, task in tasks.items()]
    columns: dict[str, Column | Derived] = {}
    for model in models:
        where = {"domain": domain, "model": model, "method": "MemDec", "metric": "acc"}
        paper = "alpha" if _is_the_papers(config, model, "GPT2-small") else None
        columns[model] = Column(where, "alpha", None, of="alpha", paper=paper)
    return Measured(
        name="table11",
        config=config,
        caption="Alpha of each zero-shot task, tuned on rows that are not scored (the paper's Table 11); tasks without such "
        "rows have the paper's.",
        parts=_parts(config, domain, tuned, models, ["MemDec"]),
        rows=list(rows),
        columns=columns,
        extra=("sd",),
        what="Weight of the memory with the highest accuracy on the task's rows for tuning",
    )


def table12(config: Config) -> Measured:
    """Make Table 12: the LM score against the DCPMI score of base and DAPT on two tasks, and what DAPT changes."""
    tasks = {heading: nine(config)[heading] for heading in ("Yahoo", "HYP")}
    domain, suites = _suites(config, "table12", tasks.values())
    if not {"base", "DAPT"} <= set(config.systems):
        raise ConfigError(
            f"table12: expected base and DAPT among the systems, found {', '.join(config.systems)}; add them to 'systems'"
        )
    columns: dict[str, Column | Derived] = {}
    for heading, task in tasks.items():
        for score, metric in (("LM", "acc_lm"), ("DCPMI", "acc")):
            where = {"domain": domain, "task": task, "metric": metric}
            columns[f"{heading}_{score}"] = Column(where, "fraction", False, decimals=3)
    columns["Avg"] = Derived("mean", tuple(columns), paper="Avg")
    rows: list[Row | Derived] = []
    for model in config.bases:
        first = len(rows)
        rows.append(Row({"model": model, "method": "base"}, {"model": model, "method": "base"}, {"model": model}))
        where, paper = {"model": model, "method": "DAPT"}, {"model": f"{model} + DAPT"}
        rows.append(Row({"model": model, "method": "DAPT"}, where, paper))
        paper = {"model": f"delta {model}"}
        rows.append(Derived("difference", (first + 1, first), {"model": model, "method": "difference"}, paper))
    return Measured(
        name="table12",
        config=config,
        caption="Accuracy by the plain score of the language model and by DCPMI, before and after DAPT (the paper's Table "
        "12).",
        parts=_parts(config, domain, suites, config.bases, ["base", "DAPT"]),
        rows=rows,
        columns=columns,
        extra=("n", "low", "high"),
        what="Accuracy as a fraction (higher is better)",
        gaps=_gaps(config, domain, suites, rows, columns),
    )


def table14(config: Config) -> Measured:
    """Make Table 14: the biomedical tasks."""
    return _domain_tasks(config, "table14", "biomedical", {name: (task, "score") for name, task in BIOMED.items()})


def table15(config: Config) -> Measured:
    """Make Table 15: the financial tasks."""
    return _domain_tasks(config, "table15", "financial", {name: (task, "score") for name, task in FINANCE.items()})


def table16(config: Config) -> Measured:
    """Make Table 16: the legal tasks; two of them have two columns, as in the paper."""
    return _domain_tasks(config, "table16", "legal", LAW)


def table18(config: Config) -> Measured:
    """Make Table 18: CaseHOLD with 0, 4, 8 and 16 demonstrations."""
    domain, suites = _suites(config, "table18", SHOTS.values())
    models, systems = config.bases, [name for name in config.systems if name in ("base", "MemDec")]
    columns: dict[str, Column | Derived] = {
        heading: Column({"domain": domain, "task": task}, "percent", False, factor=100)
        for heading, task in SHOTS.items()
    }
    columns["best"] = Derived("best", tuple(SHOTS), paper="best")
    rows = []
    for metric in ("micro", "macro"):
        for model in models:
            for method in systems:
                label = {"base": "Qwen2.5-7B", "MemDec": "MemDec (0.5B)"}[method]
                paper = {"metric": metric, "method": label} if _is_the_papers(config, model, "Qwen2.5-7B") else None
                where = {"model": model, "metric": f"{metric}_f1"} | _of_method(config, model, method)
                rows.append(Row({"metric": metric, "model": model, "method": method}, where, paper))
    return Measured(
        name="table18",
        config=config,
        caption="Micro and macro F1 on CaseHOLD with 0 to 16 demonstrations in the prompt (the paper's Table 18).",
        parts=_parts(config, domain, suites, models, systems),
        rows=list(rows),
        columns=columns,
        extra=("n", "alpha", "low", "high"),
        what="F1 in percent (higher is better)",
        gaps=_gaps(config, domain, suites, rows, columns),
    )


def nine(config: Config) -> dict[str, str]:
    """The nine tasks by their heading, of the family that the suites of the config have.

    `_kp` is the recommended one. A small tokenizer cannot answer it, as it needs every label word to be one token; `_kl`
    does not.
    """
    there = {
        task for domain in config.domains for suite in config.tasks.get(domain, []) for task in _tasks(config, suite)
    }
    families = {name: {heading: f"dcpmi_{heading.lower()}_{name}" for heading in NINE} for name in ("kp", "kl")}
    return next((tasks for tasks in families.values() if not there.isdisjoint(tasks.values())), families["kp"])


# --- what they share --------------------------------------------------------------------------------------------------


def memory_of(config: Config, model: str) -> str | None:
    """Name of the memory that a model has in the numbered tables: the first of its tokenizer."""
    memory = config.memory_for(model)
    return None if memory is None else memory.name


@cache
def leaves(name: str) -> tuple[str, ...]:
    """The tasks of a group of ours, at any depth; of a task, itself."""
    file = next(HARNESS_TASKS.rglob(f"{name}.yaml"), None)
    if file is None or not any(line.startswith("group:") for line in file.read_text(encoding="utf-8").splitlines()):
        return (name,)
    return tuple(leaf for child in plain.read(file)["task"] for leaf in leaves(child))


def _percent(task: str, metric: str) -> Column:
    return Column({"task": task, "metric": metric}, "percent", False, factor=100)


def _domain_tasks(config: Config, name: str, which: str, tasks: dict[str, tuple[str, str]]) -> Measured:
    caption = f"Scores of every system on the {which} tasks, in the metric of the paper (its Table {name[5:]})."
    columns = {heading: _percent(*where) for heading, where in tasks.items()}
    return _by_system(config, name, caption, columns, _DOMAIN_SYSTEMS, "Qwen2.5-7B", "MemDec (0.5B)")


def _by_system(
    config: Config,
    name: str,
    caption: str,
    columns: dict[str, Column],
    allowed: Sequence[SystemName],
    papers_model: str,
    papers_memory: str,
    mean: bool = True,
) -> Measured:
    """Make a table with rows (model, method), a column per task and metric, and their mean.

    Args:
        config: Config of the study.
        name: Name of the table.
        caption: Caption in the report.
        columns: Measured columns.
        allowed: Systems of the paper's table; those of the config among them are the rows.
        papers_model: The one base model of the paper's table, which is not in its labels.
        papers_memory: How the paper's table calls the row of MemDec.
        mean: Whether the columns have a mean.
    """
    domain, suites = _suites(config, name, (column.where["task"] for column in columns.values()))
    systems = [system for system in config.systems if system in allowed]
    rows = []
    for model in config.bases:
        for method in systems:
            label = papers_memory if method == "MemDec" else method
            paper = {"method": label} if _is_the_papers(config, model, papers_model) else None
            where = {"domain": domain, "model": model} | _of_method(config, model, method)
            rows.append(Row({"model": model, "method": method}, where, paper))
    if not rows:
        raise ConfigError(
            f"{name}: expected one of {', '.join(allowed)} in 'systems', found {', '.join(config.systems)}; add one"
        )
    shown: dict[str, Column | Derived] = {**columns}
    if mean:
        shown["Avg"] = Derived("mean", tuple(columns), paper="Avg")
    return Measured(
        name=name,
        config=config,
        caption=caption,
        parts=_parts(config, domain, suites, config.bases, systems),
        rows=list(rows),
        columns=shown,
        extra=("n", "alpha", "lambda", "low", "high", "labels"),
        what="Percent (higher is better)",
        gaps=_gaps(config, domain, suites, rows, shown),
    )


def _suites(config: Config, name: str, tasks: Iterable[str]) -> tuple[str, list[str]]:
    """The first domain that has suites with any of these tasks, and these suites.

    Raises:
        ConfigError: No domain has one.
    """
    wanted = list(dict.fromkeys(tasks))
    for domain in config.domains:
        found = [suite for suite in config.tasks.get(domain, []) if not _tasks(config, suite).isdisjoint(wanted)]
        if found:
            return domain, found
    some = ", ".join(wanted[:3]) + (" ..." if len(wanted) > 3 else "")
    listed = "; ".join(f"{domain} with {', '.join(names)}" for domain, names in config.tasks.items())
    raise ConfigError(
        f"{name}: expected a domain with a suite that has {some}, found {listed or 'no suites'}; add one to 'suites' and "
        "'tasks' of the config"
    )


def _tasks(config: Config, suite: str) -> set[str]:
    return {leaf for name in config.suites[suite].tasks for leaf in leaves(name)}


def _gaps(
    config: Config,
    domain: str,
    suites: Sequence[str],
    rows: Sequence[Row | Derived],
    columns: dict[str, Column | Derived],
) -> dict[tuple[int, str], str]:
    """Columns without a number because no suite has their task."""
    there = {task for suite in suites for task in _tasks(config, suite)}
    lacking = {
        heading: column.where["task"]
        for heading, column in columns.items()
        if isinstance(column, Column) and column.where["task"] not in there
    }
    return {
        (number, heading): f"not run: no suite of {domain} has {task}"
        for number in range(len(rows))
        for heading, task in lacking.items()
    }


def _of_method(config: Config, model: str, method: str) -> dict[str, str]:
    memory = memory_of(config, model) if method == "MemDec" else None
    return {"method": method} | ({"memory": memory} if memory is not None else {})


def _is_the_papers(config: Config, model: str, papers_model: str) -> bool:
    """Whether the numbers of a table with one base model, which its labels do not name, belong beside this model."""
    return model == papers_model or config.bases == [model]


def _parts(
    config: Config, domain: str, suites: Sequence[str], models: Sequence[str], systems: Sequence[SystemName]
) -> list[Part]:
    """The harness folders of these systems; the base alone is the same for all domains, too."""
    found = []
    for suite in suites:
        for model in models:
            for system in systems:
                memory = memory_of(config, model) if system == "MemDec" else None
                if system in config.systems_of(model) and (system != "MemDec" or memory is not None):
                    found += [
                        Part("harness", domain, model, seed, system, memory, suite) for seed in seeds_of(config, system)
                    ]
    return found
