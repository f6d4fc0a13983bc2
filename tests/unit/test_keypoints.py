"""Where keys come from, over many families: tiny models with random weights, compared with a hook put in by hand."""

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from memdec.errors import ModelError
from memdec.models.keypoints import FAMILIES, KeyPoint, last_mlp

LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
BLOOM = {"hidden_size": 16, "n_layer": 2, "n_head": 2}
OPT = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 16}

# model type, configuration, path of the module whose input is the key
KNOWN = [
    ("gpt2", GPT, "transformer.h.1.mlp"),
    (
        "gpt_neo",
        {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global"], 2]]},
        "transformer.h.1.mlp",
    ),
    ("gpt_neox", {**LLAMA, "max_position_embeddings": 32}, "gpt_neox.layers.1.mlp"),
    ("qwen2", LLAMA, "model.layers.1.mlp"),
    ("qwen3", LLAMA, "model.layers.1.mlp"),
    ("llama", LLAMA, "model.layers.1.mlp"),
    ("mistral", LLAMA, "model.layers.1.mlp"),
    ("gemma", LLAMA, "model.layers.1.mlp"),
    ("gemma2", LLAMA, "model.layers.1.mlp"),
    ("gemma3_text", LLAMA, "model.layers.1.mlp"),
    ("opt", OPT, "model.decoder.layers.1.fc1"),
]
DETECTED = [
    ("phi", LLAMA, "model.layers.1.mlp"),
    ("gptj", {**GPT, "rotary_dim": 4}, "transformer.h.1.mlp"),
    ("bloom", BLOOM, "transformer.h.1.mlp"),
    ("mpt", {"d_model": 16, "n_layers": 2, "n_heads": 2}, "transformer.blocks.1.ffn"),
    ("olmo2", LLAMA, "model.layers.1.mlp"),
    ("xglm", {"d_model": 16, "ffn_dim": 24, "num_layers": 2, "attention_heads": 2}, "model.layers.1.fc1"),
    ("mixtral", {**LLAMA, "num_local_experts": 2}, "model.layers.1.mlp"),
    ("gpt_bigcode", GPT, "transformer.h.1.mlp"),
]


def made(kind: str, config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    kinds = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    return AutoModelForCausalLM.from_config(kinds[kind](vocab_size=50, **config)).eval()


@pytest.mark.parametrize(("kind", "config", "path"), KNOWN + DETECTED, ids=lambda x: x if isinstance(x, str) else "")
def test_keys_are_the_input_of_the_last_mlp(kind: str, config: dict[str, Any], path: str) -> None:
    model = made(kind, config)
    assert (model.config.model_type in FAMILIES) == ((kind, config, path) in KNOWN)
    ids = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(1))
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda _m, args, _out: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    point = KeyPoint(model)
    assert point.module is last_mlp(model) is model.get_submodule(path)
    assert point.width == 16
    torch.testing.assert_close(point(ids), seen[0].reshape(3, 7, 16))


def test_every_family_of_the_table_is_tested() -> None:
    assert {kind for kind, _, _ in KNOWN} == set(FAMILIES)


def test_fault_13_the_lm_head_does_not_run() -> None:
    model = made("llama", LLAMA)

    def refuse(*_: object) -> None:
        raise AssertionError("the head ran")

    model.lm_head.register_forward_pre_hook(refuse)
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(AssertionError, match="the head ran"):
        model(input_ids=ids)
    for name in ("mlp", "attention", "final", "model.layers.0.mlp"):
        assert KeyPoint(model, name)(ids).shape == (1, 4, 16)


def test_other_key_points_by_name() -> None:
    model = made("qwen2", LLAMA)
    ids = torch.arange(10).view(2, 5)
    with torch.no_grad():
        out = model(input_ids=ids, output_hidden_states=True)
        before = model.model.layers[-1].input_layernorm(out.hidden_states[-2])
    torch.testing.assert_close(KeyPoint(model, "final")(ids), out.hidden_states[-1])
    torch.testing.assert_close(KeyPoint(model, "attention")(ids), before)
    assert KeyPoint(model, "model.layers.1.mlp.down_proj").width == 24


def test_fault_13_an_unknown_family_without_attention_says_what_to_do() -> None:
    model = made("mamba", {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4})
    with pytest.raises(ModelError, match=r"found norm, mixer; name the key point by the path of a module"):
        KeyPoint(model)
    assert KeyPoint(model, "backbone.layers.1.mixer").width == 16


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mpl", "expected key point mlp, attention, final or the path of a module, found 'mpl'"),
        ("transformer.wte", "one vector per token"),  # its input are ids
        ("lm_head", "found nothing"),  # never reached
    ],
)
def test_a_point_that_gives_no_vectors_is_refused(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        KeyPoint(made("gpt2", GPT), name)
