"""Comparing two runs bit by bit."""

from pathlib import Path

import torch

from nemotron.checkpoint.find import newest
from nemotron.checkpoint.read import SavedTensors, read_state
from nemotron.run.metrics import read_metrics

MEASURED = ("perf/", "mem/", "ranks/")
"""Metrics that depend on the clock and the machine's load."""


def final_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a run's newest checkpoint."""
    info = newest(run / "checkpoints").info
    assert info is not None
    saved = SavedTensors(info)
    tensors = saved.empty()
    saved.load(tensors)
    return tensors


def computed_metrics(run: Path) -> list[dict]:
    """Return the metrics of a run without what was measured by a clock."""
    records = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in r.items() if not k.startswith(MEASURED)} for r in records]


def assert_same_run(run: Path, other: Path) -> None:
    """Assert that two runs ended with the same bits and logged the same numbers."""
    tensors, others = final_tensors(run), final_tensors(other)
    assert tensors.keys() == others.keys()
    different = [name for name in tensors if not torch.equal(tensors[name], others[name])]
    assert not different
    states = [read_state(newest(folder / "checkpoints").info) for folder in (run, other)]
    assert states[0] == states[1]
    assert computed_metrics(run) == computed_metrics(other)
