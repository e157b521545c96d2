"""The trainer: one optimizer step, and the objects that it happens to."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from nemotron.checkpoint.manifest import CheckpointInfo
from nemotron.checkpoint.read import lacking, load_tensors, read_state
from nemotron.data.batch import Batch
from nemotron.data.loader import TrainingData
from nemotron.data.prefetch import OwnRows
from nemotron.device import memory_values
from nemotron.errors import UserError
from nemotron.model.block import Block
from nemotron.model.config import LAYER_KINDS
from nemotron.model.hybrid import HybridLM
from nemotron.model.router import RoutingStats, routers
from nemotron.ops.apply import apply as apply_ops
from nemotron.parallel.apply import LocalModel, distribute
from nemotron.parallel.dims import resolve_dims
from nemotron.parallel.mesh import Mesh
from nemotron.parallel.quantized import connect, token_numbers
from nemotron.parallel.runtime import Ranks
from nemotron.precision.apply import Quantization
from nemotron.precision.apply import apply as apply_precision
from nemotron.precision.random_bits import Numbers
from nemotron.run.metrics import Record
from nemotron.run.signals import StopRequest
from nemotron.train.config import PretrainConfig
from nemotron.train.flops import training_flops_per_token
from nemotron.train.loss import (
    StepSums,
    TokenCounts,
    count_tokens,
    losses,
    num_depths,
    objective,
    stage_losses,
)
from nemotron.train.optimizer import (
    GradientNorms,
    Optimizer,
    clip_coefficient,
    kinds,
    parameter_kinds,
    squares_by_kind,
)
from nemotron.train.record import StepResult
from nemotron.train.reliability.faults import Faults
from nemotron.train.reliability.progress import Progress, Stopwatch
from nemotron.train.reliability.replicas import ReplicaCheck
from nemotron.train.schedule import Course
from nemotron.train.state import RNG, Skip, TrainerState, snapshot
from nemotron.train.validation import evaluate

SOURCES_LOGGED = 64
"""Sources up to which the tokens read from each are logged."""


class Trainer:
    """Model, optimizer, data and counters of one run."""

    def __init__(
        self,
        config: PretrainConfig,
        course: Course,
        data: TrainingData,
        device: torch.device,
        peak_flops: float,
        ranks: Ranks | None = None,
    ) -> None:
        self.config, self.course, self.data, self.device = config, course, data, device
        self.ranks = ranks or Ranks()
        torch.manual_seed(config.seed)
        dims = resolve_dims(config.parallel, self.ranks.world)
        self.mesh = Mesh(dims, device.type) if self.ranks.grouped else None
        self.progress = Progress()
        self.local = build_model(config, device, self.mesh)
        self.model = self.local.models[0]
        with torch.device("meta"):
            whole = HybridLM(config.model)
        self.quantization = Quantization(self.local.models, config.precision, config.seed, whole)
        connect(self.quantization, self.local)
        self.optimizer = Optimizer(self.local.parameters(), config.optimizer)
        self.routers = {n: r for model in self.local.models for n, r in routers(model).items()}
        self.state = TrainerState()
        self._depths = num_depths(config.model, config.loss)
        counted = filter(self.local.counts, self.optimizer.parameters)
        self._kind_of = parameter_kinds(counted, config.model)
        self._kinds = kinds(config.model)
        self.peak_flops = peak_flops
        reliability = config.reliability
        self._faults = Faults(reliability.faults, self.ranks.rank)
        every = reliability.check_replicas_every_steps
        self._replicas = ReplicaCheck(self.local, self.optimizer, self.ranks) if every else None
        self._batches = OwnRows(
            config.data,
            data,
            reader=self.local.batch_rank,
            num_readers=dims.batch,
            num_steps=course.num_steps,
            num_depths=self._depths,
            pin=device.type == "cuda",
        )

    def train_step(self, step: int, stop: StopRequest | None = None) -> StepResult:
        """Do the optimizer step with this index, counted from 0.

        `stop` says whether this rank is to stop after it; the result, whether any rank is.
        """
        config, watch = self.config, Stopwatch(self.device, self.progress, step)
        watch.begin("data")
        batch = self._batches.take(step)
        self._faults.strike(step, self.local)
        watch.begin("wait")
        counts = self._sum_counts(count_tokens(batch))  # of the whole step, before any backward

        watch.begin("forward_backward")
        self.optimizer.zero_grad()
        sums = StepSums(
            self._depths, config.model.moe_layers, config.model.n_routed_experts, self.device
        )
        portions = list(self._portions(step, batch))
        if self.local.pipeline is not None:
            self._run_stages(step, portions, counts, sums)
            portions = []
        for number, (tokens, micro) in enumerate(portions, start=1):
            self.quantization.begin(step, tokens)
            is_last = number == len(portions)
            self.local.sync_gradients(is_last or config.parallel.sync_every_micro_batch)
            terms = losses(self.model, micro.to(self.device), config.loss)
            objective(terms, counts, config.loss).backward()
            sums.add(terms)
            self.progress.move()
        self.local.finish_gradients()
        gradients = self.optimizer.gradients()
        squares = squares_by_kind(gradients, self._kind_of, self._kinds)
        is_asked = stop is not None and stop.is_due(step + 1)
        others = torch.cat([squares, squares.new_tensor([is_asked])])
        watch.begin("exchange")
        others = sums.add_up(self.ranks, others, counts_loss=self.local.counts_loss)
        norms = GradientNorms(others[:-1], self._kinds)
        total = sums.objective(counts, config.loss)
        # once a step the host waits for three numbers: whether to update hangs on them
        loss, grad_norm, stops = torch.stack([total.double(), norms.total(), others[-1]]).tolist()
        watch.begin("optimizer")
        lr, clip = self.course.lr(step), clip_coefficient(grad_norm, config.optimizer.clip)
        is_spike = self.state.is_spike(loss, grad_norm, config.reliability.spike_sigmas)
        skips_spike = is_spike and config.reliability.spike_sigmas is not None
        skip = _reason_to_skip(counts, loss, grad_norm, skips_spike=skips_spike)
        if skip is None:
            self.optimizer.step(lr, clip)
            for name, router in self.routers.items():
                router.update_bias(sums.load[name], config.optimizer.router_bias_update_rate)
        self.state.advance(self.course.timeline.tokens_per_step(step), loss, grad_norm, skip)
        watch.begin(None)
        return StepResult(
            counts, sums, norms, loss, grad_norm, clip, lr, skip, is_spike, stops > 0, watch.seconds
        )

    def _portions(self, step: int, batch: Batch) -> Iterator[tuple[Numbers, Batch]]:
        """Yield what is computed at once of this rank's rows, with the numbers of its tokens."""
        at_once, (num_rows, length) = (
            self.config.rows_at_once(self.data.seq_len(step)),
            batch.input_ids.shape,
        )
        first = self.local.batch_rank * num_rows
        for micro in self.local.share_rows(batch).split(at_once):
            rows = micro.input_ids.shape[0]
            yield token_numbers(first, rows, length, self.local), micro
            first += rows

    def _run_stages(
        self, step: int, portions: list[tuple[Numbers, Batch]], counts: TokenCounts, sums: StepSums
    ) -> None:
        """Pass the portions of a step through the stages of a pipeline, forward and backward."""
        assert self.local.pipeline is not None

        def share(
            model: HybridLM, hidden: Tensor | None, batch: Batch, routing: list[RoutingStats]
        ) -> Tensor:
            terms = stage_losses(model, hidden, batch, self.config.loss, routing)
            sums.add(terms)
            self.progress.move()
            return objective(terms, counts, self.config.loss)

        # every call of a layer draws other bits, so the portions may share their numbers
        self.quantization.begin(step, portions[0][0])
        self.local.pipeline.step([micro.to(self.device) for _, micro in portions], share)

    def _sum_counts(self, counts: TokenCounts) -> TokenCounts:
        """Add up over the ranks that read other rows."""
        if self.mesh is None:
            return counts
        values = torch.tensor([counts.tokens, counts.main, *counts.mtp], dtype=torch.float64)
        total = self.ranks.sum(values.to(self.device), self.mesh.group("batch")).tolist()
        return TokenCounts(total[1], tuple(total[2:]), int(total[0]))

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor that a resume needs, under its name in a checkpoint."""
        return snapshot(self.local, self.optimizer, self.quantization)

    def json_state(self) -> dict[str, Any]:  # Any: nested JSON
        """Return everything else that a resume needs."""
        return {"trainer": asdict(self.state), "data": self.data.fingerprint()}

    def restore(self, info: CheckpointInfo) -> None:
        """Put every tensor and counter of a checkpoint in place.

        Raises:
            UserError: when the checkpoint does not fit the model, or the data was changed.
        """
        saved = read_state(info)
        if "data" not in saved:
            raise UserError(
                f"{info.folder} holds weights only, nothing to go on from; "
                f"start a new run with init_from: {info.folder}."
            )
        self.data.check_fingerprint(saved["data"], info.step)
        tensors = self.tensors()
        # a run that was in another format then has no scales there
        for name in lacking(info, self.quantization.tensors()):
            self.quantization.forget(name)
            del tensors[name]
        load_tensors(info, tensors)
        self.local.drop_gathered()
        torch.set_rng_state(tensors[RNG])
        self.state = TrainerState(**saved["trainer"])
        self.quantization.begin(max(0, self.state.step - 1), 0)

    def check_replicas(self) -> None:
        """Compare what ranks hold alike, if the recipe wants that.

        Raises:
            ReplicasDiffer: on every rank.
        """
        if self._replicas is not None:
            self._replicas(self.state.step)

    def record(self, kind: str, values: Record) -> Record:
        """Return a line of the metrics about the steps done."""
        state = self.state
        return {"kind": kind, "step": state.step, "data/tokens": state.tokens, **values}

    def values(self, step: int, result: StepResult) -> Record:
        """Return the metrics of the step with this index; reading them waits for the device."""
        config = self.config.model
        flops = training_flops_per_token(config, self.data.seq_len(step), self._depths)
        return {
            **result.values(self.routers, self.peak_flops / flops),
            **self._tokens_by_source(step + 1),
            **self.quantization.metrics(),
            "skipped_steps": self.state.skipped_steps,
            **memory_values(self.device),
        }

    def _tokens_by_source(self, step: int) -> Record:
        if len(self.data.tokens) > SOURCES_LOGGED:
            return {}
        read = self.data.tokens_read(step)
        return {f"data/tokens/{name}": count for name, count in read.items()}

    def validate(self) -> Record:
        """Return the metrics of the held-out text."""
        budget, rows = self.config.evaluation.tokens, self.config.batch.micro_batch
        values = evaluate(
            self.local, self.data, self.ranks, tokens=budget, rows=rows, progress=self.progress
        )
        return {**values}


def _reason_to_skip(
    counts: TokenCounts, loss: float, grad_norm: float, *, skips_spike: bool
) -> Skip | None:
    if not counts.main:
        return Skip.NO_TARGETS
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return Skip.NOT_FINITE
    return Skip.SPIKE if skips_spike else None


def build_model(
    config: PretrainConfig, device: torch.device, mesh: Mesh | None = None
) -> LocalModel:
    """Build what this rank holds of the recipe's model, with fresh weights."""

    def build() -> HybridLM:
        # on meta first, so that no memory is spent on what other ranks hold
        with torch.device("meta"):
            model = HybridLM(config.model)
        apply_ops(model, config.ops)
        apply_precision(model, config.precision)
        for block in model.modules():
            if isinstance(block, Block):
                block.recompute = config.recomputes(LAYER_KINDS[block.letter])
        return model

    local = distribute(
        build,
        mesh,
        config.parallel,
        seq_len=config.data.seq_len,
        num_depths=num_depths(config.model, config.loss),
        device=device,
    )
    local.materialise(device)
    local.init_weights(config.seed)
    return local
