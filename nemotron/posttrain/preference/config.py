"""Sections of a recipe that learns from pairs of answers."""

from typing import Literal

from pydantic import Field, model_validator

from nemotron.data.config import PreferenceDataConfig
from nemotron.errors import RuleBroken
from nemotron.posttrain.sft_config import TunedConfig
from nemotron.section import Section
from nemotron.train.config import LossConfig


class DpoOptions(Section):
    """Weights of the terms, and how log-probabilities of an answer become one number."""

    reference_policy_kl_penalty: float = Field(0.05, gt=0)
    """Beta: how much an answer's log-probability counts against that of the reference."""
    preference_average_log_probs: bool = False
    """Whether rewards are means over the tokens of an answer, not sums."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Probability that the two answers of a pair are the wrong way round."""
    preference_loss_weight: float = Field(1.0, gt=0)
    """Factor of the loss of pairs."""
    sft_loss_weight: float = Field(0.0, ge=0)
    """Factor of the cross entropy of the chosen answers."""
    sft_average_log_probs: bool = False
    """Whether that is a mean over the tokens of an answer, not their sum."""


class DpoConfig(TunedConfig):
    """Everything that makes one run of direct preference optimization."""

    stage: Literal["dpo"] = "dpo"
    """Kind of training."""
    data: PreferenceDataConfig
    """Pairs of answers and rows."""
    reference: str | None = None
    """Run, checkpoint or exported folder whose log-probabilities the policy's are compared with;
    absent: `init_from`."""
    dpo: DpoOptions = DpoOptions()
    """The objective."""
    loss: LossConfig = LossConfig(moe_aux_loss_coeff=0.0)
    """Weights of the other terms. Prediction further ahead is not trained."""

    @property
    def num_depths(self) -> int:
        """None: what a rejected answer says is not to be predicted."""
        return 0

    @model_validator(mode="after")
    def _check_rows(self) -> "DpoConfig":
        if not self.data.reset_documents:
            raise RuleBroken(
                "data.reset_documents", "must be true: answers do not see each other", False
            )
        return self
