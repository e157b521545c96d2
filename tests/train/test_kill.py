"""The small version of `tools/kill_test.py`: every moment inside a save is covered by the tool."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "kill_test.py"


@pytest.mark.slow
def test_four_kills_lose_no_bit():
    command = [sys.executable, str(TOOL), "--kills", "4", "--steps", "40", "--seed", "11"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 kills; every tensor and logged number is equal" in done.stdout
    moments = [line.split()[1] for line in done.stdout.splitlines() if line[:4].strip().isdigit()]
    # with this seed at least two of the four fall into a save
    assert sum(moment != "anytime" for moment in moments) >= 2
