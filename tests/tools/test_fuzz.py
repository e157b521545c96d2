"""Some mutations of every kind of input; `tools/fuzz.py` tries thousands by hand."""

import re
from pathlib import Path

import pytest

from tests.support.cases import further
from tests.support.forked import ROOT, Forked, run_tool


@pytest.fixture(scope="module")
def targets() -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        from fuzz_targets import TARGETS

        return list(TARGETS)


def fuzz(output: Path, *words: str) -> str:
    """Return what the fuzzer writes, without a failure."""
    ran = Forked(run_tool, "fuzz.py", words, output=output)
    try:
        assert ran.wait(280) == 0, ran.text
    finally:
        ran.end()
    return ran.text


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["--direct", "1000", "1"],  # every reader once, and no command that has a cheaper one
        further((["--direct", "30", "--seconds", "0.8", "300"],)),
        further((["4"],)),
        further((["--undamaged"],)),
    ],
)
def test_no_damage_to_an_input_ends_in_anything_but_an_answer(
    targets: list[str], words: list[str], tmp_path: Path
):
    said = fuzz(tmp_path / "said", *words)
    rows = re.findall(r"^\| (.+?) \| ([1-9]\d*) \| 0 \| 0 \| 0 \| (.+) \|$", said, re.M)
    tried = [name for name, *_ in rows]
    left_out = ["hub name", "trajectories"] if "--undamaged" in words else []
    assert tried == [name for name in targets if name not in left_out]
    assert "75: " in said or "0: " in said  # not every command refuses everything
