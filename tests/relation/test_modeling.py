"""The mixture as a model of transformers, against plain loops over the models alone."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from making import CONTEXT, spec
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GPT2LMHeadModel, StaticCache, pipeline

from memdec.errors import ConfigError, ModelError, ResourceError
from memdec.inference.mixture import MemDecForCausalLM
from memdec.models import loading
from memdec.text import tokens

PROMPTS = [
    "The matrix", "The token 12 returns the", "A", "The vector 7 reads the index of size 4.\nThe", "The kernel 3", "size",
    "The window of size 9 scales the token 4. The", "\n",
]  # fmt: skip
NEW = 7


@pytest.fixture(scope="module")
def words(tokenizer_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer_folder, padding_side="left")


@pytest.fixture(scope="module")
def rotary(words: Any) -> Any:
    """A memory of another architecture and with a padded head."""
    return loading.from_scratch(spec(16, architecture="qwen2"), len(words) + 12, CONTEXT, words.eos_token_id).eval()


@pytest.fixture(scope="module")
def mixture(base_folder: Path, small_folder: Path, rotary: Any, words: Any) -> MemDecForCausalLM:
    base, small = loading.load(base_folder), loading.load(small_folder)
    return MemDecForCausalLM.from_models(base, [small, rotary], [0.3, 0.25], n_vocab=len(words))


def plain(mixture: MemDecForCausalLM, ids: Tensor) -> Tensor:
    """p of every position of one text, without any cache or padding, float64."""
    weights = [1 - sum(mixture.config.weights), *mixture.config.weights]
    parts = zip([mixture.base, *mixture.memories], weights, strict=True)
    with torch.no_grad():
        return sum(w * m(ids[None]).logits[0, :, : mixture.n_vocab].double().softmax(-1) for m, w in parts)


def greedy(mixture: MemDecForCausalLM, ids: list[int], n_new: int, eos: int) -> list[int]:
    new: list[int] = []
    while len(new) < n_new and eos not in new:
        new.append(int(plain(mixture, torch.tensor(ids + new))[-1].argmax()))
    return new


def test_logits_are_the_log_probabilities_of_the_mixture(mixture: MemDecForCausalLM) -> None:
    ids = torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(0))
    out = mixture(input_ids=ids, labels=ids)
    assert out.logits.dtype == torch.float32
    expected = torch.stack([plain(mixture, row) for row in ids])
    torch.testing.assert_close(out.logits.exp().double(), expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(out.logits.exp().sum(-1), torch.ones(3, 20))
    nll = -expected[:, :-1].log().gather(-1, ids[:, 1:, None]).mean()
    assert out.loss.item() == pytest.approx(nll.item(), rel=1e-5)
    torch.testing.assert_close(mixture(input_ids=ids, logits_to_keep=4).logits, out.logits[:, -4:])


def test_log_probs_of_several_memories_are_mixed_by_weight(mixture: MemDecForCausalLM) -> None:
    ids, kept = torch.arange(9)[None], list(mixture.config.weights)
    try:
        mixture.set_weights([0.6, 0.15])
        base, memory = mixture.log_probs(ids, logits_to_keep=4)
    finally:
        mixture.set_weights(kept)
    assert base is not None
    assert memory is not None
    alone = [m(ids).logits[:, -4:, : mixture.n_vocab].double().softmax(-1) for m in (mixture.base, *mixture.memories)]
    torch.testing.assert_close(base.exp().double(), alone[0], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(memory.exp().double(), 0.8 * alone[1] + 0.2 * alone[2], atol=1e-6, rtol=1e-4)


def test_what_has_no_weight_does_not_run(mixture: MemDecForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, kept = torch.arange(9)[None], list(mixture.config.weights)
    monkeypatch.setattr(mixture.memories[1], "forward", lambda *_, **__: pytest.fail("ran"))
    try:
        mixture.set_weights([1.0, 0.0])
        monkeypatch.setattr(mixture.base, "forward", lambda *_, **__: pytest.fail("ran"))
        alone = mixture.memories[0](ids).logits.log_softmax(-1)
        assert torch.equal(mixture(input_ids=ids).logits, alone)
    finally:
        mixture.set_weights(kept)


def test_padding_on_the_left_changes_no_probability(mixture: MemDecForCausalLM, words: Any) -> None:
    batch = words(PROMPTS, return_tensors="pt", padding=True)
    how = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    out = mixture.generate(**batch, **how, output_logits=True, return_dict_in_generate=True)
    new = out.sequences[:, batch["input_ids"].shape[1] :].tolist()
    for step, log_p in enumerate(out.logits):
        for prompt, tokens_, row in zip(PROMPTS, new, log_p, strict=True):
            expected = plain(mixture, torch.tensor(words.encode(prompt) + tokens_[:step]))[-1]
            torch.testing.assert_close(row.softmax(-1).double(), expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "how", [{}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}], ids=str
)
def test_fault_27_generation_in_a_left_padded_batch_equals_a_plain_loop(
    mixture: MemDecForCausalLM, words: Any, how: dict[str, Any]
) -> None:
    batch = words(PROMPTS, return_tensors="pt", padding=True)
    found = mixture.generate(**batch, max_new_tokens=NEW, do_sample=False, **how)[:, batch["input_ids"].shape[1] :]
    assert found.shape[1] == NEW
    for prompt, row in zip(PROMPTS, found.tolist(), strict=True):
        expected = greedy(mixture, words.encode(prompt), NEW, words.eos_token_id)
        assert row[: len(expected)] == expected


def test_every_model_gets_the_mask(mixture: MemDecForCausalLM, words: Any) -> None:
    """Without positions: from those transformers finds out by itself where a text begins."""
    batch = words(PROMPTS, return_tensors="pt", padding=True)
    weights = [1 - sum(mixture.config.weights), *mixture.config.weights]
    parts = list(zip([mixture.base, *mixture.memories], weights, strict=True))

    def expected(**inputs: Tensor) -> Tensor:
        return sum(w * m(**inputs).logits[:, -1, : mixture.n_vocab].double().softmax(-1) for m, w in parts)

    found = mixture(**batch).logits[:, -1].exp().double()
    torch.testing.assert_close(found, expected(**batch), atol=1e-6, rtol=1e-3)
    assert float((found - expected(input_ids=batch["input_ids"])).abs().max()) > 1e-3


def test_beams_move_the_caches_of_all_models(mixture: MemDecForCausalLM, words: Any) -> None:
    batch = words(PROMPTS, return_tensors="pt", padding=True)
    with_cache, without = (
        mixture.generate(
            **batch, max_new_tokens=NEW, num_beams=4, do_sample=False, use_cache=use_cache,
            output_scores=True, return_dict_in_generate=True,
        )
        for use_cache in (True, False)
    )  # fmt: skip
    assert torch.equal(with_cache.sequences, without.sequences)
    torch.testing.assert_close(with_cache.sequences_scores, without.sequences_scores)
    alone = mixture.generate(**batch, max_new_tokens=NEW, do_sample=False)
    assert not torch.equal(alone, with_cache.sequences[:, : alone.shape[1]])  # or beams would prove nothing


def test_sampling_follows_the_joint_distribution(mixture: MemDecForCausalLM, words: Any) -> None:
    from scipy.stats import chisquare

    torch.manual_seed(0)
    n, ids = 4000, words.encode("The matrix 3 returns the")
    # Few tokens stay in play, so that each has enough draws; the second one shows that the caches went along.
    kept = plain(mixture, torch.tensor(ids))[-1].topk(3).indices.tolist()
    others = [[token] for token in range(mixture.n_vocab) if token not in kept]
    drawn = mixture.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=2, do_sample=True, top_k=0,
        num_return_sequences=n, eos_token_id=None, bad_words_ids=others,
    )[:, len(ids) :]  # fmt: skip
    expected = []
    for first in kept:
        p, q = (plain(mixture, torch.tensor(text))[-1][kept] for text in (ids, [*ids, first]))
        expected += (n * p[kept.index(first)] / p.sum() * q / q.sum()).tolist()
    counts = [int((drawn == torch.tensor([a, b])).all(1).sum()) for a in kept for b in kept]
    assert chisquare(counts, expected).pvalue > 1e-3


def test_a_mixture_can_verify_what_its_memory_drafts(mixture: MemDecForCausalLM, words: Any) -> None:
    for prompt in PROMPTS[:3]:
        batch = words(prompt, return_tensors="pt")
        plainly = mixture.generate(**batch, max_new_tokens=NEW, do_sample=False)
        drafted = mixture.generate(**batch, max_new_tokens=NEW, do_sample=False, assistant_model=mixture.memories[0])
        assert torch.equal(drafted, plainly)


@pytest.mark.parametrize("by_reference", [False, True])
def test_a_saved_mixture_is_the_same(
    base_folder: Path, small_folder: Path, tmp_path: Path, by_reference: bool, words: Any
) -> None:
    made = MemDecForCausalLM.from_parts(base_folder, [small_folder, base_folder], [0.5, 0.125])
    made.save_pretrained(tmp_path / "m", by_reference=by_reference)
    assert bool(list((tmp_path / "m").rglob("*.safetensors"))) != by_reference
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert isinstance(loaded, MemDecForCausalLM)
    assert loaded.config.weights == [0.5, 0.125]
    ids = torch.arange(12)[None]
    assert torch.equal(loaded(input_ids=ids).logits, made(input_ids=ids).logits)
    kept = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert tokens.fingerprint(kept) == tokens.fingerprint(words)
    loaded.save_pretrained(tmp_path / "twice", by_reference=by_reference)
    assert tokens.fingerprint(AutoTokenizer.from_pretrained(tmp_path / "twice")) == tokens.fingerprint(words)
    if not by_reference:
        moved = (tmp_path / "m").rename(tmp_path / "elsewhere")
        again = MemDecForCausalLM.from_pretrained(moved, memory_dtype="bfloat16")
        assert {m.dtype for m in again.memories} == {torch.bfloat16}
        assert again.dtype == torch.float32


def test_a_folder_of_another_kind_and_a_model_from_memory_are_refused(
    base_folder: Path, mixture: MemDecForCausalLM, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="expected a model of the type memdec, found gpt2"):
        MemDecForCausalLM.from_pretrained(base_folder)
    with pytest.raises(ModelError, match="found one made in memory"):
        mixture.save_pretrained(tmp_path / "m", by_reference=True)


@pytest.fixture(scope="module")
def saved(mixture: MemDecForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the mixture in a subfolder, `m`."""
    folder = tmp_path_factory.mktemp("saved")
    mixture.save_pretrained(folder / "m")
    return folder


def test_parts_have_the_number_type_by_its_earlier_name(base_folder: Path, small_folder: Path) -> None:
    found = MemDecForCausalLM.from_parts(base_folder, [small_folder], [0.5], torch_dtype=torch.bfloat16)
    assert {model.dtype for model in (found.base, *found.memories)} == {torch.bfloat16}


@pytest.mark.parametrize("kind", [MemDecForCausalLM, AutoModelForCausalLM])
def test_a_mixture_is_loaded_as_asked(saved: Path, kind: Any, mixture: MemDecForCausalLM) -> None:
    asked = {"weights": [0.5, 0.5], "torch_dtype": torch.bfloat16, "attn_implementation": "eager", "subfolder": "m"}
    nothing = {"gguf_file": None, "quantization_config": None, "output_loading_info": False, "low_cpu_mem_usage": True}
    found = kind.from_pretrained(saved, **asked, **nothing)
    assert found.config.weights == [0.5, 0.5]
    for model, ours in zip((found.base, *found.memories), (mixture.base, *mixture.memories), strict=True):
        assert (model.dtype, model.config._attn_implementation) == (torch.bfloat16, "eager")
        weight, expected = (each.get_output_embeddings().weight for each in (model, ours))
        assert torch.equal(weight, expected.bfloat16())


@pytest.mark.parametrize("kind", [MemDecForCausalLM, AutoModelForCausalLM])
@pytest.mark.parametrize(
    "given", [{"dtyp": "bfloat16"}, {"quantization_config": {}}, {"output_loading_info": True}], ids=str
)
def test_what_a_mixture_cannot_be_loaded_with_is_named(saved: Path, kind: Any, given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(ConfigError, match=f"m: expected arguments that from_pretrained .* knows, found {name}; leave"):
        kind.from_pretrained(saved / "m", **given)
    with pytest.raises(ConfigError, match=r"expected one per memory \(2\), found 1"):
        kind.from_pretrained(saved / "m", weights=[0.9])


def test_a_pipeline_loads_a_mixture(base_folder: Path, small_folder: Path, tmp_path: Path) -> None:
    """With arguments of its own."""
    made = MemDecForCausalLM.from_parts(base_folder, [small_folder], [0.5])
    made.save_pretrained(tmp_path / "m")
    found = pipeline("text-generation", str(tmp_path / "m"), device="cpu").model
    assert torch.equal(found(torch.arange(12)[None]).logits, made(torch.arange(12)[None]).logits)


def test_a_mixture_is_uploaded_as_a_whole_or_not_at_all(
    mixture: MemDecForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passed on, push_to_hub would upload every model to the same place."""
    monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", lambda *_, **__: pytest.fail("passed on"))
    with pytest.raises(ConfigError, match=r"found push_to_hub=True; .* upload with the mixture's push_to_hub"):
        mixture.save_pretrained(tmp_path / "m", push_to_hub=True, repo_id="me/mixture")
    assert not (tmp_path / "m").exists()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft
@pytest.mark.parametrize("by_reference", [False, True])
def test_a_model_with_an_adapter_is_saved_only_once_it_is_merged(
    base_folder: Path, small_folder: Path, tmp_path: Path, by_reference: bool
) -> None:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, init_lora_weights=False, target_modules=["c_attn"], fan_in_fan_out=True)
    adapted, memory = get_peft_model(loading.load(base_folder), lora), loading.load(small_folder)
    for parts in ([adapted, memory], [memory, adapted]):
        made = MemDecForCausalLM.from_models(parts[0], parts[1:], [0.5])
        with pytest.raises(ModelError, match=r"without an adapter, found one of peft in PeftModel; merge it"):
            made.save_pretrained(tmp_path / "m", by_reference=by_reference)
    assert not (tmp_path / "m").exists()
    merged = MemDecForCausalLM.from_models(adapted.merge_and_unload(), [memory], [0.5])
    if by_reference:
        with pytest.raises(
            ModelError, match=r"expected weights as in .*, found 2 of GPT2LMHeadModel that differ; leave"
        ):
            merged.save_pretrained(tmp_path / "m", by_reference=True)
    else:
        merged.save_pretrained(tmp_path / "m")
        ids = torch.arange(12)[None]
        assert torch.equal(MemDecForCausalLM.from_pretrained(tmp_path / "m")(ids).logits, merged(ids).logits)


def test_a_plain_model_with_a_longest_input_is_refused(rotary: Any, tmp_path: Path) -> None:
    rotary.config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="expected a model of the type memdec, found qwen2; use from_parts"):
        MemDecForCausalLM.from_pretrained(tmp_path)


def test_a_reference_holds_in_another_working_folder(
    rotary: Any, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in (rotary, words):
        part.save_pretrained(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    made = MemDecForCausalLM.from_parts("m", ["m"], [0.5])
    loose = MemDecForCausalLM.from_models(loading.load("m"), [], [])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    made.save_pretrained("mixture", by_reference=True)
    parts = json.loads(Path("mixture", "config.json").read_text())["parts"]
    assert [part["path"] for part in parts] == [str(tmp_path / "m")] * 2
    with pytest.raises(ModelError, match="expected a folder that is there or a commit of the Hub, found m"):
        loose.save_pretrained("loose", by_reference=True)


def test_a_reference_has_the_subfolder(
    base_folder: Path, small_folder: Path, words: Any, saved: Path, tmp_path: Path
) -> None:
    """Of a model beside another one, and of the models of a mixture."""
    home, ids = tmp_path / "r", torch.arange(12)[None]
    for source, folder in ((small_folder, home), (base_folder, home / "sub")):
        for part in (loading.load(source), words):
            part.save_pretrained(folder)
    for made in (
        MemDecForCausalLM.from_parts(home, [home], [0.5], subfolder="sub"),
        MemDecForCausalLM.from_pretrained(saved, subfolder="m"),
    ):
        made.save_pretrained(tmp_path / "m", by_reference=True)
        loaded = MemDecForCausalLM.from_pretrained(tmp_path / "m")
        assert torch.equal(loaded(input_ids=ids).logits, made(input_ids=ids).logits)
    plain = AutoModelForCausalLM.from_pretrained(home, subfolder="sub")  # which does not say so
    with pytest.raises(ModelError, match=r"expected weights as in .*r, found \d+ of GPT2LMHeadModel that differ"):
        MemDecForCausalLM.from_models(plain, [], []).save_pretrained(tmp_path / "p", by_reference=True)


def test_a_reference_to_the_hub_is_compared_with_the_cache(
    base_folder: Path, small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    base = loading.load(base_folder)
    base.config.name_or_path, base.config._commit_hash = "some/model", "c0"
    mixture = MemDecForCausalLM.from_models(base, [], [])
    found: dict[tuple[str, str], Path] = {}

    def cached(name: str, file: str, revision: str) -> str | None:
        return str(found[name, revision] / file) if (name, revision) in found else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    for files in ({}, {("some/model", "c0"): base_folder}):
        found |= files
        mixture.save_pretrained(tmp_path / "m", by_reference=True)
        (part,) = json.loads((tmp_path / "m" / "config.json").read_text())["parts"]
        assert (part["path"], part["revision"]) == ("some/model", "c0")
    found["some/model", "c0"] = small_folder
    with pytest.raises(ModelError, match="expected weights as in some/model, found"):
        mixture.save_pretrained(tmp_path / "m", by_reference=True)


@pytest.mark.parametrize(
    ("memories", "weights", "message"),
    [
        ("mm", [0.6], r"expected a list of memories .*, found 'mm' and \[0\.6\]"),
        (["m"], 0.6, r"a list with the weight of each, found \['m'\] and 0\.6"),
        (["m"], [0.5, 0.1], r"expected one per memory \(1\), found 2"),
    ],
)
def test_parts_that_are_no_lists_are_named_before_anything_is_loaded(memories: Any, weights: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MemDecForCausalLM.from_parts("nowhere", memories, weights)


def test_models_that_are_no_lists_are_named(mixture: MemDecForCausalLM, rotary: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"from_models: expected a list of memories .*, found Qwen2ForCausalLM and \[0\.4\];"
    ):
        MemDecForCausalLM.from_models(mixture.base, rotary, [0.4])  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"a list with the weight of each, found \[Qwen2ForCausalLM\] and 0\.4; write \[memory\]"
    ):
        MemDecForCausalLM.from_models(mixture.base, [rotary], 0.4)  # type: ignore[arg-type]


def test_from_config_has_the_same_shapes(mixture: MemDecForCausalLM) -> None:
    fresh = AutoModelForCausalLM.from_config(mixture.config)
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in mixture.parameters()]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5], r"expected one per memory \(2\), found 1"),
        ([0.75, 0.5], r"expected a sum of at most 1 .* found 1\.25"),
        ([-0.1, 0.5], "expected a number from 0"),
    ],
)
def test_bad_weights(mixture: MemDecForCausalLM, weights: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mixture.set_weights(weights)
    assert mixture.config.weights == [0.3, 0.25]


def test_weights_that_round_to_one_leave_nothing_to_the_base(mixture: MemDecForCausalLM) -> None:
    from memdec.maths import mixing

    assert mixing.base_weight([0.1] * 10) == 0.0
    assert mixing.base_weight([0.7, 0.1, 0.2]) == 0.0
    assert mixing.base_weight([]) == 1.0
    assert mixing.base_weight([1 - 1e-16]) > 0.0  # one weight is what it says


def test_too_long_a_text_is_an_error_not_a_crash(mixture: MemDecForCausalLM) -> None:
    with pytest.raises(ConfigError, match=f"at most {CONTEXT} tokens .*, found {CONTEXT + 1}"):
        mixture(input_ids=torch.zeros(1, CONTEXT + 1, dtype=torch.long))
    with pytest.raises(ConfigError, match=f"at most {CONTEXT} tokens"):
        mixture.generate(torch.zeros(1, CONTEXT - 2, dtype=torch.long), max_new_tokens=NEW, eos_token_id=None)


def test_a_cache_that_only_the_base_has_filled_is_refused(mixture: MemDecForCausalLM) -> None:
    cache = DynamicCache(config=mixture.base.config)
    mixture.base(torch.arange(4)[None], past_key_values=cache, use_cache=True)
    with pytest.raises(ConfigError, match="expected a new cache or one of this model"):
        mixture(input_ids=torch.arange(2)[None], past_key_values=cache, use_cache=True)


def test_a_loop_over_forward_hands_the_cache_on(mixture: MemDecForCausalLM) -> None:
    """As over the base alone: without `use_cache` a pass remembers the text, also in a cache of the base's shape."""
    ids = torch.arange(3, 12)[None]
    expected = torch.stack([plain(mixture, row) for row in ids]).log().float()
    config = mixture.base.config
    for cache in (None, DynamicCache(), DynamicCache(config=config), StaticCache(config=config, max_cache_len=CONTEXT)):
        first = mixture(input_ids=ids[:, :5], past_key_values=cache)
        second = mixture(input_ids=ids[:, 5:], past_key_values=first.past_key_values)
        torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), expected, atol=1e-4, rtol=1e-4)
        assert int(second.past_key_values.get_seq_length()) == ids.shape[1]
    assert mixture(input_ids=ids, use_cache=False).past_key_values is None


def test_forward_refuses_what_it_would_not_obey(mixture: MemDecForCausalLM) -> None:
    ids = torch.arange(9)[None]
    given = {"token_type_ids": ids, "atention_mask": ids, "output_hidden_states": True, "inputs_embeds": torch.ones(1)}
    for name, value in given.items():
        with pytest.raises(ConfigError, match=f"forward: expected input_ids, .*, found {name}; leave it out"):
            mixture(input_ids=ids, **{name: value})
    out = mixture(input_ids=ids, labels=ids, output_hidden_states=False, inputs_embeds=None, cache_position=ids[0])
    loss, logits = mixture(input_ids=ids, labels=ids, num_items_in_batch=2, use_cache=False, return_dict=False)
    assert torch.equal(logits, out.logits)
    assert loss.item() == pytest.approx(out.loss.item() * 8 / 2, rel=1e-5)


def test_a_memory_that_does_not_fit_is_named(rotary: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memdec.artefacts.devices.free_memory", lambda device: 1000)
    with pytest.raises(ResourceError, match=r"mem: expected .*B free on cuda:0, found 1 kB; use memory_dtype"):
        loading.placed(rotary, torch.device("cuda:0"), "mem")
    assert loading.placed(rotary, torch.device("cpu"), "mem") is rotary


def test_embeddings_are_not_resized(mixture: MemDecForCausalLM) -> None:
    with pytest.raises(ConfigError, match="resize them before mixing"):
        mixture.resize_token_embeddings(400)


def test_p_joint_is_at_least_alpha_p_mem(mixture: MemDecForCausalLM) -> None:
    ids = torch.arange(16)[None]
    joint = mixture(input_ids=ids).logits
    for memory, weight in zip(mixture.memories, mixture.config.weights, strict=True):
        log_p = memory(ids).logits[..., : mixture.n_vocab].log_softmax(-1)
        assert (joint >= log_p + math.log(weight) - 1e-5).all()
