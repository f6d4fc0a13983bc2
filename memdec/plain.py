"""YAML and JSON that people write, read as plain data: text, numbers, lists, and mappings from text to these.

YAML can mean more than it shows: an alias is a copy, so ten short lines can stand for a billion values; a key that is
given twice loses its first value; `1:30` is the number 90 and `2024-01-01` a date. All of that is refused here, in one
line that names the place.
"""

import json
import math
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import yaml

from memdec.errors import ConfigError, reason

MOST_BYTES = 1_000_000  # of a config; the longest of ours has 4,000
MOST_VALUES = 100_000  # in one config, with aliases written out
MOST_DEPTH = 32  # of nested lists and mappings; ours have 5
LARGEST = 2**63 - 1  # what NumPy, torch and parquet call an integer
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}


def read(path: Path) -> Any:
    """Read a YAML or JSON file of plain data.

    Raises:
        ConfigError: It is not there, too large, not valid, or more than plain data.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "something else" if path.exists() else "nothing"
        raise ConfigError(f"{path}: expected a YAML config file, found {found}; the default is config/mini.yaml")
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise ConfigError(
                f"{path}: expected a config of at most {MOST_BYTES:,} bytes, found {size:,}; check the path"
            )
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected a file with UTF-8 text, found: {reason(error)}; check the path") from None
    return from_json(text, str(path)) if path.suffix == ".json" else from_yaml(text, str(path))


def from_yaml(text: str, where: str) -> Any:
    """Plain data of a YAML text; `where` is the name of the text in messages."""
    loader: Any = None
    try:
        loader = yaml.SafeLoader(text)
        _check_events(text, where)
        node = loader.get_single_node()
        data = None if node is None else _checked_document(loader, node, where)
    except yaml.YAMLError as error:
        tab = "; indent with spaces, not with tabs" if "'\\t'" in str(error) else ""
        raise ConfigError(f"{where}: not valid YAML: {reason(error, 300)}{tab}") from None
    finally:
        if loader is not None:
            loader.dispose()
    check(data, where)
    return data


def from_json(text: str, where: str) -> Any:
    """Plain data of a JSON text; `where` is the name of the text in messages."""
    try:
        data = json.loads(text, object_pairs_hook=_once(where), parse_constant=_no_constant, parse_int=_int)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{where}: expected JSON, found {text[:60]!r} ({reason(error)}); quote it for the shell"
        ) from None
    check(data, where)
    return data


def check(data: object, where: str) -> None:
    """Check that data are plain, and small enough to be walked through.

    Raises:
        ConfigError: Something is nested too deep, too large for 64 bits, or no text that a file or a shell can hold.
    """
    n_values = 0
    waiting: list[tuple[object, tuple[object, ...]]] = [(data, ())]
    while waiting:
        value, place = waiting.pop()
        n_values += 1
        at = f"{where}: {_dotted(place)}"
        if n_values > MOST_VALUES:
            raise ConfigError(f"{where}: expected at most {MOST_VALUES:,} values, found more; check lists and aliases")
        if len(place) > MOST_DEPTH:
            raise ConfigError(f"{at[:200]}: expected at most {MOST_DEPTH} levels, found more; check the brackets")
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    raise ConfigError(f"{at}: expected text as a key, found {_short(key)}; put it between quotes")
                _check_text(key, at)
            waiting += [(each, (*place, key)) for key, each in reversed(value.items())]
        elif isinstance(value, list | tuple):
            waiting += [(each, (*place, number)) for number, each in reversed(list(enumerate(value)))]
        elif isinstance(value, str):
            _check_text(value, at)
        elif isinstance(value, int) and abs(value) > LARGEST:
            raise ConfigError(f"{at}: expected a number of at most 64 bits, found {_short(value)}; write a smaller one")


def merged(below: Any, above: Any) -> Any:
    """`above` laid over `below`, as Snakemake does it: mappings are joined key by key, all else is replaced."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return below | {key: merged(below.get(key), value) for key, value in above.items()}


# --- YAML -----------------------------------------------------------------------------------------------------------


def _check_events(text: str, where: str) -> None:
    """Refuse deep nesting before anything that calls itself walks through the text."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_DEPTH:
            assert event.start_mark is not None  # it is None only for events that no text has
            raise ConfigError(
                f"{where}: line {event.start_mark.line + 1}: expected at most {MOST_DEPTH} levels, found more; check the brackets"
            )


def _checked_document(loader: yaml.SafeLoader, node: yaml.Node, where: str) -> Any:
    _count(node, where, {}, ())
    for each in _nodes(node):
        _check_node(each, where)
    try:
        return loader.construct_document(node)
    except (ValueError, OverflowError) as error:  # a number of thousands of digits, 2024-99-99
        raise ConfigError(
            f"{where}: expected plain text and numbers, found: {reason(error)}; check the values"
        ) from None


def _count(node: yaml.Node, where: str, known: dict[int, int], above: tuple[int, ...]) -> int:
    """Number of values below a node, with aliases written out. Nodes are shared, so each is counted once."""
    if id(node) in above:
        raise ConfigError(
            f"{where}: line {node.start_mark.line + 1}: expected an alias of something else, found one inside of its own anchor"
        )
    if id(node) not in known:
        below = (_count(child, where, known, (*above, id(node))) for child in _children(node))
        known[id(node)] = 1 + sum(below)
        if known[id(node)] > MOST_VALUES:
            raise ConfigError(
                f"{where}: line {node.start_mark.line + 1}: expected at most {MOST_VALUES:,} values, found "
                f"{_short(known[id(node)])} with all aliases written out; use fewer aliases"
            )
    return known[id(node)]


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key
            yield value


def _nodes(top: yaml.Node) -> Iterator[yaml.Node]:
    """All nodes, each once."""
    waiting, seen = [top], {id(top)}
    while waiting:
        node = waiting.pop()
        yield node
        for child in _children(node):
            if id(child) not in seen:
                seen.add(id(child))
                waiting.append(child)


def _check_node(node: yaml.Node, where: str) -> None:
    """Refuse types beyond plain data, keys that are given twice, and numbers in base 60."""
    at = f"{where}: line {node.start_mark.line + 1}"
    if node.tag not in _TAGS:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        text = node.value if isinstance(node, yaml.ScalarNode) else kind
        raise ConfigError(f"{at}: expected text or a number, found {_short(text)} ({kind}); put text between quotes")
    if isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float")) and ":" in node.value:
        raise ConfigError(f"{at}: expected a number, found {_short(node.value)}, which YAML reads in base 60; quote it")
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[Hashable] = set()
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
            found = _short(key.value) if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            raise ConfigError(f"{where}: line {line}: expected text as a key, found {found}; put it between quotes")
        if key.value in seen:
            raise ConfigError(
                f"{where}: line {line}: expected each key once, found {_short(key.value)} twice; remove one of them"
            )
        seen.add(key.value)


# --- JSON and values ------------------------------------------------------------------------------------------------


def _once(where: str) -> Any:
    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        plain = dict(found)
        if len(plain) < len(found):
            keys = [key for key, _ in found]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ConfigError(f"{where}: expected each key once, found {_short(twice)} twice; remove one of them")
        return plain

    return pairs


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _int(text: str) -> int:
    """A whole number; a long one is not converted, which would take quadratic time or fail."""
    return int(text) if len(text) <= 20 else LARGEST + 1


def _check_text(text: str, at: str) -> None:
    if "\0" in text:
        raise ConfigError(f"{at}: expected text without NUL characters, found {_short(text)}; remove them")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{at}: expected Unicode text, found half a surrogate pair in {_short(text)}") from None


def _dotted(place: tuple[object, ...]) -> str:
    return ".".join(map(str, place)) or "(top)"


def _short(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST:
        return f"a number of about {int(math.log10(abs(value))) + 1} digits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
