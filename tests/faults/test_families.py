"""Wrappers are transparent: what a base does alone, the mixture at alpha 0 does, for every family of models."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, StaticCache

from memdec.errors import ConfigError, ModelError
from memdec.harness import base_lm
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
PLAIN = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [3.0, 5.0, 9.0, 17.0],
    "original_max_position_embeddings": 20,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "GPT-NeoX": ("gpt_neox", {**PLAIN, "intermediate_size": 24, "rotary_pct": 0.5}),
    "OPT": ("opt", {**PLAIN, "ffn_dim": 24, "word_embed_proj_dim": 16, "do_layer_norm_before": True}),
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
    "Falcon": ("falcon", {**PLAIN, "new_decoder_architecture": True, "num_kv_heads": 1}),
    "Falcon alibi": ("falcon", {**PLAIN, "alibi": True}),
    "Mamba": ("mamba", {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 2}),
}  # fmt: skip
PROCESSORS = {
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "suppress_tokens": list(range(3, 60)),
    "bad_words_ids": [[70], [80, 81]],
    "min_new_tokens": 10,
    "forced_eos_token_id": 7,
    "begin_suppress_tokens": list(range(8, 110)),
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
    family: str,
    tokenizer_folder: Path,
    small_folder: Path,
    tmp_path: Path,
    corpus_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = made(family, 0)
    base.generation_config.update(repetition_penalty=1.3, no_repeat_ngram_size=3)
    base.save_pretrained(tmp_path / "base")
    how: dict[str, Any] = {
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
    hf = HFLM(
        **(how | {"batch_size": 1}), logits_cache=False
    )  # in a batch, its rows may depend on each other (longrope)
    systems = [
        MemDecInterp(**how, memory=str(small_folder), alpha=0.0, context=WINDOW, stride=WINDOW),
        MemDecInterp(**how, context=WINDOW, stride=WINDOW),
    ]
    for kind, asked in requests.items():
        expected, *found = [getattr(lm, kind)(asked, disable_tqdm=True) for lm in (hf, *systems)]
        if kind == "loglikelihood":  # with contexts that are read once for their two words
            with monkeypatch.context() as patch:
                patch.setattr(base_lm, "_SAVED", 1)
                found += [lm.loglikelihood(asked, disable_tqdm=True) for lm in systems]
        for answers in found:
            if kind == "generate_until":
                assert answers == expected
            else:
                torch.testing.assert_close(torch.tensor(answers), torch.tensor(expected), atol=1e-4, rtol=1e-5)
    assert len(set(expected)) > 1


def test_contexts_of_a_family_without_a_cache_are_read_with_each_text(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("openai-gpt", vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    how = {"pretrained": str(tmp_path), "tokenizer": str(tokenizer_folder), "device": "cpu", "max_length": WINDOW}
    pairs = [(PROMPTS[2], text) for text in (" matrix 3", " token 12", " size 4")]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    monkeypatch.setattr(base_lm, "_SAVED", 1)
    found, expected = (
        [value for value, _ in kind(**how).loglikelihood(asked, disable_tqdm=True)] for kind in (MemDecInterp, HFLM)
    )
    assert found == pytest.approx(expected, abs=1e-4)


# --- generation ---------------------------------------------------------------------------------------------------

CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "none": {"use_cache": False},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "chunks": {"prefill_chunk_size": 4, "disable_compile": True},
    "static chunks": {"cache_implementation": "static", "prefill_chunk_size": 4, "disable_compile": True},
    "beams": {"num_beams": 3},
}
ALONE_FAILS = {
    (family, kind) for family in ("Falcon alibi", "Mamba") for kind in CACHES if "static" in kind or "chunks" in kind
}  # in transformers itself


def generated(model: Any, batch: Any, **how: Any) -> Tensor:
    found: Tensor = model.generate(**batch, **{"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **how})
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_of_a_model_with_itself_generates_what_the_model_does(family: str, words: Any) -> None:
    """Prompts of three lengths, padded on the left; with longrope the texts grow past the switch of frequencies."""
    base, batch = made(family, 0), words(PROMPTS, return_tensors="pt", padding=True)
    base.generation_config.update(repetition_penalty=1.2, eos_token_id=None)
    mixtures = [
        MemDecForCausalLM.from_models(base, [copy.deepcopy(base)], [0.5]),
        MemDecForCausalLM.from_models(base, [made("GPT-2", 1)], [0.0]),
        MemDecForCausalLM.from_models(base, [], []),
    ]
    for name, how in CACHES.items():
        if (family, name) not in ALONE_FAILS:
            expected = generated(base, batch, **how)
            for mixture in mixtures if name == "dynamic" else mixtures[:1]:
                assert torch.equal(generated(mixture, batch, **how), expected), name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_that_is_not_merged_generates_as_alone(words: Any) -> None:
    from peft import LoraConfig, get_peft_model

    base, batch = made("Llama", 0), words(PROMPTS, return_tensors="pt", padding=True)
    base.generation_config.update(repetition_penalty=1.2, eos_token_id=None)
    adapted = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    ).eval()
    expected = generated(adapted, batch)
    assert torch.equal(generated(MemDecForCausalLM.from_models(adapted, [made("GPT-2", 1)], [0.0]), batch), expected)
    with adapted.disable_adapter():
        assert not torch.equal(generated(adapted, batch), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_has_the_probabilities_of_its_models(family: str, words: Any) -> None:
    """Against a plain loop in float64, without cache and padding."""
    base, memory = made(family, 0), made(family, 1)
    mixture = MemDecForCausalLM.from_models(base, [memory], [0.4])

    def joint(ids: list[int]) -> Tensor:
        with torch.no_grad():
            p = [model(torch.tensor([ids])).logits[0].double().softmax(-1) for model in (base, memory)]
        return 0.6 * p[0] + 0.4 * p[1]

    ids = words.encode(PROMPTS[2])
    torch.testing.assert_close(mixture(torch.tensor([ids])).logits[0].double(), joint(ids).log(), atol=1e-4, rtol=1e-4)
    # Frequencies of longrope depend on the longest row of a batch, in the model alone as well.
    batches = [PROMPTS] if "longrope" not in family else [[prompt] for prompt in PROMPTS]
    for prompts in batches:
        batch = words(prompts, return_tensors="pt", padding=True)
        found = generated(mixture, batch, eos_token_id=None)[:, batch["input_ids"].shape[1] :].tolist()
        for prompt, row in zip(prompts, found, strict=True):
            ids = words.encode(prompt)
            for token in row:
                assert token == int(joint(ids)[-1].argmax())
                ids.append(token)


# --- logits processors of the checkpoint (case 11) ----------------------------------------------------------------


def qwen2(seed: int) -> Any:
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=120, **(LLAMA | COMMON | {"initializer_range": 0.4}))).eval()


@pytest.mark.parametrize("name", PROCESSORS)
def test_logits_processors_act_as_on_the_base(name: str) -> None:
    base, memory = qwen2(0), qwen2(1)
    base.generation_config.update(**{name: PROCESSORS[name]}, eos_token_id=7, pad_token_id=0)
    acts = 0
    for seed in range(4):
        ids = torch.randint(8, 120, (1, 6), generator=torch.Generator().manual_seed(seed))
        how = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        plain = base.generate(ids, **how)
        for weight, second in ((0.0, memory), (0.4, base)):
            mixture = MemDecForCausalLM.from_models(base, [second], [weight])
            assert torch.equal(mixture.generate(ids, **how), plain)
        mixture = MemDecForCausalLM.from_models(base, [memory], [0.4])
        expected = mixture.generate(ids, **how)
        assert torch.equal(speculative.generate(mixture, ids, max_new_tokens=12).sequences, expected)
        mixture.generation_config.update(**{name: None})
        acts += not torch.equal(mixture.generate(ids, **how), expected)
    assert acts  # or the equality would prove nothing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_beams": 2}, "expected a generation config of greedy search, found beam search; use model.generate"),
        ({"guidance_scale": 1.5}, "expected a generation config without guidance_scale"),
        ({"stop_strings": ["a"]}, "expected a generation config without stop_strings"),
    ],
)
def test_speculative_decoding_refuses_what_it_cannot_give(changes: dict[str, Any], message: str) -> None:
    mixture = MemDecForCausalLM.from_models(qwen2(0), [qwen2(1)], [0.4])
    mixture.generation_config.update(**changes)
    with pytest.raises(ConfigError, match=message):
        speculative.generate(mixture, torch.arange(8, 12)[None], max_new_tokens=2)


def test_speculative_decoding_refuses_models_that_change_or_cannot_forget() -> None:
    for family, message in (
        ("Mamba", "that can forget"),
        ("Phi-3 longrope", "the same from 10 to 23 tokens"),
    ):
        mixture = MemDecForCausalLM.from_models(made(family, 0), [made(family, 1)], [0.4])
        with pytest.raises(ModelError, match=message):
            speculative.generate(mixture, torch.arange(8, 18)[None], max_new_tokens=14)
    mixture.generation_config.eos_token_id = None
    for length, n_new in ((4, 16), (21, 14)):  # before the switch of frequencies and after it
        ids = torch.arange(8, 8 + length)[None]
        expected = mixture.generate(ids, max_new_tokens=n_new, do_sample=False, pad_token_id=0)
        assert torch.equal(speculative.generate(mixture, ids, max_new_tokens=n_new).sequences, expected)


def test_a_family_that_generates_in_its_own_way_is_refused_before_anything_runs() -> None:
    class Own(Qwen2ForCausalLM):
        def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            raise AssertionError("ran")

    memory = Own(qwen2(1).config).eval()
    mixture = MemDecForCausalLM.from_models(qwen2(0), [memory], [0.4])
    with pytest.raises(
        ModelError, match=r"found Own with its own _update_model_kwargs_for_generation; use the model alone"
    ):
        mixture.generate(torch.arange(8, 12)[None], max_new_tokens=2)
    mixture.set_weights([0.0])
    assert mixture.generate(torch.arange(8, 12)[None], max_new_tokens=2).shape[1] >= 5


def test_a_static_cache_is_as_long_as_each_model_needs(words: Any) -> None:
    """The base holds six tokens, a window; its memory reads the whole text."""
    mixture = MemDecForCausalLM.from_models(made("Mistral", 0), [made("GPT-2", 1)], [0.5])
    mixture.generation_config.eos_token_id = None
    batch = words(PROMPTS, return_tensors="pt", padding=True)
    assert torch.equal(generated(mixture, batch, **CACHES["static"]), generated(mixture, batch))
    cache = StaticCache(config=mixture.base.config, max_cache_len=64)
    with pytest.raises(ConfigError, match="past_key_values: expected a static cache that holds whole texts"):
        generated(mixture, batch, past_key_values=cache)


@pytest.mark.parametrize("family", ["GPT-2", "Llama", "Mistral", "Gemma 3"])
@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_a_text_goes_on_from_the_cache_of_its_beginning(family: str, weight: float) -> None:
    """At weight 1 the base reads nothing, so a cache has the length of what the memory has read."""
    base, memory = made(family, 0), made(family, 1)
    mixture = MemDecForCausalLM.from_models(base, [memory], [weight])
    ids = torch.arange(8, 20)[None]
    how: dict[str, Any] = {"eos_token_id": None, "disable_compile": True}
    begun = generated(mixture, {"input_ids": ids[:, :5]}, return_dict_in_generate=True, **how)
    batch = {"input_ids": torch.cat([begun.sequences, ids[:, 5:]], 1)}
    alone = {0.0: base, 1.0: memory}.get(weight, mixture)
    expected = generated(alone, batch, use_cache=False, **how)
    assert begun.past_key_values.get_seq_length() == begun.sequences.shape[1] - 1
    for chunks in ({}, {"prefill_chunk_size": 2}):
        cache = copy.deepcopy(begun.past_key_values)
        assert torch.equal(generated(mixture, batch, past_key_values=cache, **chunks, **how), expected)


@pytest.mark.parametrize(
    ("before", "after", "fits"),
    [
        ([0.0, 0.0], [0.5, 0.0], False),
        ([0.5, 0.5], [0.4, 0.2], False),
        ([0.4, 0.0], [0.2, 0.6], False),
        ([1.0, 0.0], [0.0, 1.0], False),
        ([0.4, 0.2], [0.2, 0.6], True),
        ([0.4, 0.2], [0.0, 0.2], True),
    ],
)
@pytest.mark.parametrize("kind", ["Llama", "Mamba"])
def test_a_cache_that_a_model_did_not_fill_is_refused(
    before: list[float], after: list[float], fits: bool, kind: str
) -> None:
    mixture = MemDecForCausalLM.from_models(made("Llama", 0), [made("Llama", 1), made(kind, 2)], before)
    ids = torch.arange(8, 20)[None]
    begun = generated(mixture, {"input_ids": ids[:, :5]}, eos_token_id=None, return_dict_in_generate=True)
    batch = {"input_ids": torch.cat([begun.sequences, ids[:, 5:]], 1)}
    mixture.set_weights(after)
    if fits:
        expected = generated(mixture, batch, eos_token_id=None, use_cache=False)
        assert torch.equal(
            generated(mixture, batch, eos_token_id=None, past_key_values=begun.past_key_values), expected
        )
        mixture.set_weights(before)
    if not fits or after[0] == 0:  # the first memory has not read what came last
        with pytest.raises(ConfigError, match=r"made at other weights, without \[\d\]; begin without"):
            generated(mixture, batch, past_key_values=begun.past_key_values)


def test_padding_takes_no_position() -> None:
    """16 positions, 4 of 12 columns are padding: 8 + 8 tokens fit, and one more does not, with a cache or without."""
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = AutoConfig.for_model("gpt2", vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=16, **COMMON)
        models.append(AutoModelForCausalLM.from_config(config).eval())
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[:, :4] = 0
    batch = {"input_ids": torch.arange(8, 32).reshape(2, 12), "attention_mask": mask}
    how: dict[str, Any] = {"eos_token_id": None, "max_new_tokens": 9}
    for weight in (0.0, 1.0):
        mixture = MemDecForCausalLM.from_models(models[0], [models[1]], [weight])
        expected = generated(models[int(weight)], batch, **how)
        for use_cache in (True, False):
            assert torch.equal(generated(mixture, batch, use_cache=use_cache, **how), expected)
            with pytest.raises(ConfigError, match=r"text: expected at most 16 tokens .*, found 17"):
                generated(mixture, batch, use_cache=use_cache, eos_token_id=None, max_new_tokens=10)


def test_a_family_with_a_cache_of_its_own_generates_without_one() -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("rwkv", vocab_size=60, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16)
    ).eval()
    ids = torch.arange(8, 18)[None]
    how = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = base.generate(ids, **how)
    assert torch.equal(MemDecForCausalLM.from_models(base, [], []).generate(ids, **how), expected)


def test_what_mamba_cannot_read_is_refused() -> None:
    mixture = MemDecForCausalLM.from_models(made("Mamba", 0), [], [])
    with pytest.raises(
        ModelError, match="can read a prompt in chunks, found MambaForCausalLM; leave prefill_chunk_size"
    ):
        mixture.generate(torch.arange(8, 18)[None], max_new_tokens=2, prefill_chunk_size=4)


def test_a_saved_mixture_keeps_its_generation_config(tmp_path: Path) -> None:
    base = qwen2(0)
    base.generation_config.repetition_penalty = 1.1
    mixture = MemDecForCausalLM.from_models(base, [qwen2(1)], [0.4])
    mixture.generation_config.no_repeat_ngram_size = 4
    mixture.save_pretrained(tmp_path / "m")
    found = MemDecForCausalLM.from_pretrained(tmp_path / "m").generation_config
    assert (found.repetition_penalty, found.no_repeat_ngram_size) == (1.1, 4)


# --- tokens beyond the head (case 03), and keywords of `hf` ----------------------------------------------------------


@pytest.fixture(scope="module")
def with_more(base_folder: Path, small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Base and memory whose tokenizer has a control token beyond the head."""
    home = tmp_path_factory.mktemp("more")
    for folder, name in ((base_folder, "base"), (small_folder, "small")):
        loading.load(folder).save_pretrained(home / name)
        words = tokens.load_tokenizer(str(folder))
        words.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
        words.save_pretrained(home / name)
    return home / "base", home / "small"


def test_a_control_token_beyond_the_head_is_accepted(with_more: tuple[Path, Path]) -> None:
    base, small = with_more
    asked = [Instance("loglikelihood", {}, ("The matrix", " returns"), 0)]
    how: dict[str, Any] = {"pretrained": str(base), "device": "cpu", "dtype": "float32"}
    expected = HFLM(**how).loglikelihood(asked, disable_tqdm=True)[0]
    for more in ({}, {"memory": str(small), "alpha": 0.0}):
        assert MemDecInterp(**how, **more).loglikelihood(asked, disable_tqdm=True)[0] == pytest.approx(
            expected, abs=1e-5
        )
    assert MemDecForCausalLM.from_parts(base, [small], [0.5]).n_vocab == 300
    assert tokens.n_needed(tokens.load_tokenizer(str(base))) == 300


@pytest.mark.parametrize("pair", [("The <image_soft_token>", " is"), ("The", "<image_soft_token>")])
def test_a_token_beyond_the_head_in_a_text_is_named(with_more: tuple[Path, Path], pair: tuple[str, str]) -> None:
    lm = MemDecInterp(pretrained=str(with_more[0]), device="cpu", dtype="float32")
    message = r"text: expected token ids below 300 \(.* of the models\), found 300, which the tokenizer added; take"
    with pytest.raises(ModelError, match=message):
        lm.loglikelihood([Instance("loglikelihood", {}, pair, 0)], disable_tqdm=True)
    with pytest.raises(ModelError, match=message):
        lm.token_scores("".join(pair))
    with pytest.raises(ModelError, match=message):
        lm.model.generate(torch.tensor([[1, 300]]), max_new_tokens=2)


def test_a_subfolder_and_another_folder_for_the_tokenizer(with_more: tuple[Path, Path], tmp_path: Path) -> None:
    base, small = with_more
    loading.load(base).save_pretrained(tmp_path / "repository" / "weights")
    tokens.load_tokenizer(str(base)).save_pretrained(tmp_path / "words")
    asked = [Instance("loglikelihood", {}, ("The matrix", " returns"), 0)]
    common: dict[str, Any] = {"memory": str(small), "alpha": 0.3, "device": "cpu", "dtype": "float32"}
    expected = MemDecInterp(pretrained=str(base), **common).loglikelihood(asked, disable_tqdm=True)
    words = str(tmp_path / "words")
    for how in (
        {"pretrained": str(base.parent), "subfolder": "base"},
        {"pretrained": str(tmp_path / "repository"), "subfolder": "weights", "tokenizer": words},
        {"pretrained": str(tmp_path / "repository" / "weights"), "tokenizer": words, "revision": "main"},
    ):
        lm = MemDecInterp(**how, **common)
        assert lm.loglikelihood(asked, disable_tqdm=True) == expected
        assert lm.parts.base == str(Path(how["pretrained"], how.get("subfolder", "")))


def test_mixed_precision_reaches_scores(base_folder: Path) -> None:
    asked = [Instance("loglikelihood", {}, ("The matrix", " returns the index of size 4"), 0)]
    how: dict[str, Any] = {"pretrained": str(base_folder), "device": "cpu", "dtype": "float32"}
    found = {}
    for name, more in {"plain": {}, "mixed": {"mixed_precision_dtype": "bfloat16"}}.items():
        found[name] = MemDecInterp(**how, **more).loglikelihood(asked, disable_tqdm=True)[0][0]
    mixed = HFLM(**how, mixed_precision_dtype="bfloat16", softmax_dtype="float32").loglikelihood(
        asked, disable_tqdm=True
    )
    assert found["mixed"] == pytest.approx(mixed[0][0], abs=1e-3)
    assert abs(found["mixed"] - found["plain"]) > 1e-3


def test_models_of_longrope_generate_after_they_scored(tokenizer_folder: Path, tmp_path: Path) -> None:
    made("Phi-3 longrope", 0).save_pretrained(tmp_path / "base")
    lm = MemDecInterp(pretrained=str(tmp_path / "base"), tokenizer=str(tokenizer_folder), device="cpu", dtype="float32")
    lm.token_scores(PROMPTS[2] * 2)
    settings = {"until": ["?"], "max_gen_toks": 4, "do_sample": False}
    assert lm.generate_until([Instance("generate_until", {}, (PROMPTS[2], settings), 0)], disable_tqdm=True)[0]
