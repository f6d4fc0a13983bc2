"""Scores of label words from probabilities that can be worked out by hand."""

import math

import numpy as np
import pytest

from memdec.tasks.dcpmi import LabelWords, dcpmi_results, label_scores

# Label 0 has the words a and b, label 1 the word c; the canonical words are b and c.
WORDS = LabelWords((" a", " b", " c"), (np.array([0, 1]), np.array([2])), np.array([1, 2]))
PROMPT, PREMISE, COLON = ([math.log(p) for p in row] for row in ([0.2, 0.1, 0.4], [0.1, 0.1, 0.8], [0.4, 0.1, 0.1]))


def test_scores_worked_out_by_hand() -> None:
    found = label_scores(PROMPT, PREMISE, COLON, WORDS)
    assert found == {
        "acc": pytest.approx([math.log(0.2 / 0.1 * 0.1 / 0.1), math.log(0.4 / 0.8)]),
        "acc_mean": pytest.approx([math.log(2) / 2, math.log(0.5)]),
        "acc_lm": pytest.approx([0.3, 0.4]),
        "acc_pmi": pytest.approx([math.log(0.2 / 0.4), math.log(0.4 / 0.1)]),
        "acc_canonical": pytest.approx([0.0, math.log(0.5)], abs=1e-8),
    }


def test_each_rule_chooses_by_its_own_scores() -> None:
    found = dcpmi_results({"gold": 0}, [PROMPT, PREMISE, COLON], WORDS)
    assert {name: found[name] for name in ("acc", "acc_mean", "acc_lm", "acc_pmi", "acc_canonical")} == {
        "acc": 1.0, "acc_mean": 1.0, "acc_lm": 0.0, "acc_pmi": 0.0, "acc_canonical": 1.0,
    }  # fmt: skip
    assert found["predicted_majority_rate"] == 0
