"""Sections of recipes that learn from conversations: fine-tuning and distillation."""

from typing import Literal

from pydantic import Field

from nemotron.data.config import ChatDataConfig, ConversationDataConfig
from nemotron.posttrain.loss_config import FurtherLossConfig, further_tuning
from nemotron.section import Section
from nemotron.train.config import TextConfig, TuneConfig


class TunedConfig(TextConfig):
    """What the recipe of every stage has that goes on training a model on conversations."""

    data: ConversationDataConfig
    """Conversations and rows."""
    tune: TuneConfig = TuneConfig()
    """Which parameters are trained."""

    @property
    def tuning(self) -> TuneConfig:
        """What `tune` says; a block for prediction further ahead that is not unrolled is frozen."""
        return further_tuning(self, self.num_depths, self.tune)


class ChatRunConfig(TunedConfig):
    """What the recipe of every stage has that learns what the assistant says."""

    data: ChatDataConfig
    """Conversations and rows."""
    loss: FurtherLossConfig = FurtherLossConfig()
    """Weights of the loss terms."""


class SftConfig(ChatRunConfig):
    """Everything that makes one run of supervised fine-tuning."""

    stage: Literal["sft"] = "sft"
    """Kind of training."""


class DistillationConfig(Section):
    """How the student is compared with the teacher, at every token with a label."""

    kind: Literal["forward", "reverse"] = "forward"
    """Divergence of the student from the teacher (forward), or of the teacher from the student."""
    temperature: float = Field(1.0, gt=0)
    """Both distributions are taken at it, and the divergence is multiplied by its square."""
    top_k: int | None = Field(None, gt=0)
    """Likeliest tokens of the teacher that are compared one by one, all others as one; absent: the
    whole vocabulary."""
    cross_entropy: float = Field(0.0, ge=0)
    """Factor of the cross entropy of the labels beside the divergence."""


class StudentQuantizationConfig(Section):
    """Quantization-aware distillation: the student computes as a quantized folder does."""

    like: str
    """Folder from `nemotron quantize`, whose formats and scales the student has, fixed."""


class DistillConfig(ChatRunConfig):
    """Everything that makes one run of distillation."""

    stage: Literal["distill"] = "distill"
    """Kind of training."""
    teacher: str
    """Run, checkpoint or exported folder to learn from; each rank holds all of it."""
    distillation: DistillationConfig = DistillationConfig()
    """Comparison with the teacher."""
    quantization: StudentQuantizationConfig | None = None
    """Absent: the student computes as `precision` says."""
