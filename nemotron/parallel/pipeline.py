"""Stages of a model on different ranks, which pass micro-batches on: one step, one evaluation."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleLoopedBFS,
)
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

from nemotron.data.batch import Batch
from nemotron.parallel.config import PipelineConfig
from nemotron.parallel.shards import local_of
from nemotron.parallel.stages import Share, Stage

Schedule = PipelineScheduleSingle | PipelineScheduleMulti
Shape = tuple[int, int, int]
"""Rows and tokens of a micro-batch, and the number of micro-batches."""


class Pipeline:
    """The stages of this rank among those of its group: stage `s` is on rank `s` modulo ranks.

    Gradients are those of the sum over micro-batches. With FSDP2 they are reduced once, after the
    last micro-batch.
    """

    def __init__(
        self,
        stages: list[Stage],
        group: dist.ProcessGroup,
        config: PipelineConfig,
        device: torch.device,
        row_shards: int = 1,
    ) -> None:
        """`row_shards` (tp) ranks share the tokens of the batches handed in, between layers."""
        self.stages, self.group, self.config, self.device = stages, group, config, device
        self.row_shards = row_shards
        self._training: tuple[Shape, Schedule] | None = None

    def step(self, batches: Sequence[Batch], share: Share) -> list[Tensor]:
        """Run forward and backward of micro-batches alike in shape; gradients add up.

        Returns the shares of the last stage, one for each micro-batch, where it is; else nothing.
        """
        shape = _shape(batches)
        if self._training is None or self._training[0] != shape:
            # buffers hold every micro-batch, so those of an earlier shape are not kept
            self._training = None
            self._training = shape, self._build(shape)
        return self._run(self._training[1].step, batches, share)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], share: Share) -> list[Tensor]:
        """Run forward only, of any number of micro-batches; returns as `step` does."""
        shape = _shape(batches)
        schedule = ScheduleLoopedBFS(
            [self._stage(stage, shape) for stage in self.stages], shape[2], _loss
        )
        return self._run(schedule.eval, batches, share)

    def _build(self, shape: Shape) -> Schedule:
        if self.config.schedule == "interleaved_1f1b":
            return ScheduleInterleaved1F1B(
                [self._stage(stage, shape) for stage in self.stages],
                shape[2],
                _loss,
                scale_grads=False,
            )
        [stage] = self.stages
        kind = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}[self.config.schedule]
        return kind(self._stage(stage, shape), shape[2], _loss, scale_grads=False)

    def _stage(self, stage: Stage, shape: Shape) -> PipelineStage:
        """Give torch every shape, so that it does not run the model to find out."""
        rows, tokens, _ = shape
        config, dtype = stage.model.config, _residual_dtype(stage)
        hidden = torch.empty(
            rows,
            tokens // self.row_shards,
            config.hidden_size,
            dtype=dtype,
            device="meta",
            requires_grad=True,
        )
        loss_dtype = torch.promote_types(dtype, torch.float32)
        loss = torch.empty((), dtype=loss_dtype, device="meta", requires_grad=True)
        return PipelineStage(
            stage,
            stage.index,
            stage.num_stages,
            self.device,
            input_args=() if stage.index == 0 else (hidden,),
            output_args=(loss if stage.is_last else hidden,),
            group=self.group,
        )

    def _run(
        self, run: Callable[..., object], batches: Sequence[Batch], share: Share
    ) -> list[Tensor]:
        # torch cuts these into one number for each micro-batch; the loss needs no target
        numbers, losses = torch.arange(len(batches)), list[Tensor]()
        with _handed_in(self.stages, batches, share):
            run(target=numbers, losses=losses, return_outputs=False, number=numbers)
        return [loss.detach() for loss in losses]


@contextmanager
def _handed_in(stages: list[Stage], batches: Sequence[Batch], share: Share) -> Iterator[None]:
    for stage in stages:
        stage.batches, stage.share = batches, share
    try:
        yield
    finally:
        for stage in stages:
            stage.batches, stage.share = (), None


def _loss(share: Tensor, number: Tensor) -> Tensor:
    """Return what the last stage returned: it computed the loss itself."""
    return share


def _shape(batches: Sequence[Batch]) -> Shape:
    shapes = {batch.input_ids.shape for batch in batches}
    assert len(shapes) == 1, f"micro-batches of different shapes: {shapes}"
    [(rows, tokens)] = shapes
    return rows, tokens, len(batches)


def _residual_dtype(stage: Stage) -> torch.dtype:
    return stage.model.compute_dtype or next(stage.parameters()).dtype


@torch.no_grad()
def sync_copies(parameter: nn.Parameter, group: dist.ProcessGroup) -> None:
    """Add up the gradient of a parameter that the first and the last stage hold, on both.

    `group` has a rank of each, where the parameter is sharded alike. A stage on which it got no
    gradient takes part, too.
    """
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    dist.all_reduce(local_of(parameter.grad), group=group)
