"""Sections of a reinforcement-learning recipe."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nemotron.section import Section


class AdvantageConfig(Section):
    """How the reward of an answer is compared with those of the others."""

    baseline: Literal["group", "loo", "none"] = "loo"
    """What is taken off: the mean of all answers to the prompt, of the other ones, or nothing."""
    scale: Literal["group", "loo", "mean", "batch", "none"] = "loo"
    """What it is divided by: the standard deviation of all answers to the prompt or of the other
    ones, the mean of all (MaxRL), the deviation over the whole batch (REINFORCE++), or nothing."""
    clamp: float | None = Field(None, gt=0)
    """Largest size of an advantage; absent: no limit."""


class CorrectionConfig(Section):
    """How answers of a rollout policy that differs from the trainer's are weighed.

    The weight of a token is its probability under the trainer's weights before the update, over
    the probability with which it was sampled.
    """

    kind: Literal["none", "is", "tis", "icepop", "seq-mask-tis"] = "tis"
    """none: weight 1; is: as it is; tis: clamped to the bounds; icepop: 0 outside them;
    seq-mask-tis: as it is, but 0 for answers whose geometric mean lies outside them."""
    min: float | None = Field(None, ge=0)
    """Lower bound; absent: 0."""
    max: float | None = Field(5.0, gt=0)
    """Upper bound; absent: none."""
    max_sequence_error: float | None = Field(2.0, gt=1)
    """Answers whose mean `exp |log trainer - log sampled|` is above this are left out."""

    @model_validator(mode="after")
    def _check(self) -> "CorrectionConfig":
        if self.max is not None and (self.min or 0) > self.max:
            raise ValueError(f"min = {self.min} is above max = {self.max}; lower it")
        return self


class PolicyConfig(Section):
    """The policy loss of each token, and how tokens are averaged."""

    kind: Literal["ppo", "gspo", "cispo", "reinforce"] = "ppo"
    """ppo: clipped ratio of each token (GRPO, DAPO); gspo: clipped ratio of each answer; cispo:
    log-probability times the clipped ratio; reinforce: log-probability, without a ratio."""
    on_policy: bool = False
    """Whether the ratio is 1 by definition, for one update per rollout batch."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    """The ratio is clipped from below at 1 minus this."""
    clip_high: float = Field(0.2, gt=0)
    """The ratio is clipped from above at 1 plus this."""
    dual_clip: float | None = Field(None, gt=1)
    """Largest loss of a token of a bad answer, in units of its advantage; absent: no limit."""
    average: Literal["token", "sequence"] = "token"
    """What has equal weight: every token of the batch (DAPO), or every answer (GRPO's paper)."""
    kl_coefficient: float = Field(0.0, ge=0)
    """Factor of the divergence from the weights that the run began with."""
    kl_kind: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that divergence (Schulman 2020)."""
    correction: CorrectionConfig = CorrectionConfig()
    """Difference between the rollout policy and the trainer's."""

    @model_validator(mode="after")
    def _check(self) -> "PolicyConfig":
        if self.kind == "gspo" and self.average != "sequence":
            raise ValueError("kind = gspo has one ratio for each answer; use average: sequence")
        if self.kind == "cispo" and self.average != "token":
            raise ValueError("kind = cispo weighs tokens; use average: token")
        return self


class EnvironmentConfig(Section):
    """One environment, and how often its tasks come."""

    name: str = Field(min_length=1)
    """Name of a built-in environment."""
    weight: float = Field(1.0, gt=0)
    """Share of the prompts, relative to the other environments."""
    level: Annotated[float, Field(ge=0)] = 0.0
    """Difficulty of the tasks, from 0."""
