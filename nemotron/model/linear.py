"""Leaves of the model: they keep float32 master weights and compute in the dtype of their input."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nemotron.ops.linear import linear
from nemotron.ops.linear_cross_entropy import linear_cross_entropy
from nemotron.ops.rms_norm import rms_norm


class Linear(nn.Module):
    """Matrix product without bias; the weight is cast to the dtype of the input."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.linear = linear

    def forward(self, x: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch O"]:
        return self.linear(x, self.weight)


class Head(Linear):
    """The language-model head: logits, or loss and log-probabilities without holding all logits."""

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size, vocab_size)
        self.linear_cross_entropy = linear_cross_entropy

    def loss(
        self,
        hidden: Float[Tensor, "B T D"],
        labels: Int[Tensor, "B T"],
        weights: Float[Tensor, "B T"] | None = None,
        detach: bool = False,
    ) -> Float[Tensor, ""]:
        """Return the summed cross entropy in nats; `detach` keeps gradients out of the head."""
        weight = self.weight.detach() if detach else self.weight
        flat = None if weights is None else weights.flatten()
        return self.linear_cross_entropy(hidden.flatten(0, 1), weight, labels.flatten(), flat)

    def token_logprobs(
        self, hidden: Float[Tensor, "B T D"], labels: Int[Tensor, "B T"], temperature: float = 1.0
    ) -> Float[Tensor, "B T"]:
        """Return the log-probability in nats of each label at a temperature; 0 without a label.

        The logits of all tokens never exist at once; backward computes them again.
        """
        scaled = (hidden / temperature).flatten(0, 1)
        losses = self.linear_cross_entropy(scaled, self.weight, labels.flatten(), reduction="none")
        return -losses.view(labels.shape)


class RMSNorm(nn.Module):
    """Root-mean-square normalization with a plain gain."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.rms_norm = rms_norm

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return self.rms_norm(x, self.weight, self.eps)


class Embedding(nn.Module):
    """A row of the table for each token; the gradient is summed in the table's dtype."""

    def __init__(self, num_rows: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, size))

    def forward(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch D"]:
        return F.embedding(ids, self.weight)
