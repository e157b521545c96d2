"""Embedding, head and loss where each rank holds some rows of the vocabulary.

Hidden states are this rank's tokens, [B, T / ranks, D]; ids and labels are those of the whole row.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nemotron.ops.linear_cross_entropy import loss_per_token, summed_loss
from nemotron.parallel.collectives import Group, all_gather, gather, reduce_scatter


@dataclass(frozen=True)
class Vocabulary:
    """The ranks that share the table, and this one's place among them; all hold as many rows."""

    group: Group
    rank: int
    size: int

    def embed(
        self, ids: Int[Tensor, "B T"], weight: Float[Tensor, "V D"]
    ) -> Float[Tensor, "B Tl D"]:
        """Return the embeddings of this rank's tokens; their gradient has the table's dtype."""
        row, held = find(ids, weight.shape[0], self.rank, self.size)
        found = F.embedding(row, weight).masked_fill(~held.unsqueeze(-1), 0)
        return reduce_scatter(found, 1, self.group).clone()  # FSDP wants no view of a unit

    def loss(
        self,
        hidden: Float[Tensor, "B Tl D"],
        weight: Float[Tensor, "V D"],
        labels: Int[Tensor, "B T"],
        weights: Float[Tensor, "B T"] | None,
    ) -> Float[Tensor, ""]:
        """Return the summed cross entropy of all ranks' tokens, the same on every rank."""
        # each rank's gradient is that of its logits; the gather's adds them up
        whole = all_gather(hidden, 1, self.group).flatten(0, 1)
        flat = None if weights is None else weights.flatten()
        return summed_loss(whole, weight, labels.flatten(), flat, self.cross_entropy)

    def token_logprobs(
        self,
        hidden: Float[Tensor, "B Tl D"],
        weight: Float[Tensor, "V D"],
        labels: Int[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        """Return the log-probabilities of all ranks' tokens, the same on every rank.

        The gradient that comes back must also be the same on every rank.
        """
        whole = all_gather(hidden, 1, self.group).flatten(0, 1)
        losses = loss_per_token(whole, weight, labels.flatten(), self.cross_entropy)
        return -losses.view(labels.shape)

    def cross_entropy(
        self, logits: Float[Tensor, "M V"], target: Int[Tensor, "M 1"], needs_slope: bool
    ) -> tuple[Float[Tensor, "M 1"], Float[Tensor, "M V"] | None]:
        """Do what `chunked.cross_entropy` does, with logits of this rank's part only."""
        row, held = find(target, logits.shape[1], self.rank, self.size)
        picked = logits.gather(1, row).masked_fill_(~held, 0)
        own = torch.stack([logits.logsumexp(1, keepdim=True), picked])  # [2, M, 1]
        # one collective where a maximum, a sum and the target's logit would take three
        shifts, picked = gather(own, 2, self.group)  # [M, ranks]
        shift = shifts.logsumexp(1, keepdim=True)
        losses = shift - picked.sum(1, keepdim=True)
        if not needs_slope:
            return losses, None
        slope = logits.sub_(shift).exp_()  # softmax
        return losses, slope.scatter_add_(1, row, -held.to(slope.dtype))

    def logits(
        self, hidden: Float[Tensor, "B Tl D"], weight: Float[Tensor, "Vl D"]
    ) -> Float[Tensor, "B T V"]:
        """Return the logits of all ranks' tokens over the whole vocabulary, without a gradient."""
        whole = gather(hidden.detach(), 1, self.group)
        return gather(F.linear(whole, weight.detach().to(whole.dtype)), 2, self.group)


def find(
    ids: Int[Tensor, "*batch"], rows: int, rank: int, size: int
) -> tuple[Int[Tensor, "*batch"], Bool[Tensor, "*batch"]]:
    """Return the row of each id in a rank's part of the table, and whether the part has the id.

    An id that is elsewhere gets some row of the part, not always the same one, since gradients of
    equal rows are summed one after the other. An id outside the vocabulary belongs to the rank at
    that end, where the look-up fails.
    """
    held = ids.div(rows, rounding_mode="floor").clamp(0, size - 1) == rank
    return torch.where(held, ids - rank * rows, ids % rows), held
