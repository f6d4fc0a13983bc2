"""Stage `targets`: compute the kNN next-token distribution of every position, as sparse rows in shards.

The key of each position is the query. The position itself is removed from the result by its number, not by its rank.
The k remaining neighbours get the weights softmax(-d^2 / temperature), summed over equal tokens (paper, equation 2). A
shard holds a range of positions in CSR form: `indptr.npy`, `tokens.npy`, `probs.npy`. Rows are appended batch by batch,
so memory does not grow with the shard, and a killed run resumes where it stopped. Batches are fixed for the whole
split, so a row does not depend on the number of shards. While a batch is written, the next one is searched.

With an index of kind `cells` the keys are queries in the order of their cells, so that a batch searches few cells. The
rows are first written in that order into the folder `work`, then copied in the order of positions. This takes their
room on the disk twice for a while, and no more memory.

Exact search on a GPU uses larger batches. Aggregation runs there too, and only the finished rows are copied to the CPU.

The queries may also be keys of another split by the same model (evaluation text for the kNN-LM). Then no position is
removed.
"""

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from memdec.artefacts import arrays, artefact, devices, resources
from memdec.datastore import accuracy, device_search, search
from memdec.datastore.keys import Datastore
from memdec.datastore.target_rows import RowWriter, load_rows
from memdec.errors import ArtifactError, ConfigError, NumericsError
from memdec.maths import knn
from memdec.maths.sparse_rows import SparseRows
from memdec.settings import SearchSettings, TargetSettings
from memdec.text import tokens

_CELL_QUERIES = 4096  # queries per search in cells: distances, positions and rows take 200 MB with k = 1024

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
        datastore: Folders of the keys, which are also the queries unless `queries` is given.
        index_folder: Index over the same keys.
        stream: Token stream that the datastore was made from.
        out: Output folder.
        settings: k, temperature and so on; `settings.shards` is the number of shards.
        shard: Number of this shard, from 0.
        queries: Folders of another datastore of the same model; its keys are the queries.
        device: Where to run exact search and aggregation; None means a GPU if there is one.
    """
    if not 0 <= shard < settings.shards:
        raise ConfigError(f"targets: expected a shard from 0 to {settings.shards - 1}, found {shard}")
    store, source = Datastore(datastore, device), artefact.read(stream, "tokens")
    asked = Datastore(queries, device) if queries else store
    if asked.recipe == store.recipe:
        asked = store
    chosen = accuracy.of_targets(settings, index_folder)
    wanted = SearchSettings(neighbours=settings.neighbours, nprobe=chosen.nprobe)
    found = search.check(store, index_folder, wanted, own=asked is store)
    if source.facts["sha256"][store.settings.split] != store.facts["tokens_sha256"]:
        raise ArtifactError(
            f"{store.folder}: expected keys of {stream}, found keys of other tokens; run `memdec datastore` again"
        )
    _check(store, asked, settings)
    # The batch size changes rows by rounding at most, so it is not part of the recipe; nor is how nprobe was chosen.
    plain = settings.model_dump(mode="json", exclude={"batch_size", "max_tv"})
    plain |= {"nprobe": chosen.nprobe, "shard": shard}
    inputs = {"datastore": store.recipe, "index": found.recipe, "tokens": source.recipe}
    if asked is not store:
        inputs["queries"] = asked.recipe
    with artefact.building(out, "targets", plain, inputs) as build:
        if build is None:
            return
        begin, end = shard * asked.n // settings.shards, (shard + 1) * asked.n // settings.shards
        values = tokens.load_stream(stream, store.settings.split)
        _check_values(values, store, stream)
        searcher = search.load(store, index_folder, chosen.nprobe, device)
        by_cell = searcher.cells is not None and asked is store
        with RowWriter(out, build.work, values.dtype, np.dtype(settings.dtype)) as rows:
            if by_cell:
                _write_by_cell(rows, searcher, settings, begin, end, build.work / "by-cell")
            else:
                _write(rows, in_order(searcher, asked, settings, begin + rows.n, end), end - begin, out)
            rows.finish()
        if rows.n_short:
            warnings.warn(
                f"targets: {rows.n_short} of {rows.n} rows have fewer than {settings.neighbours} neighbours in the "
                f"{chosen.nprobe} cells searched; raise 'nprobe'",
                stacklevel=2,
            )
        build.facts.update(
            begin=begin,
            end=end,
            entries=rows.n_entries,
            short_rows=rows.n_short,
            total_variation=chosen.total_variation,
            device=devices.described(devices.pick_for(device)),
            positions=asked.n,
            tokens_sha256=asked.facts["tokens_sha256"],
        )


def _check(store: Datastore, asked: Datastore, settings: TargetSettings) -> None:
    """Check settings and inputs before the first search."""
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


def _write_by_cell(
    rows: RowWriter, searcher: search.Searcher, settings: TargetSettings, begin: int, end: int, work: Path
) -> None:
    """Write the rows of positions [begin, end) into `work` in the order of their cells, then append them in theirs.

    Both steps resume after a kill. Memory for the order is 16 bytes for each row of the shard.
    """
    order, n = searcher.cells.order(begin, end), end - begin
    work.mkdir(exist_ok=True)
    with RowWriter(work, work, *rows.dtypes) as found:
        _write(found, in_cells(searcher, settings, order[found.n :]), n, work, copies=2)
        found.finish()
    place = np.empty(n, np.int64)
    place[order - begin] = np.arange(n)
    unsorted = load_rows(work, n, found.n_entries)
    unsorted = SparseRows(*arrays.scattered([unsorted.indptr, unsorted.tokens, unsorted.probs]))
    for low in range(rows.n, n, _CELL_QUERIES):
        rows.append(*unsorted.at(place[low : low + _CELL_QUERIES]), 0)
    rows.n_short = found.n_short


def _write(rows: RowWriter, batches: Iterator[_Batch], n: int, out: Path, copies: int = 1) -> None:
    """Append all batches up to `n` rows; while a batch is written, the next one is searched.

    At most one batch is waiting to be written. If a search fails, the batch before it is still written. There must be
    room on the disk for `copies` of all rows.
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
                    left = rows.n_bytes / rows.n * (copies * n - rows.n)
                    resources.check_disk(out, left, f"the other {n - rows.n} rows; set 'top' or 'threshold'")
        if pending is not None:
            pending.result()


def in_order(
    searcher: search.Searcher,
    asked: Datastore,
    settings: TargetSettings,
    begin: int,
    end: int,
) -> Iterator[_Batch]:
    """Yield (counts, tokens, probs, number of short rows) of the positions [begin, end), batch by batch."""
    size = settings.batch_size
    if searcher.on_device is not None:
        size = max(size, device_search.QUERIES)  # not by free memory: a resumed run needs the same batches
    elif searcher.cells is not None:
        size = max(size, _CELL_QUERIES)
    grid = begin // size * size  # search the whole first batch, so that its rows do not depend on `begin`
    for first, queries in asked.blocks(grid, min(-(-end // size) * size, asked.n), size):
        positions = np.arange(first, first + len(queries))
        own, inputs = (positions, None) if asked is searcher.store else (None, _inputs(asked, positions))
        sq_dist, ids = searcher.near(queries, settings.neighbours, own, inputs=inputs, released=settings.released)
        low, high = max(begin - first, 0), min(end - first, len(queries))
        yield _rows(searcher, settings, positions[low:high], sq_dist[low:high], ids[low:high])


def in_cells(searcher: search.Searcher, settings: TargetSettings, order: NDArray[np.int64]) -> Iterator[_Batch]:
    """As `in_order`, for positions in this order; no row depends on the batch."""
    size, k = max(settings.batch_size, _CELL_QUERIES), settings.neighbours
    if searcher.on_device is not None:
        from memdec.datastore.device_cells import QUERIES  # exact search needs no faiss

        size = max(size, QUERIES)
    for low in range(0, len(order), size):
        positions = order[low : low + size]
        yield _rows(searcher, settings, positions, *searcher.near_keys(positions, k, released=settings.released))


def _rows(
    searcher: search.Searcher, settings: TargetSettings, positions: NDArray[np.int64], sq_dist: Tensor, ids: Tensor
) -> _Batch:
    """Aggregate the neighbours of a batch of positions."""
    try:
        cut = {"top": settings.top, "threshold": settings.threshold}
        counts, tokens, probs = searcher.rows(sq_dist, ids, settings.temperature, **cut)
    except knn.RowError as error:
        raise NumericsError(
            f"targets: expected neighbours for position {positions[error.row]}, but {error.why}"
        ) from None
    if searcher.on_device is not None:  # types as on disk: 8,192 rows of 1,024 entries shrink from 134 MB to 67 MB
        tokens, probs = tokens.int(), probs.to(getattr(torch, settings.dtype))
    return counts.cpu().numpy(), tokens.cpu().numpy(), probs.cpu().numpy(), int((ids[:, -1] < 0).sum())


def _inputs(asked: Datastore, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Last input token of each position's key, which is the token before the position; -1 for the first position."""
    return np.where(positions > 0, asked.values[np.maximum(positions, 1) - 1].astype(np.int64), -1)
