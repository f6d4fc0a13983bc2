"""The loss and a whole training step on CUDA: `python -m benchmarks.gpu [--out results/gpu.csv]`.

16 windows of 1,024 tokens with 64 entries each, as the paper's models have them (bfloat16 autocast over float32 weights),
against dense targets, full logits and autograd on the same device. Milliseconds between CUDA events, the median of the
repeats, ours and the twin in turn; memory is the growth of the allocator's peak over the inputs. Losses and gradients
are compared before timing.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.cases import ENTRIES, dense_hybrid, loss_inputs
from benchmarks.run import write
from memdec import fitting, models
from memdec.losses import fused_loss
from memdec.objectives import Hybrid

COLUMNS = ["benchmark", "vocabulary", "width", "ours_ms", "twin_ms", "ratio", "peak_gb_ours", "peak_gb_twin", "device"]
WINDOWS, LENGTH, TOLERANCE = 16, 1024, 2e-2  # relative L2 in bfloat16
VOCABULARIES = {50_257: 768, 151_936: 896}  # GPT-2 small and Qwen2.5-0.5B, with their widths
Work = Callable[[], list[Tensor]]


def loss(vocab: int, width: int, n: int, device: str) -> tuple[Work, Work]:
    """Hybrid loss, forward and backward: the loss and the gradients of hidden states and head."""
    hidden, head, *rest = (x.to(device) for x in loss_inputs(n, vocab, width))

    def side(loss_of: Callable[..., Tensor]) -> Work:
        def work() -> list[Tensor]:
            h, w = hidden.detach().requires_grad_(), head.detach().requires_grad_()
            with torch.autocast(device, torch.bfloat16):
                loss = loss_of(h, w, *rest)
            return [loss.detach(), *torch.autograd.grad(loss, (h, w))]

        return work

    return side(lambda *inputs: fused_loss(*inputs, Hybrid(0.5)).loss), side(dense_hybrid)


def step(vocab: int, width: int, n: int, device: str) -> tuple[Work, Work]:
    """Forward, backward, clipping and AdamW of a GPT-2 of 12 layers: the loss and the gradient of the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    _, _, labels, indptr, tokens, probs = (x.to(device) for x in loss_inputs(n, vocab, 1))
    ids = labels.reshape(-1, min(n, LENGTH))
    begins = torch.arange(0, n, ids.shape[1], device=device)
    batch = {
        "input_ids": ids,
        "labels": ids,
        "spans": torch.stack([begins, begins + ids.shape[1]], 1),
        "target_indptr": indptr,
        "target_tokens": tokens,
        "target_probs": probs,
    }
    plain = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=vocab, n_embd=width, n_layer=12, n_head=width // 64, **plain)

    def side(loss_of: Callable[[Any], Tensor], fused: bool) -> Work:
        made: list[Any] = []

        def work() -> list[Tensor]:
            if not made:  # a model of its own; a second call is the next step
                torch.manual_seed(0)
                lm = GPT2LMHeadModel(config).to(device)
                if fused:
                    models.fuse_activations(lm)
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


def measure(sides: tuple[Work, Work], repeats: int) -> tuple[list[float], list[float]]:
    """Of ours and the twin: median milliseconds, and growth of the peak in GB."""
    for one, other in zip(*(work() for work in sides), strict=True):
        distance = float((one - other).norm() / other.norm())
        if not distance <= TOLERANCE:
            sys.exit(f"ours and the twin differ by {distance:.1e}, allowed {TOLERANCE:.0e}")
    times: list[list[float]] = [[], []]
    peaks = [0.0, 0.0]
    for _ in range(repeats):
        for k, work in enumerate(sides):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times[k].append(begin.elapsed_time(end))
            peaks[k] = (torch.cuda.max_memory_allocated() - before) / 1e9
    return [statistics.median(t) for t in times], peaks


def main() -> None:
    """Measure and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("results/gpu.csv"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu needs a CUDA device; found none. On CPU: make bench")
    rows: list[dict[str, object]] = []
    for make in (loss, step):
        for vocab, width in tqdm(VOCABULARIES.items(), desc=make.__name__):
            (ours, twin), (ours_gb, twin_gb) = measure(make(vocab, width, WINDOWS * LENGTH, "cuda"), args.repeats)
            rows.append(
                {
                    "benchmark": f"{make.__name__}, {WINDOWS} x {LENGTH:,} tokens, {ENTRIES} entries",
                    "vocabulary": vocab,
                    "width": width,
                    "ours_ms": f"{ours:.1f}",
                    "twin_ms": f"{twin:.1f}",
                    "ratio": f"{twin / ours:.2f}",
                    "peak_gb_ours": f"{ours_gb:.2f}",
                    "peak_gb_twin": f"{twin_gb:.2f}",
                    "device": torch.cuda.get_device_name(),
                }
            )
    write(args.out, COLUMNS, rows)


if __name__ == "__main__":
    main()
