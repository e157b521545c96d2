"""The parts of the GPU programme that need no GPU: what it reads, counts, cuts and prints."""

import importlib
import json
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.cases import further
from tests.support.forked import Forked, run_tool
from tests.support.models import build_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "tools/gpu")

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def write(out: Path, *rows: dict) -> None:
    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_table_is_cut_to_its_length_without_losing_a_line(module):
    table = module("table")
    lines = [str(n) + "x" * 10 * n for n in range(60)]
    text = table.shortened(lines, 3000)
    assert len(text) <= 3000
    assert [line.split("x")[0] for line in text.splitlines()] == [str(n) for n in range(60)]


def test_a_line_that_was_cut_off_is_left_out(module, tmp_path):
    table = module("table")
    write(tmp_path, {"stage": "cli", "case": "train", "exit_code": 0})
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"stage": "cli", "ca')
    assert len(table.rows_of(tmp_path)) == 1


def test_the_table_says_what_is_wrong_and_which_stage_ended_badly(module, tmp_path):
    table = module("table")
    write(
        tmp_path,
        {"stage": "model", "case": "bf16 auto", "loss": 1.0, "flag": "WRONG"},
        {"stage": "ops", "case": "ssd nano: triton", "error": "RuntimeError: no"},
    )
    parts = {"ops": {"seconds": 3.0, "exit_code": "no end in time"}}
    text = table.table(tmp_path, parts)
    assert "WRONG bf16 auto" in text
    assert "ERROR ssd nano: triton" in text
    assert "ended badly: ops (no end in time)" in text
    found = table.summary(tmp_path, 4.0)
    assert found["wrong"] == ["model bf16 auto"]
    assert found["errors"] == ["ops ssd nano: triton"]


def test_backends_of_one_problem_stand_side_by_side(module, tmp_path):
    table = module("table")
    row = {"stage": "ops", "case": "rms_norm nano", "forward_ms": 0.1, "floor_ms": 0.2}
    row |= {"of_floor": 0.5, "difference": 1e-3, "score": 0.5, "ms": 0.4}
    write(tmp_path, row | {"backend": "fused"}, row | {"backend": "triton", "score": 0.9})
    (line,) = [line for line in table.table(tmp_path, {}).splitlines() if "rms_norm" in line]
    assert line.count(" | ") == 1
    assert "triton" in line
    assert "S0.90" in line


def test_idle_time_is_what_no_kernel_covers(module):
    covered = module("kernels_of").covered
    assert covered([(0, 10), (5, 8), (9, 12), (20, 21)]) == 13
    assert covered([]) == 0


def test_counts_and_failures_are_read_from_the_end_of_a_log(module):
    tests = module("stage_tests")
    log = "FAILED tests/ops/test_ssd.py::test_a[1] - ValueError: no\n2 failed, 31 passed in 9.1s\n"
    assert tests.counts(log) == {"failed": 2, "passed": 31}
    assert tests.failures(log) == {"failures": ["test_a[1]: ValueError: no"], "flag": "WRONG"}
    assert tests.failures("3 passed in 1s") == {}


def test_waits_are_counted_by_the_line_that_waits(module):
    kernels = module("kernels_of")
    waits: Counter[str] = Counter()
    with kernels.host_waits(waits):
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert sum(waits.values()) == 3


def test_balanced_experts_get_the_same_tokens_and_no_token_one_expert_twice(module):
    torch = importlib.import_module("torch")
    chosen = module("share").turns(24, 16, 6, torch.device("cpu"))
    assert (chosen.flatten().bincount() == 9).all()
    assert all(len(set(row.tolist())) == 6 for row in chosen)


def test_a_router_weighs_balanced_experts_by_its_own_scores(module):
    torch = importlib.import_module("torch")
    share, router = module("share"), importlib.import_module("nemotron.model.router").Router
    gate = router(build_config())
    torch.nn.init.normal_(gate.weight)
    x = torch.randn(14, gate.weight.shape[1])
    free = gate(x)
    with share.balanced_experts():
        forced = gate(x)
    assert torch.equal(forced.experts, share.turns(14, gate.num_experts, gate.top_k, x.device))
    assert len(set(forced.counts.tolist())) == 1
    chosen = free.scores.gather(1, forced.experts)
    expected = gate.scaling * chosen / chosen.sum(1, keepdim=True)
    assert (forced.weights - expected).abs().max() <= 1e-6  # float32
    assert torch.equal(gate(x).experts, free.experts)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "roofs",
        "model",
        "step --variant auto",
        "step --variant before",
        "step --once",
        "ops --once --only rms_norm",
        *map(further, ["ops --only rms_norm --size tiny", "decode", "peer", "warm", "tune"]),
    ],
)
def test_a_stage_runs_on_a_cpu_and_finds_nothing_wrong(module, tmp_path: Path, words: str):
    name, *more = words.split()
    if name == "tune":
        more += ["--operation", "rms_norm"]
    seconds = {"warm": "100", "tune": "25"}.get(name, "40")
    own = ["--out", str(tmp_path), "--seconds", seconds, "--tiny"]
    ran = Forked(run_tool, f"gpu/stage_{name}.py", [*own, *more], output=tmp_path / "said")
    assert ran.wait(200) == 0, ran.text
    found = module("table").summary(tmp_path, 0.0)
    assert found["wrong"] == found["errors"] == []
    assert "--once" in more or (tmp_path / "results.jsonl").exists()


def test_the_script_names_a_stage_that_does_not_exist():
    command = [ROOT / "tools/gpu_check.sh", sys.executable, "--stages", "rofs"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert ran.returncode == 2
    assert "unknown stages: rofs" in ran.stdout
