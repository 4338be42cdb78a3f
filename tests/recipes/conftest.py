"""Fixtures of the recipes' tests."""

import numpy as np
import pytest
from sklearn import datasets

from recipes.data import digits


@pytest.fixture
def few_digits(monkeypatch):
    """Forty digits in place of 1,797, where the simulated camera would look at all of them."""

    def load():
        found = datasets.load_digits()
        found.images, found.target = found.images[:40], found.target[:40]
        return found

    monkeypatch.setattr(digits, "load_digits", load)
    monkeypatch.setattr(digits, "split", lambda: (np.arange(30), np.arange(30, 40)))
    digits.pictures.cache_clear()
    digits.recordings.cache_clear()
    yield
    digits.pictures.cache_clear()
    digits.recordings.cache_clear()
