"""The training loop: what happens once per step, and the objects that it happens to."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nemotron.checkpoint.manifest import CheckpointInfo
from nemotron.checkpoint.read import MODEL_PREFIX, load_tensors, read_state
from nemotron.data.loader import TrainingData
from nemotron.data.prefetch import Prefetcher
from nemotron.errors import UserError
from nemotron.model.block import Block
from nemotron.model.config import LAYER_KINDS
from nemotron.model.hybrid import HybridLM
from nemotron.model.router import update_router_bias
from nemotron.precision.apply import Quantization
from nemotron.precision.apply import apply as apply_precision
from nemotron.train.config import PretrainConfig
from nemotron.train.course import Course
from nemotron.train.evaluate import evaluate
from nemotron.train.flops import training_flops_per_token
from nemotron.train.loss import TokenCounts, count_tokens, losses, num_depths, objective
from nemotron.train.metrics import Record
from nemotron.train.optimizer import GradientNorms, Optimizer, clip_coefficient, parameter_kinds
from nemotron.train.record import StepResult, Stopwatch, memory_values
from nemotron.train.state import Skip, TrainerState
from nemotron.train.sums import StepSums

SOURCES_LOGGED = 64
"""Sources up to which the tokens read from each are logged."""


class Diverged(Exception):
    """Too many steps in a row were not finite; says which, and where the numbers broke."""


@dataclass(frozen=True)
class Hooks:
    """What the loop calls: to write a line, to save, to ask whether to stop after this step."""

    report: Callable[[Record], None]
    save: Callable[[], None]
    stop: Callable[[], bool]


class Trainer:
    """Model, optimizer, data and counters of one run."""

    def __init__(
        self,
        config: PretrainConfig,
        course: Course,
        data: TrainingData,
        device: torch.device,
        peak_flops: float,
    ) -> None:
        self.config, self.course, self.data, self.device = config, course, data, device
        torch.manual_seed(config.seed)
        self.model = build_model(config, device)
        self.quantization = Quantization(self.model, config.precision, config.seed)
        self.optimizer = Optimizer(self.model, config.optimizer)
        self.state = TrainerState()
        self._depths = num_depths(self.model, config.loss)
        self._kinds = parameter_kinds(self.optimizer.parameters, config.model)
        self.peak_flops = peak_flops
        self._batches = Prefetcher(
            data.batch,
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
            result = self.train_step(step)
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
            if hooks.stop():
                return

    def train_step(self, step: int) -> StepResult:
        """Do the optimizer step with this index, counted from 0."""
        config, watch = self.config, Stopwatch(self.device)
        batch = self._batches.take(step)
        if not config.data.reset_documents:
            batch = replace(batch, seq_idx=None)
        batch = batch.look_ahead(self._depths)
        counts = count_tokens(batch)  # of the whole step, before any backward
        watch.lap("data")

        self.optimizer.zero_grad()
        sums = StepSums(self._depths, self.device)
        for number, micro in enumerate(batch.split(rows := self._rows_at_once(step))):
            self.quantization.begin(step, number * rows * micro.input_ids.shape[1])
            terms = losses(self.model, micro.to(self.device), config.loss)
            objective(terms, counts, config.loss).backward()
            sums.add(terms)
        watch.lap("forward_backward")

        norms = GradientNorms(self.optimizer.gradients(), self._kinds)
        total = sums.objective(counts, config.loss)
        # once a step the host waits for two numbers: whether to update hangs on them
        loss, grad_norm = torch.stack([total, norms.total()]).tolist()
        lr, clip = self.course.lr(step), clip_coefficient(grad_norm, config.optimizer.clip)
        skip = _reason_to_skip(counts, loss, grad_norm)
        if skip is None:
            self.optimizer.step(lr, clip)
            update_router_bias(self.model, sums.load, config.optimizer.router_bias_update_rate)
        spike = self.state.advance(self.course.timeline.tokens_per_step(step), loss, skip)
        watch.lap("optimizer")
        return StepResult(
            counts, sums, norms, loss, grad_norm, clip, lr, skip, spike, watch.seconds
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor that a resume needs, under its name in a checkpoint."""
        model = {f"{MODEL_PREFIX}{name}": t for name, t in self.model.state_dict().items()}
        optimizer = {f"optimizer.{name}": t for name, t in self.optimizer.tensors().items()}
        return model | optimizer | {"rng.cpu": torch.get_rng_state()}

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
            **result.values(self.model, self.peak_flops / flops),
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
        return {**evaluate(self.model, self.data, tokens=budget, rows=rows, device=self.device)}


def build_model(config: PretrainConfig, device: torch.device) -> HybridLM:
    """Build the recipe's model with fresh weights: on meta first, so that no memory is wasted."""
    with torch.device("meta"):
        model = HybridLM(config.model)
    apply_precision(model, config.precision)
    for block in model.modules():
        if isinstance(block, Block):
            block.recompute = config.recomputes(LAYER_KINDS[block.letter])
    model.to_empty(device=device)
    if config.model.tie_word_embeddings:
        # materialising gave each of the two names a tensor of its own
        model.lm_head.weight = model.backbone.embeddings.weight
    model.init_weights(config.seed)
    return model


def due(step: int, every: int | None) -> bool:
    """Say whether something that comes every so many steps comes after the step of this index."""
    return every is not None and (step + 1) % every == 0


def _reason_to_skip(counts: TokenCounts, loss: float, grad_norm: float) -> Skip | None:
    if not counts.main:
        return Skip.NO_TARGETS
    return None if math.isfinite(loss) and math.isfinite(grad_norm) else Skip.NOT_FINITE
