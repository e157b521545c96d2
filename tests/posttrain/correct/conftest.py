"""Pairs for all tests of a module."""

from collections.abc import Iterator

import pytest

from tests.support.pairs import PairPlace
from tests.support.pool import Pool


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> PairPlace:
    return PairPlace(tmp_path_factory.mktemp("correct"))


@pytest.fixture(scope="module")
def pair() -> Iterator[Pool]:
    """Two ranks."""
    pool = Pool(2)
    yield pool
    pool.close()
