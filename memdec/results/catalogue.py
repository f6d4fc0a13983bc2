"""The tables of the paper, and some of ours, as data: from the config, which rows, columns and artefacts each has.

The numbers are those of arXiv v1; `results/reference/paper/numbering.csv` has them in the other versions.

- Perplexities: `table1`, `table3`, `table4` (systems), `table7` (every alpha), `table8`, `table9`, `table17`, `table19`
  (memories), `table10` (tuned alphas); ours: `memories`, `objectives` and `rivals` (memories beside all
  systems) and `forgetting` (the same on general text).
- Tasks (`task_tables`): `table2`, `table5`, `table11`, `table12`, `table14`, `table15`, `table16`, `table18`.
- Others: `table6`, the probabilities of marked words; `table13`, the sizes of the corpora.

To add a table, add an entry to `TABLES`, and its name to `settings.TableName`. `memdec table --name` and the workflow
read everything else from the entry.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from memdec.config import Config
from memdec.errors import ConfigError
from memdec.inference.systems import SYSTEMS
from memdec.results import task_tables
from memdec.results.layout import PERPLEXITY, Column, Derived, Measured, Part, Row, Table, seeds_of
from memdec.results.task_tables import memory_of
from memdec.settings import DEFAULT_MEMORY, FORGETTING, SystemName, near

ALPHAS = tuple(round(0.05 * i, 2) for i in range(21))  # of Table 7; the paper prints 0.4 to 0.8
AVERAGE = "Avg"
_PAPERS_MODELS = {  # of Table 7
    *(f"Qwen2-{size}" for size in ("0.5B", "1.5B", "7B", "72B")),
    *(f"Qwen2.5-{size}" for size in ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B")),
}
# How the paper calls a memory by the model that it starts from (Table 8), and what gave its keys (Table 19).
_SIZES = {
    "GPT2-small": "MemDec-small (124M)",
    "GPT2-medium": "MemDec-medium (345M)",
    "GPT2-large": "MemDec-large (774M)",
}
_SOURCES = {"GPT2-small": "from_small", "GPT2-medium": "from_medium", "GPT2-large": "from_large"}
_OF_SIZE = ("train.learning_rate", "train.epochs", "train.batch_size", "train.warmup")  # what may differ with it
_OBJECTIVES = {"kl": "KL only", "ce": "CE only", "hybrid": "MemDec (KL + CE)"}


def table(config: Config, name: str) -> Table:
    """Make a table by its name, from the study of the config that fills it.

    Raises:
        ConfigError: There is no such table, or the study cannot fill it; the message says what is missing.
    """
    if name not in TABLES:
        raise ConfigError(f"table: expected one of {', '.join(TABLES)}, found {name!r}{near(name, TABLES)}")
    return TABLES[name](config.study_for(name))


def weights(config: Config) -> list[str]:
    """Names of the mixing weights in a config: alpha (a memory), lambda (p_kNN)."""
    found = {SYSTEMS[name].weight for name in config.systems}
    return [name for name in ("alpha", "lambda") if name in found]


def main_tables(config: Config) -> list[str]:
    """Tables 3 and 4, each only if its study has models for it."""
    return [name for name in ("table3", "table4") if _models(config.study_for(name), name)]


# --- systems around several base models -----------------------------------------------------------------------------


def table1(config: Config) -> Measured:
    """Make Table 1: every system on the first domain, with the first memory and the controls."""
    models, domain = _some_models(config, "table1"), config.domains[0]
    rows = [
        Row({"method": name}, {"domain": domain} | _method(config, models[0], name), {"method": name})
        for name in config.systems
    ]
    rows += [
        Row({"method": label}, {"domain": domain, "method": "MemDec", "memory": memory})
        for label, memory in _controls(config).items()
    ]
    memories = [*_first_memories(config, models), *_controls(config).values()]
    return Measured(
        name="table1",
        config=config,
        caption="Perplexity of every system on one domain (the paper's Table 1): a row per system, a column per base "
        "model.",
        parts=_evaluations(config, models, config.systems, memories, [domain]),
        rows=list(rows),
        columns=_averaged({model: Column({"model": model}) for model in models}),
        extra=("n", *weights(config), "low", "high"),
    )


def table3(config: Config) -> Measured:
    """Make Table 3: the models with the tokenizer of the key model, on all domains."""
    caption = "Perplexity of every base model alone, with LoRA, and with the memory decoder of the domain (the paper's Table 3)."
    return _by_model(config, "table3", caption)


def table4(config: Config) -> Measured:
    """Make Table 4: the models with another tokenizer than the key model, on all domains."""
    caption = "As Table 3, for base models of other tokenizers, with an adapted memory (the paper's Table 4)."
    return _by_model(config, "table4", caption)


def _by_model(config: Config, name: str, caption: str) -> Measured:
    """Make a table with rows (family, model, method) and a column per domain; each model has its first memory."""
    models, controls, rows = _some_models(config, name), _controls(config), []
    for model in models:
        for method in config.systems:
            rows.append(_row(config, model, "method", method, _method(config, model, method)))
        for label, memory in controls.items():
            if model in config.variant(memory).models:
                rows.append(_row(config, model, "method", label, {"method": "MemDec", "memory": memory}))
    memories = [*_first_memories(config, models), *controls.values()]
    return Measured(
        name=name,
        config=config,
        caption=caption,
        parts=_evaluations(config, models, config.systems, memories, config.domains),
        rows=list(rows),
        columns=_averaged(_domains(config)),
        extra=("n", *weights(config), "low", "high"),
    )


def table7(config: Config) -> Measured:
    """Make Table 7: the mean perplexity of all models at every alpha, and its ratio to the best one."""
    models = [model for model in config.bases if "MemDec" in config.systems and memory_of(config, model) is not None]
    if not models:
        raise ConfigError("table7: expected a base model with a memory, found none; add MemDec to 'systems'")
    columns: dict[str, Column | Derived] = {}
    for domain in config.domains:
        where = {"method": "MemDec", "domain": domain}
        columns[domain] = Column(where, decimals=3, paper="avg_ppl" if domain == "Law" else None)
        paper = "relative" if domain == "Law" else None
        columns[f"{domain} relative"] = Derived("relative", (domain,), paper=paper)
    rows = [Row({"alpha": f"{alpha:g}"}, {"weight": f"{alpha:g}"}, {"alpha": f"{alpha:g}"}) for alpha in ALPHAS]
    if set(models) != _PAPERS_MODELS:  # another mean than the paper's
        rows = [replace(row, paper=None) for row in rows]
    return Measured(
        name="table7",
        config=config,
        caption="Perplexity at every alpha, as the mean over all base models with the memory of their tokenizer, and its "
        "ratio to the best alpha (the paper's Table 7).",
        parts=_evaluations(config, models, ["MemDec"], _first_memories(config, models), config.domains),
        rows=list(rows),
        columns=columns,
        extra=("n", "low", "high"),
        alphas=ALPHAS,
        what=f"Test perplexity per token (lower is better), mean over {', '.join(models)}",
    )


# --- memories ---------------------------------------------------------------------------------------------------------


def table8(config: Config) -> Measured:
    """Make Table 8: memories of several sizes, on the first domain."""
    models, domain = _some_models(config, "table8"), config.domains[0]
    memories = _differing(config, "memory_model", *_OF_SIZE)
    systems: list[SystemName] = [name for name in config.systems if name in ("base", "DAPT")]
    order = list(config.models)
    memories.sort(key=lambda name: order.index(config.variant(name).memory_model))
    if len(memories) < 2 or "MemDec" not in config.systems:
        raise ConfigError(_no_memories("table8", "that starts from another model than the default one", "memory_model"))
    rows = [Row({"method": name}, {"method": name}, {"method": name}) for name in systems]
    for name in memories:
        start = config.variant(name).memory_model
        paper = {"method": _SIZES[start]} if start in _SIZES else None
        rows.append(Row({"method": f"MemDec: {start}"}, {"method": "MemDec", "memory": name}, paper))
    return Measured(
        name="table8",
        config=config,
        caption="Perplexity with memories of several sizes on one domain (the paper's Table 8).",
        parts=_evaluations(config, models, [*systems, "MemDec"], memories, [domain]),
        rows=list(rows),
        columns=_averaged({model: Column({"model": model, "domain": domain}) for model in models}),
        extra=("sd", "n", "alpha", "low", "high"),
        gaps=_other_models(config, rows, models),
    )


def table9(config: Config) -> Measured:
    """Make Table 9: the two parts of the objective alone, on the first domain and the models that have all three."""
    domain = config.domains[0]
    chosen: dict[str, str] = {}
    for name in _differing(config, "train.objective"):
        chosen.setdefault(config.variant(name).train.objective, name)
    chosen = {objective: chosen[objective] for objective in _OBJECTIVES if objective in chosen}
    if set(chosen) != set(_OBJECTIVES) or "MemDec" not in config.systems:
        raise ConfigError(_no_memories("table9", "with the objectives kl and ce beside hybrid", "train.objective"))
    models = [model for model in config.bases if all(model in config.variant(name).models for name in chosen.values())]
    if not models:
        raise ConfigError(
            f"table9: expected a base model with the memories {', '.join(chosen.values())}, found none; let their 'models' "
            "have one in common"
        )
    rows = [
        Row({"objective": objective}, {"method": "MemDec", "memory": chosen[objective]}, {"objective": paper})
        for objective, paper in _OBJECTIVES.items()
    ]
    return Measured(
        name="table9",
        config=config,
        caption="Perplexity with memories trained on one part of the objective or both (the paper's Table 9).",
        parts=_evaluations(config, models, ["MemDec"], list(chosen.values()), [domain]),
        rows=list(rows),
        columns=_averaged({model: Column({"model": model, "domain": domain}) for model in models}),
        extra=("sd", "n", "alpha", "low", "high"),
    )


def table10(config: Config) -> Measured:
    """Make Table 10: the alpha that is tuned for each base model of Table 1."""
    models, domain = _some_models(config, "table10"), config.domains[0]
    if "MemDec" not in config.systems:
        raise ConfigError("table10: expected MemDec among the systems, found none; add it to 'systems'")
    rows = [Row({"model": name}, {"model": name} | _method(config, name, "MemDec"), {"model": name}) for name in models]
    where = {"domain": domain}
    return Measured(
        name="table10",
        config=config,
        caption="Alpha tuned on the valid text for every base model (the paper's Table 10).",
        parts=_evaluations(config, models, ["MemDec"], _first_memories(config, models), [domain]),
        rows=list(rows),
        columns={"alpha": Column(where, "alpha", None, of="alpha")},
        extra=("sd",),
        what=f"Weight of the memory with the lowest valid perplexity on {domain}",
    )


def table17(config: Config) -> Measured:
    """Make Table 17: the memory against a DAPT model of its size that is mixed in, on the first domain."""
    models, domain = _some_models(config, "table17"), config.domains[0]
    dapt = _controls(config).get("control: DAPT")
    if dapt is None or "MemDec" not in config.systems:
        raise ConfigError(_no_memories("table17", "that is a DAPT model of the default one's size", "dapt: true"))
    columns: dict[str, Column | Derived] = {
        "base": Column({"domain": domain, "method": "base"}, paper="baseline"),
        "+ DAPT": Column({"domain": domain, "method": "MemDec", "memory": dapt}, paper="plus_DAPT_small"),
        "+ MemDec": Column({"domain": domain, "method": "MemDec", "memory": DEFAULT_MEMORY}, paper="plus_MemDec_small"),
        "gap": Derived("difference", ("+ DAPT", "+ MemDec"), paper="gap"),
    }
    return Measured(
        name="table17",
        config=config,
        caption="Perplexity with a memory and with a DAPT model of its size that is mixed in (the paper's Table 17); gap "
        "is the second minus the third column.",
        parts=_evaluations(config, models, ["base", "MemDec"], [dapt, DEFAULT_MEMORY], [domain]),
        rows=_with_average([Row({"model": name}, {"model": name}, {"base_model": name}) for name in models]),
        columns=columns,
        extra=("sd", "n", "alpha", "low", "high"),
    )


def table19(config: Config) -> Measured:
    """Make Table 19: memories with the keys of several models, on the first domain."""
    models, domain = _some_models(config, "table19"), config.domains[0]
    memories = _differing(config, "key_model")
    order = list(config.models)
    memories.sort(key=lambda name: order.index(config.variant(name).key_model))
    if len(memories) < 2 or "MemDec" not in config.systems:
        raise ConfigError(_no_memories("table19", "with the keys of another model than the default one", "key_model"))
    columns: dict[str, Column | Derived] = {"base": Column({"domain": domain, "method": "base"}, paper="baseline")}
    for name in memories:
        key = config.variant(name).key_model
        where = {"domain": domain, "method": "MemDec", "memory": name}
        columns[f"keys of {key}"] = Column(where, paper=_SOURCES.get(key))
    rows = [Row({"model": name}, {"model": name}, {"base_model": name}) for name in models]
    return Measured(
        name="table19",
        config=config,
        caption="Perplexity with memories that were trained on the neighbours of several models (the paper's Table 19).",
        parts=_evaluations(config, models, ["base", "MemDec"], memories, [domain]),
        rows=_with_average(rows),
        columns=columns,
        extra=("sd", "n", "alpha", "low", "high"),
    )


def memories(config: Config) -> Measured:
    """Make `memories`: all systems and all memories, for every model."""
    return _all_memories(
        config, "memories", config.memory_names, "Every memory of the config beside every other system."
    )


def objectives(config: Config) -> Measured:
    """Make `objectives`: as `memories`, with the memories that differ in what they are trained on (appendix H)."""
    allowed = {"targets", "dapt", "other_domain", "neighbours"}
    chosen = [
        name
        for name in config.memory_names
        if {each for each in _differs(config, name) if not each.startswith("train.")} <= allowed
    ]
    if all(config.variant(name).train.objective == config.memory.objective for name in chosen):
        raise ConfigError(_no_memories("objectives", "with another objective than the default one", "train.objective"))
    caption = "Memories by what they are trained on (the paper's appendix H), beside every other system."
    return _all_memories(config, "objectives", chosen, caption)


def rivals(config: Config) -> Measured:
    """Make `rivals`: as `memories`, with the memories that the default one must beat to be worth its datastore."""
    chosen = [DEFAULT_MEMORY, *(name for name in config.other_memories if _is_rival(config, name))]
    if not any(config.variant(name).train.objective == "ce" for name in chosen):
        raise ConfigError(_no_memories("rivals", "on hard labels beside the default one", "train.objective ce"))
    caption = "The memory beside every other way to use the text of a domain, all tuned on valid."
    return _all_memories(config, "rivals", chosen, caption)


def _is_rival(config: Config, name: str) -> bool:
    """Whether a memory is trained as the default one on something else, or is mixed in without a training of its own."""
    return _differs(config, name) <= {"targets", "train.objective"} or name in _controls(config).values()


def forgetting(config: Config) -> Measured:
    """Make `forgetting`: the same rows on general text, with the weights tuned on the domain."""
    if not config.forgetting:
        raise ConfigError(
            "forgetting: expected general corpora in 'forgetting' of the config, found none; name one of 'corpora'"
        )
    columns = {
        f"{domain} on {on}": Column({"domain": domain, "on": on})
        for domain in config.domains
        for on in config.forgetting
    }
    caption = (
        "Perplexity on general text of the systems made for each domain, at the weights tuned on the domain: it shows what "
        "is forgotten."
    )
    what = f"Test perplexity on {', '.join(config.forgetting)} per token (lower is better)"
    return _all_memories(config, "forgetting", config.memory_names, caption, columns, FORGETTING, what)


def _all_memories(
    config: Config,
    name: str,
    chosen: Sequence[str],
    caption: str,
    columns: dict[str, Column] | None = None,
    records: str = "records.json",
    what: str = PERPLEXITY,
) -> Measured:
    return Measured(
        name=name,
        config=config,
        caption=f"{caption.removesuffix('.')}, with the standard deviation over seeds.",
        parts=_evaluations(config, config.bases, config.systems, chosen, config.domains),
        rows=list(_all_rows(config, chosen)),
        columns=_averaged(columns or _domains(config)),
        extra=("sd", *weights(config), "n", "low", "high"),
        records=records,
        what=what,
    )


# --- marked words, corpora --------------------------------------------------------------------------------------------


def table6(config: Config) -> Table:
    """Make Table 6: the probabilities of marked words under memory, kNN and base; first domain and seed."""
    if not config.cases:
        raise ConfigError(
            "table6: expected marked words in 'cases' of the config, found none; add them as config/mini.yaml does"
        )
    caption = "Probability of marked words under memory, kNN and base, in percent (the paper's Table 6)."
    part = Part("cases", config.domains[0], config.key_model, config.seeds[0], "MemDec", DEFAULT_MEMORY)
    return Table("table6", config, caption, [part])


def table13(config: Config) -> Measured:
    """Make Table 13: the sizes of the domains' corpora."""
    rows: list[Row | Derived] = [Row({"corpus": name}, {"domain": name}, {"corpus": name}) for name in config.domains]
    if len(rows) > 1:
        total = {"corpus": "Total (as printed)"}
        rows.append(Derived("sum", tuple(range(len(rows))), {"corpus": "Total"}, total))
    sizes = {"train": "size", "valid": None, "test": None}
    columns: dict[str, Column | Derived] = {
        split: Column({"metric": f"{split} bytes"}, "MB", None, factor=1e-6, decimals=3, paper=paper)
        for split, paper in sizes.items()
    }
    columns["documents"] = Column({"metric": "documents"}, "documents", None, decimals=0)
    return Measured(
        name="table13",
        config=config,
        caption="Sizes of the corpora of the domains, in MB of UTF-8 text, and documents of all splits (the paper's Table "
        "13).",
        parts=[Part("corpus", name) for name in config.domains],
        rows=rows,
        columns=columns,
        what="MB (1,000,000 bytes) of UTF-8 text in each split, and documents in all of them",
    )


TABLES: dict[str, Callable[[Config], Table]] = {
    "table1": table1,
    "table2": task_tables.table2,
    "table3": table3,
    "table4": table4,
    "table5": task_tables.table5,
    "table6": table6,
    "table7": table7,
    "table8": table8,
    "table9": table9,
    "table10": table10,
    "table11": task_tables.table11,
    "table12": task_tables.table12,
    "table13": table13,
    "table14": task_tables.table14,
    "table15": task_tables.table15,
    "table16": task_tables.table16,
    "table17": table17,
    "table18": task_tables.table18,
    "table19": table19,
    "objectives": objectives,
    "rivals": rivals,
    "memories": memories,
    "forgetting": forgetting,
}


# --- rows, columns and parts ------------------------------------------------------------------------------------------


def _models(config: Config, name: str) -> list[str]:
    """Base models of a numbered table: those with the key model's tokenizer; in Table 4 all others."""
    own = config.models[config.key_model].tokenizer
    return [model for model in config.bases if (config.models[model].tokenizer == own) == (name != "table4")]


def _some_models(config: Config, name: str) -> list[str]:
    models = _models(config, name)
    if not models:
        which = "another tokenizer than" if name == "table4" else "the tokenizer of"
        raise ConfigError(
            f"{name}: expected a base model with {which} the key model {config.key_model}, found only "
            f"{', '.join(config.bases)}; add one to 'models' and 'evaluated' (config/mini.yaml has both kinds)"
        )
    return models


def _no_memories(name: str, which: str, field: str) -> str:
    return f"{name}: expected a memory {which}, and MemDec in 'systems', found none; add one under 'memories' ({field})"


def _differing(config: Config, field: str, *others: str) -> list[str]:
    """The default memory, and those that differ from it in this field, and at most in these others."""
    found = [DEFAULT_MEMORY]
    for name in config.other_memories:
        different = _differs(config, name)
        if field in different and different <= {field, *others}:
            found.append(name)
    return found


def _differs(config: Config, name: str) -> set[str]:
    """Fields in which a memory differs from the default one; those of its training begin with `train.`."""
    first, other = config.variant(DEFAULT_MEMORY), config.variant(name)
    fields = set(type(first).model_fields) - {"name", "models", "watched", "train", "tokenizer"}
    found = {field for field in fields if getattr(first, field) != getattr(other, field)}
    if other.train.objective == "ce":
        found.discard("targets")  # they follow from the objective
    train = type(first.train).model_fields
    return found | {f"train.{field}" for field in train if getattr(first.train, field) != getattr(other.train, field)}


def _controls(config: Config) -> dict[str, str]:
    """Memories of the config that are controls, by the label of their row."""
    if "MemDec" not in config.systems:
        return {}
    found: dict[str, str] = {}
    default = config.variant(DEFAULT_MEMORY)
    for memory in map(config.variant, config.other_memories):
        if memory.dapt and memory.memory_model == default.memory_model:
            found.setdefault("control: DAPT", memory.name)
        if memory.other_domain and memory.models:
            found.setdefault("control: other domain", memory.name)
        if memory.neighbours and memory.keys == default.keys:
            found.setdefault("control: kNN-LM, its keys", memory.name)
    return found


def _all_rows(config: Config, chosen: Sequence[str]) -> list[Row]:
    variants = [config.variant(name) for name in chosen]
    rows = []
    for model in config.bases:
        for method in config.systems:
            if method != "MemDec":
                rows.append(_row(config, model, "system", method, {"method": method}))
                continue
            for v in variants:
                if model in v.models:
                    where = {"method": method, "memory": v.name}
                    rows.append(_row(config, model, "system", f"MemDec: {v.name}", where))
    return rows


def _domains(config: Config) -> dict[str, Column]:
    return {domain: Column({"domain": domain}) for domain in config.domains}


def _averaged(columns: dict[str, Column]) -> dict[str, Column | Derived]:
    """The columns and their mean; the mean of one column would only repeat it."""
    mean = {AVERAGE: Derived("mean", tuple(columns), paper=AVERAGE)} if len(columns) > 1 else {}
    return {**columns, **mean}


def _with_average(rows: Sequence[Row]) -> list[Row | Derived]:
    """The rows and their mean, under the first label."""
    if len(rows) < 2:
        return list(rows)
    label = next(iter(rows[0].labels))
    paper = {"base_model": "Average"}
    return [*rows, Derived("mean", tuple(range(len(rows))), {label: "Average"}, paper)]


def _row(config: Config, model: str, heading: str, label: str, where: dict[str, str]) -> Row:
    labels = {"family": config.models[model].family, "model": model, heading: label}
    return Row(labels, {"model": model} | where, labels if heading == "method" else None)


def _method(config: Config, model: str, method: str) -> dict[str, str]:
    """Field values that select the records of a method; MemDec has the first memory of the model's tokenizer."""
    memory = memory_of(config, model) if method == "MemDec" else None
    return {"method": method} | ({"memory": memory} if memory is not None else {})


def _first_memories(config: Config, models: Iterable[str]) -> list[str]:
    """Names of the memories in the numbered tables: one for each tokenizer."""
    found = (memory_of(config, model) for model in models)
    return list(dict.fromkeys(name for name in found if name is not None))


def _other_models(config: Config, rows: Sequence[Row], models: Sequence[str]) -> dict[tuple[int, str], str]:
    """Why the row of a memory has no number for some models: the memory is for others only."""
    gaps = {}
    for number, row in enumerate(rows):
        only = config.variant(row.where["memory"]).models if "memory" in row.where else models
        for model in models:
            if model not in only:
                gaps[number, model] = f"not run: 'models' of the memory {row.where['memory']} has no {model}"
    return gaps


def _evaluations(
    config: Config,
    models: Sequence[str],
    systems: Iterable[SystemName],
    memories: Iterable[str],
    domains: Sequence[str],
) -> list[Part]:
    """The evaluations of these models: one for each system without a memory, and one with each memory."""
    found: list[tuple[str, SystemName, str | None]] = []
    for system in systems:
        around = [model for model in models if system in config.systems_of(model)]
        if system != "MemDec":
            found += [(model, system, None) for model in around]
            continue
        for name in memories:
            found += [(model, system, name) for model in config.variant(name).models if model in around]
    return [
        Part("evaluation", domain, model, seed, system, memory)
        for domain in domains
        for model, system, memory in found
        for seed in seeds_of(config, system)
    ]
