"""Names that a config refers to: those that nothing has, those that are taken, and circles.

All functions read plain data and pass over what is no name at all, so that a config with other faults gets all messages.
"""

from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from typing import Any

from memdec.settings import DEFAULT_MEMORY, UNTUNED, WITHOUT_MEMORY, near


def references(config: object) -> list[str]:
    """Names that nothing has, names that are taken, and circles, one line each."""
    data = _entry(config)
    corpora, models, tokenizers, suites = (
        _entries(data, kind) for kind in ("corpora", "models", "tokenizers", "suites")
    )
    memories = _entries(data, "memories")
    evaluated = _texts(data.get("evaluated")) or list(models)
    asked: list[tuple[str, object, Iterable[str]]] = [
        ("domains", data.get("domains"), corpora),
        ("forgetting", data.get("forgetting"), corpora),
        ("evaluated", data.get("evaluated"), models),
        ("watch", data.get("watch"), models),
        ("key_model", data.get("key_model"), models),
        ("memory_model", data.get("memory_model"), models),
        ("budget.model", _entry(data.get("budget")).get("model"), models),
    ]
    for name, tokenizer in tokenizers.items():
        asked.append((f"tokenizers.{name}.train_on", tokenizer.get("train_on"), corpora))
    for name, corpus in corpora.items():
        asked.append((f"corpora.{name}.disjoint_from", corpus.get("disjoint_from"), corpora))
    for name, model in models.items():
        asked.append((f"models.{name}.tokenizer", model.get("tokenizer"), tokenizers))
        asked.append((f"models.{name}.corpus", model.get("corpus"), corpora))
    tasks = _entry(data.get("tasks"))
    asked.append(("tasks", [*tasks], corpora))
    for domain, names in tasks.items():
        asked.append((f"tasks.{domain}", names, suites))
    for name, memory in memories.items():
        where = f"memories.{name}"
        asked.append((f"{where}.memory_model", memory.get("memory_model"), models))
        asked.append((f"{where}.key_model", memory.get("key_model"), models))
        asked.append((f"{where}.models", memory.get("models"), evaluated))
        asked.append((f"{where}.adapt", memory.get("adapt"), [DEFAULT_MEMORY, *memories]))
    wrong = [line for where, names, known in asked for line in _unknown(where, _texts(names), list(known))]
    wrong += [
        f"models.{name}: expected a name without {UNTUNED}, which means keys of a plain model"
        for name in models
        if name.endswith(UNTUNED)
    ]
    wrong += [
        f"memories.{name}: expected a name that is not taken, found {name}"
        for name in memories
        if name in (DEFAULT_MEMORY, WITHOUT_MEMORY)
    ]
    if circle := _circle({name: _texts(entry.get("disjoint_from")) for name, entry in corpora.items()}):
        wrong.append(
            f"corpora.{circle[0]}.disjoint_from: expected corpora that do not need this one, found {_chain(circle)}"
        )
    if circle := _circle({name: _texts(entry.get("adapt")) for name, entry in memories.items()}):
        wrong.append(
            f"memories.{circle[0]}.adapt: expected a memory that does not start from this one, found {_chain(circle)}"
        )
    return wrong


def _entry(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _entries(data: dict[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    """The entries of a section by name; one that is no mapping is empty."""
    return {str(name): _entry(entry) for name, entry in _entry(data.get(kind)).items()}


def _texts(value: object) -> list[str]:
    """The names in a field that has one, several or none."""
    return [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str)]


def _circle(needs: dict[str, list[str]]) -> list[str]:
    """Names of which each needs the next, from the first in the config and back to it; empty if there is no circle."""
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        names = list(reversed(error.args[1]))[1:]
        first = names.index(min(names, key=list(needs).index))
        return [*names[first:], *names[:first], names[first]]
    return []


def _chain(names: list[str]) -> str:
    return " > ".join(names)


def _unknown(where: str, names: list[str], known: list[str]) -> list[str]:
    return [
        f"{where}: expected one of {', '.join(known) or 'none defined'}, found {name}{near(name, known)}"
        for name in names
        if name not in known
    ]
