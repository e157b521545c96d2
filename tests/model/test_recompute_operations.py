from functools import partial

import pytest
import torch

from nemotron.data.batch import Batch
from nemotron.model.block import Block
from nemotron.model.hybrid import HybridLM
from nemotron.ops.apply import apply
from nemotron.ops.config import RECOMPUTED, OpsConfig
from nemotron.ops.recompute import saving
from nemotron.train.auxiliary import Auxiliary
from nemotron.train.config import LossConfig
from nemotron.train.loss import PretrainObjective, compute_sums
from tests.support.models import build, gradients, recompute_operations, tokens

CHEAP = ("rms_norm", "gated_rms_norm", "causal_conv1d", "squared_relu")
NUMBA = dict.fromkeys(CHEAP, "numba")


@pytest.mark.parametrize(
    ("names", "whole", "dtype", "choices"),
    [
        pytest.param(tuple(RECOMPUTED), "", torch.float32, {}, id="all"),
        pytest.param(tuple(RECOMPUTED), "", torch.bfloat16, {}, id="bf16"),
        pytest.param(tuple(RECOMPUTED), "E*", torch.float32, {}, id="beside-blocks"),
        pytest.param(tuple(RECOMPUTED), "", torch.float32, NUMBA, id="numba"),
        pytest.param(
            *(tuple(RECOMPUTED), "", torch.float32, dict.fromkeys(CHEAP, "reference")),
            id="reference",
        ),
        *(pytest.param((name,), "", torch.float32, {}, id=name) for name in RECOMPUTED),
    ],
)
def test_computing_results_of_operations_again_changes_no_bit(
    names: tuple, whole: str, dtype: torch.dtype, choices: dict
):
    objective = PretrainObjective(Auxiliary(LossConfig(), num_depths=2))
    batch = Batch(tokens(2, 33), tokens(2, 33, seed=1), torch.arange(33).ge(20).int().expand(2, 33))
    batch = batch.look_ahead(2)
    results = []
    for again in (False, True):
        model = build(dtype=torch.float32)
        model.compute_dtype = dtype
        apply(model, OpsConfig(**choices))
        for module in model.modules():
            if isinstance(module, Block):
                module.recompute = module.letter in whole
        if again:
            recompute_operations(model, names)
        sums, _ = compute_sums(objective, model, batch)
        loss = objective.combine(sums, objective.counts(batch))
        results.append({"loss": loss.detach()} | gradients(model, loss))
    once, twice = results
    assert once.keys() == twice.keys()
    for name, value in once.items():
        assert torch.equal(value, twice[name]), name


def kept_bytes(model: HybridLM) -> int:
    """Return what the blocks keep for backward, each storage once, without the parameters."""
    own = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    storages = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    for module in model.modules():
        if isinstance(module, Block):
            module.saving = partial(saving, keep)
    hidden = model(tokens(2, 64))
    kept = sum(t.untyped_storage().nbytes() for at, t in storages.items() if at not in own)
    hidden.sum().backward()
    return kept


M, COPIES = 2 * 64, 2 * 64 * 3


@pytest.mark.parametrize(
    ("name", "elements"),
    [
        # of the pattern ME*-M: five norms, two mixers, and the latent is kept for copies of it
        ("layernorm", 5 * M * 24),
        ("gated_rms_norm", 2 * M * 30),
        ("causal_conv1d", 2 * M * (30 + 2 * 3 * 7)),
        ("moe_act", COPIES * 10 + M * (14 + 20)),
        ("token_copies", COPIES * 9 - M * 9),
    ],
)
def test_the_results_are_not_kept(name: str, elements: int):
    model = build(dtype=torch.float32)
    before = kept_bytes(model)
    recompute_operations(model, [name])
    assert before - kept_bytes(model) == 4 * elements


def test_evaluation_notes_nothing():
    model = build(dtype=torch.float32)
    recompute_operations(model)
    noted = []
    model.backbone.layers[0].norm.register_forward_hook(
        lambda _, __, result: noted.append(vars(result.untyped_storage()))
    )
    with torch.no_grad():
        model(tokens(1, 9))
    assert not any(noted)
