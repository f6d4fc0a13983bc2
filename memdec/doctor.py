"""`memdec doctor`: which artefacts under a folder are cut, and what will be made again because of them.

A damaged artefact loses its manifest, so that no stage reads it and Snakemake sees it as missing; `make repair` then makes
it again. A folder without a manifest is work in progress: it is named and left as it is. What is gone without a trace
cannot be seen here; `make repair` asks Snakemake for it.
"""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from memdec import artifacts
from memdec.artifacts import MANIFEST, MARK
from memdec.errors import ArtifactError, ConfigError


@dataclass
class Found:
    """One artefact folder.

    Attributes:
        path: Where it is.
        names: Recipes by which others have it among their inputs.
        inputs: Recipes of its own inputs.
        problem: What is wrong with it, if anything.
        unknown: What to say of the artefacts made from it where no recipe is known to be among their inputs.
        is_unfinished: Whether it has no manifest yet, or a process is building it.
    """

    path: Path
    names: set[str] = field(default_factory=set)
    inputs: dict[str, str] = field(default_factory=dict)
    problem: str | None = None
    unknown: str = ""
    is_unfinished: bool = False


def run(folder: Path) -> tuple[list[str], int]:
    """Take the manifests of damaged artefacts away.

    Args:
        folder: All artefacts below it are looked at.

    Returns:
        One line for each artefact that is not whole and one for all, and the number of damaged ones.

    Raises:
        ConfigError: No such folder.
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
        if MARK in files or (MANIFEST in files and artifacts.kind_of(Path(place))):
            below.clear()  # what is in an artefact is no artefact
            yield Path(place)


def _look(path: Path) -> Found:
    """State of an artefact folder; a damaged one loses its manifest."""
    found = Found(path)
    with ExitStack() as stack:
        try:
            stack.enter_context(artifacts.locked(path))
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
    kind = artifacts.kind_of(found.path)
    if kind is None:  # the recipe of keys stands in the manifest alone
        found.unknown = "what was made from it"
    else:
        said = json.loads(manifest.read_text(encoding="utf-8"))
        found.inputs = said.get("inputs") or {}
        found.names |= {said.get("recipe"), (said.get("facts") or {}).get("keys_recipe")} - {None}
    try:
        artifacts.read(found.path, kind or "whole")
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
    """What was made from an artefact, and what was made from that."""
    names, dependants = set(found.names), []
    waiting = [other for other in everything if other is not found]
    while fresh := [other for other in waiting if names & set(other.inputs.values())]:
        dependants += fresh
        names = {name for other in fresh for name in other.names}
        waiting = [other for other in waiting if other not in fresh]
    return dependants
