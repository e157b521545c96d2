"""metrics.jsonl reads as if nothing had ever interrupted the run."""

import json

import pytest

from nemotron.run.metrics import ABANDONED, DAMAGED, MetricsFile, read_metrics


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


@pytest.mark.parametrize(
    "damage", [b"\0\0\0\n", b'{"step": 3}\n', b'{"kind": "train"}\n', b"[" * 100_000 + b"\n"]
)
def test_a_damaged_line_is_set_aside_and_the_whole_ones_are_kept(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, last_step=0) as metrics:
        for step in range(1, 6):
            metrics.write(record(step))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], damage, *lines[2:], b'{"st']))
    with MetricsFile(path, last_step=4) as metrics:
        assert metrics.num_damaged == 1
        metrics.write(record(5, loss=2.0))
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4, 5]
    assert path.read_bytes().startswith(b"".join(lines[:4]))
    assert (tmp_path / DAMAGED).read_bytes() == damage


def test_a_rollback_takes_out_later_lines_and_writing_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, last_step=0) as metrics:
        for step in range(1, 4):
            metrics.write(record(step))
        metrics.roll_back(1)
        metrics.write(record(2, loss=5.0))
    assert [r.get("loss") for r in read_metrics(path)] == [None, 5.0]
    assert [r["step"] for r in read_metrics(tmp_path / ABANDONED)] == [2, 3]
