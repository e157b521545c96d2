"""Kernels that a recipe names for all operations, through the real commands."""

import json
from pathlib import Path

import pytest
import torch

from nemotron import cli
from nemotron.ops.apply import ALL
from nemotron.ops.config import PRESETS
from nemotron.ops.describe import training_call
from nemotron.ops.registry import Operation

pytest.importorskip("numba", reason="numba is not installed")

TRAIN = ["train", "tiny/smoke", "name=run", "device=cpu", "schedule.total_steps=2"]


@pytest.mark.parametrize(
    ("precision", "ops"), [("fp32", "numba"), ("bf16", "numba"), ("bf16", "numba_int16")]
)
def test_a_run_takes_all_kernels(
    precision: str,
    ops: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    assert cli.run([*TRAIN, f"precision={precision}", f"ops={ops}"]) == 0
    provenance = json.loads(Path("runs/run/provenance.json").read_text())
    choices = provenance["starts"][0]["backends"]
    used = {choice["operation"]: choice["backend"] for choice in choices.values()}
    assert used | PRESETS[ops] == used
    capsys.readouterr()
    assert cli.run(["generate", "runs/run", "--prompt", "to be", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.strip()


def test_a_model_that_the_kernels_do_not_decode_is_decoded_by_its_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    groups = ["model.n_group=2", "model.topk_group=1"]
    assert cli.run([*TRAIN, *groups, "ops=numba", "ops.topk_routing=auto"]) == 0
    assert cli.run(["generate", "runs/run", "--prompt", "to be", "--max-new-tokens", "3"]) == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_start_of_a_run_checks_the_calls_that_training_makes(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls: dict[str, set[torch.dtype]] = {}
    fittest = Operation.fittest

    def record(self: Operation, x: torch.Tensor, *rest: object, **needs: bool) -> object:
        calls.setdefault(self.name, set()).add(x.dtype)
        return fittest(self, x, *rest, **needs)

    monkeypatch.setattr(Operation, "fittest", record)
    monkeypatch.chdir(tmp_path)
    assert cli.run([*TRAIN, f"precision={precision}"]) == 0
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    checked = {o.name: training_call(o, torch.device("cpu"), dtype, documents=False) for o in ALL}
    assert len(calls) >= 14
    assert calls == {name: {checked[name].dtype} for name in calls}
