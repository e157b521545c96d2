"""A model cut over ranks: every loss and every gradient is that of one process."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from nemotron.data.batch import Batch
from nemotron.model.hybrid import HybridLM
from nemotron.model.mamba2 import Mamba2
from nemotron.model.router import Router
from nemotron.parallel import tensor
from nemotron.parallel.collectives import Group
from nemotron.parallel.shards import Shard
from nemotron.parallel.tensor import PLACEMENTS, Placement, apply_tensor
from nemotron.train.auxiliary import Auxiliary
from nemotron.train.config import LossConfig
from nemotron.train.loss import PretrainObjective, compute_sums
from tests.support.models import build, recompute, tokens
from tests.support.pool import Pool

pytestmark = pytest.mark.distributed

DIVISIBLE = {
    "vocab_size": 64,
    "mamba_num_heads": 8,
    "n_groups": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "moe_shared_expert_intermediate_size": 16,
}
"""Sizes that four ranks can share; of the two key-value heads, each has one."""


@dataclass(frozen=True)
class Case:
    """A model, and how it is trained."""

    changes: dict[str, object] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    compute: torch.dtype | None = None
    detach: bool = False
    again: bool = False

    @property
    def objective(self) -> PretrainObjective:
        # the balance loss in the order of the others
        config = LossConfig(
            mtp_loss_factor=0.7, mtp_detach_heads=self.detach, moe_aux_loss_coeff=0.5
        )
        return PretrainObjective(Auxiliary(config, num_depths=2))

    def build(self) -> HybridLM:
        model = build(dtype=self.dtype, **(DIVISIBLE | self.changes))
        model.compute_dtype = self.compute or self.dtype
        recompute(model, self.again)
        return model


@dataclass(frozen=True)
class Result:
    """Losses and the balance loss, tokens of each expert, gradients, and where these lie."""

    losses: Tensor
    aux: Tensor
    counts: list[Tensor]
    gradients: dict[str, Tensor]
    shards: dict[str, Shard] = field(default_factory=dict)
    replicated: frozenset[str] = frozenset()


def draw(rows: int = 2, length: int = 12) -> Batch:
    """Rows of documents, unequal ones with unequal weights; a third of the tokens has no label."""
    generator = torch.Generator().manual_seed(7)
    labels = tokens(rows, length, seed=1)
    labels[torch.rand(rows, length, generator=generator) < 0.3] = -100
    labels[0, length // 2 :] = -100
    begins = torch.rand(rows, length, generator=generator) < 0.2
    batch = Batch(
        tokens(rows, length),
        labels,
        begins.cumsum(1).int(),
        torch.rand(rows, length, generator=generator),
        padding=torch.arange(length) >= torch.tensor([[length], [length - 5]])[:rows],
    )
    return batch.look_ahead(2)


def train(model: HybridLM, batch: Batch, case: Case) -> tuple[Tensor, Tensor, list[Tensor]]:
    sums, routing = compute_sums(case.objective, model, batch)
    case.objective.combine(sums, case.objective.counts(batch)).backward()
    return sums[:-1].detach(), sums[-1].detach(), [stats.counts for stats in routing]


def alone(case: Case, batch: Batch) -> Result:
    model = case.build()
    found = train(model, batch, case)
    return Result(*found, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def share_routing(model: HybridLM, group: Group) -> None:
    def total(load: Tensor) -> Tensor:
        load = load.clone()
        dist.all_reduce(load, group=group)
        return load

    for module in model.modules():
        if isinstance(module, Router):
            module.sum_over_row = total


def shared(case: Case, batch: Batch) -> Result:
    """What one of the ranks finds; gradients of experts are its own tokens' alone."""
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    model = case.build()
    plan = apply_tensor(model, group, rank, size)
    share_routing(model, group)
    found = train(model, batch, case)
    parameters = dict(model.named_parameters())
    tensor.sum_partial_gradients(parameters, plan.replicated, group)
    gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    return Result(*found, gradients, plan.shards, plan.replicated)


def worst(results: list[Result], exact: Result, tolerance: float, absolute: float = 0.0) -> str:
    """Say what differs from one process by more than so much of its largest element."""
    wrong = []

    def compare(name: str, found: Tensor, expected: Tensor) -> None:
        error = (found - expected).abs().max()
        if not error <= absolute + tolerance * expected.abs().max():
            wrong.append(f"{name}: {error:.1e} of {expected.abs().max():.1e}")

    def total(name: str) -> Tensor:
        return sum(result.gradients[name] for result in results)

    compare("balance loss", sum(result.aux for result in results), exact.aux)
    for index, expected in enumerate(exact.counts):
        compare("counts", sum(result.counts[index] for result in results), expected)
    for rank, result in enumerate(results):
        compare(f"losses on rank {rank}", result.losses, exact.losses)
        assert result.gradients.keys() == exact.gradients.keys()
        for name, whole in exact.gradients.items():
            if name in result.shards:
                compare(
                    f"{name} on rank {rank}",
                    result.gradients[name],
                    result.shards[name].take(whole),
                )
            elif name in result.replicated:
                compare(f"{name} on rank {rank}", result.gradients[name], whole)
            else:
                assert ".experts." in name, name
                compare(name, total(name), whole)
    return "\n".join(wrong)


CASES = {
    "every kind of layer": Case(),
    "tied embeddings": Case({"tie_word_embeddings": True}),
    "without a latent": Case({"moe_latent_size": None}),
    "a convolution without bias": Case({"use_conv_bias": False}),
    "four key-value heads": Case({"num_key_value_heads": 4}),
    "detached heads": Case(detach=True),
    "blocks computed again": Case(again=True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_losses_and_gradients_are_those_of_one_process(pair: Pool, four: Pool, case: Case):
    batch = draw()
    exact = alone(case, batch)
    for pool in (pair, four):
        # sums in another order
        assert not worst(pool.run(shared, case, batch), exact, 1e-12)


def test_whole_rows_without_documents_or_weights(pair: Pool):
    batch = draw()
    batch = replace(batch, seq_idx=None, loss_weight=None).look_ahead(2)
    assert not worst(pair.run(shared, Case(), batch), alone(Case(), batch), 1e-12)


def test_float32_loses_only_its_own_digits(four: Pool):
    case = Case(dtype=torch.float32)
    results, exact = four.run(shared, case, draw()), alone(case, draw())
    assert not worst(results, exact, 1e-5, absolute=1e-6)
    assert torch.allclose(results[0].losses, exact.losses, rtol=1e-6, atol=0)


def test_bfloat16_loses_only_its_own_digits(four: Pool):
    case = Case(dtype=torch.float32, compute=torch.bfloat16)
    exact = alone(Case(), draw())
    for result in four.run(shared, case, draw()):
        assert torch.allclose(result.losses.double(), exact.losses, rtol=5e-3, atol=0)
        assert all(g.dtype == torch.float32 for g in result.gradients.values())


def contiguous_in_proj(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(PLACEMENTS[Mamba2], "in_proj.weight", Placement(0))


def contiguous_convolution(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(PLACEMENTS[Mamba2], "conv1d.weight", Placement(0))


def heads_dealt_out(patch: pytest.MonkeyPatch) -> None:
    right = tensor._keep_head
    patch.setattr(tensor, "_keep_head", lambda attention, _: right(attention, dist.get_rank() % 2))


def gradients_left_partial(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tensor, "sum_partial_gradients", lambda *_: None)


def shared_with_bug(bug: Callable, case: Case, batch: Batch) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        bug(patch)
        return shared(case, batch)


@pytest.mark.parametrize(
    ("bug", "seen"),
    [
        (contiguous_in_proj, "losses"),
        (contiguous_convolution, "losses"),
        (heads_dealt_out, "losses"),
        (gradients_left_partial, "norm_f.weight"),
    ],
)
def test_a_planted_bug_is_seen(four: Pool, bug: Callable, seen: str):
    batch = draw()
    # orders of magnitude over what rounding does
    assert seen in worst(four.run(shared_with_bug, bug, Case(), batch), alone(Case(), batch), 1e-3)


def filled() -> tuple[bool, Tensor]:
    """Cut on the meta device, then filled with a rank's part of the weights."""
    case, batch = Case(), draw()
    whole = case.build()
    with torch.device("meta"):
        model = HybridLM(whole.config).double()
    model.compute_dtype = torch.float64
    plan = apply_tensor(model, dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    on_meta = all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    weights = whole.state_dict()
    for name, value in model.state_dict().items():
        part = plan.shards.get(name) or Shard.whole(weights[name].shape)
        value.copy_(part.take(weights[name]))
    return on_meta, train(model, batch, case)[0]


def test_a_model_without_memory_is_cut_before_it_is_filled(pair: Pool):
    exact = alone(Case(), draw()).losses
    for on_meta, found in pair.run(filled):
        assert on_meta
        assert torch.allclose(found, exact, rtol=1e-12, atol=0)


def sharded(batch: Batch, case: Case) -> Result:
    """Two pairs of ranks, each with its own row; pairs share tensors, pair and pair the weights."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    group, rank = mesh.get_group("tp"), mesh.get_local_rank("tp")
    model = case.build()
    plan = apply_tensor(model, group, rank, 2)
    share_routing(model, group)
    units = [*model.backbone.layers, model.backbone.embeddings, model.lm_head, model]
    for unit in units:
        fully_shard(unit, mesh=mesh["fsdp"])
    register_fsdp_forward_method(model.lm_head, "loss")
    for unit in units:
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    row = mesh.get_local_rank("fsdp")
    part = batch.map(lambda values: values[row : row + 1])
    sums, routing = compute_sums(case.objective, model, part)
    case.objective.combine(sums, case.objective.counts(batch)).backward()
    parameters = dict(model.named_parameters())
    assert all(isinstance(p.grad, DTensor) for p in parameters.values())
    tensor.sum_partial_gradients(parameters, plan.replicated, group)
    gradients = {n: p.grad.full_tensor() for n, p in parameters.items()}
    return Result(
        sums[:-1].detach(),
        sums[-1].detach(),
        [s.counts for s in routing],
        gradients,
        plan.shards,
        plan.replicated,
    )


def test_cut_parameters_are_sharded_like_any_others(four: Pool):
    batch = draw()
    exact = alone(Case(), batch)
    results = four.run(sharded, batch, Case())
    # either row has a loss of its own, and the ranks of a row that of it
    total = [results[0].losses + results[2].losses, results[1].losses + results[3].losses]
    aux = sum(result.aux for result in results)
    counts = [sum(r.counts[i] for r in results) for i in range(len(exact.counts))]
    halves = [
        replace(results[tp], losses=total[tp], aux=aux / 2, counts=[c / 2 for c in counts])
        for tp in range(2)
    ]
    assert not worst(halves, exact, 1e-12)


def validated(batch: Batch, case: Case) -> tuple[Tensor, Tensor]:
    model = case.build()
    apply_tensor(model, dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    with torch.no_grad():
        hidden = model(batch.input_ids, batch.seq_idx)
        return model.lm_head.loss(hidden, batch.labels), model.logits(hidden)


def test_evaluation_finds_the_loss_and_the_logits(pair: Pool):
    batch, case = draw(), Case()
    model = case.build()
    with torch.no_grad():
        hidden = model(batch.input_ids, batch.seq_idx)
        loss, logits = model.lm_head.loss(hidden, batch.labels), model.logits(hidden)
    for found_loss, found_logits in pair.run(validated, batch, case):
        assert torch.allclose(found_loss, loss, rtol=1e-12, atol=0)
        assert (found_logits - logits).abs().max() <= 1e-12 * logits.abs().max()
