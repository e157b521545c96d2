"""A whole small model over ranks that share rows: every loss and gradient of one process."""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from test_context_chunks import numbers
from torch import Tensor

from nemotron.data.batch import NO_LABEL, Batch
from nemotron.model.block import Block
from nemotron.model.config import ModelConfig
from nemotron.model.hybrid import HybridLM
from nemotron.model.router import Router
from nemotron.parallel.config import ParallelConfig
from nemotron.parallel.context.apply import SumOverRow, apply_context
from nemotron.parallel.context.chunks import shard
from nemotron.train.auxiliary import Auxiliary
from nemotron.train.config import LossConfig
from nemotron.train.loss import PretrainObjective, compute_sums
from tests.support.pool import Pool

pytestmark = pytest.mark.distributed

OBJECTIVE = PretrainObjective(Auxiliary(LossConfig(), num_depths=2))


@dataclass(frozen=True)
class Case:
    method: str = "state_passing"
    pattern: str = "M*M-"
    mtp_pattern: str = "*"
    documents: tuple[list[int], ...] | None = ([11, 2, 27], [10, 30])
    recompute: bool = False


def build(case: Case) -> HybridLM:
    """Return a model whose weights are initial ones plus noise."""
    config = ModelConfig(
        vocab_size=31,
        hidden_size=12,
        hybrid_override_pattern=case.pattern,
        mamba_num_heads=4,
        mamba_head_dim=3,
        n_groups=2,
        ssm_state_size=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        intermediate_size=10,
        n_routed_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=7,
        moe_shared_expert_intermediate_size=9,
        num_nextn_predict_layers=1,
        mtp_hybrid_override_pattern=case.mtp_pattern,
    )
    model = HybridLM(config)
    model.init_weights(seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.compute_dtype = torch.float64
    for module in model.modules():
        if isinstance(module, Block):
            module.recompute = case.recompute
    return model.double()


def batch(case: Case) -> Batch:
    """Return two rows, in which one label in five does not count and the others not alike."""
    g = torch.Generator().manual_seed(2)
    tokens = torch.randint(31, (2, 41), generator=g)
    labels = tokens[:, 1:].masked_fill(torch.rand(2, 40, generator=g) < 0.2, NO_LABEL)
    seq_idx = None if case.documents is None else numbers(*case.documents)
    weights = torch.rand(2, 40, generator=g)
    padding = torch.arange(40) >= torch.tensor([[40], [33]])
    rows = Batch(tokens[:, :-1], labels, seq_idx, weights, padding=padding)
    return rows.look_ahead(OBJECTIVE.auxiliary.num_depths)


def outcome(model: HybridLM, rows: Batch) -> dict[str, Tensor]:
    """Return every sum of losses, the experts' tokens, and the gradients of the parameters."""
    sums, routing = compute_sums(OBJECTIVE, model, rows)
    sums.sum().backward()
    named = dict(zip(OBJECTIVE.names, sums, strict=True))
    named |= {f"{i} {s.name}": s.counts.double() for i, s in enumerate(routing)}
    named |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: tensor.detach() for name, tensor in named.items()}


def on_ranks(case: Case) -> dict[str, Tensor]:
    """Return what this rank adds to the sums."""
    group = dist.group.WORLD
    rank, size = dist.get_rank(), dist.get_world_size()
    model = build(case)
    apply_context(model, group, ParallelConfig(cp=size, mamba_context=case.method))
    for module in model.modules():
        if isinstance(module, Router):
            module.sum_over_row = SumOverRow(group)
    return outcome(model, batch(case).map(lambda values: shard(values, rank, size)))


def agree(pool: Pool, case: Case) -> None:
    ranks = pool.run(on_ranks, case)
    expected = outcome(build(case), batch(case))
    assert all(rank.keys() == expected.keys() for rank in ranks)
    for name, whole in expected.items():
        total = sum(rank[name] for rank in ranks)
        assert (total - whole).abs().max() <= 1e-12 * max(whole.abs().max(), 1.0), name


@pytest.mark.parametrize("method", ["state_passing", "all_to_all"])
@pytest.mark.parametrize("documents", [None, ([11, 2, 27], [10, 30])])
def test_two_ranks_are_one_process(pair: Pool, method: str, documents):
    agree(pair, Case(method, documents=documents))


@pytest.mark.parametrize("method", ["state_passing", "all_to_all"])
def test_four_ranks_are_one_process(four: Pool, method: str):
    agree(four, Case(method))


def test_experts_are_balanced_over_the_whole_row(pair: Pool):
    agree(pair, Case(pattern="ME*E", mtp_pattern="*E"))


@pytest.mark.parametrize("method", ["state_passing", "all_to_all"])
def test_activations_may_be_computed_again(pair: Pool, method: str):
    agree(pair, Case(method, pattern="ME*-", recompute=True))
