"""Speculative decoding against plain decoding of the same mixture."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making import CONTEXT, made_text
from torch import Tensor
from transformers import LogitsProcessorList, MistralConfig, MistralForCausalLM

from memdec.errors import ConfigError
from memdec.inference import speculative
from memdec.inference.mixture import MemDecForCausalLM
from memdec.settings import TrainSettings
from memdec.text import tokens
from memdec.training import stages

ALPHA = 0.4
NEW = 12


@pytest.fixture(scope="module")
def mixture(
    dapt_folder: Path, small_folder: Path, token_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> MemDecForCausalLM:
    """Two models that know the text well enough to agree on most tokens."""
    out = tmp_path_factory.mktemp("memory") / "tuned"
    settings = TrainSettings(epochs=0.5, learning_rate=1e-2)
    stages.run_finetune(small_folder, token_folder, out, settings, context=CONTEXT, seed=0)
    return MemDecForCausalLM.from_parts(dapt_folder, [out], [ALPHA])


@pytest.fixture(scope="module")
def prompts(tokenizer_folder: Path) -> list[Tensor]:
    """20 pieces of made text, from one token to as many as there is room for."""
    ids = tokens.load_tokenizer(str(tokenizer_folder)).encode(made_text(60, 7))
    rng = random.Random(0)
    lengths = [1, CONTEXT - NEW + 1, *(rng.randrange(1, CONTEXT - NEW + 2) for _ in range(18))]
    begins = [rng.randrange(len(ids) - CONTEXT) for _ in lengths]
    return [torch.tensor([ids[begin : begin + n]]) for begin, n in zip(begins, lengths, strict=True)]


def plainly(model: MemDecForCausalLM, ids: Tensor, n_new: int, eos: Any = None) -> Tensor:
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=n_new, do_sample=False, eos_token_id=eos)


@pytest.mark.parametrize("n_draft", [1, 3, 5])
def test_greedy_equals_plain_decoding(mixture: MemDecForCausalLM, prompts: list[Tensor], n_draft: int) -> None:
    found = [
        speculative.generate(mixture, ids, max_new_tokens=NEW, n_draft=n_draft, eos_token_id=()) for ids in prompts
    ]
    for ids, result in zip(prompts, found, strict=True):
        assert torch.equal(result.sequences, plainly(mixture, ids, NEW))
        # Every token is an accepted draft, the correction of a rejected one, or the bonus of a round without rejection.
        assert result.n_accepted + result.n_corrected + result.n_bonus == NEW
        assert result.n_corrected + result.n_bonus == result.n_base_forwards
        assert result.n_accepted + result.n_corrected <= result.n_drafted <= n_draft * result.n_base_forwards
    assert sum(result.n_accepted for result in found) > 40  # or the equality would prove little
    assert sum(result.n_corrected for result in found) > 8
    assert sum(result.n_bonus for result in found) > 8


def test_an_end_of_text_ends_it(mixture: MemDecForCausalLM, prompts: list[Tensor]) -> None:
    seen = {"accepted": 0, "last of its round": 0}
    for ids in prompts[:20]:
        full = plainly(mixture, ids, NEW)[0, ids.shape[1] :].tolist()
        for eos in dict.fromkeys(full):
            result = speculative.generate(mixture, ids, max_new_tokens=NEW, n_draft=5, eos_token_id=eos)
            assert torch.equal(result.sequences, plainly(mixture, ids, NEW, eos))
            n_new = result.sequences.shape[1] - ids.shape[1]
            assert result.n_accepted + result.n_corrected + result.n_bonus == n_new
            last = result.n_corrected + result.n_bonus == result.n_base_forwards
            seen["last of its round" if last else "accepted"] += 1
    assert min(seen.values()) > 5


def test_the_default_end_is_that_of_the_model(mixture: MemDecForCausalLM, prompts: list[Tensor]) -> None:
    ids = prompts[1]
    fourth = int(plainly(mixture, ids, NEW)[0, ids.shape[1] + 3])
    kept = mixture.generation_config.eos_token_id
    try:
        mixture.generation_config.eos_token_id = [fourth, 10**6]
        result = speculative.generate(mixture, ids, max_new_tokens=NEW)
        assert torch.equal(result.sequences, mixture.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0))
    finally:
        mixture.generation_config.eos_token_id = kept
    assert result.sequences.shape[1] <= ids.shape[1] + 4


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_with_all_weight_on_one_model(mixture: MemDecForCausalLM, prompts: list[Tensor], alpha: float) -> None:
    mixture.set_weights([alpha])
    try:
        for ids in prompts[:10]:
            result = speculative.generate(mixture, ids, max_new_tokens=NEW, n_draft=3, eos_token_id=())
            assert torch.equal(result.sequences, plainly(mixture, ids, NEW))
            assert result.n_corrected == 0 or alpha == 0.0
    finally:
        mixture.set_weights([ALPHA])


def tiny(n_vocab: int, seed: int, window: int | None) -> MistralForCausalLM:
    """A model with random weights; with a window shorter than the text its caches forget."""
    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=n_vocab, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=window, max_position_embeddings=CONTEXT, initializer_range=0.3,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


@pytest.mark.parametrize("windows", [(5, None), (None, 5), (5, 7)])
def test_caches_that_forget_and_padded_heads(windows: tuple[int | None, int | None]) -> None:
    base, memory = (tiny(40 + 8 * i, i, window) for i, window in enumerate(windows))
    mixture = MemDecForCausalLM.from_models(base, [memory], [ALPHA])
    counts = []
    for seed in range(10):
        ids = torch.randint(0, 40, (1, 9), generator=torch.Generator().manual_seed(seed))
        result = speculative.generate(mixture, ids, max_new_tokens=NEW, n_draft=3, eos_token_id=())
        assert torch.equal(result.sequences, plainly(mixture, ids, NEW))
        counts.append((result.n_accepted, result.n_corrected, result.n_bonus))
    assert np.sum(counts, axis=0).min() > 5


def test_a_tie_goes_to_the_first_token() -> None:
    log_p = torch.tensor([[0.25, 0.375, 0.375], [0.5, 0.25, 0.25]]).log()
    kept, instead = speculative._verify(torch.tensor([2, 0]), torch.zeros(1, 1), log_p, LogitsProcessorList())
    assert instead is not None
    assert (kept, instead.tolist()) == (0, [1])


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "changes", "message"),
    [
        ((2, 3), {}, r"expected one prompt, shape \(1, T\), found \(2, 3\); call it for one text at a time"),
        ((1, 0), {}, r"expected one prompt, shape \(1, T\), found \(1, 0\)"),
        ((1, CONTEXT + 1), {"max_new_tokens": 1}, f"at most {CONTEXT} tokens .*, found {CONTEXT + 1}; cut the prompt"),
        ((1, 3), {"max_new_tokens": CONTEXT - 1}, f"at most {CONTEXT} tokens .*, found {CONTEXT + 1}"),
        ((1, 3), {"max_new_tokens": 0}, "expected max_new_tokens of at least 1, found 0"),
        ((1, 3), {"n_draft": 0}, "expected n_draft of at least 1, found 0"),
    ],
)
def test_bad_input(mixture: MemDecForCausalLM, shape: tuple[int, int], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        speculative.generate(mixture, torch.zeros(shape, dtype=torch.long), **{"max_new_tokens": 2, **changes})


def test_a_prompt_that_fills_the_context_gets_one_token(mixture: MemDecForCausalLM) -> None:
    ids = torch.arange(CONTEXT)[None]
    result = speculative.generate(mixture, ids, max_new_tokens=1, eos_token_id=())
    assert torch.equal(result.sequences, plainly(mixture, ids, 1))
    assert (result.n_drafted, result.n_bonus, result.acceptance) == (0, 1, None)


def test_one_memory_drafts(mixture: MemDecForCausalLM) -> None:
    for memories, weights in (([], []), ([mixture.memories[0]] * 2, [0.25, 0.25])):
        other = MemDecForCausalLM.from_models(mixture.base, memories, weights)
        with pytest.raises(ConfigError, match=f"expected a mixture with one memory to draft, found {len(memories)}"):
            speculative.generate(other, torch.arange(3)[None], max_new_tokens=2)
