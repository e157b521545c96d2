"""The faults that `tools/mutations.py` plants still have their place in the sources."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tool() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        import mutations

        yield mutations


def test_what_a_fault_replaces_stands_once_in_its_file(tool: ModuleType):
    assert len(tool.FAULTS) > 20
    found = {fault.what: (ROOT / fault.file).read_text().count(fault.old) for fault in tool.FAULTS}
    assert found == dict.fromkeys(found, 1)
    assert all((ROOT / fault.tests).exists() for fault in tool.FAULTS)
