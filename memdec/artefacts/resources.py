"""Checks of free disk and memory before a long run starts, and the processes of a distributed launch."""

import errno
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import psutil

from memdec.errors import MemDecError, ResourceError, reason

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How libraries in other languages say it: Rust (safetensors, tokenizers) and Arrow. Torch's writer of archives and NumPy's
# of arrays give no reason.
_SAID = re.compile(
    rf"{'|'.join(re.escape(os.strerror(number)) for number in _FULL)}|os error ({'|'.join(map(str, _FULL))})\b"
    r"|PytorchStreamWriter failed|inline_container|\d+ requested and \d+ written",
    re.IGNORECASE,
)


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


@contextmanager
def one_line_when_disk_is_full(where: Path) -> Iterator[None]:
    """Turn the errors of a full disk, or of a quota, into one line that names `where`, the file or folder to write.

    Raises:
        ResourceError: The disk is full.
    """
    try:
        yield
    except MemDecError:
        raise
    except Exception as error:
        if not _is_of_full_disk(error):
            raise
        raise ResourceError(
            f"{where}: expected room on the disk, found it full ({reason(error, 100)}); free some and run the same command "
            "again, it goes on from what is written"
        ) from None


def _is_of_full_disk(error: BaseException | None) -> bool:
    """Whether a full disk caused an exception, which may hide behind another one."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in _FULL) or _SAID.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def allow_open_files() -> None:
    """Let this process open as many files as its hard limit says: every memory map holds one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU. It does not import torch, which would take seconds."""
    return Path("/dev/nvidia0").exists()


def memory() -> int:
    """Bytes of main memory of this machine."""
    return int(psutil.virtual_memory().total)


def free_memory() -> int:
    """Bytes of memory that this process may still take without swapping: of the machine, of its cgroups and of its job."""
    room = [int(psutil.virtual_memory().available), *_cgroup_room()]
    if job := _slurm("SLURM_MEM_PER_NODE") or _slurm("SLURM_MEM_PER_CPU") * _slurm("SLURM_CPUS_ON_NODE"):
        room.append(job * 2**20 - psutil.Process().memory_info().rss)  # not every cluster enforces it by a cgroup
    return max(0, min(room))


def _slurm(name: str) -> int:
    """A number that Slurm tells its jobs (memory in MB); 0 if it does not."""
    said = os.environ.get(name, "")
    return int(said) if said.isdigit() else 0


_CGROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def _cgroup_room() -> Iterator[int]:
    """Bytes below the limit of each cgroup that this process is in; pages that only cache files count as free."""
    try:
        lines = _OWN.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = _CGROUPS / controllers
        most, used, cached = _V1 if controllers else _V2
        # Inside a container the path may be that of the host, and its own cgroup the top one.
        below = Path(place.lstrip("/"))
        for folder in (top / each for each in (below, *below.parents)):
            try:
                limit, taken = ((folder / name).read_text().strip() for name in (most, used))
                counts = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
                if limit.isdigit():
                    yield int(limit) - int(taken) + int(counts.get(cached, 0))
            except (OSError, ValueError):
                continue


_V2 = ("memory.max", "memory.current", "inactive_file")  # limit, use, and the file cache in memory.stat
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


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
