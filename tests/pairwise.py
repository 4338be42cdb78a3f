"""Products of options, thinned so that every two values still meet."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from hypothesis import settings

#: `make test-all` asks for the thorough profile, and gets whole products.
THOROUGH = settings().max_examples > 100


def pairwise(*axes: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """Rows of ``itertools.product(*axes)``, few, in which each pair of values of two axes occurs.

    Greedy: again and again the row with most pairs that have not been met.
    """
    if THOROUGH or len(axes) < 3:
        yield from itertools.product(*axes)
        return
    places = list(itertools.product(*(range(len(axis)) for axis in axes)))
    pairs = {row: set(itertools.combinations(enumerate(row), 2)) for row in places}
    open_pairs = set().union(*pairs.values())
    while open_pairs:
        row = max(places, key=lambda r: len(pairs[r] & open_pairs))
        open_pairs -= pairs[row]
        yield tuple(axis[place] for axis, place in zip(axes, row, strict=True))
