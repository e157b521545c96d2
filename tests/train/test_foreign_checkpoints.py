"""No command executes what stands in a checkpoint, and none of them unpickles anything."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import nemotron
from nemotron import cli
from nemotron.checkpoint.find import locate
from nemotron.errors import UserError
from tests.support.fine_tuning import chats as talks
from tests.support.fine_tuning import write_recipe, write_rows
from tests.support.old_checkpoint import plant_bytes, plant_object, plant_poison, write_old
from tests.support.same_run import final_tensors
from tests.support.tiny_run import MODEL

ROWS = "batch.micro_batch=5"
"""The tiny run's own micro-batches do not divide its batch, which a command refuses."""


@pytest.fixture
def planted(undisturbed: Path, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """A trained run whose checkpoint is of the old format and holds an attack, and its mark."""
    run, mark = tmp_path / "run", tmp_path / "executed"
    shutil.copytree(undisturbed, run)
    recipe = (run / "recipe.yaml").read_text().splitlines()
    changed = [f"output: {tmp_path}" if line.startswith("output:") else line for line in recipe]
    changed = ["name: run" if line.startswith("name:") else line for line in changed]
    (run / "recipe.yaml").write_text("\n".join(changed))
    newest = locate(run).info
    texts = [(newest.folder / name).read_text() for name in ("model.json", "state.json")]
    tensors = final_tensors(run)
    shutil.rmtree(run / "checkpoints")
    target = write_old(run / "checkpoints", newest.step, tensors, *texts)
    if request.param is not None:
        request.param(target, mark)
    return run, mark


@pytest.fixture(scope="module")
def tuning(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Return what writes a recipe that learns from conversations."""
    folder = tmp_path_factory.mktemp("tuning")
    chats, words = folder / "chats", ["--workers", "1", "--chat", "--hold-out", "0.3"]
    rows = write_rows(folder / "chats.jsonl", [row for row in talks() if "tools" not in row])
    assert cli.run(["data", "prepare", str(rows), "--out", str(chats), *words]) == 0

    def write(**values: object) -> str:
        data = {"sources": [{"name": "chats", "path": str(chats)}], "cache": str(folder / "cache")}
        common = {
            "name": "tuned",
            "output": str(folder / "runs"),
            "device": "cpu",
            "model": MODEL,
            "data": {**data, "seq_len": 161},
            "batch": {"global_tokens": 2 * 161, "micro_batch": 1},
            "schedule": {"kind": "constant", "peak": 1e-2, "total_steps": 1},
            "evaluation": {"tokens": 161},
        }
        return str(write_recipe(folder / "tuned.yaml", {**common, **values}))

    return write


@pytest.mark.parametrize("planted", [plant_object, plant_bytes, plant_poison], indirect=True)
def test_no_entry_executes_what_is_planted(planted, tuning, capsys):
    run, mark = planted
    recipe = str(run / "recipe.yaml")
    commands = [
        ["train", tuning(stage="sft", init_from=str(run))],
        ["chat", str(run)],
        ["serve", str(run), "--port", "0"],
        ["check-parity", str(run)],
        ["train", recipe, "--resume", ROWS],
        ["train", recipe, "name=new", f"init_from={run}", ROWS],
        ["generate", str(run), "--prompt", "the"],
        ["export", str(run), "--out", str(run.parent / "out"), "--no-check"],
    ]
    for command in commands:
        assert cli.run(command) == 2, command
        said = capsys.readouterr().err
        assert f"convert it once with: nemotron checkpoint convert {run}" in said
        assert said.count("\n") == 1
    taught = tuning(stage="distill", teacher=str(run))
    for command in (["train", taught], ["train", taught, "--dry-run"]):
        assert cli.run(command) == 2, command
        assert "nemotron checkpoint convert" in capsys.readouterr().err
    with pytest.raises(UserError, match="nemotron checkpoint convert"):
        nemotron.load(run)
    assert cli.run(["checkpoint", "convert", str(run)]) == 1
    assert "which no checkpoint needs" in capsys.readouterr().out
    assert not mark.exists()


@pytest.mark.parametrize("planted", [None], indirect=True)
def test_a_converted_run_has_every_bit(planted, undisturbed):
    run, _ = planted
    assert cli.run(["checkpoint", "convert", str(run)]) == 0
    tensors, others = final_tensors(run), final_tensors(undisturbed)
    assert tensors.keys() == others.keys()
    assert all((tensors[name] == others[name]).all() for name in tensors)
    assert cli.run(["train", str(run / "recipe.yaml"), "--resume", ROWS]) == 0


WITHOUT_PICKLE = """
import pickle, sys
import torch
torch.set_num_threads(1)
import nemotron
import nemotron.generate.command, nemotron.hf.export, nemotron.loading, nemotron.train.start
from nemotron import cli
run, out, rows = sys.argv[1:]
commands = [
    ["train", f"{run}/recipe.yaml", "--resume", "--stop-at", "5", rows],
    ["train", f"{run}/recipe.yaml", "name=new", f"init_from={run}", "--stop-at", "1", rows],
    ["generate", run, "--prompt", "the", "--max-new-tokens", "2", "--seed", "1"],
    ["export", run, "--out", out, "--no-check"],
]
def refuse(*arguments, **keywords):
    raise AssertionError("something is unpickled")
def refused(name):
    known = getattr(pickle, name)
    def read(*arguments, **keywords):
        # numba keeps its compiled kernels as pickles, in a folder of this user alone
        if sys._getframe(1).f_globals["__name__"].startswith("numba."):
            return known(*arguments, **keywords)
        refuse()
    return read
class Refused:
    __init__ = refuse
for name in ("load", "loads", "_load", "_loads"):
    setattr(pickle, name, refused(name))
pickle.Unpickler = pickle._Unpickler = Refused
torch.load = torch.serialization.load = refuse
for command in commands:
    code = cli.run(command)
    assert code == (75 if command[0] == "train" else 0), (command, code)
nemotron.load(run)
try:
    pickle.loads(b"N.")
except AssertionError:
    print("nothing was unpickled")
"""


@pytest.mark.slow
def test_reading_a_checkpoint_unpickles_nothing(recipe, tmp_path):
    from nemotron.train.start import train

    config = recipe("stopped")
    assert train(config, stop_at=3) == 75
    run = Path(config.output) / config.name
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PICKLE, str(run), str(tmp_path / "out"), ROWS],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing was unpickled" in done.stdout
