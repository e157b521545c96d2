"""Muon in every kind of layout: the matrices are whole when they are made orthogonal."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.test_layouts import laid_out
from tests.support.cases import mostly_nightly
from tests.support.layout_run import Outcome, joined, load_and_go_on, run_steps, save_after
from tests.support.pool import Pool

pytestmark = pytest.mark.distributed

NUM_STEPS = 4
ON_TWO: dict[str, dict[str, Any]] = {
    "fsdp2": {},
    "hsdp2": {"dp_replicate": 2},
    "tp2": {"tp": 2},
    "ep2": {"ep": 2, "expert_dispatch": "all_to_all"},
    "cp2": {"cp": 2},
    "pp2": {"pp": 2},
}
ON_FOUR: dict[str, dict[str, Any]] = {
    "fsdp4": {},
    "tp2_fsdp2": {"tp": 2},
    "ep2_tp2": {"tp": 2, "ep": 2},
    "pp2_ep2": {"pp": 2, "ep": 2},
}


@pytest.fixture(scope="session")
def muon(values: dict[str, Any]) -> dict[str, Any]:
    return values | {"optimizer": {"name": "muon"}}


@pytest.fixture(scope="session")
def by_muon(muon: dict[str, Any]) -> Outcome:
    """One process, no process group."""
    torch.set_num_threads(1)
    return run_steps(muon, NUM_STEPS)


def check(outcomes: list[Outcome], alone: Outcome) -> None:
    weights, expected = joined([o.weights for o in outcomes]), joined([alone.weights])
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        # float32 sums in another order, which bfloat16 rounds to a neighbour here and there: far
        # less than the updates, of which each element is about the learning rate
        apart = (weight - expected[name]).abs()
        assert apart.mean() <= 2e-5, (name, apart.mean())
        assert apart.max() <= 2e-3, (name, apart.max())
    assert outcomes[0].losses == pytest.approx(alone.losses, rel=1e-4)
    for outcome in outcomes[1:]:
        assert outcome.losses == outcomes[0].losses


@pytest.mark.parametrize("layout", mostly_nightly(ON_TWO, "fsdp2", "cp2"))
def test_two_ranks_train_as_one(pair: Pool, muon: dict, by_muon: Outcome, layout: str):
    check(pair.run(run_steps, laid_out(muon, ON_TWO[layout]), NUM_STEPS), by_muon)


@pytest.mark.parametrize("layout", mostly_nightly(ON_FOUR))
def test_four_ranks_train_as_one(four: Pool, muon: dict, by_muon: Outcome, layout: str):
    check(four.run(run_steps, laid_out(muon, ON_FOUR[layout]), NUM_STEPS), by_muon)


def test_a_checkpoint_goes_on_in_other_layouts(pair: Pool, muon: dict, tmp_path: Path):
    torch.set_num_threads(1)
    folder = tmp_path / "checkpoints"
    saved = joined(pair.run(save_after, laid_out(muon, {"tp": 2, "ep": 2}), 3, folder, False))
    loaded, reference = load_and_go_on(muon, folder, 3)
    new = joined([loaded])
    assert [name for name in new if not torch.equal(new[name], saved[name])] == []
    for _, seen in pair.run(load_and_go_on, laid_out(muon, {}), folder, 3):
        assert [loss for loss, *_ in seen] == pytest.approx([loss for loss, *_ in reference], 1e-4)
