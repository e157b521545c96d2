"""A whole model with its experts on two ranks, which read different rows."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from nemotron.data.batch import NO_LABEL, Batch
from nemotron.model.block import Block
from nemotron.model.config import ModelConfig
from nemotron.model.hybrid import HybridLM
from nemotron.model.router import Router
from nemotron.parallel.expert import apply_experts
from nemotron.train.auxiliary import Auxiliary
from nemotron.train.config import LossConfig
from nemotron.train.loss import PretrainObjective, compute_sums
from tests.support.pool import Pool

pytestmark = pytest.mark.distributed

MODEL = ModelConfig(
    vocab_size=61,
    hidden_size=24,
    hybrid_override_pattern="ME*E",
    mamba_num_heads=6,
    mamba_head_dim=5,
    n_groups=3,
    ssm_state_size=7,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    n_routed_experts=10,
    num_experts_per_tok=3,
    moe_intermediate_size=11,
    moe_shared_expert_intermediate_size=14,
    moe_latent_size=9,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=1,
    mtp_hybrid_override_pattern="*E",
)
WIDE = MODEL.model_copy(update={"moe_latent_size": None})
OBJECTIVE = PretrainObjective(Auxiliary(LossConfig(moe_aux_loss_coeff=0.1), num_depths=2))
ROWS, LENGTH = 4, 33

each = pytest.mark.parametrize(
    ("config", "skewed", "method"),
    [
        pytest.param(config, skewed, method, id=f"{method}, {name}")
        for method in ("all_gather", "all_to_all")
        for name, config, skewed in (
            ("latent", MODEL, False),
            ("full width", WIDE, False),
            ("one rank has no token", WIDE, True),
        )
    ],
)

Result = tuple[Tensor, dict[str, Tensor], list[Tensor]]


def build(config: ModelConfig, skewed: bool) -> HybridLM:
    """Return a model that may send every token to experts of the first rank."""
    model = HybridLM(config)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor += 0.2 * torch.randn(tensor.shape, generator=generator)
        for module in model.modules():
            if skewed and isinstance(module, Router):
                module.e_score_correction_bias[:5] += 9
    model.compute_dtype = torch.float64
    return model.double()


def read() -> Batch:
    """Return the rows of all ranks; those of the second have fewer targets."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(MODEL.vocab_size, (ROWS, LENGTH + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[2:, 5:20] = NO_LABEL
    seq_idx = torch.arange(LENGTH).ge(20).int().expand(ROWS, -1)
    return Batch(ids[:, :-1], labels, seq_idx).look_ahead(2)


def run(model: HybridLM, batch: Batch, *, recompute: bool) -> Result:
    """Return the share of the loss, gradients, and tokens per expert of every call of a layer."""
    for module in model.modules():
        if isinstance(module, Block):
            module.recompute = recompute
    model.zero_grad()
    sums, routing = compute_sums(OBJECTIVE, model, batch)
    loss = OBJECTIVE.combine(sums, OBJECTIVE.counts(read()))
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, [stats.counts for stats in routing]


def shared(
    config: ModelConfig, skewed: bool, method: str
) -> tuple[dict[str, tuple[int, int]], list[Result]]:
    """Run plainly, and twice with every block computed again."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model = build(config, skewed)
    kept = apply_experts(model, dist.group.WORLD, rank, size, method)
    batch = read().map(lambda tensor: tensor.chunk(size)[rank])
    return kept, [run(model, batch, recompute=again) for again in (False, True, True)]


@each
def test_two_ranks_train_as_one_does(pair: Pool, config: ModelConfig, skewed: bool, method: str):
    loss, gradients, counts = run(build(config, skewed), read(), recompute=False)
    results = pair.run(shared, config, skewed, method)
    layers = ("backbone.layers.1", "backbone.layers.3", "mtp.layers.1")
    stacks = {
        f"{layer}.mixer.experts.{leaf}" for layer in layers for leaf in ("up_proj", "down_proj")
    }
    firsts = [plain for _, (plain, *_) in results]
    found = sum(share for share, _, _ in firsts)
    assert (found - loss).abs() <= 1e-12 * loss.abs()
    assert all(first[1].keys() == gradients.keys() for first in firsts)
    for rank, (kept, _) in enumerate(results):
        assert kept == dict.fromkeys(stacks, (5 * rank, 5 * rank + 5))
    for name, whole in gradients.items():
        parts = [first[1][name] for first in firsts]
        gradient = torch.cat(parts) if name in stacks else sum(parts)
        assert (gradient - whole).abs().max() <= 1e-12 * whole.abs().max(), name
    for index, whole in enumerate(counts):
        assert torch.equal(sum(first[2][index] for first in firsts), whole)


@each
def test_computing_blocks_again_changes_no_bit(
    pair: Pool, config: ModelConfig, skewed: bool, method: str
):
    for _, (plain, again, once_more) in pair.run(shared, config, skewed, method):
        for other in (again, once_more):
            assert torch.equal(plain[0], other[0])
            assert all(torch.equal(gradient, other[1][n]) for n, gradient in plain[1].items())
            assert all(torch.equal(*pair) for pair in zip(plain[2], other[2], strict=True))
        # two layers, and one of the prediction block at two depths
        assert [int(counts.sum()) for counts in plain[2]] == [2 * LENGTH * 3] * 4
