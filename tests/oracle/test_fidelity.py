"""Fidelity and shapes of distributions against dense twins, and the bound of what truncation drops."""

import numpy as np
import pytest
import torch
from scipy import stats

from memdec.maths import fidelity, knn
from memdec.maths.sparse_rows import SparseRows

V = 23


def made(n: int, seed: int) -> tuple[SparseRows, torch.Tensor]:
    """Rows of 1 to 6 tokens, and a model's log-probabilities that lean towards them."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 7, n)
    tokens = np.concatenate([rng.permutation(V)[:count] for count in counts])
    probs = np.concatenate([rng.dirichlet(np.ones(count)) for count in counts]).astype(np.float32)
    rows = SparseRows(np.concatenate([[0], np.cumsum(counts)]), tokens, probs)
    logits = rng.normal(size=(n, V)) + 6 * dense(rows)
    return rows, torch.from_numpy(logits).log_softmax(1).float()


def dense(rows: SparseRows) -> np.ndarray:
    p = np.zeros((len(rows), V))
    for row in range(len(rows)):
        span = slice(rows.indptr[row], rows.indptr[row + 1])
        p[row, rows.tokens[span]] = rows.probs[span]
    return p / p.sum(1, keepdims=True)


def test_the_measures_equal_those_of_dense_rows() -> None:
    rows, log_q = made(60, 0)
    p, q = dense(rows), log_q.double().exp().numpy()
    found = fidelity.fidelity(log_q, rows)
    assert list(found) == ["match", "kl", "total_variation", "pearson"]
    match = p.argmax(1) == q.argmax(1)
    assert 0 < match.mean() < 1
    np.testing.assert_array_equal(found["match"], match)
    np.testing.assert_allclose(found["kl"], stats.entropy(p, q, axis=1), rtol=1e-5)
    np.testing.assert_allclose(found["total_variation"], np.abs(p - q).sum(1) / 2, atol=1e-6)
    np.testing.assert_allclose(found["pearson"], stats.pearsonr(p, q, axis=1).statistic, atol=1e-5)


def test_blocks_of_rows_give_what_all_rows_give() -> None:
    rows, log_q = made(40, 1)
    whole = fidelity.fidelity(log_q, rows)
    cut = rows.indptr[13]
    first = SparseRows(rows.indptr[:14], rows.tokens[:cut], rows.probs[:cut])
    rest = SparseRows(rows.indptr[13:] - cut, rows.tokens[cut:], rows.probs[cut:])
    parts = [fidelity.fidelity(log_q[:13], first), fidelity.fidelity(log_q[13:], rest)]
    for name, values in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), values)
    with pytest.raises(ValueError, match="expected a row of p_kNN for each of 40 positions, found 13"):
        fidelity.fidelity(log_q, first)


def test_ends_of_the_scales() -> None:
    same = SparseRows(np.array([0, 2]), np.array([3, 5]), np.array([0.75, 0.25]))
    q = torch.full((1, V), 1e-30).double()
    q[0, 3], q[0, 5] = 0.75, 0.25
    found = {name: float(values[0]) for name, values in fidelity.fidelity(q.log().float(), same).items()}
    assert found == pytest.approx({"match": 1, "kl": 0, "total_variation": 0, "pearson": 1}, abs=1e-6)
    other = SparseRows(np.array([0, 1]), np.array([7]), np.array([1.0]))
    found = {name: float(values[0]) for name, values in fidelity.fidelity(q.log().float(), other).items()}
    assert found["kl"] == pytest.approx(30 * np.log(10), rel=1e-4)
    assert (found["match"], found["total_variation"]) == (0.0, pytest.approx(1.0))
    assert found["pearson"] < 0
    uniform = torch.full((1, V), -np.log(V))
    assert fidelity.fidelity(uniform, same)["pearson"][0] == pytest.approx(0, abs=1e-3)


def test_each_of_the_most_likely_tokens_of_a_tie_is_a_match() -> None:
    rows = SparseRows(np.array([0, 3, 6]), np.array([4, 9, 1] * 2), np.array([0.4, 0.4, 0.2] * 2))
    log_q = torch.zeros(2, V)
    log_q[0, 9], log_q[1, 1] = 5.0, 5.0
    assert fidelity.fidelity(log_q.log_softmax(1), rows)["match"].tolist() == [1.0, 0.0]


def test_shapes_equal_those_of_dense_rows() -> None:
    rows, log_q = made(30, 2)
    for p, found in (
        (dense(rows), fidelity.sparse_shape(rows, 0.05)),
        (log_q.double().exp().numpy(), fidelity.shape(log_q, 0.05)),
    ):
        np.testing.assert_allclose(found["top1"], p.max(1), rtol=1e-5)
        np.testing.assert_array_equal(found["entries"], (p >= 0.05).sum(1))
        np.testing.assert_allclose(found["entropy"], stats.entropy(p, axis=1), atol=1e-5)
    np.testing.assert_array_equal(fidelity.sparse_shape(rows, 0.05)["stored"], (dense(rows) > 0).sum(1))


@pytest.mark.parametrize(("top", "threshold"), [(4, 0.0), (None, 0.04), (6, 0.02), (None, 0.0)])
def test_the_dropped_mass_is_within_its_bound(top: int | None, threshold: float) -> None:
    """Rows of 12 neighbours with and without truncation: the bound holds, and the total variation is the dropped mass."""
    rng = np.random.default_rng(3)
    sq_dist = torch.from_numpy(np.sort(rng.exponential(20, (80, 12)), axis=1)).float()
    values = torch.from_numpy(rng.integers(0, V, (80, 12)))
    whole = SparseRows.of(*knn.aggregate(sq_dist, values, 16.0))
    kept = SparseRows.of(*knn.aggregate(sq_dist, values, 16.0, top=top, threshold=threshold))
    dropped = (dense(whole) * (dense(kept) == 0)).sum(1)
    bound = fidelity.cut(kept, 12, top, threshold)
    assert (dropped <= bound + 1e-12).all()
    assert (bound <= 1).all()
    np.testing.assert_allclose(np.abs(dense(whole) - dense(kept)).sum(1) / 2, dropped, atol=1e-9)
    assert (dropped > 0).any() == (bound > 0).any() == (top is not None or threshold > 0)
