"""Sizes of the mesh and the rules that they obey: arithmetic only, before anything starts."""

from collections.abc import Iterator
from dataclasses import dataclass

from nemotron.divisors import divisors, nearest
from nemotron.errors import Finding, UserError
from nemotron.model.config import ModelConfig
from nemotron.parallel.config import ParallelConfig


@dataclass(frozen=True)
class ParallelDims:
    """Sizes of every axis; ranks are numbered with `tp` fastest, then cp, dp_shard, … , pp."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def fsdp(self) -> int:
        """Ranks over which dense weights are sharded: those of `cp` share weights, too."""
        return self.dp_shard * self.cp

    @property
    def efsdp(self) -> int:
        """Ranks over which the weights of one rank's experts are sharded."""
        return self.dp_shard * self.cp * self.tp // self.ep

    @property
    def batch(self) -> int:
        """Ranks, or groups of them, that read different rows."""
        return self.dp_replicate * self.dp_shard


def resolve_dims(config: ParallelConfig, world: int) -> ParallelDims:
    """Return the sizes for so many processes, `auto` replaced.

    Raises:
        UserError: when the sizes do not make up that number.
    """
    others = config.pp * config.dp_replicate * config.cp * config.tp
    if config.dp_shard == "auto":
        if world % others:
            near = max(others, round(world / others) * others)
            raise UserError(
                f"needs multiples of pp x dp_replicate x cp x tp = {others} processes, but there "
                f"{_processes(world)}; start {near}, or change one of them.",
                key="parallel",
            )
        shard = world // others
    else:
        shard = config.dp_shard
        if others * shard != world:
            raise UserError(
                f"needs pp x dp_replicate x dp_shard x cp x tp = {others * shard} processes, but "
                f"there {_processes(world)}; start {others * shard}, or set "
                "parallel.dp_shard=auto.",
                key="parallel",
            )
    return ParallelDims(config.pp, config.dp_replicate, shard, config.cp, config.tp, config.ep)


def _processes(world: int) -> str:
    return "is 1 process" if world == 1 else f"are {world} processes"


def violations(
    dims: ParallelDims,
    model: ModelConfig,
    config: ParallelConfig,
    *,
    seq_len: int,
    rows_per_step: int,
    micro_batch: int,
) -> Iterator[Finding]:
    """Yield every rule that this layout breaks, each with the nearest legal value.

    `micro_batch` are the rows of a micro-batch, `rows_per_step` those of a step.
    Source of the rules: pytorch/torchtitan: torchtitan/distributed/parallel_dims.py;
    NVIDIA/Megatron-LM: megatron/core/ssm/mamba_mixer.py and mamba_context_parallel.py.
    """
    layers = model.hybrid_override_pattern + model.mtp_pattern
    yield from _tensor(dims, model, layers)
    yield from _expert(dims, model, layers)
    yield from _context(dims, model, config, layers)
    yield from _pipeline(dims, model, config)
    yield from _rows(dims, model, seq_len, rows_per_step, micro_batch)
    if dims.pp > 1:
        yield from _micro_batches(dims, config, rows_per_step, micro_batch)


def _tensor(dims: ParallelDims, model: ModelConfig, layers: str) -> Iterator[Finding]:
    tp = dims.tp
    if "M" in layers:
        for key in ("mamba_num_heads", "n_groups"):
            if (size := getattr(model, key)) % tp:
                yield Finding("parallel.tp", _does_not_divide(tp, f"model.{key}", size), tp)
    if "*" in layers:
        if model.num_attention_heads % tp:
            heads = model.num_attention_heads
            yield Finding(
                "parallel.tp", _does_not_divide(tp, "model.num_attention_heads", heads), tp
            )
        kv = model.num_key_value_heads
        if tp % kv and kv % tp:
            near = nearest(tp, [*divisors(kv), tp // kv * kv or kv, (tp // kv + 1) * kv])
            yield Finding(
                "parallel.tp",
                f"neither divides model.num_key_value_heads = {kv} nor is a multiple of "
                f"it; the nearest is {near}.",
                tp,
            )
    widths = {"vocab_size": model.vocab_size}
    if "E" in layers:
        widths["moe_shared_expert_intermediate_size"] = model.moe_shared_expert_intermediate_size
    if "-" in layers and model.intermediate_size is not None:
        widths["intermediate_size"] = model.intermediate_size
    for key, size in widths.items():
        if size % tp:
            yield Finding("parallel.tp", _does_not_divide(tp, f"model.{key}", size), tp)


def _expert(dims: ParallelDims, model: ModelConfig, layers: str) -> Iterator[Finding]:
    ranks = dims.dp_shard * dims.cp * dims.tp
    if dims.ep == 1:
        return
    if "E" not in layers:
        yield Finding("parallel.ep", "needs an E layer, which the pattern lacks; use 1.", dims.ep)
        return
    if ranks % dims.ep:
        yield Finding(
            "parallel.ep",
            f"does not divide dp_shard x cp x tp = {ranks}; "
            f"the nearest is {nearest(dims.ep, divisors(ranks))}.",
            dims.ep,
        )
    if model.n_routed_experts % dims.ep:
        experts = model.n_routed_experts
        yield Finding(
            "parallel.ep", _does_not_divide(dims.ep, "model.n_routed_experts", experts), dims.ep
        )


def _context(
    dims: ParallelDims, model: ModelConfig, config: ParallelConfig, layers: str
) -> Iterator[Finding]:
    if dims.cp == 1 or config.mamba_context != "all_to_all" or "M" not in layers:
        return
    heads, groups = model.mamba_num_heads // dims.tp, max(1, model.n_groups // dims.tp)
    fits = [n for n in divisors(heads) if not (n % groups and groups % n)]
    if dims.cp not in fits:
        yield Finding(
            "parallel.cp",
            f"cannot share {heads} Mamba heads in {groups} groups (mamba_context = "
            f"all_to_all); the nearest is {nearest(dims.cp, fits)}, or use state_passing.",
            dims.cp,
        )


def _pipeline(dims: ParallelDims, model: ModelConfig, config: ParallelConfig) -> Iterator[Finding]:
    pipeline, pattern = config.pipeline, model.hybrid_override_pattern
    if pipeline.stages_per_rank > 1 and pipeline.schedule != "interleaved_1f1b":
        yield Finding(
            "parallel.pipeline.stages_per_rank",
            "needs schedule: interleaved_1f1b; use 1.",
            pipeline.stages_per_rank,
        )
    stages = dims.pp * pipeline.stages_per_rank
    if dims.pp > 1 and stages > len(pattern):
        near = max(1, len(pattern) // pipeline.stages_per_rank)
        yield Finding(
            "parallel.pp",
            f"makes {stages} stages of {len(pattern)} layers; the nearest is {near}.",
            dims.pp,
        )
    if pipeline.stages == "auto" or dims.pp == 1:
        return
    parts = pipeline.stages.split("|")
    if "".join(parts) != pattern:
        yield Finding(
            "parallel.pipeline.stages",
            f"is not model.hybrid_override_pattern = {pattern!r} with | between stages; use auto.",
            repr(pipeline.stages),
        )
    elif len(parts) != stages or not all(parts):
        yield Finding(
            "parallel.pipeline.stages",
            f"has {len([p for p in parts if p])} stages with layers; "
            f"parallel.pp x stages_per_rank = {stages} are needed.",
            repr(pipeline.stages),
        )


def _rows(
    dims: ParallelDims, model: ModelConfig, seq_len: int, rows: int, micro_batch: int
) -> Iterator[Finding]:
    if rows % dims.batch:
        near = max(1, round(rows / dims.batch)) * dims.batch
        yield Finding(
            "batch.global_tokens",
            f"gives {rows} rows of {seq_len} tokens a step, which dp_replicate x dp_shard = "
            f"{dims.batch} ranks cannot share; the nearest is {near * seq_len}.",
        )
    pieces = (2 * dims.cp if dims.cp > 1 else 1) * dims.tp
    if seq_len % pieces:
        near = max(1, round(seq_len / pieces)) * pieces
        what = "2 x cp x tp" if dims.cp > 1 else "tp"
        yield Finding(
            "data.seq_len",
            f"is not divisible by {what} = {pieces}; the nearest is {near}.",
            seq_len,
        )
    elif dims.cp > 1 and seq_len // (2 * dims.cp) < model.conv_kernel - 1:
        yield Finding(
            "parallel.cp",
            f"leaves chunks of {seq_len // (2 * dims.cp)} tokens, shorter than the "
            f"{model.conv_kernel - 1} that the convolution looks back; lower it.",
            dims.cp,
        )


def _micro_batches(
    dims: ParallelDims, config: ParallelConfig, rows: int, micro_batch: int
) -> Iterator[Finding]:
    """Check that stages get micro-batches alike in size, and enough of them."""
    own = rows // dims.batch
    counts = divisors(own) if rows % dims.batch == 0 else []

    def fits(number: int) -> bool:
        if config.pipeline.schedule == "interleaved_1f1b":
            return number % max(1, number // dims.pp) == 0
        return number >= dims.pp

    legal = [own // n for n in counts if fits(n)]
    if micro_batch not in legal and counts:
        advice = f"the nearest is {nearest(micro_batch, legal)}" if legal else "take more rows"
        yield Finding(
            "batch.micro_batch",
            f"does not cut the {own} rows of each rank into at least pp = "
            f"{dims.pp} equal parts that {config.pipeline.schedule} can take in turn; {advice}.",
            micro_batch,
        )


def _does_not_divide(value: int, key: str, size: int) -> str:
    legal = divisors(size)
    shown = ", ".join(map(str, legal)) if len(legal) <= 12 else f"{nearest(value, legal)}"
    return f"does not divide {key} = {size}; use {shown}."
