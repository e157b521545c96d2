"""Some mutations of every kind of input; `tools/fuzz.py` tries thousands by hand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def targets() -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        from fuzz_targets import TARGETS

        return list(TARGETS)


@pytest.mark.slow
@pytest.mark.parametrize("mutations", [3, pytest.param(7, marks=pytest.mark.nightly)])
def test_no_damage_to_an_input_ends_in_anything_but_an_answer(targets: list[str], mutations: int):
    ran = subprocess.run(
        [sys.executable, ROOT / "tools/fuzz.py", str(mutations), *targets],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = re.findall(rf"^\| (.+?) \| {mutations} \| 0 \| 0 \| 0 \| (.+) \|$", ran.stdout, re.M)
    assert [name for name, _ in rows] == targets
    assert "75: " in ran.stdout or "0: " in ran.stdout  # not every command refuses everything
