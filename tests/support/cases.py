"""Which cases of a test `make test` runs, and which are left to `make test-all`."""

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_nightly(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """Return the cases for `parametrize`; all but those that are kept are marked `nightly`.

    A tuple is the values of several parameters.
    """
    listed = list(cases)
    missing = [case for case in kept if case not in listed]
    assert not missing, f"not among the cases: {missing}"
    return [case if case in kept else further(case) for case in listed]


def further(case: Any, **options: Any) -> Any:
    """Return a case that only widens what another shows, marked `nightly`."""
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.nightly, **options)
