"""Stage `datastore`: make one key per position of a split, the input of the last layer's MLP (paper, section 3.1).

The key of position p is the hidden state of token p - 1, in the window that gives it the most left context. Only the
decoder runs, not the output head. The values of the datastore are the token stream itself.

A stored datastore has `keys.npy` [n, D], which readers memory-map; each shard is a folder. A streamed datastore has
only a manifest, and every reader recomputes the keys by forward passes. The last bit of a key depends on the other
windows in the same batch. So batches are fixed for the whole split, and a shard runs the same batches as an unsharded
run. Sharded, parallel, resumed and streamed runs give exactly the same keys.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from memdec.artefacts import arrays, artefact, devices, resources
from memdec.errors import ArtifactError, ConfigError, NumericsError
from memdec.maths import kernels
from memdec.maths.windows import Window, places, windows
from memdec.models import loading
from memdec.models.keypoints import KeyPoint
from memdec.settings import AUTO, Compute, DatastoreSettings, parse
from memdec.text import tokens

_NOT_SETTINGS = ("context", "stride", "shard", "precision")  # in the manifest's settings, but not in DatastoreSettings
_CHUNK = 32  # forward passes between two points from which a run can resume
_SAMPLED_PASSES = 32  # least number of forward passes from which a sample of keys is taken
MANY = 10 * 10**9  # bytes of keys from which the number type matters
# Largest relative distance between the keys of the same model. Using bfloat16 instead of float32 weights changed the
# keys of three small models by 0.007 to 0.015; ten steps of fine-tuning changed them by 0.2 and more.
_SAME_MODEL = 0.05
# NumPy has no bfloat16, so its bits are stored as int16.
DISK: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.int16),
    "float32": np.dtype(np.float32),
}


# --- making keys --------------------------------------------------------------------------------------------------


class Forward:
    """Computes the keys of a token stream; forward pass i always has the windows `batches[i]`."""

    def __init__(
        self,
        model_folder: Path,
        stream: Path,
        settings: DatastoreSettings,
        context: int,
        stride: int,
        compute: Compute = AUTO,
        model: Any | None = None,
    ) -> None:
        self.model_folder, self.settings, self.compute, self._model = model_folder, settings, compute, model
        self.data = tokens.load_stream(stream, settings.split)
        self.batches = _passes(len(self.data), context, stride, settings.batch_size)
        self.edges = _edges(self.batches, len(self.data))
        self._point: KeyPoint | None = None
        self._check_context()

    def _check_context(self) -> None:
        limit = loading.n_positions(loading.config(self.model_folder))
        longest = max(part.n_inputs for part in self.batches[0])
        loading.check_positions(limit, longest, f"{self.model_folder}: context", "lower 'context'")

    @property
    def point(self) -> KeyPoint:
        """The key point; the model is loaded at first use, if it was not given."""
        if self._point is None:
            model = self._model
            if model is None:
                model = loading.load(self.model_folder, dtype=devices.precision(self.compute))
                model = model.to(devices.pick(self.compute)).eval()
            vocab = model.get_input_embeddings().num_embeddings
            if int(self.data.max()) >= vocab:
                position = int(np.argmax(self.data >= vocab))
                raise ConfigError(
                    f"{self.model_folder}: expected tokens below the vocabulary of {vocab}, found {self.data[position]} at "
                    f"position {position} of the {self.settings.split} split; use the tokens of this model's tokenizer"
                )
            self._prefix = tokens.prefix_id(tokens.load_tokenizer(str(self.model_folder)))
            self._point = KeyPoint(model, self.settings.key_point)
        return self._point

    def keys(self, number: int) -> NDArray[Any]:
        """Keys of the scored positions of one pass, shape (n, D), in their format on disk.

        Raises:
            NumericsError: A key is NaN or does not fit the key type.
        """
        return narrow(torch.cat(self.vectors(number)), self.batches[number][0].first, self.settings.dtype)

    def vectors(self, number: int) -> list[Float[Tensor, "n D"]]:
        """Hidden states of the scored positions of one pass, one tensor per window, in the model's dtype and device."""
        batch, point = self.batches[number], self.point
        ids = torch.zeros(len(batch), max(part.n_inputs for part in batch), dtype=torch.long)
        for row, part in enumerate(batch):
            ids[row, : part.n_inputs] = torch.from_numpy(part.inputs(self.data, self._prefix))
        hidden = point(ids.to(point.model.device))
        return [hidden[row, part.first - part.begin : part.n_inputs] for row, part in enumerate(batch)]


def _passes(n: int, context: int, stride: int, batch_size: int) -> list[list[Window]]:
    parts = windows(n, context, stride)
    return [parts[i : i + batch_size] for i in range(0, len(parts), batch_size)]


def _edges(batches: list[list[Window]], n: int) -> NDArray[np.int64]:
    return np.array([*(batch[0].first for batch in batches), n])


def narrow(block: torch.Tensor, first: int, dtype: str) -> NDArray[Any]:
    """Convert keys to their format on disk, without changing the shape.

    Raises:
        NumericsError: A key is NaN or does not fit the type; `first`, the position of the first row, helps to name it.
    """
    small = block.to(getattr(torch, dtype)).cpu()
    if not torch.isfinite(small).all():
        position = first + int((~torch.isfinite(small)).any(1).nonzero()[0, 0])
        why = (
            "the model gives NaN or inf"
            if not torch.isfinite(block).all()
            else f"beyond the range of {dtype}; use dtype float32 or bfloat16"
        )
        raise NumericsError(f"datastore: expected finite keys, found a non-finite key at position {position} ({why})")
    return (small.view(torch.int16) if dtype == "bfloat16" else small).numpy()


def run(
    model_folder: Path,
    stream: Path,
    out: Path,
    settings: DatastoreSettings,
    *,
    context: int,
    stride: int,
    shard: int = 0,
    compute: Compute = AUTO,
) -> None:
    """Make the datastore of a token stream, or one shard of it, with the keys of a model.

    Under `torchrun` or `accelerate launch` the processes share the work and write the same file.
    """
    if not 0 <= shard < settings.shards:
        raise ConfigError(f"datastore: expected a shard from 0 to {settings.shards - 1}, found {shard}")
    if not settings.stored and settings.shards > 1:
        raise ConfigError(
            f"datastore: expected shards 1 where keys are not stored, found {settings.shards}; shard the targets instead"
        )
    source, base = artefact.read(stream, "tokens"), loading.known(model_folder, "model")
    tokens.check_same(source.facts["tokenizer_sha256"], base.facts["tokenizer_sha256"], f"{model_folder} with {stream}")
    inputs = {"model": base.recipe, "tokens": source.recipe}
    plain = {**settings.model_dump(mode="json"), "context": context, "stride": stride, "shard": shard}
    plain["precision"] = devices.precision(compute)
    same = {key: value for key, value in plain.items() if key not in ("stored", "shards", "shard")}
    forward = Forward(model_folder, stream, settings, context, stride, compute)
    n, n_passes = len(forward.data), len(forward.batches)
    if settings.shards > n_passes:
        raise ConfigError(
            f"datastore: expected at most {n_passes} shards for {n_passes} forward passes, found {settings.shards}; "
            "lower 'shards' or 'batch_size'"
        )
    passes = range(shard * n_passes // settings.shards, (shard + 1) * n_passes // settings.shards)
    team = resources.team(devices.pick(compute).type == "cpu")
    with artefact.building(out, "datastore", plain, inputs, team) as build:
        if build is None:
            return
        if settings.stored:
            _write(forward, passes, out, build.work, team)
        if team.rank > 0:
            return
        build.facts.update(
            begin=int(forward.edges[passes.start]),
            end=int(forward.edges[passes.stop]),
            positions=n,
            device=devices.name(compute),
            width=forward.point.width,
            keys_recipe=artefact.digest(
                {"version": artefact.VERSIONS["datastore"], "settings": same, "inputs": inputs}
            ),
            tokens_sha256=source.facts["sha256"][settings.split],
            tokenizer_sha256=source.facts["tokenizer_sha256"],
            corpus_sha256=source.facts.get("corpus_sha256"),
            vocab_size=forward.point.model.get_input_embeddings().num_embeddings,
            model=os.path.relpath(model_folder.resolve(), out.resolve()),
            tokens=os.path.relpath(stream.resolve(), out.resolve()),
        )


def _write(forward: Forward, passes: range, out: Path, work: Path, team: resources.Team) -> None:
    begin, end = int(forward.edges[passes.start]), int(forward.edges[passes.stop])
    shape, dtype, path = (end - begin, forward.point.width), DISK[forward.settings.dtype], out / "keys.npy"
    chunks = [passes[i : i + _CHUNK] for i in range(0, len(passes), _CHUNK)]
    marks = [work / f"chunk-{number}" for number in range(len(chunks))]
    if team.rank == 0 and not (any(mark.exists() for mark in marks) and is_array(path, dtype, shape)):
        for mark in marks:
            mark.unlink(missing_ok=True)
        needed = shape[0] * shape[1] * dtype.itemsize
        if needed > MANY and forward.settings.dtype == "float32":
            warnings.warn(
                f"datastore: keys in float32 take {resources.size(needed)}; float16, the released type, takes half of it",
                stacklevel=2,
            )
        resources.check_disk(out, needed, "the keys (`stored: false` keeps none)")
        arrays.allocate(path, dtype, shape)
    team.wait()
    keys: np.memmap[Any, Any] = np.lib.format.open_memmap(path, mode="r+")
    bar = tqdm(total=shape[0], desc="keys", unit="token", unit_scale=True, mininterval=2, disable=team.rank > 0)
    for number, chunk in enumerate(chunks):
        block = keys[forward.edges[chunk.start] - begin : forward.edges[chunk.stop] - begin]
        if number % team.size == team.rank and not _is_marked(marks[number], block):
            for i in chunk:
                keys[forward.edges[i] - begin : forward.edges[i + 1] - begin] = forward.keys(i)
            keys.flush()
            artefact.write_text(marks[number], arrays.content_hash(block))
        bar.update(int(forward.edges[chunk.stop] - forward.edges[chunk.start]))
    bar.close()


def _is_marked(mark: Path, block: NDArray[Any]) -> bool:
    """Whether an earlier run finished these keys, and they are still what it wrote."""
    return mark.is_file() and mark.read_bytes() == arrays.content_hash(block).encode()


def is_array(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> bool:
    """Whether a file is a complete .npy of this type and shape; otherwise the marks of finished chunks do not apply."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return False
    whole = path.stat().st_size == found.offset + found.nbytes
    return bool(whole and found.dtype == dtype and found.shape == shape)


# --- reading keys -------------------------------------------------------------------------------------------------


class Datastore:
    """The keys of one split, from all shard folders of a stored datastore or the one folder of a streamed datastore.

    Args:
        folders: These folders.
        device: Where streamed keys are made; None means a GPU if there is one.

    Attributes:
        n: Number of positions.
        width: D.
        facts: The facts of the manifest.
        recipe: Hash of everything that decides the keys; equal for stored, streamed and any number of shards.
        model: Recipe of the key model.
        parts: (first position, memory-mapped keys in their format on disk) of each shard; empty if keys are not stored.

    Raises:
        ArtifactError: The shards are of different runs, overlap or leave a gap, or one is incomplete.
    """

    def __init__(self, folders: Path | Sequence[Path], device: torch.device | None = None) -> None:
        folders = [folders] if isinstance(folders, Path) else folders
        found = artefact.shards(folders, "datastore")
        first, self.folder = found[0]
        plain = {name: value for name, value in first.settings.items() if name not in _NOT_SETTINGS}
        self.facts, self.settings = first.facts, parse(DatastoreSettings, plain, f"{self.folder}")
        self.n, self.width, self.recipe = first.facts["positions"], first.facts["width"], first.facts["keys_recipe"]
        if not isinstance(self.width, int):
            raise ArtifactError(f"{self.folder}: expected a width, found {self.width}; run `memdec datastore` again")
        self.model = first.inputs["model"]
        if self.n >= kernels.NOBODY:
            raise ConfigError(f"{self.folder}: expected fewer than {kernels.NOBODY} positions, found {self.n}")
        self.parts: list[tuple[int, NDArray[Any]]] = []
        self._forward: Forward | None = None
        self._window, self._inputs = (first.settings["context"], first.settings["stride"]), first.inputs
        where: Any = device.type if device is not None and device.type in ("cpu", "cuda") else "auto"
        self._compute = Compute(device=where, precision=first.settings["precision"])
        if self.settings.stored:
            for manifest, folder in found:
                begin, end = manifest.facts["begin"], manifest.facts["end"]
                # Compiled loops write `width` numbers per key, unchecked.
                keys = arrays.load(folder / "keys.npy", DISK[self.settings.dtype], (end - begin, self.width))
                self.parts.append((begin, keys))

    @property
    def edges(self) -> Int[np.ndarray, " passes+1"]:
        """First position of each forward pass, then the end of the last one."""
        return _edges(_passes(self.n, *self._window, self.settings.batch_size), self.n)

    @property
    def stride(self) -> int:
        """Positions by which windows move; all but the first window give so many keys."""
        return int(self._window[1])

    def places(self, positions: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
        """Place of these positions in their windows (`windows.places`)."""
        return places(positions, self.n, *self._window)

    @property
    def values(self) -> NDArray[np.integer]:
        """Token of each position, memory-mapped, shape (N,)."""
        return self._values

    @cached_property
    def _values(self) -> NDArray[np.integer]:
        found = tokens.load_stream(self._source("tokens"), self.settings.split)
        if len(found) != self.n:
            raise ArtifactError(
                f"{self.folder}: expected keys of {len(found)} tokens, found {self.n}; run `memdec datastore` again"
            )
        return found

    @property
    def forward(self) -> Forward:
        """The forward passes that compute the keys of a streamed datastore."""
        if self._forward is None:
            folders = self._source("model"), self._source("tokens")
            forward = Forward(*folders, self.settings, *self._window, self._compute)
            if (len(forward.data), forward.point.width) != (self.n, self.width):
                raise ArtifactError(
                    f"{self.folder}: expected {len(forward.data)} keys of width {forward.point.width}, found {self.n} of width "
                    f"{self.width}; run `memdec datastore` again"
                )
            self._forward = forward
        return self._forward

    def _source(self, kind: str) -> Path:
        path = (self.folder / str(self.facts[kind])).resolve()
        recipe = loading.known(path, kind).recipe if kind == "model" else artefact.read(path, kind).recipe
        if recipe != self._inputs[kind]:
            raise ArtifactError(
                f"{path}: expected the {kind} that {self.folder} was made from, found another one; run `memdec datastore` "
                "again"
            )
        return path

    def require_stored(self, instead: str) -> None:
        """Check that the keys are on disk, as exact distances need them; `instead` is the next step for the user.

        Raises:
            ArtifactError: The datastore is streamed.
        """
        if not self.parts:
            raise ArtifactError(f"{self.folder}: expected stored keys, found a streamed datastore; {instead}")

    def rounded(self, vectors: Float[Tensor, "n D"]) -> Float[np.ndarray, "n D"]:
        """Turn hidden states into queries: round them as the keys on disk are rounded, then convert to float32."""
        return vectors.to(getattr(torch, self.settings.dtype)).float().cpu().numpy()

    def check_model(self, point: KeyPoint) -> None:
        """Check that a model gives the stored keys, up to the rounding of its weights, by comparing the last window.

        Raises:
            ArtifactError: The model gives other keys.
        """
        folder, width = f"{self.folder}", self.width
        vocab = point.model.get_input_embeddings().num_embeddings
        if (point.width, vocab) != (width, self.facts["vocab_size"]):
            raise ArtifactError(
                f"{folder}: expected keys by a model of width {point.width} and {vocab} tokens, found keys of width {width} and "
                f"{self.facts['vocab_size']} tokens; use the model that made the datastore"
            )
        part = windows(self.n, *self._window)[-1]
        prefix = 0 if part.begin else tokens.prefix_id(tokens.load_tokenizer(str(self._source("model"))))
        ids = torch.from_numpy(part.inputs(self.values, prefix))[None].to(point.model.device)
        found = point(ids)[0, part.first - part.begin :].float().cpu().numpy()
        _, stored = next(self.blocks(part.first, part.end, part.n_scored))
        self._forward = None  # of streamed keys: a second copy of the model's weights
        apart = np.linalg.norm(found - stored, axis=1) / np.linalg.norm(stored, axis=1)
        if not float(np.median(apart)) < _SAME_MODEL:
            raise ArtifactError(
                f"{folder}: expected the keys of {point.model.name_or_path or 'this model'}, found those of another one "
                f"(relative distance {np.median(apart):.2g} in the last window); run `memdec datastore` with this model"
            )

    def blocks(self, begin: int, end: int, size: int) -> Iterator[tuple[int, Float[np.ndarray, "n D"]]]:
        """Iterate over the keys of positions [begin, end) in blocks of `size`: (first position, float32 keys).

        The next block overwrites the memory of the one before.

        Raises:
            NumericsError: A key is NaN, infinite, or so large that squared distances overflow; the message names it.
        """
        block = np.empty((min(size, end - begin), self.width), np.float32)
        first = filled = begin
        for piece in self.pieces(begin, end):
            done = 0
            while done < len(piece):
                take = min(len(piece) - done, first + len(block) - filled)
                fresh = block[filled - first : filled - first + take]
                if not kernels.widen(kernels.bits(piece[done : done + take]), fresh, fresh.view(np.int32)):
                    raise self.not_finite(filled + int(np.argwhere(~(np.abs(fresh) < kernels.LARGEST))[0, 0]))
                done, filled = done + take, filled + take
                if filled == min(first + len(block), end):
                    yield first, block[: filled - first]
                    first = filled

    def wide(self, keys: NDArray[Any], positions: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n D"]:
        """Convert keys of these positions (`kernels.bits`) to float32.

        Raises:
            NumericsError: As `blocks`.
        """
        out = np.empty(keys.shape, np.float32)
        if not kernels.widen(keys, out, out.view(np.int32)):
            raise self.not_finite(int(positions[np.argwhere(~(np.abs(out) < kernels.LARGEST))[0, 0]]))
        return out

    def not_finite(self, position: int) -> NumericsError:
        """The error for a key that is not finite or is too large for distances."""
        return NumericsError(
            f"{self.folder}: expected finite keys below {kernels.LARGEST:.0e}, found NaN, inf or a larger one at "
            f"position {position}; run `memdec datastore` again"
        )

    def pieces(self, begin: int, end: int) -> Iterator[NDArray[Any]]:
        """Iterate over the keys of [begin, end) in their format on disk (`DISK`), unchecked, by shard or by pass."""
        if self.settings.stored:
            for at, keys in self.parts:
                if at < end and begin < at + len(keys):
                    yield keys[max(begin - at, 0) : end - at]
            return
        edges = self.forward.edges
        for number in range(int(np.searchsorted(edges, begin, side="right")) - 1, len(edges) - 1):
            at = int(edges[number])
            if at >= end:
                return
            yield self.forward.keys(number)[max(begin - at, 0) : end - at]

    def sample(self, n: int, seed: int) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n D"]]:
        """A random sample of positions, in ascending order, and their keys.

        The seed chooses some of the forward passes, and then positions from them. So a streamed datastore runs only
        these passes. A stored datastore reads the same positions.
        """
        rng, edges = np.random.default_rng(seed), self.edges
        drawn: list[int] = []
        total = 0
        for number in rng.permutation(len(edges) - 1):
            if total >= n and len(drawn) >= _SAMPLED_PASSES:
                break
            drawn.append(int(number))
            total += int(edges[number + 1] - edges[number])
        drawn.sort()
        offered = np.concatenate([np.arange(edges[number], edges[number + 1]) for number in drawn])
        positions = np.sort(rng.choice(offered, min(n, len(offered)), replace=False))
        out = np.empty((len(positions), self.width), np.float32)
        for number in tqdm(drawn, desc="sample", unit="pass", mininterval=2):
            begin, end = int(edges[number]), int(edges[number + 1])
            low, high = np.searchsorted(positions, [begin, end])
            _, keys = next(self.blocks(begin, end, end - begin))
            out[low:high] = keys[positions[low:high] - begin]
        return positions, out
