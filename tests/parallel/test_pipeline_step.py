"""Stages on several ranks give the losses and gradients of one process."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from nemotron.data.batch import NO_LABEL, Batch
from nemotron.model.hybrid import HybridLM
from nemotron.model.router import RoutingStats
from nemotron.parallel.config import ParallelConfig
from nemotron.parallel.pipeline import Pipeline, sync_copies
from nemotron.parallel.stages import Stage, cut, shared_parameters, split_stages
from nemotron.train.auxiliary import Auxiliary
from nemotron.train.config import LossConfig
from nemotron.train.loss import PretrainObjective, compute_sums
from tests.support.cases import further, mostly_nightly
from tests.support.models import build, recompute, tokens
from tests.support.pool import Pool

pytestmark = pytest.mark.distributed

PATTERN = "MEM*EM"


@dataclass(frozen=True)
class Case:
    """What is trained, and how it is cut."""

    schedule: str = "1f1b"
    pp: int = 2
    stages: str = "auto"
    stages_per_rank: int = 1
    model: dict = field(default_factory=dict)
    detach: bool = False
    recompute: bool = False
    masked: tuple[int, ...] = ()
    """Micro-batches without a target."""
    weighted: bool = False
    compute_dtype: torch.dtype = torch.float64
    shard: bool = False
    """Whether two ranks share each stage, with other micro-batches each."""

    @property
    def objective(self) -> PretrainObjective:
        config = LossConfig(moe_aux_loss_coeff=0.3, mtp_detach_heads=self.detach)
        return PretrainObjective(Auxiliary(config, 2 if self.build().mtp is not None else 0))

    @property
    def depths(self) -> int:
        return self.objective.auxiliary.num_depths

    def build(self) -> HybridLM:
        narrow = self.compute_dtype != torch.float64
        dtype = torch.float32 if narrow else torch.float64
        changes = {"hybrid_override_pattern": PATTERN} | self.model
        model = build(dtype=dtype, **changes)
        model.compute_dtype = self.compute_dtype
        recompute(model, self.recompute)
        return model

    def batches(self, rank: int = 0, count: int = 4, length: int = 13) -> list[Batch]:
        return [self._batch(10 * rank + number, length) for number in range(count)]

    def _batch(self, number: int, length: int) -> Batch:
        generator = torch.Generator().manual_seed(number)
        ids = tokens(2, length + 1, seed=number)
        chosen = torch.rand(2, length, generator=generator)
        labels = ids[:, 1:].masked_fill(chosen < 0.15 * (number % 4 + 1), NO_LABEL)
        if number in self.masked:
            labels = torch.full_like(labels, NO_LABEL)
        starts = torch.rand(2, length, generator=generator) < 0.2
        weight = torch.rand(2, length, generator=generator) if self.weighted else None
        batch = Batch(ids[:, :-1], labels, starts.cumsum(1).int(), weight)
        return batch.look_ahead(self.depths)


def total(case: Case, batches: list[Batch]) -> Tensor:
    return torch.stack([case.objective.counts(batch) for batch in batches]).sum(0)


def one_process(case: Case, batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
    model, counts, loss = case.build(), total(case, batches), 0.0
    for batch in batches:
        sums, _ = compute_sums(case.objective, model, batch)
        share = case.objective.combine(sums, counts)
        share.backward()
        loss += share.item()
    return loss, {name: p.grad for name, p in model.named_parameters()}


class Trainer:
    """The shares as a trainer computes them; remembers their sum over stages and batches."""

    def __init__(self, case: Case, batches: list[Batch]) -> None:
        self.objective, self.counts = case.objective, total(case, batches)
        self.loss = 0.0

    def __call__(
        self, model: HybridLM, hidden: Tensor | None, batch: Batch, routing: list[RoutingStats]
    ) -> Tensor:
        sums = self.objective.sums(model, hidden, batch, routing)
        share = self.objective.combine(sums, self.counts)
        self.loss += share.item()
        return share


def build_pipeline(case: Case) -> tuple[Pipeline, list[str]]:
    """Return this rank's stages, and the parameters of which it has a copy only."""
    shape = case.pp, 2 if case.shard else 1
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("pp", "fsdp"))
    config = ParallelConfig.model_validate(
        {
            "pp": case.pp,
            "pipeline": {
                "schedule": case.schedule,
                "stages": case.stages,
                "stages_per_rank": case.stages_per_rank,
            },
        }
    )
    num_stages = case.pp * case.stages_per_rank
    stages, copies = list[Stage](), list[str]()
    for index in range(mesh.get_local_rank("pp"), num_stages, case.pp):
        model = case.build()
        layers = split_stages(model.config, config, num_stages, 13, case.depths)[index]
        copies += cut(model, layers, is_first=index == 0, is_last=index == num_stages - 1)
        stages.append(Stage(model, index, num_stages))
    for stage in stages if case.shard else ():
        blocks = [*stage.model.backbone.layers.children(), stage.model.mtp]
        for module in filter(None, [*blocks, stage]):
            fully_shard(module, mesh=mesh["fsdp"], reshard_after_forward=False)
        for module in stage.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
    group = mesh["pp"].get_group()
    return Pipeline(stages, group, config.pipeline, torch.device("cpu")), copies


def named(pipeline: Pipeline) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for stage in pipeline.stages:
        yield from stage.model.named_parameters()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(case: Case, pipeline: Pipeline) -> dict[str, Tensor]:
    """Return the gradients of this rank, those of shared parameters added up."""
    shared = shared_parameters(pipeline.stages[0].model.config)
    ends = pipeline.group if case.pp == 2 else dist.new_group([0, case.pp - 1])
    for name, parameter in named(pipeline):
        if name in shared:
            sync_copies(parameter, ends)
    return {name: whole(parameter.grad) for name, parameter in named(pipeline)}


@dataclass
class Result:
    loss: float
    returned: list[float]
    gradients: dict[str, Tensor]
    copies: list[str]


def pipelined(case: Case, lengths: tuple[int, ...] = (13,)) -> Result:
    pipeline, copies = build_pipeline(case)
    rank = dist.get_rank() % 2 if case.shard else 0
    loss, returned = 0.0, list[float]()
    for length in lengths:
        own = case.batches(rank, count=17 - length, length=length)
        every = own + (case.batches(1 - rank, 17 - length, length) if case.shard else [])
        trainer = Trainer(case, every)
        returned += [share.item() for share in pipeline.step(own, trainer)]
        loss += trainer.loss
    return Result(loss, returned, gradients(case, pipeline), copies)


def check(results: list[Result], expected: tuple[float, dict[str, Tensor]], tolerance: float):
    loss, reference = expected
    # sums of float64 over the same numbers, in another order at most
    assert sum(result.loss for result in results) == pytest.approx(loss, rel=tolerance)
    assert set().union(*(result.gradients for result in results)) == set(reference)
    for result in results:
        for name, gradient in result.gradients.items():
            scale = reference[name].abs().max().clamp(min=1e-30)
            assert (gradient - reference[name]).abs().max() / scale <= tolerance, name


EXPLICIT = "M|EM*EM"
UNPREDICTED = {"num_nextn_predict_layers": 0, "mtp_hybrid_override_pattern": None}
CASES = {
    "1f1b": Case(),
    "gpipe": Case("gpipe"),
    "interleaved": Case("interleaved_1f1b", stages_per_rank=2),
    "unequal stages": Case(stages=EXPLICIT),
    "dense stage": Case("interleaved_1f1b", stages="M|EM|*|EM", stages_per_rank=2),
    "weights": Case(weighted=True),
    "recompute": Case(recompute=True),
    "detached heads": Case(detach=True),
    "tied": Case(model={"tie_word_embeddings": True}),
    "tied, no prediction": Case(model={"tie_word_embeddings": True} | UNPREDICTED),
    "no prediction": Case(model=UNPREDICTED),
}


@pytest.mark.parametrize(
    "name",
    mostly_nightly(CASES, "1f1b", "dense stage", "weights", "recompute", "tied", "detached heads"),
)
def test_losses_and_gradients_are_those_of_one_process(pair: Pool, name: str):
    case = CASES[name]
    check(pair.run(pipelined, case), one_process(case, case.batches()), 1e-12)


def test_middle_stages_take_no_part_in_the_sum_of_copies(four: Pool):
    case = Case(pp=4)
    results = four.run(pipelined, case)
    assert [len(result.copies) for result in results] == [0, 0, 0, 1]
    check(results, one_process(case, case.batches()), 1e-12)


def test_hidden_states_travel_in_the_compute_dtype(pair: Pool):
    case = Case(compute_dtype=torch.bfloat16)
    results = pair.run(pipelined, case)
    # the same bfloat16 numbers meet the same weights; sums over shares and copies are float32
    check(results, one_process(case, case.batches()), 1e-6)


@pytest.mark.parametrize("masked", [pytest.param((0,), marks=pytest.mark.nightly), (2,), (0, 1, 3)])
def test_a_micro_batch_may_lack_any_target(pair: Pool, masked: tuple[int, ...]):
    case = Case(masked=masked)
    check(pair.run(pipelined, case), one_process(case, case.batches()), 1e-12)


@pytest.mark.parametrize("name", [further("1f1b"), "interleaved"])
def test_rows_may_become_longer_and_micro_batches_fewer(pair: Pool, name: str):
    case = CASES[name]
    results = pair.run(pipelined, case, (11, 13, 11))
    loss, reference = 0.0, dict[str, Tensor]()
    for length, count in [(11, 6), (13, 4), (11, 6)]:
        more, gradients = one_process(case, case.batches(0, count, length))
        loss += more
        reference = {n: g + reference.get(n, 0.0) for n, g in gradients.items()}
    check(results, (loss, reference), 1e-12)


def test_only_the_last_stage_returns_its_shares(pair: Pool):
    case = CASES["dense stage"]
    first, last = pair.run(pipelined, case)
    assert first.returned == []
    assert len(last.returned) == 4
    # the other stage of its rank has balance loss only
    assert sum(last.returned) < last.loss
    assert first.loss + last.loss == pytest.approx(one_process(case, case.batches())[0], rel=1e-12)


def test_the_last_stage_names_what_the_first_holds_too(pair: Pool):
    assert [result.copies for result in pair.run(pipelined, Case())] == [
        [],
        ["backbone.embeddings.weight"],
    ]
    assert [r.copies for r in pair.run(pipelined, CASES["no prediction"])] == [[], []]


SHARDED = {
    "1f1b": Case(shard=True),
    "interleaved": Case("interleaved_1f1b", stages_per_rank=2, shard=True),
    "recompute": Case(shard=True, recompute=True),
    "no target on one rank": Case(shard=True, masked=(0, 1, 2, 3)),
    "detached, tied": Case(shard=True, detach=True, model={"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("name", mostly_nightly(SHARDED, "interleaved"))
def test_stages_may_be_sharded(four: Pool, name: str):
    case = SHARDED[name]
    results = four.run(pipelined, case, (13, 13))
    every = [*case.batches(0), *case.batches(1)]
    loss, reference = one_process(case, every)
    expected = 2 * loss, {name: 2 * gradient for name, gradient in reference.items()}
    check(results, expected, 1e-12)


def main_loss(
    model: HybridLM, hidden: Tensor | None, batch: Batch, routing: list[RoutingStats]
) -> Tensor:
    if hidden is None:
        return torch.zeros(())
    return model.lm_head.loss(hidden, batch.labels, batch.loss_weight)


def evaluated(case: Case) -> list[float]:
    """Evaluate, train, change the weights, evaluate again."""
    pipeline, _ = build_pipeline(case)
    batches = case.batches()
    found = pipeline.evaluate(batches[:1], main_loss)
    pipeline.step(batches, Trainer(case, batches))
    assert all(parameter.grad is not None for _, parameter in named(pipeline))
    with torch.no_grad():
        for _, parameter in named(pipeline):
            parameter.mul_(1.25)
    found += pipeline.evaluate(batches[:3], main_loss)
    assert not any(share.requires_grad for share in found)
    return [share.item() for share in found]


@pytest.mark.parametrize(
    ("name", "shard"),
    [
        ("1f1b", False),
        further(("1f1b", True)),
        further(("interleaved", False)),
        ("interleaved", True),
    ],
)
def test_evaluation_sees_the_weights_of_the_moment(pair: Pool, four: Pool, name: str, shard: bool):
    case = replace(CASES[name], shard=shard)
    results = (four if shard else pair).run(evaluated, case)
    model, batches = case.build(), case.batches()
    with torch.no_grad():
        expected = [compute_sums(case.objective, model, batches[0])[0][0].item()]
        for parameter in model.parameters():
            parameter.mul_(1.25)
        expected += [
            compute_sums(case.objective, model, batch)[0][0].item() for batch in batches[:3]
        ]
    for rank, found in enumerate(results):
        is_last = rank >= len(results) // 2
        assert found == pytest.approx(expected if is_last else [], rel=1e-12)
