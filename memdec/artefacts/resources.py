"""Checks of free disk and memory before a long run starts, and the processes of a distributed launch."""

import os
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import psutil

from memdec.errors import ResourceError


def check_disk(folder: Path, needed: float, what: str) -> None:
    """Check that the disk of a folder (which may not exist yet) has `needed` free bytes.

    Raises:
        ResourceError: The free space is too small.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise ResourceError(f"{folder}: expected {size(needed)} of free disk for {what}, found {size(free)}")


def check_memory(needed: float, what: str, instead: str) -> None:
    """Check that `needed` bytes of memory are free; `instead` is the next step for the user.

    Raises:
        ResourceError: The free memory is too small.
    """
    free = free_memory()
    if needed > free:
        raise ResourceError(f"{what}: expected {size(needed)} of free memory, found {size(free)}; {instead}")


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU. It does not import torch, which would take seconds."""
    return Path("/dev/nvidia0").exists()


def free_memory() -> int:
    """Bytes of memory that are available without swapping."""
    return int(psutil.virtual_memory().available)


def size(n_bytes: float) -> str:
    """A number of bytes in readable form, such as 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"


class Team(NamedTuple):
    """The processes of one distributed launch: this one is `rank` of `size`; `wait` is a barrier for all of them."""

    rank: int = 0
    size: int = 1
    wait: Callable[[], None] = lambda: None


def team(on_cpu: bool | None = None) -> Team:
    """The processes that `torchrun` or `accelerate launch` started; without a launcher a team of one.

    `on_cpu` says whether they communicate through the CPU (default: if there is no GPU).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Team()
    import torch
    from accelerate import PartialState

    on_cpu = not torch.cuda.is_available() if on_cpu is None else on_cpu
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=7))
    return Team(state.process_index, state.num_processes, state.wait_for_everyone)
