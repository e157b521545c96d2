"""One machine: signals, restarts and exit codes of the torchrun launcher, stand-in trainer."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.cases import further
from tests.support.cluster import (
    STAND_IN,
    TORCHRUN,
    Launched,
    both_run,
    clean_environment,
    records,
    wait_until,
)
from tests.support.quick_python import environment

pytestmark = [pytest.mark.distributed, pytest.mark.waits(30)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "run"


def start(run: Path, play: str, *options: str, after: tuple[str, ...] = ()) -> Launched:
    env = clean_environment() | environment() | {"NEMOTRON": STAND_IN, "PLAY": play}
    words = [*options, "-n", "2", "some.yaml", f"output={run.parent}", *after]
    return Launched([str(TORCHRUN), *words], env, run.parents[1])


def test_a_finished_run_is_0_and_ranks_know_their_place(run: Path):
    launched = start(run, "done", after=("note=with a space",))
    assert launched.wait() == 0, launched.text
    first, second = records(run, 0)
    assert [first["RANK"], first["LOCAL_RANK"], first["WORLD_SIZE"]] == ["0", "0", "2"]
    assert [second["RANK"], second["LOCAL_RANK"], second["WORLD_SIZE"]] == ["1", "1", "2"]
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    assert first["arguments"] == ["some.yaml", f"output={run.parent}", "note=with a space"]
    assert int(first["OMP_NUM_THREADS"]) >= 1


@pytest.mark.parametrize(
    "number", [signal.SIGUSR1, further(signal.SIGTERM), further(signal.SIGINT)]
)
def test_a_stop_saves_is_75_and_starts_nothing_again(run: Path, number: signal.Signals):
    launched = start(run, "stop", "--restarts", "3")
    wait_until(both_run(run), "both ranks run")
    launched.signal(number)
    assert launched.wait() == 75, launched.text
    assert not (run / "start-1-rank-0.json").exists()


def test_a_second_ctrl_c_leaves_at_once(run: Path):
    launched = start(run, "linger")
    wait_until(both_run(run), "both ranks run")
    launched.ctrl_c()
    wait_until(lambda: "finish their step" in launched.text, "the first one was heard")
    time.sleep(1)  # torchrun, had it heard of it, would have ended the ranks by now
    assert launched.process.poll() is None, launched.text
    launched.ctrl_c()
    assert launched.wait() == 130, launched.text


def test_a_mistake_is_2_is_not_repeated_and_leaves_nothing(run: Path):
    launched = start(run, "mistake", "--restarts", "3")
    assert launched.wait() == 2, launched.text
    assert "found a mistake" in launched.text
    assert "restart" not in launched.text
    assert not run.with_suffix(".logs").exists()


def test_a_run_that_died_goes_on_from_its_checkpoint(run: Path):
    launched = start(run, "die,done", "--restarts", "1")
    assert launched.wait() == 0, launched.text
    assert "rank 1 ended first, with exit code 137" in launched.text
    assert "rank 1 has seen enough" in launched.text
    assert "--resume" not in records(run, 0)[0]["arguments"]
    assert records(run, 1)[0]["arguments"][-1] == "--resume"


def test_a_run_that_dies_too_often_is_1(run: Path):
    launched = start(run, "die", "--restarts", "1", after=("--resume",))
    assert launched.wait() == 1, launched.text
    assert launched.text.count("the run died; restart") == 1
    assert records(run, 1)[0]["arguments"].count("--resume") == 1


def test_a_dry_run_is_one_process_that_knows_of_both(run: Path):
    launched = start(run, "done", after=("--dry-run",))
    assert launched.wait() == 0
    assert launched.text.startswith("dry run 2 some.yaml")
    assert not run.parent.exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["-n", "two", "a.yaml"], "-n two: not a number."),
        (["-n", "0", "a.yaml"], "-n is 0; give 1 or more."),
        (["--restarts"], "--restarts needs a number."),
        (["--fast", "a.yaml"], "--fast is unknown before RECIPE."),
        ([], "RECIPE"),
        (["-n", "2", "a.txt", "output=x"], "a.txt is no recipe."),
    ],
)
def test_a_wrong_command_line_is_2_and_told(tmp_path: Path, words: list[str], sentence: str):
    env = clean_environment() | environment() | {"NEMOTRON": STAND_IN, "PLAY": "done"}
    done = subprocess.run(
        [str(TORCHRUN), *words], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert sentence in done.stderr
