"""The same recipe in every layout: losses, gradients, load, validation, twenty steps of AdamW."""

import random
from typing import Any

import pytest
import torch
from layout_run import Outcome, joined, run_steps
from pool import Pool
from prepared import write_prepared

pytestmark = pytest.mark.distributed

NUM_STEPS = 20

MODEL = {
    "vocab_size": 4096,
    "hidden_size": 24,
    "hybrid_override_pattern": "ME*E",
    "mamba_num_heads": 8,
    "mamba_head_dim": 6,
    "n_groups": 4,
    "ssm_state_size": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 28,
    "moe_latent_size": 12,
    "num_nextn_predict_layers": 1,
    "mtp_hybrid_override_pattern": "*E",
}

ON_TWO: dict[str, dict[str, Any]] = {
    "fsdp2": {},
    "hsdp2": {"dp_replicate": 2},
    "tp2": {"tp": 2},
    "ep2_all_gather": {"ep": 2, "expert_dispatch": "all_gather"},
    "ep2_all_to_all": {"ep": 2, "expert_dispatch": "all_to_all"},
    "cp2_state_passing": {"cp": 2},
    "cp2_all_to_all": {"cp": 2, "mamba_context": "all_to_all"},
    "pp2": {"pp": 2},
    "pp2_explicit": {"pp": 2, "pipeline": {"stages": "ME*|E"}},
    "pp2_interleaved": {
        "pp": 2,
        "pipeline": {"schedule": "interleaved_1f1b", "stages_per_rank": 2},
    },
    "tp2_ep2": {"tp": 2, "ep": 2},
    "cp2_ep2": {"cp": 2, "ep": 2},
}
ON_FOUR: dict[str, dict[str, Any]] = {
    "fsdp4": {},
    "hsdp2x2": {"dp_replicate": 2},
    "tp4": {"tp": 4},
    "tp2_fsdp2": {"tp": 2},
    "ep4": {"ep": 4},
    "ep2_fsdp2": {"ep": 2},
    "ep2_tp2": {"tp": 2, "ep": 2},
    "ep4_tp2": {"tp": 2, "ep": 4},
    "cp4": {"cp": 4},
    "cp2_fsdp2": {"cp": 2},
    "cp2_ep2_fsdp2": {"cp": 2, "ep": 2},
    "cp2_tp2": {"cp": 2, "tp": 2},
    "pp2_fsdp2": {"pp": 2},
    "pp2_ep2": {"pp": 2, "ep": 2},
    "pp2_tp2": {"pp": 2, "tp": 2},
    "pp2_cp2": {"pp": 2, "cp": 2},
}


@pytest.fixture(scope="session")
def values(tmp_path_factory) -> dict[str, Any]:
    folder, draw = tmp_path_factory.mktemp("layouts"), random.Random(5)
    words = ["the", "river", "runs", "to", "sea", "and", "stone", "stays", "0", "1", "if", "else"]
    texts = [" ".join(draw.choices(words, k=draw.randint(5, 60))) for _ in range(300)]
    prose = write_prepared(texts, folder / "prose", validation_fraction=0.1)
    return {
        "name": "layout",
        "output": str(folder / "runs"),
        "device": "cpu",
        "model": MODEL,
        "data": {
            "sources": [{"name": "prose", "path": str(prose)}],
            "cache": str(folder / "cache"),
            "seq_len": 64,
            "reset_documents": True,
            "mask_eod_loss": True,
            "prefetch_steps": 0,
        },
        "batch": {"global_tokens": 64 * 4, "micro_batch": 1},
        "optimizer": {"clip": None},
        "schedule": {"peak": 1e-3, "total_steps": 30, "warmup_steps": 5, "decay_steps": 5},
        "loss": {"moe_aux_loss_coeff": 1e-2},
        "evaluation": {"tokens": 64 * 5},
    }


@pytest.fixture(scope="session")
def alone(values: dict[str, Any]) -> Outcome:
    """One process, no process group."""
    torch.set_num_threads(1)
    return run_steps(values, NUM_STEPS)


def check(outcomes: list[Outcome], alone: Outcome, *, loss: float = 1e-6) -> None:
    for outcome in outcomes[1:]:
        # every rank knows the same of the step, bit by bit
        assert outcome.losses == outcomes[0].losses
        assert outcome.grad_norms == outcomes[0].grad_norms
        assert outcome.loads == outcomes[0].loads
        assert outcome.validation == outcomes[0].validation
    first = outcomes[0]
    assert first.losses[0] == pytest.approx(alone.losses[0], rel=loss)
    for name, value in alone.terms[0].items():
        assert first.terms[0][name] == pytest.approx(value, rel=loss), name
    assert first.loads[0] == alone.loads[0]
    assert first.grad_norms[0] == pytest.approx(alone.grad_norms[0], rel=1e-5)
    gradients, expected = joined([o.gradients for o in outcomes]), joined([alone.gradients])
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        # float32 sums in another order
        bound = 1e-6 + 1e-5 * expected[name].abs().max()
        assert (gradient - expected[name]).abs().max() <= bound, name
    # AdamW divides by the root of tiny second moments: rounding grows from step to step
    assert first.losses == pytest.approx(alone.losses, rel=1e-4)
    for name, value in alone.validation.items():
        assert first.validation[name] == pytest.approx(value, rel=1e-4), name
    assert joined([o.weights for o in outcomes]).keys() == expected.keys()


@pytest.mark.parametrize("layout", ON_TWO)
def test_two_ranks_train_as_one(pair: Pool, values: dict, alone: Outcome, layout: str):
    check(pair.run(run_steps, values | {"parallel": ON_TWO[layout]}, NUM_STEPS), alone)


@pytest.mark.parametrize("layout", ON_FOUR)
def test_four_ranks_train_as_one(four: Pool, values: dict, alone: Outcome, layout: str):
    check(four.run(run_steps, values | {"parallel": ON_FOUR[layout]}, NUM_STEPS), alone)
