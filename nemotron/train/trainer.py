"""The training loop: what happens once per step, and the objects that it happens to."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nemotron.checkpoint.manifest import CheckpointInfo
from nemotron.checkpoint.read import MODEL_PREFIX, load_tensors, read_state
from nemotron.data.batch import Batch
from nemotron.data.loader import TrainingData, rows_of_rank
from nemotron.data.prefetch import Prefetcher
from nemotron.errors import UserError
from nemotron.model.block import Block
from nemotron.model.config import LAYER_KINDS
from nemotron.model.hybrid import HybridLM
from nemotron.model.router import RoutingStats, routers
from nemotron.parallel.apply import LocalModel, distribute, local_of
from nemotron.parallel.dims import resolve_dims
from nemotron.parallel.mesh import Mesh
from nemotron.parallel.quantized import connect, token_numbers
from nemotron.parallel.runtime import Ranks
from nemotron.precision.apply import Quantization
from nemotron.precision.apply import apply as apply_precision
from nemotron.train.config import PretrainConfig
from nemotron.train.course import Course
from nemotron.train.evaluate import evaluate
from nemotron.train.flops import training_flops_per_token
from nemotron.train.loss import (
    TokenCounts,
    count_tokens,
    losses,
    num_depths,
    objective,
    stage_losses,
)
from nemotron.train.metrics import Record
from nemotron.train.optimizer import (
    GradientNorms,
    Optimizer,
    clip_coefficient,
    kinds,
    parameter_kinds,
    squares_by_kind,
)
from nemotron.train.record import StepResult, Stopwatch, memory_values
from nemotron.train.state import Skip, TrainerState
from nemotron.train.sums import StepSums

SOURCES_LOGGED = 64
"""Sources up to which the tokens read from each are logged."""


class Diverged(Exception):
    """Too many steps in a row were not finite; says which, and where the numbers broke."""


@dataclass(frozen=True)
class Hooks:
    """What the loop calls: to write a line, to save, to ask whether to stop after so many steps."""

    report: Callable[[Record], None]
    save: Callable[[], None]
    stop: Callable[[int], bool]


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
        self._batches = Prefetcher(
            self._read,
            depth=config.data.prefetch_steps,
            num_steps=course.num_steps,
            pin=device.type == "cuda",
        )

    def run(self, hooks: Hooks) -> None:
        """Train to the end of the schedule, or until `hooks.stop` answers yes after a step.

        Raises:
            Diverged: when `nonfinite_limit` steps in a row were skipped for not being finite.
        """
        config, num_steps = self.config, self.course.num_steps
        for step in range(self.state.step, num_steps):
            if self.quantization.begin(step, 0):
                text = f"precision: preset {self.quantization.preset} from here on"
                hooks.report(self._record("event", {"event": text}))
            result = self.train_step(step, hooks.stop)
            is_last = step + 1 == num_steps
            if is_last or due(step, config.logging.every_steps):
                hooks.report(self._record("train", self._step_values(step, result)))
            for text in result.events():
                hooks.report(self._record("event", {"event": text}))
            held_out = self.data.validation_domains
            if held_out and (is_last or due(step, config.evaluation.every_steps)):
                hooks.report(self._record("validation", self._validation()))
            if self.state.nonfinite_in_a_row == config.nonfinite_limit:
                raise Diverged(
                    f"{config.nonfinite_limit} steps in a row were not finite, the last one step "
                    f"{step + 1}: {'; '.join(result.events())}"
                )
            if not is_last and due(step, config.checkpoint.every_steps):
                hooks.save()
            if result.stop or (not self.ranks.grouped and hooks.stop(step + 1)):
                return

    def train_step(
        self, step: int, stop: Callable[[int], bool] = lambda steps: False
    ) -> StepResult:
        """Do the optimizer step with this index, counted from 0.

        `stop` says whether this rank wants to stop after so many steps; the result, whether any.
        """
        config, watch = self.config, Stopwatch(self.device)
        batch = self._batches.take(step)
        watch.lap("data")
        counts = self._sum_counts(count_tokens(batch))  # of the whole step, before any backward
        watch.lap("wait")

        self.optimizer.zero_grad()
        sums = StepSums(
            self._depths, config.model.moe_layers, config.model.n_routed_experts, self.device
        )
        self._accumulate(step, batch, counts, sums)
        self.local.finish_gradients()
        watch.lap("forward_backward")

        gradients = self.optimizer.gradients()
        squares = squares_by_kind(gradients, self._kind_of, self._kinds)
        others = torch.cat([squares, squares.new_tensor([stop(step + 1)])])
        others = sums.add_up(self.ranks, others, counts_loss=self.local.counts_loss)
        norms = GradientNorms(others[:-1], self._kinds)
        total = sums.objective(counts, config.loss)
        # once a step the host waits for three numbers: whether to update hangs on them
        loss, grad_norm, stops = torch.stack([total.double(), norms.total(), others[-1]]).tolist()
        lr, clip = self.course.lr(step), clip_coefficient(grad_norm, config.optimizer.clip)
        skip = _reason_to_skip(counts, loss, grad_norm)
        if skip is None:
            self.optimizer.step(lr, clip)
            for name, router in self.routers.items():
                router.update_bias(sums.load[name], config.optimizer.router_bias_update_rate)
        spike = self.state.advance(self.course.timeline.tokens_per_step(step), loss, skip)
        watch.lap("optimizer")
        return StepResult(
            counts, sums, norms, loss, grad_norm, clip, lr, skip, spike, stops > 0, watch.seconds
        )

    def _accumulate(self, step: int, batch: Batch, counts: TokenCounts, sums: StepSums) -> None:
        """Add up the gradients and losses of this rank's share of a step."""
        config, rows, length = self.config, self._rows_at_once(step), batch.input_ids.shape[1]
        first_row = self.local.batch_rank * batch.input_ids.shape[0]
        portions = list(self.local.share_rows(batch).split(rows))
        if self.local.pipeline is not None:

            def share(
                model: HybridLM, hidden: Tensor | None, batch: Batch, routing: list[RoutingStats]
            ) -> Tensor:
                terms = stage_losses(model, hidden, batch, config.loss, routing)
                sums.add(terms)
                return objective(terms, counts, config.loss)

            # every call of a layer draws other bits, so the portions may share their numbers
            self.quantization.begin(step, token_numbers(first_row, rows, length, self.local))
            self.local.pipeline.step([micro.to(self.device) for micro in portions], share)
            return
        for number, micro in enumerate(portions):
            first = first_row + number * rows
            numbers = token_numbers(first, micro.input_ids.shape[0], length, self.local)
            self.quantization.begin(step, numbers)
            is_last = number + 1 == len(portions)
            self.local.sync_gradients(is_last or config.parallel.sync_every_micro_batch)
            terms = losses(self.model, micro.to(self.device), config.loss)
            objective(terms, counts, config.loss).backward()
            sums.add(terms)

    def _read(self, step: int) -> Batch:
        """Read this rank's rows of a step, with the targets of all depths."""
        share = slice(None)
        if self.mesh is not None:
            num_rows, ranks = self.data.num_rows(step), self.mesh.dims.batch
            share = rows_of_rank(num_rows, self.local.batch_rank, ranks)
        batch = self.data.batch(step, share)
        if not self.config.data.reset_documents:
            batch = replace(batch, seq_idx=None)
        return batch.look_ahead(self._depths)

    def _sum_counts(self, counts: TokenCounts) -> TokenCounts:
        """Add up over the ranks that read other rows."""
        if self.mesh is None:
            return counts
        values = torch.tensor([counts.tokens, counts.main, *counts.mtp], dtype=torch.float64)
        total = self.ranks.sum(values.to(self.device), self.mesh.group("batch")).tolist()
        return TokenCounts(total[1], tuple(total[2:]), int(total[0]))

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor that a resume needs, under its name in a checkpoint."""
        local, optimizer = self.local, self.optimizer.tensors()
        tensors = {
            f"{MODEL_PREFIX}{name}": local.pieces(name, local_of(parameter))
            for name, parameter in local.parameters().items()
        }
        tensors |= {f"{MODEL_PREFIX}{name}": buffer for name, buffer in local.buffers().items()}
        for key in ("exp_avg", "exp_avg_sq"):
            for name, moment in optimizer[key].items():
                tensors[f"optimizer.{key}.{name}"] = local.pieces(name, moment)
        tensors |= {f"optimizer.step.{name}": step for name, step in optimizer["step"].items()}
        return tensors | self.quantization.tensors() | {"rng.cpu": torch.get_rng_state()}

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
        load_tensors(info, tensors)
        torch.set_rng_state(tensors["rng.cpu"])
        self.state = TrainerState(**saved["trainer"])
        self.quantization.begin(max(0, self.state.step - 1), 0)

    def _record(self, kind: str, values: Record) -> Record:
        state = self.state
        return {"kind": kind, "step": state.step, "data/tokens": state.tokens, **values}

    def _rows_at_once(self, step: int) -> int:
        """Return the rows of a portion: as many tokens as `micro_batch` rows of `data.seq_len`."""
        tokens = self.config.batch.micro_batch * self.config.data.seq_len
        return max(1, tokens // self.data.seq_len(step))

    def _step_values(self, step: int, result: StepResult) -> Record:
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

    def _validation(self) -> Record:
        budget, rows = self.config.evaluation.tokens, self.config.batch.micro_batch
        return {**evaluate(self.local, self.data, self.ranks, tokens=budget, rows=rows)}


def build_model(
    config: PretrainConfig, device: torch.device, mesh: Mesh | None = None
) -> LocalModel:
    """Build what this rank holds of the recipe's model, with fresh weights."""

    def build() -> HybridLM:
        # on meta first, so that no memory is spent on what other ranks hold
        with torch.device("meta"):
            model = HybridLM(config.model)
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


def due(step: int, every: int | None) -> bool:
    """Say whether something that comes every so many steps comes after the step of this index."""
    return every is not None and (step + 1) % every == 0


def _reason_to_skip(counts: TokenCounts, loss: float, grad_norm: float) -> Skip | None:
    if not counts.main:
        return Skip.NO_TARGETS
    return None if math.isfinite(loss) and math.isfinite(grad_norm) else Skip.NOT_FINITE
