"""`nemotron doctor --ranks` with real processes that meet over gloo, or do not."""

import socket
import subprocess
import sys

import pytest

from nemotron import cli
from tests.support.cluster import PATIENCE_S, clean_environment, free_port

pytestmark = pytest.mark.distributed

DOCTOR = [sys.executable, "-m", "nemotron", "doctor", "--ranks"]


def together(ranks: list[int], world: int, timeout_s: int, **second: str) -> list[tuple[int, str]]:
    """Start these ranks; the last with more in its environment. Returns exit codes and output."""
    port, processes = free_port(), []
    for rank in ranks:
        place = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        env = clean_environment() | place | (second if rank == ranks[-1] else {})
        processes.append(
            subprocess.Popen(
                [*DOCTOR, "--timeout", str(timeout_s)],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    texts = [process.communicate(timeout=PATIENCE_S)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, texts, strict=True)]


def test_a_difference_is_named_and_every_rank_leaves_with_1():
    (code, text), (other_code, _) = together([0, 1], 2, 40, OMP_NUM_THREADS="2")
    assert (code, other_code) == (1, 1), text
    wanted = "difference: The number of threads differs: 1 on rank 0; 2 on rank 1."
    assert wanted in text.splitlines()
    assert "ranks 2, machines 1: 1 difference" in text


def test_a_rank_that_does_not_arrive_is_named_with_those_that_did():
    (code, text), (other_code, other_text) = together([0, 2], 4, 12)
    assert (code, other_code) == (1, 1)
    assert "ranks 1, 3 of 4 did not arrive within 12 s; those that did: 0, 2 on " in text
    assert other_text == ""


def test_without_rank_0_the_others_name_the_place_they_tried():
    [(code, text)] = together([1], 2, 1)
    assert code == 1
    assert "rank 1 on " in text
    assert "did not reach 127.0.0.1:" in text
    assert "Traceback" not in text


def test_a_port_in_use_is_told():
    with socket.create_server(("127.0.0.1", 0)) as other:
        [(code, text)] = together([0], 2, 5, MASTER_PORT=str(other.getsockname()[1]))
    assert code == 1
    assert "which is in use; choose another MASTER_PORT, or look for a second process" in text
    assert "Traceback" not in text


def test_equal_ranks_of_torchrun_are_fine_and_told_once_in_a_table():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", *DOCTOR[1:]]
    done = subprocess.run(
        command,
        env=clean_environment(),
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


REST = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"RANK": "0"}, "RANK=0, WORLD_SIZE=None, LOCAL_RANK=None; torchrun sets all three"),
        (REST | {"RANK": "one"}, "RANK=one, WORLD_SIZE=2, LOCAL_RANK=0; torchrun sets all three"),
        (REST | {"RANK": "2"}, "RANK = 2 is not below WORLD_SIZE = 2."),
        (REST | {"RANK": "1", "MASTER_ADDR": ""}, "MASTER_ADDR=, MASTER_PORT=1; they say where"),
        (REST | {"RANK": "1", "MASTER_PORT": "x"}, "MASTER_ADDR=x, MASTER_PORT=x; they say where"),
    ],
)
def test_half_an_environment_is_a_mistake(
    no_rank: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, given: dict, sentence: str
):
    for name, value in given.items():
        no_rank.setenv(name, value)
    assert cli.run(["doctor", "--ranks"]) == 2
    assert sentence in capsys.readouterr().err
