import pytest
from pool import Pool


@pytest.fixture(scope="session")
def pair():
    """Two ranks."""
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def four():
    """Four ranks."""
    pool = Pool(4)
    yield pool
    pool.close()
