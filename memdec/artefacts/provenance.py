"""Versions of the software that made a result, read from package metadata without importing the packages."""

import importlib.util
import os
import platform
import subprocess
import sysconfig
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

_SKIPPED = {"tests", "test", "_vendor", "_vendored_packages", "idlelib", "lib2to3", "site-packages", "testing"}
PACKAGES = (
    "memdec",
    "torch",
    "transformers",
    "tokenizers",
    "lm-eval",
    "datasets",
    "faiss-cpu",
    "faiss-gpu",
    "faiss-gpu-cuvs",
    "accelerate",
    "peft",
    "numba",
    "numpy",
    "safetensors",
)


@cache
def versions() -> dict[str, str]:
    """The versions of Python and of the installed packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def package_version(name: str) -> str:
    """Version of the distribution that an importable package comes from; of `stdlib` that of Python."""
    if name == "stdlib":
        return platform.python_version()
    distributions = _distributions().get(name, [])
    return metadata.version(distributions[0]) if distributions else "not installed"


def package_folder(name: str) -> Path | None:
    """Folder of an importable package or of `stdlib`; None if there is none of this name, or it is a single module."""
    if name == "stdlib":
        return Path(sysconfig.get_paths()["stdlib"])
    try:
        found = importlib.util.find_spec(name) if name.isidentifier() else None
    except (ImportError, ValueError):  # such as that of __main__
        return None
    places = (found.submodule_search_locations if found is not None else None) or []
    return next(map(Path, places), None)


def python_files(folder: Path) -> list[Path]:
    """The Python files of a package whose docstrings are read, sorted."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED]
        found += [Path(place, name) for name in files if name.endswith(".py")]
    return sorted(found)


@cache
def _distributions() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()


def git_commit(folder: Path) -> str | None:
    """The git commit of the checkout that contains `folder` (with `+` for local changes), or None if there is none."""
    try:
        run = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip() or None


def machine() -> str:
    """The processor's name and the number of CPUs."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name}, {os.cpu_count()} CPUs"
