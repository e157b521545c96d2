"""What must become of each token of a candidate, predicted from a state that has read them all."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nemotron.model.config import EditHead
from nemotron.model.linear import Linear


class EditPredictions(NamedTuple):
    """Predictions in float32; those of a head that the model lacks are empty."""

    durations: Float[Tensor, "M K"]
    """Tokens of the answer that each token stands for."""
    edits: Float[Tensor, "M K"]
    """Logits that a token is wrong."""
    losses: Float[Tensor, "N K"]
    """Loss of the answer that each candidate as a whole would lead to."""


class Perceptron(nn.Module):
    """Two layers with a ReLU between them."""

    def __init__(self, in_features: int, width: int, out_features: int) -> None:
        super().__init__()
        self.first = Linear(in_features, width)
        self.second = Linear(width, out_features)

    def forward(self, x: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch O"]:
        return self.second(F.relu(self.first(x)))


class EditHeads(nn.Module):
    """Predictors of FastCorrect 2 on the states of this trunk, which replaces their convolutions.

    Source: arXiv 2109.14420, section 3.3; microsoft/NeuralSpeech:
    FastCorrect2/FastCorrect/fastcorrect_model.py.
    """

    def __init__(self, hidden_size: int, candidates: int, heads: Sequence[EditHead]) -> None:
        super().__init__()
        own = any(head != "candidate" for head in heads)
        self.join = Linear(2 * hidden_size, hidden_size) if own else None
        self.duration = Perceptron(hidden_size, hidden_size, 1) if "duration" in heads else None
        self.edit = Perceptron(hidden_size, hidden_size, 1) if "edit" in heads else None
        self.candidate = None
        if "candidate" in heads:
            self.candidate = Perceptron(hidden_size, hidden_size, candidates)

    def forward(
        self,
        states: Float[Tensor, "M D"],
        own: Float[Tensor, "M K D"],
        ends: Float[Tensor, "N D"],
    ) -> EditPredictions:
        """Judge tokens by the state at their place and their `own` embedding, candidates by `ends`.

        `ends` are the states at the end of the source.
        """
        empty = states.new_zeros(0, own.shape[1], dtype=torch.float32)
        durations = edits = losses = empty
        if self.join is not None:
            both = torch.cat([states.unsqueeze(1).expand_as(own), own], -1)
            joined = F.relu(self.join(both))
            if self.duration is not None:
                # most tokens stand for one token of the target
                durations = 1 + self.duration(joined).squeeze(-1).float()
            if self.edit is not None:
                edits = self.edit(joined).squeeze(-1).float()
        if self.candidate is not None:
            losses = self.candidate(ends).float()
        return EditPredictions(durations, edits, losses)
