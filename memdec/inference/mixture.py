"""`MemDecForCausalLM`: a frozen base model and its memory decoders that answer as one causal LM.

    model = MemDecForCausalLM.from_parts("Qwen/Qwen2.5-7B", ["Clover-Hill/MemoryDecoder-Qwen-biomed"], [0.6])
    model.save_pretrained("folder")
    model = AutoModelForCausalLM.from_pretrained("folder")  # after `import memdec.modeling`

`forward` returns log(sum_i w_i p_i) as its logits (float32, normalised), so everything that reads logits, `generate` and
lm-eval included, sees the mixture. One cache of the library holds the layers of all models one after the other, so what
the library does to a cache (beams, cropping, selecting rows) is done to all.
"""

import copy
import math
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    StaticCache,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from memdec.errors import ConfigError, ModelError
from memdec.inference.wrapper import MemDecConfig, Which, Wrapper, last_positions, shared_vocabulary
from memdec.maths import mixing
from memdec.models.loading import load, placed
from memdec.text import tokens

FOLDERS = ("base", "memory")  # in a self-contained folder: base, memory-0, memory-1 ...


class MemDecForCausalLM(Wrapper):
    """p(y|x) = sum_i w_i p_mem,i(y|x) + (1 - sum_i w_i) p_base(y|x) (paper, section 3.3, which has one memory).

    Models of weight 0 do not run. Make one with `from_models` or `from_parts`.
    """

    def __init__(self, config: MemDecConfig, base: Any | None = None, memories: Sequence[Any] | None = None) -> None:
        if base is None:
            base, *memories = (
                AutoModelForCausalLM.from_config(config.part_config(i)) for i in range(len(config.parts))
            )
        super().__init__(config, base)
        memories = list(memories or ())
        self.n_vocab = config.n_vocab = shared_vocabulary([base, *memories], config.n_vocab)
        self.memories = nn.ModuleList(memories)
        self.set_weights(config.weights)
        self._layers = [len(DynamicCache(config=model.config).layers) for model in (base, *memories)]
        self._tokenizer: Any | None = None
        self._side: Any | None = None  # the memories' CUDA stream
        self.requires_grad_(False)

    # --- making, saving, loading ----------------------------------------------------------------------------------

    @classmethod
    def from_models(
        cls, base: Any, memories: Sequence[Any], weights: Sequence[float], n_vocab: int | None = None
    ) -> "MemDecForCausalLM":
        """A mixture of models that are in memory; they are not copied.

        Args:
            base: Any causal LM; stays as it is.
            memories: Memory decoders with the base's tokenizer.
            weights: alpha of each memory; together from 0 (base only) to 1 (memories only).
            n_vocab: Size of the shared vocabulary, for a check; of padded heads the shortest decides.
        """
        parts = [{"config": model.config.to_dict()} for model in (base, *memories)]
        mixture: MemDecForCausalLM = cls(MemDecConfig(parts=parts, weights=weights, n_vocab=n_vocab), base, memories)
        mixture.eval()
        return mixture

    @classmethod
    def from_parts(
        cls,
        base: str | Path,
        memories: Sequence[str | Path],
        weights: Sequence[float],
        *,
        revisions: Sequence[str | None] | None = None,
        dtype: str = "float32",
        memory_dtype: str | None = None,
        device_map: Any | None = None,
        memory_device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> "MemDecForCausalLM":
        """Load base and memories (folders or Hub ids) and prove that their tokenizers are one.

        Args:
            base: The base model.
            memories: Memory decoders.
            weights: alpha of each memory.
            revisions: Commits of base and memories, for Hub ids.
            dtype: Weights' type of the base.
            memory_dtype: The same of the memories; default as the base.
            device_map: Where the base goes, as `from_pretrained` takes it ("auto": over all GPUs).
            memory_device: Where the memories go; default the base's (first) device.
            kwargs: Passed on to the base's `from_pretrained`.

        Raises:
            ModelError: A model is missing or has another tokenizer.
            ResourceError: The memories do not fit on their device.
        """
        commits = list(revisions or [None] * (1 + len(memories)))
        words = tokens.load_tokenizer(str(base), commits[0])
        for name, commit in zip(memories, commits[1:], strict=True):
            tokens.check_same_ids(words, tokens.load_tokenizer(str(name), commit), f"{base} with {name}")
        if device_map is not None:
            kwargs["device_map"] = device_map
        lm = load(base, dtype=dtype, revision=commits[0], **kwargs)
        place = torch.device(memory_device) if memory_device is not None else next(lm.parameters()).device
        small = []
        for name, commit in zip(memories, commits[1:], strict=True):
            model = load(name, dtype=memory_dtype or dtype, revision=commit)
            small.append(placed(model, place, str(name)))
        mixture = cls.from_models(lm, small, weights, n_vocab=len(words))
        mixture._tokenizer = words
        return mixture

    def save_pretrained(self, save_directory: str | Path, *, by_reference: bool = False, **kwargs: Any) -> None:
        """Write the mixture as a folder that `from_pretrained` reads.

        Args:
            save_directory: The folder.
            by_reference: Write where base and memories came from instead of their weights.
            kwargs: Passed on to each model's `save_pretrained` (`max_shard_size` ...).

        Raises:
            ModelError: `by_reference`, and a model did not come from a folder or the Hub.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        parts = []
        for index, model in enumerate((self.base, *self.memories)):
            part = {"config": model.config.to_dict()}
            if by_reference:
                part |= _reference(model)
            else:
                model.save_pretrained(folder / _folder(index), **kwargs)
            parts.append(part)
        saved = MemDecConfig(parts=parts, weights=self.config.weights, n_vocab=self.n_vocab)
        saved.architectures = [type(self).__name__]
        saved.save_pretrained(folder)
        self.generation_config.save_pretrained(folder)
        if self._tokenizer is None and self.name_or_path:
            with suppress(ModelError):  # a mixture of `from_models` was saved without one
                self._tokenizer = tokens.load_tokenizer(self.name_or_path)
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(folder)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *args: Any,
        config: MemDecConfig | None = None,
        revision: str | None = None,
        dtype: str | torch.dtype | None = None,
        memory_dtype: str | torch.dtype | None = None,
        device_map: Any | None = None,
        memory_device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> "MemDecForCausalLM":
        """A mixture that `save_pretrained` wrote, from a folder or the Hub; arguments as for `from_parts`."""
        name = pretrained_model_name_or_path
        if config is None:
            config = MemDecConfig.from_pretrained(name, revision=revision)
        if not isinstance(config, MemDecConfig) or not config.parts:
            raise ModelError(f"{name}: expected a model of the type memdec, found {config.model_type}; use from_parts")
        known = {
            k: v for k, v in kwargs.items() if k in ("cache_dir", "token", "local_files_only", "attn_implementation")
        }
        loaded: list[Any] = []
        for index, part in enumerate(config.parts):
            where = (
                {"revision": part.get("revision")}
                if "path" in part
                else {"subfolder": _folder(index), "revision": revision}
            )
            wanted = (dtype if index == 0 else memory_dtype or dtype) or "auto"
            place = {"device_map": device_map} if index == 0 and device_map is not None else {}
            model = load(part.get("path", name), dtype=wanted, **where, **place, **known)
            if index:
                device = torch.device(memory_device) if memory_device is not None else loaded[0].device
                model = placed(model, device, f"memory {index - 1} of {name}")
            loaded.append(model)
        mixture: MemDecForCausalLM = cls(config, loaded[0], loaded[1:])
        mixture.name_or_path = str(name)
        mixture.eval()
        return mixture

    def set_weights(self, weights: Sequence[float]) -> None:
        """Use other weights of the memories from now on.

        Raises:
            ConfigError: One per memory is expected, none negative, together at most 1.
        """
        self.config.weights = mixing.check_weights(weights, len(self.memories))

    def set_weight(self, weight: float) -> None:
        """Give every memory this weight; a mixture of one memory has one, alpha."""
        self.set_weights([weight for _ in self.memories])

    # --- running --------------------------------------------------------------------------------------------------

    def log_probs(
        self, input_ids: Tensor, *, which: Which = "both", logits_to_keep: int = 0
    ) -> tuple[Tensor | None, Tensor | None]:
        """(log p_base, log p_mem) of a batch without padding on the left, each float32 (B, T or logits_to_keep, V).

        p_mem of several memories is their mixture by weight.

        Args:
            input_ids: Token ids (B, T).
            which: "base", "memory" or "both".
            logits_to_keep: Only the last so many positions; 0 is all.
        """
        total = math.fsum(self.config.weights)
        shares = [w / total if total else 1 / len(self.memories) for w in self.config.weights]
        running = [0] if which != "memory" else []
        running += [i for i, share in enumerate(shares, 1) if share and which != "base"]
        kept = last_positions(input_ids.shape[1], logits_to_keep)
        found = self._run(running, input_ids=input_ids, use_cache=False, logits_to_keep=kept)
        memories = [found.get(i) for i in range(1, len(shares) + 1)]
        return found.get(0), mixing.mix(None, memories, shares) if which != "base" and shares else None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits = normalised log-probabilities of the mixture, float32 (B, T or logits_to_keep, V)."""
        weights = [mixing.base_weight(self.config.weights), *self.config.weights]
        running = [i for i, weight in enumerate(weights) if weight]
        if use_cache:
            past_key_values = self._joint(past_key_values)
        self.check_length(input_ids, past_key_values)
        found = self._run(
            running,
            caches=past_key_values,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=bool(use_cache),
            logits_to_keep=logits_to_keep,
            **{k: v for k, v in kwargs.items() if k == "cache_position" and v is not None},
        )
        mixed = mixing.mix(found.get(0), [found.get(i) for i in range(1, len(weights))], weights[1:])
        return self.output(mixed, labels, past_key_values)

    def _run(self, running: Sequence[int], caches: Cache | None = None, **inputs: Any) -> dict[int, Tensor]:
        """log-probabilities of some of the models; on one GPU the memories run beside the base."""
        side = self._side_stream(running)
        models = [self.base, *self.memories]
        found: dict[int, Tensor] = {}
        for i in sorted(running, reverse=True):  # memories first: they queue up and the base runs over them
            with torch.cuda.stream(side if i else None):
                device = models[i].device
                given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
                if caches is not None:
                    given["past_key_values"] = _view(caches, self._layers, i)
                logits = models[i](**given).logits
                found[i] = mixing.log_softmax(logits, self.n_vocab).to(self.device)
        if side is not None:
            now = torch.cuda.current_stream(self.device)
            now.wait_stream(side)
            for i in running:
                found[i].record_stream(now)
        return found

    def _side_stream(self, running: Sequence[int]) -> Any | None:
        """A CUDA stream for the memories, in step with the current one; None where nothing can overlap."""
        if self.device.type != "cuda" or len(running) < 2 or torch.compiler.is_compiling():
            return None
        if any(self.memories[i - 1].device != self.device for i in running if i):
            return None  # another GPU runs beside this one anyway
        if self._side is None:
            self._side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        return self._side

    def _joint(self, cache: Cache | None) -> Cache:
        """The cache with room for the layers of all models; a fresh one of the base is extended in place.

        Raises:
            ConfigError: It holds text that only the base has seen.
        """
        if cache is None:
            cache = DynamicCache(config=self.base.config)
        missing = sum(self._layers) - len(cache.layers)
        if missing <= 0:
            return cache
        if len(cache.layers) not in (0, self._layers[0]) or cache.get_seq_length() > 0:
            raise ConfigError(
                f"past_key_values: expected a new cache or one of this model ({sum(self._layers)} layers), found one with "
                f"{len(cache.layers)} layers that is in use; begin without"
            )
        configs = [model.config for model in (self.base, *self.memories)][bool(cache.layers) :]
        for config in configs:
            longest = cache.get_max_length() if isinstance(cache, StaticCache) else None
            more = StaticCache(config, longest) if longest is not None else DynamicCache(config=config)
            cache.layers.extend(more.layers)
        return cache


def _folder(index: int) -> str:
    return FOLDERS[0] if index == 0 else f"{FOLDERS[1]}-{index - 1}"


def _reference(model: Any) -> dict[str, Any]:
    """Where a model came from."""
    name = model.config.name_or_path
    if not name:
        raise ModelError(
            "by_reference: expected models from a folder or the Hub, found one made in memory; save it, or leave "
            "by_reference out"
        )
    path = Path(name)
    if path.is_dir():
        return {"path": str(path.resolve())}
    commit = getattr(model.config, "_commit_hash", None)
    if commit is None:
        warnings.warn(f"{name}: no commit is known; the reference follows whatever the Hub has", stacklevel=3)
    return {"path": name, "revision": commit}


def _view(cache: Cache, layers: Sequence[int], index: int) -> Cache:
    """The layers of one model, as a cache of its own over the same layers."""
    begin = sum(layers[:index])
    view = copy.copy(cache)  # its class and where it offloads to
    view.layers = cache.layers[begin : begin + layers[index]]
    return view


AutoConfig.register(MemDecConfig.model_type, MemDecConfig, exist_ok=True)
AutoModelForCausalLM.register(MemDecConfig, MemDecForCausalLM, exist_ok=True)
