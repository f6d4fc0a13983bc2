"""Versions of what a result was made with, read from package metadata (nothing is imported)."""

import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "memdec",
    "torch",
    "transformers",
    "tokenizers",
    "lm-eval",
    "datasets",
    "faiss-cpu",
    "faiss-gpu",
    "accelerate",
    "peft",
    "numba",
    "numpy",
    "safetensors",
)


@cache
def versions() -> dict[str, str]:
    """Installed versions of the packages that results depend on, and of Python."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit(folder: Path) -> str | None:
    """Commit of the checkout around `folder` (with `+` for local changes), or None outside of one."""
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
    """Processor and number of CPUs, in words."""
    import os

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name}, {os.cpu_count()} CPUs"
