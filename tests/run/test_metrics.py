"""metrics.jsonl reads as if nothing had ever interrupted the run."""

import json

import pytest

from nemotron.run.metrics import MetricsFile, read_metrics


def record(step: int, **values) -> dict:
    return {"kind": "train", "step": step, **values}


def test_lines_after_the_checkpoint_are_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, last_step=0) as metrics:
        for step in range(1, 6):
            metrics.write(record(step, loss=0.1 * step))
    with MetricsFile(path, last_step=3) as metrics:
        metrics.write(record(4, loss=9.0))
    assert [(r["step"], r["loss"]) for r in read_metrics(path)][2:] == [(3, 0.1 * 3), (4, 9.0)]


@pytest.mark.parametrize("rest", [b'{"kind": "train", "st', b'{"kind": "train"}\n', b"\xff\0\n"])
def test_a_line_that_a_kill_left_half_written_is_cut_off(tmp_path, rest):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, last_step=0) as metrics:
        metrics.write(record(1))
    whole = path.read_bytes()
    path.write_bytes(whole + rest)
    assert len(read_metrics(path)) == 1
    MetricsFile(path, last_step=7).close()
    assert path.read_bytes() == whole


def test_a_line_is_readable_as_soon_as_it_is_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, last_step=0) as metrics:
        metrics.write(record(1, loss=0.1))
        assert json.loads(path.read_text()) == {"kind": "train", "step": 1, "loss": 0.1}


def test_what_json_cannot_hold_becomes_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, last_step=0) as metrics:
        metrics.write(record(1, loss=float("nan"), norm=float("inf")))
    assert "NaN" not in path.read_text()
    assert read_metrics(path)[0]["loss"] is None


def test_numbers_survive_to_the_last_bit(tmp_path):
    path = tmp_path / "metrics.jsonl"
    value = 0.1 + 0.2
    with MetricsFile(path, last_step=0) as metrics:
        metrics.write(record(1, loss=value))
    assert read_metrics(path)[0]["loss"] == value
