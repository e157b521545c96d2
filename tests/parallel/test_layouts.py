"""The same recipe in every layout: losses, gradients, load, validation, twenty steps of AdamW."""

from typing import Any

import pytest
import torch

from tests.support.cases import further, mostly_nightly
from tests.support.layout_model import MODEL
from tests.support.layout_run import Outcome, joined, run_steps
from tests.support.pool import Pool

pytestmark = pytest.mark.distributed

NUM_STEPS = 20
FEWER_STEPS = 3
"""Of most layouts: that errors do not grow in twenty steps is shown once for each axis."""

ON_TWO: dict[str, dict[str, Any]] = {
    "fsdp2": {},
    "tp2": {"tp": 2},
    "ep2_all_to_all": {"ep": 2, "expert_dispatch": "all_to_all"},
    "cp2_state_passing": {"cp": 2},
    "pp2": {"pp": 2},
}
OTHERS_ON_TWO: dict[str, dict[str, Any]] = {
    "hsdp2": {"dp_replicate": 2},
    "ep2_all_gather": {"ep": 2, "expert_dispatch": "all_gather"},
    "cp2_all_to_all": {"cp": 2, "mamba_context": "all_to_all"},
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
def alone(values: dict[str, Any]) -> Outcome:
    """One process, no process group."""
    torch.set_num_threads(1)
    return run_steps(values, NUM_STEPS)


@pytest.fixture(scope="session")
def alone_for_less(values: dict[str, Any]) -> Outcome:
    """The same for fewer steps."""
    torch.set_num_threads(1)
    return run_steps(values, FEWER_STEPS)


def laid_out(values: dict[str, Any], layout: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe in a layout; stages and sums without exchange need micro-batches."""
    one_row = "pp" in layout or not layout.get("sync_every_micro_batch", True)
    batch = values["batch"] | {"micro_batch": 1 if one_row else 2}
    return values | {"parallel": layout, "batch": batch}


def check(
    outcomes: list[Outcome], alone: Outcome, *, loss: float = 1e-6, drift: float = 1e-4
) -> None:
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
    assert first.losses == pytest.approx(alone.losses, rel=drift)
    for name, value in alone.validation.items():
        assert first.validation[name] == pytest.approx(value, rel=drift), name
    assert joined([o.weights for o in outcomes]).keys() == expected.keys()


@pytest.mark.parametrize("layout", mostly_nightly(ON_TWO, "fsdp2"))
def test_two_ranks_train_as_one(pair: Pool, values: dict, alone: Outcome, layout: str):
    check(pair.run(run_steps, laid_out(values, ON_TWO[layout]), NUM_STEPS), alone)


SOON_ON_TWO = {name: layout for name, layout in ON_TWO.items() if layout} | OTHERS_ON_TWO
OFTEN = ("tp2", "ep2_all_to_all", "cp2_state_passing", "pp2")
OFTEN += ("hsdp2", "pp2_interleaved", "cp2_all_to_all")


@pytest.mark.parametrize("layout", mostly_nightly(SOON_ON_TWO, *OFTEN))
def test_two_ranks_begin_as_one(pair: Pool, values: dict, alone_for_less: Outcome, layout: str):
    outcomes = pair.run(run_steps, laid_out(values, SOON_ON_TWO[layout]), FEWER_STEPS)
    check(outcomes, alone_for_less, drift=1e-5)


@pytest.mark.parametrize(
    "layout", mostly_nightly(ON_FOUR, "hsdp2x2", "ep4_tp2", "cp2_ep2_fsdp2", "pp2_cp2")
)
def test_four_ranks_train_as_one(four: Pool, values: dict, alone_for_less: Outcome, layout: str):
    outcomes = four.run(run_steps, laid_out(values, ON_FOUR[layout]), FEWER_STEPS)
    check(outcomes, alone_for_less, drift=1e-5)


VARIANTS: dict[str, dict[str, Any]] = {
    "recomputed": {"recompute": "block"},
    "mixture recomputed": {"recompute": ["moe"]},
    "cheap recomputed": {"recompute": ["selective"]},
    "tied": {"model": MODEL | {"tie_word_embeddings": True}},
    "detached heads": {"loss": {"mtp_detach_heads": True}},
    "bfloat16": {"precision": {"compute": "bf16"}},
}
IN_LAYOUTS: list[tuple[str, int, dict[str, Any]]] = [
    ("recomputed", 2, {"sync_every_micro_batch": False}),
    ("recomputed", 4, {"ep": 2}),
    ("mixture recomputed", 4, {"ep": 2, "expert_dispatch": "all_to_all", "tp": 2}),
    ("recomputed", 4, {"cp": 2}),
    ("recomputed", 2, {"pp": 2}),
    ("cheap recomputed", 4, {"ep": 2, "expert_dispatch": "all_to_all", "tp": 2}),
    ("cheap recomputed", 4, {"cp": 2}),
    ("cheap recomputed", 2, {"pp": 2}),
    ("tied", 2, {}),
    ("tied", 2, {"tp": 2}),
    ("tied", 2, {"pp": 2}),
    ("detached heads", 2, {"pp": 2}),
    ("detached heads", 2, {"reshard_after_forward": False}),
    ("bfloat16", 2, {}),
    ("bfloat16", 4, {"ep": 2, "cp": 2}),
    ("bfloat16", 4, {"pp": 2, "tp": 2}),
]


@pytest.mark.parametrize(
    ("layout", "compute"),
    mostly_nightly(
        [
            ({}, "bf16"),
            ({"ep": 2, "expert_dispatch": "all_to_all"}, "fp32"),
            ({"ep": 2, "expert_dispatch": "all_gather"}, "bf16"),
            ({"tp": 2}, "bf16"),
            ({"cp": 2}, "fp32"),
            ({"pp": 2}, "bf16"),
        ],
        ({}, "bf16"),
        ({"ep": 2, "expert_dispatch": "all_to_all"}, "fp32"),
    ),
)
@pytest.mark.parametrize("recompute", [["selective"], further(["attention", "selective"])])
def test_recomputed_operations_change_no_bit(
    pair: Pool, values: dict[str, Any], layout: dict, compute: str, recompute: list[str]
):
    base = laid_out(values | {"precision": {"compute": compute}}, layout)
    kept = pair.run(run_steps, base, 2)
    again = pair.run(run_steps, base | {"recompute": recompute}, 2)
    for one, two in zip(kept, again, strict=True):
        assert one.losses == two.losses
        assert one.grad_norms == two.grad_norms
    expected = joined([outcome.gradients for outcome in kept])
    for name, gradient in joined([outcome.gradients for outcome in again]).items():
        assert torch.equal(gradient, expected[name]), name


@pytest.fixture(scope="session")
def variants(values: dict[str, Any]) -> dict[str, Outcome]:
    """Each variant on one process, for three steps."""
    torch.set_num_threads(1)
    return {name: run_steps(values | changes, 3) for name, changes in VARIANTS.items()}


@pytest.mark.parametrize(
    ("variant", "world", "layout"),
    mostly_nightly(IN_LAYOUTS, *(IN_LAYOUTS[i] for i in (0, 2, 5, 9, 11, 14))),
)
def test_variants_of_the_recipe_train_alike(
    pair: Pool,
    four: Pool,
    values: dict,
    variants: dict[str, Outcome],
    variant: str,
    world: int,
    layout: dict,
):
    alone, changed = variants[variant], laid_out(values | VARIANTS[variant], layout)
    outcomes = {2: pair, 4: four}[world].run(run_steps, changed, 3)
    if variant != "bfloat16":
        check(outcomes, alone)
        return
    for outcome in outcomes:
        # bfloat16 has three digits, and ranks round partial sums of activations
        assert outcome.losses == pytest.approx(alone.losses, rel=5e-3)
        assert outcome.grad_norms == pytest.approx(alone.grad_norms, rel=2e-2)
