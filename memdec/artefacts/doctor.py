"""`memdec doctor`: find damaged artefacts under a folder, and name what will be made again because of them.

The manifest of a damaged artefact is removed, so no stage reads the artefact and Snakemake treats it as missing.
`make repair` then makes it again. An artefact without a manifest is unfinished: it is reported and left as it is. A
deleted folder cannot be found here; `make repair` asks Snakemake for missing outputs.
"""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from memdec.artefacts import artefact
from memdec.artefacts.artefact import MANIFEST, MARK
from memdec.errors import ArtifactError, ConfigError


@dataclass
class Found:
    """One artefact folder.

    Attributes:
        path: The folder.
        names: Its recipes, as they appear among the inputs of other artefacts.
        inputs: Recipes of its inputs.
        problem: What is wrong with it; None if it is undamaged.
        unknown: Replaces the list of artefacts made from it, if its recipe cannot be read.
        is_unfinished: Whether it has no manifest yet, or a process is building it.
    """

    path: Path
    names: set[str] = field(default_factory=set)
    inputs: dict[str, str] = field(default_factory=dict)
    problem: str | None = None
    unknown: str = ""
    is_unfinished: bool = False


def run(folder: Path) -> tuple[list[str], int]:
    """Check all artefacts below a folder and remove the manifests of the damaged ones.

    Args:
        folder: Where to search.

    Returns:
        One line for each damaged or unfinished artefact and a summary line; and the number of damaged ones.

    Raises:
        ConfigError: The folder does not exist.
        ArtifactError: A manifest cannot be removed.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: expected a folder with artefacts, found none; give the folder 'results' of a run")
    everything = [_look(path) for path in _artefacts(folder)]
    damaged = [found for found in everything if found.problem is not None]
    lines = []
    for found in damaged:
        again = ", ".join(str(other.path) for other in _dependants(found, everything)) or found.unknown
        lines.append(f"{found.path}: damaged; {found.problem}; will be made again{' with ' * bool(again)}{again}")
    unfinished = [found for found in everything if found.is_unfinished]
    lines += [f"{found.path}: unfinished; left for the command that makes it" for found in unfinished]
    lines.append(f"{folder}: {len(everything)} artefacts, {len(damaged)} damaged, {len(unfinished)} unfinished")
    return lines, len(damaged)


def _artefacts(folder: Path) -> Iterator[Path]:
    for place, below, files in os.walk(folder):
        below.sort()
        if MARK in files or (MANIFEST in files and artefact.kind_of(Path(place))):
            below.clear()  # folders inside an artefact are not artefacts
            yield Path(place)


def _look(path: Path) -> Found:
    """Check one artefact folder; remove its manifest if it is damaged."""
    found = Found(path)
    with ExitStack() as stack:
        try:
            stack.enter_context(artefact.locked(path))
        except ArtifactError:
            found.is_unfinished = True
            return found
        _examine(found)
    return found


def _examine(found: Found) -> None:
    manifest, mark = found.path / MANIFEST, found.path / MARK
    if not manifest.is_file():
        found.is_unfinished = True
        return
    if mark.is_file():
        found.names.add(mark.read_text(encoding="utf-8"))
    kind = artefact.kind_of(found.path)
    if kind is None:  # only the manifest has `keys_recipe`
        found.unknown = "what was made from it"
    else:
        said = json.loads(manifest.read_text(encoding="utf-8"))
        found.inputs = said.get("inputs") or {}
        found.names |= {said.get("recipe"), (said.get("facts") or {}).get("keys_recipe")} - {None}
    try:
        artefact.read(found.path, kind or "whole")
    except ArtifactError as error:
        found.problem = str(error).partition("; delete")[0]
        _remove(manifest)


def _remove(manifest: Path) -> None:
    try:
        manifest.unlink()
    except OSError as error:
        raise ArtifactError(
            f"{manifest}: expected a file that can be removed, found {error}; run `memdec doctor` as its owner"
        ) from None


def _dependants(found: Found, everything: list[Found]) -> list[Found]:
    """Artefacts made from this one, directly or through others."""
    names, dependants = set(found.names), []
    waiting = [other for other in everything if other is not found]
    while fresh := [other for other in waiting if names & set(other.inputs.values())]:
        dependants += fresh
        names = {name for other in fresh for name in other.names}
        waiting = [other for other in waiting if other not in fresh]
    return dependants
