"""How a run is laid out over processes."""

from typing import Annotated, Literal

from pydantic import Field

from nemotron.section import Section


class PipelineConfig(Section):
    """Stages of layers that hand micro-batches on."""

    schedule: Literal["1f1b", "gpipe", "interleaved_1f1b"] = "1f1b"
    """Order in which a rank computes forward and backward of its micro-batches."""
    stages: str = "auto"
    """The layer pattern cut into stages by `|`, as in `MEM*|EMEM`; `auto` balances their cost."""
    stages_per_rank: int = Field(1, gt=0)
    """Stages on each rank (schedule interleaved_1f1b)."""


class ParallelConfig(Section):
    """Sizes of the mesh; their product, without `ep`, is the number of processes."""

    pp: int = Field(1, gt=0)
    """Pipeline stages that one token passes on different ranks."""
    dp_replicate: int = Field(1, gt=0)
    """Copies of the whole model (HSDP); each sees other rows."""
    dp_shard: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    """Ranks that share one copy of the weights and see other rows (FSDP2); `auto`: those left."""
    cp: int = Field(1, gt=0)
    """Ranks that share the tokens of each row."""
    tp: int = Field(1, gt=0)
    """Ranks that share the heads and channels of each layer; between layers, the tokens."""
    ep: int = Field(1, gt=0)
    """Ranks that share the routed experts; cut out of dp_shard x cp x tp."""
    expert_dispatch: Literal["auto", "all_gather", "all_to_all"] = "auto"
    """How tokens reach experts of other ranks; `auto` takes what moves fewer bytes."""
    mamba_context: Literal["state_passing", "all_to_all"] = "state_passing"
    """How Mamba layers cross the ranks of `cp`: states of chunks, or heads for tokens."""
    reshard_after_forward: bool = True
    """Whether gathered weights are dropped after forward and gathered again for backward."""
    sync_every_micro_batch: bool = True
    """Whether gradients are reduced after each micro-batch: less memory, more traffic."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format in which gradients are summed over ranks."""
    pipeline: PipelineConfig = PipelineConfig()
    """Stages of layers."""
    start_timeout_s: float = Field(300.0, gt=0)
    """Seconds that the first step may wait for other ranks."""
    timeout_s: float = Field(100.0, gt=0)
    """Seconds that any later step may wait for other ranks before the job is ended."""
