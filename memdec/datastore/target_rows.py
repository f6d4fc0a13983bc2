"""Write and read targets on disk: a shard is written in batches and can be resumed; shards are read as one."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from memdec.artefacts import arrays, artefact
from memdec.errors import ArtifactError
from memdec.maths.sparse_rows import SparseRows

_CHECKPOINT = 30.0  # seconds between two checkpoints
_HEADER = 128  # bytes of the header of a one-dimensional .npy file of any length


class RowWriter:
    """Appends rows to the three arrays of a shard; after a kill, rows up to the last checkpoint are kept."""

    def __init__(self, out: Path, work: Path, token: np.dtype[Any], prob: np.dtype[Any]) -> None:
        self._mark, self._last, self.dtypes = work / "rows", time.monotonic(), (token, prob)
        state: dict[str, Any] = json.loads(artefact.read_mark(self._mark) or "{}")
        dtypes = {"indptr": np.dtype(np.int64), "tokens": token, "probs": prob}
        paths = {name: out / f"{name}.npy" for name in dtypes}
        self._hashes = {name: _hash(path, state.get(name, {}).get("bytes", 0)) for name, path in paths.items()}
        if any(self._hashes[name].hexdigest() != state.get(name, {}).get("xxh3_128") for name in dtypes):
            state = {}  # no checkpoint, or files that are missing, cut or changed: start again
        self.n, self.n_entries, self.n_short = (int(state.get(name, 0)) for name in ("rows", "entries", "short"))
        self._open = ExitStack()
        self._files: dict[str, tuple[Any, np.dtype[Any]]] = {}
        for name, dtype in dtypes.items():
            file = self._open.enter_context(paths[name].open("r+b" if self.n else "w+b"))
            self._files[name] = (file, dtype)
            if self.n:
                file.truncate(_HEADER + state[name]["bytes"])
                file.seek(0, os.SEEK_END)
            else:
                self._hashes[name].reset()
                self._header(name, 0)
        if not self.n:
            self._write("indptr", np.zeros(1))

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @property
    def n_bytes(self) -> int:
        """Bytes written so far."""
        return sum(file.tell() for file, _ in self._files.values())

    def append(
        self, counts: NDArray[np.int64], tokens: NDArray[np.integer], probs: NDArray[np.floating], n_short: int
    ) -> None:
        """Write a batch of rows; probabilities that round to zero in the type on disk are left out.

        `n_short` of the rows have fewer neighbours than requested.
        """
        narrow = probs.astype(self._files["probs"][1])
        there = narrow > 0
        if not there.all():
            row = np.repeat(np.arange(len(counts)), counts)
            counts = np.bincount(row[there], minlength=len(counts))
            tokens, narrow = tokens[there], narrow[there]
        self._write("indptr", self.n_entries + np.cumsum(counts))
        self._write("tokens", tokens)
        self._write("probs", narrow)
        self.n, self.n_entries = self.n + len(counts), self.n_entries + len(tokens)
        self.n_short += n_short
        if time.monotonic() - self._last > _CHECKPOINT:
            for file, _ in self._files.values():
                file.flush()
                os.fsync(file.fileno())
            state: dict[str, Any] = {"rows": self.n, "entries": self.n_entries, "short": self.n_short}
            for name, (file, _) in self._files.items():
                state[name] = {"bytes": file.tell() - _HEADER, "xxh3_128": self._hashes[name].hexdigest()}
            artefact.write_mark(self._mark, json.dumps(state).encode())
            self._last = time.monotonic()

    def finish(self) -> None:
        """Write the final lengths into the file headers."""
        for name, (file, _) in self._files.items():
            file.seek(0)
            self._header(name, self.n + 1 if name == "indptr" else self.n_entries)

    def _write(self, name: str, values: NDArray[Any]) -> None:
        file, dtype = self._files[name]
        data = np.ascontiguousarray(values, dtype=dtype).tobytes()
        self._hashes[name].update(data)
        file.write(data)

    def _header(self, name: str, length: int) -> None:
        file, dtype = self._files[name]
        plain = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(file, plain)
        if file.tell() != _HEADER:  # NumPy pads the header for any length; resuming relies on it
            raise AssertionError(f"header of {file.tell()} bytes")


def _hash(path: Path, n_bytes: int) -> Any:
    """The running hash of the first bytes behind the header; of nothing if the file has fewer."""
    found = xxhash.xxh3_128()
    if path.is_file() and path.stat().st_size >= _HEADER + n_bytes:
        with path.open("rb") as file:
            file.seek(_HEADER)
            while n_bytes:
                block = file.read(min(n_bytes, 2**18))
                found.update(block)
                n_bytes -= len(block)
    return found


class TargetReader:
    """Reads the rows of several target shards by position, from memory-mapped files.

    Raises:
        ArtifactError: The shards are of different runs or of other tokens, or they overlap or leave a gap.
    """

    def __init__(self, folders: Sequence[Path], expected_tokens: str) -> None:
        manifests = artefact.shards(folders, "targets")
        for manifest, folder in manifests:
            if manifest.facts["tokens_sha256"] != expected_tokens:
                raise ArtifactError(
                    f"{folder}: expected targets for this token stream, found some for another; make them again"
                )
            if manifest.facts["end"] <= manifest.facts["begin"] or not manifest.facts["entries"]:
                raise ArtifactError(f"{folder}: expected rows, found an empty shard; run `memdec targets` again")
        self.recipes = [manifest.recipe for manifest, _ in manifests]
        self.begins = np.array([manifest.facts["begin"] for manifest, _ in manifests])
        self._shards = [
            load_rows(folder, manifest.facts["end"] - manifest.facts["begin"], manifest.facts["entries"])
            for manifest, folder in manifests
        ]

    def rows(self, spans: Sequence[tuple[int, int]]) -> SparseRows:
        """Rows of the positions of all spans [first, end), in order."""
        pieces = [piece for span in spans for piece in self._pieces(*span)]
        if not pieces:
            first = self._shards[0]
            return SparseRows(np.zeros(1, np.int64), first.tokens[:0], np.zeros(0, np.float32))
        counts = np.concatenate([np.diff(indptr) for indptr, _, _ in pieces])
        probs = np.concatenate([prob for _, _, prob in pieces])
        indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        if probs.dtype == np.float16:  # rounded to eleven bits, they do not sum to one
            total = np.add.reduceat(probs, indptr[:-1], dtype=np.float64)
            probs = (probs / np.repeat(total, counts)).astype(np.float32)
        return SparseRows(indptr, np.concatenate([token for _, token, _ in pieces]), probs)

    def _pieces(
        self, first: int, end: int
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.integer], NDArray[np.floating]]]:
        last = int(self.begins[-1]) + len(self._shards[-1])
        if not 0 <= first <= end <= last:
            raise ArtifactError(
                f"targets: expected positions from 0 to {last}, found {first} to {end}; check the token stream"
            )
        while first < end:
            number = int(np.searchsorted(self.begins, first, side="right")) - 1
            shard, offset = self._shards[number], int(self.begins[number])
            stop = min(end, offset + len(shard))
            indptr = shard.indptr[first - offset : stop - offset + 1]
            if not 0 <= indptr[0] <= indptr[-1] <= len(shard.tokens) or (np.diff(indptr) < 0).any():
                raise ArtifactError(
                    f"targets: expected entries for each of the positions {first} to {stop - 1}, found damaged ones; run `memdec "
                    "doctor`"
                )
            yield indptr, shard.tokens[indptr[0] : indptr[-1]], shard.probs[indptr[0] : indptr[-1]]
            first = stop


def load_rows(folder: Path, n: int, n_entries: int) -> SparseRows:
    """The n rows of one shard, memory-mapped."""
    return SparseRows(
        arrays.load(folder / "indptr.npy", np.int64, (n + 1,)),
        arrays.load(folder / "tokens.npy", arrays.INTEGERS, (n_entries,)),
        arrays.load(folder / "probs.npy", arrays.FLOATS, (n_entries,)),
    )
