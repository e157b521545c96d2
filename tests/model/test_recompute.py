import torch

from nemotron.data.batch import Batch
from nemotron.model.router import routers
from nemotron.train.auxiliary import Auxiliary
from nemotron.train.config import LossConfig
from nemotron.train.loss import PretrainObjective, compute_sums
from tests.support.models import build, gradients, recompute, tokens


def test_computing_blocks_again_changes_no_bit_and_counts_no_token_twice():
    objective = PretrainObjective(Auxiliary(LossConfig(), num_depths=2))
    batch = Batch(tokens(2, 33), tokens(2, 33, seed=1), torch.arange(33).ge(20).int().expand(2, 33))
    batch = batch.look_ahead(2)
    results = []
    for again in (False, True):
        model = build(dtype=torch.float32)
        recompute(model, again)
        sums, routing = compute_sums(objective, model, batch)
        loss = objective.combine(sums, objective.counts(batch))
        found = gradients(model, loss)
        results.append((loss.detach(), found, [stats.counts for stats in routing]))
    (loss, grads, counts), (loss_again, grads_again, counts_again) = results
    assert torch.equal(loss, loss_again)
    assert grads.keys() == grads_again.keys()
    for name, gradient in grads.items():
        assert torch.equal(gradient, grads_again[name]), name
    for one, two in zip(counts, counts_again, strict=True):
        assert torch.equal(one, two)
        assert int(one.sum()) == 2 * 33 * 3


def test_a_block_that_is_computed_again_uses_the_experts_of_its_first_run():
    objective = PretrainObjective(Auxiliary(LossConfig(), num_depths=2))
    batch = Batch(tokens(2, 33), tokens(2, 33, seed=1), None).look_ahead(2)
    results = []
    for again in (False, True):
        model = build(dtype=torch.float32)
        recompute(model, again)
        sums, _ = compute_sums(objective, model, batch)
        for router in routers(model).values():
            # as if its scores were others the second time
            router.e_score_correction_bias += torch.arange(router.num_experts)
        results.append(gradients(model, objective.combine(sums, objective.counts(batch))))
    once, twice = results
    assert all(torch.equal(gradient, twice[name]) for name, gradient in once.items())


def test_less_is_kept_for_the_backward_pass():
    kept = []
    for again in (False, True):
        model = build(dtype=torch.float32)
        recompute(model, again)
        sizes = []

        def keep(tensor: torch.Tensor, sizes: list = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(tokens(2, 64))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 4
