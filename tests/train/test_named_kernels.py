"""The kernels that the page on backends tells a recipe to name, through the real commands."""

import json
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

from nemotron import cli
from nemotron.ops.apply import ALL
from nemotron.ops.describe import training_call
from nemotron.ops.registry import INT16, Operation
from tests.support.pages import blocks

pytest.importorskip("numba", reason="numba is not installed")

TRAIN = ["train", "tiny/smoke", "name=run", "device=cpu", "schedule.total_steps=2"]


def named() -> dict[str, str]:
    """Return what the page says."""
    (block,) = (b for b in blocks("yaml") if b.text.startswith("ops:\n") and "ssd:" in b.text)
    return dict(YAML(typ="safe").load(block.text)["ops"])


def with_integers(ops: dict[str, str]) -> dict[str, str]:
    """Return the same with all products in 16-bit integers that there are."""
    known = {o.name for o in ALL if any(backend.name == INT16 for backend in o.backends)}
    return {name: INT16 if name in known else backend for name, backend in ops.items()}


@pytest.mark.parametrize(
    ("precision", "integers"), [("fp32", False), ("bf16", False), ("bf16", True)]
)
def test_a_run_takes_what_the_page_names(
    precision: str,
    integers: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    ops = with_integers(named()) if integers else named()
    assert len(ops) >= 13
    chosen = [f"ops.{name}={backend}" for name, backend in ops.items()]
    assert cli.run([*TRAIN, f"precision={precision}", *chosen]) == 0
    provenance = json.loads(Path("runs/run/provenance.json").read_text())
    choices = provenance["starts"][0]["backends"]
    used = {choice["operation"]: choice["backend"] for choice in choices.values()}
    assert used | ops == used
    capsys.readouterr()
    assert cli.run(["generate", "runs/run", "--prompt", "to be", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.strip()


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
