"""Models whose answer depends on the length of the batch: which texts may share a forward pass.

`longrope` has one set of frequencies up to the original context and another one beyond it. `dynamic` (NTK) has other
frequencies for every length beyond the positions of the model. In a batch, transformers takes the frequencies of the
longest row for all rows. So rows of one pass must be of one length class; each then has the frequencies that it would
have alone. `dynamic` also keeps the frequencies of the longest text that it has seen. `independent` makes every text
start with those of a new model.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_HOOKED = "_memdec_independent"  # mark of a module that has the hook
# Families whose recurrence reads padding on the left (transformers 5.23); Mamba and the hybrids with it leave it out.
_READ_PADDING = ("recurrent_gemma", "rwkv", "xlstm")


def length_class(config: Any, n: int) -> tuple[int, ...]:
    """A key of the rotary frequencies that a model uses for a text of n tokens; () if they do not depend on n.

    Args:
        config: Configuration of the model.
        n: Number of tokens that it reads.
    """
    text = config.get_text_config(decoder=True)
    key = []
    for kind, given in _kinds(text):
        if kind == "longrope":
            key.append(int(n > _original(text, given)))
        elif "dynamic" in kind:
            key.append(max(n, int(text.max_position_embeddings)))
    return tuple(key)


def lengths_class(configs: Iterable[Any], n: int, n_new: int = 0) -> tuple[tuple[int, ...] | int, ...]:
    """The joint key of several models for texts of n tokens that grow by up to `n_new` generated ones.

    Texts that change their class while they grow may only share a pass with texts of equal length, which change at the
    same token.
    """
    key: list[tuple[int, ...] | int] = []
    for config in configs:
        now = length_class(config, n)
        key.append(now if now == length_class(config, n + n_new) else n)
    return tuple(key)


def padded_class(configs: Iterable[Any], n: int, n_new: int = 0) -> tuple[tuple[int, ...] | int, ...]:
    """`lengths_class` for texts that are padded on the left; of a family that reads padding, one length is one class."""
    known = list(configs)
    reads = any(config.get_text_config(decoder=True).model_type in _READ_PADDING for config in known)
    return (*lengths_class(known, n, n_new), n if reads else 0)


def has_rotations(config: Any) -> bool:
    """Whether positions are rotations, which exist beyond the positions of the configuration too."""
    return bool(getattr(config.get_text_config(decoder=True), "rope_parameters", None))


def _kinds(text: Any) -> list[tuple[str, dict[str, Any]]]:
    """Type and parameters of each set of frequencies; some models have one set per type of layer."""
    found = getattr(text, "rope_parameters", None) or {}
    sets = [found] if "rope_type" in found else [each for each in found.values() if isinstance(each, dict)]
    return [(str(each.get("rope_type", "default")), each) for each in sets]


def _original(text: Any, given: dict[str, Any]) -> int:
    """The length up to which `longrope` uses its short factors."""
    known = given.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
    return int(known or text.max_position_embeddings)


def independent(model: nn.Module) -> None:
    """Let every text that a model reads from its beginning have the frequencies of a new model.

    It adds a hook to the modules of type `dynamic`, and nothing to other models. The hook stays for the life of the
    model, because every pass of every stage needs it. Calling it again changes nothing.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if kinds is None or not hasattr(module, "original_max_seq_len") or hasattr(module, _HOOKED):
            continue
        if any("dynamic" in str(kind) for kind in (kinds.values() if isinstance(kinds, dict) else [kinds])):
            setattr(module, _HOOKED, module.register_forward_pre_hook(_forget, with_kwargs=True))


def _forget(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Drop the frequencies of earlier, longer texts if this pass begins a text, that is, has a position 0."""
    positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
    if torch.compiler.is_compiling() or not isinstance(positions, Tensor) or int(positions.min()) > 0:
        return
    for name, original in list(module.named_buffers(recurse=False)):
        if name.endswith("original_inv_freq"):
            prefix = name.removesuffix("original_inv_freq")
            module.register_buffer(f"{prefix}inv_freq", original, persistent=False)
            if hasattr(module, f"{prefix}max_seq_len_cached"):
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
