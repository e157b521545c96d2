"""No command executes what stands in a checkpoint, and none of them unpickles anything."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import nemotron
from nemotron import cli
from nemotron.checkpoint.find import locate
from nemotron.errors import UserError
from tests.support.commands import COMMANDS
from tests.support.fine_tuning import chats as talks
from tests.support.fine_tuning import write_recipe, write_rows
from tests.support.old_checkpoint import plant_bytes, plant_object, plant_poison, write_old
from tests.support.pairs import PairPlace
from tests.support.preferences import pairs
from tests.support.rl import rl_values
from tests.support.same_run import final_tensors
from tests.support.tiny_run import MODEL


@pytest.fixture
def planted(undisturbed: Path, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """A trained run whose checkpoint is of the old format and holds an attack, and its mark."""
    run, mark = tmp_path / "run", tmp_path / "executed"
    shutil.copytree(undisturbed, run)
    recipe = (run / "recipe.yaml").read_text().splitlines()
    changed = [f"output: {tmp_path}" if line.startswith("output:") else line for line in recipe]
    changed = ["name: run" if line.startswith("name:") else line for line in changed]
    # the tiny run's own micro-batches do not divide its batch, which a command refuses
    changed = [line.replace("micro_batch: 2", "micro_batch: 5") for line in changed]
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
def places(undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Recipes of the stages, JSON lines, and an exported folder, by the words of `READERS`."""
    folder = tmp_path_factory.mktemp("places")
    chats, words = folder / "chats", ["--workers", "1", "--chat", "--hold-out", "0.3"]
    rows = write_rows(folder / "chats.jsonl", [row for row in talks() if "tools" not in row])
    assert cli.run(["data", "prepare", str(rows), "--out", str(chats), *words]) == 0
    better = write_rows(folder / "better.jsonl", pairs())
    row = {"prompt": "the", "candidates": ["the", "then"], "messages": talks()[0]["messages"]}
    correcting = PairPlace(folder)
    common = {"output": str(folder / "runs"), "device": "cpu", "model": MODEL}
    text = {
        **common,
        "batch": {"global_tokens": 2 * 161, "micro_batch": 1},
        "schedule": {"kind": "constant", "peak": 1e-2, "total_steps": 1},
        "evaluation": {"tokens": 161},
    }

    def data(path: Path) -> dict[str, object]:
        source = {"name": "chats", "path": str(path)}
        return {"sources": [source], "cache": str(folder / "cache"), "seq_len": 161}

    recipes = {
        "SFT": {**text, "stage": "sft", "data": data(chats)},
        "DISTILL": {**text, "stage": "distill", "data": data(chats)},
        "DPO": {**text, "stage": "dpo", "data": data(better)},
        "RL": {**common, **rl_values()},
        "CORRECT": correcting.values("correct"),
    }
    export = str(folder / "export")
    assert cli.run(["export", str(undisturbed), "--out", export, "--no-check"]) == 0
    return {
        "ROWS": str(write_rows(folder / "rows.jsonl", [row])),
        "EXPORT": export,
        **{
            name: str(write_recipe(folder / f"{name}.yaml", {"name": name.lower(), **values}))
            for name, values in recipes.items()
        },
    }


READERS: list[str] = [
    "train RUN/recipe.yaml --resume",
    "train RUN/recipe.yaml name=new init_from=RUN",
    "train SFT init_from=RUN",
    "train SFT init_from=RUN --dry-run",
    "train DISTILL teacher=RUN",
    "train DISTILL teacher=RUN --dry-run",
    "train DPO init_from=RUN",
    "train RL init_from=RUN",
    "train CORRECT init_from=RUN",
    "chat RUN",
    "check-parity RUN",
    "correct CORRECTOR --in ROWS --out OUT",
    "correct RUN --ar --in ROWS --out OUT",
    "evaluate RUN",
    "evaluate RUN --suite mcqa@0",
    "evaluate RUN --suite mcqa_likelihood@0 --out OUT",
    "evaluate EXPORT --against RUN --recipe RUN/recipe.yaml",
    "export RUN --out OUT --no-check",
    "export RUN --out OUT --adapter",
    "generate RUN --prompt the",
    "generate RUN --prompts ROWS",
    "merge RUN --out OUT",
    "quantize RUN --preset fp8 --rows 1 --out OUT",
    "quantize RUN --like EXPORT --rows 1 --out OUT",
    "rl evaluate RL --model RUN",
    "rl pivots RL ROWS --model RUN --out OUT",
    "serve RUN --port 0",
]
"""Every way in which a command reads a checkpoint; capitals stand for what a test makes."""
OTHERS: list[str] = [
    "checkpoint convert RUN",
    "compare RUN RUN",
    "data inspect RUN",
    "data plan RUN",
    "import RUN --out OUT",
    "plan RUN --gpus 8",
    "recipe check RUN",
    "recipe diff RUN RUN",
    "recipe show RUN",
    "report RUN --prompt the",
    "rl reverify RUN",
    "runs RUN",
]
"""They read no weights of a run, or, as a report does, go on without them."""
NO_RUN = ["data characters", "data codeswitch", "data demo", "data noise", "data pairs",
          "data prepare", "data tokenizer", "doctor", "recipe copy", "recipe list",
          "recipe schema", "rl chats", "score"]  # fmt: skip
if importlib.util.find_spec("lm_eval") is not None:
    READERS.append("lm-eval RUN arc_easy")
else:
    NO_RUN.append("lm-eval")


def test_every_command_is_here():
    lines = [*READERS, *OTHERS, *NO_RUN]
    for words in COMMANDS:
        name = " ".join(words)
        assert any(f"{line} ".startswith(f"{name} ") for line in lines), name


@pytest.mark.slow
@pytest.mark.parametrize("planted", [plant_object, plant_bytes, plant_poison], indirect=True)
def test_no_entry_executes_what_is_planted(planted, places, capsys):
    run, mark = planted
    corrector = run.parent / "corrector"
    shutil.copytree(run, corrector)
    shutil.copy(places["CORRECT"], corrector / "recipe.yaml")
    known = {**places, "RUN": str(run), "CORRECTOR": str(corrector)}
    known["OUT"] = str(run.parent / "out")
    for line in READERS:
        words = [_placed(word, known) for word in line.split()]
        code = cli.run(words)
        assert not mark.exists(), line
        said = capsys.readouterr().err
        assert (code, said.count("\n")) == (2, 1), (line, said)
        read = corrector if "CORRECTOR" in line else run
        assert f"convert it once with: nemotron checkpoint convert {read}" in said, line
        assert not Path(known["OUT"]).exists(), line
    with pytest.raises(UserError, match="nemotron checkpoint convert"):
        nemotron.load(run)
    for line in OTHERS:
        assert cli.run([_placed(word, known) for word in line.split()]) in (0, 1, 2), line
        assert not mark.exists(), line
        if line.startswith("checkpoint convert"):
            assert "which no checkpoint needs" in capsys.readouterr().out


def _placed(word: str, places: dict[str, str]) -> str:
    for name, place in places.items():
        word = re.sub(rf"\b{name}\b", place, word)
    return word


@pytest.mark.parametrize("planted", [None], indirect=True)
def test_a_converted_run_has_every_bit(planted, undisturbed):
    run, _ = planted
    assert cli.run(["checkpoint", "convert", str(run)]) == 0
    tensors, others = final_tensors(run), final_tensors(undisturbed)
    assert tensors.keys() == others.keys()
    assert all((tensors[name] == others[name]).all() for name in tensors)
    assert cli.run(["train", str(run / "recipe.yaml"), "--resume"]) == 0


WITHOUT_PICKLE = """
import pickle, sys
import torch
torch.set_num_threads(1)
import nemotron
import nemotron.generate.command, nemotron.hf.export, nemotron.loading, nemotron.train.start
from nemotron import cli
run, out = sys.argv[1:]
commands = [
    ["train", f"{run}/recipe.yaml", "--resume", "--stop-at", "5"],
    ["train", f"{run}/recipe.yaml", "name=new", f"init_from={run}", "--stop-at", "1"],
    ["generate", run, "--prompt", "the", "--max-new-tokens", "2", "--seed", "1"],
    ["export", run, "--out", out, "--no-check"],
    ["evaluate", run],
    ["check-parity", run, "--length", "5", "--rows", "1", "--new-tokens", "2"],
    ["merge", run, "--out", out + "-merged"],
    ["quantize", run, "--preset", "fp8", "--rows", "1", "--out", out + "-small", "--no-check"],
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

    config = recipe("stopped", batch={"global_tokens": 31 * 5, "micro_batch": 5})
    assert train(config, stop_at=3) == 75
    run = Path(config.output) / config.name
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PICKLE, str(run), str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing was unpickled" in done.stdout
