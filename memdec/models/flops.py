"""Floating point operations of training, counted from the shapes of a model.

The rule is that of Kaplan et al. 2020 (arXiv 2001.08361, section 2.1) and of PaLM (arXiv 2204.02311, appendix B), with a
multiplication and an addition as two operations: a weight of a matrix costs 2 per token forward, 2 for its own gradient
and 2 for the gradient of its input; attention costs 4 x context x width per layer forward and twice that backward. Only
matrix products count, not norms, activations, softmax, embedding look-ups or the optimiser. Differences from the two:
the head is counted at every position, and the whole square of the attention, as torch's `FlopCounterMode` does.

Not counted: what flash attention or gradient checkpointing compute again in the backward pass.
"""

from pathlib import Path
from typing import Any

from torch import nn

from memdec.models import loading


def flops_per_token(model: Any, context: int) -> float:
    """Operations of one training step (forward and backward) per token of the batch.

    A frozen matrix has no gradient of its own, so LoRA costs 4 per frozen weight and 6 per adapter weight. Frozen layers
    below the first adapter need no gradient of their input either; that is ignored, which with adapters in every layer
    counts 2 per weight of the first layer's adapted projections too much.

    Args:
        model: A decoder with dense layers, with or without a peft adapter; may be on the meta device. What is trained is
            what requires a gradient.
        context: Tokens of a window.
    """
    from transformers.pytorch_utils import Conv1D

    matrices = [module.weight for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    dense = sum(weight.numel() * (6 if weight.requires_grad else 4) for weight in matrices)
    return float(dense + 3 * attention_flops(model.config, context))


def attention_flops(config: Any, context: int) -> int:
    """Operations per token of the scores and the weighted sums of all layers, forward; groups of heads cost as all."""
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return int(4 * context * width * config.num_hidden_layers)


def ceiling(model_folder: Path, epochs: float, n_tokens: int, context: int) -> float:
    """Operations of so many epochs of training all weights of a model; the weights are not read.

    Args:
        model_folder: Folder with config.json.
        epochs: Passes over the tokens.
        n_tokens: Tokens of one pass.
        context: Tokens of a window.

    Raises:
        ModelError: No config.json there.
    """
    return epochs * n_tokens * flops_per_token(loading.on_meta(model_folder), context)
