"""Search, aggregation and training on CUDA give what the CPU gives. Skipped without a CUDA device."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from making import spec, write_store, write_tokens
from scipy.sparse import csr_matrix
from transformers import AutoModelForCausalLM

from memdec.datastore import device_cells, device_search, index, search, target_rows, targets
from memdec.datastore.cells import CellSearch
from memdec.datastore.device_cells import DeviceCells
from memdec.datastore.device_search import DeviceSearch
from memdec.datastore.keys import Datastore
from memdec.inference.mixture import MemDecForCausalLM
from memdec.maths import exact_search, knn, objectives
from memdec.maths.losses import fused_loss, token_log_probs
from memdec.maths.sparse_rows import SparseRows
from memdec.models import loading
from memdec.settings import IndexSettings, TargetSettings
from memdec.training import fitting

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


N, WIDTH, VOCAB = 20_000, 64, 997


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datastore `s`, its exact index `i` and its tokens `t`.

    20,000 keys about a common offset, in two shards; every hundredth is the same.
    """
    made = tmp_path_factory.mktemp("store")
    keys = np.random.default_rng(0).normal(size=(N, WIDTH)) + 3
    keys[::100] = keys[5]
    stream = write_tokens(made / "t", np.arange(N).astype(np.uint16) % VOCAB)
    index.run(
        write_store(made / "s", keys.astype(np.float16), stream, edges=[0, 7000, N]),
        made / "i",
        IndexSettings(check_queries=1),
    )
    return made


@pytest.fixture(scope="module")
def store(folder: Path) -> Datastore:
    return Datastore([folder / "s" / "0", folder / "s" / "1"])


def asked(store: Datastore, n: int) -> torch.Tensor:
    return torch.from_numpy(next(store.blocks(0, n, n))[1].copy())


@dataclass(frozen=True)
class Expected:
    """The neighbours of the first keys, found on the CPU.

    Attributes:
        near: Distances and positions of the search under test, run on the CPU.
        all: Distances to all keys in float64, +inf to the query itself.
        nearest: The smallest of `all`, ascending.
    """

    near: tuple[torch.Tensor, torch.Tensor]
    all: torch.Tensor
    nearest: torch.Tensor


@pytest.fixture(scope="module")
def expected(store: Datastore) -> Expected:
    queries, own = asked(store, 2000), torch.arange(2000)
    plain = torch.cdist(queries.double(), asked(store, N).double()) ** 2
    plain[own, own] = torch.inf
    near = DeviceSearch(store, torch.device("cpu")).search(queries, 50, own)
    return Expected(near, plain, plain.topk(50, largest=False).values)


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("room", [None, 3_000_000])
def test_exact_search(store: Datastore, expected: Expected, tf32: bool, room: int | None) -> None:
    """In TF32 too, and with keys that stream past: the neighbours but for ties up to rounding, distances to 1e-6."""
    ours = DeviceSearch(store, torch.device("cuda"), tf32=tf32, room=room)
    assert ours.resident == (room is None)
    found = [x.cpu() for x in ours.search(asked(store, 2000), 50, torch.arange(2000))]
    torch.testing.assert_close(found[0], expected.near[0], atol=0, rtol=1e-6)
    assert (found[1] == expected.near[1]).float().mean() > 0.999
    torch.testing.assert_close(found[0].double(), expected.nearest, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(expected.all.gather(1, found[1]), expected.nearest, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("tf32", [False, True])
def test_no_distance_is_below_its_bound(store: Datastore, tf32: bool) -> None:
    """What the search rests on: sums on tensor cores err by no more than `search.slack` allows."""
    keys = asked(store, store.n).cuda()
    moved = (keys - keys.median(0).values) * torch.linspace(1, 100, 64, device="cuda")
    queries = moved[:2000]
    with exact_search.product_of(tf32=tf32):
        bounds = exact_search.lower_bounds(exact_search.to_tf32(queries) if tf32 else queries, moved, tf32=tf32)
    bounds += exact_search.own_part(queries, tf32=tf32)
    for low in range(0, 2000, 100):
        exact = torch.stack([(moved.double() - query.double()).square().sum(1) for query in queries[low : low + 100]])
        assert (bounds[low : low + 100] <= exact).all()


@pytest.mark.parametrize("n", [500, 131_072])
def test_the_same_bits_whatever_the_blocks(store: Datastore, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = asked(store, 2000)
    monkeypatch.setattr(device_search, "QUERIES", 700)
    one = DeviceSearch(store, torch.device("cuda")).search(queries, 200)
    monkeypatch.setattr(device_search, "_KEYS", n)
    monkeypatch.setattr(device_search, "QUERIES", 2000)
    for _ in range(2):
        found = DeviceSearch(store, torch.device("cuda")).search(queries, 200)
        assert torch.equal(found[0], one[0])
        assert torch.equal(found[1], one[1])


def test_the_search_of_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = np.random.default_rng(0).normal(size=(5000, 32)).astype(np.float16)
    store = write_store(tmp_path / "s", keys, write_tokens(tmp_path / "t", np.zeros(5000, np.uint16)))
    index.run(store, tmp_path / "i", IndexSettings())
    searcher = search.load(Datastore(store), tmp_path / "i")
    own = np.arange(200)
    ours = searcher.search(keys[own].astype(np.float32), 100, own)
    assert searcher.near(keys[own].astype(np.float32), 100, own)[0].device.type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for one, other in zip(ours, searcher.search(keys[own].astype(np.float32), 100, own), strict=True):
        np.testing.assert_array_equal(one, other)


def test_targets(folder: Path, store: Datastore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of CUDA again and in shards: the same bits. Those of the CPU to 1e-6, but for ties at the last neighbour."""
    monkeypatch.setattr(device_search, "QUERIES", 3000)
    made = [folder / "s" / "0", folder / "s" / "1"], folder / "i", folder / "t"
    found = {}
    for name, shards in (("cuda", 1), ("again", 1), ("parts", 3), ("cpu", 1)):
        chosen = TargetSettings(neighbours=100, temperature=TEMPERATURE, shards=shards)
        folders = [tmp_path / name / str(shard) for shard in range(shards)]
        for shard, out in enumerate(folders):
            targets.run(*made, out, chosen, shard=shard, device=torch.device("cpu") if name == "cpu" else None)
        found[name] = target_rows.TargetReader(folders, store.facts["tokens_sha256"]).rows([(0, N)])
    for name in ("again", "parts"):
        for field in ("indptr", "tokens", "probs"):
            np.testing.assert_array_equal(getattr(found[name], field), getattr(found["cuda"], field))
    check_rows(sparse(found["cpu"]), sparse(found["cuda"]), asked(store, N).double(), 100)


CELLS = IndexSettings(kind="cells", centroids=100, check_queries=1, check_nprobe=[1], sample=5000)


@pytest.fixture(scope="module")
def in_cells(folder: Path, store: Datastore) -> CellSearch:
    """An index of kind `cells` (folder `c`) of which 10 of 100 cells are searched, with its search on the CPU."""
    index.run([folder / "s" / "0", folder / "s" / "1"], folder / "c", CELLS)
    found: CellSearch = search.load(store, folder / "c", 10, torch.device("cpu")).cells
    return found


def test_distances_to_gathered_keys_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        queries, keys = (torch.randn(n, 200, generator=generator) for n in (50, 400))
        keys, places = keys.to(dtype), torch.randint(400, (50, 37), generator=generator)
        found = exact_search.row_distances(queries.cuda(), keys.cuda(), places.cuda())
        torch.testing.assert_close(found.cpu(), exact_search.row_distances(queries, keys, places), atol=0, rtol=2e-7)


@pytest.mark.parametrize("room", [None, 60_000_000, 4_000_000])
@pytest.mark.parametrize("by_place", [False, True])
def test_search_in_cells(
    folder: Path, store: Datastore, in_cells: CellSearch, room: int | None, by_place: bool
) -> None:
    """The neighbours that the CPU finds in the same cells, the same bits whatever fits on the device and by part.

    All tokens are rare, so their positions are candidates, too, and with `by_place` those of the query's own place.
    """
    if by_place:
        searcher = search.Searcher(store, CELLS, folder / "c", by_place=True)
        searcher.set_nprobe(in_cells.nprobe)
        in_cells = searcher.cells
    assert len(in_cells.beside) == 1 + by_place
    queries, own = asked(store, 3000), torch.arange(3000)
    inputs = np.append(-1, store.values[:2999]).astype(np.int64)
    near, ids = in_cells.search(queries.numpy(), own.numpy(), 200, inputs)
    found = []
    for size in (3000, 700):
        ours = DeviceCells(in_cells, torch.device("cuda"), room=room)
        assert ours.resident == (room != 4_000_000)
        parts = [
            ours.search(queries[at : at + size], 200, own[at : at + size], inputs[at : at + size])
            for at in range(0, 3000, size)
        ]
        found.append([torch.cat(each).cpu() for each in zip(*parts, strict=True)])
        assert ours.n_settled < 600
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    torch.testing.assert_close(found[0][0], torch.from_numpy(near), atol=0, rtol=WIDTH * 2.0**-24)
    assert (found[0][1].numpy() == ids).mean() > 0.999


def test_targets_in_cells(
    folder: Path, store: Datastore, in_cells: CellSearch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of CUDA in shards and other batches: the same bits; those of the CPU as for exact search."""
    made = [folder / "s" / "0", folder / "s" / "1"], folder / "c", folder / "t"
    found = {}
    for name, shards, size in (("cuda", 1, 32_768), ("parts", 3, 3000), ("cpu", 1, 3000)):
        monkeypatch.setattr(device_cells, "QUERIES", size)
        chosen = TargetSettings(neighbours=100, temperature=TEMPERATURE, shards=shards, nprobe=10)
        folders = [tmp_path / name / str(shard) for shard in range(shards)]
        for shard, out in enumerate(folders):
            targets.run(*made, out, chosen, shard=shard, device=torch.device("cpu") if name == "cpu" else None)
        found[name] = target_rows.TargetReader(folders, store.facts["tokens_sha256"]).rows([(0, N)])
    for field in ("indptr", "tokens", "probs"):
        np.testing.assert_array_equal(getattr(found["parts"], field), getattr(found["cuda"], field))
    apart = abs(sparse(found["cpu"]) - sparse(found["cuda"])).max(axis=1).toarray()[:, 0]
    assert (apart > 1e-6).mean() <= 1e-3


TEMPERATURE = 16.0


def sparse(rows: SparseRows) -> csr_matrix:
    return csr_matrix((rows.probs, rows.tokens, rows.indptr), (len(rows.indptr) - 1, VOCAB))


def check_rows(one: csr_matrix, other: csr_matrix, keys: torch.Tensor, neighbours: int) -> None:
    """Rows agree to 1e-6, but for at most one in a thousand, where the last neighbours tie up to rounding.

    The CPU sums squares in float32, other devices in float64, so the k-th neighbour may be another key at the same
    distance. In such a row no more than that neighbour's mass may move.
    """
    apart = abs(one - other)
    differ = np.flatnonzero(apart.max(axis=1).toarray()[:, 0] > 1e-6)
    assert len(differ) <= one.shape[0] / 1000
    for row in differ:
        sq_dist = (keys - keys[row]).square().sum(1)
        sq_dist[row] = torch.inf
        near = sq_dist.sort().values[: neighbours + 1]
        weights = torch.softmax(-near[:-1] / TEMPERATURE, 0)
        assert near[-1] - near[-2] <= 2 * WIDTH * 2.0**-24 * near[-1], f"row {row}: no tie at the last neighbour"
        assert apart[row].sum() / 2 <= float(weights[-1]) + 1e-6, f"row {row}: more than the last neighbour moved"


@pytest.mark.parametrize(("top", "threshold"), [(None, 0.0), (20, 0.0), (None, 1e-3)])
def test_aggregation(top: int | None, threshold: float) -> None:
    gen = torch.Generator().manual_seed(0)
    sq_dist = torch.rand(500, 1024, generator=gen) * 60
    sq_dist[torch.rand(500, 1024, generator=gen) < 0.01] = torch.inf
    values = (torch.rand(500, 1024, generator=gen) ** 4 * 50_257).long()
    one = knn.aggregate(sq_dist, values, 16.0, top=top, threshold=threshold)
    other = [x.cpu() for x in knn.aggregate(sq_dist.cuda(), values.cuda(), 16.0, top=top, threshold=threshold)]
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
    torch.testing.assert_close(one[2], other[2], atol=1e-6, rtol=0)


def rows(n: int, vocab: int, entries: int) -> tuple[torch.Tensor, ...]:
    """labels, indptr, tokens, probs."""
    gen = torch.Generator().manual_seed(1)
    tokens = torch.stack([torch.randperm(vocab, generator=gen)[:entries] for _ in range(n)]).flatten()
    probs = torch.rand(n, entries, generator=gen)
    labels = torch.randint(0, vocab, (n,), generator=gen)
    labels[::7] = -100
    return labels, torch.arange(n + 1) * entries, tokens, (probs / probs.sum(1, keepdim=True)).flatten()


@pytest.mark.parametrize(
    "objective",
    [objectives.Hybrid(), objectives.Focal(), objectives.JensenShannon(), objectives.BiLD(), objectives.Sparsity()],
    ids=str,
)
def test_the_fused_loss(objective: objectives.Objective) -> None:
    gen = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(300, 64, generator=gen), torch.randn(5000, 64, generator=gen) * 0.2
    found = {}
    for device in ("cpu", "cuda"):
        h, w = (x.clone().to(device).requires_grad_() for x in (hidden, head))
        loss = fused_loss(h, w, *(x.to(device) for x in rows(300, 5000, 40)), objective, 128).loss
        loss.backward()
        found[device] = [x.detach().cpu() for x in (loss, h.grad, w.grad)]
    for one, other in zip(found["cuda"], found["cpu"], strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-4  # TF32 is off by default


def test_the_fused_loss_under_autocast_holds_no_logits() -> None:
    n, vocab, width = 8192, 50_257, 256
    h = torch.randn(n, width, device="cuda", requires_grad=True)
    w = (torch.randn(vocab, width, device="cuda") * 0.05).requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", torch.bfloat16):
        loss = fused_loss(h, w, *(x.cuda() for x in rows(n, vocab, 20))).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.cuda.max_memory_allocated() - before < 1.6e9  # one dense copy would be 1.65 GB


def far_off(n: int, vocab: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and a head whose logits stand near -100, as those of GPT-2, where bfloat16 has steps of 0.5."""
    gen = torch.Generator().manual_seed(0)
    h, w = torch.randn(n, width, generator=gen), torch.randn(vocab, width, generator=gen) * 0.2
    return torch.cat([h, torch.full((n, 8), 4.0)], 1).bfloat16(), torch.cat(
        [w, torch.full((vocab, 8), -3.125)], 1
    ).bfloat16()


@pytest.mark.parametrize("is_loss", [False, True])
def test_logits_of_bfloat16_are_not_rounded(is_loss: bool) -> None:
    h, w = far_off(300, 5000, 64)
    labels = torch.randint(0, 5000, (300,), generator=torch.Generator().manual_seed(1))
    expected = (h.double() @ w.double().T).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    if is_loss:
        none = torch.zeros(301, dtype=torch.long), torch.empty(0, dtype=torch.long), torch.empty(0)
        given = (h.cuda(), w.cuda(), labels.cuda(), *(x.cuda() for x in none))
        with torch.no_grad():
            loss = float(fused_loss(*given, objectives.Hybrid(0.0)).loss)
        assert loss == pytest.approx(-float(expected.sum()), rel=1e-5)
    else:
        found = token_log_probs(h.cuda(), w.cuda(), labels.cuda()).double().cpu()
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_a_loaded_head_gives_float32_logits(tmp_path: Path) -> None:
    loading.from_scratch(spec(16), 50, 32, 0).save_pretrained(tmp_path)
    model = loading.load(tmp_path, dtype="bfloat16").cuda().eval()
    loading.check_head(model)
    ids = torch.randint(0, 50, (2, 8), device="cuda")
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        hidden = loading.decoder(model)(input_ids=ids).last_hidden_state
    assert logits.dtype == torch.float32
    exact = hidden.double() @ loading.head_weight(model).double().T
    torch.testing.assert_close(logits.double(), exact, atol=1e-5, rtol=1e-4)


def test_a_training_step() -> None:
    batch = {"input_ids": torch.randint(0, 50, (4, 16)), "labels": torch.randint(0, 50, (4, 16))}
    batch["spans"] = torch.zeros(4, 2, dtype=torch.long)
    grads = []
    for device in ("cpu", "cuda"):
        model = fitting.LossModel(loading.from_scratch(spec(16), 50, 32, 0), objectives.Hybrid(0.0)).to(device)
        model(**{name: x.to(device) for name, x in batch.items()})["loss"].backward()
        grads.append({name: p.grad.cpu() for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("where", ["cuda", "cpu"])
def test_a_mixture_on_two_streams(where: str) -> None:
    """The memory runs on a stream of its own beside the base, or on another device."""
    base, memory = (loading.from_scratch(spec(width), 50, 64, 0).eval() for width in (32, 16))
    ids = torch.randint(1, 50, (3, 9), generator=torch.Generator().manual_seed(0))
    mixture = MemDecForCausalLM.from_models(base, [memory], [0.4])
    found = [mixture(input_ids=ids).logits, mixture.generate(ids, max_new_tokens=20, do_sample=False)]
    base.cuda()
    memory.to(where)
    for _ in range(5):  # a race would show sooner or later
        logits = mixture(input_ids=ids.cuda()).logits.cpu()
        torch.testing.assert_close(logits, found[0], atol=1e-4, rtol=1e-3)
        assert torch.equal(mixture.generate(ids.cuda(), max_new_tokens=20, do_sample=False).cpu(), found[1])


def test_beams_on_two_streams() -> None:
    """Beams reorder the caches on the base's stream, and the memory's stream drops what they were."""
    base, memory = (loading.from_scratch(spec(width), 50, 256, 0).eval().cuda() for width in (32, 64))
    ids = torch.randint(1, 50, (8, 100), generator=torch.Generator().manual_seed(0)).cuda()
    mixture = MemDecForCausalLM.from_models(base, [memory], [0.4])
    how = {"max_new_tokens": 40, "num_beams": 4, "do_sample": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemDecForCausalLM, "_side_stream", lambda *_: None)
        expected = mixture.generate(ids, **how)
    for _ in range(5):
        assert torch.equal(mixture.generate(ids, **how), expected)


def test_a_base_of_the_harness_gives_float32_logits(tmp_path: Path) -> None:
    loading.from_scratch(spec(16), 50, 32, 0).save_pretrained(tmp_path)
    model = loading.from_pretrained(AutoModelForCausalLM, tmp_path, dtype=torch.bfloat16, device_map={"": "cuda"})
    with torch.no_grad():
        assert model(input_ids=torch.zeros(1, 3, dtype=torch.long, device="cuda")).logits.dtype == torch.float32
