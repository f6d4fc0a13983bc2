"""Read and make `.npy` files: what a manifest or setting says of an array is checked before the array is used.

Compiled code (numba, faiss) does not check shapes. An array that is wider than the manifest says would be written beyond
the end of another one.
"""

import errno
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import DTypeLike, NDArray

from memdec.artefacts import resources
from memdec.errors import ArtifactError, ResourceError, outside

INTEGERS = [np.dtype(f"{sign}{size}") for sign in "ui" for size in (1, 2, 4, 8)]
FLOATS = [np.dtype("f2"), np.dtype("f4")]
_AGAIN = "delete the folder and make it again"
# Errors of the system, which say nothing about the content of a file.
_INSTEAD = {
    errno.EMFILE: "raise `ulimit -n`",
    errno.ENFILE: "close other programs, or raise fs.file-max",
    errno.ENOMEM: "free memory, or raise vm.max_map_count",
    errno.EACCES: "let this user read it",
    errno.EIO: "look after the disk",
}


def load(path: Path, dtypes: DTypeLike | list[np.dtype[Any]], shape: tuple[int | None, ...] = (None,)) -> NDArray[Any]:
    """Memory-map an array and check its type and shape.

    Args:
        path: The file.
        dtypes: Type of the elements, or the types that it may be.
        shape: The shape; a None stands for any length.

    Raises:
        ArtifactError: The file is no whole `.npy` file, holds pickled objects, or has another type or shape.
        ResourceError: The system does not open the file, whatever is in it.
    """
    with outside(ArtifactError, path, "an array in .npy format", _AGAIN):
        try:
            # Not np.load, which takes archives and pickles too. The header is literals, but some of them need much memory.
            found = np.lib.format.open_memmap(path, mode="r", max_header_size=1024)
        except OSError as error:
            if error.errno not in _INSTEAD:
                raise
            raise ResourceError(
                f"{path}: expected a file that can be opened, found: {os.strerror(error.errno)}; {_INSTEAD[error.errno]}"
            ) from None
    wanted: list[np.dtype[Any]] = dtypes if isinstance(dtypes, list) else [np.dtype(dtypes)]
    same = len(found.shape) == len(shape) and all(
        n in (None, there) for n, there in zip(shape, found.shape, strict=True)
    )
    if found.dtype not in wanted or not same or not found.flags.c_contiguous:
        types, sizes = " or ".join(map(str, wanted)), ", ".join("any" if n is None else str(n) for n in shape)
        raise ArtifactError(
            f"{path}: expected {types} of shape ({sizes}), found {found.dtype} of shape {found.shape}; {_AGAIN}"
        )
    return found


def scattered(found: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """Whole arrays of `load`, for reading rows at random: without read-ahead if memory cannot hold them all.

    Memory that holds them all is filled sooner with read-ahead. Otherwise most of what is read ahead is gone before it is
    used, up to a hundred times as much as the rows. The maps are new ones, so others read ahead as before.
    """
    if sum(each.nbytes for each in found) < resources.free_memory():
        return list(found)
    fresh = []
    for each in found:
        assert isinstance(each, np.memmap)
        there: Any = load(Path(str(each.filename)), each.dtype, each.shape)
        there._mmap.madvise(mmap.MADV_RANDOM)
        fresh.append(there)
    return fresh


def content_hash(values: NDArray[Any]) -> str:
    """xxh3_128 (hex) of the numbers of a C-contiguous array."""
    return xxhash.xxh3_128_hexdigest(values.view(np.uint8).reshape(-1).data)


def allocate(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> None:
    """Make a file for an array, with its room on the disk: writing to a memory map of a full disk kills the process."""
    np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
