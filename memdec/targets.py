"""Stage `targets`: the kNN next-token distribution of every training position, sparse, in shards.

Each position is searched with its own key; the position itself is removed by identity, not by rank; the remaining k
neighbours give softmax(-d^2 / temperature), equal tokens summed (paper, equation 2). A shard is a range of positions
in CSR form: `indptr.npy`, `tokens.npy`, `probs.npy`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from memdec import artifacts, index, tokens
from memdec.config import TargetSettings
from memdec.datastore import load_keys
from memdec.errors import ArtifactError, ConfigError, NumericsError
from memdec.knn import SparseRows, aggregate, drop_self


def run(datastore: Path, index_folder: Path, stream: Path, out: Path, settings: TargetSettings, *, shard: int) -> None:
    """Make one shard of the targets.

    Args:
        datastore: Keys, which are the queries too.
        index_folder: Index over the same keys.
        stream: Token stream whose train split the datastore was made of.
        out: Folder to make.
        settings: k, temperature and so on; `settings.shards` is the number of shards.
        shard: Which one, from 0.
    """
    if not 0 <= shard < settings.shards:
        raise ConfigError(f"targets: expected a shard from 0 to {settings.shards - 1}, found {shard}")
    store, found = artifacts.read(datastore, "datastore"), artifacts.read(index_folder, "index")
    source = artifacts.read(stream, "tokens")
    if found.inputs["datastore"] != store.recipe:
        raise ArtifactError(
            f"{index_folder}: expected an index of {datastore}, found one of other keys; run `memdec index` again"
        )
    if source.facts["sha256"]["train"] != store.facts["tokens_sha256"]:
        raise ArtifactError(
            f"{datastore}: expected keys of {stream}, found keys of other tokens; run `memdec datastore` again"
        )
    n = store.facts["keys"]
    if settings.neighbours > n - 1:
        raise ConfigError(
            f"targets: expected at most {n - 1} neighbours for {n} keys, found {settings.neighbours}; lower 'neighbours'"
        )
    if settings.shards > n:
        raise ConfigError(
            f"targets: expected at most {n} shards for {n} positions, found {settings.shards}; lower 'shards'"
        )
    # The batch size changes nothing in the result, so it is not part of the recipe.
    plain = {**settings.model_dump(mode="json", exclude={"batch_size"}), "shard": shard}
    inputs = {"datastore": store.recipe, "index": found.recipe, "tokens": source.recipe}
    with artifacts.building(out, "targets", plain, inputs) as build:
        if build is None:
            return
        begin, end = shard * n // settings.shards, (shard + 1) * n // settings.shards
        rows = _search(datastore, index_folder, stream, settings, begin, end)
        np.save(out / "indptr.npy", rows.indptr, allow_pickle=False)
        np.save(out / "tokens.npy", rows.tokens, allow_pickle=False)
        np.save(out / "probs.npy", rows.probs, allow_pickle=False)
        build.facts.update(
            begin=begin, end=end, entries=len(rows.tokens), positions=n, tokens_sha256=store.facts["tokens_sha256"]
        )


def _search(
    datastore: Path, index_folder: Path, stream: Path, settings: TargetSettings, begin: int, end: int
) -> SparseRows:
    keys, values = load_keys(datastore), tokens.load_stream(stream, "train")
    searcher = index.load(index_folder)
    labels = torch.from_numpy(np.asarray(values, dtype=np.int64))
    counts, ids, probs = [], [], []
    for low in tqdm(range(begin, end, settings.batch_size), desc="targets", unit="batch", mininterval=2):
        high = min(low + settings.batch_size, end)
        queries = np.ascontiguousarray(keys[low:high], dtype=np.float32)
        if not np.isfinite(queries).all():
            position = low + int(np.argwhere(~np.isfinite(queries))[0, 0])
            raise NumericsError(
                f"{datastore}: expected finite keys, found NaN or inf at position {position}; run `memdec datastore` again"
            )
        sq_dist, near = searcher.search(queries, settings.neighbours + 1)
        sq_dist, near = drop_self(sq_dist, near, np.arange(low, high), settings.neighbours)
        sq_dist = np.where(near < 0, np.inf, sq_dist)
        count, token, prob = aggregate(
            torch.from_numpy(sq_dist),
            labels[torch.from_numpy(near).clamp(min=0)],
            settings.temperature,
            top=settings.top,
            threshold=settings.threshold,
        )
        counts.append(count.numpy())
        ids.append(token.numpy().astype(values.dtype))
        probs.append(prob.numpy().astype(np.float32))
    indptr = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)
    return SparseRows(indptr, np.concatenate(ids), np.concatenate(probs))


class TargetReader:
    """Rows of several target shards by position, memory-mapped.

    Raises:
        ArtifactError: Shards of different runs, of other tokens, overlapping, or with a gap.
    """

    def __init__(self, folders: Sequence[Path], expected_tokens: str) -> None:
        manifests = sorted(
            ((artifacts.read(folder, "targets"), folder) for folder in folders),
            key=lambda item: int(item[0].facts["begin"]),
        )
        if not manifests:
            raise ArtifactError("targets: expected at least one shard, found none; run `memdec targets` first")
        self.recipes = [manifest.recipe for manifest, _ in manifests]
        position = 0
        for manifest, folder in manifests:
            if manifest.facts["tokens_sha256"] != expected_tokens:
                raise ArtifactError(
                    f"{folder}: expected targets for this token stream, found some for another; make them again"
                )
            if manifest.facts["begin"] != position:
                raise ArtifactError(
                    f"{folder}: expected the shard that begins at position {position}, found {manifest.facts['begin']}; give every shard once"
                )
            if manifest.inputs != manifests[0][0].inputs or _shared(manifest) != _shared(manifests[0][0]):
                raise ArtifactError(
                    f"{folder}: expected shards of one run, found different settings or inputs; make them again"
                )
            position = manifest.facts["end"]
        if position != manifests[0][0].facts["positions"]:
            raise ArtifactError(
                f"targets: expected shards up to position {manifests[0][0].facts['positions']}, found them up to {position}"
            )
        self.begins = np.array([manifest.facts["begin"] for manifest, _ in manifests])
        self._shards = [
            SparseRows(
                *(
                    np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                    for name in ("indptr", "tokens", "probs")
                )
            )
            for _, folder in manifests
        ]

    def rows(self, spans: Sequence[tuple[int, int]]) -> SparseRows:
        """Rows of the positions of all spans [first, end), in order."""
        pieces = [piece for span in spans for piece in self._pieces(*span)]
        counts = np.concatenate([np.diff(indptr) for indptr, _, _ in pieces])
        return SparseRows(
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            np.concatenate([token for _, token, _ in pieces]),
            np.concatenate([prob for _, _, prob in pieces]),
        )

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
            yield indptr, shard.tokens[indptr[0] : indptr[-1]], shard.probs[indptr[0] : indptr[-1]]
            first = stop


def _shared(manifest: artifacts.Manifest) -> dict[str, object]:
    return {key: value for key, value in manifest.settings.items() if key != "shard"}
