"""Mixing at its edges: types, infinities and refused weights (the plain arithmetic is in test_mixing_metrics.py)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memdec.errors import ConfigError, NumericsError
from memdec.maths import mixing, weighing


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_fault_24_bf16_scores_are_mixed_in_float32(alpha: float) -> None:
    base, memory = (torch.randn(4, 9).log_softmax(-1).bfloat16() for _ in range(2))
    mixed = mixing.mix(base, [memory], [alpha])
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(
        mixed.exp(), alpha * memory.float().exp() + (1 - alpha) * base.float().exp(), atol=1e-6, rtol=0
    )


def test_of_equally_good_weights_the_smallest_is_taken() -> None:
    values = {0.6: 1.0, 0.2: 1.0, 0.4: 2.0, 0.8: 2.0}
    assert weighing.best_weight(values) == 0.2
    assert weighing.best_weight(values, higher=True) == 0.4


@given(st.floats(0, 1), st.lists(st.tuples(st.floats(-60, 0), st.floats(-60, 0)), min_size=1, max_size=8))
def test_stored_scores_mix_as_live_ones(alpha: float, pairs: list[tuple[float, float]]) -> None:
    base, memory = np.array(pairs, np.float32).T
    live = mixing.mix(torch.from_numpy(base.copy()), [torch.from_numpy(memory.copy())], [alpha])
    stored = weighing.mix_scores(base, memory, alpha)
    assert stored.dtype == np.float64
    np.testing.assert_allclose(live.numpy(), stored, rtol=1e-6, atol=2e-6)
    low, high = np.sort(np.stack([base, memory]).astype(np.float64), axis=0)  # in float32 the 1e-9 would round away
    assert (low - 1e-9 <= stored).all()
    assert (stored <= high + 1e-9).all()


def test_both_models_ruling_a_token_out_leaves_it_out() -> None:
    never = torch.tensor([-math.inf])
    assert mixing.mix(never, [never], [0.5]).item() == -math.inf
    assert weighing.mix_scores(never.numpy(), never.numpy(), 0.5).tolist() == [-math.inf]


@pytest.mark.parametrize("alpha", [-1e-9, 1.0 + 1e-9, math.nan])
def test_every_way_of_mixing_refuses_a_weight_outside_0_to_1(alpha: float) -> None:
    with pytest.raises(ConfigError, match="alpha"):
        mixing.mix(torch.zeros(1), [torch.zeros(1)], [alpha])
    with pytest.raises(ConfigError, match="alpha"):
        weighing.mix_scores(np.zeros(1), np.zeros(1), alpha)


@pytest.mark.parametrize("row", [[math.inf, 0.0], [-math.inf, -math.inf]])
def test_logits_without_a_distribution_are_an_error_in_any_row(row: list[float]) -> None:
    with pytest.raises(NumericsError):
        mixing.log_softmax(torch.tensor([[0.0, 1.0], row]))


def test_a_masked_token_is_no_error_and_nan_in_the_padding_is_cut() -> None:
    assert mixing.log_softmax(torch.tensor([[0.0, -math.inf]])).tolist() == [[0.0, -math.inf]]
    assert mixing.log_softmax(torch.tensor([[0.0, math.nan]]), 1).tolist() == [[0.0]]


@given(st.integers(0, 10_000), st.integers(2, 9))
def test_the_greedy_interval_is_where_the_label_is_the_argmax(seed: int, vocab: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    base, memory = ((2 * torch.randn(5, vocab, generator=gen)).log_softmax(-1) for _ in range(2))
    for labels in (base.argmax(-1), memory.argmax(-1), torch.randint(0, vocab, (5,), generator=gen)):
        interval = mixing.greedy_interval(base, memory, labels)
        for alpha in torch.linspace(0, 1, 41).tolist():
            p = alpha * memory.double().exp() + (1 - alpha) * base.double().exp()
            mine = p.gather(-1, labels[:, None])[:, 0]
            rest = p.scatter(-1, labels[:, None], -1.0).amax(-1)
            sure = (mine - rest).abs() > 1e-6
            inside = (interval[:, 0] <= alpha) & (alpha <= interval[:, 1])
            assert torch.equal(inside[sure], (mine > rest)[sure])
    alone = mixing.greedy_interval(base, None, base.argmax(-1))
    assert torch.equal(alone, torch.tensor([[0.0, 1.0]]).expand(5, 2))
    assert torch.equal(mixing.greedy_interval(base, None, base.argmin(-1)), torch.tensor([[1.0, 0.0]]).expand(5, 2))
