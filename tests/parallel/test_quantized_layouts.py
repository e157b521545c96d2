"""NVFP4 in layouts: the same quantized weights, the same random bits, the same losses."""

import functools
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

from tests.support.cases import mostly_nightly
from tests.support.layout_run import Outcome, joined, run_steps
from tests.support.pool import Pool

pytestmark = pytest.mark.distributed

NUM_STEPS = 3

# every cut is a multiple of the 16 elements that share a scale
MODEL = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "hybrid_override_pattern": "ME*E",
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "moe_shared_expert_intermediate_size": 64,
    "moe_latent_size": 32,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp2": {},
    "ep2 all_gather": {"ep": 2, "expert_dispatch": "all_gather"},
    "ep2 all_to_all": {"ep": 2, "expert_dispatch": "all_to_all"},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
}
PRECISION: dict[str, dict[str, Any]] = {
    "nvfp4": {"rules": [{"kind": "*", "format": "nvfp4"}]},
    "experts in nvfp4": {"rules": [{"kind": "moe.experts", "format": "nvfp4"}]},
    "fp8_delayed": {"preset": "fp8_delayed"},
}


def bound(precision: str, layout: str) -> float:
    """Return the relative error that a gradient may have, in the Euclidean norm."""
    if layout == "fsdp2":
        return 5e-3  # the same products; gradients are summed in another order
    if precision == "experts in nvfp4" and layout.startswith("ep2"):
        return 0.1  # a few elements are rounded the other way; other random bits would make 0.12
    # ranks add up partial sums in bfloat16, and where that turns a digit, four bits turn by a
    # third; the stages of a pipeline draw bits by their own order of micro-batches
    return 0.4


def quantized(values: dict[str, Any], precision: str, micro_batch: int) -> dict[str, Any]:
    # one micro-batch: ranks that share experts merge what one process has at once
    batch = {"global_tokens": 2 * values["data"]["seq_len"], "micro_batch": micro_batch}
    formats = {"compute": "bf16", **PRECISION[precision]}
    return values | {"model": MODEL, "precision": formats, "batch": batch}


@pytest.fixture(scope="session")
def alone(values: dict[str, Any]) -> Callable[[str, int], Outcome]:
    """Return what trains on one process, once for each precision and number of rows."""
    torch.set_num_threads(1)
    return functools.cache(
        lambda precision, rows: run_steps(quantized(values, precision, rows), NUM_STEPS)
    )


@pytest.mark.parametrize(
    ("precision", "layout"),
    mostly_nightly(
        product(PRECISION, LAYOUTS),
        ("nvfp4", "fsdp2"),
        ("nvfp4", "pp2"),
        ("experts in nvfp4", "ep2 all_to_all"),
        ("fp8_delayed", "tp2"),
    ),
)
def test_two_ranks_quantize_as_one(
    pair: Pool, values: dict, alone: Callable, precision: str, layout: str
):
    recipe = quantized(values, precision, 1) | {"parallel": LAYOUTS[layout]}
    outcomes = pair.run(run_steps, recipe, NUM_STEPS)
    # experts that ranks share meet the rows of all of them in one product
    expected = alone(precision, 2 if layout.startswith("ep2") else 1)
    first = outcomes[0]
    # the same quantized weights; what is rounded to four bits may turn with bfloat16's last digit
    assert first.losses[0] == pytest.approx(expected.losses[0], rel=2e-3)
    assert first.losses == pytest.approx(expected.losses, rel=5e-3)
    gradients = joined([outcome.gradients for outcome in outcomes])
    reference = joined([expected.gradients])
    assert gradients.keys() == reference.keys()
    for name, gradient in gradients.items():
        error = (gradient - reference[name]).norm() / reference[name].norm().clamp(min=1e-12)
        assert error <= bound(precision, layout), f"{name}: {error:.3f}"
