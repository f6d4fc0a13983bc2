"""The base class of all systems: a causal LM around a frozen base.

A wrapper is transparent: at weight 0 it gives the probabilities and the texts of the base alone, whatever its family.
So what a family decides about its own inputs is asked from it (`Reader`). `forward` gives normalised log-probabilities
as logits, but in `generate` they stay on the level of the base's logits (`mixing.mix_logits`): logits processors multiply
scores, so the level matters to them.
"""

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    Cache,
    DynamicCache,
    DynamicLayer,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    StaticCache,
    StaticLayer,
    cache_utils,
)
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from memdec.errors import ConfigError, ModelError
from memdec.maths import mixing
from memdec.models import rope
from memdec.models.loading import check_positions, n_positions

Which = Literal["both", "base", "memory"]
# Steps of `generate` that act on a model as a whole. A wrapper takes them from transformers, so a family may not have
# its own. `prepare_inputs_for_generation`, which many families have, is called for each model.
_STEPS = (
    "generate", "_update_model_kwargs_for_generation", "_prepare_cache_for_generation", "_prepare_static_cache",
    "_prepare_position_ids_for_generation", "_expand_inputs_for_generation", "_reorder_cache",
    "_get_logits_processor",
)  # fmt: skip
_HOW = ("use_cache", "logits_to_keep", "return_dict")  # of a forward pass; the rest of its arguments are what it reads
_OTHERS = ("return_dict", "num_items_in_batch", "cache_position")  # that a wrapper takes; the last says nothing new


class MemDecConfig(PreTrainedConfig):
    """Configuration of a mixture.

    Args:
        parts: One dictionary for the base, then one for each memory. It holds `config` (the configuration of that
            model, as a dictionary with `model_type`) and, if the weights are saved elsewhere, `path` and `revision`.
        weights: Weight of each memory; the base has the rest to 1.
        n_vocab: Rows that the tokenizer needs (`tokens.n_needed`), which every output head must have.
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
        kind = plain.pop("model_type")
        if kind not in CONFIG_MAPPING:  # of code of a repository, which is not asked for again
            return PreTrainedConfig(**plain)
        return AutoConfig.for_model(kind, **plain)

    @property
    def max_position_embeddings(self) -> int:
        """The longest input, in tokens, that all models accept."""
        known = [n for i in range(len(self.parts)) if (n := n_positions(self.part_config(i))) is not None]
        if not known:
            raise AttributeError("max_position_embeddings")
        return int(min(known))

    def get_text_config(self, decoder: Any = None, encoder: Any = None) -> Any:
        """The base's text config; `generate` reads layers, vocabulary and special tokens from it."""
        if not self.parts:
            return self
        return self.part_config(0).get_text_config(decoder=decoder, encoder=encoder)


def _nothing(*_: Any, **__: Any) -> None:
    """What a layer that keeps nothing does."""


class _NoLayer(getattr(cache_utils, "DummyLayer", object)):  # type: ignore[misc]  # transformers 5.17 has none
    """The place of a layer of a model that does not run; for transformers, a layer that keeps nothing."""

    is_initialized, is_compileable, is_croppable, supports_early_init = True, True, True, False
    offload = prefetch = reset = crop = reorder_cache = batch_repeat_interleave = batch_select_indices = _nothing

    def get_max_length(self) -> int:
        return -1  # none


class Reader:
    """How one causal LM is called.

    Args:
        model: The model; with an adapter of peft around it or not.

    Attributes:
        cache_name: Its argument for the cache.
        n_layers: Layers of its cache.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._family = model.get_base_model() if hasattr(model, "get_base_model") else model
        takes = inspect.signature(self._family.forward).parameters
        self._takes_positions, self._takes_keep = "position_ids" in takes, "logits_to_keep" in takes
        mamba = "cache_params" in takes and "past_key_values" not in takes
        self.cache_name = "cache_params" if mamba else "past_key_values"
        self._takes_cache = self.cache_name in takes
        self.n_layers = len(self.new_layers())

    def new_layers(self) -> list[Any]:
        """Empty cache layers."""
        layers: list[Any] = DynamicCache(config=self.model.config).layers
        return layers

    def inputs(self, cache: Cache | None, position_ids: Tensor | None, **given: Any) -> dict[str, Any]:
        """What the model reads, as arguments of its `forward`; a model without position ids gets none."""
        if position_ids is not None and self._takes_positions:
            given["position_ids"] = position_ids
        return given if cache is None else given | {self.cache_name: cache}

    def prepared(
        self, input_ids: Tensor, cache: Cache | None, position_ids: Tensor | None, **given: Any
    ) -> dict[str, Any]:
        """What the model reads in the next step of `generate`, as its family decides.

        A family may drop its cache and read the whole text again (Phi-3, where its long frequencies begin).
        """
        given = self.inputs(cache, position_ids, **given)
        made = self.model.prepare_inputs_for_generation(input_ids, **given)
        if cache is not None and made.get(self.cache_name) is None:
            cache.layers = self.new_layers()
            made[self.cache_name] = cache
        return {key: value for key, value in made.items() if key not in _HOW}

    def logits(self, read: Mapping[str, Any], *, use_cache: bool, logits_to_keep: int | Tensor) -> Tensor:
        """Logits of the kept positions (0: all)."""
        given = {
            key: value.to(self.model.device) if isinstance(value, Tensor) else value for key, value in read.items()
        }
        if isinstance(logits_to_keep, Tensor):
            logits_to_keep = logits_to_keep.to(self.model.device)
        if self._takes_keep:
            given["logits_to_keep"] = logits_to_keep
        logits: Tensor = self.model(**given, use_cache=use_cache, return_dict=True).logits
        return logits if self._takes_keep else logits[:, kept_positions(logits_to_keep)]

    @property
    def can_cache(self) -> bool:
        """Whether the family takes a cache of transformers. RWKV and a few others have their own, the first GPT none."""
        return self._takes_cache and bool(type(self._family)._supports_default_dynamic_cache())

    def check_generation(self, chunks: bool) -> None:
        """Check that the family generates by the steps of transformers.

        Args:
            chunks: Whether the prompt is read in chunks.

        Raises:
            ModelError: It has a step of its own, or cannot read chunks.
        """
        family, usual = type(self._family), GenerationMixin
        own = [
            step
            for step in _STEPS
            if step in vars(self._family) or getattr(family, step, None) is not getattr(usual, step, None)
        ]
        if own:
            raise ModelError(
                f"generate: expected models that generate as most do, found {family.__name__} with its own {own[0]}; use "
                "the model alone, or score texts, which works"
            )
        if chunks and self.cache_name != "past_key_values":
            raise ModelError(
                f"generate: expected models that can read a prompt in chunks, found {family.__name__}; leave "
                "prefill_chunk_size out"
            )


class Wrapper(PreTrainedModel, GenerationMixin):
    """A causal LM around a frozen base: `forward` gives normalised log-probabilities as logits, float32.

    Args:
        config: Its first part is the base.
        base: Any causal LM; it is not changed.
        memories: More models that read the same text.
    """

    config_class = MemDecConfig
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: MemDecConfig, base: Any, memories: Sequence[Any] = ()) -> None:
        super().__init__(config)
        self.base, self.memories = base, nn.ModuleList(memories)
        rope.independent(self)
        self.generation_config = copy.deepcopy(base.generation_config)
        self.n_positions = n_positions(config)
        self.config._attn_implementation = base.config._attn_implementation  # decides which masks `generate` drops
        self.readers = [Reader(model) for model in (base, *memories)]
        self._longest = 0  # tokens of the longest static cache so far; a shorter one would be compiled again
        self._n_inputs = min(_rows(model.get_input_embeddings()) for model in (base, *memories))

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.base.parameters()).device
        return device

    @property
    def running(self) -> list[int]:
        """Numbers of the models that `forward` runs; 0 is the base."""
        return [0]

    @property
    def _all(self) -> range:
        return range(len(self.readers))

    @property
    def reads_on(self) -> bool:
        """Whether `log_probs` takes a cache, so that several texts can go on from one beginning that is read once."""
        return False

    def new_cache(self) -> Cache:
        """An empty cache of all models, for `log_probs`."""
        return self._joint(None, running=self._all)

    def taken(self, cache: Cache, rows: Int[Tensor, " B"]) -> Cache:
        """A copy of a cache with these rows of its batch, each as often as it is named; the cache stays as it is."""
        found = copy.copy(cache)
        found.layers = [copy.copy(layer) for layer in cache.layers]
        for layer in found.layers:
            if layer.is_initialized:
                layer.batch_select_indices(rows.to(layer.keys.device))
        return found

    def _all_attend(self) -> bool:
        """Whether all layers of all models are attention whose cache can be copied for another text."""
        return all(
            reader.can_cache
            and reader.cache_name == "past_key_values"
            and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in reader.new_layers())
            for reader in self.readers
        )

    @property
    def _is_stateful(self) -> bool:
        """Whether a model cannot forget its last tokens (Mamba); transformers asks this before it drafts."""
        return any(getattr(reader.model, "_is_stateful", False) for reader in self.readers)

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
        self.check_inputs(input_ids)
        kept = last_positions(input_ids.shape[1], logits_to_keep)
        log_p = self(input_ids=input_ids.to(self.device), use_cache=False, logits_to_keep=kept).logits
        return log_p if dtype == log_p.dtype else mixing.log_softmax(log_p, dtype=dtype), None

    def output(self, logits: Tensor, labels: Tensor | None, cache: Cache | None, given: Mapping[str, Any]) -> Any:
        """Make the output of `forward`; with `labels` (B, T) it has the usual loss of causal LMs, in nats per token.

        Args:
            logits: Logits of `forward`.
            labels: Labels.
            cache: The cache.
            given: The other arguments of `forward`, after `check_arguments`.
        """
        loss = None
        if labels is not None:
            n = given.get("num_items_in_batch")
            loss = self.loss_function(logits, labels, logits.shape[-1], num_items_in_batch=n)
        found = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        named = given.get("return_dict")
        return found if (self.config.return_dict if named is None else named) else found.to_tuple()

    # --- generation -------------------------------------------------------------------------------------------------

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `generate` of transformers; without a cache if a model cannot use one of transformers.

        Raises:
            ModelError: A family generates in a way of its own, or a model lacks a token of the prompt.
        """
        chunks = kwargs.get("prefill_chunk_size") or self.generation_config.prefill_chunk_size
        for i in self.running:
            self.readers[i].check_generation(bool(chunks))
            if not self.readers[i].can_cache:
                kwargs |= {"use_cache": False}
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        if prompt is not None:
            self.check_inputs(prompt)
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        is_first_iteration: bool | None = False,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Arguments of `forward` for the next step; `prepared` has what each model that runs reads."""
        cache = self._joint(past_key_values) if use_cache else None
        given = {
            "attention_mask": attention_mask,
            "next_sequence_length": next_sequence_length,
            "is_first_iteration": is_first_iteration,
            "use_cache": use_cache,
        }
        prepared = {}
        for i in self.running:
            view = None if cache is None else self._view(cache, i)
            prepared[i] = self.readers[i].prepared(input_ids, view, position_ids, **given)
            if cache is not None and view is not None:
                cache.layers[self._part(i)] = view.layers
        return {
            "input_ids": input_ids if next_sequence_length is None else input_ids[:, -next_sequence_length:],
            "attention_mask": attention_mask,
            "past_key_values": cache,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            "prepared": prepared,
        }

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        mine = model_kwargs.get("past_key_values") is None
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if (cache := model_kwargs.get("past_key_values")) is not None:
            sizes = (generation_config.max_length, generation_config.max_cache_len, self._longest)
            self._longest = max(size or 0 for size in sizes)
            model_kwargs["past_key_values"] = self._joint(cache, self._longest if mine else None)

    def _joint(self, cache: Cache | None, longest: int | None = None, running: Sequence[int] | None = None) -> Cache:
        """A cache with the layers of all models, one after the other; an empty cache of the base is extended in place.

        A model that does not run has a place there but no layers (`_NoLayer`), and loses those that it had: so the cache
        has the length of the models that run, and one that misses text of a model is known.

        Args:
            cache: A cache of the base or of all models; None makes one.
            longest: Tokens of a static cache; None: as many as its layers hold.
            running: Numbers of the models that run; default those with a weight.

        Raises:
            ConfigError: The cache holds text that a model has not read, or does not say how much it can hold.
        """
        if cache is None:
            cache = DynamicCache(config=self.base.config)
        n_known, n_all = len(cache.layers), sum(reader.n_layers for reader in self.readers)
        if n_known < n_all:
            if n_known not in (0, self.readers[0].n_layers) or _in_use(cache):
                raise ConfigError(
                    f"past_key_values: expected a new cache or one of this model ({n_all} layers), found one with "
                    f"{n_known} layers that is in use; begin without"
                )
            cache.layers.extend(_NoLayer() for _ in range(n_all - n_known))
        running = self.running if running is None else running
        there = [not any(isinstance(layer, _NoLayer) for layer in cache.layers[self._part(i)]) for i in self._all]
        new = [i for i in running if not there[i]]
        if new and _in_use(cache):
            raise ConfigError(
                f"past_key_values: expected a cache that the models {list(running)} have filled (0 is the base), found one "
                f"made at other weights, without {new}; begin without"
            )
        for i in new:
            cache.layers[self._part(i)] = self._new_layers(i, cache, longest)
        for i in self._all:
            if there[i] and i not in running:
                cache.layers[self._part(i)] = [_NoLayer() for _ in range(self.readers[i].n_layers)]
        return _counted(cache)

    def _new_layers(self, index: int, cache: Cache, longest: int | None) -> list[Any]:
        """Empty layers of one model for a joint cache."""
        reader = self.readers[index]
        if not isinstance(cache, StaticCache):
            return reader.new_layers()
        layers: list[Any] = StaticCache(reader.model.config, longest or _static_length(cache)).layers
        return layers

    def _kept(self, cache: Cache | None, use_cache: bool | None) -> tuple[Cache | None, bool]:
        """The cache of a forward pass, and whether the models fill it.

        Without `use_cache` the base decides, as it does alone: a loop that hands on each pass's cache needs one.
        """
        if use_cache is None:
            usual = bool(getattr(self.base.config.get_text_config(), "use_cache", False))
            use_cache = cache is not None or (usual and all(self.readers[i].can_cache for i in self.running))
        return self._joint(cache) if use_cache or cache is not None else None, use_cache

    def _view(self, cache: Cache, index: int) -> Cache:
        """A cache of one model that shares its layers with the joint cache."""
        view = copy.copy(cache)  # keeps the class and the offloading settings
        view.layers = cache.layers[self._part(index)]
        return view

    def _part(self, index: int) -> slice:
        """Where the layers of one model are in the joint cache."""
        begin = sum(reader.n_layers for reader in self.readers[:index])
        return slice(begin, begin + self.readers[index].n_layers)

    def _inputs(
        self,
        running: Sequence[int],
        prepared: Mapping[int, Mapping[str, Any]] | None,
        cache: Cache | None,
        **inputs: Any,
    ) -> Mapping[int, Mapping[str, Any]]:
        """What each model that runs reads: as `prepare_inputs_for_generation` made it, else the same for all."""
        if prepared is not None:
            return prepared
        views = {i: None if cache is None else self._view(cache, i) for i in running}
        return {i: self.readers[i].inputs(view, **inputs) for i, view in views.items()}

    # --- checks -----------------------------------------------------------------------------------------------------

    def check_arguments(self, given: Mapping[str, Any]) -> None:
        """Check that `forward` was not given an argument that it would not obey.

        Raises:
            ConfigError: It was, and the argument is not just None or False.
        """
        unknown = [
            name for name, value in given.items() if name not in _OTHERS and value is not None and value is not False
        ]
        if unknown:
            raise ConfigError(
                "forward: expected input_ids, attention_mask, position_ids, past_key_values, use_cache, labels, "
                f"logits_to_keep or return_dict, found {', '.join(unknown)}; leave it out, or call the base alone"
            )

    def check_inputs(self, ids: Tensor) -> None:
        """Check that the models have an embedding for every token of a text.

        Raises:
            ModelError: They lack one.
        """
        _check_ids(ids, self._n_inputs, "embeddings")

    def check_labels(self, ids: Any) -> None:
        """Check that the models can predict every token of a text.

        Raises:
            ModelError: A token has no row in the shared vocabulary.
        """
        _check_ids(torch.as_tensor(ids), int(self.n_vocab), "output heads")

    def check_length(self, input_ids: Tensor | None, cache: Cache | None, mask: Tensor | None = None) -> None:
        """Check that the text, with the cached tokens, fits into the context of the models.

        Args:
            input_ids: The text after the cached tokens.
            cache: The cached tokens.
            mask: Mask of text and cached tokens if positions follow it, as in `generate`; then padding takes none.

        Raises:
            ConfigError: The text is too long.
        """
        if input_ids is None or torch.compiler.is_compiling():
            return
        length = input_ids.shape[1] + (cache.get_seq_length() if cache is not None and not cache.is_compileable else 0)
        too_long = self.n_positions is not None and length > self.n_positions
        if too_long and mask is not None and mask.shape[1:] == (length,):
            length = int(mask.sum(1).max())  # only now, as it waits for the GPU
        instead = "cut the prompt on the left or lower max_new_tokens"
        check_positions(self.n_positions, length, "text", instead)


def last_positions(n: int, keep: int) -> int | Tensor:
    """The last `keep` of n positions (0: all), as the argument `logits_to_keep` of a forward pass.

    The result is a tensor of positions, not their number. With a number, transformers takes a slice, which is not
    contiguous; on a CPU, torch then multiplies it with the head row by row (32 rows of 256 x 50,257: 146 ms, with a
    copy 13 ms).
    """
    return torch.arange(n - keep, n) if keep else 0


def kept_positions(logits_to_keep: int | Tensor) -> slice | Tensor:
    """The index of the kept positions in a dimension of all positions."""
    return slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep


def _in_use(cache: Cache) -> bool:
    """Whether a cache holds text."""
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers) and cache.has_previous_state():
        return True
    return _has_length(cache) and bool(cache.get_seq_length() > 0)


def _has_length(cache: Cache) -> bool:
    """Whether a cache has a layer of attention: transformers asks its length, which layers of Mamba do not count."""
    return any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)


def _static_length(cache: StaticCache) -> int:
    """Tokens that a static cache can hold; layers with a sliding window hold fewer."""
    sizes = [layer.max_cache_len for layer in cache.layers if isinstance(layer, StaticLayer) and not layer.is_sliding]
    if not sizes:
        raise ConfigError(
            "past_key_values: expected a static cache that holds whole texts, found only sliding windows; set "
            "cache_implementation='static' instead"
        )
    length: int = max(sizes)
    return length


def _counted(cache: Cache) -> Cache:
    """The cache, with a layer of attention even if all of its layers are of Mamba."""
    if cache.layers and not _has_length(cache):
        cache.layers.append(DynamicLayer())
    return cache


def _rows(part: Any) -> int:
    return int(part.weight.shape[0])


def _check_ids(ids: Tensor, limit: int, what: str) -> None:
    if ids.numel() and (largest := int(ids.max())) >= limit:
        raise ModelError(
            f"text: expected token ids below {limit} ({what} of the models), found {largest}, which the tokenizer added; "
            "take this token out of the text, or use a model that has it"
        )


def shared_vocabulary(models: Sequence[Any], n_vocab: int | None) -> int:
    """Rows of the base's output head, which is the vocabulary of a mixture.

    Some families pad their heads. The base is normalised over all of its rows, as it is alone, and so every system
    around one base is normalised over the same entries (`mixing.in_vocabulary`).

    Args:
        models: Causal LMs, the base first.
        n_vocab: Rows that the tokenizer needs (`tokens.n_needed`), only to check that every head has them.

    Raises:
        ModelError: A head has fewer than `n_vocab` tokens.
    """
    rows = [_rows(model.get_output_embeddings()) for model in models]
    if n_vocab is not None and n_vocab > min(rows):
        raise ModelError(
            f"expected output heads of at least {n_vocab} tokens, found {min(rows)}; use models of one tokenizer"
        )
    return rows[0]
