"""Speculative decoding of the mixture, with its memory as the drafter (Leviathan et al. 2023, arXiv 2211.17192).

The target is p_joint = alpha p_mem + (1 - alpha) p_base, and the memory is part of it. Verifying needs p_mem too, and
drafting has computed it already, so the memory runs once per token and the base once per round:

    memory   d1 d2 d3 d4              n_draft tokens, one after the other, their distributions kept
    base     .. d1 d2 d3 d4           one forward gives p_base at d1 .. d4 and after d4
    joint    ok ok x                  up to the first rejection, which is replaced; all accepted: a bonus token, free

Decoding is greedy and gives the tokens of `model.generate(do_sample=False)`. A base that reads several tokens at once
rounds its logits otherwise than one by one, so only a tie within that rounding may fall otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from memdec.errors import ConfigError
from memdec.inference.mixture import MemDecForCausalLM
from memdec.maths import mixing


@dataclass(frozen=True, slots=True)
class Result:
    """A generated text and where its tokens came from: new tokens = accepted + corrected + bonus.

    Attributes:
        sequences: Prompt and new tokens, shape (1, T).
        n_base_forwards: Forward passes of the base, the one that reads the prompt included.
        n_drafted: Tokens the memory drew; those after the first rejection of a round were never looked at.
        n_accepted: Drafted tokens in the text.
        n_corrected: Tokens in the place of a rejected one.
        n_bonus: Tokens after a round without rejection.
    """

    sequences: Int[Tensor, "1 T"]
    n_base_forwards: int
    n_drafted: int
    n_accepted: int
    n_corrected: int
    n_bonus: int

    @property
    def acceptance(self) -> float | None:
        """Share of the drafted tokens that were looked at and accepted; None where none was."""
        looked_at = self.n_accepted + self.n_corrected
        return self.n_accepted / looked_at if looked_at else None


@torch.no_grad()
def generate(
    model: MemDecForCausalLM,
    input_ids: Int[Tensor, "1 T"],
    *,
    max_new_tokens: int,
    n_draft: int = 4,
    eos_token_id: int | Sequence[int] | None = None,
) -> Result:
    """Continue one text with the tokens that the mixture would give, in fewer forward passes of the base.

    Args:
        model: A mixture with one memory.
        input_ids: The prompt, one row without padding.
        max_new_tokens: Most new tokens; exactly so many where no EOS comes.
        n_draft: Tokens that the memory drafts per round.
        eos_token_id: Where to stop; default as `model.generation_config` says, `()` stops nowhere.

    Raises:
        ConfigError: More than one row or memory, no prompt, or more tokens than the models have positions.
    """
    _check(model, input_ids, max_new_tokens, n_draft)
    if eos_token_id is None:
        eos_token_id = model.generation_config.eos_token_id
    stops = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
    base, memory = (_Reader(part, model) for part in (model.base, model.memories[0]))
    ids, n_prompt = input_ids.to(model.device), input_ids.shape[1]
    n_rounds = n_drafted = n_accepted = n_corrected = n_bonus = 0
    while (left := n_prompt + max_new_tokens - ids.shape[1]) > 0:
        n = min(n_draft, left - 1)  # not the last token: whatever the drafts are worth, their round gives one more
        new, rejected = _round(base, memory, ids, n, model.config.weights)
        kept = len(new) - 1
        stop = next((i for i, token in enumerate(new.tolist()) if token in stops), None)
        new = new if stop is None else new[: stop + 1]
        ids = torch.cat([ids, new[None]], dim=1)
        n_rounds, n_drafted, n_accepted = n_rounds + 1, n_drafted + n, n_accepted + min(kept, len(new))
        if len(new) > kept:
            n_corrected, n_bonus = n_corrected + rejected, n_bonus + (not rejected)
        if stop is not None:
            break
    return Result(ids, n_rounds, n_drafted, n_accepted, n_corrected, n_bonus)


def _check(model: MemDecForCausalLM, input_ids: Tensor, max_new_tokens: int, n_draft: int) -> None:
    if len(model.memories) != 1:
        raise ConfigError(f"speculative: expected a mixture with one memory to draft, found {len(model.memories)}")
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or not input_ids.shape[1]:
        raise ConfigError(
            f"speculative: expected one prompt, shape (1, T), found {tuple(input_ids.shape)}; call it for one text at a time"
        )
    for name, value in (("max_new_tokens", max_new_tokens), ("n_draft", n_draft)):
        if value < 1:
            raise ConfigError(f"speculative: expected {name} of at least 1, found {value}")
    # The last new token is not read any more.
    model.check_length(input_ids.new_empty(1, input_ids.shape[1] + max_new_tokens - 1, device="meta"), None)


class _Reader:
    """One model and the cache of the text that it has read."""

    def __init__(self, part: Any, model: MemDecForCausalLM) -> None:
        self._part, self.n_vocab, self._device = part, model.n_vocab, model.device
        self._n_read = 0
        self._cache = DynamicCache(config=part.config)
        self._cache.activate_past_recording()  # sliding windows would forget what a rejection needs back

    def read(self, ids: Int[Tensor, "1 T"], keep: int) -> Float[Tensor, "keep V"]:
        """log p after each of the last `keep` tokens of a text that goes on where the last one ended."""
        new = ids[:, self._n_read :].to(self._part.device)
        out = self._part(input_ids=new, past_key_values=self._cache, use_cache=True, logits_to_keep=keep)
        self._n_read = ids.shape[1]
        return mixing.log_softmax(out.logits[0], self.n_vocab).to(self._device)

    def forget(self, known: int) -> None:
        """Keep only the first `known` tokens."""
        self._cache.crop(known - self._n_read)
        self._n_read = known


def _round(
    base: _Reader, memory: _Reader, ids: Int[Tensor, "1 T"], n: int, weights: list[float]
) -> tuple[Int[Tensor, " kept+1"], bool]:
    """Draft n tokens, verify them, and give those that stand with one more; and whether a draft was rejected."""
    text, log_q = _draft(memory, ids, n)
    drafts = text[0, ids.shape[1] :]
    log_p_base = base.read(text, n + 1)
    kept, last = _verify(drafts, mixing.mix(log_p_base[:n], [log_q], weights))
    rejected = last is not None
    if last is None:
        last = mixing.mix(log_p_base[n:], [memory.read(text, 1)], weights).argmax(-1)
    base.forget(ids.shape[1] + kept)
    memory.forget(ids.shape[1] + kept)
    return torch.cat([drafts[:kept], last]), rejected


def _draft(memory: _Reader, ids: Int[Tensor, "1 T"], n: int) -> tuple[Int[Tensor, "1 T+n"], Float[Tensor, "n V"]]:
    """The text with n tokens of the memory, and log p_mem of each of their positions."""
    rows = [torch.empty(0, memory.n_vocab, device=ids.device)]
    for _ in range(n):
        rows.append(memory.read(ids, 1))
        ids = torch.cat([ids, rows[-1].argmax(-1)[None]], dim=1)
    return ids, torch.cat(rows)


def _verify(drafts: Int[Tensor, " n"], log_p: Float[Tensor, "n V"]) -> tuple[int, Int[Tensor, " 1"] | None]:
    """How many drafts are the most probable tokens, and what replaces the next one (None: all stand).

    Of equally probable tokens the first counts, as in `generate`.
    """
    best = log_p.argmax(-1)
    kept = int((drafts == best).long().cumprod(0).sum())
    return kept, best[kept : kept + 1] if kept < len(drafts) else None
