"""Files and models beside the data: a resumed run, or another rank, must find the same in them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from nemotron.checkpoint.manifest import FORMAT
from nemotron.cli import run
from nemotron.posttrain.contents import KEY, check_contents
from nemotron.posttrain.sft_config import DistillConfig
from tests.support.fine_tuning import Workplace
from tests.support.job import Job
from tests.support.old_checkpoint import seal
from tests.support.rl import rl_values, write_recipe


def taught(workplace: Workplace, teacher: Path | str) -> dict[str, Any]:
    return {"stage": "distill", "teacher": str(teacher), "init_from": None}


def replace_model(workplace: Workplace, teacher: Path) -> None:
    """Put a run that learned one step more in the place of another."""
    other = workplace.runs / "learned"
    if not other.exists():
        workplace.train("learned", "--stop-at", "1")
    shutil.rmtree(teacher)
    shutil.copytree(other, teacher)


@pytest.mark.slow
def test_another_teacher_under_the_same_name_is_refused_by_a_resumed_run(
    workplace: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(workplace.runs / "base", teacher)
    folder = workplace.train("watched", "--stop-at", "1", **taught(workplace, teacher))
    replace_model(workplace, teacher)
    capsys.readouterr()
    assert run(["train", str(folder / "recipe.yaml"), "--resume"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"teacher = {teacher} has another content than at step 1 of this run" in said


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.nightly
def test_another_teacher_on_one_rank_is_refused(workplace: Workplace, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("here", "there")]
    for folder in folders:
        shutil.copytree(workplace.runs / "base", folder / "teacher")
    replace_model(workplace, folders[1] / "teacher")
    values = workplace.values("two-teachers", **taught(workplace, "teacher"))
    job = Job(DistillConfig.model_validate(values), folders=folders)
    assert job.wait() == [2, 2], job.text()
    assert "the data's contents.teacher = teacher = " in " ".join(job.text().split())


@pytest.mark.slow
def test_rows_that_changed_are_refused_by_a_resumed_run(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = tmp_path / "rows.jsonl"
    options = {"url": "http://127.0.0.1:9", "data": str(rows), "timeout_s": 1.0}
    rollout = {"environments": [{"name": "gym", "options": options}]}
    recipe = write_recipe(tmp_path, "asked", rl_values(rollout=rollout))
    row = {"responses_create_params": {"input": "1 + 1"}, "expected_answer": "2"}
    rows.write_text((json.dumps(row) + "\n") * 2)
    assert run(["train", str(recipe), "--stop-at", "1"]) == 75
    rows.write_text((json.dumps(row) + "\n") + json.dumps({**row, "expected_answer": "3"}))
    capsys.readouterr()
    own = tmp_path / "runs" / "asked" / "recipe.yaml"
    assert run(["train", str(own), "--resume"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"rollout.environments.gym.data = {rows} has another content than at step 1" in said
    rows.write_text((json.dumps(row) + "\n") * 2)
    checkpoint = tmp_path / "runs" / "asked" / "checkpoints" / "step-00000001"
    state = json.loads((checkpoint / "state.json").read_text())
    state["data"]["rollouts"][0]["tokens"][0] = 1 << 20
    (checkpoint / "state.json").write_text(json.dumps(state))
    seal(checkpoint, 1, FORMAT)
    assert run(["train", str(own), "--resume"]) == 2
    assert "are damaged: an id is not in the vocabulary" in capsys.readouterr().err


def test_checkpoints_without_hashes_and_other_paths_are_accepted() -> None:
    own = {"teacher = runs/a": "1"}
    check_contents({}, own, 3)
    check_contents({KEY: {"teacher = runs/b": "2"}}, own, 3)
    check_contents({KEY: own}, own, 3)
