"""A run in phases: every step has its own size, length and rate, and resuming changes no bit."""

from pathlib import Path

import pytest

from nemotron.run.metrics import read_metrics
from nemotron.train.start import train
from tests.support.same_run import assert_same_run

PHASES = [
    {"name": "first", "steps": 3},
    {
        "name": "second",
        "steps": 4,
        "global_tokens": 310,
        "lengths": [{"seq_len": 31, "share": 1}, {"seq_len": 10, "share": 1}],
        "schedule": {"kind": "constant", "peak": 1e-3},
    },
    {"name": "third", "steps": 2},
]
SCHEDULE = {"peak": 1e-2, "warmup_steps": 2, "decay_steps": 2}


@pytest.mark.slow
def test_phases_change_batch_rows_and_rate_and_survive_a_stop_in_each(recipe, capsys):
    whole = recipe("whole", phases=PHASES, schedule=SCHEDULE)
    assert train(whole) == 0
    folder = Path(whole.output)
    records = [r for r in read_metrics(folder / "whole" / "metrics.jsonl") if r["kind"] == "train"]
    sizes = [155] * 3 + [310] * 4 + [155] * 2
    assert [r["data/tokens"] for r in records] == [sum(sizes[: i + 1]) for i in range(9)]
    assert [round(r["lr"], 9) for r in records[3:7]] == [1e-3] * 4
    assert records[2]["lr"] == 1e-2
    assert records[8]["lr"] == 0.0
    for record in records:
        assert (
            sum(v for k, v in record.items() if k.startswith("data/tokens/"))
            == (record["data/tokens"])
        )
    assert "phase second: from token 465, 4 steps of 310 tokens in rows of 31 and 10" in (
        capsys.readouterr().out
    )
    stopped = recipe("stopped", phases=PHASES, schedule=SCHEDULE)
    for step in (2, 5, 8):
        assert train(stopped, resume=step > 2, stop_at=step) == 75
    assert train(stopped, resume=True) == 0
    assert_same_run(folder / "stopped", folder / "whole")


def test_a_run_may_be_given_another_end_while_it_runs(recipe):
    config = recipe("grows", phases=PHASES[:1], schedule=SCHEDULE | {"decay_steps": 1})
    assert train(config, stop_at=2) == 75
    longer = recipe("grows", phases=PHASES, schedule=SCHEDULE | {"decay_steps": 1})
    assert train(longer, resume=True, allow_changed=["phases"]) == 0
    records = read_metrics(Path(config.output) / "grows" / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 10))
