"""Artefact folders: whatever a stage makes is a folder whose `manifest.json` is written last, atomically.

A folder without a manifest is work in progress and is never read; a manifest that does not parse, is of another kind,
or names files that are missing or of another size is an error that says so. The manifest holds the settings, the
hashes of the inputs, the versions and the facts (counts, shapes, hashes) of what was made.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from memdec import provenance
from memdec.config import describe
from memdec.errors import ArtifactError
from memdec.resources import Team

MANIFEST = "manifest.json"
MARK = ".memdec"  # recipe of the build that owns the folder; without it a folder is somebody else's
WORK = "work"  # checkpoints and other things needed only to resume; not part of the artefact

# Version of each kind of artefact, or of the stage where several stages make one kind. Raise it when the same settings
# and inputs give another result: the number is part of the recipe, so what the old code made is made again whole.
VERSIONS = {
    "corpus": 1,
    "tokenizer": 1,
    "tokens": 1,
    "model": 2,
    "finetune": 2,
    "adapt-vocab": 1,
    "lora": 2,
    "memory": 2,
    "datastore": 2,
    "index": 2,
    "targets": 2,
    "teacher": 1,
    "passages": 1,
    "evaluation": 2,
    "cases": 1,
    "latency": 1,
    "sweep": 1,
    "table": 1,  # a file, not a folder: the rules alone read this one
}


class Manifest(BaseModel):
    """What an artefact is and how it was made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    version: int = 0  # of the stage (`VERSIONS`); 0 for manifests from before there were any
    recipe: str  # hash of kind, version, settings and the inputs' recipes: equal recipes, equal artefacts
    settings: dict[str, Any]
    inputs: dict[str, str]  # name -> recipe of the artefact, or content hash of a file
    facts: dict[str, Any]
    files: dict[str, int]  # relative name -> bytes
    versions: dict[str, str]


@dataclass
class Build:
    """An artefact under construction; the stage fills `facts`."""

    path: Path
    recipe: str
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def work(self) -> Path:
        """Folder for what is needed to resume; removed when the artefact is whole."""
        folder = self.path / WORK
        folder.mkdir(exist_ok=True)
        return folder


def digest(value: object) -> str:
    """Hash (128 bits, hex) of anything that JSON can hold, independent of key order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def sha256(path: Path) -> str:
    """sha256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digest(path: Path) -> str:
    """sha256 (128 bits, hex) of a file."""
    return sha256(path)[:32]


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def building(
    path: Path,
    kind: str,
    settings: BaseModel | Mapping[str, Any],
    inputs: Mapping[str, str],
    team: Team = Team(),  # noqa: B008
    stage: str | None = None,
) -> Iterator[Build | None]:
    """Build an artefact in a `with` block; yields None where the very same one is there already.

    The old manifest goes first, the new one comes last, so a killed build leaves a folder that nobody reads; what the
    stage keeps in `work/` lets it resume if settings and inputs are the same. Of several processes the first owns the
    folder and the others only help to fill it. `stage` is the key of `VERSIONS` where it is not the kind.
    """
    plain = settings.model_dump(mode="json") if isinstance(settings, BaseModel) else dict(settings)
    version = VERSIONS.get(stage or kind, 1)
    recipe = digest({"kind": kind, "version": version, "settings": plain, "inputs": dict(inputs)})
    if team.rank > 0:
        team.wait()
        yield None if _is_current(path, kind, recipe) else Build(path, recipe)
        team.wait()
        return
    if _is_current(path, kind, recipe):
        team.wait()
        yield None
        team.wait()
        return
    with ExitStack() as stack:
        try:
            path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(path))
            _refuse_overwriting(path, kind, inputs)
            _claim(path, recipe)
        except OSError as error:
            raise ArtifactError(
                f"{path}: expected a folder that can be written, found {error}; choose another --out"
            ) from None
        build = Build(path, recipe)
        team.wait()
        yield build
        team.wait()
        _finish(build, kind, version, plain, inputs)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other builds out of a folder; the lock goes with the process, however it ends.

    Raises:
        ArtifactError: Another process has it.
    """
    folder = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArtifactError(
                f"{path}: expected a folder that nobody builds in, found another process at work; wait for it, or choose "
                "another --out"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(folder)


def _finish(build: Build, kind: str, version: int, plain: dict[str, Any], inputs: Mapping[str, str]) -> None:
    path = build.path
    _remove(path / WORK)
    files = {
        str(file.relative_to(path)): file.stat().st_size
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name not in (MANIFEST, MARK)
    }
    manifest = Manifest(
        kind=kind,
        version=version,
        recipe=build.recipe,
        settings=plain,
        inputs=dict(inputs),
        facts=build.facts,
        files=files,
        versions=provenance.versions(),
    )
    write_json(path / MANIFEST, manifest.model_dump(mode="json"))


def _is_current(path: Path, kind: str, recipe: str) -> bool:
    try:
        return read(path, kind).recipe == recipe
    except ArtifactError:
        return False


def read(path: Path, kind: str) -> Manifest:
    """Manifest of a whole artefact of the given kind.

    Raises:
        ArtifactError: Nothing there, unfinished, unreadable, another kind, or files missing or cut short.
    """
    file = path / MANIFEST
    again = f"delete the folder and run `memdec {kind}` (or snakemake) again"
    if not path.is_dir():
        raise ArtifactError(
            f"{path}: expected a folder with a {kind} artefact, found nothing; run `memdec {kind}` first"
        )
    if not file.is_file():
        raise ArtifactError(
            f"{path}: expected {MANIFEST}, found an unfinished {kind} artefact; run `memdec {kind}` again"
        )
    try:
        manifest = Manifest.model_validate_json(file.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        reason = describe(error) if isinstance(error, ValidationError) else str(error)
        raise ArtifactError(
            f"{file}: expected a whole manifest, found one that is cut or edited ({reason[:120]}); {again}"
        ) from None
    if manifest.kind != kind:
        raise ArtifactError(f"{path}: expected a {kind} artefact, found one of kind {manifest.kind}; check the path")
    for name, size in manifest.files.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            what = "no such file" if found is None else f"{found} bytes"
            raise ArtifactError(f"{path / name}: expected {size} bytes, found {what}; {again}")
    return manifest


def check_shards(found: Sequence[tuple[Manifest, Path]], kind: str) -> None:
    """Shards of one run, sorted by their `begin`, cover all positions once.

    Raises:
        ArtifactError: None given, different settings or inputs, one twice, or one missing.
    """
    if not found:
        raise ArtifactError(f"{kind}: expected at least one shard, found none; run `memdec {kind}` first")

    def shared(manifest: Manifest) -> tuple[object, ...]:
        return manifest.version, {**manifest.settings, "shard": None}, manifest.inputs, manifest.facts["positions"]

    position = 0
    for manifest, folder in found:
        if shared(manifest) != shared(found[0][0]):
            raise ArtifactError(
                f"{folder}: expected shards of one run, found different settings, inputs or versions; make them again"
            )
        if manifest.facts["begin"] != position:
            raise ArtifactError(
                f"{folder}: expected the shard that begins at position {position}, found {manifest.facts['begin']}; give "
                "every shard once"
            )
        position = manifest.facts["end"]
    if position != found[0][0].facts["positions"]:
        raise ArtifactError(
            f"{kind}: expected shards up to position {found[0][0].facts['positions']}, found them up to {position}; give "
            "every shard once"
        )


def kind_of(path: Path) -> str | None:
    """Kind of the artefact in a folder, or None where there is no readable manifest."""
    try:
        return str(json.loads((path / MANIFEST).read_text(encoding="utf-8"))["kind"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _refuse_overwriting(path: Path, kind: str, inputs: Mapping[str, str]) -> None:
    """A mistyped --out must cost nothing: neither an artefact of another kind nor an input of this build is replaced."""
    there = kind_of(path)
    if there is None:
        return
    if there != kind:
        raise ArtifactError(
            f"{path}: expected a new folder or a {kind} artefact for the output, found one of kind {there}; choose another --out"
        )
    if json.loads((path / MANIFEST).read_text(encoding="utf-8")).get("recipe") in inputs.values():
        raise ArtifactError(
            f"{path}: expected a folder for the output, found an input of this very build; choose another --out"
        )


def _claim(path: Path, recipe: str) -> None:
    """Take the folder for this recipe: keep what the same recipe left, drop what another one left.

    Raises:
        ArtifactError: The folder holds files that no build of ours put there; they are not touched.
    """
    mark = path / MARK
    owner = mark.read_text() if mark.is_file() else None
    if owner is None and any(path.iterdir()):
        raise ArtifactError(
            f"{path}: expected an empty or new folder for the output, found other files; choose another --out"
        )
    (path / MANIFEST).unlink(missing_ok=True)
    if owner not in (None, recipe):
        for child in path.iterdir():
            if child != mark:  # a kill in between must leave a folder that is still ours
                _remove(child)
    write_text(mark, recipe)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        for child in path.iterdir():
            _remove(child)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
