"""`nemotron doctor --ranks` with real processes that meet over gloo, or do not."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron import cli
from nemotron.parallel import runtime
from tests.support import forked
from tests.support.cluster import (
    PATIENCE_S,
    ROOT,
    Launched,
    clean_environment,
    free_port,
)
from tests.support.quick_python import environment

pytestmark = [pytest.mark.distributed, pytest.mark.waits(15)]

DOCTOR = ["-m", "nemotron", "doctor", "--ranks"]


class Together:
    """Starts ranks that are to meet, and waits for them; the last has more in its environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def forked(
        self, ranks: list[int], world: int, timeout_s: int, **second: str
    ) -> list[tuple[int, str]]:
        """Return exit codes and output of processes that have imported torch already."""
        words = ["doctor", "--ranks", "--timeout", timeout_s]
        processes = [
            forked.command(*words, output=self.folder / f"rank-{number}.txt", environment=env)
            for number, env in enumerate(self._environments(ranks, world, second))
        ]
        return [(process.wait(PATIENCE_S), process.text) for process in processes]

    def anew(self, ranks: list[int], world: int, **second: str) -> list[tuple[int, str]]:
        """Return those of processes that import torch in their environment."""
        command = [sys.executable, *DOCTOR, "--timeout", "40"]
        processes = [
            Launched(command, env, self.folder) for env in self._environments(ranks, world, second)
        ]
        return [(process.wait(), process.text) for process in processes]

    def _environments(
        self, ranks: list[int], world: int, second: dict[str, str]
    ) -> list[dict[str, str]]:
        common = {
            "PYTHONPATH": str(ROOT),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
        }
        return [
            clean_environment()
            | common
            | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            | (second if rank == ranks[-1] else {})
            for rank in ranks
        ]


@pytest.fixture
def together(tmp_path: Path) -> Together:
    return Together(tmp_path)


def test_a_difference_is_named_and_every_rank_leaves_with_1(together: Together):
    (code, text), (other_code, _) = together.anew([0, 1], 2, OMP_NUM_THREADS="2")
    assert (code, other_code) == (1, 1), text
    wanted = "difference: The number of threads differs: 1 on rank 0; 2 on rank 1."
    assert wanted in text.splitlines()
    assert "ranks 2, machines 1: 1 difference" in text


def test_a_rank_that_does_not_arrive_is_named_with_those_that_did(together: Together):
    (code, text), (other_code, other_text) = together.forked([0, 2], 4, 4)
    assert (code, other_code) == (1, 1)
    assert "ranks 1, 3 of 4 did not arrive within 4 s; those that did: 0, 2 on " in text
    assert other_text == ""


def test_without_rank_0_the_others_name_the_place_they_tried(together: Together):
    [(code, text)] = together.forked([1], 2, 1)
    assert code == 1
    assert "rank 1 on " in text
    assert "did not reach 127.0.0.1:" in text
    assert "Traceback" not in text


def test_a_port_in_use_is_told(together: Together):
    with socket.create_server(("127.0.0.1", 0)) as other:
        [(code, text)] = together.forked([0], 2, 5, MASTER_PORT=str(other.getsockname()[1]))
    assert code == 1
    assert "which is in use; choose another MASTER_PORT, or look for a second process" in text
    assert "Traceback" not in text


def test_equal_ranks_of_torchrun_are_fine_and_told_once_in_a_table():
    torchrun = ["python", "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", *DOCTOR]
    done = subprocess.run(
        command,
        env=clean_environment() | environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if " 0-1 " in line]
    assert "cpu" in line
    assert "all-reduce" in done.stdout
    assert "16 MiB in" in done.stdout
    assert done.stdout.count("ranks 2, machines 1: no difference") == 1


@pytest.fixture
def no_rank(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_one_process_needs_no_launcher(no_rank, capsys: pytest.CaptureFixture):
    assert cli.run(["doctor", "--ranks"]) == 0
    assert "ranks 1, machines 1: no difference" in capsys.readouterr().out


SMOKE = str(Path(__file__).parents[2] / "recipes/tiny/smoke.yaml")
REST = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    "words", [["doctor", "--ranks"], ["train", SMOKE], ["train", SMOKE, "--dry-run"]], ids=" ".join
)
@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"RANK": "0"}, "RANK=0, WORLD_SIZE=None, LOCAL_RANK=None must be three numbers"),
        (REST | {"RANK": "one"}, "RANK=one, WORLD_SIZE=2, LOCAL_RANK=0 must be three numbers"),
        (REST | {"RANK": "9" * 5000}, "must be three numbers"),
        (REST | {"RANK": "2"}, "RANK = 2 must lie in 0 … 1, below WORLD_SIZE."),
        (REST | {"RANK": "-1"}, "RANK = -1 must lie in 0 … 1, below WORLD_SIZE."),
        (REST | {"RANK": "1", "LOCAL_RANK": "-1"}, "LOCAL_RANK = -1 must lie in 0 … 1"),
        (REST | {"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE = 0 must lie in 1 … "),
        (REST | {"RANK": "0", "WORLD_SIZE": "9" * 20}, "99999999 must lie in 1 … "),
        (REST | {"RANK": "1", "MASTER_ADDR": ""}, "MASTER_ADDR=, MASTER_PORT=1 must say where"),
        (REST | {"RANK": "1", "MASTER_PORT": ""}, "MASTER_ADDR=x, MASTER_PORT=None must say where"),
        (REST | {"RANK": "1", "MASTER_PORT": "x"}, "MASTER_ADDR=x, MASTER_PORT=x must say where"),
        (REST | {"RANK": "1", "MASTER_PORT": "0"}, "MASTER_ADDR=x, MASTER_PORT=0 must say where"),
        (REST | {"RANK": "1", "MASTER_PORT": "99999"}, "MASTER_PORT=99999 must say where"),
    ],
)
def test_half_an_environment_is_a_mistake(
    no_rank: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    words: list[str],
    given: dict[str, str],
    sentence: str,
):
    for name, value in given.items():
        no_rank.setenv(name, value)
    no_rank.setattr(runtime, "ECHO_S", 0.0)  # there is no other rank that says it first
    assert cli.run(words) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert sentence in line


def test_a_dry_run_of_a_rank_meets_nobody(
    no_rank: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        no_rank.setenv(name, value)  # as launch/torchrun.sh does
    assert cli.run(["train", SMOKE, "--dry-run"]) == 0
    assert "ranks" in capsys.readouterr().out
    assert cli.run(["train", SMOKE]) == 2
    assert "MASTER_ADDR=None, MASTER_PORT=None must say where" in capsys.readouterr().err
