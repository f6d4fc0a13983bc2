"""Options of the command line, made from the typed settings; and the line with which a command ends.

A section of the config becomes one option per field, with the field's type, default and description. An entry of the
config, such as one of 'corpora', has fields of several kinds; all of its options may be left out, and `entry` puts those
that are given together.
"""

import inspect
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from memdec import plain
from memdec.artefacts import artefact
from memdec.errors import ConfigError
from memdec.settings import parse

ALSO = {"precision": ["--dtype"]}  # other names of an option, where no field of the command has them


def of_fields(kinds: Iterable[type[BaseModel]]) -> list[inspect.Parameter]:
    """One option for each field of some settings classes."""
    fields = [(name, field) for kind in kinds for name, field in kind.model_fields.items()]
    taken = [name for name, _ in fields]
    return [_option(name, field, taken) for name, field in fields]


def _option(name: str, field: Any, taken: Sequence[str]) -> inspect.Parameter:
    kind = _plain_kind(field.annotation)
    default = inspect.Parameter.empty if field.default is PydanticUndefined else field.default
    return _parameter(name, kind, default, field.description or "", taken)


def _parameter(name: str, kind: Any, default: Any, text: str, taken: Sequence[str] = ()) -> inspect.Parameter:
    flag = name.replace("_", "-")
    also = [other for other in ALSO.get(name, []) if other.removeprefix("--") not in taken]
    names = [f"--{flag}", *also] if also else []
    option = typer.Option(*names, help=text)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _plain_kind(kind: Any) -> Any:
    """A field's type as typer takes it: without constraints, which `parse` checks; a list has plain entries."""
    origin, inner = get_origin(kind), [each for each in get_args(kind) if each is not type(None)]
    if origin is Annotated:
        return _plain_kind(inner[0])
    if origin is list:
        entry = _plain_kind(inner[0])
        return list[str if get_origin(entry) is Literal else entry]  # type: ignore[misc]
    if origin in (Union, UnionType):  # X | None, or a name | a wheel
        return _plain_kind(inner[0]) | None
    return kind


# --- an entry of the config by options ----------------------------------------------------------------------------


def of_entry(kind: Any, leave: Sequence[str]) -> list[inspect.Parameter]:
    """Options for the fields of one entry of the config, none of them needed; without the fields in `leave`."""
    found: dict[str, inspect.Parameter] = {}
    for name, kinds, text in _entry_fields(kind, leave):
        first = kinds[0]
        if get_origin(first) is Literal:
            values = tuple(value for each in kinds for value in get_args(each))
            found[name] = _parameter(name, Literal[values] | None, None, text)
        elif get_origin(first) is dict:
            found[name] = _parameter(name, list[str], [], f"{text}; as train=VALUE; repeat")
        elif get_origin(first) is list:
            found[name] = _parameter(name, list[str], [], f"{text}; repeat")
        else:
            found[name] = _parameter(name, first | None, None, text)
    return list(found.values())


def _entry_fields(kind: Any, leave: Sequence[str]) -> Iterator[tuple[str, list[Any], str]]:
    """Name, types and description of each field of the members of a union; those of a nested section stand for it."""
    members = _members(kind)
    names = dict.fromkeys(name for member in members for name in member.model_fields)
    for name in names:
        if name in leave:
            continue
        fields = [member.model_fields[name] for member in members if name in member.model_fields]
        kinds = [_without_none(field.annotation) for field in fields]
        if isinstance(kinds[0], type) and issubclass(kinds[0], BaseModel):
            yield from _entry_fields(kinds[0], leave)
        else:
            yield name, kinds, fields[0].description or name


def _members(kind: Any) -> list[type[BaseModel]]:
    if isinstance(kind, type):
        return [kind]
    return [
        member for each in get_args(kind) if get_origin(each) or isinstance(each, type) for member in _members(each)
    ]


def _without_none(kind: Any) -> Any:
    if get_origin(kind) is dict or get_origin(kind) is list or get_origin(kind) is Literal:
        return kind
    members = [each for each in get_args(kind) if each is not type(None)]
    if len(members) > 1 and any(get_origin(each) is Literal for each in members):
        return str  # one of some words, or a number: `parse` reads it
    bare = _plain_kind(kind)
    return next(each for each in get_args(bare) if each is not type(None)) if get_args(bare) else bare


def entry(
    kind: Any, values: Mapping[str, Any], spec: str | None, known: Mapping[str, Any], where: str, leave: Sequence[str]
) -> Any:
    """The entry that the options describe, or that `spec` describes as JSON.

    Args:
        kind: Its type.
        values: What the options of `of_entry` got.
        spec: JSON of the whole entry, or None.
        known: Fields that the command fills in where the options are used.
        where: The command, for messages.
        leave: As for `of_entry`.

    Raises:
        ConfigError: Both or neither are given, or the entry is not valid.
    """
    given = {name: value for name, value in values.items() if value is not None and value != []}
    if spec is not None:
        if given:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ConfigError(
                f"{where}: expected --spec or single options, found both (--spec, {flags}); leave out one"
            )
        return parse(kind, plain.from_json(spec, "--spec"), "--spec")
    if not given and not known:
        raise ConfigError(f"{where}: expected the options of an entry or --spec, found neither; see {where} --help")
    data: dict[str, Any] = dict(known)
    for name, value in given.items():
        place = _place(kind, name, leave)
        if place is None:
            data[name] = _by_split(name, value) if _is_by_split(kind, name) else value
        else:
            data.setdefault(place, {})[name] = value
    return parse(kind, data, where)


def _place(kind: Any, name: str, leave: Sequence[str]) -> str | None:
    """The nested section that a field is in, or None."""
    for member in _members(kind):
        if name in member.model_fields and name not in leave:
            return None
    for member in _members(kind):
        for section, field in member.model_fields.items():
            inner = _without_none(field.annotation)
            if isinstance(inner, type) and issubclass(inner, BaseModel) and name in inner.model_fields:
                return section
    return None


def _is_by_split(kind: Any, name: str) -> bool:
    return any(
        get_origin(_without_none(member.model_fields[name].annotation)) is dict
        for member in _members(kind)
        if name in member.model_fields
    )


def _by_split(name: str, values: Sequence[str]) -> dict[str, str]:
    pairs = [value.partition("=") for value in values]
    if not all(equals for _, equals, _ in pairs):
        raise ConfigError(
            f"--{name.replace('_', '-')}: expected SPLIT=VALUE, found {' '.join(values)}; e.g. train=VALUE"
        )
    splits = [split for split, _, _ in pairs]
    if len(set(splits)) < len(splits):
        raise ConfigError(
            f"--{name.replace('_', '-')}: expected each split once, found {' '.join(values)}; leave one out"
        )
    return {split: value for split, _, value in pairs}


def name_of(folder: Path) -> str:
    """A folder's name as a name in a config."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", folder.resolve().name).lstrip("-_.") or "unnamed"


# --- the last line of a command -----------------------------------------------------------------------------------

_FACTS = (
    "documents",
    "tokens",
    "vocab_size",
    "parameters",
    "rank",
    "positions",
    "width",
    "keys",
    "cells",
    "entries",
    "passages",
    "valid_perplexity",
    "methods",
)


def wrote(out: Path, following: str, since: float = 0) -> None:
    """Say on standard error what a command wrote and what comes next; of several processes only the first says it.

    Args:
        out: The file or folder.
        following: The next command; `{out}` in it is `out`.
        since: When the command began (`time.time()`); what is older was found finished.
    """
    if os.environ.get("RANK", "0") != "0" or not out.exists():
        return
    last = out / artefact.MANIFEST if out.is_dir() else out
    verb = "wrote" if not last.exists() or last.stat().st_mtime >= since - 0.01 else "found finished:"
    about = _about(out) if out.is_dir() else ""
    print(f"{verb} {out}{about}. Next: {following.format(out=shlex.quote(str(out)))}", file=sys.stderr)


def _about(folder: Path) -> str:
    kind = artefact.kind_of(folder)
    if kind is None:
        return ""
    facts = json.loads((folder / artefact.MANIFEST).read_text(encoding="utf-8")).get("facts") or {}
    if "splits" in facts:
        facts["documents"] = {split: each["documents"] for split, each in facts["splits"].items()}
    shown = [
        f"{name.replace('_', ' ')}: {_shown(facts[name])}"
        for name in _FACTS
        if not isinstance(facts.get(name), str | None)
    ]
    return f" ({'; '.join([kind, *shown[:3]])})"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(each)}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}" if isinstance(value, float) else str(value)
