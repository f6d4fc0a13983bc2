"""Reading keys from a model: the input of the last layer's MLP (paper, section 3.1), or another hidden state.

`FAMILIES` has the module names of the common model families. In other models, the largest `ModuleList` is taken as the
list of layers, and the MLP is the first module with a matrix that the last layer calls after the attention. In both
cases a probe with two short rows checks that the point is reached once per forward pass and gives one vector per token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from memdec.errors import ModelError

# model_type -> (layers, attention of a layer, MLP of a layer). GPT-NeoX runs both in parallel; OPT has no MLP module.
FAMILIES = {
    "gpt2": ("transformer.h", "attn", "mlp"),
    "gpt_neo": ("transformer.h", "attn", "mlp"),
    "gpt_neox": ("gpt_neox.layers", "attention", "mlp"),
    "qwen2": ("model.layers", "self_attn", "mlp"),  # Qwen2 and Qwen2.5
    "qwen3": ("model.layers", "self_attn", "mlp"),
    "llama": ("model.layers", "self_attn", "mlp"),
    "mistral": ("model.layers", "self_attn", "mlp"),
    "gemma": ("model.layers", "self_attn", "mlp"),
    "gemma2": ("model.layers", "self_attn", "mlp"),
    "gemma3_text": ("model.layers", "self_attn", "mlp"),
    "opt": ("model.decoder.layers", "self_attn", "fc1"),
}
POINTS = ("mlp", "attention", "final")  # anything else is the path of a module


class KeyPoint:
    """One point of a model at which hidden states are read: `KeyPoint(model)(ids)`. The LM head does not run.

    Args:
        model: A causal LM of transformers.
        name: "mlp" or "attention" (the input of that part of the last layer), "final" (the input of the LM head), or
            the path of a module (the input of that module, such as `transformer.h.5.mlp`).

    Raises:
        ModelError: There is no such point, or it does not give one vector per token.
    """

    def __init__(self, model: Any, name: str = "mlp") -> None:
        self.model, self.name = model, name
        self.module = None if name == "final" else _module(model, name)
        probe = torch.zeros(2, 3, dtype=torch.long, device=model.device)
        found = self._run(probe)
        if len(found) != 1 or found[0].numel() % 6 or found[0].ndim not in (2, 3) or not found[0].is_floating_point():
            shapes = ", ".join(str(tuple(each.shape)) for each in found) or "nothing"
            raise ModelError(
                f"{type(model).__name__}: expected key point '{name}' to give one vector per token (2 x 3 of them), "
                f"found {shapes}; name another one, e.g. 'final' or the path of a module"
            )
        self.width = found[0].numel() // 6

    def __call__(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """The hidden state of every input token, in the model's dtype and on its device."""
        return self._run(ids)[0].reshape(*ids.shape, self.width)

    @torch.no_grad()
    def _run(self, ids: Tensor) -> list[Tensor]:
        with self.capture() as seen:
            self.model.base_model(input_ids=ids, use_cache=False)
        return seen

    @contextmanager
    def capture(self) -> Iterator[list[Tensor]]:
        """Collect the hidden states at the point in every forward pass of the model during the `with` block.

        The list gets one tensor per pass, (B, T, D) or (B * T, D), in the model's dtype and on the device of that
        layer.
        """
        seen: list[Tensor] = []

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = kwargs.get("hidden_states")
            tensors = (x for x in (*args, *kwargs.values()) if torch.is_tensor(x))
            seen.append(given if given is not None else next(tensors))

        def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            seen.append(output[0])  # the last hidden state; the output is a tuple or a transformers output object

        if self.module is None:
            handle = self.model.base_model.register_forward_hook(after)
        else:
            handle = self.module.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield seen
        finally:
            handle.remove()


def last_mlp(model: Any) -> nn.Module:
    """The MLP of the last layer, or its first matrix in models that have no MLP module (OPT)."""
    return _module(model, "mlp")


def _module(model: Any, name: str) -> nn.Module:
    if name not in POINTS:
        try:
            return model.get_submodule(name)  # type: ignore[no-any-return]
        except AttributeError:
            raise ModelError(
                f"{type(model).__name__}: expected key point {', '.join(POINTS)} or the path of a module, found '{name}'; "
                "`print(model)` shows the paths"
            ) from None
    family = FAMILIES.get(model.config.model_type)
    if family is not None:
        layers, attention, mlp = family
        return model.get_submodule(layers)[-1].get_submodule(mlp if name == "mlp" else attention)  # type: ignore[no-any-return]
    return _detect(model)[name]


def _detect(model: Any) -> dict[str, nn.Module]:
    """Find attention and MLP in the last layer of an unknown family by the order in which its parts are called."""
    unknown = (
        f"{type(model).__name__}: expected a last layer with an attention and then an MLP, found {{}}; name the key point "
        "by the path of a module (datastore option key_point), or add the family to memdec.models.keypoints.FAMILIES"
    )
    lists = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise ModelError(unknown.format("no list of layers"))
    layers = max(lists, key=lambda module: sum(p.numel() for p in module.parameters()))
    called: list[str] = []
    parts = dict(layers[-1].named_children())
    handles = [
        part.register_forward_pre_hook(lambda _module, _args, name=name: called.append(name))
        for name, part in parts.items()
    ]
    try:
        with torch.no_grad():
            model.base_model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    with_matrix = [name for name in called if any(p.ndim > 1 for p in parts[name].parameters())]
    attention = next((i for i, name in enumerate(with_matrix) if "att" in name.lower()), None)
    if attention is None or attention + 1 == len(with_matrix):
        raise ModelError(unknown.format(", ".join(called) or "parts that are never called"))
    return {"attention": parts[with_matrix[attention]], "mlp": parts[with_matrix[attention + 1]]}
