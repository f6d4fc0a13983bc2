"""What a run has: free disk and memory, asked before hours are spent, and the processes of a launch."""

import os
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import psutil

from memdec.errors import ResourceError


def check_disk(folder: Path, needed: float, what: str) -> None:
    """There must be room for `needed` bytes on the disk of a folder (which may not exist yet).

    Raises:
        ResourceError: There is not.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise ResourceError(f"{folder}: expected {size(needed)} of free disk for {what}, found {size(free)}")


def check_memory(needed: float, what: str, instead: str) -> None:
    """There must be room for `needed` bytes in memory; `instead` says what else could be done.

    Raises:
        ResourceError: There is not.
    """
    free = free_memory()
    if needed > free:
        raise ResourceError(f"{what}: expected {size(needed)} of free memory, found {size(free)}; {instead}")


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU, without loading torch, which takes seconds."""
    return Path("/dev/nvidia0").exists()


def free_memory() -> int:
    """Bytes that can be had without swapping."""
    return int(psutil.virtual_memory().available)


def size(n_bytes: float) -> str:
    """Bytes for people: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"


class Team(NamedTuple):
    """The processes of one launch: `rank` of `size`; `wait` returns when all are there."""

    rank: int = 0
    size: int = 1
    wait: Callable[[], None] = lambda: None


def team(on_cpu: bool | None = None) -> Team:
    """Processes of the `torchrun` or `accelerate launch` around this one; a team of one without a launcher.

    `on_cpu`: whether they talk through the CPU (default: where there is no GPU).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Team()
    import torch
    from accelerate import PartialState

    on_cpu = not torch.cuda.is_available() if on_cpu is None else on_cpu
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=7))
    return Team(state.process_index, state.num_processes, state.wait_for_everyone)
