"""How an option of a domain task is scored."""

from memdec.tasks.domain import token_mean_results


def test_an_option_counts_by_its_tokens() -> None:
    """Not by its letters, which favour the second, and not by its sum, which favours the third."""
    doc = {"gold_index": 0, "options": ["a = 1e-3", "estimators and transformers", "x"], "option_tokens": [4, 2, 1]}
    found = token_mean_results(doc, [(-4.0, False), (-3.0, False), (-1.5, False)])
    assert found == {"acc": 1.0, "acc_sum": 0.0, "score": 1.0}
