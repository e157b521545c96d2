"""Layers whose weights lie in blocks, as compiled steps over a few tokens read them.

Calls that such a step does not take pass through these layers. Many tokens are multiplied by a copy
of the weights in the usual layout, which costs little beside their products.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nemotron.generate.module_copies import take_over
from nemotron.model.moe import Experts, MoE
from nemotron.model.router import Choice
from nemotron.ops.token_step import TokenStepOp
from nemotron.ops.token_step.stack import Matrix

FEW_TOKENS = 32
"""Up to so many, the blocks themselves are read."""


class BlockLinear(nn.Module):
    """Matrix product without bias, its weight in blocks."""

    def __init__(self, weight: Float[Tensor, "O I"], operation: TokenStepOp) -> None:
        super().__init__()
        self.matrix = Matrix.of(weight, weight.dtype)
        self.token_step = operation

    def forward(self, x: Float[Tensor, "*batch I"]) -> Float[Tensor, "*batch O"]:
        if x.numel() <= FEW_TOKENS * x.shape[-1]:
            return self.token_step.multiply(x, self.matrix)
        return F.linear(x, self.matrix.dense())


class BlockMoE(nn.Module):
    """A mixture whose experts' weights lie in blocks."""

    def __init__(self, moe: MoE, operation: TokenStepOp) -> None:
        super().__init__()
        self.moe, self.token_step = moe, operation
        self.up, self.down = (
            Matrix.of(part, part.dtype) for part in (moe.experts.up_proj, moe.experts.down_proj)
        )
        moe.experts = _DenseExperts(moe.experts, self.up, self.down)

    def forward(
        self, x: Float[Tensor, "B T D"], choice: Choice | None = None
    ) -> Float[Tensor, "B T D"]:
        tokens, moe = x.flatten(0, 1), self.moe
        if tokens.shape[0] > FEW_TOKENS:
            return moe(x, choice=choice)[0]
        routing = moe.gate(tokens, choice)
        latent = tokens if moe.fc1_latent_proj is None else moe.fc1_latent_proj(tokens)
        routed = torch.zeros_like(latent, dtype=torch.float32)
        for expert in routing.experts.unique().tolist():
            token, place = (routing.experts == expert).nonzero(as_tuple=True)
            up, down = (Matrix(m.blocks[expert], m.num_outputs) for m in (self.up, self.down))
            hidden = self.token_step.multiply(latent[token], up).float().relu().square()
            hidden = (hidden * routing.weights[token, place, None]).to(x.dtype)
            routed[token] += self.token_step.multiply(hidden, down)
        routed = routed.to(x.dtype)
        if moe.fc2_latent_proj is not None:
            routed = moe.fc2_latent_proj(routed)
        return routed.view_as(x) + moe.shared_experts(x)


class _DenseExperts(Experts):
    """Experts that are copied into the usual layout for each call."""

    def __init__(self, experts: Experts, up: Matrix, down: Matrix) -> None:
        take_over(self, experts)
        del self._parameters["up_proj"], self._parameters["down_proj"]
        self._up, self._down = up, down

    @property
    def up_proj(self) -> Tensor:  # type: ignore[override]
        """The matrices onto the experts' widths."""
        return self._up.dense()

    @property
    def down_proj(self) -> Tensor:  # type: ignore[override]
        """The matrices back."""
        return self._down.dense()
