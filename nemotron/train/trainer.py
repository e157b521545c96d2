"""The trainer: one optimizer step, and the objects that it happens to."""

import copy
import itertools
import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.checkpoint.manifest import CheckpointInfo
from nemotron.checkpoint.read import SavedTensors, read_state
from nemotron.checkpoint.state import Counters, SavedState
from nemotron.data.batch import Batch, Batches
from nemotron.device import memory_values
from nemotron.errors import UserError
from nemotron.model.build import build_on_meta
from nemotron.model.flops import training_flops_per_token
from nemotron.model.hybrid import HybridLM
from nemotron.model.moe import multiplied_weights
from nemotron.model.router import RoutingStats, routers
from nemotron.parallel.local import LocalModel
from nemotron.parallel.quantized import connect
from nemotron.parallel.runtime import Ranks
from nemotron.precision.apply import Quantization
from nemotron.precision.random_bits import Numbers
from nemotron.run.metrics import Record
from nemotron.run.signals import StopRequest
from nemotron.train.config import RunConfig
from nemotron.train.kinds import kinds, parameter_kinds
from nemotron.train.loss import Objective, StepSums, compute_sums
from nemotron.train.optimizer import GradientNorms, Optimizer, clip_coefficient, squares_by_kind
from nemotron.train.record import StepResult
from nemotron.train.reliability.faults import Faults
from nemotron.train.reliability.progress import StepProgress, Stopwatch
from nemotron.train.reliability.replicas import ReplicaCheck
from nemotron.train.schedule import TrainingPlan
from nemotron.train.state import RNG, Skip, TrainerState, snapshot


class Trainer:
    """Model, optimizer and counters of one run, with its objective and its source of batches."""

    def __init__(
        self,
        config: RunConfig,
        local: LocalModel,
        objective: Objective,
        batches: Batches,
        plan: TrainingPlan,
        device: torch.device,
        peak_flops: float,
        ranks: Ranks | None = None,
    ) -> None:
        self.config, self.objective, self.batches = config, objective, batches
        self.plan, self.device = plan, device
        self.ranks = ranks or Ranks()
        self.progress = StepProgress()
        self.local, self.mesh = local, local.mesh
        self.model = local.models[0]
        whole = build_on_meta(config.model)
        self.quantization = Quantization(self.local.models, config.precision, config.seed, whole)
        connect(self.quantization, self.local)
        trained = {n: p for n, p in self.local.parameters().items() if p.requires_grad}
        matrices = local.whole_matrices()
        self.optimizer = Optimizer(trained, config.optimizer, matrices, local.held)
        if device.type == "cuda" and config.precision.compute == "bf16":
            weights = itertools.chain(*map(multiplied_weights, self.local.models))
            self.optimizer.keep_rounded(weights, torch.bfloat16)
        self.routers = {n: r for model in self.local.models for n, r in routers(model).items()}
        self.state = TrainerState.fresh()
        counted = filter(self.local.counts, self.optimizer.parameters)
        self._kind_of = parameter_kinds(counted, config.model)
        self._kinds = kinds(config.model)
        self.peak_flops = peak_flops
        reliability = config.reliability
        faults = reliability.faults
        self._faults = Faults(faults, self.ranks.rank) if faults else None
        every = reliability.check_replicas_every_steps
        self._replicas = ReplicaCheck(self.local, self.optimizer, self.ranks) if every else None

    def update(
        self,
        step: int,
        batch: Batch,
        *,
        stop: StopRequest | None = None,
        watch: Stopwatch | None = None,
    ) -> StepResult:
        """Do the optimizer step with this index, counted from 0, on this rank's rows.

        `stop` says whether this rank is to stop after it; the result, whether any rank is. `watch`
        goes on measuring what began with the reading of the batch.
        """
        config, watch = self.config, watch or Stopwatch(self.device, self.progress, step)
        if self._faults is not None:
            self._faults.strike(step, self.local)
        watch.begin("wait")
        counts, num_tokens = self._sum_counts(batch)  # of the whole step, before any backward

        watch.begin("forward_backward")
        self.optimizer.zero_grad()
        layers, num_experts = config.model.moe_layers, config.model.n_routed_experts
        sums = StepSums(self.objective, layers, num_experts, self.device)
        micro_batches = list(self._micro_batches(batch))
        if self.local.pipeline is not None:
            self._run_stages(step, micro_batches, counts, sums)
            micro_batches = []
        for number, (tokens, micro) in enumerate(micro_batches, start=1):
            if config.precision.quantizes:
                self.quantization.begin(step, tokens)
            is_last = number == len(micro_batches)
            self.local.sync_gradients(is_last or config.parallel.sync_every_micro_batch)
            terms, routing = compute_sums(self.objective, self.model, micro.to(self.device))
            self.objective.combine(terms, counts).backward()
            sums.add(terms, routing)
            self.progress.move()
        self.local.finish_gradients()
        gradients = self.optimizer.gradients()
        squares = squares_by_kind(gradients, self._kind_of, self._kinds)
        is_asked = stop is not None and stop.is_due(step + 1)
        others = torch.cat([squares, squares.new_tensor([is_asked])])
        watch.begin("exchange")
        others = sums.add_up(self.ranks, others, counts_loss=self.local.counts_loss)
        norms = GradientNorms(others[:-1], self._kinds)
        total = self.objective.combine(sums.terms, counts)
        # once a step the host waits for three numbers: they decide whether to update
        loss, grad_norm, stops = torch.stack([total.double(), norms.total(), others[-1]]).tolist()
        watch.begin("optimizer")
        lr, clip = self.plan.lr(step), clip_coefficient(grad_norm, config.optimizer.clip)
        is_spike = self.state.is_spike(loss, grad_norm, config.reliability.spike_sigmas)
        skips_spike = is_spike and config.reliability.spike_sigmas is not None
        skip = _reason_to_skip(counts, loss, grad_norm, skips_spike=skips_spike)
        if skip is None:
            self.optimizer.step(lr, clip)
            for name, router in self.routers.items():
                if not router.weight.requires_grad:
                    continue  # a frozen router chooses as before
                router.update_bias(sums.load[name], config.optimizer.router_bias_update_rate)
        self.state.advance(num_tokens, loss, grad_norm, skip)
        watch.begin(None)
        return StepResult(
            counts=counts,
            tokens=num_tokens,
            seq_len=batch.input_ids.shape[1],
            sums=sums,
            norms=norms,
            loss=loss,
            grad_norm=grad_norm,
            clip=clip,
            lr=lr,
            skip=skip,
            spike=is_spike,
            stop=stops > 0,
            watch=watch,
        )

    def _micro_batches(self, batch: Batch) -> Iterator[tuple[Numbers, Batch]]:
        """Yield what is computed at once of this rank's rows, with the numbers of its tokens."""
        num_rows, length = batch.input_ids.shape
        at_once = self.config.rows_at_once(length)
        first = self.local.batch_rank * num_rows
        for micro in self.local.share_rows(batch).split(at_once):
            rows = micro.input_ids.shape[0]
            yield self.local.token_numbers(first, rows, length), micro
            first += rows

    def _run_stages(
        self, step: int, micro_batches: list[tuple[Numbers, Batch]], counts: Tensor, sums: StepSums
    ) -> None:
        """Run the micro-batches of a step forward and backward through the stages of a pipeline."""
        assert self.local.pipeline is not None

        def share(
            model: HybridLM, hidden: Tensor | None, batch: Batch, routing: list[RoutingStats]
        ) -> Tensor:
            terms = self.objective.sums(model, hidden, batch, routing)
            sums.add(terms, routing)
            self.progress.move()
            return self.objective.combine(terms, counts)

        # every call of a layer draws other bits, so the micro-batches may share their numbers
        self.quantization.begin(step, micro_batches[0][0])
        self.local.pipeline.step([micro.to(self.device) for _, micro in micro_batches], share)

    def _sum_counts(self, batch: Batch) -> tuple[Float[Tensor, " terms"], int]:
        """Return the counts of the terms and the tokens, over all ranks that read other rows."""
        counts = self.objective.counts(batch)
        values = torch.cat([counts, counts.new_tensor([batch.labels.numel()])])
        if self.mesh is not None:
            values = self.ranks.sum(values.to(self.device), self.mesh.group("batch")).cpu()
        return values[:-1], int(values[-1])

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor that a resume needs, under its name in a checkpoint."""
        return snapshot(self.local, self.optimizer, self.quantization)

    def saved_state(self) -> SavedState:
        """Return a copy of everything else that a resume needs."""
        return SavedState(
            trainer=Counters(**copy.deepcopy(vars(self.state))), data=self.batches.state()
        )

    def restore(self, info: CheckpointInfo) -> None:
        """Put every tensor and counter of a checkpoint in place.

        Raises:
            UserError: when the checkpoint does not fit the model, or the batches before it were
                others.
        """
        saved = read_state(info)
        if saved.trainer is None or saved.data is None:
            raise UserError(
                f"holds weights only, nothing to go on from; "
                f"start a new run with init_from: {info.folder}.",
                where=str(info.folder),
            )
        self.batches.restore(saved.data, info.step)
        tensors, stored = self.tensors(), SavedTensors(info)
        # a run that was in another format then has no scales there
        for name in stored.lacking(self.quantization.tensors()):
            self.quantization.forget(name)
            del tensors[name]
        stored.load(tensors)
        self.local.drop_gathered()
        torch.set_rng_state(tensors[RNG])
        self.state = TrainerState(**copy.deepcopy(vars(saved.trainer)))
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
        config = self.config
        flops = training_flops_per_token(config.model, result.seq_len, config.num_depths)
        return {
            **result.values(self.routers, self.peak_flops / flops),
            **self.batches.metrics(step + 1),
            **self.quantization.metrics(),
            "skipped_steps": self.state.skipped_steps,
            **memory_values(self.device),
        }


def _reason_to_skip(
    counts: Tensor, loss: float, grad_norm: float, *, skips_spike: bool
) -> Skip | None:
    if not counts[0]:
        return Skip.NO_TARGETS
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return Skip.NOT_FINITE
    return Skip.SPIKE if skips_spike else None
