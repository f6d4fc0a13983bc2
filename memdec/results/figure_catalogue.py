"""The list of figures: for each name, what it is drawn from, the numbers in it, and how it is drawn.

- `figure2`: perplexity of every base model alone, with LoRA and with its memory, on the study's first domain.
- `figure4`: latency of every system against the number of generated tokens.
- `figure5`: p_kNN, p_LM and p_mem at a few positions.
- `figure6`: highest probability, number of tokens and entropy of the three, by the size of the model that gives the keys.
- `fidelity`: how well every memory imitates p_kNN, on the first domain.
- `gains`: what a memory gains over its twin on hard labels, in every study that names the figure.

To add a figure, add an entry to `FIGURES` here and one to `DRAWN` in `memdec.results.drawing`, which makes the files.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from memdec.config import SHARED_TABLES, Config, Memory
from memdec.errors import ConfigError
from memdec.results.layout import Kind, Part
from memdec.settings import DEFAULT_MEMORY


@dataclass(frozen=True, slots=True)
class Figure:
    """The contents of a figure.

    Attributes:
        name: Its name, also in file names.
        config: Config of the study.
        caption: Caption in the report.
        kind: Kind of the artefacts that it is made from.
        parts: These artefacts.
        tables: Tables whose `.cells.csv` it is made from.
        axes: Of figures made from several studies: for each, what it changes.
    """

    name: str
    config: Config
    caption: str
    kind: str = ""
    parts: list[Part] = field(default_factory=list)
    tables: tuple[str, ...] = ()
    axes: dict[str | None, str] = field(default_factory=dict)


def figure(config: Config, name: str) -> Figure:
    """Make a figure by its name, from the study of the config that fills it.

    Raises:
        ConfigError: There is no such figure, or the config has nothing for it.
    """
    if name not in FIGURES:
        raise ConfigError(f"figure: expected one of {', '.join(FIGURES)}, found {name!r}; choose one of them")
    return FIGURES[name](config if name in SHARED_TABLES else config.study_for(name))


# --- Figure 2 -----------------------------------------------------------------------------------------------------


def figure2(config: Config) -> Figure:
    """Make Figure 2 from the cells of Table 3."""
    caption = (
        f"Perplexity of every base model alone, with a LoRA adapter and with a memory, on {config.domains[0]} (the paper's "
        "Figure 2; the numbers are those of Table 3). Lower is better; bars with 95 % intervals over stretches of the text."
    )
    return Figure("figure2", config, caption, tables=("table3",))


# --- Figure 4 -----------------------------------------------------------------------------------------------------


def figure4(config: Config) -> Figure:
    """Make Figure 4 from one measurement: the key model with the default memory."""
    _needs_memory(config, "figure4")
    caption = (
        f"Time to generate texts with {config.key_model}, alone and in every system, and its ratio to the model alone, "
        "against the number of generated tokens (the paper's Figure 4). Medians with 95 % intervals over turns."
    )
    parts = [Part("latency", config.domains[0], config.key_model, config.seeds[0], "MemDec", DEFAULT_MEMORY)]
    return Figure("figure4", config, caption, "latency", parts)


# --- Figures 5 and 6 ----------------------------------------------------------------------------------------------


def figure5(config: Config) -> Figure:
    """Make Figure 5 from the shapes of the default memory."""
    _needs_memory(config, "figure5")
    caption = (
        "The distributions of kNN, of the model that gives its keys, and of the memory at a few positions of the training "
        f"text of {config.domains[0]} whose kNN distribution has two or three likely tokens (the paper's Figure 5). The "
        "token that follows in the text is marked."
    )
    parts = [Part("shapes", config.domains[0], config.key_model, config.seeds[0], "MemDec", DEFAULT_MEMORY)]
    return Figure("figure5", config, caption, "shapes", parts)


def figure6(config: Config) -> Figure:
    """Make Figure 6: for each model that gives keys, the first memory that is trained on them."""
    _needs_memory(config, "figure6")
    caption = (
        "Shape of the distributions of kNN, of the model that gives its keys, and of the memory, by the size of that model "
        f"(the paper's Figure 6), on training positions of {config.domains[0]}: highest probability, tokens with a "
        f"probability of {config.shapes.floor:g} or more, entropy. Means with 95 % intervals over windows."
    )
    own = config.variant(DEFAULT_MEMORY)
    chosen: dict[str, Memory] = {}
    for memory in map(config.variant, config.memory_names):
        if memory.own and memory.targets == "knn" and (memory.tuned, memory.tokenizer) == (own.tuned, own.tokenizer):
            chosen.setdefault(memory.keys, memory)
    return Figure("figure6", config, caption, "shapes", _parts(config, "shapes", [*chosen.values()]))


# --- fidelity -----------------------------------------------------------------------------------------------------


def fidelity(config: Config) -> Figure:
    """Make the figure of every memory's fidelity to p_kNN; the paper has none, the follow-up work prints the table."""
    _needs_memory(config, "fidelity")
    caption = (
        "How well every memory imitates the kNN distributions of the training text of "
        f"{config.domains[0]}: match of the most likely token, KL, total variation and Pearson correlation, over all "
        "positions, those whose kNN distribution has one token and those with several. Means with 95 % intervals over "
        "windows."
    )
    memories = [
        memory
        for memory in map(config.variant, config.memory_names)
        if memory.models and not memory.neighbours and config.models[memory.key_model].tokenizer == memory.tokenizer
    ]
    return Figure("fidelity", config, caption, "fidelity", _parts(config, "fidelity", memories))


# --- gains --------------------------------------------------------------------------------------------------------

# What a study may change to be a point on an axis of the figure.
_AXES = {
    "key model": {"finetune", "key_model"},
    "training text": {"domains"},
    "size of the memory": {"memory_model"},
    "targets": {"targets", "calibrate", "teacher", "imitates"},
}
REFERENCE, OTHER = "reference", "other"
_NAMES = {"study_name", "memories"}  # differ without changing what the figure shows


def gains(config: Config) -> Figure:
    """Make the figure of a memory's gain over its twin on hard labels, from all studies that name it.

    The first of them is the reference; every other one that changes one thing is a point on the axis of that thing.

    Args:
        config: The whole config, with its studies.
    """
    names: list[str | None] = [name for name, study in config.studies.items() if "gains" in study.tables]
    studies = {name: config.study(name) for name in names or [None]}
    first, parts = next(iter(studies.values())), []
    for name, study in studies.items():
        twin = _twin(study)
        own, other = study.variant(DEFAULT_MEMORY), study.variant(twin)
        bases = [model for model in own.models if model in other.models]
        for domain, seed in itertools.product(study.domains, study.seeds):
            parts.append(Part("finetuned", domain, study.key_model, seed, study=name))
            parts.append(Part("memory", domain, "", seed, "MemDec", DEFAULT_MEMORY, study=name))
            parts += [
                Part("evaluation", domain, base, seed, "MemDec", memory, study=name)
                for base in bases
                for memory in (DEFAULT_MEMORY, twin)
            ]
    caption = (
        "How much lower the perplexity with the memory is than with its twin, which was trained in the same way on hard "
        "labels alone, in percent, by what a study changes. 95 % intervals over stretches of the test text and seeds. Above zero the "
        "datastore paid."
    )
    axes: dict[str | None, str] = {
        name: REFERENCE if study is first else _axis(study, first) for name, study in studies.items()
    }
    return Figure("gains", first, caption, parts=parts, axes=axes)


def _twin(config: Config) -> str:
    """The memory that differs from the default one in nothing but its objective, which is ce."""
    _needs_memory(config, "gains")
    own = config.variant(DEFAULT_MEMORY)
    for name in config.other_memories:
        other = config.variant(name)
        like = other.model_copy(update={"name": own.name, "targets": own.targets, "train": own.train})
        train = other.train.model_copy(update={"objective": own.train.objective})
        if own.own and not own.ready and other.train.objective == "ce" and like == own and train == own.train:
            return name
    raise ConfigError(
        "gains: expected a memory that differs from the default one in its objective, ce, alone, found none; add "
        "{train: {objective: ce}} under 'memories'"
    )


def _axis(study: Config, first: Config) -> str:
    """The one thing that a study changes."""
    fields = set(type(study).model_fields) - _NAMES
    changed = {name for name in fields if getattr(study, name) != getattr(first, name)}
    return next((axis for axis, allowed in _AXES.items() if changed <= allowed), OTHER)


FIGURES: dict[str, Callable[[Config], Figure]] = {
    "figure2": figure2,
    "figure4": figure4,
    "figure5": figure5,
    "figure6": figure6,
    "fidelity": fidelity,
    "gains": gains,
}


# --- shared -------------------------------------------------------------------------------------------------------


def _needs_memory(config: Config, name: str) -> None:
    if "MemDec" not in config.systems:
        raise ConfigError(
            f"{name}: expected MemDec in 'systems' of the config, found {', '.join(config.systems)}; add it"
        )


def _parts(config: Config, kind: Kind, memories: Sequence[Memory]) -> list[Part]:
    """On the first domain, a part for each of the memories and seeds; the model is the one that gives the keys."""
    return [
        Part(kind, config.domains[0], memory.key_model, seed, "MemDec", memory.name)
        for memory in memories
        for seed in config.seeds
    ]
