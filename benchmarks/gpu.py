"""Benchmark our code on CUDA against plain twins: `python -m benchmarks.gpu [--tiny] [--out results/gpu/gpu.csv]`.

Both sides do the same work in the same run. Their results are compared first, then they are timed in turn. Times are
medians between CUDA events; memory is the growth of the allocator's peak over the inputs. Each row is written as soon
as it is measured. If a twin does not fit into memory, its row says so and another row has a quarter of the work.
`--tiny` uses small sizes on any device; on a CPU, times are wall-clock times and there are no memory columns.
"""

import argparse
import atexit
import csv
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import (
    V,
    cells,
    dense_hybrid,
    dense_rows,
    loss_inputs,
    neighbour_batches,
    sweep_of,
    write_store,
)
from memdec.artefacts import devices
from memdec.datastore import index, search
from memdec.datastore import keys as datastore
from memdec.datastore.device_cells import QUERIES
from memdec.maths.exact_search import product_of
from memdec.maths.knn import aggregate
from memdec.maths.losses import fused_loss
from memdec.maths.objectives import Hybrid
from memdec.maths.sparse_rows import SparseRows, total_variation
from memdec.models import loading
from memdec.models.keypoints import KeyPoint
from memdec.settings import IndexSettings
from memdec.training import fitting

COLUMNS = [
    "benchmark", "against", "vocabulary", "width", "n", "unit", "ours", "twin", "ratio", "peak_gb_ours", "peak_gb_twin",
    "difference", "note", "device",
]  # fmt: skip
NO_ROOM = "out of memory"
Work = Callable[[], list[Tensor]]
Sides = tuple[Work, Work]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the work; the defaults are the paper's shapes."""

    windows: int = 16
    length: int = 1024
    widths: tuple[tuple[int, int], ...] = ((50_257, 768), (151_936, 896))  # vocabulary: GPT-2 small, Qwen2.5-0.5B
    layers: int = 12
    keys: int = 1_000_000
    key_width: int = 768
    neighbours: int = 1024
    queries: int = 4096
    cells: int = 1024
    nprobe: int = 32
    joined: int = 131_072  # queries of the search in cells, an eighth of the keys
    rows: int = 16_384
    swept: int = 4096
    repeats: int = 3
    seconds: float = 12.0  # time after which a case is not repeated


TINY = Sizes(2, 64, ((300, 64), (500, 128)), 2, 3000, 32, 64, 50, 30, 8, 400, 64, 200, 2, 2.0)


@dataclass(frozen=True)
class Bench:
    """One benchmark, a row of the table.

    Attributes:
        name: Name of the measured code.
        against: Description of the twin.
        make: n -> ours and the twin.
        n: Tokens, rows or queries of one call.
        unit: Unit of `n` per second; ms is the time of one call.
        tolerance: Largest allowed relative L2 distance between the results.
        shrinks: Whether to add a row with a smaller n if the twin does not fit.
        note: What the row says beside its figures, from the rate of ours.
    """

    name: str
    against: str
    make: Callable[[int], Sides]
    n: int
    unit: Literal["ms", "queries/s", "rows/s", "tokens/s"]
    tolerance: float
    vocabulary: int | str = ""
    width: int | str = ""
    shrinks: bool = False
    note: Callable[[float], str] | None = None


# --- what is measured ---------------------------------------------------------------------------------------------


def benches(sizes: Sizes, device: str) -> Iterator[Bench]:
    """All benchmarks in order."""
    tokens = sizes.windows * sizes.length
    for make, against in (
        (loss, "dense targets, full logits, autograd"),
        (step, "the same with dense targets and full logits"),
    ):
        for vocab, width in sizes.widths:
            work = partial(make, vocab=vocab, width=width, sizes=sizes, device=device)
            yield Bench(make.__name__, against, work, tokens, "ms", 2e-2, vocab, width, shrinks=True)
    for twin, against in ((search_on_cpu, "the same search on the CPU"), (search_plain, "matrix products and topk")):
        work = partial(exact_search, twin=twin, sizes=sizes, device=device)
        yield Bench("search", against, work, sizes.queries, "queries/s", 1e-3, width=sizes.key_width)
    yield Bench(
        "cells",
        "a product and topk for each cell",
        partial(cell_search, sizes=sizes, device=device),
        sizes.joined,
        "queries/s",
        1e-3,
        width=sizes.key_width,
        note=partial(about_cells, sizes=sizes, device=device),
    )
    yield Bench(
        "aggregation", "dense rows", partial(aggregation, device=device), sizes.rows, "rows/s", 1e-5, vocabulary=V
    )
    vocab, width = sizes.widths[0]
    work = partial(keys, vocab=vocab, width=width, sizes=sizes, device=device)
    yield Bench("keys", "float32 with the LM head", work, tokens, "tokens/s", 3e-2, vocab, width)
    for vocab, width in sizes.widths:
        work = partial(sweep, vocab=vocab, width=width, sizes=sizes, device=device)
        yield Bench("sweep", "a pass of both models per alpha", work, sizes.swept, "ms", 1e-3, vocab, width)


def loss(n: int, *, vocab: int, width: int, sizes: Sizes, device: str) -> Sides:
    """Hybrid loss, forward and backward, 64 entries a row: the loss and the gradients of hidden states and head."""
    hidden, head, *rest = (x.to(device) for x in loss_inputs(n, vocab, width))

    def side(loss_of: Callable[..., Tensor]) -> Work:
        def work() -> list[Tensor]:
            h, w = hidden.detach().requires_grad_(), head.detach().requires_grad_()
            with torch.autocast(device, torch.bfloat16):
                loss = loss_of(h, w, *rest)
            return [loss.detach(), *torch.autograd.grad(loss, (h, w))]

        return work

    return side(lambda *inputs: fused_loss(*inputs, Hybrid(0.5)).loss), side(dense_hybrid)


def step(n: int, *, vocab: int, width: int, sizes: Sizes, device: str) -> Sides:
    """Training step of a GPT-2 with bfloat16 autocast: forward, backward, clipping, AdamW; loss, gradient of the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    _, _, labels, indptr, tokens, probs = (x.to(device) for x in loss_inputs(n, vocab, 1))
    ids = labels.reshape(-1, sizes.length)
    begins = torch.arange(0, n, sizes.length, device=device)
    batch = {
        "input_ids": ids,
        "labels": ids,
        "spans": torch.stack([begins, begins + sizes.length], 1),
        "target_indptr": indptr,
        "target_tokens": tokens,
        "target_probs": probs,
    }
    plain = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(vocab_size=vocab, n_embd=width, n_layer=sizes.layers, n_head=width // 64, **plain)

    def side(loss_of: Callable[[Any], Tensor], fused: bool) -> Work:
        made: list[Any] = []

        def work() -> list[Tensor]:
            if not made:  # a separate model; a second call is the next step
                torch.manual_seed(0)
                with torch.device(device):
                    lm = GPT2LMHeadModel(config)
                if fused:
                    loading.fuse_activations(lm)
                made.extend((lm, torch.optim.AdamW(lm.parameters(), lr=1e-4, fused=fused or None)))
            lm, optimizer = made
            with torch.autocast(device, torch.bfloat16):
                loss = loss_of(lm)
            loss.backward()
            found = [loss.detach(), lm.transformer.wte.weight.grad.clone()]
            torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return found

        return work

    def ours(lm: Any) -> Tensor:
        loss: Tensor = fitting.LossModel(lm, Hybrid(0.5))(**batch, num_items_in_batch=n)["loss"]
        return loss

    def twin(lm: Any) -> Tensor:
        hidden = lm.transformer(ids).last_hidden_state.flatten(0, 1)
        return dense_hybrid(hidden, lm.lm_head.weight, labels, indptr, tokens, probs) / n

    return side(ours, fused=True), side(twin, fused=False)


@cache
def store_of(sizes: Sizes, device: str) -> tuple[Path, Path]:
    """(datastore, exact index) of random keys in 500 clusters."""
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    cluster = torch.randint(500, (sizes.keys,), generator=generator, device=device)
    keys = (0.7 * draw(500, sizes.key_width))[cluster] + draw(sizes.keys, sizes.key_width)
    store, _ = write_store(keys.half().cpu().numpy(), (cluster * 97).cpu().numpy().astype(np.uint16))
    # One check query is enough: its result is not used, and each costs a conversion of all keys to float64.
    settings = IndexSettings(kind="exact", check_queries=1, check_neighbours=sizes.neighbours)
    index.run(store, store.parent / "index", settings)
    return store, store.parent / "index"


def queries_of(store: datastore.Datastore, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and keys of n queries."""
    return store.sample(n, 7)


def exact_search(n: int, *, twin: Callable[..., Work], sizes: Sizes, device: str) -> Sides:
    """Distances of the exact neighbours of a batch of queries, searched as in stage `targets`."""
    folders = store_of(sizes, device)
    ours = searched(folders, n, sizes.neighbours)
    return lambda: [ours()], twin(folders, n, sizes, device)


@cache
def searched(folders: tuple[Path, Path], n: int, neighbours: int) -> Callable[[], Tensor]:
    """The search of stage `targets`, on its default device."""
    searcher = search.load(datastore.Datastore(folders[0]), folders[1])
    own, queries = queries_of(searcher.store, n)
    # As in `targets`: the result stays on the device, where it is aggregated.
    return lambda: searcher.near(queries, neighbours, own)[0]


def search_on_cpu(folders: tuple[Path, Path], n: int, sizes: Sizes, device: str) -> Work:
    """The same call in a process that sees no GPU."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    pool = get_context("spawn").Pool(1)
    atexit.register(pool.terminate)
    if seen is None:
        del os.environ["CUDA_VISIBLE_DEVICES"]
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = seen
    return lambda: [torch.from_numpy(pool.apply(_search_there, (folders, n, sizes.neighbours)))]


def _search_there(folders: tuple[Path, Path], n: int, neighbours: int) -> np.ndarray:
    return searched(folders, n, neighbours)().numpy()


def search_plain(folders: tuple[Path, Path], n: int, sizes: Sizes, device: str) -> Work:
    """Plain search: all keys on the device in float32, |k|^2 - 2 q k in blocks, topk after each block."""
    store = datastore.Datastore(folders[0])
    own, queries = queries_of(store, n)
    q, places, block = torch.from_numpy(queries).to(device), torch.from_numpy(own).to(device), 65_536
    made: list[Tensor] = []

    def work() -> list[Tensor]:
        if not made:
            made.append(torch.from_numpy(np.concatenate([part for _, part in store.parts])).to(device).float())
        best = torch.full((n, 0), torch.inf, device=device)
        for first in range(0, store.n, block):
            k = made[0][first : first + block]
            sq_dist = torch.addmm((k * k).sum(1)[None], q, k.T, alpha=-2)
            rows = ((places >= first) & (places < first + len(k))).nonzero()[:, 0]
            sq_dist[rows, places[rows] - first] = torch.inf  # the query itself
            both = torch.cat([best, sq_dist], 1)
            best = both.topk(min(sizes.neighbours, both.shape[1]), largest=False).values
        return [(best + (q * q).sum(1, keepdim=True)).sort(1).values]

    return work


@cache
def cells_of(sizes: Sizes, device: str) -> search.Searcher:
    """The search in the nearest cells of the same keys."""
    store, _ = store_of(sizes, device)
    made = store.parent / "cells"
    sample = max(sizes.keys // 16, sizes.cells)
    chosen = {"kind": "cells", "centroids": sizes.cells, "sample": sample, "check_queries": 1, "check_nprobe": [1]}
    index.run(store, made, IndexSettings.model_validate(chosen | {"check_neighbours": sizes.neighbours}))
    return search.load(datastore.Datastore(store), made, sizes.nprobe)


def cell_search(n: int, *, sizes: Sizes, device: str) -> Sides:
    """Distances of the nearest keys in the nearest cells, for keys in the order of their cells, as in stage `targets`."""
    searcher = cells_of(sizes, device)
    order = searcher.cells.order(0, searcher.store.n)
    positions = order[len(order) // 2 :][:n]

    def ours() -> list[Tensor]:
        size = QUERIES
        return [
            torch.cat(
                [searcher.near_keys(positions[low : low + size], sizes.neighbours)[0] for low in range(0, n, size)]
            )
        ]

    return ours, cells_plain(searcher, positions, sizes, device)


def cells_plain(searcher: search.Searcher, positions: np.ndarray, sizes: Sizes, device: str) -> Work:
    """Plain search in cells: all queries of a cell are compared with it in float32, with topk after each cell."""
    made: list[Any] = []

    def work() -> list[Tensor]:
        if not made:
            everything = torch.from_numpy(np.concatenate([part for _, part in searcher.store.parts])).to(device).float()
            centroids = torch.from_numpy(searcher.cells.centroids).to(device)
            cell = torch.cat([torch.cdist(block, centroids).argmin(1) for block in everything.split(65_536)])
            made.extend((everything, centroids, [(cell == one).nonzero()[:, 0] for one in range(sizes.cells)]))
        everything, centroids, members = made
        own = torch.from_numpy(positions).to(device)
        queries = everything[own]
        probes = torch.cdist(queries, centroids).topk(sizes.nprobe, largest=False).indices
        asked = torch.zeros(len(queries), sizes.cells, dtype=torch.bool, device=device).scatter_(1, probes, True)
        best = torch.full((len(queries), sizes.neighbours), torch.inf, device=device)
        for one, keys in enumerate(members):
            rows = asked[:, one].nonzero()[:, 0]
            k = everything[keys]
            sq_dist = torch.addmm((k * k).sum(1)[None], queries[rows], k.T, alpha=-2)
            sq_dist[keys[None] == own[rows, None]] = torch.inf
            best[rows] = torch.cat([best[rows], sq_dist], 1).topk(sizes.neighbours, largest=False).values
        return [(best + (queries * queries).sum(1, keepdim=True)).sort(1).values]

    return work


def about_cells(rate: float, *, sizes: Sizes, device: str) -> str:
    """Total variation against exact search, and the part of the device's matrix rate that these queries/s use."""
    searcher, folders = cells_of(sizes, device), store_of(sizes, device)
    exact = search.load(datastore.Datastore(folders[0]), folders[1])
    own, queries = queries_of(searcher.store, sizes.queries)
    rows = []
    for each in (searcher, exact):
        near = each.near(queries, sizes.neighbours, own)
        rows.append(SparseRows.of(*(x.cpu() for x in each.rows(*near, 1.0))))
    centroids = torch.from_numpy(searcher.cells.centroids).to(device)
    probes = torch.cdist(torch.from_numpy(queries).to(device), centroids).topk(sizes.nprobe, largest=False).indices
    met = float(np.diff(searcher.cells.starts)[probes.cpu().numpy()].sum(1).mean())
    share = 2 * met * sizes.key_width * rate / matrix_rate(device)
    return (
        f"TV {total_variation(*rows).mean():.1g} at tau 1; {met:,.0f} keys a query, {100 * share:.0f} % of the rate of TF32 "
        "products"
    )


def matrix_rate(device: str) -> float:
    """Operations per second of a large TF32 product."""
    size = 8192 if device == "cuda" else 512
    one, other = (torch.randn(size, size, device=device) for _ in range(2))
    with product_of(tf32=True):
        meter = Meter(lambda: [one @ other], device)
        for _ in range(4):
            meter.call()
    return 2 * size**3 / statistics.median(meter.seconds[1:])


def aggregation(n: int, *, device: str) -> Sides:
    """p_kNN rows in CSR form from 1024 neighbours each, in batches of 1,024: probabilities and their tokens."""
    batches = neighbour_batches(n, 1024, device=device)

    def dense(sq_dist: Tensor, values: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        rows = dense_rows(sq_dist, values, temperature)
        row, token = rows.nonzero(as_tuple=True)
        return torch.bincount(row, minlength=len(rows)), token, rows[row, token]

    def side(rows_of: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Work:
        return lambda: [torch.cat(column) for column in zip(*(rows_of(d, v, 16.0) for d, v in batches), strict=True)]

    return side(aggregate), side(dense)


def keys(n: int, *, vocab: int, width: int, sizes: Sizes, device: str) -> Sides:
    """Keys of a batch of windows: run a bfloat16 GPT-2 up to the last MLP and copy float16 keys to main memory."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(vocab_size=vocab, n_embd=width, n_layer=sizes.layers, n_head=width // 64, **ends)
    with torch.device(device):
        plain, small = (GPT2LMHeadModel(config).eval() for _ in range(2))
        small.load_state_dict(plain.state_dict())
        ids = torch.randint(vocab, (n // sizes.length, sizes.length))
    ours_at, plain_at = KeyPoint(small.bfloat16()), KeyPoint(plain)

    def ours() -> list[Tensor]:
        return [torch.from_numpy(datastore.narrow(ours_at(ids).flatten(0, 1), 0, "float16"))]

    @torch.inference_mode()
    def twin() -> list[Tensor]:
        with plain_at.capture() as seen:
            plain(input_ids=ids, use_cache=False)
        return [seen[0].flatten(0, 1).half().cpu()]

    return ours, twin


def sweep(n: int, *, vocab: int, width: int, sizes: Sizes, device: str) -> Sides:
    """Perplexity at 10 alphas of two float32 GPT-2s: one pass and arithmetic, against ten passes of the mixture."""
    ours, twin = sweep_of(n, vocab, width, sizes.layers, sizes.length, device)
    return lambda: list(ours()), lambda: list(twin())


# --- measuring ----------------------------------------------------------------------------------------------------


_SHORT = 2.0  # seconds; a shorter call runs twice and the second counts, because new memory costs time


class Meter:
    """Measures times and peak memory of one side; `work` is None after it did not fit into memory."""

    def __init__(self, work: Work, device: str) -> None:
        self.work: Work | None = work
        self.cuda = device == "cuda"
        self.seconds: list[float] = []
        self.peak = self._held = 0  # bytes; memory that the first call keeps counts in later calls too

    def call(self) -> list[Tensor] | None:
        """Call once; the results in main memory, or None if they do not fit."""
        assert self.work is not None
        before = 0
        try:
            if self.cuda:
                gc.collect()
                torch.cuda.empty_cache()  # free the memory of the other side
                if self.seconds and self.seconds[-1] < _SHORT:
                    self.work()
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            seconds, found = self._timed(self.work)
        except torch.OutOfMemoryError:
            self.work = None
            return None
        self.seconds.append(seconds)
        found = [each.cpu() for each in found]
        if self.cuda:
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() - before + self._held)
            self._held += torch.cuda.memory_allocated() - before
        return found

    def _timed(self, work: Work) -> tuple[float, list[Tensor]]:
        if not self.cuda:
            start = time.perf_counter()
            found = work()
            return time.perf_counter() - start, found
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        found = work()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000, found


def difference(ours: list[Tensor], twin: list[Tensor]) -> float:
    """Largest relative L2 distance between results."""
    if [len(x) if x.ndim else 1 for x in ours] != [len(x) if x.ndim else 1 for x in twin]:
        return float("inf")
    pairs = [(one.float(), other.float()) for one, other in zip(ours, twin, strict=True)]
    return max(float((one - other).norm() / other.norm().clamp_min(1e-30)) for one, other in pairs)


def measure(bench: Bench, sizes: Sizes, device: str) -> dict[str, Any]:
    """Measure one row of the table; an error goes into its note."""
    shown = {"benchmark": bench.name, "against": bench.against, "vocabulary": bench.vocabulary, "width": bench.width}
    found: dict[str, Any] = {**shown, "n": bench.n, "unit": bench.unit, "device": devices.name()}
    meters = [Meter(work, device) for work in bench.make(bench.n)]
    begin = time.perf_counter()
    results = [meter.call() for meter in meters]
    if None not in results:
        if bench.name == "aggregation":  # sorted by token: ours has another order
            results = [list(cells([result])) for result in results]
        apart = difference(*results)  # type: ignore[arg-type]
        found["difference"] = f"{apart:.1e}"
        if not apart <= bench.tolerance:
            return found | {"note": f"results differ by {apart:.1e}, allowed {bench.tolerance:.0e}"}
    del results
    for repeat in range(sizes.repeats):
        if repeat and time.perf_counter() - begin > sizes.seconds:
            break
        for meter in meters:
            if meter.work is not None:
                meter.call()
    for name, meter in zip(("ours", "twin"), meters, strict=True):
        if meter.work is None:
            found |= {name: NO_ROOM, "note": f"{name} does not fit into the memory"}
            continue
        seconds = statistics.median(meter.seconds[1:])
        found[name] = f"{1000 * seconds if bench.unit == 'ms' else bench.n / seconds:.4g}"
        if meter.cuda:
            found[f"peak_gb_{name}"] = f"{meter.peak / 1e9:.2f}"
    if bench.note is not None and meters[0].work is not None:
        found["note"] = bench.note(bench.n / statistics.median(meters[0].seconds[1:]))
    if all(meter.work is not None for meter in meters):
        found["ratio"] = f"{statistics.median(meters[1].seconds[1:]) / statistics.median(meters[0].seconds[1:]):.3g}"
    return found


def rows(sizes: Sizes, device: str, only: list[str]) -> Iterator[dict[str, Any]]:
    """Measure all rows; an error is a row, too."""
    queue = [bench for bench in benches(sizes, device) if not only or bench.name in only]
    while queue:
        bench = queue.pop(0)
        try:
            found = measure(bench, sizes, device)
        except Exception as error:  # after any error, the other rows still run
            why = f"error: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            found = {"benchmark": bench.name, "against": bench.against, "n": bench.n, "note": why}
            found |= {"vocabulary": bench.vocabulary, "width": bench.width, "device": devices.name()}
        if found.get("twin") == NO_ROOM and bench.shrinks and bench.n >= 4 * sizes.length:
            queue.insert(0, replace(bench, n=bench.n // 4))
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        yield found


def main() -> int:
    """Measure and write the CSV; return 1 if a row has no ratio, except when its twin did not fit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small sizes on any device")
    parser.add_argument(
        "--only", action="append", default=[], help="loss, step, search, cells, aggregation, keys, sweep; repeat"
    )
    parser.add_argument("--out", type=Path, default=Path("results/gpu/gpu.csv"))
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.tiny:
        sys.exit("benchmarks.gpu needs a CUDA device; found none. On CPU: make bench, or --tiny for a try")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    failed = False
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", restval="")
        writer.writeheader()
        for row in rows(TINY if args.tiny else Sizes(), device, args.only):
            writer.writerow(row)
            file.flush()
            print({name: value for name, value in row.items() if value != ""}, flush=True)
            failed |= not row.get("ratio") and row.get("twin") != NO_ROOM
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
