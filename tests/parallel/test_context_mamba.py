"""Mamba-2 over ranks that share rows: the numbers of one process, in float64 to 12 digits."""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from test_context_chunks import numbers, worst
from torch import Tensor

from nemotron.model.config import ModelConfig
from nemotron.model.mamba2 import Mamba2, conv_and_scan
from nemotron.ops.apply import apply
from nemotron.ops.config import OpsConfig
from nemotron.parallel.context import state_passing
from nemotron.parallel.context.apply import CONV_AND_SCAN
from nemotron.parallel.context.chunks import in_row_order, shard
from nemotron.parallel.context.state_passing import StatePassing
from tests.support.pool import Pool

pytestmark = pytest.mark.distributed


@dataclass(frozen=True)
class Case:
    """A mixer and rows for it; everything else follows from the seed."""

    chunk: int
    documents: tuple[list[int], ...] | None = None
    rows: int = 2
    heads: int = 4
    groups: int = 2
    kernel: int = 4
    bias: bool = True
    dtype: torch.dtype = torch.float64
    seed: int = 0


@dataclass
class Row:
    """Inputs of the hook, before the time step's bias and softplus."""

    mixer: Mamba2
    xBC: Tensor
    raw_dt: Tensor
    seq_idx: Tensor | None
    cotangent: Tensor

    def on(self, rank: int, size: int) -> "Row":
        parts = [
            None if t is None else shard(t.detach(), rank, size)
            for t in (self.xBC, self.raw_dt, self.seq_idx, self.cotangent)
        ]
        return Row(self.mixer, parts[0].requires_grad_(), parts[1].requires_grad_(), *parts[2:])


def draw(case: Case, size: int) -> Row:
    g = torch.Generator().manual_seed(case.seed)
    config = ModelConfig(
        vocab_size=8,
        hidden_size=6,
        hybrid_override_pattern="M",
        mamba_num_heads=case.heads,
        mamba_head_dim=3,
        n_groups=case.groups,
        ssm_state_size=5,
        conv_kernel=case.kernel,
        use_conv_bias=case.bias,
    )
    mixer = Mamba2(config)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_(generator=g)
        # states live for some chunks, so that an error in passing them on is seen
        mixer.A_log.uniform_(-4, 1, generator=g)
    length = 2 * size * case.chunk
    inner = case.heads * 3
    row = Row(
        mixer.double(),
        torch.randn(case.rows, length, config.conv_channels, generator=g, dtype=torch.float64),
        torch.randn(case.rows, length, case.heads, generator=g, dtype=torch.float64) - 2,
        None if case.documents is None else numbers(*case.documents),
        torch.randn(case.rows, length, inner, generator=g, dtype=torch.float64),
    )
    if case.dtype != torch.float64:
        # time steps and weights stay float32 in a bfloat16 model
        mixer.float()
        row.xBC, row.cotangent = row.xBC.to(case.dtype), row.cotangent.to(case.dtype)
        row.raw_dt = row.raw_dt.float()
    row.xBC.requires_grad_()
    row.raw_dt.requires_grad_()
    return row


WEIGHTS = ("conv1d.weight", "conv1d.bias", "A_log", "D", "dt_bias")


def outcome(row: Row, scan: object) -> list[Tensor]:
    """Return y and the gradients of the inputs, then of the weights."""
    y = scan(row.mixer, row.xBC, row.mixer._time_step(row.raw_dt), row.seq_idx, None)
    weights = [p for n, p in row.mixer.named_parameters() if n in WEIGHTS]
    wanted = [row.xBC, row.raw_dt, *weights]
    return [y.detach(), *torch.autograd.grad(y, wanted, row.cotangent)]


def on_ranks(method: str, cases: list[Case]) -> list[list[Tensor]]:
    group = dist.group.WORLD
    rank, size = dist.get_rank(), dist.get_world_size()
    scan = CONV_AND_SCAN[method](group)
    return [outcome(draw(case, size).on(rank, size), scan) for case in cases]


def compare(pool: Pool, method: str, cases: list[Case]) -> float:
    """Return the largest relative error of any case against one process, in float64."""
    every = pool.run(on_ranks, method, cases)
    ratios = []
    for case, *ranks in zip(cases, *every, strict=True):
        tokens, weights = zip(*((rank[:3], rank[3:]) for rank in ranks), strict=True)
        found = [
            in_row_order(torch.cat(parts, dim=1), pool.world) for parts in zip(*tokens, strict=True)
        ]
        found += [sum(parts) for parts in zip(*weights, strict=True)]
        ratios.append(worst(found, outcome(in_float64(draw(case, pool.world)), conv_and_scan)))
    return max(ratios)


def in_float64(row: Row) -> Row:
    tensors = (t.detach().double() for t in (row.xBC, row.raw_dt, row.cotangent))
    xBC, raw_dt, cotangent = tensors
    return Row(
        row.mixer.double(),
        xBC.requires_grad_(),
        raw_dt.requires_grad_(),
        row.seq_idx,
        cotangent,
    )


def on_ranks_row_by_row(cases: list[Case]) -> tuple[list[int], list[list[Tensor]]]:
    """Return the rows that were gathered at each time, again in backward, and the outcomes."""
    gathered: list[int] = []
    pass_on = StatePassing._passed_on

    def counted(self: StatePassing, final: Tensor, decay: Tensor) -> Tensor:
        gathered.append(final.shape[0] // 2)
        return pass_on(self, final, decay)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state_passing, "GATHERED_BYTES", 1)
        patch.setattr(StatePassing, "_passed_on", counted)
        return gathered, on_ranks("state_passing", cases)


METHODS = pytest.mark.parametrize("method", ["state_passing", "all_to_all"])

# rows of four chunks of 6 tokens on two ranks, of eight chunks of 3 on four
DOCUMENTS = {
    "none": None,
    "one": ([24], [24]),
    "inside_chunks": ([4, 11, 9], [20, 4]),
    "at_the_edges_of_chunks": ([6, 12, 6], [3, 6, 9, 6]),
    "within_the_taps_of_an_edge": ([5, 2, 3, 4, 3, 7], [7, 4, 8, 5]),
    "shorter_than_the_taps": ([1, 2, 1, 1, 1, 3, 2, 1, 12], [1] * 24),
}


@METHODS
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_two_ranks_are_one_process(pair: Pool, method: str, documents: str):
    assert compare(pair, method, [Case(6, DOCUMENTS[documents])]) <= 1e-12


@METHODS
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_four_ranks_are_one_process(four: Pool, method: str, documents: str):
    # chunks are as short as they may be: the convolution looks back over a whole one
    assert compare(four, method, [Case(3, DOCUMENTS[documents])]) <= 1e-12


@METHODS
def test_any_sizes_and_documents_agree(four: Pool, method: str):
    cases = []
    for seed in range(12):
        g = torch.Generator().manual_seed(seed)

        def pick(*values: int, g: torch.Generator = g) -> int:
            return values[int(torch.randint(len(values), (), generator=g))]

        rows, chunk, kernel = pick(1, 2, 3), pick(3, 5, 8, 13), pick(2, 3, 4)
        heads, groups = [(4, 1), (4, 2), (4, 4), (8, 4), (8, 8)][pick(0, 1, 2, 3, 4)]
        changes = torch.rand(rows, 8 * chunk, generator=g) < pick(0, 2, 10, 50) / 100
        changes[:, 0] = True
        documents = tuple(
            torch.unique_consecutive(row.cumsum(0), return_counts=True)[1].tolist()
            for row in changes
        )
        bias = pick(0, 1) == 1
        cases.append(Case(chunk, documents, rows, heads, groups, kernel, bias, seed=seed))
    assert compare(four, method, cases) <= 1e-12


def test_states_of_some_rows_at_a_time_are_those_of_all(four: Pool):
    cases = [Case(3, None, rows=3), Case(3, ([4, 11, 9], [20, 4]))]
    at_once = four.run(on_ranks, "state_passing", cases)
    by_row = four.run(on_ranks_row_by_row, cases)
    for (gathered, ours), theirs in zip(by_row, at_once, strict=True):
        assert gathered == [1] * 2 * (3 + 2)
        for found, expected in zip(ours, theirs, strict=True):
            assert worst(found, expected) <= 1e-14


@METHODS
@pytest.mark.parametrize("documents", [None, ([700, 1348],)])
def test_a_row_of_many_chunks_of_the_scan_agrees(pair: Pool, method: str, documents):
    assert compare(pair, method, [Case(512, documents, rows=1, heads=2)]) <= 1e-12


@METHODS
@pytest.mark.parametrize("documents", [None, ([100, 300, 112], [512])])
def test_float32_stays_close_to_float64(pair: Pool, method: str, documents):
    case = Case(128, documents, dtype=torch.float32)
    # as far as the scan of one process may be off
    assert compare(pair, method, [case]) <= 1e-5


@METHODS
def test_bfloat16_inputs_cost_no_more_than_bfloat16_products(pair: Pool, method: str):
    case = Case(64, ([100, 100, 56], [256]), dtype=torch.bfloat16)
    # 2^-9 at each rounding: of the convolution, of factors and products in the scan, of y
    assert compare(pair, method, [case]) <= 2**-7


def disturbed(method: str, documents: tuple[list[int], ...], wanted: int) -> list[Tensor]:
    """Return y of one document before and after all others changed, and its input gradients."""
    rank, size = dist.get_rank(), dist.get_world_size()
    scan = CONV_AND_SCAN[method](dist.group.WORLD)
    whole = draw(Case(6, documents, rows=1), size)
    results, inside = [], whole.seq_idx == wanted
    for factor in (1.0, -1.5):
        others = torch.where(inside, 1.0, factor).unsqueeze(-1)
        row = Row(
            whole.mixer,
            (whole.xBC * others).detach(),
            (whole.raw_dt * others.abs()).detach(),
            whole.seq_idx,
            whole.cotangent * inside.unsqueeze(-1),
        ).on(rank, size)
        y, *gradients = outcome(row, scan)
        results += [y[row.seq_idx == wanted], gradients[0], gradients[1]]
    return [shard(inside, rank, size), *results]


@METHODS
@pytest.mark.parametrize(
    ("documents", "wanted"),
    # inside a chunk, from an edge to the end, over three chunks, a short one at an edge
    [([8, 3, 13], 1), ([18, 6], 1), ([4, 16, 4], 1), ([10, 2, 2, 10], 2)],
)
def test_nothing_crosses_into_another_document(
    pair: Pool, method: str, documents: list[int], wanted: int
):
    some = 0
    for inside, y, dxBC, ddt, other_y, *_ in pair.run(disturbed, method, (documents,), wanted):
        assert torch.equal(y, other_y)
        for gradient in (dxBC, ddt):
            assert not gradient[~inside].any()
            some += int(gradient[inside].count_nonzero())
    assert some > 0


def unused(method: str) -> list[Tensor]:
    """Return gradients where only the first chunk of the row counts, on whichever rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    row = draw(Case(6), size)
    row.cotangent[:, 6:] = 0
    return outcome(row.on(rank, size), CONV_AND_SCAN[method](dist.group.WORLD))


@METHODS
def test_ranks_whose_tokens_do_not_count_take_part_all_the_same(pair: Pool, method: str):
    first, second = pair.run(unused, method)
    assert first[1].any()
    assert not second[1].any()


def backends_used(method: str, case: Case) -> list[tuple[str, str]]:
    """Return operation and backend of each call, with backends given to the mixer."""
    rank, size = dist.get_rank(), dist.get_world_size()
    row, used = draw(case, size).on(rank, size), []
    apply(row.mixer, OpsConfig(ssd="reference", causal_conv1d="reference"))
    for name in ("ssd", "causal_conv1d"):
        bound = getattr(row.mixer, name)

        def spy(*arguments: object, bound: object = bound, **keywords: object) -> object:
            used.append((bound.name, bound.pinned))
            return bound(*arguments, **keywords)

        setattr(row.mixer, name, spy)
    outcome(row, CONV_AND_SCAN[method](dist.group.WORLD))
    return used


@METHODS
def test_the_backends_are_those_of_the_mixer(pair: Pool, method: str):
    for used in pair.run(backends_used, method, Case(6)):
        assert used == [("causal_conv1d", "reference"), ("ssd", "reference")]
