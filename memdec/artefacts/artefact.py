"""Write and read artefacts: every stage makes a folder whose `manifest.json` is written last, atomically.

A folder without a manifest is unfinished and is never read. Reading checks the manifest: it must parse and be of the
expected kind, and every file must exist with the listed size. The manifest holds the settings, the hashes of the
inputs, the package versions, and facts about the result (counts, shapes, hashes).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from memdec.artefacts import provenance
from memdec.artefacts.resources import Team
from memdec.errors import ArtifactError
from memdec.settings import describe

MANIFEST = "manifest.json"
MARK = ".memdec"  # holds the recipe of the build that made the folder; without it the folder is not ours to overwrite
LOCK = ".memdec.lock"  # locked while a process builds in the folder; the file is not removed
WORK = "work"  # checkpoints and other files needed only to resume; not part of the artefact

# Version of each kind of artefact, or of each stage if several stages make one kind. Raise it when the same settings
# and inputs give another result. It is part of the recipe, so artefacts of the old code are made again from the start.
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
    "evaluation": 3,
    "cases": 1,
    "latency": 2,
    "sweep": 1,
    "table": 3,  # a table is a file, not an artefact folder: only the Snakemake rules use this number
}


class Manifest(BaseModel):
    """What an artefact is and how it was made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    version: int = 0  # of the stage (`VERSIONS`); 0 in manifests older than this field
    recipe: str  # hash of kind, version, settings and input recipes: equal recipes mean equal artefacts
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
        """Folder for the files needed to resume; it is removed when the artefact is complete."""
        folder = self.path / WORK
        folder.mkdir(exist_ok=True)
        return folder


def digest(value: object) -> str:
    """Hash (128 bits, hex) of a JSON value, independent of key order."""
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
    """Write a file atomically: an interrupted write leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically."""
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
    """Build an artefact in a `with` block; yield None if the same artefact exists already.

    The old manifest is removed first and the new one is written last, so no stage reads the folder of a killed build.
    The stage resumes from its files in `work/` if settings and inputs are the same. Of several processes only the first
    prepares the folder and writes the manifest. `stage` is the key of `VERSIONS` if it differs from `kind`.
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
            _refuse_overwriting(path, kind, inputs)
            stack.enter_context(locked(path))
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
    """Lock a folder against other builds; the lock is released when the process ends, even if it is killed.

    Raises:
        ArtifactError: Another process holds the lock.
    """
    try:
        # No fallback to filelock's marker file: a job killed on another machine would leave it behind for ever.
        lock: AbstractContextManager[object] = FileLock(path / LOCK, fallback_to_soft=False).acquire(blocking=False)
    except Timeout:
        raise ArtifactError(
            f"{path}: expected a folder that nobody builds in, found another process at work; wait for it, or choose "
            "another --out"
        ) from None
    except (OSError, NotImplementedError):  # no locks on this file system; a read-only one fails at the next step
        lock = nullcontext()
    with lock:
        yield


def _finish(build: Build, kind: str, version: int, plain: dict[str, Any], inputs: Mapping[str, str]) -> None:
    path = build.path
    _remove(path / WORK)
    files = {
        str(file.relative_to(path)): file.stat().st_size
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name not in (MANIFEST, MARK, LOCK)
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
    """Read and check the manifest of an artefact of the given kind.

    Raises:
        ArtifactError: The artefact is missing, unfinished, unreadable or of another kind, or a file is missing or cut.
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
    """Check that shards, sorted by their `begin`, come from one run and cover every position once.

    Raises:
        ArtifactError: There is no shard, one is missing or given twice, or their settings or inputs differ.
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
    """Kind of the artefact in a folder, or None if it has no readable manifest."""
    try:
        return str(json.loads((path / MANIFEST).read_text(encoding="utf-8"))["kind"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _refuse_overwriting(path: Path, kind: str, inputs: Mapping[str, str]) -> None:
    """Refuse an output folder that a mistyped --out would destroy.

    Raises:
        ArtifactError: It holds files that are not ours, an artefact of another kind, or an input of this build.
    """
    if not (path / MARK).is_file() and any(child.name != LOCK for child in path.iterdir()):
        raise ArtifactError(
            f"{path}: expected an empty or new folder for the output, found other files; choose another --out"
        )
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
    """Mark the folder with this recipe; keep its files if they are of the same recipe, else remove them."""
    mark = path / MARK
    owner = mark.read_text() if mark.is_file() else None
    (path / MANIFEST).unlink(missing_ok=True)
    if owner not in (None, recipe):
        for child in path.iterdir():
            if child.name not in (MARK, LOCK):  # a kill here must leave a folder that is still marked as ours
                _remove(child)
    write_text(mark, recipe)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
