"""Stage `targets`: the kNN next-token distribution of every position, sparse, in shards.

Each position is searched with its own key; the position itself is removed by identity, not by rank; the remaining k
neighbours give softmax(-d^2 / temperature), equal tokens summed (paper, equation 2). A shard is a range of positions
in CSR form: `indptr.npy`, `tokens.npy`, `probs.npy`. Rows are appended batch by batch, so memory does not grow with the
shard and a killed run goes on where it was. Batches lie on one grid over all positions: a row is the same whatever the
shard. A batch is written while the next one is searched.

Exact search on a GPU has larger batches, and aggregation runs there too: only the rows come to the host.

The queries may also be another split of the same model's keys (evaluation text for the kNN-LM): then nothing is removed.
"""

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from memdec.artefacts import artefact, devices, resources
from memdec.datastore import device_search, search
from memdec.datastore.keys import Datastore
from memdec.datastore.target_rows import RowWriter
from memdec.errors import ArtifactError, ConfigError, NumericsError
from memdec.maths import knn
from memdec.settings import TargetSettings
from memdec.text import tokens

_Batch = tuple[NDArray[np.int64], NDArray[np.integer], NDArray[np.floating], int]


def run(
    datastore: Path | Sequence[Path],
    index_folder: Path,
    stream: Path,
    out: Path,
    settings: TargetSettings,
    *,
    shard: int = 0,
    queries: Path | Sequence[Path] = (),
    device: torch.device | None = None,
) -> None:
    """Make one shard of the targets.

    Args:
        datastore: Folders of the keys, which are the queries too.
        index_folder: Index over the same keys.
        stream: Token stream that the datastore was made of.
        out: Folder to make.
        settings: k, temperature and so on; `settings.shards` is the number of shards.
        shard: Which one, from 0.
        queries: Folders of another datastore of the same model, for rows of other text.
        device: Of exact search and aggregation; None for a GPU where there is one.
    """
    if not 0 <= shard < settings.shards:
        raise ConfigError(f"targets: expected a shard from 0 to {settings.shards - 1}, found {shard}")
    store, source = Datastore(datastore), artefact.read(stream, "tokens")
    asked = Datastore(queries) if queries else store
    if asked.recipe == store.recipe:
        asked = store
    found = search.check(store, index_folder, settings, own=asked is store)
    if source.facts["sha256"][store.settings.split] != store.facts["tokens_sha256"]:
        raise ArtifactError(
            f"{store.folder}: expected keys of {stream}, found keys of other tokens; run `memdec datastore` again"
        )
    _check(store, asked, settings)
    # The batch size moves no row by more than rounding, so it is not part of the recipe.
    plain = {**settings.model_dump(mode="json", exclude={"batch_size"}), "shard": shard}
    inputs = {"datastore": store.recipe, "index": found.recipe, "tokens": source.recipe}
    if asked is not store:
        inputs["queries"] = asked.recipe
    with artefact.building(out, "targets", plain, inputs) as build:
        if build is None:
            return
        begin, end = shard * asked.n // settings.shards, (shard + 1) * asked.n // settings.shards
        values = tokens.load_stream(stream, store.settings.split)
        _check_values(values, store, stream)
        searcher = search.load(store, index_folder, settings.nprobe, device)
        with RowWriter(out, build.work, values.dtype, np.dtype(settings.dtype)) as rows:
            _write(rows, _search(searcher, asked, settings, begin + rows.n, end), end - begin, out)
            rows.finish()
        if rows.n_short:
            warnings.warn(
                f"targets: {rows.n_short} of {rows.n} rows have fewer than {settings.neighbours} neighbours in the "
                f"{settings.nprobe} cells searched; raise 'nprobe'",
                stacklevel=2,
            )
        build.facts.update(
            begin=begin,
            end=end,
            entries=rows.n_entries,
            short_rows=rows.n_short,
            device=devices.described(devices.pick_for(device)),
            positions=asked.n,
            tokens_sha256=asked.facts["tokens_sha256"],
        )


def _check(store: Datastore, asked: Datastore, settings: TargetSettings) -> None:
    """What can be known to be wrong before the first search."""
    if settings.shards > asked.n:
        raise ConfigError(
            f"targets: expected at most {asked.n} shards for {asked.n} positions, found {settings.shards}; lower 'shards'"
        )
    if not settings.released:
        store.require_stored("set `released: true` for the distances of the index, or store the keys")
    ours, theirs = (
        {**{name: x.settings.model_dump()[name] for name in ("key_point", "dtype")}, "model": x.model}
        for x in (store, asked)
    )
    if ours != theirs:
        raise ArtifactError(
            f"{asked.folder}: expected queries by the model and key point of {store.folder}, found {theirs} instead of {ours}; "
            "run `memdec datastore` for the queries with the same model"
        )


def _check_values(values: NDArray[np.integer], store: Datastore, stream: Path) -> None:
    vocab = store.facts["vocab_size"]
    if int(values.max()) >= vocab or int(values.min()) < 0:
        position = int(np.argmax((values >= vocab) | (values < 0)))
        raise ConfigError(
            f"{stream}: expected tokens below the vocabulary of {vocab}, found {values[position]} at position {position}; "
            "run `memdec tokens` again"
        )


def _write(rows: "RowWriter", batches: Iterator[_Batch], n: int, out: Path) -> None:
    """Append all batches up to `n` rows, each while the next one is searched.

    One batch is under way at most. When the search fails, the batch before it is still written and marked.
    """
    bar = tqdm(total=n, initial=rows.n, desc="targets", unit="row", unit_scale=True, mininterval=2)
    pending: Future[None] | None = None
    with bar, ThreadPoolExecutor(1) as writer:
        for number, batch in enumerate(batches):
            if pending is not None:
                pending.result()
            pending = writer.submit(rows.append, *batch)
            bar.update(len(batch[0]))
            if number == 0:
                pending.result()
                if rows.n < n:
                    left = rows.n_bytes / rows.n * (n - rows.n)
                    resources.check_disk(out, left, f"the other {n - rows.n} rows; set 'top' or 'threshold'")
        if pending is not None:
            pending.result()


def _search(
    searcher: search.Searcher,
    asked: Datastore,
    settings: TargetSettings,
    begin: int,
    end: int,
) -> Iterator[_Batch]:
    """(counts, tokens, probs, short rows) of the positions [begin, end), batch by batch of the grid."""
    size = settings.batch_size
    if searcher.on_device is not None:
        size = max(size, device_search.QUERIES)  # not what memory allows just now: a resumed run needs the same grid
    grid = begin // size * size  # the whole first batch is searched again: its rows do not depend on where we begin
    for first, queries in asked.blocks(grid, min(-(-end // size) * size, asked.n), size):
        positions = np.arange(first, first + len(queries))
        own, inputs = (positions, None) if asked is searcher.store else (None, _inputs(asked, positions))
        sq_dist, ids = searcher.near(queries, settings.neighbours, own, inputs=inputs, released=settings.released)
        low, high = max(begin - first, 0), min(end - first, len(queries))
        sq_dist, ids = sq_dist[low:high], ids[low:high]
        try:
            cut = {"top": settings.top, "threshold": settings.threshold}
            counts, tokens, probs = searcher.rows(sq_dist, ids, settings.temperature, **cut)
        except knn.RowError as error:
            raise NumericsError(
                f"targets: expected neighbours for position {first + low + error.row}, but {error.why}"
            ) from None
        if searcher.on_device is not None:  # as on disk: 8,192 rows of 1,024 entries are 134 MB before and 67 after
            tokens, probs = tokens.int(), probs.to(getattr(torch, settings.dtype))
        yield counts.cpu().numpy(), tokens.cpu().numpy(), probs.cpu().numpy(), int((ids[:, -1] < 0).sum())


def _inputs(asked: Datastore, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """The token at which the key of each position was read; -1 for the first, which has none of the text."""
    return np.where(positions > 0, asked.values[np.maximum(positions, 1) - 1].astype(np.int64), -1)
