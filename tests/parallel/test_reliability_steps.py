"""Steps on two ranks that meet a fault: skipped alike, replicas compared, the slow rank named."""

import random
from typing import Any

import pytest

from tests.support.cases import further, mostly_nightly
from tests.support.layout_model import MODEL
from tests.support.pool import Pool
from tests.support.prepared import write_prepared
from tests.support.reliability_run import compared, logged, skips

pytestmark = pytest.mark.distributed

LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp": {},
    "hsdp": {"dp_replicate": 2},
    "tp": {"tp": 2},
    "cp": {"cp": 2},
    "ep": {"ep": 2},
    "pp": {"pp": 2},
}


@pytest.fixture(scope="module")
def values(tmp_path_factory) -> dict[str, Any]:
    folder, draw = tmp_path_factory.mktemp("reliability"), random.Random(5)
    words = ["the", "river", "runs", "to", "sea", "and", "stone", "stays"]
    texts = [" ".join(draw.choices(words, k=draw.randint(5, 60))) for _ in range(120)]
    return {
        "name": "reliability",
        "output": str(folder / "runs"),
        "device": "cpu",
        "model": MODEL,
        "data": {
            "sources": [{"name": "prose", "path": str(write_prepared(texts, folder / "prose"))}],
            "cache": str(folder / "cache"),
            "seq_len": 32,
            "prefetch_steps": 0,
        },
        "batch": {"global_tokens": 32 * 2, "micro_batch": 1},
        "schedule": {"kind": "constant", "peak": 1e-3, "total_steps": 50},
    }


def recipe(values: dict, layout: str, *faults: dict, **reliability: Any) -> dict[str, Any]:
    return values | {
        "parallel": LAYOUTS[layout],
        "reliability": {"faults": list(faults)} | reliability,
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank", [further(0), 1])
def test_a_nan_on_one_rank_skips_the_step_on_all(pair: Pool, values, layout: str, rank: int):
    fault = {"kind": "nan_gradient", "step": 2, "rank": rank}
    expected = [(None, False), ("NOT_FINITE", True), (None, False)]
    assert pair.run(skips, recipe(values, layout, fault), 3) == [expected] * 2


def test_a_spike_on_one_rank_skips_the_step_on_all(pair: Pool, values):
    fault = {"kind": "spike", "step": 34, "rank": 1}
    seen = pair.run(skips, recipe(values, "fsdp", fault, spike_sigmas=20.0), 35)
    assert seen[0] == seen[1]
    assert [step for step, (skip, _) in enumerate(seen[0]) if skip] == [33]
    assert seen[0][33] == ("SPIKE", True)


@pytest.mark.parametrize("layout", mostly_nightly(LAYOUTS, "hsdp", "tp"))
def test_replicas_that_nothing_happened_to_are_alike(pair: Pool, values, layout: str):
    assert (
        pair.run(compared, recipe(values, layout, check_replicas_every_steps=1), 3) == [(3, "")] * 2
    )


@pytest.mark.parametrize(
    ("layout", "tensor"),
    [
        further(("hsdp", "backbone.layers.0.mixer.in_proj.weight")),
        ("tp", "backbone.layers.1.norm.weight"),
        further(("pp", "backbone.embeddings.weight")),
        ("fsdp", "backbone.layers.1.mixer.gate.e_score_correction_bias"),
    ],
)
def test_one_flipped_bit_is_found_and_named(pair: Pool, values, layout: str, tensor: str):
    fault = {"kind": "flip_bit", "step": 3, "rank": 1, "tensor": tensor}
    every = {"check_replicas_every_steps": 2}
    outcomes = pair.run(compared, recipe(values, layout, fault, **every), 6)
    assert outcomes[0] == outcomes[1]
    step, problem = outcomes[0]
    assert step == 4
    assert "after step 4 ranks hold different bits of" in problem
    assert f"{tensor} (rank 0 against rank 1)" in problem


def test_a_slow_rank_is_named_with_what_it_is_slow_in(pair: Pool, values):
    fault = {"kind": "sleep", "step": 1, "last_step": 6, "rank": 1, "seconds": 0.5}
    case = recipe(values, "fsdp", fault, straggler_factor=1.5, straggler_after=2)
    outcomes = pair.run(logged, case | {"logging": {"every_steps": 2}}, 6)
    assert outcomes[0][0] == outcomes[1][0]
    lines, records = outcomes[0]
    assert len(lines) == 1
    assert lines[0].startswith("step 4: rank 1 is slow: ")
    assert "2 intervals in a row, most in data (0.5" in lines[0]
    assert [r["ranks/slowest"] for r in records] == [1, 1, 1]
    assert min(r["ranks/max_over_median"] for r in records) > 1.5


def test_alone_or_unasked_nothing_is_measured(pair: Pool, values):
    case = recipe(values, "fsdp", straggler_factor=None)
    for lines, records in pair.run(logged, case, 2):
        assert lines == []
        assert not any(key.startswith("ranks/") for record in records for key in record)
