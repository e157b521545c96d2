"""What is timed: each tunable launch inside its operation, at the sizes of one layer of a model.

Inputs on the device `meta` have no values: their launches can only be compiled.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nemotron.ops.adamw import Settings
from nemotron.ops.adamw import triton as adamw
from nemotron.ops.causal_conv1d import triton as causal_conv1d
from nemotron.ops.expert_step import triton as expert_step
from nemotron.ops.grouped_linear import tiles
from nemotron.ops.grouped_linear import triton_kernels as grouped_linear
from nemotron.ops.linear_cross_entropy import triton as linear_cross_entropy
from nemotron.ops.rms_norm import gated_triton as gated_rms_norm
from nemotron.ops.rms_norm import triton as rms_norm
from nemotron.ops.routing import copies_triton as token_copies
from nemotron.ops.squared_relu import triton as squared_relu
from nemotron.ops.ssd import triton as ssd
from nemotron.ops.tuning.tunable import Tunable
from nemotron.precision.formats import E4M3, E5M2
from nemotron.precision.kernels import grouped_fp8, quantize_fp8
from nemotron.sol.sizes import SIZES, Rows, Size

BF16, FP32 = torch.bfloat16, torch.float32
STEP_ROWS = 8
"""Texts that a step of generation continues."""


def sizes_of(shapes: str) -> Size:
    """Return the sizes of a model by its name, or those of a recipe's file.

    Raises:
        UserError: when the recipe has a mistake or is not there.
    """
    if shapes in SIZES:
        return SIZES[shapes]
    from nemotron.recipe.load import load_recipe

    config = load_recipe(Path(shapes), []).config
    model, rows = config.model, Rows(config.batch.micro_batch, config.data.seq_len)
    return Size(
        name=shapes,
        hidden=model.hidden_size,
        heads=model.mamba_num_heads,
        head_dim=model.mamba_head_dim,
        groups=model.n_groups,
        state=model.ssm_state_size,
        query_heads=model.num_attention_heads,
        key_heads=model.num_key_value_heads,
        attention_dim=model.head_dim,
        experts=max(1, model.n_routed_experts // config.parallel.ep),
        all_experts=model.n_routed_experts,
        copies=model.num_experts_per_tok,
        expert_input=model.expert_input_size,
        expert_width=model.moe_intermediate_size,
        shared_width=model.moe_shared_expert_intermediate_size,
        vocab=model.vocab_size,
        usual=rows,
        checked=rows,
    )


class Draw:
    """Draws inputs on a device; on `meta` they have shapes only."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self._generator = None
        if device.type != "meta":
            self._generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
        """Return normal numbers."""
        if self._generator is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        drawn = torch.empty(shape, dtype=dtype, device=self.device)
        return drawn.normal_(0, scale, generator=self._generator)

    def uniform(self, *shape: int) -> Tensor:
        """Return float32 numbers in [0, 1)."""
        drawn = torch.empty(shape, device=self.device)
        return drawn if self._generator is None else drawn.uniform_(generator=self._generator)

    def below(self, size: int, count: int) -> Tensor:
        """Return whole numbers from 0 below `size`."""
        drawn = torch.empty(count, dtype=torch.int64, device=self.device)
        return drawn if self._generator is None else drawn.random_(size, generator=self._generator)


Run = Callable[[], Sequence[Tensor]]
"""Runs the operation, forward and backward, and returns its results and gradients."""


@dataclass(frozen=True)
class Problem:
    """An operation with its inputs, in which some tunable launches take part."""

    name: str
    tunables: tuple[Tunable, ...]
    draw: Callable[[Size, Draw], Run]
    flops: Callable[[Size], float] = lambda sizes: 0.0
    """Of each launch, where products are what binds it."""
    fp8: bool = False
    """Whether those are products of FP8."""
    tensor_passes: int = 1
    """How often the kernel must move the largest of its tensors: twice where it writes in place."""


def _run(function: Callable[..., object], inputs: Sequence[Tensor | None], *rest: object) -> Run:
    """Return what calls a function and its backward, always with the same gradient."""
    leaves = [
        t.detach().requires_grad_() if t is not None and t.is_floating_point() else t
        for t in inputs
    ]
    gradients: list[Tensor] = []

    def run() -> list[Tensor]:
        result = function(*leaves, *rest)
        found = result if isinstance(result, tuple) else (result,)
        outputs = [t for t in found if isinstance(t, Tensor)]
        if not gradients:
            draw = Draw(outputs[0].device, 7)
            gradients.extend(draw.normal(*t.shape, dtype=t.dtype) for t in outputs)
        for leaf in leaves:
            if leaf is not None:
                leaf.grad = None
        torch.autograd.backward(outputs, gradients)
        return [t.detach() for t in outputs] + [
            leaf.grad for leaf in leaves if leaf is not None and leaf.grad is not None
        ]

    return run


def _scan(sizes: Size, draw: Draw) -> Run:
    mixed = draw.normal(sizes.usual.rows, sizes.usual.tokens, sizes.channels)
    bc = sizes.groups * sizes.state
    x, B, C = mixed.split([sizes.inner, bc, bc], dim=-1)
    B, C = (part.unflatten(-1, (sizes.groups, sizes.state)) for part in (B, C))
    x = x.unflatten(-1, (sizes.heads, sizes.head_dim))
    dt = draw.uniform(sizes.usual.rows, sizes.usual.tokens, sizes.heads) * 0.1
    A, D = -1 - 15 * draw.uniform(sizes.heads), draw.normal(sizes.heads, dtype=FP32)
    # packed rows have documents, and that is how most training runs
    cuts = draw.uniform(sizes.usual.rows, sizes.usual.tokens) < 4 / sizes.usual.tokens
    documents = cuts.to(torch.int32).cumsum(1).to(torch.int32)
    return _run(ssd.ssd, [x, dt, A, B, C, D], None, documents)


def _convolution(sizes: Size, draw: Draw) -> Run:
    x = draw.normal(sizes.usual.rows, sizes.usual.tokens, sizes.projected)
    x = x[..., sizes.inner : sizes.inner + sizes.channels]
    weight = draw.normal(sizes.channels, 4, dtype=FP32, scale=0.5)
    bias = draw.normal(sizes.channels, dtype=FP32)
    cuts = draw.uniform(sizes.usual.rows, sizes.usual.tokens) < 4 / sizes.usual.tokens
    documents = cuts.to(torch.int32).cumsum(1).to(torch.int32)
    return _run(causal_conv1d.causal_conv1d, [x, weight, bias], None, documents, True)


def _norm(sizes: Size, draw: Draw) -> Run:
    x = draw.normal(sizes.usual.rows, sizes.usual.tokens, sizes.hidden)
    weight = draw.uniform(sizes.hidden)
    return _run(rms_norm.rms_norm, [x, weight], 1e-5)


def _gated_norm(sizes: Size, draw: Draw) -> Run:
    y = draw.normal(sizes.usual.rows, sizes.usual.tokens, sizes.inner)
    z = draw.normal(sizes.usual.rows, sizes.usual.tokens, sizes.projected)[..., : sizes.inner]
    weight = draw.uniform(sizes.inner)
    return _run(gated_rms_norm.gated_rms_norm, [y, z, weight], sizes.groups, 1e-5)


def _activation(sizes: Size, draw: Draw) -> Run:
    rows = sizes.usual.all * sizes.copies
    inputs = [draw.normal(rows, sizes.expert_width), draw.uniform(rows, 1)]
    return _run(squared_relu.squared_relu, inputs)


def _experts(sizes: Size, draw: Draw, launch: str) -> Run:
    wide, deep, groups = sizes.expert_width, sizes.expert_input, sizes.experts
    rows = sizes.usual.all * sizes.copies // groups * groups
    plan = tiles.plan(torch.full((groups,), rows // groups, device=draw.device), rows)
    x, hidden, weights = draw.normal(rows, deep), draw.normal(rows, wide), draw.uniform(rows, 1)
    up = draw.normal(groups, wide, deep, scale=0.02)
    down = draw.normal(groups, deep, wide, scale=0.02)

    def run() -> list[Tensor]:
        if launch == "by_rows":
            return [grouped_linear.multiply(hidden, down, plan)]
        if launch == "by_rows_back":
            return [grouped_linear.multiply_back(hidden, up, plan)]
        if launch == "activated":
            return [*grouped_linear.activate(x, up, weights, plan)]
        if launch == "slopes":
            return [*grouped_linear.slopes(x, down, hidden, weights, plan)]
        return [grouped_linear.multiply_columnwise(hidden, x, plan, FP32)]

    return run


def _copies(sizes: Size, draw: Draw) -> Run:
    rows = sizes.usual.all * sizes.copies
    scores = draw.uniform(sizes.usual.all, max(sizes.experts, sizes.copies))
    # rows sorted by expert, each token's experts drawn apart
    order = scores.topk(sizes.copies, dim=1).indices.flatten().argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(rows, device=order.device))
    starts = torch.arange(0, rows, sizes.copies, device=order.device)
    token = order // sizes.copies
    copied = _run(
        lambda x: token_copies.token_copies(x, token, place, starts, "copy"),
        [draw.normal(sizes.usual.all, sizes.expert_input)],
    )
    return copied  # its backward is the sum


def _few_experts(sizes: Size, draw: Draw) -> Run:
    x = draw.normal(STEP_ROWS, sizes.expert_input)
    # in turn, so that all matrices are read
    count = STEP_ROWS * sizes.copies
    experts = (torch.arange(count, device=draw.device) % sizes.experts).view(STEP_ROWS, -1)
    weights = draw.uniform(STEP_ROWS, sizes.copies)
    up = draw.normal(sizes.experts, sizes.expert_width, sizes.expert_input, scale=0.02)
    down = draw.normal(sizes.experts, sizes.expert_input, sizes.expert_width, scale=0.02)
    return lambda: [expert_step.expert_step(x, experts, weights, up, down, None)]


def _head(sizes: Size, draw: Draw) -> Run:
    rows = min(sizes.usual.all, 4096)  # a chunk
    hidden = draw.normal(rows, sizes.hidden)
    weight = draw.normal(sizes.vocab, sizes.hidden, scale=0.02)
    labels = draw.below(sizes.vocab, rows)
    return _run(linear_cross_entropy.linear_cross_entropy, [hidden, weight], labels, "sum")


def _optimizer(sizes: Size, draw: Draw) -> Run:
    shape = sizes.experts, sizes.expert_width, sizes.expert_input
    tensors = [draw.normal(*shape).float() for _ in range(3)]
    tensors.append(tensors[-1].square())
    settings = Settings(1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0)
    step = draw.uniform().float() + 3

    def run() -> list[Tensor]:
        parameter, gradient, average, square = (tensor.clone() for tensor in tensors)
        copy = torch.empty_like(parameter, dtype=BF16)
        adamw.adamw([parameter], [gradient], [average], [square], [step], [copy], settings)
        return [parameter, average, square, copy]

    return run


def _quantize_rows(sizes: Size, draw: Draw) -> Run:
    rows, groups = sizes.usual.all * sizes.copies, sizes.experts
    x = draw.normal(rows, sizes.expert_input)
    counts = torch.full((groups,), rows // groups, device=draw.device)

    def run() -> list[Tensor]:
        plan = tiles.plan(counts, rows)
        amax = quantize_fp8.largest(x, plan)
        found = quantize_fp8.quantize(x, E4M3, quantize_fp8.BY_AMAX, given=amax, plan=plan)
        assert found.row is not None
        assert found.columnwise is not None
        # what is behind the last expert's rows is not written
        used = rows // groups * groups
        across = -(-(rows // groups) // tiles.TILE) * tiles.TILE * groups
        return [amax, found.row.elements[:used], found.columnwise.elements[:, :across]]

    return run


def _quantize_blocks(sizes: Size, draw: Draw) -> Run:
    x = draw.normal(sizes.usual.all, sizes.hidden)

    def run() -> list[Tensor]:
        sides = quantize_fp8.quantize(x, E4M3, quantize_fp8.BY_ROWS)
        assert sides.row is not None
        assert sides.columnwise is not None
        return [
            t for part in (sides.row, sides.columnwise) for t in (part.elements, part.scale_inv)
        ]

    return run


def _products(sizes: Size, draw: Draw, launch: str) -> Run:
    rows, groups = sizes.usual.all * sizes.copies, sizes.experts
    wide, deep = sizes.expert_width, sizes.expert_input
    if launch == "by_rows_wide":  # the columns of wide tiles must fit
        wide, deep = deep, wide
    counts = torch.full((groups,), rows // groups, device=draw.device)
    x, dy = draw.normal(rows, deep), draw.normal(rows, wide, scale=1e-3)
    weight = draw.normal(groups, wide, deep, scale=0.02)
    one = torch.ones(groups, device=draw.device)

    def codes(values: Tensor, is_rows: bool, gradient: bool = False) -> quantize_fp8.Sides:
        return quantize_fp8.quantize(
            values,
            E5M2 if gradient else E4M3,
            quantize_fp8.BY_SCALE,
            given=one,
            plan=plan if is_rows else None,
        )

    plan = tiles.plan(counts, rows)
    sides, matrices, slopes = codes(x, True), codes(weight, False), codes(dy, True, gradient=True)

    def run() -> list[Tensor]:
        if launch == "by_experts":
            out = weight.new_empty(weight.shape)
            assert slopes.columnwise is not None
            assert sides.columnwise is not None
            grouped_fp8.multiply_columnwise(
                slopes.columnwise, sides.columnwise, plan, out, in_blocks=False
            )
        elif launch == "by_rows":  # the gradient of the rows
            out = x.new_empty(x.shape)
            assert slopes.row is not None
            assert matrices.columnwise is not None
            grouped_fp8.multiply(
                slopes.row, matrices.columnwise, plan, out, in_blocks=False, fast=False
            )
        else:
            out = dy.new_empty(dy.shape)
            assert sides.row is not None
            assert matrices.row is not None
            grouped_fp8.multiply(sides.row, matrices.row, plan, out, in_blocks=False, fast=True)
        return [out]

    return run


def _product(launch: str, tunable: Tunable) -> Problem:
    return Problem(
        f"grouped_fp8 {launch}",
        (tunable,),
        lambda sizes, draw: _products(sizes, draw, launch),
        lambda s: 2.0 * s.usual.all * s.copies * s.expert_width * s.expert_input,
        fp8=True,
    )


def _experts_product(tunable: Tunable) -> Problem:
    return Problem(
        tunable.name,
        (tunable,),
        lambda sizes, draw: _experts(sizes, draw, tunable.launch),
        lambda s: 2.0 * s.usual.all * s.copies * s.expert_width * s.expert_input,
    )


PROBLEMS = (
    Problem(
        "ssd",
        (
            ssd.GRADIENTS_OF_HEADS,
            ssd.OUTPUTS,
            ssd.GRADIENTS_OF_GROUPS,
            ssd.CHUNK_STATES,
            ssd.SEGMENT_STATES,
            ssd.SEGMENTS,
        ),
        _scan,
    ),
    Problem("linear_cross_entropy", (linear_cross_entropy.LOSSES,), _head, tensor_passes=2),
    Problem("causal_conv1d", (causal_conv1d.BACKWARD, causal_conv1d.FORWARD), _convolution),
    Problem("rms_norm", (rms_norm.BACKWARD, rms_norm.FORWARD), _norm),
    Problem("gated_rms_norm", (gated_rms_norm.BACKWARD, gated_rms_norm.FORWARD), _gated_norm),
    Problem("squared_relu", (squared_relu.BACKWARD, squared_relu.FORWARD), _activation),
    *(_experts_product(tunable) for tunable in grouped_linear.TUNABLES),
    Problem("token_copies", (token_copies.ADD, token_copies.COPY), _copies),
    Problem("adamw", (adamw.UPDATE,), _optimizer),
    Problem("quantize_fp8", (quantize_fp8.QUANTIZE, quantize_fp8.MEASURE), _quantize_rows),
    _product("by_experts", grouped_fp8.BY_EXPERTS),
    _product("by_rows", grouped_fp8.BY_ROWS),
    _product("by_rows_narrow", grouped_fp8.BY_ROWS_NARROW),
    _product("by_rows_wide", grouped_fp8.BY_ROWS_WIDE),
    Problem("quantize_fp8 blocks", (quantize_fp8.QUANTIZE_BLOCKS,), _quantize_blocks),
    Problem("expert_step", (expert_step.MULTIPLY,), _few_experts),
)
"""In the order of time in a training step: the first are the first to be searched. The last one is
of generation."""


@dataclass(frozen=True)
class Target:
    """One tunable launch at one model's sizes: what a search works on."""

    problem: Problem
    tunable: Tunable
    sizes: Size


def targets(operation: str, sizes: Sequence[Size]) -> list[Target]:
    """Return what belongs to an operation, a launch (`ssd outputs`) or everything (`all`)."""
    return [
        Target(problem, tunable, each)
        for each in sizes
        for problem in PROBLEMS
        for tunable in problem.tunables
        if operation in ("all", tunable.operation, tunable.name)
    ]
