"""Operations counted from shapes against torch's counter of operations that ran.

Tolerance 1 % for full training: the counter also sees the small product that makes Llama's and Qwen2's rotary angles.
5 % for LoRA (1.6 to 2.9 % with six layers): below the first adapter the frozen layers get no gradient of their input, which the formula counts.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
)

from memdec.errors import ModelError
from memdec.models import flops, loading

CONTEXT, BATCH = 24, 2
GROUPED: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "gpt2": GPT2Config(n_embd=32, n_layer=6, n_head=4, vocab_size=90, n_positions=CONTEXT),
    "qwen2": Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "llama": LlamaConfig(**GROUPED, head_dim=16, tie_word_embeddings=False),
}


def counted(model: Any) -> float:
    """What one step does per token, by torch; eager attention, as torch has no formula for the fused one on CPU."""
    ids = torch.zeros(BATCH, CONTEXT, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.float().sum().backward()
    return counter.get_total_flops() / (BATCH * CONTEXT)


def build(config: PretrainedConfig) -> Any:
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


@pytest.mark.parametrize("name", list(CONFIGS))
def test_full_training(name: str) -> None:
    model = build(CONFIGS[name])
    assert flops.flops_per_token(model, CONTEXT) == pytest.approx(counted(model), rel=0.01)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft
@pytest.mark.parametrize("name", list(CONFIGS))
def test_lora(name: str) -> None:
    from peft import LoraConfig, get_peft_model

    modules = ["c_attn", "c_fc"] if name == "gpt2" else ["q_proj", "v_proj", "up_proj"]
    full = flops.flops_per_token(build(CONFIGS[name]), CONTEXT)
    adapter = LoraConfig(r=4, target_modules=modules, fan_in_fan_out=name == "gpt2", task_type="CAUSAL_LM")
    model = get_peft_model(build(CONFIGS[name]), adapter)
    found = flops.flops_per_token(model, CONTEXT)
    assert found == pytest.approx(counted(model), rel=0.05)
    assert found < 0.9 * full


def test_a_token_runs_through_some_of_the_experts() -> None:
    sizes = GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}
    model = build(MixtralConfig(**sizes))
    experts = 3 * 48 * 32 * 6  # the three matrices of one expert in all layers
    dense = build(LlamaConfig(**GROUPED))
    routers = 4 * 32 * 6
    more = flops.flops_per_token(model, CONTEXT) - flops.flops_per_token(dense, CONTEXT)
    assert more in (
        6 * experts,
        6 * (experts + routers),
    )  # one expert more than the dense MLP; routers may be no matrices


def test_without_attention_there_is_none_to_count() -> None:
    model = build(MambaConfig(vocab_size=90, hidden_size=16, num_hidden_layers=2, state_size=4))
    assert flops.flops_per_token(model, CONTEXT) == flops.flops_per_token(model, 2 * CONTEXT) > 0


def test_context_costs_only_attention() -> None:
    config = CONFIGS["llama"]
    model = build(config)
    more = flops.flops_per_token(model, 2 * CONTEXT) - flops.flops_per_token(model, CONTEXT)
    assert more == 3 * 4 * CONTEXT * 4 * 16 * 6  # forward and backward, two products, four heads of 16, six layers


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_ceiling_needs_no_weights(name: str, tmp_path: Path) -> None:
    CONFIGS[name].save_pretrained(tmp_path)
    per_token = flops.flops_per_token(build(CONFIGS[name]), CONTEXT)
    assert flops.ceiling(tmp_path, 1.5, 1000, CONTEXT) == pytest.approx(1500 * per_token, rel=1e-12)


def test_a_large_model_is_not_built_in_memory(tmp_path: Path) -> None:
    """Qwen2.5-7B: 7.07 G weights in matrices without the embedding (head included), attention 4 x 1024 x 3584 x 28."""
    Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    ).save_pretrained(tmp_path)
    layer = 3584 * (3584 + 2 * 512) + 3584 * 3584 + 3 * 3584 * 18944
    expected = 6 * (28 * layer + 152064 * 3584) + 3 * 4 * 1024 * 3584 * 28
    assert flops.ceiling(tmp_path, 1, 10, 1024) == pytest.approx(10 * expected, rel=1e-12)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected a model folder with config"):
        flops.ceiling(tmp_path, 1, 10, 8)


def test_a_model_of_several_kinds_of_input_has_the_sizes_of_its_text_model() -> None:
    whole = AutoConfig.for_model("gemma3", text_config={"max_position_embeddings": 77, "num_hidden_layers": 3})
    text = whole.text_config
    assert loading.n_positions(whole) == loading.n_positions(text) == 77
    assert flops.attention_flops(whole, 10) == flops.attention_flops(text, 10) == 4 * 10 * 3 * 8 * text.head_dim
    assert loading.n_positions(AutoConfig.for_model("mpt", max_seq_len=50)) == 50
