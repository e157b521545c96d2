"""Put the layers that share rows in the place of those that hold them whole."""

from collections.abc import Callable

import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from nemotron.model.attention import Attention
from nemotron.model.hybrid import HybridLM
from nemotron.model.mamba2 import ConvAndScan, Mamba2
from nemotron.parallel.collectives import Group
from nemotron.parallel.config import ParallelConfig
from nemotron.parallel.context.attention import ContextAttention
from nemotron.parallel.context.head_exchange import HeadExchange
from nemotron.parallel.context.state_passing import StatePassing

CONV_AND_SCAN: dict[str, Callable[[Group], ConvAndScan]] = {
    "state_passing": StatePassing,
    "all_to_all": HeadExchange,
}
"""What `parallel.mamba_context` names."""


def apply_context(model: HybridLM, group: Group, config: ParallelConfig) -> None:
    """Let the ranks of the group share rows, each with the tokens that `chunks.shard` gives it."""
    scan, core = CONV_AND_SCAN[config.mamba_context](group), ContextAttention(group)
    for module in model.modules():
        if isinstance(module, Mamba2):
            module.conv_and_scan = scan
        elif isinstance(module, Attention):
            module.core = core


class SumOverRow:
    """Adds up the load that the ranks of a group counted, for `Router.sum_over_row`."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def __call__(self, load: Float[Tensor, "B E"]) -> Float[Tensor, "B E"]:
        total = load.clone()
        dist.all_reduce(total, group=self.group)
        return total
