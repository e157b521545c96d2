"""One pre-trained run for all tests of a module."""

import pytest

from tests.support.fine_tuning import Workplace


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("posttrain"))
