"""Auxiliary losses after pre-training, and the block of multi-token prediction that has none."""

from pydantic import Field

from nemotron.model.config import MTP_DEPTHS
from nemotron.train.config import LossConfig, RunConfig, TuneConfig


class FurtherLossConfig(LossConfig):
    """Weights of the terms beside the objective of a stage after pre-training."""

    mtp_num_depths: int = Field(MTP_DEPTHS, ge=0)
    """How many tokens ahead the multi-token-prediction block is unrolled in training; 0: the block
    stays as it is."""


def further_tuning(config: RunConfig, num_depths: int, tune: TuneConfig) -> TuneConfig:
    """Return what is trained: as `tune` says, but a block that is not unrolled is frozen."""
    if num_depths or not config.model.mtp_pattern:
        return tune
    freeze = dict.fromkeys([*tune.freeze, "mtp"])
    return tune.model_copy(update={"freeze": tuple(freeze)})
