"""Sections of a recipe that learns to correct text in parallel."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nemotron.data.config import DataConfig, PackingConfig, SourceConfig
from nemotron.errors import RuleBroken
from nemotron.section import Section
from nemotron.train.config import LossConfig, RunConfig

Kind = Literal["tag", "ctc", "soft", "duration"]


class CorrectOptions(Section):
    """What a source becomes, and how the answers are learned."""

    kind: Kind = "tag"
    """tag: each place of the source is answered by one token or none; ctc: all tokens by runs of
    slots; soft: wrong tokens are detected, and only they are answered by runs of slots
    (SoftCorrect); duration: each token is repeated as often as predicted, then answered once
    (FastCorrect 2)."""
    copies: int = Field(3, ge=1, le=8)
    """Slots of a token that is answered by a run (kinds ctc and soft)."""
    mask_rate: float = Field(0.2, ge=0, lt=1)
    """Share of the places that are right in all candidates that are hidden in training; others are
    hidden in each pass."""
    pseudo_errors: float = Field(0.05, ge=0, le=1)
    """Share of the right tokens that are answered by a run as if they were wrong (kind soft)."""
    first_pseudo_errors: float = Field(0.3, ge=0, le=1)
    """The same in the first steps."""
    first_steps: int = Field(0, ge=0)
    """Steps in which `first_pseudo_errors` is the share."""
    anti_copy: float = Field(1.0, ge=0)
    """Weight, in the detector's loss, of the answer that a token is right (kind soft)."""
    keep_loss: float = Field(1.0, ge=0)
    """Weight of the cross entropy at tokens that are kept (kind soft)."""
    duration_coeff: float = Field(0.5, ge=0)
    """Weight of the squared error of durations (kind duration)."""
    edit_coeff: float = Field(0.5, ge=0)
    """Weight of the cross entropy of edit flags (kind duration)."""
    candidate_coeff: float = Field(0.5, ge=0)
    """Weight of the squared error of the predicted loss of a candidate (kind duration)."""
    max_duration: int = Field(3, ge=1)
    """Longest duration that is predicted (kind duration)."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Probability that is spread over all tokens (kinds soft and duration)."""
    threshold: float | None = Field(None, le=0)
    """Log-probability below which a token is answered anew (kind soft); absent: the one with the
    best F1 on held-out pairs, found at each evaluation."""
    acoustic_weight: float = Field(0.0, ge=0)
    """Weight of the scores that come with the candidates, beside the log-probabilities."""


class CorrectDataConfig(DataConfig):
    """Pairs, whole ones in each row, which do not see each other."""

    sources: Annotated[tuple[SourceConfig, ...], Field(strict=False, min_length=1)]
    """Folders from `nemotron data pairs --as rows`, with their weights."""
    packing: PackingConfig = PackingConfig(kind="best_fit", long_documents="drop")
    """How pairs are packed into rows; fixed."""
    reset_documents: bool = True
    """Whether attention, convolution and state stop at the bounds of pairs; fixed."""

    @model_validator(mode="after")
    def _check_rows(self) -> "CorrectDataConfig":
        if self.packing != PackingConfig(kind="best_fit", long_documents="drop"):
            raise RuleBroken("packing", "is kind: best_fit and long_documents: drop for pairs")
        if not self.reset_documents:
            raise RuleBroken("reset_documents", "must be true: pairs do not see each other", False)
        return self


class CorrectConfig(RunConfig):
    """Everything that makes one run of parallel correction."""

    stage: Literal["correct"] = "correct"
    """Kind of training."""
    data: CorrectDataConfig
    """Pairs and rows."""
    correct: CorrectOptions = CorrectOptions()
    """The objective."""
    loss: LossConfig = LossConfig()
    """Weights of the other terms."""

    @property
    def unshared_axes(self) -> tuple[str, ...]:
        """All but those that share weights, unless each slot has a loss of its own."""
        return super().unshared_axes if self.correct.kind == "tag" else ("pp", "cp", "tp")
