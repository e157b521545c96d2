"""Several candidates at each place of a text, joined into one embedding."""

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.model.linear import Linear


class CandidateNet(Linear):
    """Joins the embeddings of K candidates; it begins as their mean.

    Equal candidates then have the embedding of one, from which a trained trunk goes on.
    Source: FastCorrect 2 (arXiv 2109.14420), section 3.2.
    """

    def __init__(self, hidden_size: int, candidates: int) -> None:
        super().__init__(candidates * hidden_size, hidden_size)

    def forward(self, embedded: Float[Tensor, "B T KD"]) -> Float[Tensor, "B T D"]:
        return super().forward(embedded)


def mean_of(shape: torch.Size) -> Float[Tensor, "D KD"]:
    """Return the first weight: that of the mean."""
    size, width = shape
    count = width // size
    return torch.eye(size).repeat(1, count) / count
