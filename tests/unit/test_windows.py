"""Sliding windows: the picture of the module as a test case, and lm-eval's own windows as the oracle."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.utils import get_rolling_token_windows

from memdec.errors import ConfigError
from memdec.maths.windows import Window, places, windows


def test_the_picture() -> None:
    assert windows(10, 4, 2) == [Window(0, 0, 4), Window(2, 4, 6), Window(4, 6, 8), Window(6, 8, 10)]
    tokens = np.arange(100, 110)
    assert windows(10, 4, 2)[0].inputs(tokens, 7).tolist() == [7, 100, 101, 102]
    assert windows(10, 4, 2)[2].inputs(tokens, 7).tolist() == [103, 104, 105, 106]


@given(st.integers(0, 60), st.integers(1, 20), st.data())
def test_every_position_once_and_as_lm_eval(n: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    parts = windows(n, context, stride)
    assert [p for part in parts for p in range(part.first, part.end)] == list(range(n))
    tokens = np.arange(1000, 1000 + n)
    ours = [(p.inputs(tokens, 1).tolist(), tokens[p.first : p.end].tolist()) for p in parts]
    theirs = [
        (list(i), list(o)) for i, o in get_rolling_token_windows(tokens.tolist(), 1, context, context - stride + 1)
    ]
    assert ours == theirs
    assert all(part.n_inputs == min(context, n) for part in parts)
    there = [p - part.begin for part in parts for p in range(part.first, part.end)]
    assert places(np.arange(n), n, context, stride).tolist() == there


@pytest.mark.parametrize(("context", "stride"), [(0, 1), (4, 0), (4, 5)])
def test_bad_arguments(context: int, stride: int) -> None:
    with pytest.raises(ConfigError, match="stride"):
        windows(10, context, stride)
