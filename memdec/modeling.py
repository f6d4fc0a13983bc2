"""`MemDecForCausalLM`: a frozen base model and a memory decoder that answer as one causal LM.

`forward` returns log(alpha p_mem + (1 - alpha) p_base) as its logits (float32, normalised), so everything that reads
logits, `generate` and lm-eval included, sees the mixture. Both models keep their own KV cache; the memory's travels on
the base model's cache object.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from memdec import mixing
from memdec.errors import ConfigError, ModelError


class MemDecForCausalLM(PreTrainedModel, GenerationMixin):
    """p(y|x) = alpha p_mem(y|x) + (1 - alpha) p_base(y|x) (paper, section 3.3).

    Args:
        base: Any causal LM; stays as it is.
        memory: The memory decoder, or None for the base alone.
        memory_weight: alpha, from 0 (base only, the memory does not run) to 1 (memory only).
        n_vocab: Size of the shared vocabulary; longer (padded) heads are cut to the shorter one.
    """

    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, base: Any, memory: Any | None, memory_weight: float, n_vocab: int | None = None) -> None:
        super().__init__(copy.deepcopy(base.config))  # generate() reads layers and special tokens from it
        self.base = base
        self.memory = memory
        self.memory_weight = mixing.check_weight(memory_weight)
        if memory is None and self.memory_weight:
            raise ConfigError(f"alpha: expected 0 without a memory, found {memory_weight}; give a memory decoder")
        heads = [m.get_output_embeddings().weight.shape[0] for m in (base, memory) if m is not None]
        self.n_vocab = min(heads)
        if n_vocab is not None and n_vocab > self.n_vocab:
            raise ModelError(
                f"expected output heads of at least {n_vocab} tokens, found {self.n_vocab}; use models of one tokenizer"
            )
        self.generation_config = base.generation_config
        self.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.base.parameters()).device
        return device

    def get_output_embeddings(self) -> Any:
        return self.base.get_output_embeddings()

    def get_input_embeddings(self) -> Any:
        return self.base.get_input_embeddings()

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Both models were tied when they were loaded."""

    def log_probs(
        self, input_ids: Tensor, *, which: str = "both", logits_to_keep: int = 0
    ) -> tuple[Tensor | None, Tensor | None]:
        """(log p_base, log p_mem) of a batch without padding on the left, each float32 (B, T or logits_to_keep, V).

        Args:
            input_ids: Token ids (B, T).
            which: "base", "memory" or "both".
            logits_to_keep: Only the last so many positions; 0 is all.
        """
        base = memory = None
        if which != "memory":
            base = self._run(self.base, input_ids, logits_to_keep=logits_to_keep)
        if which != "base" and self.memory is not None:
            memory = self._run(self.memory, input_ids, logits_to_keep=logits_to_keep)
        return base, memory

    def _run(self, model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        out = model(input_ids=input_ids.to(model.device), use_cache=False, **kwargs)
        return mixing.log_softmax(out.logits, self.n_vocab).to(self.device)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits = normalised log-probabilities of the mixture, float32 (B, T, V)."""
        kwargs = {k: v for k, v in kwargs.items() if k in ("cache_position",) and v is not None}
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.base.config)
        running: dict[str, Any] = {}
        if self.memory is None or self.memory_weight < 1:
            running["base"] = self.base
        if self.memory is not None and self.memory_weight > 0:
            running["memory"] = self.memory
        log_p: dict[str, Tensor] = {}
        for name, model in running.items():
            cache = self._cache_of(past_key_values, model, alone=len(running) == 1)
            out = model(
                input_ids=input_ids.to(model.device) if input_ids is not None else None,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=bool(use_cache),
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
            log_p[name] = mixing.log_softmax(out.logits, self.n_vocab).to(self.device)
        first = next(iter(log_p.values()))
        mixed = mixing.mix(log_p["base"], log_p["memory"], self.memory_weight) if len(log_p) == 2 else first
        return CausalLMOutputWithPast(logits=mixed, past_key_values=past_key_values)

    def _cache_of(self, cache: Any | None, model: Any, alone: bool) -> Any | None:
        """The base model uses the given cache, the memory one that travels on it (alone, it uses the given one)."""
        if cache is None or model is self.base or alone:
            return cache
        if not hasattr(cache, "memory"):
            cache.memory = DynamicCache(config=model.config)
        return cache.memory

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; beams would have to reorder the memory's cache too and are refused."""
        if kwargs.get("num_beams", 1) not in (1, None):
            raise ConfigError(
                f"num_beams: expected 1, found {kwargs['num_beams']}; greedy search and sampling are supported"
            )
        return super().generate(*args, **kwargs)
