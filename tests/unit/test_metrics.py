"""The bootstrap against a plain loop with the same draws, and sums in float64 (more in test_mixing_metrics.py)."""

import math

import numpy as np
import pytest

from memdec.maths import statistics
from memdec.tasks import perplexity


def test_resampling_weighs_blocks_by_their_tokens() -> None:
    log_p = -np.random.default_rng(0).exponential(2, 13)  # blocks of 4, 4, 4 and of 1 token
    blocks = [(float(block.sum()), len(block)) for block in np.split(log_p, [4, 8, 12])]
    draws = np.random.default_rng(3).integers(0, 4, size=(200, 4))
    twin = [math.exp(-sum(blocks[i][0] for i in row) / sum(blocks[i][1] for i in row)) for row in draws]
    expected = np.quantile(twin, [0.025, 0.975])
    np.testing.assert_allclose(statistics.bootstrap_perplexity(log_p, 4, 200, seed=3), expected)


def test_equal_tokens_leave_no_spread_and_a_lower_level_is_narrower() -> None:
    low, high = statistics.bootstrap_perplexity(np.full(11, -math.log(5)), 4, 50, seed=0)
    assert (low, high) == (pytest.approx(5), pytest.approx(5))
    log_p = -np.random.default_rng(0).exponential(2, 2000)
    wide = statistics.bootstrap_perplexity(log_p, 32, 400, seed=1)
    narrow = statistics.bootstrap_perplexity(log_p, 32, 400, seed=1, level=0.5)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_blocks_carry_the_dependence_of_neighbouring_tokens() -> None:
    # 40 topics of 50 equal tokens: tokens drawn one by one would claim seven times the precision there is.
    log_p = np.repeat(-np.random.default_rng(0).exponential(2, 40), 50)
    blocks, single = (statistics.bootstrap_perplexity(log_p, window, 400, seed=1) for window in (50, 1))
    assert blocks[1] - blocks[0] > 4 * (single[1] - single[0])


@pytest.mark.parametrize(
    ("n_tokens", "stride", "expected"),
    [
        (25_000, 64, 1024),
        (25_000, 100, 1100),
        (250_000, 512, 1024),
        (9_000, 64, 448),
        (30, 64, 64),
        (60_000, 2048, 2048),
    ],
)
def test_an_item_is_whole_windows_of_1024_tokens_or_a_20th_of_a_short_text(
    n_tokens: int, stride: int, expected: int
) -> None:
    assert statistics.item_tokens(n_tokens, stride) == expected


def test_an_interval_holds_the_truth_where_neighbouring_windows_are_alike() -> None:
    """Windows of 64 tokens whose means follow each other with a correlation of 0.6, in 200 texts of 40,000 tokens."""
    rng = np.random.default_rng(0)
    stride, n_windows, held = 64, 625, {"items": 0, "windows": 0}
    for _ in range(200):
        level = [rng.normal()]
        for step in rng.normal(size=n_windows - 1) * math.sqrt(1 - 0.6**2):
            level.append(0.6 * level[-1] + step)
        log_p = np.repeat(-3 + np.array(level), stride)
        for name, size in (("items", statistics.item_tokens(len(log_p), stride)), ("windows", stride)):
            low, high = statistics.bootstrap_perplexity(log_p, size, 200, seed=0)
            held[name] += low <= math.exp(3) <= high
    assert held["items"] >= 180  # of 200, where 190 are said
    assert held["windows"] < 150


def test_fault_24_narrow_scores_are_summed_in_float64() -> None:
    log_p = np.full(20_000, -8, np.float16)  # their sum, -160,000, is beyond float16
    assert statistics.perplexity(log_p) == pytest.approx(math.exp(8))
    assert statistics.bootstrap_perplexity(log_p, 512, 10, seed=0)[1] == pytest.approx(math.exp(8))


def test_a_token_ruled_out_makes_the_perplexity_infinite() -> None:
    assert statistics.perplexity(np.array([-1.0, -math.inf])) == math.inf


def test_a_text_without_spaces_has_no_finite_perplexity_per_word() -> None:
    assert perplexity.perplexity_of_sums([(-1500.0, 1)]) == math.inf
    assert perplexity.perplexity_of_sums([(-3.0, 1), (-1.0, 1)]) == pytest.approx(math.e**2)
