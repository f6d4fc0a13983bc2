"""`memdec doctor`: find damaged artefacts under a folder, and name what will be made again because of them.

Every file of every artefact is hashed, also the large ones, which stages check by size only, and the files to which a
model's links lead. What a killed process left beside a whole artefact is removed.

The manifest of a damaged artefact is removed, so no stage reads the artefact and Snakemake treats it as missing.
`make repair` then makes it again. An artefact without a manifest is unfinished: it is reported and left as it is. A
deleted folder cannot be found here; `make repair` asks Snakemake for missing outputs.
"""

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
        problems: What is wrong with it, a line for each damaged file.
        unknown: Replaces the list of artefacts made from it, if its recipe cannot be read.
        is_unfinished: Whether it has no manifest yet, or a process is building it.
    """

    path: Path
    names: set[str] = field(default_factory=set)
    inputs: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unknown: str = ""
    is_unfinished: bool = False


def run(folder: Path) -> tuple[list[str], int]:
    """Check all artefacts below a folder and remove the manifests of the damaged ones.

    Args:
        folder: Where to search.

    Returns:
        One line for each damaged or unfinished artefact, after it a line for each of its files but the first that is
        damaged, and a summary line; and the number of damaged artefacts.

    Raises:
        ConfigError: The folder does not exist.
        ArtifactError: A manifest cannot be removed.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: expected a folder with artefacts, found none; give the folder 'results' of a run")
    everything = [_look(path) for path in _artefacts(folder)]
    damaged = [found for found in everything if found.problems]
    lines = []
    for found in damaged:
        again = ", ".join(str(other.path) for other in _dependants(found, everything)) or found.unknown
        first, *others = found.problems
        lines.append(f"{found.path}: damaged; {first}; will be made again{' with ' * bool(again)}{again}")
        lines += [f"{found.path}: damaged too; {problem}" for problem in others]
    unfinished = [found for found in everything if found.is_unfinished]
    lines += [f"{found.path}: unfinished; left for the command that makes it" for found in unfinished]
    lines.append(f"{folder}: {len(everything)} artefacts, {len(damaged)} damaged, {len(unfinished)} unfinished")
    return lines, len(damaged)


def _artefacts(folder: Path) -> Iterator[Path]:
    seen = set()
    for place, below, files in os.walk(folder, followlinks=True):  # results often lie on another disk
        known = os.stat(place)
        if (known.st_dev, known.st_ino) in seen:
            below.clear()
            continue
        seen.add((known.st_dev, known.st_ino))
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
    if not (found.path / MANIFEST).is_file():
        found.is_unfinished = True
        return
    found.names |= {artefact.owner(found.path) or ""} - {""}
    found.problems = artefact.examine(found.path)
    said = artefact.said(found.path)  # a damaged manifest may still name what it was made from
    inputs, facts = ({} if not isinstance(said.get(key), dict) else said[key] for key in ("inputs", "facts"))
    if artefact.kind_of(found.path) is None:  # only the manifest has `keys_recipe`
        found.unknown = "what was made from it"
    found.inputs = {name: recipe for name, recipe in inputs.items() if isinstance(recipe, str)}
    found.names |= {name for name in (said.get("recipe"), facts.get("keys_recipe")) if isinstance(name, str)}
    if found.problems:
        _disown(found.path)
    else:
        artefact.tidy(found.path)


def _disown(path: Path) -> None:
    """Remove the manifest of a damaged artefact, and mark its folder as ours, so that it can be made again there."""
    try:
        if artefact.owner(path) is None:
            artefact.write_text(path / MARK, "")
        (path / MANIFEST).unlink()
    except OSError as error:
        raise ArtifactError(
            f"{path / MANIFEST}: expected a file that can be removed, found {error}; run `memdec doctor` as its owner"
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
