"""One training job on one system: all that the cost of a step depends on."""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from nemotron.model.config import LAYER_KINDS, ModelConfig
from nemotron.model.flops import depth_flops, head_flops, layer_flops, training_flops_per_token
from nemotron.model.parameters import (
    Split,
    embedding_split,
    head_split,
    layer_split,
    mtp_split,
)
from nemotron.parallel.config import ParallelConfig, PipelineConfig
from nemotron.parallel.dims import ParallelDims
from nemotron.parallel.stages import split_stages
from nemotron.plan.hardware import Hardware


@dataclass(frozen=True)
class Storage:
    """Bytes kept for one parameter, and whether the copy that is computed with stays."""

    sharded: float = 16.0
    """Spread over all data ranks: here 4 weight + 4 gradient + 8 moments, float32 (FSDP2)."""
    resident: float = 0.0
    """Kept whole by every rank that computes with the parameter."""
    gathers: bool = True
    """Whether weights are gathered and gradients scattered with each micro-batch (FSDP2)."""


@dataclass(frozen=True)
class Job:
    """A step: `rows` rows of `seq_len` tokens on `dims.world` accelerators."""

    model: ModelConfig
    dims: ParallelDims
    hardware: Hardware
    seq_len: int
    rows: int
    micro_batch: int
    formats: tuple[tuple[str, float], ...]
    """FLOPs of a token by number format."""
    depths: int = 0
    """Depths of multi-token prediction that are trained."""
    recompute: frozenset[str] = frozenset()
    """Kinds of layers whose blocks are computed again in the backward pass, and operations whose
    results are in all other blocks (`RECOMPUTED`)."""
    compute_bytes: int = 2
    """Bytes of an activation."""
    reduce_bytes: int = 4
    """Bytes of a gradient on its way to the rank that keeps it."""
    reshard_after_forward: bool = True
    sync_every_micro_batch: bool = True
    storage: Storage = Storage()
    dispatch: str = "per_rank"
    """How tokens reach experts: all_gather, per_copy, per_rank or per_node."""
    mamba_context: str = "state_passing"
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    scan: str = "mamba_ssm"
    """Backend of the scan, which decides what it keeps for backward."""
    imbalance: float = 1.3
    """Tokens of the busiest rank's experts as a multiple of the mean, in the worst layer."""

    @property
    def tokens(self) -> float:
        """Tokens of one micro-batch on one rank, before tensor parallelism cuts them."""
        return self.micro_batch * self.seq_len / self.dims.cp

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step on each rank."""
        return max(1, self.rows // (self.dims.batch * self.micro_batch))

    @cached_property
    def layers(self) -> dict[str, int]:
        """How often each letter stands in the pattern."""
        return dict(Counter(self.model.hybrid_override_pattern))

    @cached_property
    def passes(self) -> dict[str, int]:
        """How many blocks of each letter a token passes: those of every depth count, too."""
        ahead = Counter(self.model.mtp_pattern * self.depths)
        return dict(Counter(self.model.hybrid_override_pattern) + ahead)

    def recomputes(self, letter: str) -> bool:
        """Say whether the blocks of this letter are computed again."""
        return LAYER_KINDS[letter] in self.recompute

    @cached_property
    def flops_per_token(self) -> float:
        """Forward and backward, recomputation not counted."""
        return training_flops_per_token(self.model, self.seq_len, self.depths)

    def layer_flops(self, letter: str) -> float:
        """Forward of one layer for one token."""
        return layer_flops(self.model, letter, self.seq_len)

    @cached_property
    def recomputed_share(self) -> float:
        """Forward FLOPs that are computed again, as a share of all of a step's FLOPs."""
        again = sum(
            count * self.layer_flops(letter)
            for letter, count in self.passes.items()
            if self.recomputes(letter)
        )
        return again / self.flops_per_token

    @cached_property
    def stage_share(self) -> float:
        """Share of a token's work on the busiest rank of the pipeline."""
        last = head_flops(self.model) + self.depths * depth_flops(self.model, self.seq_len)
        costs = [
            sum(count * self.layer_flops(letter) for letter, count in layers.items())
            for layers in self._by_rank
        ]
        costs[-1] += last
        return max(costs) / sum(costs)

    @property
    def stages(self) -> tuple[str, ...]:
        """The ranks of the pipeline that may need most memory."""
        return ("only",) if self.dims.pp == 1 else ("first", "last")

    def layers_on(self, stage: str) -> dict[str, int]:
        """Return how many layers of each letter a rank of the pipeline holds."""
        return self._by_rank[-1 if stage == "last" else 0]

    @cached_property
    def _by_rank(self) -> list[dict[str, int]]:
        if self.dims.pp == 1:
            return [self.layers]
        return _layers_by_rank(self.model, self.pipeline, self.dims.pp, self.seq_len, self.depths)

    def parameters_on(self, stage: str) -> Split:
        """Return the parameters of a stage, before tp, ep and FSDP cut them."""
        held = Split()
        for letter, count in self.layers_on(stage).items():
            held += layer_split(self.model, letter, self.dims.tp) * count
        if stage != "last" or self.depths:
            held += embedding_split(self.model)
        if stage == "only" and self.model.tie_word_embeddings:
            return held + Split(whole=self.model.hidden_size)
        if stage != "first":
            held += head_split(self.model) + mtp_split(self.model, self.dims.tp)
        return held


@lru_cache
def _layers_by_rank(
    model: ModelConfig, pipeline: PipelineConfig, pp: int, seq_len: int, depths: int
) -> list[dict[str, int]]:
    """Return the layers of each rank of a pipeline by letter, split as the trainer splits them."""
    parallel = ParallelConfig(pp=pp, pipeline=pipeline)
    stages = split_stages(model, parallel, pp * pipeline.stages_per_rank, seq_len, depths)
    held: list[Counter[str]] = [Counter() for _ in range(pp)]
    for number, stage in enumerate(stages):
        held[number % pp].update(model.hybrid_override_pattern[stage.start : stage.stop])
    return [dict(letters) for letters in held]
