"""Search, aggregation and training on CUDA give what the CPU gives. Skipped without a CUDA device."""

from pathlib import Path

import numpy as np
import pytest
import torch
from making import spec, write_store, write_tokens

from memdec import fitting, index, knn, models, objectives
from memdec.config import IndexSettings
from memdec.datastore import Datastore
from memdec.losses import fused_loss
from memdec.modeling import MemDecForCausalLM
from memdec.search import Nearest

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_exact_search() -> None:
    rng = np.random.default_rng(0)
    keys = torch.from_numpy(rng.normal(size=(20_000, 64)).astype(np.float32))
    found = {}
    for device in ("cpu", "cuda"):
        nearest = Nearest(keys[:300].to(device), 50)
        for first in range(0, len(keys), 4096):
            nearest.update(keys[first : first + 4096], first)
        found[device] = [x.cpu() for x in nearest.result()]
    torch.testing.assert_close(found["cuda"][0], found["cpu"][0], atol=1e-3, rtol=1e-4)
    assert (found["cuda"][1] == found["cpu"][1]).float().mean() > 0.999  # the rest are ties up to rounding


def test_the_search_of_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = np.random.default_rng(0).normal(size=(5000, 32)).astype(np.float16)
    store = write_store(tmp_path / "s", keys, write_tokens(tmp_path / "t", np.zeros(5000, np.uint16)))
    index.run(store, tmp_path / "i", IndexSettings())
    searcher = index.load(Datastore(store), tmp_path / "i")
    own = np.arange(200)
    ours = searcher.search(keys[own].astype(np.float32), 100, own)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for one, other in zip(ours, searcher.search(keys[own].astype(np.float32), 100, own), strict=True):
        np.testing.assert_array_equal(one, other)


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
        h, w = (x.to(device).requires_grad_() for x in (hidden, head))
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


def test_a_training_step() -> None:
    batch = {"input_ids": torch.randint(0, 50, (4, 16)), "labels": torch.randint(0, 50, (4, 16))}
    batch["spans"] = torch.zeros(4, 2, dtype=torch.long)
    grads = []
    for device in ("cpu", "cuda"):
        model = fitting.LossModel(models.from_scratch(spec(16), 50, 32, 0), objectives.Hybrid(0.0)).to(device)
        model(**{name: x.to(device) for name, x in batch.items()})["loss"].backward()
        grads.append({name: p.grad.cpu() for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("where", ["cuda", "cpu"])
def test_a_mixture_on_two_streams(where: str) -> None:
    """The memory runs on a stream of its own beside the base, or on another device."""
    base, memory = (models.from_scratch(spec(width), 50, 64, 0).eval() for width in (32, 16))
    ids = torch.randint(1, 50, (3, 9), generator=torch.Generator().manual_seed(0))
    mixture = MemDecForCausalLM.from_models(base, [memory], [0.4])
    found = [mixture(input_ids=ids).logits, mixture.generate(ids, max_new_tokens=20, do_sample=False)]
    base.cuda()
    memory.to(where)
    for _ in range(5):  # a race would show sooner or later
        logits = mixture(input_ids=ids.cuda()).logits.cpu()
        torch.testing.assert_close(logits, found[0], atol=1e-4, rtol=1e-3)
        assert torch.equal(mixture.generate(ids.cuda(), max_new_tokens=20, do_sample=False).cpu(), found[1])
