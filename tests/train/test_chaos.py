"""The small version of `tools/chaos.py`: some rounds, each another kind of disturbance."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "chaos.py"


@pytest.mark.slow
@pytest.mark.distributed
def test_five_disturbances_on_two_ranks_lose_no_bit_and_leave_a_true_status():
    command = [sys.executable, str(TOOL), "--rounds", "5", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 rounds; every tensor and logged number is equal" in done.stdout
    kinds = {line.split()[1] for line in done.stdout.splitlines() if line[:3].strip().isdigit()}
    assert len(kinds) == 5
