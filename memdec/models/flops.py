"""Floating point operations (FLOPs) of training, counted from the shapes of a model.

The rule is that of Kaplan et al. 2020 (arXiv 2001.08361, section 2.1) and of PaLM (arXiv 2204.02311, appendix B). A
multiplication and an addition count as two operations. Per token, a weight of a matrix costs 2 in the forward pass, 2
for its own gradient, and 2 for the gradient of its input. Attention costs 4 x context x width per layer in the forward
pass, and twice that in the backward pass. Only matrix products are counted, not norms, activations, softmax, embedding
look-ups or the optimiser. There are two differences from these papers: the head is counted at every position, and
attention is counted without the causal mask, as torch's `FlopCounterMode` does.

What flash attention or gradient checkpointing recomputes in the backward pass is not counted.
"""

from pathlib import Path
from typing import Any

from torch import nn

from memdec.models import loading


def flops_per_token(model: Any, context: int) -> float:
    """FLOPs of one training step (forward and backward) per token of the batch.

    A frozen matrix has no gradient of its own, so LoRA costs 4 per frozen weight and 6 per adapter weight. Layers below
    the first adapter need no gradient of their input either, which this count ignores. With adapters in every layer it
    therefore counts 2 too many per weight of the first layer's adapted projections.

    Args:
        model: A decoder with dense layers or experts, with or without a peft adapter; may be on the meta device. A
            parameter is counted as trained if it requires a gradient.
        context: Tokens of a window.
    """
    from transformers.pytorch_utils import Conv1D

    matrices = [module.weight for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    dense = sum(weight.numel() * (6 if weight.requires_grad else 4) for weight in matrices)
    for name, weight in model.named_parameters():
        if weight.dim() == 3 and "experts" in name:  # a token runs through some of the experts
            used = getattr(model.config.get_text_config(decoder=True), "num_experts_per_tok", len(weight))
            dense += used / len(weight) * weight.numel() * (6 if weight.requires_grad else 4)
    return float(dense + 3 * attention_flops(model.config, context))


def attention_flops(config: Any, context: int) -> int:
    """FLOPs per token of attention scores and weighted sums in the forward pass of all layers.

    Grouped-query attention costs as much as full attention, because every query head computes its own scores.
    """
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", None)
    if not heads:  # Mamba and RWKV, whose scans are no matrix products
        return 0
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    return int(4 * context * width * text.num_hidden_layers)


def ceiling(model_folder: Path, epochs: float, n_tokens: int, context: int) -> float:
    """FLOPs of training all weights of a model for `epochs`; the weights are not read.

    Args:
        model_folder: Folder with config.json.
        epochs: Passes over the tokens.
        n_tokens: Tokens of one pass.
        context: Tokens of a window.

    Raises:
        ModelError: The folder has no config.json.
    """
    return epochs * n_tokens * flops_per_token(loading.on_meta(model_folder), context)
