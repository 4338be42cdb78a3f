"""The thinned products leave no pair out."""

import itertools

import pytest

from tests.pairwise import THOROUGH, pairwise


@pytest.mark.parametrize(
    "axes", [("ab", "cd", "ef"), ("abc", "de", "fgh", "ij", "kl"), ("ab", "cd")]
)
def test_every_pair_occurs(axes):
    rows = list(pairwise(*axes))
    everything = set(itertools.product(*axes))
    assert set(rows) <= everything
    for (i, a), (j, b) in itertools.combinations(enumerate(axes), 2):
        met = {(row[i], row[j]) for row in rows}
        assert met == set(itertools.product(a, b))
    if len(axes) > 2 and not THOROUGH:
        assert len(rows) <= len(everything) // 1.3
