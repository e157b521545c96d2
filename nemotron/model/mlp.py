"""Squared-ReLU feed-forward: the dense layer `-` and the shared expert."""

from jaxtyping import Float
from torch import Tensor, nn

from nemotron.model.linear import Linear
from nemotron.ops.squared_relu import squared_relu


class MLP(nn.Module):
    """down(relu(up(x))²): no gate, no bias."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)
        self.squared_relu = squared_relu

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return self.down_proj(self.squared_relu(self.up_proj(x)))
