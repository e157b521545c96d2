"""Measuring operations: what is refused, what is printed, what is drawn."""

import json
import math
import runpy
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

import nemotron.sol.run as run
from nemotron.device import cpu_multiplies_bfloat16
from nemotron.doctor import bench as doctor
from nemotron.errors import UserError
from nemotron.ops.registry import Backend
from nemotron.ops.rms_norm import reference, rms_norm
from nemotron.sol.clock import Clock
from nemotron.sol.machine import Machine, known_machine, machine_file, read
from nemotron.sol.run import NoFigure, Patience, Result, candidates, measure
from nemotron.sol.worker import Candidate, serve

ROOT = Path(__file__).parents[2]
ALWAYS = Patience(60.0, math.inf)
CPU = torch.device("cpu")


def machine(rate: float = 1e15) -> Machine:
    peaks = {"float32": rate, "bfloat16": rate}
    kept = {"torch": torch.__version__, "date": "2026-11-27"}
    return Machine(device="a CPU", threads=1, bandwidth=rate, peaks=peaks, **kept)


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let workers be threads, in which planted faults are known."""

    @contextmanager
    def worker(candidate: Candidate) -> Iterator[Connection]:
        mine, other = Pipe()
        thread = threading.Thread(target=serve, args=(other, candidate))
        thread.start()
        try:
            yield mine
        finally:
            mine.send(None)
            thread.join()
            mine.close()

    monkeypatch.setattr(run, "_worker", worker)
    monkeypatch.setattr(Clock, "flush", lambda self: None)


def plant(monkeypatch: pytest.MonkeyPatch, function: object) -> Candidate:
    """Return a candidate that is such a function in place of the norm."""
    backends = [Backend("planted", function), rms_norm.backend("reference")]
    operation = replace(rms_norm, backends=backends)
    monkeypatch.setattr("nemotron.sol.worker.find_operation", lambda name: operation)
    monkeypatch.setattr(run, "find_operation", lambda name: operation)
    (found,) = candidates("tiny", "float32", CPU, operations=["rms_norm"])
    assert found.backend == "planted"
    return found


def test_an_instruction_takes_twice_as_many_products_in_integers():
    found = machine(5.0)
    assert found.roofs("bfloat16", "numba").flops == 5.0
    assert found.roofs("bfloat16", "numba_int16").flops == 10.0


def test_a_right_backend_gets_a_figure(in_threads, monkeypatch):
    result = measure(plant(monkeypatch, reference), machine(), ALWAYS)
    assert result.beside == "reference"
    assert result.kept == run.KEPT
    assert 0 < result.forward < result.both
    assert 0 < result.score < 1
    # x and the gain twice, the output and its gradient, two gradients; 1e15 bytes a second
    elements = 2 * 64 * 64
    assert result.least.seconds == pytest.approx(4 * (5 * elements + 3 * 64) / 1e15)
    # separate passes move more
    assert result.separate > 2 * result.least.seconds


@pytest.mark.parametrize("wrong", ["value", "gradient", "later"])
def test_wrong_results_give_no_figure(wrong: str, in_threads, monkeypatch):
    calls = []
    # the first check, a call for the shape of the output, and those that the clock runs for
    timed = 2 + run.WARM_UPS + run.KEPT

    def function(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        calls.append(1)
        if wrong == "gradient":
            return reference(x, weight.detach(), eps) + 0 * weight
        off = wrong == "value" or len(calls) > timed
        return reference(x, weight, eps) * (1.001 if off else 1.0)

    candidate = plant(monkeypatch, function)
    with pytest.raises(NoFigure, match=r"differ by .* from the reference in float64"):
        measure(candidate, machine(), ALWAYS)
    assert len(calls) == (timed + 1 if wrong == "later" else 1)


def test_a_time_below_the_bound_is_refused(in_threads, monkeypatch):
    candidate = plant(monkeypatch, reference)
    with pytest.raises(NoFigure, match=r"ms is less than the bound of .* ms: the roofs are too"):
        measure(candidate, machine(rate=1.0), ALWAYS)


def test_a_result_that_could_compute_later_is_refused(in_threads, monkeypatch):
    class Lazy(Tensor):
        pass

    candidate = plant(monkeypatch, lambda x, w, e: reference(x, w, e).as_subclass(Lazy))
    with pytest.raises(NoFigure, match="a Lazy, not a plain tensor"):
        measure(candidate, machine(), ALWAYS)


def test_a_machine_that_is_never_quiet_gives_no_figure(in_threads, monkeypatch):
    candidate = plant(monkeypatch, reference)
    with pytest.raises(NoFigure, match="other programs were busy for 0 s"):
        measure(candidate, machine(), Patience(0.0, -1.0))


def test_roofs_are_measured_once_and_a_damaged_file_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    probed = []

    def probe(device: torch.device) -> Machine:
        probed.append(device)
        name, threads = "nemotron.sol.machine.device_name", torch.get_num_threads()
        monkeypatch.setattr(name, lambda device: "a CPU")
        return machine().model_copy(update={"threads": threads})

    monkeypatch.setattr("nemotron.sol.machine.device_name", lambda device: "a CPU")
    monkeypatch.setattr("nemotron.sol.machine.probe", probe)
    first = known_machine(CPU)
    assert known_machine(CPU) == first == read(machine_file(CPU))
    assert len(probed) == 1
    machine_file(CPU).write_text("{}")
    with pytest.raises(UserError, match="delete the file, it is measured again"):
        known_machine(CPU)


def test_the_tool_writes_a_table_a_line_and_a_drawing(in_threads, monkeypatch, tmp_path, capsys):
    roofs, lines, drawing = (tmp_path / name for name in ("roofs.json", "a.jsonl", "a.svg"))
    roofs.write_text(machine().model_dump_json())
    chosen = ["--size", "tiny", "--op", "rms_norm", "--dtype", "bfloat16", "--device", "cpu"]
    files = ["--machine", str(roofs), "--json", str(lines), "--svg", str(drawing)]
    monkeypatch.setattr(sys, "argv", ["run.py", "--max-others", "inf", *chosen, *files])
    assert runpy.run_path(str(ROOT / "tools/sol/run.py"))["main"]() == 0
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    (row,) = rows
    assert row["problem"] == "rms_norm"
    assert row["machine"]["device"] == "a CPU"
    assert f"| rms_norm | {row['backend']} |" in said
    assert f"| {row['score']:.2f} |" in said
    text = drawing.read_text()
    ElementTree.fromstring(text)
    assert text.count('<rect class="h6"') == 1


@pytest.mark.slow
def test_the_doctor_prints_roofs_and_a_score_of_each_chosen_backend(
    in_threads, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "probe", lambda device: machine())
    monkeypatch.setattr(doctor, "find_device", lambda name: CPU)
    monkeypatch.setattr(run, "KEPT", 1)
    assert doctor.bench("tiny", ALWAYS) == 0
    output = capsys.readouterr().out
    assert "float32 1,000,000 GFLOP/s" in output
    for candidate in candidates("tiny", "float32", CPU):
        (line,) = [x for x in output.splitlines() if x.strip().startswith(f"{candidate.name}  ")]
        assert f" {candidate.backend} " in line


def test_a_backend_without_a_figure_makes_the_doctor_fail(
    in_threads, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "probe", lambda device: machine(rate=1.0))
    monkeypatch.setattr(doctor, "find_device", lambda name: CPU)
    (only,) = candidates("tiny", "float32", CPU, operations=["wide_linear"])
    monkeypatch.setattr(doctor, "candidates", lambda *words: [only])
    assert doctor.bench("tiny", ALWAYS) == 1
    assert "wide_linear router, reference: no figure: " in capsys.readouterr().out


def test_released_sizes_are_compared_with_torch_where_the_reference_is_too_slow():
    by_name = {c.name: run.beside(c).backend for c in candidates("nano", "bfloat16", CPU)}
    units = cpu_multiplies_bfloat16()
    assert by_name["ssd"] == ("chunked" if units else "float32_products")
    assert by_name["attention documents"] == ("sdpa" if units else "float32_products")
    assert by_name["rms_norm"] == "reference"
    small = {c.name: run.beside(c).backend for c in candidates("nano-proxy", "bfloat16", CPU)}
    assert set(small.values()) == {"reference"}


def test_results_say_in_json_what_was_measured(in_threads, monkeypatch):
    result: Result = measure(plant(monkeypatch, reference), machine(), ALWAYS)
    facts = result.facts()
    assert facts["problem"] == "rms_norm"
    assert facts["backend"] == "planted"
    assert facts["score"] == result.score
    assert json.loads(json.dumps(facts)) == facts
