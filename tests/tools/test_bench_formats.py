"""The benchmark of number formats runs every part on a small model and reports what it should."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cases import further

ROOT = Path(__file__).parents[2]


def rows(tmp_path: Path, *words: str) -> list[dict]:
    command = [sys.executable, ROOT / "tools/bench/formats.py", *words, "--device", "cpu"]
    command += ["--kept", "1", "--json", tmp_path / "rows.jsonl"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["layers", further("blocks")])
def test_every_backend_of_every_format_is_compared_with_bfloat16(tmp_path: Path, part: str):
    found = rows(tmp_path, part, "--models", "tiny", "--tokens", "32", "--experts", "4")
    what = part.removesuffix("s")
    for name in {row[what] for row in found}:
        backends = {(row["format"], row["backend"]) for row in found if row[what] == name}
        assert backends == {
            ("bf16", ""), ("fp8_current", "emulate"), ("fp8_current", "torch"),
            ("fp8_block", "emulate"), ("mxfp8", "emulate"), ("nvfp4", "emulate"),
        }  # fmt: skip
    kinds = {row[what].split()[0] for row in found}
    if part == "blocks":
        assert kinds == {"M", "E", "*"}
    else:
        assert {"mamba.in_proj", "moe.experts", "moe.latent", "attention.o_proj"} <= kinds
    assert all(row["times bf16's speed"] == 1 for row in found if row["format"] == "bf16")
    # the same operands and float32 sums, rounded to bfloat16 between the layers of a block
    assert all(row["off the emulation"] < 1e-2 for row in found if row["backend"] == "torch")


@pytest.mark.slow
@pytest.mark.nightly
def test_steps_are_compared_with_those_of_bfloat16(tmp_path: Path):
    recipe = str(ROOT / "recipes/tiny/smoke.yaml")
    found = rows(tmp_path, "steps", "--recipe", recipe, "--presets", "nvfp4", "fp8_delayed")
    assert [row["preset"] for row in found] == ["bf16", "nvfp4", "fp8_delayed"]
    assert all(row["step (s)"] > 0 and row["peak (GiB)"] > 0 for row in found)
    assert found[0]["times bf16's"] == 1
