"""Distillation as a stage: conversations, and at each label the distribution of a teacher."""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.data.batch import NO_LABEL, Batch
from nemotron.data.tokenizer import load_tokenizer
from nemotron.hf.read_scales import read_like
from nemotron.model.build import build_on_meta
from nemotron.model.hybrid import HybridLM
from nemotron.model.linear import Head
from nemotron.parallel.runtime import Ranks
from nemotron.posttrain.contents import scales_contents
from nemotron.posttrain.divergence import divergence
from nemotron.posttrain.sft_config import DistillationConfig, DistillConfig
from nemotron.posttrain.teacher import HIDDEN, TaughtBatches, load_teacher
from nemotron.precision.static import ModelScales, attach
from nemotron.train.auxiliary import Auxiliary, LanguageObjective, total_weight
from nemotron.train.build import build_local
from nemotron.train.pretraining import open_data, rehearse_data, text_batches, validate
from nemotron.train.schedule import TrainingPlan, plan_training
from nemotron.train.setup import Setup
from nemotron.train.trainer import Trainer

LIKE = "quantization.like"


@dataclass(frozen=True)
class DistillObjective(LanguageObjective):
    """Divergence from the teacher, cross entropy of the labels if it is weighed, and the rest."""

    config: DistillationConfig
    auxiliary: Auxiliary
    head: Head
    """The teacher's, frozen."""

    @property
    def factors(self) -> dict[str, float]:
        """`kl`, and `main` where it is weighed."""
        weight = self.config.cross_entropy
        return {"kl": 1.0, **({"main": weight} if weight else {})}

    def own_counts(self, batch: Batch) -> list[float]:
        """Return the weight of the labels; both terms are averaged over the same."""
        return [total_weight(batch.labels, batch.loss_weight)] * len(self.factors)

    def own_sums(
        self, model: HybridLM, hidden: Float[Tensor, "B T D"], batch: Batch
    ) -> list[Float[Tensor, ""]]:
        """Return sums of nats."""
        own = [self._divergence(model, hidden, batch)]
        if self.config.cross_entropy:
            own.append(model.lm_head.loss(hidden, batch.labels, batch.loss_weight))
        return own

    def _divergence(self, model: HybridLM, hidden: Tensor, batch: Batch) -> Float[Tensor, ""]:
        counted = batch.labels != NO_LABEL
        taught = batch.extras[HIDDEN][counted]
        weights = None if batch.loss_weight is None else batch.loss_weight[counted]

        def of_rows(logits: Tensor, which: slice) -> Tensor:
            values = divergence(logits, self.head(taught[which]), self.config)
            return (values if weights is None else values * weights[which]).sum()

        return model.lm_head.compare(hidden[counted], of_rows)


class Distillation:
    """The stage that learns from another model."""

    def plan(self, config: DistillConfig) -> TrainingPlan:
        """Return the phases of a run and their learning rates.

        Raises:
            UserError: when they contradict each other.
        """
        return plan_training(config)

    def rehearse(self, config: DistillConfig, plan: TrainingPlan) -> list[str]:
        """Open the conversations and the teacher without writing; returns lines about them.

        Raises:
            UserError: when the conversations are unfit, or the teacher has another vocabulary.
        """
        lines = rehearse_data(config, plan)
        load_teacher(config, load_tokenizer(config.data.tokenizer), torch.device("cpu"))
        if (scales := _student_scales(config, build_on_meta(config.model))) is not None:
            lines.append(f"student    {len(scales.linears):,} matrices with fixed scales")
        return lines

    def build(
        self,
        config: DistillConfig,
        plan: TrainingPlan,
        device: torch.device,
        peak_flops: float,
        ranks: Ranks,
    ) -> Setup:
        """Open the conversations, load the teacher, and build the trainer.

        Raises:
            UserError: when the conversations are unfit, or the teacher has another vocabulary.
        """
        data = open_data(config, plan, ranks)
        data.check_length()
        teacher = load_teacher(config, data.tokenizer, device)
        batches = text_batches(config, plan, data, device, ranks)
        scales = _student_scales(config, build_on_meta(config.model))
        contents = {} if scales is None else scales_contents(LIKE, _folder(config), scales)
        taught = TaughtBatches(batches, teacher, config, device, contents)
        auxiliary = Auxiliary(config.loss, config.num_depths, bool(config.model.moe_layers))
        objective = DistillObjective(config.distillation, auxiliary, teacher.lm_head)
        local = build_local(config, device, ranks)
        trainer = Trainer(config, local, objective, taught, plan, device, peak_flops, ranks)
        if scales is not None:
            # after the trainer, which gives the layers the formats of `precision`
            attach(trainer.model, scales, rounds_weights=True)
        has_held_out = bool(data.validation_domains)
        return Setup(trainer, data, (lambda: validate(trainer, data)) if has_held_out else None)


def _student_scales(config: DistillConfig, model: HybridLM) -> ModelScales | None:
    return read_like(_folder(config), model, LIKE) if config.quantization is not None else None


def _folder(config: DistillConfig) -> Path:
    assert config.quantization is not None
    return Path(config.quantization.like)
