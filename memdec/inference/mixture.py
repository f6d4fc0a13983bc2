"""The mixture: `MemDecForCausalLM` is a frozen base model with its memory decoders, used as one causal LM.

    model = MemDecForCausalLM.from_parts("Qwen/Qwen2.5-7B", ["Clover-Hill/MemoryDecoder-Qwen-biomed"], [0.6])
    model.save_pretrained("folder")
    model = AutoModelForCausalLM.from_pretrained("folder")  # after `import memdec.modeling`

`forward` returns log(sum_i w_i p_i) as its logits (float32, normalised). So everything that reads logits, `generate`
and lm-eval included, uses the mixture. One KV cache of transformers holds the layers of all models, one model after the
other. So beam search, cropping and selecting rows act on all models at once.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Cache, GenerationConfig, PreTrainedConfig

from memdec.errors import ConfigError, ModelError
from memdec.inference.wrapper import MemDecConfig, Which, Wrapper, last_positions, shared_vocabulary
from memdec.maths import mixing
from memdec.models import checkpoints
from memdec.models.loading import load, placed
from memdec.text import tokens

FOLDERS = ("base", "memory")  # in a self-contained folder: base, memory-0, memory-1 ...
# Arguments of `from_pretrained` of transformers that go to every model, those that go to the base, and those without effect:
# what they ask for is so anyway, or only the Auto classes read them.
_EVERY = ("cache_dir", "token", "local_files_only", "force_download", "proxies", "attn_implementation")
_BASE = ("max_memory", "offload_folder", "offload_buffers")
_NEEDLESS = ("low_cpu_mem_usage", "use_safetensors", "adapter_kwargs")


class MemDecForCausalLM(Wrapper):
    """p(y|x) = sum_i w_i p_mem,i(y|x) + (1 - sum_i w_i) p_base(y|x) (paper, section 3.3, which has one memory).

    Models with weight 0 do not run. Make a mixture with `from_models` or `from_parts`.
    """

    def __init__(self, config: MemDecConfig, base: Any | None = None, memories: Sequence[Any] | None = None) -> None:
        if base is None:
            base, *memories = (
                AutoModelForCausalLM.from_config(config.part_config(i), trust_remote_code=False)
                for i in range(len(config.parts))
            )
        super().__init__(config, base, memories := list(memories or ()))
        self.n_vocab = shared_vocabulary([base, *memories], config.n_vocab)
        self.set_weights(config.weights)
        self._tokenizer: Any | None = None
        self.subfolder = ""  # of `name_or_path`
        self._side: Any | None = None  # the memories' CUDA stream
        self.requires_grad_(False)

    # --- making, saving, loading ----------------------------------------------------------------------------------

    @classmethod
    def from_models(
        cls, base: Any, memories: Sequence[Any], weights: Sequence[float], n_vocab: int | None = None
    ) -> "MemDecForCausalLM":
        """Make a mixture of loaded models. They are not copied: they learn no more and are in evaluation mode afterwards.

        Args:
            base: Any causal LM.
            memories: Memory decoders with the base's tokenizer.
            weights: alpha of each memory; their sum is from 0 (base only) to 1 (memories only).
            n_vocab: Rows that the tokenizer needs (`tokens.n_needed`), only to check that all output heads have them.

        Raises:
            ConfigError: Memories or weights are no list, or the weights do not fit the memories.
        """
        _check_lists("from_models", memories, weights)
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
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> "MemDecForCausalLM":
        """Load base and memories (folders or Hub ids) and check that their tokenizers are the same.

        Args:
            base: The base model.
            memories: Memory decoders.
            weights: alpha of each memory.
            revisions: Commits of base and memories, for Hub ids.
            dtype: Number type of the base's weights.
            memory_dtype: Number type of the memories' weights; default as the base.
            device_map: Devices of the base, as in `from_pretrained` ("auto": spread over all GPUs).
            memory_device: Device of the memories; default the base's (first) device.
            trust_remote_code: Whether base and memories may run code from their repositories.
            kwargs: Passed on to the base's `from_pretrained`.

        Raises:
            ConfigError: Memories or weights are no list, or the weights do not fit the memories.
            ModelError: A model is missing or has another tokenizer.
            ResourceError: The memories do not fit on their device.
        """
        _check_lists("from_parts", memories, weights)
        mixing.check_weights(weights, len(memories))
        base, memories = _lasting(base), [_lasting(name) for name in memories]
        commits = list(revisions or [None] * (1 + len(memories)))
        trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        inside = kwargs.get("subfolder") or ""
        words = tokens.load_tokenizer(str(base), commits[0], subfolder=inside, **trust)
        for name, commit in zip(memories, commits[1:], strict=True):
            tokens.check_same_ids(words, tokens.load_tokenizer(str(name), commit, **trust), f"{base} with {name}")
        if device_map is not None:
            kwargs["device_map"] = device_map
        dtype = kwargs.pop("torch_dtype", None) or dtype  # its earlier name in transformers
        lm = load(base, dtype=dtype, revision=commits[0], **trust, **kwargs)
        place = torch.device(memory_device) if memory_device is not None else next(lm.parameters()).device
        small = []
        for name, commit in zip(memories, commits[1:], strict=True):
            model = load(name, dtype=memory_dtype or dtype, revision=commit, **trust)
            small.append(placed(model, place, str(name)))
        mixture = cls.from_models(lm, small, weights, n_vocab=tokens.n_needed(words))
        mixture._tokenizer = words
        return mixture

    def save_pretrained(
        self, save_directory: str | Path, *, by_reference: bool = False, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write the mixture as a folder that `from_pretrained` reads.

        Args:
            save_directory: The folder.
            by_reference: Write the paths or Hub ids of base and memories instead of their weights.
            push_to_hub: Not here, as each model would be uploaded over the one before; the method `push_to_hub` can.
            kwargs: Passed on to each model's `save_pretrained` (`max_shard_size` ...).

        Raises:
            ConfigError: With `push_to_hub`.
            ModelError: A model has a peft adapter; or with `by_reference`, it was not loaded from a folder that is there or a
                commit of the Hub, or has other weights now.
        """
        if push_to_hub:
            raise ConfigError(
                "save_pretrained: expected a folder to write and no more, found push_to_hub=True; leave it out, and upload "
                "with the mixture's push_to_hub(repo_id)"
            )
        for model in (self.base, *self.memories):
            _check_whole(model)
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
        saved = MemDecConfig(parts=parts, weights=self.config.weights, n_vocab=self.config.n_vocab)
        saved.architectures = [type(self).__name__]
        saved.save_pretrained(folder)
        self.generation_config.save_pretrained(folder)
        if self._tokenizer is None and self.name_or_path:
            with suppress(ModelError):  # there is none if the mixture came from `from_models`
                self._tokenizer = tokens.load_tokenizer(self.name_or_path, subfolder=self.subfolder)
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(folder)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *args: Any,
        config: MemDecConfig | None = None,
        weights: Sequence[float] | None = None,
        revision: str | None = None,
        subfolder: str = "",
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        memory_dtype: str | torch.dtype | None = None,
        device_map: Any | None = None,
        memory_device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> "MemDecForCausalLM":
        """Load a mixture that `save_pretrained` wrote, from a folder or the Hub.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            args: None are taken; they are here to be refused.
            config: The mixture's configuration; None reads it.
            weights: alpha of each memory; None: those that were saved.
            revision: Commit of a Hub id.
            subfolder: Subfolder of the folder or repository.
            dtype: Number type of the base's weights; default as saved.
            torch_dtype: Its earlier name in transformers.
            memory_dtype: As for `from_parts`, like the arguments after it.
            device_map: Devices of the base.
            memory_device: Device of the memories.
            trust_remote_code: Whether base and memories may run code from their repositories.
            kwargs: Where the files are (`cache_dir`, `token` ...) and `attn_implementation`, for every model; what goes with
                `device_map` (`max_memory` ...), for the base.

        Raises:
            ConfigError: An argument is none of these, or the weights do not fit the memories.
            ModelError: There is no mixture, or a model is missing.
        """
        name = pretrained_model_name_or_path
        _check_known(name, args, kwargs)
        own = {"revision": revision, "subfolder": subfolder}
        kind = _model_type(name, **own) if config is None else config.model_type
        if config is None and kind == MemDecConfig.model_type:
            config = MemDecConfig.from_pretrained(name, **own)
        if not isinstance(config, MemDecConfig) or not config.parts:
            raise ModelError(f"{name}: expected a model of the type memdec, found {kind}; use from_parts")
        config.weights = mixing.check_weights(config.weights if weights is None else weights, len(config.parts) - 1)
        known = {key: kwargs[key] for key in _EVERY if key in kwargs}
        if config._attn_implementation is not None:  # the Auto classes put the argument there
            known.setdefault("attn_implementation", config._attn_implementation)
        placed_by = {"device_map": device_map} | {key: kwargs.get(key) for key in _BASE}
        dtype = dtype or torch_dtype
        loaded: list[Any] = []
        for index, part in enumerate(config.parts):
            inside = "/".join(filter(None, (subfolder, _folder(index))))
            where: dict[str, Any] = {"name": name, "revision": revision, "subfolder": inside}
            if "path" in part:
                where = {"name": part["path"], "revision": part.get("revision"), "subfolder": part.get("subfolder", "")}
            wanted = (dtype if index == 0 else memory_dtype or dtype) or "auto"
            place = {} if index else {key: value for key, value in placed_by.items() if value is not None}
            model = load(dtype=wanted, trust_remote_code=bool(trust_remote_code), **where, **place, **known)
            if index:
                device = torch.device(memory_device) if memory_device is not None else loaded[0].device
                model = placed(model, device, f"memory {index - 1} of {name}")
            loaded.append(model)
        mixture: MemDecForCausalLM = cls(config, loaded[0], loaded[1:])
        with suppress(OSError):  # a folder of an earlier version has none
            mixture.generation_config = GenerationConfig.from_pretrained(name, **own)
        mixture.name_or_path, mixture.subfolder = str(name), subfolder
        mixture.eval()
        return mixture

    def set_weights(self, weights: Sequence[float]) -> None:
        """Set the weights of the memories.

        Raises:
            ConfigError: There is not one weight per memory, one is negative, or their sum is above 1.
        """
        self.config.weights = mixing.check_weights(weights, len(self.memories))

    def set_weight(self, weight: float) -> None:
        """Give every memory this weight; with one memory it is alpha."""
        self.set_weights([weight for _ in self.memories])

    # --- running --------------------------------------------------------------------------------------------------

    def log_probs(
        self,
        input_ids: Tensor,
        *,
        which: Which = "both",
        logits_to_keep: int = 0,
        dtype: torch.dtype = torch.float32,
        cache: Cache | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """(log p_base, log p_mem) of a batch without left padding, each (B, T or logits_to_keep, V) in `dtype`.

        With several memories, p_mem is their mixture in proportion to their weights.

        Args:
            input_ids: Token ids (B, T).
            which: "base", "memory" or "both".
            logits_to_keep: Number of last positions to return; 0 means all.
            dtype: float32, or float64 where many log-probabilities are added.
            cache: Keys and values of the text before `input_ids`, to which those of `input_ids` are added.
        """
        total = math.fsum(self.config.weights)
        shares = [w / total if total else 1 / len(self.memories) for w in self.config.weights]
        running = [0] if which != "memory" else []
        running += [i for i, share in enumerate(shares, 1) if share and which != "base"]
        self.check_inputs(input_ids)
        read = self._inputs(running, None, cache, input_ids=input_ids, position_ids=None)
        kept = last_positions(input_ids.shape[1], logits_to_keep)
        found = self._run(read, partial(self._log_p, dtype=dtype), use_cache=cache is not None, logits_to_keep=kept)
        memories = [found.get(i) for i in range(1, len(shares) + 1)]
        return found.get(0), mixing.mix(None, memories, shares) if which != "base" and shares else None

    @cached_property
    def reads_on(self) -> bool:
        return self._all_attend()

    @property
    def running(self) -> list[int]:
        weights = [mixing.base_weight(self.config.weights), *self.config.weights]
        return [i for i, weight in enumerate(weights) if weight]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        prepared: Mapping[int, Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits = normalised log-probabilities of the mixture, float32 (B, T or logits_to_keep, V).

        In `generate`, `prepared` has what each model reads, and the logits are those of `mixing.mix_logits`.
        """
        self.check_arguments(kwargs)
        past_key_values, use_cache = self._kept(past_key_values, use_cache)
        places_follow_mask = prepared is not None or position_ids is not None
        self.check_length(input_ids, past_key_values, attention_mask if places_follow_mask else None)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        read = self._inputs(self.running, prepared, past_key_values, **inputs)
        made, mix = (self._log_p, mixing.mix) if prepared is None else (self._shared, mixing.mix_logits)
        found = self._run(read, made, use_cache=use_cache, logits_to_keep=logits_to_keep)
        memories = [found.get(i) for i in range(1, len(self.readers))]
        mixed = mix(found.get(0), memories, self.config.weights)
        return self.output(mixed, labels, past_key_values, kwargs)

    def _log_p(self, logits: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return mixing.log_softmax(logits, self.n_vocab, dtype)

    def _shared(self, logits: Tensor) -> Tensor:
        """Logits of the base's vocabulary."""
        return mixing.in_vocabulary(logits, self.n_vocab)

    def _run(
        self, read: Mapping[int, Mapping[str, Any]], made: Callable[[Tensor], Tensor], **how: Any
    ) -> dict[int, Tensor]:
        """`made` of the logits of each model in `read`; on one GPU the memories run in parallel to the base.

        `made` may wait for the GPU, so it follows when all models run.
        """
        side = self._side_stream(list(read))
        # A cache drops old entries while the side stream still reads them; their memory must not be used again before.
        held = [] if side is None else [_entries(read[i]) for i in read if i]
        found: dict[int, Tensor] = {}
        for i in sorted(read, reverse=True):  # memories first: their kernels queue on the side stream
            with torch.cuda.stream(side) if side is not None and i else nullcontext():
                found[i] = self.readers[i].logits(read[i], **how)
        if side is not None:
            now = torch.cuda.current_stream(self.device)
            now.wait_stream(side)
            for logits in found.values():
                logits.record_stream(now)
        del held
        return {i: made(found.pop(i)).to(self.device) for i in list(found)}

    def _side_stream(self, running: Sequence[int]) -> Any | None:
        """A CUDA stream for the memories, synchronised with the current one; None if nothing can overlap."""
        if self.device.type != "cuda" or len(running) < 2 or torch.compiler.is_compiling():
            return None
        if any(self.memories[i - 1].device != self.device for i in running if i):
            return None  # models on different GPUs run in parallel anyway
        if self._side is None:
            self._side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        return self._side


def _entries(read: Mapping[str, Any]) -> list[Any]:
    """The tensors in the caches among the inputs of a model."""
    layers = [vars(layer) for value in read.values() for layer in getattr(value, "layers", ())]
    return [list(each) if isinstance(each, list) else each for layer in layers for each in layer.values()]


def _folder(index: int) -> str:
    return FOLDERS[0] if index == 0 else f"{FOLDERS[1]}-{index - 1}"


def _check_known(name: str | Path, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Check that every argument of `from_pretrained` has an effect.

    None and False ask for nothing; names with _ are notes of transformers to itself.

    Raises:
        ConfigError: One has none.
    """
    known = {*_EVERY, *_BASE, *_NEEDLESS}
    given = [key for key, value in kwargs.items() if value is not None and value is not False]
    asked = [key for key in given if key not in known and not key.startswith("_")]
    if found := [*map(repr, args), *asked]:
        raise ConfigError(
            f"{name}: expected arguments that from_pretrained of a mixture knows, found {', '.join(found)}; leave them out, or "
            "load the models as you like and mix them with from_models"
        )


def _model_type(name: str | Path, **where: Any) -> str | None:
    """The type that a model's configuration states; that of another type need not fit a `MemDecConfig`."""
    said, _ = PreTrainedConfig.get_config_dict(name, **where)
    kind: str | None = said.get("model_type")
    return kind


def _check_lists(where: str, memories: Any, weights: Any) -> None:
    """Check that memories and weights are lists; one model or number alone is an easy mistake.

    Raises:
        ConfigError: One of them is none.
    """
    if all(hasattr(given, "__len__") and not isinstance(given, str) for given in (memories, weights)):
        return
    raise ConfigError(
        f"{where}: expected a list of memories and a list with the weight of each, found {_named(memories)} and "
        f"{weights!r}; write [memory] and [weight]"
    )


def _named(given: Any) -> str:
    """A model as the name of its class, as its own text has many lines; anything else as it is."""
    if isinstance(given, list | tuple):
        return f"[{', '.join(map(_named, given))}]"
    return type(given).__name__ if isinstance(given, torch.nn.Module) else repr(given)


def _lasting(name: str | Path) -> str:
    """A folder's absolute path, which holds in any working folder; a Hub id as it is."""
    return str(Path(name).resolve()) if Path(name).is_dir() else str(name)


def _check_whole(model: Any) -> None:
    """Check that a model has no peft adapter: `save_pretrained` would write the adapter alone, and a reference lacks it.

    Raises:
        ModelError: It has one.
    """
    if any(type(part).__module__.startswith("peft.") for part in model.modules()):
        raise ModelError(
            f"save_pretrained: expected models without an adapter, found one of peft in {type(model).__name__}; merge it "
            "(merge_and_unload) and mix the merged model"
        )


def _reference(model: Any) -> dict[str, Any]:
    """Where a model was loaded from: its folder, or Hub id and commit, and the subfolder if there is one.

    Raises:
        ModelError: It was not loaded from a place that holds, or its weights are not those of this place.
    """
    name = model.config.name_or_path
    if not name:
        raise ModelError(
            "by_reference: expected models from a folder or the Hub, found one made in memory; save it, or leave "
            "by_reference out"
        )
    path = Path(name)
    commit = None if path.is_dir() else getattr(model.config, "_commit_hash", None)
    if not path.is_dir() and commit is None:
        raise ModelError(
            f"by_reference: expected a folder that is there or a commit of the Hub, found {name} without either; load the model "
            "by its absolute path, or leave by_reference out"
        )
    inside = getattr(model, "subfolder", "")  # `load` writes it down
    if changed := checkpoints.changed(name, model, subfolder=inside, revision=commit):
        raise ModelError(
            f"by_reference: expected weights as in {path / inside}, found {changed} of {type(model).__name__} that differ; leave "
            "by_reference out if the model was merged or trained, or load it from a subfolder with from_parts"
        )
    found = {"path": str(path.resolve())} if commit is None else {"path": name, "revision": commit}
    return found | ({"subfolder": inside} if inside else {})


AutoConfig.register(MemDecConfig.model_type, MemDecConfig, exist_ok=True)
AutoModelForCausalLM.register(MemDecConfig, MemDecForCausalLM, exist_ok=True)
