"""Parts of layers: they keep float32 master weights and compute in the dtype of their input."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nemotron.model.adapter import Adapter
from nemotron.ops.linear import linear
from nemotron.ops.linear_cross_entropy import linear_cross_entropy, widened
from nemotron.ops.rms_norm import residual_rms_norm, rms_norm
from nemotron.ops.squared_relu import squared_relu

ROWS_COMPARED = 512
"""Where whole distributions are compared, the logits of so many tokens exist at a time."""


class Linear(nn.Module):
    """Matrix product without bias; the weight is cast to the dtype of the input."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.linear = linear
        self.adapter: Adapter | None = None

    def forward(self, x: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch O"]:
        y = self.linear(x, self.weight)
        return y if self.adapter is None else self.adapter(x, y, self.weight)


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

    def chosen_logprobs(
        self, hidden: Float[Tensor, "M D"], choices: Int[Tensor, "M U"]
    ) -> Float[Tensor, "M U"]:
        """Return the log-probabilities in nats of some tokens at each place, float32 or wider.

        The logits of all places never exist at once; backward computes them again.
        """

        def part(rows: Tensor, weight: Tensor, own: Tensor) -> Tensor:
            rows, weight = widened(rows, weight)
            logits = (rows @ weight.to(rows.dtype).T).to(wide)
            return logits.gather(1, own) - logits.logsumexp(1, keepdim=True)

        wide = torch.promote_types(hidden.dtype, torch.float32)
        found = [(hidden[:0].sum() + self.weight[:0].sum()).to(wide) + choices[:0].to(wide)]
        for first in range(0, hidden.shape[0], ROWS_COMPARED):
            which = slice(first, first + ROWS_COMPARED)
            arguments = (hidden[which], self.weight, choices[which])
            found.append(checkpoint(part, *arguments, use_reentrant=False))
        return torch.cat(found)

    def compare(
        self,
        hidden: Float[Tensor, "M D"],
        function: Callable[[Float[Tensor, "m V"], slice], Tensor],
    ) -> Float[Tensor, ""]:
        """Return the sum of a function of the logits, which gets some rows of them at a time.

        The logits of all rows never exist at once; backward computes them again.
        """

        def part(rows: Tensor, weight: Tensor, which: slice) -> Tensor:
            rows, weight = widened(rows, weight)
            logits = rows @ weight.to(rows.dtype).T
            return function(logits, which)

        total = (hidden[:0].sum() + self.weight[:0].sum()).float()
        for first in range(0, hidden.shape[0], ROWS_COMPARED):
            which = slice(first, first + ROWS_COMPARED)
            total = total + checkpoint(part, hidden[which], self.weight, which, use_reentrant=False)
        return total


class RMSNorm(nn.Module):
    """Root-mean-square normalization with a plain gain."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.rms_norm, self.residual_rms_norm = rms_norm, residual_rms_norm

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return self.rms_norm(x, self.weight, self.eps)

    def beside(
        self, x: Float[Tensor, "*batch D"]
    ) -> tuple[Float[Tensor, "*batch D"], Float[Tensor, "*batch D"]]:
        """Return `x` and its norm; one kernel may add their gradients."""
        if self.residual_rms_norm.takes(x):
            return self.residual_rms_norm(x, self.weight, self.eps)
        return x, self(x)


class Embedding(nn.Module):
    """A row of the table for each token; the gradient is summed in the table's dtype."""

    def __init__(self, num_rows: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, size))

    def forward(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch D"]:
        return F.embedding(ids, self.weight)


class MLP(nn.Module):
    """down(relu(up(x))²): the dense layer `-` and the shared expert; no gate, no bias."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)
        self.squared_relu = squared_relu

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return self.down_proj(self.squared_relu(self.up_proj(x)))
