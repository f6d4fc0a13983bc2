"""The base class of all systems: a causal LM around a frozen base, with normalised log-probabilities as logits."""

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    Cache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from memdec.errors import ConfigError, ModelError
from memdec.maths import mixing
from memdec.models import rope
from memdec.models.loading import check_positions, n_positions

Which = Literal["both", "base", "memory"]


class MemDecConfig(PreTrainedConfig):
    """Configuration of a mixture.

    Args:
        parts: One dictionary for the base, then one for each memory. It holds `config` (the configuration of that
            model, as a dictionary with `model_type`) and, if the weights are saved elsewhere, `path` and `revision`.
        weights: Weight of each memory; the base has the rest to 1.
        n_vocab: Size of the shared vocabulary.
    """

    model_type = "memdec"

    def __init__(
        self,
        parts: Sequence[dict[str, Any]] | None = None,
        weights: Sequence[float] | None = None,
        n_vocab: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.parts = [dict(part) for part in parts or ()]
        self.weights = [float(weight) for weight in weights or ()]
        self.n_vocab = n_vocab
        super().__init__(**kwargs)

    def part_config(self, index: int) -> Any:
        """Configuration of one model: 0 is the base."""
        plain = dict(self.parts[index]["config"])
        return AutoConfig.for_model(plain.pop("model_type"), **plain)

    @property
    def max_position_embeddings(self) -> int:
        """The longest input, in tokens, that all models accept."""
        known = [n for i in range(len(self.parts)) if (n := n_positions(self.part_config(i))) is not None]
        if not known:
            raise AttributeError("max_position_embeddings")
        return int(min(known))

    def get_text_config(self, decoder: Any = None, encoder: Any = None) -> Any:
        """The base's text config with the shared vocabulary; `generate` reads layers and special tokens from it."""
        if not self.parts:
            return self
        config = self.part_config(0).get_text_config(decoder=decoder, encoder=encoder)
        config.vocab_size = self.n_vocab or config.vocab_size
        return config


class Wrapper(PreTrainedModel, GenerationMixin):
    """A causal LM around a frozen base: `forward` gives normalised log-probabilities as logits, float32.

    Args:
        config: Its first part is the base.
        base: Any causal LM; it is not changed.
    """

    config_class = MemDecConfig
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: MemDecConfig, base: Any) -> None:
        super().__init__(config)
        self.base = base
        rope.independent(base)
        self.generation_config = copy.deepcopy(base.generation_config)
        self.n_positions = n_positions(config)

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.base.parameters()).device
        return device

    def get_output_embeddings(self) -> Any:
        return self.base.get_output_embeddings()

    def get_input_embeddings(self) -> Any:
        return self.base.get_input_embeddings()

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the weights of each model were tied when it was loaded."""

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        raise ConfigError(
            "resize_token_embeddings: the models of a mixture share a vocabulary; resize them before mixing"
        )

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
        """Return the padding mask unchanged; each model makes its own attention mask, as their layers may differ."""
        return attention_mask

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        raise ConfigError(
            f"save_pretrained: expected a mixture of models, found {type(self).__name__}; make it from its folders again"
        )

    def log_probs(
        self, input_ids: Tensor, *, which: Which = "base", logits_to_keep: int = 0, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor | None, Tensor | None]:
        """(log p, None) of a batch without left padding; None because there is no second distribution.

        Args:
            input_ids: Token ids (B, T).
            which: "base"; models with a second distribution also accept "both" and "memory".
            logits_to_keep: Number of last positions to return; 0 means all.
            dtype: Number type of the log-probabilities: float32, or float64 where many of them are added.
        """
        kept = last_positions(input_ids.shape[1], logits_to_keep)
        log_p = self(input_ids=input_ids.to(self.device), use_cache=False, logits_to_keep=kept).logits
        return log_p if dtype == log_p.dtype else mixing.log_softmax(log_p, dtype=dtype), None

    def output(self, log_p: Tensor, labels: Tensor | None, cache: Cache | None) -> CausalLMOutputWithPast:
        """Make the output of `forward`; with `labels` (B, T) it has the usual loss of causal LMs, in nats per token."""
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=log_p, labels=labels, vocab_size=log_p.shape[-1])
        return CausalLMOutputWithPast(loss=loss, logits=log_p, past_key_values=cache)

    def check_length(self, input_ids: Tensor | None, cache: Cache | None) -> None:
        """Check that the text, with the cached tokens, fits into the context of the models.

        Raises:
            ConfigError: The text is too long.
        """
        if input_ids is None or torch.compiler.is_compiling():
            return
        length = input_ids.shape[1] + (cache.get_seq_length() if cache is not None and not cache.is_compileable else 0)
        instead = "cut the prompt on the left or lower max_new_tokens"
        check_positions(self.n_positions, length, "text", instead)


def last_positions(n: int, keep: int) -> int | Tensor:
    """The last `keep` of n positions (0: all), as the argument `logits_to_keep` of a forward pass.

    The result is a tensor of positions, not their number. With a number, transformers takes a slice, which is not
    contiguous; on a CPU, torch then multiplies it with the head row by row (32 rows of 256 x 50,257: 146 ms, with a
    copy 13 ms).
    """
    return torch.arange(n - keep, n) if keep else 0


def shared_vocabulary(models: Sequence[Any], n_vocab: int | None) -> int:
    """Size of the shortest output head; it is the shared vocabulary, as some model families pad their heads.

    Args:
        models: Causal LMs.
        n_vocab: Vocabulary size of the tokenizer, only to check that every head covers it.

    Raises:
        ModelError: A head has fewer than `n_vocab` tokens.
    """
    shortest = min(int(model.get_output_embeddings().weight.shape[0]) for model in models)
    if n_vocab is not None and n_vocab > shortest:
        raise ModelError(
            f"expected output heads of at least {n_vocab} tokens, found {shortest}; use models of one tokenizer"
        )
    return shortest
