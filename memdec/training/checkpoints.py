"""Checkpoints of an unfinished training: which of them are whole, and which are kept.

A folder is sealed when all of its files are written: its `whole.json` then lists them with their content hashes. A
checkpoint that a kill or a full disk cut, or that was damaged later, does not fit its list and is never resumed from.
"""

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memdec.artefacts import artefact

SEAL = "whole.json"
KEPT = 2  # newest checkpoints that are kept beside the one of the best evaluation
_PREFIX = "checkpoint-"  # transformers' name, followed by the step


def folder(work: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return work / f"{_PREFIX}{step}"


def seal(path: Path, facts: Mapping[str, Any]) -> None:
    """Mark a folder as whole, with facts for the run that resumes from it."""
    artefact.write_json(path / SEAL, {"files": _files(path), "facts": dict(facts)})


def unseal(path: Path) -> None:
    """Remove the mark of a folder whose files will be written again."""
    (path / SEAL).unlink(missing_ok=True)


def facts(path: Path) -> dict[str, Any] | None:
    """What `seal` wrote, or None if the folder is not whole."""
    said = _sealed(path)
    return said["facts"] if said is not None and said["files"] == _files(path) else None


def _sealed(path: Path) -> dict[str, Any] | None:
    """The content of the seal, without a look at the files."""
    try:
        said = json.loads((path / SEAL).read_text(encoding="utf-8"))
        return {"files": dict(said["files"]), "facts": dict(said["facts"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def newest(work: Path, keep_best: bool) -> Path | None:
    """The newest checkpoint to resume from; those that cannot be used are removed, with a warning if they were damaged.

    With `keep_best` the checkpoint of its best evaluation so far must be whole, too, because the training may end with
    those weights.
    """
    found = None
    for path in _newest_first(work):
        known = facts(path)
        damaged = path if known is None else None
        if known is not None and keep_best and known["best"] is not None:
            best = folder(work, known["best"])
            damaged = best if facts(best) is None else None
        if damaged is None:
            found = found or path
            continue
        # Without a seal it was being written when the run ended, and before a whole one it was being removed.
        if found is None and (path / SEAL).exists():
            warnings.warn(
                f"{damaged}: expected the checkpoint as it was written, found a damaged one; the training goes on from an "
                "earlier one, or begins again",
                stacklevel=2,
            )
        shutil.rmtree(path)
    return found


def rotate(work: Path, keep_best: bool) -> None:
    """Remove all but the newest `KEPT` checkpoints and, with `keep_best`, those of their best evaluations."""
    every = _newest_first(work)
    kept = set(every[:KEPT])
    if keep_best:
        sealed = [said for path in every[:KEPT] if (said := _sealed(path)) is not None]
        kept |= {folder(work, said["facts"]["best"]) for said in sealed}
    for path in every:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def _newest_first(work: Path) -> list[Path]:
    steps = [name.removeprefix(_PREFIX) for name in (path.name for path in work.glob(f"{_PREFIX}*"))]
    return [folder(work, step) for step in sorted((int(step) for step in steps if step.isdecimal()), reverse=True)]


def _files(path: Path) -> dict[str, str]:
    """Content hash of every file of a folder, by relative name."""
    found = (file for file in sorted(path.rglob("*")) if file.is_file() and file.name != SEAL)
    return {file.relative_to(path).as_posix(): artefact.content_hash(file) for file in found}
