"""Sections of a recipe for supervised fine-tuning."""

from typing import Literal

from pydantic import Field

from nemotron.data.config import ChatDataConfig
from nemotron.model.config import MTP_DEPTHS
from nemotron.train.config import LossConfig, TextConfig, TuneConfig


class SftLossConfig(LossConfig):
    """Weights of the terms beside cross entropy of the assistant's tokens."""

    mtp_num_depths: int = Field(MTP_DEPTHS, ge=0)
    """How many tokens ahead the multi-token-prediction block is unrolled in training; 0: the block
    stays as it is."""


class SftConfig(TextConfig):
    """Everything that makes one run of supervised fine-tuning."""

    stage: Literal["sft"] = "sft"
    """Kind of training."""
    data: ChatDataConfig
    """Conversations and rows."""
    loss: SftLossConfig = SftLossConfig()
    """Weights of the loss terms."""
    tune: TuneConfig = TuneConfig()
    """Which parameters are trained."""

    @property
    def tuning(self) -> TuneConfig:
        """What `tune` says; a block for prediction further ahead that is not unrolled is frozen."""
        if self.num_depths or not self.model.mtp_pattern:
            return self.tune
        freeze = dict.fromkeys([*self.tune.freeze, "mtp"])
        return self.tune.model_copy(update={"freeze": tuple(freeze)})
