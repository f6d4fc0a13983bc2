"""Write and read artefacts: every stage makes a folder whose `manifest.json` is written last, atomically.

A folder without a manifest is unfinished and is never read. Reading checks the manifest: it must parse, fit its own
checksum, and be of the expected kind, and every file must exist with the listed size and content. Content is compared
by a fast hash. Files above `SMALL` bytes are hashed only where a stage reads them as a whole, and by `memdec doctor`.
The manifest holds the settings, the hashes of the inputs, the package versions, and facts about the result (counts,
shapes, hashes).
"""

import errno
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import xxhash
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from memdec.artefacts import provenance
from memdec.artefacts.resources import Team, allow_open_files, one_line_when_disk_is_full
from memdec.errors import ArtifactError
from memdec.settings import describe

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# Holds the recipe of the build that made the folder; without it the folder is not ours to overwrite. An empty or
# damaged mark means that the files are of no known recipe: nothing can be resumed from them.
MARK = ".memdec"
LOCK = ".memdec.lock"  # locked while a process builds in the folder; the file is not removed
FREED = ".memdec.freed"  # names of files that were removed because nothing needs them any more (`free`)
WORK = "work"  # checkpoints and other files needed only to resume; not part of the artefact
TEMPORARY = re.compile(r"\..+\.(\d+)")  # name of a file that is being written (`write_bytes`), with its process
FRESH = 1.0  # seconds for which a changed file is hashed again, because two changes may have one time stamp
_ABANDONED = 60.0  # seconds after which a temporary file of a process that is gone is removed
SMALL = 64 * 2**20  # bytes up to which every reader checks the content of a file: 0.02 s with xxh3

# Version of each kind of artefact, or of each stage if several stages make one kind. Raise it when the same settings
# and inputs give another result. It is part of the recipe, so artefacts of the old code are made again from the start.
VERSIONS = {
    "corpus": 2,
    "tokenizer": 1,
    "tokens": 2,
    "model": 3,
    "finetune": 3,
    "adapt-vocab": 1,
    "lora": 4,
    "memory": 3,
    "bild": 4,  # a memory with this objective
    "datastore": 2,
    "index": 2,
    "cells": 8,  # an index of this kind
    "targets": 2,
    "teacher": 2,
    "calibration": 2,
    "passages": 1,
    "scores": 2,
    "evaluation": 8,
    "harness": 4,
    "cases": 2,
    "latency": 2,
    "sweep": 5,
    "fidelity": 2,
    "shapes": 3,
    "table": 8,  # tables and figures are files, not artefact folders: only the Snakemake rules use these numbers
    "figure": 3,
    "claims": 4,
    "report": 1,
}

# Commands whose artefacts have another name.
_COMMANDS = {"memory": "train", "calibration": "calibrate", "evaluation": "evaluate", "scores": "score"}


class Facts(dict[str, Any]):
    """The facts of a manifest; a missing one is an error of the artefact, as in manifests of other versions."""

    def __missing__(self, name: str) -> Any:
        raise ArtifactError(f"manifest: expected the fact {name!r}, found none; make the artefact again")


class Listed(BaseModel):
    """What a manifest says about one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    xxh3_128: str


class Manifest(BaseModel):
    """What an artefact is and how it was made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    version: int  # of the stage (`VERSIONS`)
    recipe: str  # hash of kind, version, settings and input recipes: equal recipes mean equal artefacts
    settings: dict[str, Any]
    inputs: dict[str, str]  # name -> recipe of the artefact, or content hash of a file
    facts: dict[str, Any]
    files: dict[str, Listed]  # by relative name
    versions: dict[str, str]
    checksum: str  # `signature` of the other fields

    @field_validator("facts")
    @classmethod
    def _named(cls, facts: dict[str, Any]) -> Facts:
        return Facts(facts)

    @property
    def n_bytes(self) -> int:
        """Size of all files."""
        return sum(listed.bytes for listed in self.files.values())


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


def content_hash(path: Path) -> str:
    """xxh3_128 (hex) of a file: what manifests list, and what says whether two files are equal."""
    found, block = xxhash.xxh3_128(), memoryview(bytearray(2**18))
    with path.open("rb", buffering=0) as file:
        while n_bytes := file.readinto(block):
            found.update(block[:n_bytes])
    return found.hexdigest()


_HASHES: dict[tuple[str | int, ...], str] = {}


def hashed(path: Path) -> str:
    """`content_hash` of a file, or of the file behind a link; computed once per process while the file is the same."""
    now = path.stat()
    key = (str(path), now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
    if key not in _HASHES:
        found = content_hash(path)
        if time.time() - max(now.st_mtime, now.st_ctime) < FRESH:
            return found
        _HASHES[key] = found
    return _HASHES[key]


def signature(written: Mapping[str, Any]) -> str:
    """The checksum of a manifest: digest of the rest of its JSON, of `files` only the names, as they speak for themselves."""
    return digest({**written, "checksum": None, "files": sorted(written["files"])})


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: an interrupted write leaves the old file.

    Raises:
        ResourceError: The disk is full.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with one_line_when_disk_is_full(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        sync(path.parent)
        _remove_abandoned(path)


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary files that killed processes left of this file."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*"):
        match = TEMPORARY.fullmatch(part.name)
        with suppress(OSError):
            if match and not psutil.pid_exists(int(match[1])) and time.time() - part.stat().st_mtime > _ABANDONED:
                part.unlink()


def sync(path: Path) -> None:
    """Write a file or folder through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # a file system that cannot do it for folders
            raise
    finally:
        os.close(descriptor)


def write_mark(path: Path, data: bytes) -> None:
    """Write what a killed run resumes from, behind its hash (`read_mark`)."""
    write_bytes(path, xxhash.xxh3_128_digest(data) + data)


def read_mark(path: Path) -> bytes | None:
    """What `write_mark` wrote; None if the file is missing or damaged, so that the run starts again."""
    try:
        found = path.read_bytes()
    except OSError:
        return None
    return found[16:] if xxhash.xxh3_128_digest(found[16:]) == found[:16] else None


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


_KEEPING: ContextVar[bool] = ContextVar("_KEEPING", default=False)
_WAITING: ContextVar[bool] = ContextVar("_WAITING", default=False)
_POLL = 0.5  # seconds between two looks at a lock


@contextmanager
def keeping() -> Iterator[None]:
    """Within the block, `building` refuses to replace what was made with other settings (see `_refuse_replacing`)."""
    token = _KEEPING.set(True)
    try:
        yield
    finally:
        _KEEPING.reset(token)


@contextmanager
def waiting() -> Iterator[None]:
    """Within the block, `building` waits for another process that builds in its folder, and takes what that one made.

    For the jobs of Snakemake: when it is killed alone, its jobs go on, and the next run starts the same ones.
    """
    token = _WAITING.set(True)
    try:
        yield
    finally:
        _WAITING.reset(token)


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

    The old manifest is removed first. The new one is written when all files are on the disk, and after it only `work/`
    is removed. So no stage reads the folder of a killed build, and a build that was killed at its very end is whole.
    The stage resumes from its files in `work/` if settings and inputs are the same. Of several processes only the first
    prepares the folder and writes the manifest. `stage` is the key of `VERSIONS` if it differs from `kind`.

    Raises:
        ArtifactError: The folder cannot be written, holds something else, or another process builds in it.
        ResourceError: The disk is full.
    """
    with one_line_when_disk_is_full(path):
        yield from _building(path, kind, settings, inputs, team, stage)


def _building(
    path: Path,
    kind: str,
    settings: BaseModel | Mapping[str, Any],
    inputs: Mapping[str, str],
    team: Team,
    stage: str | None,
) -> Iterator[Build | None]:
    plain = settings.model_dump(mode="json") if isinstance(settings, BaseModel) else dict(settings)
    version = VERSIONS.get(stage or kind, 1)
    recipe = digest({"kind": kind, "version": version, "settings": plain, "inputs": dict(inputs)})
    if team.rank > 0:
        team.wait()
        yield None if _is_current(path, kind, recipe) else Build(path, recipe)
        team.wait()
        return
    if _is_current(path, kind, recipe):
        _tidy_up(path)
        team.wait()
        yield None
        team.wait()
        return
    with ExitStack() as stack:
        with _one_line_when_refused(path), one_line_when_disk_is_full(path):
            path.mkdir(parents=True, exist_ok=True)
            _refuse_overwriting(path, kind, inputs)
            stack.enter_context(locked(path, wait=_WAITING.get()))
            made = _is_current(path, kind, recipe)  # by the process that this one waited for
            if not made:
                _refuse_replacing(path, kind, recipe)
                _claim(path, recipe)
        build = None if made else Build(path, recipe)
        team.wait()
        yield build
        team.wait()
        if build is not None:
            _finish(build, kind, version, plain, inputs)


@contextmanager
def _one_line_when_refused(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            f"{path}: expected a folder that can be written, found {error}; choose another --out"
        ) from None


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Lock a folder against other builds; the lock is released when the process ends, even if it is killed.

    With `wait`, wait for a process that holds the lock.

    Raises:
        ArtifactError: Another process holds the lock.
    """
    # No fallback to filelock's marker file: a job killed on another machine would leave it behind for ever.
    file = FileLock(path / LOCK, fallback_to_soft=False)
    try:
        try:
            lock: AbstractContextManager[object] = file.acquire(blocking=False)
        except Timeout:
            if not wait:
                raise
            log.warning("%s: waiting for another process that builds here", path)
            lock = file.acquire(poll_interval=_POLL)
    except Timeout:
        raise ArtifactError(
            f"{path}: expected a folder that nobody builds in, found another process at work; wait for it, or choose "
            "another --out"
        ) from None
    except (OSError, NotImplementedError):  # no locks on this file system; a read-only one fails at the next step
        if (path / LOCK).exists() and not os.access(path / LOCK, os.W_OK) and os.access(path, os.W_OK):
            raise ArtifactError(
                f"{path}: expected a lock that can be opened, found that of another user, who may be building here; choose "
                "another --out, or remove this folder"
            ) from None
        lock = nullcontext()
    with lock:
        yield


def _finish(build: Build, kind: str, version: int, plain: dict[str, Any], inputs: Mapping[str, str]) -> None:
    path = build.path
    found = [file for file in sorted(path.rglob("*")) if file.is_file() and _is_part(file.relative_to(path))]
    manifest = Manifest(
        kind=kind,
        version=version,
        recipe=build.recipe,
        settings=plain,
        inputs=dict(inputs),
        facts=build.facts,
        files={
            str(file.relative_to(path)): Listed(bytes=file.stat().st_size, xxh3_128=content_hash(file))
            for file in found
        },
        versions=provenance.versions(),
        checksum="",
    )
    _sync(path, found)
    written = json.loads(json.dumps(manifest.model_dump(mode="json")))
    write_json(path / MANIFEST, {**written, "checksum": signature(written)})
    tidy(path)


def _is_part(name: Path) -> bool:
    """Whether a file, named relative to its artefact, is part of it."""
    ours = (MANIFEST, MARK, LOCK, FREED)
    return name.parts[0] != WORK and name.name not in ours and not TEMPORARY.fullmatch(name.name)


def _leftovers(path: Path) -> list[Path]:
    """What a killed build may leave beside a whole artefact: `work/`, and temporary files."""
    parts = [file for file in path.rglob(".*") if TEMPORARY.fullmatch(file.name) and file.is_file()]
    return parts + [folder for folder in [path / WORK] if folder.is_dir()]


def tidy(path: Path) -> None:
    """Remove what a killed build left beside a whole artefact, whose lock the caller holds."""
    for leftover in _leftovers(path):
        _remove(leftover)


def _tidy_up(path: Path) -> None:
    if _leftovers(path):
        with suppress(ArtifactError, OSError), locked(path):  # another process may be at it; the next run will do it
            tidy(path)


def _sync(path: Path, files: Sequence[Path]) -> None:
    """Write files and their folders through, so that a power failure leaves no manifest without its files."""
    for place in (
        *(file for file in files if not file.is_symlink()),
        *sorted({file.parent for file in files} | {path}),
    ):
        sync(place)


def examine(path: Path) -> list[str]:
    """Check an artefact in full: what is wrong, a line for the manifest or for each file."""
    try:
        manifest = _parsed(path / MANIFEST, "make it again")
    except ArtifactError as error:
        return [str(error).rpartition("; ")[0]]
    return list(damage(path, manifest, again=True))


def _is_current(path: Path, kind: str, recipe: str) -> bool:
    try:
        return read(path, kind, freed=True).recipe == recipe
    except ArtifactError:
        return False


def read(path: Path, kind: str, whole: bool = False, *, freed: bool = False) -> Manifest:
    """Read and check the manifest and the files of an artefact of the given kind.

    Files up to `SMALL` bytes are hashed, with `whole` also the larger ones; a file that did not change is hashed once
    per process. With `freed`, files that `free` has removed may be missing.

    Raises:
        ArtifactError: The artefact is missing, unfinished, unreadable or of another kind, its manifest was changed, or
            a file is missing, cut or changed.
    """
    command = f"`memdec {_COMMANDS.get(kind, kind)}`"
    if not path.is_dir():
        found = "a file" if path.is_file() else "nothing"
        raise ArtifactError(f"{path}: expected a folder with a {kind} artefact, found {found}; run {command} first")
    if not (path / MANIFEST).is_file() and _is_of_others(path):
        raise ArtifactError(
            f"{path}: expected a folder that {command} made, found one that memdec did not make; "
            + (f"run `memdec tokenizer --pretrained {path}` first" if kind == "tokenizer" else "check the path")
        )
    if not (path / MANIFEST).is_file():
        raise ArtifactError(f"{path}: expected {MANIFEST}, found an unfinished {kind} artefact; run {command} again")
    again = f"delete the folder and run {command} (or snakemake) again"
    manifest = _parsed(path / MANIFEST, again)
    if manifest.kind != kind:
        raise ArtifactError(f"{path}: expected a {kind} artefact, found one of kind {manifest.kind}; check the path")
    for problem in damage(path, manifest, None if whole else SMALL):
        raise ArtifactError(f"{problem}; {again}")
    gone = [] if freed else [name for name in _freed(path) if name in manifest.files and not (path / name).exists()]
    if gone:
        raise ArtifactError(
            f"{path}: expected {', '.join(gone)}, found that `memdec free` removed it after its last use "
            f"(`keep_keys: false`); {again}"
        )
    return manifest


def free(path: Path, kind: str) -> int:
    """Remove the files of an artefact that nothing will read any more; its manifest stays, with its time.

    So whatever was made from the artefact counts as up to date, and the artefact itself as made. A killed call can be
    repeated.

    Returns:
        Bytes on disk that became free.

    Raises:
        ArtifactError: The artefact is damaged, or a process builds in its folder.
    """
    manifest, n_bytes = read(path, kind, freed=True), 0
    with locked(path):
        write_json(path / FREED, sorted(manifest.files))
        for name in manifest.files:
            file = path / name
            if file.exists():
                n_bytes += file.stat().st_size
                file.unlink()
    return n_bytes


def _freed(path: Path) -> list[str]:
    """Names of the files that `free` has removed from an artefact, or was about to remove; none if that is unreadable."""
    try:
        found = json.loads((path / FREED).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def _parsed(file: Path, again: str) -> Manifest:
    """The manifest in a file, if it is whole and fits its own checksum."""
    try:
        text = file.read_text(encoding="utf-8")
        manifest, written = Manifest.model_validate_json(text), json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        reason = describe(error) if isinstance(error, ValidationError) else str(error)
        raise ArtifactError(
            f"{file}: expected a whole manifest, found one that is cut or edited ({reason[:120]}); {again}"
        ) from None
    if signature(written) != manifest.checksum:
        raise ArtifactError(f"{file}: expected the manifest as it was written, found one that was changed; {again}")
    return manifest


def damage(path: Path, manifest: Manifest, up_to: int | None = None, *, again: bool = False) -> Iterator[str]:
    """What is wrong with each damaged file of an artefact.

    Args:
        path: Its folder.
        manifest: Its manifest.
        up_to: Hash only files of at most so many bytes; None: all files.
        again: Hash files again that this process has hashed before.
    """
    freed = set(_freed(path))
    for name, listed in manifest.files.items():
        file = path / name
        try:
            there = file.stat() if file.is_file() else None
            if there is None and name in freed:
                continue
            if there is None or there.st_size != listed.bytes:
                what = "no such file" if there is None else f"{there.st_size} bytes"
                yield f"{file}: expected {listed.bytes} bytes, found {what}"
            elif up_to is None or listed.bytes <= up_to:
                found = content_hash(file) if again else hashed(file)
                if found != listed.xxh3_128:
                    yield f"{file}: expected the content that was written (xxh3_128 {listed.xxh3_128}), found {found}"
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            yield f"{file}: expected a file that can be read, found {error}"


def shards(folders: Sequence[Path], kind: str) -> list[tuple[Manifest, Path]]:
    """Read the shards of one run, sorted by position: together they cover every position once.

    Raises:
        ArtifactError: There is no shard, one is damaged, missing or given twice, or their settings or inputs differ.
    """
    if len(folders) > 1:  # their arrays stay open
        allow_open_files()
    found = [(read(folder, kind), folder) for folder in folders]
    if not found:
        raise ArtifactError(f"{kind}: expected at least one shard, found none; run `memdec {kind}` first")
    for manifest, folder in found:
        places = [manifest.facts[name] for name in ("begin", "end", "positions")]
        if not all(isinstance(place, int) for place in places) or not 0 <= places[0] <= places[1] <= places[2]:
            raise ArtifactError(
                f"{folder}: expected positions from 'begin' to 'end' of 'positions', found {places}; make it again"
            )
    found.sort(key=lambda item: int(item[0].facts["begin"]))

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
    return found


def kind_of(path: Path) -> str | None:
    """Kind of the artefact in a folder, or None if it has no readable manifest."""
    found = said(path).get("kind")
    return found if isinstance(found, str) else None


def said(path: Path) -> dict[str, Any]:
    """The manifest of a folder as it is, unchecked; empty if it cannot be read."""
    try:
        found = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def owner(path: Path) -> str | None:
    """The recipe in the mark of a folder; "" if the mark is empty or damaged, None if there is none."""
    try:
        found = (path / MARK).read_text(encoding="utf-8") if (path / MARK).is_file() else None
    except (OSError, UnicodeDecodeError):
        return ""
    return found if found is None or re.fullmatch("[0-9a-f]{32}", found) else ""


def _refuse_overwriting(path: Path, kind: str, inputs: Mapping[str, str]) -> None:
    """Refuse an output folder that a mistyped --out would destroy.

    Raises:
        ArtifactError: It holds files that are not ours, an artefact of another kind, or an input of this build.
    """
    if _is_of_others(path):
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
    if said(path).get("recipe") in inputs.values():
        raise ArtifactError(
            f"{path}: expected a folder for the output, found an input of this very build; choose another --out"
        )


def _is_of_others(path: Path) -> bool:
    """Whether a folder holds files and no build ever began in it."""
    return owner(path) is None and any(not _is_of_claim(child) for child in path.iterdir())


def _is_of_claim(file: Path) -> bool:
    """Whether a build that was killed before its folder had a mark may have left this file."""
    begun = TEMPORARY.fullmatch(file.name) is not None and file.name.startswith(f".{MARK}.")
    return file.is_file() and not file.is_symlink() and (file.name == LOCK or begun)


def _refuse_replacing(path: Path, kind: str, recipe: str) -> None:
    """Within `keeping`, refuse to replace an artefact, or work to resume from, that was made with other settings.

    Raises:
        ArtifactError: There is one.
    """
    if not _KEEPING.get():
        return
    there = str(said(path).get("recipe") or owner(path) or "")
    work = path / WORK
    if not there or there == recipe or not ((path / MANIFEST).is_file() or (work.is_dir() and any(work.iterdir()))):
        return
    what = f"a {kind} artefact" if (path / MANIFEST).is_file() else f"an unfinished {kind} artefact"
    raise ArtifactError(
        f"{path}: expected a new folder, found {what} made with other settings, inputs or code; give --overwrite to replace it, "
        "or choose another --out"
    )


def _claim(path: Path, recipe: str) -> None:
    """Mark the folder with this recipe; keep its files if they are of the same recipe, else remove them."""
    there = owner(path)
    for name in (MANIFEST, FREED):
        (path / name).unlink(missing_ok=True)
    if there not in (None, recipe):
        # A kill below leaves a folder that is marked as ours, but not files that a build could take for its own.
        write_text(path / MARK, "")
        for child in path.iterdir():
            if child.name not in (MARK, LOCK):
                _remove(child)
    write_text(path / MARK, recipe)
    for file in path.rglob(".*"):
        if TEMPORARY.fullmatch(file.name) and file.is_file():
            file.unlink()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
