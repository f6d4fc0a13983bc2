"""Check `--model_args` before anything is loaded: names, types, and what lm-eval passes itself."""

import difflib
import inspect
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from memdec.errors import ConfigError, MemDecError
from memdec.models import loading

_NUMBERS = ("context", "stride", "max_length")
_SWITCHES = (
    "truncation", "logits_cache", "add_bos_token", "use_fast_tokenizer", "trust_remote_code", "enable_thinking",
    "parallelize", "gptqmodel",
)  # fmt: skip
_TEXTS = ("peft", "delta", "gguf_file", "attn_implementation")
OURS = ("context", "stride", "scores")  # arguments of every system
# Keywords that `hf` hands on to `from_pretrained`, and those that it takes out of them for quantised loading.
_PRETRAINED = {
    "adapter_kwargs", "allow_all_kernels", "attn_implementation", "cache_dir", "code_revision", "config",
    "device_map", "device_mesh", "disable_mmap", "distributed_config", "experts_implementation", "force_download",
    "fusion_config", "generation_config", "ignore_mismatched_sizes", "kernel_config", "key_mapping", "load_in_4bit",
    "load_in_8bit", "local_files_only", "low_cpu_mem_usage", "max_memory", "offload_buffers", "offload_state_dict",
    "output_loading_info", "proxies", "quantization_config", "resume_download", "state_dict", "token", "torch_dtype",
    "tp_size", "tqdm_class", "use_auth_token", "use_kernels", "use_safetensors", "variant", "weights_only",
}  # fmt: skip
_PREFIXES = ("bnb_4bit_", "llm_int8_")  # settings of the quantisation


def check(kind: type, name: str, given: Mapping[str, Any], passed: Mapping[str, Any] | None) -> None:
    """Check the names in `--model_args` of one model.

    Args:
        kind: Class of the model.
        name: Its name for messages.
        given: The arguments of the user.
        passed: What lm-eval passes besides (batch_size, max_batch_size, device); None values do not count.

    Raises:
        ConfigError: An argument is unknown, given twice, or missing.
    """
    twice = sorted(given.keys() & {key for key, value in (passed or {}).items() if value is not None})
    if twice:
        raise ConfigError(
            f"{name}: expected {_listed(twice)} as an option of its own, found it in --model_args; give --{twice[0]} "
            f"{given[twice[0]]}"
        )
    own = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    named = {key for key, each in own.items() if each.kind is not each.VAR_KEYWORD} - {"self"}
    hf = set(inspect.signature(HFLM.__init__).parameters) - {"self", "kwargs"}
    known = {*named, *OURS, *hf, *_PRETRAINED}
    unknown = [key for key in given if key not in known and not str(key).startswith(_PREFIXES)]
    if unknown and not given.get("trust_remote_code"):  # code of a repository may take any
        _check_config(name, unknown, given, sorted(known))
    missing = [
        key for key in own if key in named and own[key].default is inspect.Parameter.empty and not given.get(key)
    ]
    if missing:
        raise ConfigError(
            f"{name}: expected {_listed(f'{key}=' for key in missing)} in --model_args, found "
            f"{_listed(given) or 'nothing'}; add it"
        )


def _check_config(name: str, unknown: list[str], given: Mapping[str, Any], known: list[str]) -> None:
    """Accept names of the model's configuration, which `from_pretrained` sets; the rest is an error."""
    fields: set[str] = set()
    try:
        config = loading.config(str(given.get("pretrained")), given.get("revision"))
        fields = {*config.to_dict(), *config.attribute_map}
    except (MemDecError, OSError, ValueError):
        pass  # the model cannot be found, which is reported when it is needed
    wrong = next((key for key in unknown if key not in fields), None)
    if wrong is not None:
        near = difflib.get_close_matches(wrong, [*known, *sorted(fields)], 1)
        hint = f"did you mean {near[0]}=?" if near else f"known are {', '.join(known)}"
        raise ConfigError(f"{name}: expected arguments of the model in --model_args, found {wrong}=; {hint}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def check_types(given: Mapping[str, Any]) -> None:
    """Check arguments whose wrong types would only be noticed in the middle of the requests; None is never wrong.

    Raises:
        ConfigError: A value has another type.
    """
    for name in _NUMBERS:
        if given.get(name) is not None:
            whole(name, given[name])
    for name in _SWITCHES:
        if not isinstance(given.get(name), bool | None):
            raise ConfigError(f"{name}: expected True or False, found {given[name]!r}; correct --model_args")
    for name in _TEXTS:
        if not isinstance(given.get(name), str | None) or given.get(name) == "":
            raise ConfigError(f"{name}: expected a text, found {given[name]!r}; correct --model_args")


def whole(name: str, value: Any) -> None:
    """Check that a value is a whole number from 1 on.

    Raises:
        ConfigError: It is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}: expected a whole number from 1 on, found {value!r}; correct --model_args")


def dtype(name: str, value: Any) -> str:
    """Return the name of a floating number type of torch, or `auto`.

    Raises:
        ConfigError: It is something else.
    """
    kind = str(value).removeprefix("torch.")
    found = getattr(torch, kind, None)
    if kind != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ConfigError(f"{name}: expected auto, float32, bfloat16 or float16, found {value!r}; correct --model_args")
    return kind


def folder(name: str, value: Any) -> str | None:
    """Return a folder for writing that exists or can be made; None stays None.

    Raises:
        ConfigError: It is no path, there is a file in its place, or it may not be written.
    """
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise ConfigError(f"{name}: expected a folder, found {value!r}; correct --model_args")
    path = Path(value).absolute()
    there = next(each for each in (path, *path.parents) if each.exists())
    if not there.is_dir():
        raise ConfigError(f"{name}: expected a folder, found the file {there}; give another path")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{name}: expected a folder that may be written, found {there}, which may not; give another path"
        )
    return str(value)
