"""Mixing in log space, perplexity and its interval."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memdec.errors import ConfigError, NumericsError
from memdec.maths import mixing, statistics, weighing


@given(st.floats(0, 1), st.integers(0, 1000))
def test_mixture_is_a_distribution_and_equals_plain_arithmetic(alpha: float, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    base, memory = (torch.randn(3, 11, generator=gen).double().log_softmax(-1) for _ in range(2))
    mixed = mixing.mix(base, [memory], [alpha])
    plain = alpha * memory.exp() + (1 - alpha) * base.exp()
    assert torch.allclose(mixed.exp(), plain, atol=1e-12)
    assert torch.allclose(mixing.mix(base.float(), [memory.float()], [alpha]).exp(), plain.float(), atol=1e-6)
    stored = weighing.mix_scores(base[0].numpy(), memory[0].numpy(), alpha)
    np.testing.assert_allclose(stored, plain[0].log().numpy(), atol=1e-9)


def test_ends_are_exact_even_where_the_other_model_is_minus_infinity() -> None:
    base, memory = torch.tensor([-1.0, -math.inf]), torch.tensor([-math.inf, -2.0])
    assert torch.equal(mixing.mix(base, [memory], [0.0]), base)
    assert torch.equal(mixing.mix(base, [memory], [1.0]), memory)
    assert mixing.mix(base, [memory], [0.5])[0] == pytest.approx(-1 - math.log(2))


@pytest.mark.parametrize("alpha", [-0.1, 1.5, "x", None, math.nan])
def test_bad_alpha(alpha: object) -> None:
    with pytest.raises(ConfigError, match="alpha: expected a number from 0"):
        weighing.check_weight(alpha)  # type: ignore[arg-type]


def test_fault_24_bf16_logits_are_normalised_in_float32() -> None:
    logits = torch.randn(2, 50).bfloat16()
    log_p = mixing.log_softmax(logits)
    assert log_p.dtype == torch.float32
    assert torch.allclose(log_p.exp().sum(-1), torch.ones(2), atol=1e-6)


def test_padded_head_is_cut_before_the_softmax() -> None:
    logits = torch.zeros(1, 8)
    logits[:, 5:] = 100.0
    assert torch.allclose(mixing.log_softmax(logits, 5), torch.full((1, 5), -math.log(5)))


def test_fault_12_nan_is_an_error_and_not_probability_one() -> None:
    with pytest.raises(NumericsError, match="NaN"):
        mixing.log_softmax(torch.tensor([[1.0, math.nan]]))


def test_perplexity_of_a_uniform_guess_and_its_interval() -> None:
    assert statistics.perplexity(np.full(10, -math.log(7))) == pytest.approx(7)
    log_p = -np.random.default_rng(0).exponential(3, 5000)
    low, high = statistics.bootstrap_perplexity(log_p, 64, 500, seed=1)
    assert low < statistics.perplexity(log_p) < high
    assert (low, high) == statistics.bootstrap_perplexity(log_p, 64, 500, seed=1)
    wide = statistics.bootstrap_perplexity(log_p[:500], 64, 500, seed=1)
    assert wide[1] - wide[0] > high - low


def test_ragged_last_window_counts_its_tokens() -> None:
    sums, counts = statistics.window_sums(np.arange(10.0), 4)
    assert sums.tolist() == [6, 22, 17]
    assert counts.tolist() == [4, 4, 2]
