"""The Triton kernels compile for Hopper with the launch parameters that are shipped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cases import further

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[2]
SCAN = "ssd-nano-bf16"
OTHERS = (
    "conv",
    "rms_norm",
    "gated_rms_norm",
    "squared_relu",
    "copies",
    "grouped_mlp",
    "routing",
    "cross_entropy",
    "adamw",
)
STEPS = ("mamba_step", "router_step", "expert_step")


@pytest.mark.slow
@pytest.mark.parametrize(
    "cases",
    [
        further([SCAN], id="scan"),
        further([f"{case}-nano-bf16" for case in OTHERS] + ["routing-super-bf16"], id="others"),
        pytest.param([f"{case}-nano-bf16" for case in STEPS], id="steps"),
    ],
)
def test_no_kernel_spills_or_asks_for_more_memory_than_there_is(cases: list[str]):
    command = [sys.executable, "tools/compile_kernels.py", *cases, "--processes", "1", "--json"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stdout + done.stderr
    assert {entry["case"] for entry in found} == set(cases)
    assert not [entry for entry in found if entry["faults"] or not entry["registers"]]
    # the scan multiplies on Hopper's matrix units
    assert all(entry["hgmma"] for entry in found if entry["case"] == SCAN)


def test_a_bad_launch_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    from compile_kernels import Compiled

    good = {
        "case": "ssd-nano-bf16",
        "kernel": "k",
        "options": "",
        "registers": 9,
        "stack": 0,
        "shared": 0,
        "dots": 1,
        "hgmma": 1,
    }
    assert Compiled(**good).faults() == []
    for change, words in (
        ({"stack": 80}, "spills 80 bytes"),
        ({"shared": 240_000}, "asks for 240000 bytes of shared memory"),
        ({"hgmma": 0}, "multiplies without HGMMA"),
    ):
        assert Compiled(**(good | change)).faults() == [words]
