"""Whether a recipe's layout over processes is possible, and what each rank of it will hold.

Sizes alone say it: no process group is needed.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nemotron.data.loader import rows_of_rank
from nemotron.errors import Finding, UserError
from nemotron.model.build import build_on_meta
from nemotron.model.hybrid import HybridLM
from nemotron.model.init import STACKED
from nemotron.parallel.config import ParallelConfig
from nemotron.parallel.dims import ParallelDims, resolve_dims, violations
from nemotron.parallel.stages import cut, split_stages
from nemotron.parallel.tensor import PLACEMENTS, shard_of
from nemotron.train.config import RunConfig
from nemotron.train.schedule import TrainingPlan

FEW = 16
"""Ranks up to which each has a line of its own; of more, those of a pipeline stage share one."""


def findings(
    config: RunConfig, plan: TrainingPlan, dims: ParallelDims, micro_batch: int | None = None
) -> list[Finding]:
    """Return every rule that the layout breaks in any phase, each once, with what is right.

    `micro_batch` replaces the recipe's.
    """
    found = [
        Finding(f"parallel.{axis}", "cannot be shared in such a run yet; use 1.", size)
        for axis in config.unshared_axes
        if (size := getattr(dims, axis)) != 1
    ]
    for phase in plan.timeline.phases:
        for length in phase.lengths:
            found += violations(
                dims,
                config.model,
                config.parallel,
                seq_len=length.seq_len,
                rows_per_step=phase.tokens_per_step // length.seq_len,
                micro_batch=config.rows_at_once(length.seq_len, micro_batch),
            )
    return list(dict.fromkeys(found))


def least_world(config: ParallelConfig) -> int:
    """Return the fewest processes that the sizes of a recipe ask for."""
    others = config.pp * config.dp_replicate * config.cp * config.tp
    return others if config.dp_shard == "auto" else others * config.dp_shard


def check_layout(config: RunConfig, plan: TrainingPlan, world: int) -> ParallelDims:
    """Return the sizes of the mesh for so many processes.

    Raises:
        UserError: for the first rule that they break, and how many others there are.
    """
    dims = resolve_dims(config.parallel, world)
    found = findings(config, plan, dims)
    if found:
        first, *others = found
        more = f" ({len(others)} more: `nemotron plan` lists them)" if others else ""
        raise UserError.of(first, more)
    return dims


@dataclass(frozen=True)
class MeshCoordinate:
    """Where a rank is on every axis of the mesh."""

    rank: int
    dims: ParallelDims

    @property
    def tp(self) -> int:
        return self.rank % self.dims.tp

    @property
    def cp(self) -> int:
        return self.rank // self.dims.tp % self.dims.cp

    @property
    def batch(self) -> int:
        return self.rank // (self.dims.tp * self.dims.cp) % self.dims.batch

    @property
    def pp(self) -> int:
        return self.rank // (self.dims.tp * self.dims.cp * self.dims.batch)

    @property
    def fsdp(self) -> int:
        return self.rank // self.dims.tp % self.dims.fsdp

    @property
    def ep(self) -> int:
        return self.rank % self.dims.ep

    @property
    def efsdp(self) -> int:
        return self.rank // self.dims.ep % self.dims.efsdp


def describe_ranks(config: RunConfig, plan: TrainingPlan, dims: ParallelDims) -> Iterator[str]:
    """Yield a line for each rank, or each group of ranks: layers, rows, coordinates, parameters."""
    first = plan.timeline.phases[0]
    num_rows = first.tokens_per_step // first.lengths[0].seq_len
    stages = [_held_layers(config, dims, pp) for pp in range(dims.pp)]
    models = [_models(config, dims, layers) for layers in stages]
    size = 1 if dims.world <= FEW else dims.world // dims.pp
    for start in range(0, dims.world, size):
        coordinates = [MeshCoordinate(rank, dims) for rank in range(start, start + size)]
        pp = coordinates[0].pp
        rows = [rows_of_rank(num_rows, coordinate.batch, dims.batch) for coordinate in coordinates]
        parts = [
            f"layers {', '.join(_span(s) for s in stages[pp])}" if dims.pp > 1 else "",
            f"rows {_span(range(min(r.start for r in rows), max(r.stop for r in rows)))}",
            *(
                f"{axis} {_span(sorted({getattr(coordinate, axis) for coordinate in coordinates}))}"
                for axis in ("cp", "tp", "ep")
                if getattr(dims, axis) > 1
            ),
            # shards only get smaller: the first and the last have most and least
            _range([_num_held(models[pp], at) for at in (coordinates[0], coordinates[-1])]),
        ]
        who = f"rank  {start}" if size == 1 else f"ranks {start}-{start + size - 1}"
        yield f"{who:<12} {'; '.join(part for part in parts if part)} parameters"


def _held_layers(config: RunConfig, dims: ParallelDims, pp: int) -> list[range]:
    """Return the layers of each stage of a rank, of all of which there is one without stages."""
    if dims.pp == 1:
        return [range(len(config.model.hybrid_override_pattern))]
    num_stages = dims.pp * config.parallel.pipeline.stages_per_rank
    seq_len, depths = config.data.seq_len, config.num_depths
    layers = split_stages(config.model, config.parallel, num_stages, seq_len, depths)
    return layers[pp :: dims.pp]


def _models(config: RunConfig, dims: ParallelDims, layers: Sequence[range]) -> list[HybridLM]:
    models, last = [], len(config.model.hybrid_override_pattern)
    for stage in layers:
        model = build_on_meta(config.model)
        if dims.pp > 1:
            cut(model, stage, is_first=stage.start == 0, is_last=stage.stop == last)
        models.append(model)
    return models


def _num_held(models: Sequence[HybridLM], coordinate: MeshCoordinate) -> int:
    return sum(
        _size(name, shape, coordinate) for m in models for name, shape in _after_tp(m, coordinate)
    )


def _after_tp(model: HybridLM, coordinate: MeshCoordinate) -> Iterator[tuple[str, list[int]]]:
    """Yield the shapes that tensor parallelism leaves of the parameters."""
    placements = {
        parameter: PLACEMENTS[type(module)][name]
        for module in model.modules()
        if type(module) in PLACEMENTS
        for name, parameter in module.named_parameters()
        if name in PLACEMENTS[type(module)]
    }
    for name, parameter in model.named_parameters():
        shape, placement = list(parameter.shape), placements.get(parameter)
        if placement is not None and coordinate.dims.tp > 1:
            shard = shard_of(
                parameter.shape, placement, model.config, coordinate.tp, coordinate.dims.tp
            )
            if shard is not None:
                shape[placement.dim] //= coordinate.dims.tp
        yield name, shape


def _size(name: str, shape: list[int], coordinate: MeshCoordinate) -> int:
    """Return the elements that sharding leaves: of experts over `efsdp`, else over `fsdp`."""
    dims = coordinate.dims
    length, others = shape[0], math.prod(shape[1:])
    if not name.endswith(STACKED):
        return _chunk(length, dims.fsdp, coordinate.fsdp) * others
    length //= dims.ep
    if dims.efsdp > length:  # inside the matrices
        return length * _chunk(shape[1], dims.efsdp, coordinate.efsdp) * math.prod(shape[2:])
    return _chunk(length, dims.efsdp, coordinate.efsdp) * others


def _chunk(length: int, ranks: int, rank: int) -> int:
    """Return what a rank has of a dimension that is cut as `torch.chunk` does it."""
    size = math.ceil(length / ranks)
    return max(0, min(size, length - rank * size))


def _span(numbers: Sequence[int]) -> str:
    first, last = numbers[0], numbers[-1]
    return f"{first}" if first == last else f"{first}-{last}"


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
