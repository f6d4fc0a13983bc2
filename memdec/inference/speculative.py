"""Speculative decoding of the mixture, with its memory as the drafter (Leviathan et al. 2023, arXiv 2211.17192).

The target is p_joint = alpha p_mem + (1 - alpha) p_base, so the memory is part of the target. Verifying needs p_mem too,
but drafting has computed it already. So the memory runs once per token and the base once per round:

    memory   d1 d2 d3 d4              drafts n_draft tokens one by one and keeps their distributions
    base     .. d1 d2 d3 d4           one forward pass gives p_base at d1 .. d4 and after d4
    joint    ok ok x                  replace the first rejected token; if all are accepted, add a bonus token

Decoding is greedy and gives the same tokens as `model.generate(do_sample=False)`, except for ties within rounding error:
a base that reads several tokens at once rounds its logits differently. The logits processors of the generation config
(repetition penalty, suppressed tokens ...) act on every token, as there. What cannot give the same tokens is refused.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerationMode

from memdec.errors import ConfigError, ModelError
from memdec.inference.mixture import MemDecForCausalLM
from memdec.inference.wrapper import Reader
from memdec.maths import mixing
from memdec.models import rope

# Settings of a generation config that `generate` obeys and that need more than one pass over the text, or more than
# the ids before a token.
_REFUSED = {
    "guidance_scale": (None, 1.0),
    "watermarking_config": (None,),
    "token_healing": (None, False),
    "stop_strings": (None,),
}


@dataclass(frozen=True, slots=True)
class Result:
    """A generated text and where its tokens came from: new tokens = accepted + corrected + bonus.

    Attributes:
        sequences: Prompt and new tokens, shape (1, T).
        n_base_forwards: Forward passes of the base, including the one that reads the prompt.
        n_drafted: Tokens that the memory drafted; those after the first rejection of a round are not tested.
        n_accepted: Drafted tokens in the text.
        n_corrected: Tokens that replace a rejected one.
        n_bonus: Extra tokens of rounds without a rejection.
    """

    sequences: Int[Tensor, "1 T"]
    n_base_forwards: int
    n_drafted: int
    n_accepted: int
    n_corrected: int
    n_bonus: int

    @property
    def acceptance(self) -> float | None:
        """Fraction of the tested drafts that were accepted; None if none was tested."""
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
    """Continue one text as the mixture would, with fewer forward passes of the base.

    Args:
        model: A mixture with one memory.
        input_ids: The prompt, one row without padding.
        max_new_tokens: Maximum number of new tokens; fewer only if an EOS token comes first.
        n_draft: Tokens that the memory drafts per round.
        eos_token_id: Tokens that end the text; default: those of `model.generation_config`; `()`: none.

    Raises:
        ConfigError: More than one row or memory, no prompt, more tokens than the models have positions, or a generation
            config that is not greedy.
        ModelError: A model cannot forget tokens that it has read.
    """
    _check(model, input_ids, max_new_tokens, n_draft)
    stops = {} if eos_token_id is None else {"eos_token_id": eos_token_id if eos_token_id != () else None}
    found: list[Result] = []

    def decode(
        model: MemDecForCausalLM,
        input_ids: Tensor,
        *,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        **_: Any,
    ) -> Tensor:
        found.append(_decode(model, input_ids, logits_processor, stopping_criteria, n_draft))
        return found[0].sequences

    # `generate` prepares what the generation config asks for, and hands it over.
    ids = input_ids.to(model.device)
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": max_new_tokens, "do_sample": False}
    model.generate(ids, custom_generate=decode, **how, **stops)
    return found[0]


def _decode(
    model: MemDecForCausalLM,
    ids: Int[Tensor, "1 T"],
    processors: LogitsProcessorList,
    stopping: StoppingCriteriaList,
    n_draft: int,
) -> Result:
    base, memory = (_Reading(reader, model) for reader in model.readers)
    n_end = stopping.max_length
    n_rounds = n_drafted = n_accepted = n_corrected = n_bonus = 0
    stopped = False
    while not stopped:
        n = min(n_draft, n_end - ids.shape[1] - 1)  # every round adds one more token after the accepted drafts
        new, rejected = _round(base, memory, ids, n, model.config.weights, processors)
        kept = len(new) - 1
        for n_new in range(1, len(new) + 1):
            text = torch.cat([ids, new[None, :n_new]], dim=1)
            stopped = bool(stopping(text, None).any())
            if stopped:
                break
        ids = text
        n_rounds, n_drafted, n_accepted = n_rounds + 1, n_drafted + n, n_accepted + min(kept, n_new)
        if n_new > kept:
            n_corrected, n_bonus = n_corrected + rejected, n_bonus + (not rejected)
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
    _check_config(model.generation_config)
    if model._is_stateful:
        raise ModelError(
            "speculative: expected models that can forget rejected tokens, found one with a state (Mamba); use model.generate"
        )
    for reader in model.readers:
        _check_frequencies(reader.model.config, input_ids.shape[1], input_ids.shape[1] + max_new_tokens - 1)
    # The last new token is never an input.
    model.check_length(input_ids.new_empty(1, input_ids.shape[1] + max_new_tokens - 1, device="meta"), None)


def _check_frequencies(config: Any, begin: int, end: int) -> None:
    """Check that rotary frequencies do not change while tokens `begin` to `end` are read, as a pass reads several."""
    if rope.length_class(config, begin) != rope.length_class(config, end):
        raise ModelError(
            f"speculative: expected rotary frequencies that are the same from {begin} to {end} tokens, found a model whose "
            "frequencies depend on the length; use model.generate, or fewer tokens"
        )


def _check_config(config: GenerationConfig) -> None:
    greedy = copy.deepcopy(config)
    greedy.do_sample = False
    if (mode := greedy.get_generation_mode()) != GenerationMode.GREEDY_SEARCH:
        raise ConfigError(
            f"speculative: expected a generation config of greedy search, found {mode.value.replace('_', ' ')}; use "
            "model.generate"
        )
    for name, fine in _REFUSED.items():
        if getattr(config, name, None) not in fine:
            raise ConfigError(f"speculative: expected a generation config without {name}; use model.generate")


class _Reading:
    """One model and its KV cache of the text that it has read."""

    def __init__(self, reader: Reader, model: MemDecForCausalLM) -> None:
        self._reader, self.n_vocab, self._device = reader, model.n_vocab, model.device
        self._n_read = 0
        self._cache = DynamicCache(config=reader.model.config)
        self._cache.activate_past_recording()  # keeps sliding-window entries for a rejection

    def read(self, ids: Int[Tensor, "1 T"], keep: int) -> Float[Tensor, "keep V"]:
        """Read the tokens of `ids` that are not in the cache; logits after each of the last `keep` tokens."""
        places = torch.arange(self._n_read, ids.shape[1], device=self._reader.model.device)[None]
        read = self._reader.inputs(self._cache, places, input_ids=ids[:, self._n_read :])
        self._n_read = ids.shape[1]
        logits = self._reader.logits(read, use_cache=True, logits_to_keep=keep)
        return mixing.in_vocabulary(logits[0], self.n_vocab).float().to(self._device)

    def forget(self, known: int) -> None:
        """Crop the cache to the first `known` tokens."""
        self._cache.crop(known - self._n_read)
        self._n_read = known


def _round(
    base: _Reading,
    memory: _Reading,
    ids: Int[Tensor, "1 T"],
    n: int,
    weights: list[float],
    processors: LogitsProcessorList,
) -> tuple[Int[Tensor, " kept+1"], bool]:
    """Draft and verify n tokens; the accepted ones plus one more, and whether a draft was rejected."""
    text, drafted = _draft(memory, ids, n, processors)
    drafts = text[0, ids.shape[1] :]
    of_base = base.read(text, n + 1)
    kept, last = _verify(drafts, ids, mixing.mix_logits(of_base[:n], [drafted], weights), processors)
    rejected = last is not None
    if last is None:
        last = _best(text, mixing.mix_logits(of_base[n:], [memory.read(text, 1)], weights), processors)
    base.forget(ids.shape[1] + kept)
    memory.forget(ids.shape[1] + kept)
    return torch.cat([drafts[:kept], last]), rejected


def _draft(
    memory: _Reading, ids: Int[Tensor, "1 T"], n: int, processors: LogitsProcessorList
) -> tuple[Int[Tensor, "1 T+n"], Float[Tensor, "n V"]]:
    """The text with n tokens drafted by the memory, and the memory's logits at their positions."""
    rows = [torch.empty(0, memory.n_vocab, device=ids.device)]
    for _ in range(n):
        rows.append(memory.read(ids, 1))
        ids = torch.cat([ids, _best(ids, rows[-1], processors)[None]], dim=1)
    return ids, torch.cat(rows)


def _best(ids: Int[Tensor, "1 T"], logits: Float[Tensor, "1 V"], processors: LogitsProcessorList) -> Int[Tensor, " 1"]:
    """The most probable token after a text; of equal ones the first, as in `generate`."""
    return (processors(ids, logits.clone()) if processors else logits).argmax(-1)


def _verify(
    drafts: Int[Tensor, " n"], ids: Int[Tensor, "1 T"], logits: Float[Tensor, "n V"], processors: LogitsProcessorList
) -> tuple[int, Int[Tensor, " 1"] | None]:
    """Number of accepted drafts, and the token that replaces the next one (None: all are accepted).

    A draft is accepted if it is the token that `generate` takes after the text and the drafts before it.
    """
    if processors:
        texts = [torch.cat([ids, drafts[None, :i]], dim=1) for i in range(len(drafts))]
        rows = [_best(text, logits[i : i + 1], processors) for i, text in enumerate(texts)]
        best = torch.cat(rows) if rows else drafts
    else:
        best = logits.argmax(-1)
    kept = int((drafts == best).long().cumprod(0).sum())
    return kept, best[kept : kept + 1] if kept < len(drafts) else None
