"""The list of tables: for each name, its rows, its columns and the measurements that it is made from.

- `table1`: one domain, a row per system, a column per base model, and the mean.
- `table3`: rows (family, model, system), a column per domain, and the mean.
- `table4`: the same for models of other tokenizers.
- `table6`: the probabilities of marked words.
- `memories`: a row for every memory of the config and for every other system.
- `forgetting`: the same rows on general text.

To add a table, add an entry to `TABLES`. `memdec table --name` and the workflow read everything else from the entry.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from memdec.config import Config
from memdec.errors import ConfigError
from memdec.inference.systems import SYSTEMS
from memdec.settings import DEFAULT_MEMORY, FORGETTING, WITHOUT_MEMORY


class Part(NamedTuple):
    """One artefact that a table is made from."""

    domain: str
    model: str
    seed: int
    name: str  # of the memory; of a system without one `WITHOUT_MEMORY`/slug


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table: its labels, and the field values that select its records."""

    labels: dict[str, str]
    where: dict[str, str]


@dataclass(frozen=True, slots=True)
class Table:
    """The contents of a table.

    Attributes:
        name: Its name, also in file names.
        config: Config of the run.
        caption: Caption in the report.
        parts: Artefacts that it is made from.
        kind: Kind of these artefacts.
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
        rows: Its rows.
        columns: For each heading, the field values that select the records of the column.
        best_of: Rows with the same value of this label form a group, whose best value is bold; None: one group.
        extra: Further values of each column, which are only in the CSV.
        records: File with the records in each evaluation folder.
    """

    rows: list[Row]
    columns: dict[str, dict[str, str]]
    extra: tuple[str, ...]
    best_of: str | None = "model"
    records: str = "records.json"
    kind: str = "evaluation"


def table(config: Config, name: str) -> Table:
    """Make a table by its name.

    Raises:
        ConfigError: There is no such table, or the config has no rows for it.
    """
    if name not in TABLES:
        raise ConfigError(f"table: expected one of {', '.join(TABLES)}, found {name!r}; choose one of them")
    return TABLES[name](config)


def weights(config: Config) -> list[str]:
    """Names of the mixing weights in a config: alpha (a memory), lambda (p_kNN)."""
    found = {SYSTEMS[name].weight for name in config.systems}
    return [name for name in ("alpha", "lambda") if name in found]


def main_tables(config: Config) -> list[str]:
    """Tables 3 and 4, each only if the config has models for it."""
    return [name for name in ("table3", "table4") if _models(config, name)]


def table1(config: Config) -> Perplexities:
    """Make Table 1: every system on the first domain, with the first memory."""
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
        extra=("n", *weights(config), "low", "high"),
        best_of=None,
    )


def table3(config: Config) -> Perplexities:
    """Make Table 3: the models with the tokenizer of the key model, on all domains."""
    caption = "Perplexity of every base model alone, with LoRA, and with the memory decoder of the domain (the paper's Table 3)."
    return _by_model(config, "table3", caption)


def table4(config: Config) -> Perplexities:
    """Make Table 4: the models with another tokenizer than the key model, on all domains."""
    caption = "As Table 3, for base models of other tokenizers, with an adapted memory (the paper's Table 4)."
    return _by_model(config, "table4", caption)


def table6(config: Config) -> Table:
    """Make Table 6: the probabilities of marked words under memory, kNN and base; first domain and seed."""
    if not config.cases:
        raise ConfigError(
            "table6: expected marked words in 'cases' of the config, found none; add them as config/table6.yaml does"
        )
    caption = "Probability of marked words under memory, kNN and base, in percent (the paper's Table 6)."
    part = Part(config.domains[0], config.key_model, config.seeds[0], DEFAULT_MEMORY)
    return Table("table6", config, caption, [part])


def memories(config: Config) -> Perplexities:
    """Make `memories`: all systems and all memories, for every model."""
    return Perplexities(
        name="memories",
        config=config,
        caption="Every memory of the config beside every other system, with the standard deviation over seeds.",
        parts=_evaluations(config, config.bases, config.memory_names, config.domains),
        rows=_all_rows(config),
        columns=_domains(config),
        extra=("sd", *weights(config), "n", "low", "high"),
    )


def forgetting(config: Config) -> Perplexities:
    """Make `forgetting`: the same rows on general text, with the weights tuned on the domain."""
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
        caption="Perplexity on general text of the systems made for each domain, at the weights tuned on the domain: it "
        "shows what is forgotten.",
        parts=_evaluations(config, config.bases, config.memory_names, config.domains),
        rows=_all_rows(config),
        columns=columns,
        extra=("sd", *weights(config), "n", "low", "high"),
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
    """Base models of a numbered table: those with the key model's tokenizer; in Table 4 all others."""
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
    """Make a table with rows (family, model, method) and a column per domain; each model has its first memory."""
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
        extra=("n", *weights(config), "low", "high"),
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
    """Field values that select the records of a method; MemDec has the first memory of the model's tokenizer."""
    memory = config.memory_for(model) if method == "MemDec" else None
    return {"method": method} | ({"memory": memory.name} if memory is not None else {})


def _first_memories(config: Config, models: Iterable[str]) -> list[str]:
    """Names of the memories in the numbered tables: one for each tokenizer."""
    found = (config.memory_for(model) for model in models)
    return list(dict.fromkeys(memory.name for memory in found if memory is not None))


def _evaluations(config: Config, models: Sequence[str], memories: Iterable[str], domains: Sequence[str]) -> list[Part]:
    """Evaluations of the models with each of these memories, and of the config's other systems."""
    pairs = []
    for name in config.systems:
        if name != "MemDec":
            pairs += [(model, f"{WITHOUT_MEMORY}/{SYSTEMS[name].slug}") for model in models]
        else:
            pairs += [
                (model, memory) for memory in memories for model in config.variant(memory).models if model in models
            ]
    return [Part(domain, model, seed, name) for domain in domains for model, name in pairs for seed in config.seeds]
