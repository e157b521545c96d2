"""Log-probabilities of given tokens under the trainer's weights, or those of a reference."""

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.data.batch import Batch
from nemotron.model.hybrid import HybridLM
from nemotron.posttrain.config import RlConfig


@torch.no_grad()
def score(
    config: RlConfig, model: HybridLM, device: torch.device, batch: Batch
) -> Float[Tensor, "B T"]:
    """Return the log-probability of each label at the rollouts' temperature; 0 without a label.

    If the weights are sharded, all ranks call this together, with as many rows of one length.
    """
    parts = []
    for micro in batch.split(config.rows_at_once(batch.labels.shape[1])):
        micro = micro.to(device)
        hidden = model(micro.input_ids, micro.seq_idx)
        logprobs = model.lm_head.token_logprobs(hidden, micro.labels, config.rollout.temperature)
        parts.append(logprobs.float().cpu())
    return torch.cat(parts)
