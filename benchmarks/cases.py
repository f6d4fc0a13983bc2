"""The benchmark cases: our code, and for each a plain twin written here; `run.py` measures both.

`make(n)` makes a case once per child process. It returns two functions, ours and the twin. `plain` converts the results
of both to tensors, which must agree; this check is not timed.
"""

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memdec.artefacts import artefact
from memdec.datastore import index, targets
from memdec.datastore import keys as datastore
from memdec.datastore.target_rows import TargetReader
from memdec.harness import scoring
from memdec.inference.mixture import MemDecForCausalLM
from memdec.maths import statistics
from memdec.maths.exact_search import Nearest
from memdec.maths.knn import aggregate
from memdec.maths.losses import block_rows, fused_loss
from memdec.maths.objectives import Hybrid
from memdec.maths.windows import windows
from memdec.models import loading
from memdec.settings import DatastoreSettings, IndexSettings, TargetSettings
from memdec.training import fitting
from memdec.training.batches import Collate

Work = Callable[[], Any]


@dataclass(frozen=True)
class Files:
    """Result of a case that writes files: the folder, whose size is reported, and a function that reads it."""

    folder: Path
    read: Callable[[Path], Any]

    @property
    def n_bytes(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


def _as_is(result: Any) -> tuple[Tensor, ...]:
    return tuple(result)


@dataclass(frozen=True)
class Case:
    """One benchmark; `unit` is the CPU seconds of one call, or the work done per CPU second."""

    name: str
    make: Callable[[int], tuple[Work, Work]]
    n: int
    n_quick: int
    unit: Literal["CPU s", "rows/s", "tokens/s", "queries/s"]
    better: Literal["lower", "higher"]
    tolerance: float  # relative L2 between ours and the twin; inf if the twin is only a lower bound
    plain: Callable[[Any], tuple[Tensor, ...]] = _as_is


V, D, ENTRIES = 50_257, 256, 64


def loss_inputs(n: int, vocab: int = V, width: int = D) -> tuple[Tensor, ...]:
    """Random hidden (n, D), head (V, D), labels (n,), and targets with 64 entries per row: indptr, tokens, probs."""
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, width, generator=gen)
    head = torch.randn(vocab, width, generator=gen) * 0.05
    labels = torch.randint(0, vocab, (n,), generator=gen)
    tokens = torch.randint(0, vocab - ENTRIES, (n, 1), generator=gen) + torch.arange(ENTRIES)
    probs = torch.rand(n, ENTRIES, generator=gen)
    indptr = torch.arange(n + 1) * ENTRIES
    return hidden, head, labels, indptr, tokens.flatten(), (probs / probs.sum(1, keepdim=True)).flatten()


def _ours_loss(inputs: tuple[Tensor, ...]) -> Work:
    hidden, head, *rest = inputs

    def work() -> tuple[Tensor, ...]:
        h, w = hidden.detach().requires_grad_(), head.detach().requires_grad_()
        fused_loss(h, w, *rest, Hybrid(0.5)).loss.backward()
        assert h.grad is not None
        assert w.grad is not None
        return h.grad, w.grad

    return work


def dense_hybrid(hidden: Tensor, head: Tensor, labels: Tensor, indptr: Tensor, tokens: Tensor, probs: Tensor) -> Tensor:
    """The hybrid loss with beta 0.5, summed over rows, from a dense target and full logits."""
    target = torch.zeros(len(labels), len(head), device=hidden.device)
    rows = torch.repeat_interleave(torch.arange(len(labels), device=hidden.device), indptr.diff())
    target[rows, tokens] = probs
    log_q = torch.log_softmax(hidden @ head.T, -1, dtype=torch.float32)
    kl = torch.nn.functional.kl_div(log_q, target, reduction="sum")
    return 0.5 * kl + 0.5 * torch.nn.functional.nll_loss(log_q, labels, reduction="sum")


def loss(n: int) -> tuple[Work, Work]:
    """Hybrid loss, forward and backward, against dense targets, full logits and autograd."""
    inputs = loss_inputs(n)

    def twin() -> tuple[Tensor, ...]:
        h, w = (x.detach().requires_grad_() for x in inputs[:2])
        dense_hybrid(h, w, *inputs[2:]).backward()
        assert h.grad is not None
        assert w.grad is not None
        return h.grad, w.grad

    return _ours_loss(inputs), twin


def loss_floor(n: int) -> tuple[Work, Work]:
    """The same loss against only its three matrix products in the same blocks, a lower bound of its time."""
    inputs = loss_inputs(n)
    hidden, head = inputs[:2]
    rows = block_rows(n, V, "cpu")

    def twin() -> tuple[Tensor, ...]:
        grad_h, grad_w = torch.empty_like(hidden), torch.zeros_like(head)
        block = torch.empty(rows, V)  # reused, as in our loss: new blocks would add page faults
        for begin in range(0, n, rows):
            h = hidden[begin : begin + rows]
            logits = torch.mm(h, head.T, out=block[: len(h)])
            torch.mm(logits, head, out=grad_h[begin : begin + rows])
            grad_w.addmm_(logits.T, h)
        return grad_h, grad_w

    return _ours_loss(inputs), twin


Rows = list[tuple[NDArray[np.int64], NDArray[np.float32]]]
_WINDOW = 512


def _target_rows(n: int) -> tuple[TargetReader, Rows]:
    """Targets of n positions with 100 to 500 entries (k = 1024): a shard on disk, and its rows as a list."""
    rng, folder = np.random.default_rng(0), _scratch() / "targets"
    counts = rng.integers(100, 500, n)
    rows: Rows = []
    for count in counts:
        ids, p = rng.choice(V, count, replace=False), rng.random(count, np.float32)
        rows.append((ids, p / p.sum()))
    with artefact.building(folder, "targets", {}, {}) as build:
        assert build is not None
        np.save(folder / "indptr.npy", np.concatenate([[0], np.cumsum(counts)]))
        np.save(folder / "tokens.npy", np.concatenate([ids for ids, _ in rows]).astype(np.uint16))
        np.save(folder / "probs.npy", np.concatenate([p for _, p in rows]))
        build.facts.update(begin=0, end=n, positions=n, entries=int(counts.sum()), tokens_sha256="made")
    return TargetReader([folder], "made"), rows


def _windows(n: int) -> list[dict[str, Any]]:
    """Training items: n positions in windows of 512."""
    ids = np.random.default_rng(1).integers(0, V, n)
    spans = [(first, min(first + _WINDOW, n)) for first in range(0, n, _WINDOW)]
    return [{"first": a, "end": b, "inputs": ids[a:b], "labels": ids[a:b]} for a, b in spans]


def _dense_batch(items: list[dict[str, Any]], rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels and dense targets (B, T, V), made row by row."""
    width = max(len(item["inputs"]) for item in items)
    ids, labels = (torch.full((len(items), width), fill) for fill in (0, -100))
    target = torch.zeros(len(items), width, V)
    for i, item in enumerate(items):
        ids[i, : len(item["inputs"])] = torch.tensor(item["inputs"].tolist())
        labels[i, : len(item["labels"])] = torch.tensor(item["labels"].tolist())
        for t, position in enumerate(range(item["first"], item["end"])):
            tokens, probs = rows[position]
            target[i, t, torch.from_numpy(tokens)] = torch.from_numpy(probs)
    return ids, labels, target


def collate(n: int) -> tuple[Work, Work]:
    """A batch of windows of 512 with their targets, against dense targets and a loop over rows."""
    reader, rows = _target_rows(n)
    ours, items = Collate(reader), _windows(n)
    return lambda: ours(items), lambda: _dense_batch(items, rows)


def _batch(result: Any) -> tuple[Tensor, ...]:
    """Labels and the entries of the targets in the order of their tokens."""
    if isinstance(result, dict):
        row = torch.repeat_interleave(torch.arange(len(result["target_indptr"]) - 1), result["target_indptr"].diff())
        order = torch.argsort(row * V + result["target_tokens"])
        token, p, row = result["target_tokens"][order], result["target_probs"][order], row[order]
        return result["labels"].double(), token.double(), row.double(), p
    _, labels, target = result
    row, token = target.flatten(0, 1).nonzero(as_tuple=True)
    return labels.double(), token.double(), row.double(), target.flatten(0, 1)[row, token]


def step(n: int, width: int, layers: int) -> tuple[Work, Work]:
    """A training step of a GPT-2 on n tokens in windows of 512, from the rows on disk to the AdamW update.

    The twin is the same model with dense targets, full logits, separate softmaxes for KL and CE, and autograd.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    reader, rows = _target_rows(n)
    items, gather = _windows(n), Collate(reader)
    plain = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(n_embd=width, n_layer=layers, n_head=width // 64, n_positions=_WINDOW, **plain)

    def side(loss_of: Callable[[Any], Tensor], fused: bool) -> Work:
        """A training step of a separate model; a second call is the next step. The result is two of the gradients.

        `fused`: activation and optimizer as in our training; else the defaults.
        """
        made: list[Any] = []

        def work() -> tuple[Tensor, ...]:
            if not made:
                torch.manual_seed(0)
                lm = GPT2LMHeadModel(config)
                if fused:
                    loading.fuse_activations(lm)
                made.extend((lm, torch.optim.AdamW(lm.parameters(), lr=1e-4, weight_decay=0.0, fused=fused or None)))
            lm, optimizer = made
            loss_of(lm).backward()
            torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
            grads = tuple(p.grad.detach().clone() for p in (lm.transformer.wte.weight, lm.transformer.h[0].ln_1.weight))
            optimizer.step()
            optimizer.zero_grad()
            return grads

        return work

    def ours(lm: Any) -> Tensor:
        loss: Tensor = fitting.LossModel(lm, Hybrid(0.5))(**gather(items), num_items_in_batch=n)["loss"]
        return loss

    def twin(lm: Any) -> Tensor:
        ids, labels, target = _dense_batch(items, rows)
        logits = lm(input_ids=ids).logits
        keep = labels != -100
        kl = torch.nn.functional.kl_div(torch.log_softmax(logits[keep], -1), target[keep], reduction="sum")
        ce = torch.nn.functional.cross_entropy(logits[keep], labels[keep], reduction="sum")
        return (0.5 * kl + 0.5 * ce) / n

    return side(ours, fused=True), side(twin, fused=False)


def neighbour_batches(n: int, batch: int, k: int = 1024, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
    """Squared distances and tokens of the neighbours of n positions, in batches, each (batch, k).

    Each row has a few frequent tokens and a Zipf tail, about 280 distinct tokens among 1024 neighbours.
    """
    rng = np.random.default_rng(0)
    values = torch.from_numpy((rng.zipf(1.3, (n, k)) + rng.integers(0, 40, (n, 1))) % V).to(device)
    sq_dist = torch.from_numpy(np.sort(rng.gamma(9, 8, (n, k)), axis=1).astype(np.float32)).to(device)
    return list(zip(sq_dist.split(batch), values.split(batch), strict=True))


def dense_rows(sq_dist: Tensor, values: Tensor, temperature: float) -> Tensor:
    """p_kNN over the whole vocabulary, shape (batch, V)."""
    dense = torch.zeros(len(values), V, device=values.device)
    return dense.scatter_add_(1, values, torch.softmax(-sq_dist / temperature, dim=1))


def aggregation(n: int, batch: int) -> tuple[Work, Work]:
    """p_kNN rows from 1024 neighbours, against a dense scatter and a loop over rows."""
    temperature, batches = 16.0, neighbour_batches(n, batch)

    def ours() -> list[tuple[Tensor, Tensor, Tensor]]:
        return [aggregate(d, v, temperature) for d, v in batches]

    def twin() -> list[tuple[list[int], list[float]]]:
        parts = []
        for d, v in batches:
            for row in dense_rows(d, v, temperature):  # row by row as lists, as earlier target files were written
                ids = row.nonzero().flatten()
                parts.append((ids.tolist(), row[ids].tolist()))
        return parts

    return ours, twin


def cells(result: Any) -> tuple[Tensor, ...]:
    """Probabilities of all rows in token order, and a product that depends on row and token, from any format."""
    if isinstance(result, Files):
        result = result.read(result.folder)
    if len(result[0]) == 3:  # batches of (counts, tokens, probs)
        counts, tokens, probs = (torch.cat(parts) for parts in zip(*result, strict=True))
        rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
        order = torch.argsort(rows * V + tokens)
        return probs[order], probs[order] * (tokens[order] % 97 + rows[order] % 89) / 97
    flat = [(row, token, p) for row, (ids, probs) in enumerate(result) for token, p in zip(ids, probs, strict=True)]
    rows, tokens, probs = (torch.tensor(column) for column in zip(*flat, strict=True))
    return probs, probs * (tokens % 97 + rows % 89) / 97


def _scratch() -> Path:
    """A temporary folder that is removed when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="memdec-bench-")
    _KEPT.append(folder)
    return Path(folder.name)


_KEPT: list[Any] = []
_PASS = 8192  # positions of a forward pass, e.g. 16 windows with stride 512


def keys_write(n: int) -> tuple[Work, Work]:
    """Write keys of forward passes to disk in float16 with an overflow check, against a list of rows saved at the end."""
    hidden = torch.randn(_PASS, D, generator=torch.Generator().manual_seed(0))
    passes = [(first, min(_PASS, n - first)) for first in range(0, n, _PASS)]

    def ours() -> Files:
        folder = _scratch()
        path = folder / "keys.npy"
        keys = np.lib.format.open_memmap(path, mode="w+", dtype=datastore.DISK["float16"], shape=(n, D))
        for first, length in passes:
            keys[first : first + length] = datastore.narrow(hidden[:length], first, "float16")
        keys.flush()
        return Files(folder, lambda folder: np.load(folder / "keys.npy"))

    def twin() -> Files:
        folder, rows = _scratch(), []
        for _, length in passes:
            rows.extend(row.numpy() for row in hidden[:length].half())
        np.save(folder / "keys.npy", np.stack(rows))
        return Files(folder, lambda folder: np.load(folder / "keys.npy"))

    return ours, twin


def _keys(result: Any) -> tuple[Tensor, ...]:
    keys = result.read(result.folder) if isinstance(result, Files) else result
    return (torch.from_numpy(np.asarray(keys, np.float32)),)


def _store(n: int, width: int, vocab: int = V) -> tuple[Path, Path, NDArray[np.float16]]:
    """(datastore, token stream, keys) of a random store: 500 clusters with a few frequent tokens each."""
    rng = np.random.default_rng(0)
    cluster = rng.integers(0, 500, n)
    keys = ((rng.normal(size=(500, width)) * 0.7)[cluster] + rng.normal(size=(n, width))).astype(np.float16)
    values = ((cluster * 97 + rng.zipf(1.6, n)) % vocab).astype(np.uint16)
    return *write_store(keys, values, vocab), keys


def write_store(keys: NDArray[np.float16], values: NDArray[np.uint16], vocab: int = V) -> tuple[Path, Path]:
    """(datastore, token stream) of given keys and tokens, in a temporary folder."""
    folder, (n, width) = _scratch(), keys.shape
    with artefact.building(folder / "tokens", "tokens", {}, {}) as build:
        assert build is not None
        np.save(folder / "tokens" / "train.npy", values)
        build.facts["sha256"] = {"train": "made"}
    tokens = artefact.read(folder / "tokens", "tokens").recipe
    plain = {**DatastoreSettings().model_dump(mode="json"), "context": 1024, "stride": 512, "shard": 0}
    plain["precision"] = "float32"
    with artefact.building(folder / "store", "datastore", plain, {"model": "made", "tokens": tokens}) as build:
        assert build is not None
        np.save(folder / "store" / "keys.npy", keys)
        build.facts.update(
            begin=0,
            end=n,
            positions=n,
            width=width,
            keys_recipe="made",
            tokens_sha256="made",
            vocab_size=vocab,
            model="none",
            tokens="../tokens",
        )
    return folder / "store", folder / "tokens"


def keys_read(n: int) -> tuple[Work, Work]:
    """Read all keys of a store in float32 blocks, as for an index, against a list of rows per block."""
    folder, _, _ = _store(n, D)
    block = 65_536

    def ours() -> NDArray[np.float32]:
        total = np.zeros(D, np.float32)
        for _, keys in datastore.Datastore(folder).blocks(0, n, block):
            total += keys[::16].sum(0)
        return total

    def twin() -> NDArray[np.float32]:
        on_disk = np.load(folder / "keys.npy", mmap_mode="r")
        total = np.zeros(D, np.float32)
        for first in range(0, n, block):
            keys = np.stack(list(on_disk[first : first + block])).astype(np.float32)
            total += keys[::16].sum(0)
        return total

    return ours, twin


def search(n: int) -> tuple[Work, Work]:
    """1,025 exact neighbours of 256 queries per call among 100,000 keys, against matrix product and argpartition."""
    gen = torch.Generator().manual_seed(0)
    keys, neighbours = torch.randn(100_000, D, generator=gen), 1025
    batches = torch.randn(n, D, generator=gen).split(256)

    def ours() -> Tensor:
        found = []
        for queries in batches:
            nearest = Nearest(queries, neighbours)
            for first in range(0, len(keys), 4096):
                nearest.update(keys[first : first + 4096], first)
            found.append(nearest.result()[0].sort(1).values)
        return torch.cat(found)

    def twin() -> Tensor:
        found, plain = [], keys.numpy()
        norms = (plain**2).sum(1)
        for queries in batches:
            q = queries.numpy()
            sq_dist = norms - 2 * (q @ plain.T) + (q**2).sum(1, keepdims=True)
            near = np.argpartition(sq_dist, neighbours, axis=1)[:, :neighbours]
            found.append(torch.from_numpy(np.sort(np.take_along_axis(sq_dist, near, axis=1), axis=1)))
        return torch.cat(found)

    return ours, twin


def targets_end_to_end(n: int) -> tuple[Work, Work]:
    """Targets of a store, k = 256, from keys to files, against numpy search, dense scatter, a loop and JSON lists."""
    width, k, temperature = 64, 256, 16.0
    store, stream, keys = _store(n, width, 20_000)
    index.run(store, store.parent / "index", IndexSettings(kind="exact", check_queries=1))

    def ours() -> Files:
        folder = _scratch()
        settings = TargetSettings(neighbours=k, temperature=temperature)
        targets.run(store, store.parent / "index", stream, folder / "t", settings)
        return Files(folder, _read_targets)

    def twin() -> Files:
        folder, wide = _scratch(), keys.astype(np.float32)
        values, norms = torch.from_numpy(np.load(stream / "train.npy").astype(np.int64)), (wide**2).sum(1)
        with (folder / "rows.jsonl").open("w") as file:
            for first in range(0, n, 1024):
                q = wide[first : first + 1024]
                sq_dist = norms - 2 * (q @ wide.T) + (q**2).sum(1, keepdims=True)
                sq_dist[np.arange(len(q)), first + np.arange(len(q))] = np.inf  # the query itself
                near = np.argpartition(sq_dist, k, axis=1)[:, :k]
                d = torch.from_numpy(np.take_along_axis(sq_dist, near, axis=1))
                dense = torch.zeros(len(q), 20_000)
                dense.scatter_add_(1, values[torch.from_numpy(near)], torch.softmax(-d / temperature, dim=1))
                for row in dense:
                    ids = row.nonzero().flatten()
                    file.write(json.dumps([ids.tolist(), row[ids].tolist()]) + "\n")
        return Files(folder, lambda folder: [json.loads(line) for line in (folder / "rows.jsonl").open()])

    return ours, twin


def _read_targets(folder: Path) -> list[tuple[Tensor, ...]]:
    indptr, tokens, probs = (np.load(folder / "t" / f"{name}.npy") for name in ("indptr", "tokens", "probs"))
    return [tuple(torch.from_numpy(x) for x in (np.diff(indptr), tokens.astype(np.int64), probs))]


def _sparse_l2(result: Any) -> tuple[Tensor, ...]:
    """As `cells`, without entries that only one side rounds to zero in float32."""
    probs, mixed = cells(result)
    return probs[probs > 1e-7], mixed[probs > 1e-7]


def alpha_sweep(n: int) -> tuple[Work, Work]:
    """Perplexity at 10 alphas of two 4-layer GPT-2s, windows of 1,024, against one pass of both models per alpha."""
    return sweep_of(n, V, 256, 4)


def sweep_of(
    n: int, vocab: int, width: int, layers: int, context: int = 1024, device: str = "cpu"
) -> tuple[Work, Work]:
    """The same for GPT-2s of any size on any device."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(vocab_size=vocab, n_embd=width, n_layer=layers, n_head=width // 64, **ends)
    with torch.device(device):
        base, memory = (GPT2LMHeadModel(config).eval() for _ in range(2))
    stream = np.random.default_rng(0).integers(0, vocab, n)
    parts, alphas = windows(n, context, context // 2), [k / 10 for k in range(1, 11)]
    mixture = MemDecForCausalLM.from_models(base, [memory], [0.5])

    def ours() -> tuple[Tensor]:
        scores = scoring.score_stream(mixture, stream, parts, 0, batch_size=4, quiet=True)
        return (torch.tensor([statistics.perplexity(scores.log_p(alpha)) for alpha in alphas]),)

    @torch.no_grad()
    def twin() -> tuple[Tensor]:
        found = []
        for alpha in alphas:
            nll = torch.zeros((), device=device)
            for part in parts:
                ids = torch.from_numpy(part.inputs(stream, 0))[None].to(device)
                p = alpha * memory(ids).logits.softmax(-1) + (1 - alpha) * base(ids).logits.softmax(-1)
                labels = torch.from_numpy(stream[part.begin : part.end]).to(device)
                nll -= p[0].log().gather(-1, labels[:, None])[part.first - part.begin :].sum()
            found.append(math.exp(nll / n))
        return (torch.tensor(found),)

    return ours, twin


def dcpmi(n: int) -> tuple[Work, Work]:
    """DCPMI of 4 labels with 150 words each on n texts of about 60 tokens, a GPT-2 of 4 layers, batches of 32.

    Our side starts from texts, as the task does. The twin starts from token ids: one plain forward pass per row, padded
    on the right, with logits of the last position only.
    """
    from lm_eval.api.instance import Instance
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    from memdec.harness.models import MemDecInterp
    from memdec.tasks.dcpmi import EPSILON, LabelWords, label_scores

    folder, rng = _scratch() / "model", np.random.default_rng(0)
    names = [":", "<end>", *(f"w{i}" for i in range(2, V))]
    split = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<end>"))
    split.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=split, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=256, n_layer=4, n_head=4, eos_token_id=1)).save_pretrained(folder)
    rows = [rng.integers(2, V, max(5, length)).tolist() for length in rng.gamma(9, 6.5, n).astype(int)]
    ids = rng.choice(np.arange(2, V), 600, replace=False)
    words = LabelWords(tuple(f" w{i}" for i in ids), tuple(np.arange(600).reshape(4, 150)), np.arange(4))
    premise = [7, 8]
    lm = MemDecInterp(pretrained=str(folder), device="cpu", batch_size=32)
    plain = GPT2LMHeadModel.from_pretrained(folder).eval()

    def ours() -> tuple[Tensor]:
        texts = [" ".join(f"w{i}" for i in row) for row in (premise, *rows)]
        prior, colon, *found = lm.label_word_probs(
            [
                Instance("label_word_probs", {}, (text, words.texts, 1024), i)
                for i, text in enumerate((texts[0], ":", *texts[1:]))
            ],
            disable_tqdm=True,
        )
        return (torch.tensor([label_scores(log_p, prior, colon, words)["acc"] for log_p in found]),)

    @torch.inference_mode()
    def twin() -> tuple[Tensor]:
        order = sorted(range(n), key=lambda i: -len(rows[i]))
        wanted, out = torch.from_numpy(ids), torch.zeros(n, 4)
        prior = plain(torch.tensor([premise])).logits[0, -1].softmax(-1)[wanted]
        for first in range(0, n, 32):
            batch = order[first : first + 32]
            lengths = torch.tensor([len(rows[i]) for i in batch])
            padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(rows[i]) for i in batch], batch_first=True)
            hidden = plain.transformer(padded).last_hidden_state[torch.arange(len(batch)), lengths - 1]
            p = plain.lm_head(hidden).softmax(-1)[:, wanted]
            ratios = (p + EPSILON).log() - (prior + EPSILON).log()
            out[batch] = ratios.reshape(-1, 4, 150).sum(-1)
        return (out,)

    return ours, twin


CASES = [
    Case("keys_write", keys_write, 300_000, 30_000, "tokens/s", "higher", 0.0, _keys),
    Case("keys_read", keys_read, 300_000, 70_000, "tokens/s", "higher", 1e-6, _keys),
    Case("search", search, 512, 256, "queries/s", "higher", 1e-5, lambda found: (found,)),
    Case("aggregation_32", partial(aggregation, batch=32), 2048, 256, "rows/s", "higher", 1e-6, cells),
    Case("aggregation_2048", partial(aggregation, batch=2048), 2048, 256, "rows/s", "higher", 1e-6, cells),
    Case("targets", targets_end_to_end, 20_000, 3_000, "tokens/s", "higher", 1e-3, _sparse_l2),
    Case("collate", collate, 8 * 512, 512, "CPU s", "lower", 1e-6, _batch),
    Case("step_small", partial(step, width=256, layers=4), 8 * 512, 512, "CPU s", "lower", 1e-4),
    Case("step_gpt2", partial(step, width=768, layers=12), 1024, 512, "CPU s", "lower", 1e-4),
    Case("loss", loss, 8 * 512, 512, "CPU s", "lower", 2e-6),
    Case("loss_floor", loss_floor, 8 * 512, 512, "CPU s", "lower", float("inf")),
    Case("alpha_sweep", alpha_sweep, 2048, 1200, "CPU s", "lower", 2e-6),
    Case("dcpmi", dcpmi, 2000, 200, "CPU s", "lower", 1e-4),
]
