"""Which tables there are: by name, the rows and columns of each and the measurements it is made from.

Table 1 of the paper: one domain, a row per method, a column per base model and their mean. Tables 3 and 4: rows (family,
model, method), one column per domain and their mean; 4 has the models of other tokenizers. `memories` has a row for every
memory of the config beside every other system; `forgetting` has the same on general text. Table 6: marked words.

A new table is an entry of `TABLES`. `memdec table --name` and the workflow read everything else from it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from memdec.config import DEFAULT_MEMORY, FORGETTING, SYSTEMS, Config
from memdec.errors import ConfigError


class Part(NamedTuple):
    """One artefact that a table is made from."""

    domain: str
    model: str
    seed: int
    name: str  # of the memory, or `SYSTEMS` for what is measured without one


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: its labels, and which records are in it (equal in every field that is given)."""

    labels: dict[str, str]
    where: dict[str, str]


@dataclass(frozen=True, slots=True)
class Table:
    """What is in a table.

    Attributes:
        name: As in file names.
        config: Of the run.
        caption: For the report.
        parts: What it is made from.
        kind: Of the artefacts that are its parts.
    """

    name: str
    config: Config
    caption: str
    parts: list[Part]
    kind: str = "cases"


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexities(Table):
    """A table of test perplexities.

    Attributes:
        rows: Its lines.
        columns: Heading and records of each column.
        best_of: Label whose equal rows are compared, so that the best of them is in bold; None: all rows.
        extra: Further CSV columns of each column.
        records: File of each evaluation.
    """

    rows: list[Row]
    columns: dict[str, dict[str, str]]
    best_of: str | None = "model"
    extra: tuple[str, ...] = ("n", "alpha", "low", "high")
    records: str = "records.json"
    kind: str = "evaluation"


def table(config: Config, name: str) -> Table:
    """A table by name.

    Raises:
        ConfigError: There is no such table, or the config has nothing to show in it.
    """
    if name not in TABLES:
        raise ConfigError(f"table: expected one of {', '.join(TABLES)}, found {name!r}; choose one of them")
    return TABLES[name](config)


def main_tables(config: Config) -> list[str]:
    """Tables 3 and 4, without one that the config has no models for."""
    return [name for name in ("table3", "table4") if _models(config, name)]


def table1(config: Config) -> Perplexities:
    """Every system on the first domain, with the first memory."""
    models, domain = _some_models(config, "table1"), config.domains[0]
    where = {"domain": domain}
    return Perplexities(
        name="table1",
        config=config,
        caption="Perplexity of every system on one domain (the paper's Table 1): a row per system, a column per base "
        "model.",
        parts=_evaluations(config, models, _first_memories(config, models), [domain]),
        rows=[Row({"method": method}, where | _method(config, models[0], method)) for method in config.systems],
        columns={model: {"model": model} for model in models},
        best_of=None,
    )


def table3(config: Config) -> Perplexities:
    """Models with the tokenizer of the key model, all domains."""
    caption = "Perplexity of every base model alone, with LoRA, and with the memory decoder of the domain (the paper's Table 3)."
    return _by_model(config, "table3", caption)


def table4(config: Config) -> Perplexities:
    """Models with another tokenizer than the key model's, all domains."""
    caption = (
        "The same for base models of other tokenizers, with a memory moved to their vocabulary (the paper's Table 4)."
    )
    return _by_model(config, "table4", caption)


def table6(config: Config) -> Table:
    """What memory, neighbours and base give marked words; of the first domain and seed."""
    if not config.cases:
        raise ConfigError(
            "table6: expected marked words in 'cases' of the config, found none; add them as config/table6.yaml does"
        )
    caption = "What memory, neighbours and base give marked words (the paper's Table 6), in percent."
    part = Part(config.domains[0], config.key_model, config.seeds[0], DEFAULT_MEMORY)
    return Table("table6", config, caption, [part])


def memories(config: Config) -> Perplexities:
    """All systems and all memories of every model."""
    return Perplexities(
        name="memories",
        config=config,
        caption="Every memory of the config beside every other system, with the standard deviation over seeds.",
        parts=_evaluations(config, config.bases, config.memory_names, config.domains),
        rows=_all_rows(config),
        columns=_domains(config),
        extra=("sd", "alpha", "n", "low", "high"),
    )


def forgetting(config: Config) -> Perplexities:
    """The same on general text: what was made for a domain, at the weights tuned there."""
    if not config.forgetting:
        raise ConfigError(
            "forgetting: expected general corpora in 'forgetting' of the config, found none; name one of 'corpora'"
        )
    columns = {
        f"{domain} on {on}": {"domain": domain, "on": on} for domain in config.domains for on in config.forgetting
    }
    return Perplexities(
        name="forgetting",
        config=config,
        caption="Perplexity on general text of what was made for each domain, at the weights tuned there: what is "
        "forgotten.",
        parts=_evaluations(config, config.bases, config.memory_names, config.domains),
        rows=_all_rows(config),
        columns=columns,
        extra=("sd", "alpha", "n", "low", "high"),
        records=FORGETTING,
    )


TABLES: dict[str, Callable[[Config], Table]] = {
    "table1": table1,
    "table3": table3,
    "table4": table4,
    "table6": table6,
    "memories": memories,
    "forgetting": forgetting,
}


def _models(config: Config, name: str) -> list[str]:
    """Base models of a numbered table: those with the tokenizer of the key model, or in Table 4 the others."""
    own = config.models[config.key_model].tokenizer
    return [model for model in config.bases if (config.models[model].tokenizer == own) == (name != "table4")]


def _some_models(config: Config, name: str) -> list[str]:
    models = _models(config, name)
    if not models:
        which = "another tokenizer than" if name == "table4" else "the tokenizer of"
        raise ConfigError(
            f"{name}: expected a base model with {which} the key model {config.key_model}, found only "
            f"{', '.join(config.bases)}; add one to 'models' and 'evaluated' (config/vocabulary.yaml has both kinds)"
        )
    return models


def _by_model(config: Config, name: str, caption: str) -> Perplexities:
    """Rows (family, model, method), each with the first memory of its tokenizer; a column per domain."""
    models = _some_models(config, name)
    return Perplexities(
        name=name,
        config=config,
        caption=caption,
        parts=_evaluations(config, models, _first_memories(config, models), config.domains),
        rows=[
            _row(config, model, "method", method, _method(config, model, method))
            for model in models
            for method in config.systems
        ],
        columns=_domains(config),
    )


def _all_rows(config: Config) -> list[Row]:
    variants = [config.variant(name) for name in config.memory_names]
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


def _domains(config: Config) -> dict[str, dict[str, str]]:
    return {domain: {"domain": domain} for domain in config.domains}


def _row(config: Config, model: str, heading: str, label: str, where: dict[str, str]) -> Row:
    labels = {"family": config.models[model].family, "model": model, heading: label}
    return Row(labels, {"model": model} | where)


def _method(config: Config, model: str, method: str) -> dict[str, str]:
    """Records of a method; of the memories the first one of the model's tokenizer."""
    memory = config.memory_for(model) if method == "MemDec" else None
    return {"method": method} | ({"memory": memory.name} if memory is not None else {})


def _first_memories(config: Config, models: Iterable[str]) -> list[str]:
    """The memory of each tokenizer that the numbered tables show."""
    found = (config.memory_for(model) for model in models)
    return list(dict.fromkeys(memory.name for memory in found if memory is not None))


def _evaluations(config: Config, models: Sequence[str], memories: Iterable[str], domains: Sequence[str]) -> list[Part]:
    """Evaluations of the models with these memories and, where there are other systems, without one.

    The base alone comes with every evaluation.
    """
    systems, pairs = set(config.systems), []
    if systems - {"base", "MemDec"} or "MemDec" not in systems:
        pairs += [(model, SYSTEMS) for model in models]
    if "MemDec" in systems:
        pairs += [(model, name) for name in memories for model in config.variant(name).models if model in models]
    return [Part(domain, model, seed, name) for domain in domains for model, name in pairs for seed in config.seeds]
