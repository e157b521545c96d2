"""Experts on several ranks give what all of them on one give, however unevenly they are chosen."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemotron.model import moe
from nemotron.model.config import ModelConfig
from nemotron.model.moe import Experts
from nemotron.model.router import Routing
from nemotron.parallel.config import ParallelConfig
from nemotron.parallel.dims import ParallelDims
from nemotron.parallel.expert import apply_experts, choose_dispatch
from tests.support.pool import Pool

METHODS = ["all_gather", "all_to_all"]


@dataclass(frozen=True)
class Case:
    """`chosen[r]` are the experts that tokens of rank r may go to; absent: all."""

    experts: int
    top_k: int
    width: int = 9
    chosen: tuple[range, ...] | None = None
    tokens: int = 11
    hidden: int = 10
    multiple: int = 1
    dtype: torch.dtype = torch.float64


CASES = {
    "pair": {
        "spread": Case(14, 3),
        "more chosen than a rank holds": Case(10, 7),
        "all to the first rank": Case(14, 3, chosen=(range(7),) * 2),
        "all to two experts of the last": Case(14, 2, chosen=(range(12, 14),) * 2),
        "all stay": Case(14, 3, chosen=(range(7), range(7, 14))),
        "all leave": Case(14, 3, chosen=(range(7, 14), range(7))),
        "padded": Case(14, 3, multiple=4),
        "nothing to pad": Case(14, 3, multiple=4, chosen=(range(7),) * 2),
        "float32": Case(14, 3, width=24, dtype=torch.float32),
        "bfloat16": Case(14, 3, width=24, dtype=torch.bfloat16, multiple=64),
    },
    "four": {
        "spread": Case(20, 4, width=5),
        "more chosen than a rank holds": Case(12, 5),
        "all to the third rank": Case(20, 4, chosen=(range(10, 15),) * 4),
        "one rank left out": Case(20, 4, chosen=(range(5, 20),) * 4),
        "each to the next": Case(
            20, 2, chosen=(range(5, 10), range(10, 15), range(15, 20), range(5))
        ),
        "one token": Case(20, 3, tokens=1),
    },
}


# only the order differs in which a token's experts, and an expert's tokens, are added up; in
# bfloat16 each rank's part is rounded on its way
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def draw(case: Case, ranks: int) -> tuple[Experts, Tensor, Tensor, Tensor, Tensor]:
    """Return all experts, and tokens, choices, weights and cotangents of all ranks."""
    generator = torch.Generator().manual_seed(5)

    wide = torch.promote_types(case.dtype, torch.float32)  # of parameters and weights

    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    experts = Experts(case.experts, case.width, case.hidden)
    with torch.no_grad():
        experts.up_proj = nn.Parameter(0.4 * normal(*experts.up_proj.shape, dtype=wide))
        experts.down_proj = nn.Parameter(0.4 * normal(*experts.down_proj.shape, dtype=wide))
    score = torch.rand(ranks, case.tokens, case.experts, generator=generator)
    for rank, chosen in enumerate(case.chosen or ()):
        score[rank, :, list(chosen)] += 1
    choices = score.flatten(0, 1).topk(case.top_k).indices
    tokens = choices.shape[0]
    weights = normal(tokens, case.top_k, dtype=wide).abs()
    return experts, normal(tokens, case.width), choices, weights, normal(tokens, case.width)


@contextmanager
def rows_padded(multiple: int) -> Iterator[None]:
    original, moe.row_multiple = moe.row_multiple, lambda _: multiple
    try:
        yield
    finally:
        moe.row_multiple = original


def run(
    experts: Experts, x: Tensor, choices: Tensor, weights: Tensor, cotangent: Tensor, case: Case
) -> list[Tensor]:
    """Return output and gradients: of tokens, of weights, of both stacks of experts."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    scores = x.new_zeros(x.shape[0], case.experts)
    counts = choices.flatten().bincount(minlength=case.experts)
    with rows_padded(case.multiple):
        y = experts(experts.dispatch(x, Routing(scores, choices, weights, counts)))
        inputs = [x, weights, experts.up_proj, experts.down_proj]
        return [y.detach(), *torch.autograd.grad(y, inputs, cotangent)]


def shared(method: str, case: Case) -> list[list[Tensor]]:
    """Do it twice."""
    rank, size = dist.get_rank(), dist.get_world_size()
    experts, *parts = draw(case, size)
    apply_experts(nn.ModuleList([experts]), dist.group.WORLD, rank, size, method)
    assert experts.up_proj.shape[0] == case.experts // size
    own = [part.chunk(size)[rank] for part in parts]
    return [run(experts, *own, case) for _ in range(2)]


@pytest.mark.distributed
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("ranks", "name"), [(ranks, name) for ranks, cases in CASES.items() for name in cases]
)
def test_shared_experts_give_what_one_process_gives(
    ranks: str, name: str, method: str, request: pytest.FixtureRequest
):
    pool, case = request.getfixturevalue(ranks), CASES[ranks][name]
    results = pool.run(shared, method, case)
    expected = run(*draw(case, pool.world), case)
    for index, whole in enumerate(expected):
        found = torch.cat([first[index] for first, _ in results])
        limit = TOLERANCE[case.dtype] * whole.abs().max()
        assert found.shape == whole.shape
        assert (found - whole).abs().max() <= limit, index
    for first, second in results:
        assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def rows_on_the_wire(case: Case) -> tuple[int, int, int]:
    """Return the token rows that leave this rank, those that it had to send, and all copies."""
    rank, size = dist.get_rank(), dist.get_world_size()
    experts, *parts = draw(case, size)
    apply_experts(nn.ModuleList([experts]), dist.group.WORLD, rank, size, "all_to_all")
    own = [part.chunk(size)[rank] for part in parts]
    sent = []
    original = dist.all_to_all_single

    def counted(result, x, received, sizes, **options):
        if x.shape[1:] == (case.width,):
            sent.append(sum(sizes) - sizes[rank])
        return original(result, x, received, sizes, **options)

    dist.all_to_all_single = counted
    try:
        run(experts, *own, case)
    finally:
        dist.all_to_all_single = original
    there, back, gradient_there, gradient_back = sent
    # what comes back is what the others sent; the gradient of what was sent does, too
    assert (there, back) == (gradient_there, gradient_back)
    holders = own[1] // (case.experts // size)
    needed = sum(len({*row} - {rank}) for row in holders.tolist())
    return there, needed, int((holders != rank).sum())


@pytest.mark.distributed
def test_a_token_is_sent_once_to_each_rank_that_needs_it(four: Pool):
    for sent, needed, copies in four.run(rows_on_the_wire, Case(20, 6, tokens=40)):
        assert sent == needed
        assert sent < 0.75 * copies


def uneven() -> str:
    rank = dist.get_rank()
    case = Case(14, 3, tokens=4 + rank)
    experts, *parts = draw(case, 1)
    apply_experts(nn.ModuleList([experts]), dist.group.WORLD, rank, 2, "all_gather")
    try:
        run(experts, *parts, case)
    except AssertionError as error:
        return str(error)
    return ""


@pytest.mark.distributed
def test_ranks_with_different_numbers_of_tokens_are_noticed(pair: Pool):
    message = "tokens of the ranks that share experts: [4, 5]"
    assert pair.run(uneven) == [message, message]


def uneven_all_to_all() -> list[Tensor]:
    rank = dist.get_rank()
    experts, *parts = draw(Case(14, 3, tokens=9), 1)
    own = [part[:4] if rank == 0 else part[4:] for part in parts]
    apply_experts(nn.ModuleList([experts]), dist.group.WORLD, rank, 2, "all_to_all")
    return run(experts, *own, Case(14, 3))


@pytest.mark.distributed
def test_all_to_all_takes_different_numbers_of_tokens(pair: Pool):
    case = Case(14, 3, tokens=9)
    results = pair.run(uneven_all_to_all)
    for index, whole in enumerate(run(*draw(case, 1), case)):
        found = torch.cat([result[index] for result in results])
        assert (found - whole).abs().max() <= 1e-12 * whole.abs().max()


def test_a_model_on_meta_keeps_the_shapes_of_its_share():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ModuleDict({"experts": Experts(6, 4, 3)})})
    kept = apply_experts(model.to("meta"), None, 2, 3, "all_to_all")
    assert kept == {"b.experts.up_proj": (4, 6), "b.experts.down_proj": (4, 6)}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name in kept}
    assert shapes == {"b.experts.up_proj": (2, 3, 4), "b.experts.down_proj": (2, 4, 3)}
    assert all(p.is_meta and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("experts", "top_k", "ep", "method"),
    [
        # the shares of tokens that a rank needs, from the table of the two published models:
        (512, 22, 8, "all_gather"),  # 0.94
        (512, 22, 64, "all_to_all"),  # 0.30
        (128, 6, 2, "all_gather"),  # 0.95
        (128, 6, 4, "all_to_all"),  # 0.79
    ],
)
def test_tokens_travel_by_what_moves_fewer(experts: int, top_k: int, ep: int, method: str):
    model = ModelConfig(
        vocab_size=8,
        hidden_size=8,
        hybrid_override_pattern="ME",
        n_routed_experts=experts,
        num_experts_per_tok=top_k,
    )
    dims = ParallelDims(dp_shard=ep, ep=ep)
    assert choose_dispatch(ParallelConfig(), model, dims) == method
    for wish in METHODS:
        assert choose_dispatch(ParallelConfig(expert_dispatch=wish), model, dims) == wish
