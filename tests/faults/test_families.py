"""Wrappers are transparent: what a base does alone, the mixture at alpha 0 does, for every family of models."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationMixin, Qwen2Config, Qwen2ForCausalLM

from memdec.errors import ConfigError, ModelError
from memdec.harness.models import MemDecInterp
from memdec.inference import speculative
from memdec.inference.mixture import MemDecForCausalLM
from memdec.models import loading
from memdec.text import tokens

WINDOW = 32  # tokens of a rolling window
PROMPTS = ["The matrix 3 returns the", "A", "The token 12 reads the vector 7 of size 4.\nThe window"]
COMMON = {"bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3, "tie_word_embeddings": False}
LLAMA = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
FALCON = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [3.0, 5.0, 9.0, 17.0],
    "original_max_position_embeddings": 20,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "GPT-NeoX": ("gpt_neox", {**LLAMA, "rotary_pct": 0.5}),
    "OPT": ("opt", {**LLAMA, "ffn_dim": 24, "word_embed_proj_dim": 16, "do_layer_norm_before": True}),
    "Llama": ("llama", LLAMA),
    "Mistral": ("mistral", {**LLAMA, "sliding_window": 6}),
    "Qwen2": ("qwen2", LLAMA),
    "Qwen3": ("qwen3", LLAMA),
    "Gemma 2": ("gemma2", {**LLAMA, "sliding_window": 6, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0}),
    "Gemma 3": ("gemma3_text", {**LLAMA, "sliding_window": 6, "query_pre_attn_scalar": 8,
                                "layer_types": ["sliding_attention", "full_attention"]}),
    "Phi-3": ("phi3", {**LLAMA, "pad_token_id": 0}),
    "Phi-3 longrope": ("phi3", {**LLAMA, "pad_token_id": 0, "rope_parameters": LONGROPE,
                                "original_max_position_embeddings": 20}),
    "Falcon": ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 1}),
    "Falcon alibi": ("falcon", {**FALCON, "alibi": True}),
    "Mamba": ("mamba", {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 2}),
}  # fmt: skip
PROCESSORS = {
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "suppress_tokens": list(range(3, 60)),
    "bad_words_ids": [[70], [80, 81]],
    "min_new_tokens": 5,
    "forced_eos_token_id": 7,
    "begin_suppress_tokens": [90, 91, 92],
    "exponential_decay_length_penalty": (2, 1.5),
    "sequence_bias": [[[100], 2.0]],
}


def made(family: str, seed: int, n_vocab: int = 300) -> Any:
    """A tiny model of a family with random weights."""
    kind, changes = FAMILIES[family]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, vocab_size=n_vocab, **(COMMON | changes))
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def words(tokenizer_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer_folder, padding_side="left")


# --- lm-eval: every request kind against `hf` ---------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_lm_eval_gets_what_hf_gets(
    family: str, tokenizer_folder: Path, small_folder: Path, tmp_path: Path, corpus_folder: Path
) -> None:
    base = made(family, 0)
    base.generation_config.update(repetition_penalty=1.3, no_repeat_ngram_size=3)
    base.save_pretrained(tmp_path / "base")
    how = {
        "pretrained": str(tmp_path / "base"), "tokenizer": str(tokenizer_folder), "device": "cpu", "dtype": "float32",
        "batch_size": 3, "max_length": WINDOW,
    }  # fmt: skip
    text = "\n".join(PROMPTS) * 2
    pairs = [(prompt, word) for prompt in PROMPTS for word in (" matrix", " size 12")]  # each a choice of two
    settings = {"until": ["?"], "max_gen_toks": 10, "do_sample": False}
    requests = {
        "loglikelihood": [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)],
        "loglikelihood_rolling": [Instance("loglikelihood_rolling", {}, (text,), 0)],
        "generate_until": [Instance("generate_until", {}, (prompt, settings), i) for i, prompt in enumerate(PROMPTS)],
    }
    hf = HFLM(**how, logits_cache=False)
    systems = [
        MemDecInterp(**how, memory=str(small_folder), alpha=0.0, context=WINDOW, stride=WINDOW),
        MemDecInterp(**how, context=WINDOW, stride=WINDOW),
    ]
    for kind, asked in requests.items():
        expected, *found = [getattr(lm, kind)(asked, disable_tqdm=True) for lm in (hf, *systems)]
        for answers in found:
            if kind == "generate_until":
                assert answers == expected
            else:
                torch.testing.assert_close(torch.tensor(answers), torch.tensor(expected), atol=1e-4, rtol=1e-5)
    assert len(set(expected)) > 1


# --- generation ---------------------------------------------------------------------------------------------------

CACHES = {
    "dynamic": {},
    "none": {"use_cache": False},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "chunks": {"prefill_chunk_size": 4, "disable_compile": True},
    "beams": {"num_beams": 3},
}


def generated(model: Any, batch: Any, **how: Any) -> Tensor:
    settings = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0, **how}
    return model.generate(**batch, **settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_of_a_model_with_itself_is_the_model(family: str, words: Any) -> None:
    base, batch = made(family, 0), words(PROMPTS, return_tensors="pt", padding=True)
    base.generation_config.update(repetition_penalty=1.2, eos_token_id=None)
    itself = MemDecForCausalLM.from_models(base, [copy.deepcopy(base)], [0.5])
    other = MemDecForCausalLM.from_models(base, [made("GPT-2", 1)], [0.0])
    alone = MemDecForCausalLM.from_models(base, [], [])
    for name, how in CACHES.items():
        try:
            expected = generated(base, batch, **how)
        except Exception as error:
            print(family, name, type(error).__name__, str(error)[:200])
            for model in (itself, other, alone):
                try:
                    generated(model, batch, **how)
                    print("   none")
                except Exception as e:
                    print("   ", type(e).__name__, str(e)[:200])
            continue
        for i, model in enumerate((itself, other, alone)):
            got = generated(model, batch, **how)
            if not torch.equal(got, expected):
                print(family, name, i, (got != expected).sum(1) if got.shape == expected.shape else (got.shape, expected.shape))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_is_that_of_the_probabilities(family: str, words: Any) -> None:
    """Against a plain loop in float64, without cache and padding."""
    base, memory = made(family, 0), made(family, 1)
    mixture = MemDecForCausalLM.from_models(base, [memory], [0.4])
    batch = words(PROMPTS, return_tensors="pt", padding=True)

    def joint(ids: list[int]) -> Tensor:
        with torch.no_grad():
            p = [model(torch.tensor([ids])).logits[0].double().softmax(-1) for model in (base, memory)]
        return 0.6 * p[0] + 0.4 * p[1]

    ids = words.encode(PROMPTS[2])
    log_p = mixture(torch.tensor([ids])).logits.log_softmax(-1)[0]
    torch.testing.assert_close(log_p.double(), joint(ids).log(), atol=1e-4, rtol=1e-4)
    found = generated(mixture, batch, eos_token_id=None)[:, batch["input_ids"].shape[1] :].tolist()
    for prompt, row in zip(PROMPTS, found, strict=True):
        ids = words.encode(prompt)
        expect = []
        for token in row:
            expect.append(int(joint(ids)[-1].argmax()))
            ids.append(token)
        if row != expect:
            print(family, prompt, row, expect)
