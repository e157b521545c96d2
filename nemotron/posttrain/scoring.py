"""Log-probabilities of given tokens under the trainer's weights, or those of a reference."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.data.batch import Batch
from nemotron.model.hybrid import HybridLM
from nemotron.posttrain.config import RlConfig
from nemotron.posttrain.replay import Differences, own_choices


@dataclass(frozen=True)
class Scored:
    """What a model says of the labels of some rows."""

    logprobs: Float[Tensor, "B T"]
    """At the rollouts' temperature; 0 without a label."""
    differences: Differences
    """Between the experts that were replayed and the model's own choice."""


@torch.no_grad()
def score(config: RlConfig, model: HybridLM, device: torch.device, batch: Batch) -> Scored:
    """Return the log-probability of each label, by the experts of the batch where it has some.

    If the weights are sharded, all ranks call this together, with as many rows of one length.
    """
    parts, differences = [], Differences()
    for micro in batch.split(config.rows_at_once(batch.labels.shape[1])):
        micro = micro.to(device)
        with own_choices(model.backbone) as own:
            hidden = model(micro.input_ids, micro.seq_idx, experts=micro.experts)
        if micro.experts is not None:
            differences += Differences.of(micro.experts, own)
        logprobs = model.lm_head.token_logprobs(hidden, micro.labels, config.rollout.temperature)
        parts.append(logprobs.float().cpu())
    return Scored(torch.cat(parts), differences)
