"""The load of the experts where ranks share the tokens of a row."""

import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from nemotron.parallel.collectives import Group


class SumOverRow:
    """Adds up the load that the ranks of a group counted, for `Router.sum_over_row`."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def __call__(self, load: Float[Tensor, "B E"]) -> Float[Tensor, "B E"]:
        total = load.clone()
        dist.all_reduce(total, group=self.group)
        return total
