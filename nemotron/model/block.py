"""One layer of the stack: a norm, one mixer, and the residual around them."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nemotron.model.attention import Attention
from nemotron.model.config import ModelConfig
from nemotron.model.linear import MLP, RMSNorm
from nemotron.model.mamba2 import Mamba2
from nemotron.model.moe import MoE
from nemotron.model.router import Choice, FirstRun, RoutingStats
from nemotron.model.state import AttentionState, MambaState
from nemotron.ops.recompute import Saving, keeping_all


class Block(nn.Module):
    """hidden + mixer(norm(hidden)), with the mixer that the pattern's letter names.

    With `recompute`, backward computes activations again; without, `saving` decides what is kept.
    """

    def __init__(self, config: ModelConfig, letter: str) -> None:
        super().__init__()
        self.letter = letter
        self.recompute = False
        self.saving: Saving = keeping_all
        self.norm = RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mixer: nn.Module
        if letter == "M":
            self.mixer = Mamba2(config)
        elif letter == "*":
            self.mixer = Attention(config)
        elif letter == "E":
            self.mixer = MoE(config)
        else:
            assert letter == "-", letter
            assert config.intermediate_size is not None
            self.mixer = MLP(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        hidden: Float[Tensor, "B T D"],
        seq_idx: Int[Tensor, "B T"] | None = None,
        state: MambaState | AttentionState | None = None,
        stats_name: str | None = None,
        padding: Bool[Tensor, "B S"] | None = None,
        choice: Choice | None = None,
        first_run: FirstRun | None = None,
    ) -> tuple[Float[Tensor, "B T D"], RoutingStats | None]:
        """Apply the layer; the second result is the router's statistics if they were asked for.

        They leave out the tokens of the whole rows that are `padding`. `choice` is for routers.
        """
        if self.recompute and first_run is None and torch.is_grad_enabled():
            # statistics are a result, so the second run does not count again; nor does it choose
            # experts again, since another choice would send other tokens to other ranks
            inputs = (hidden, seq_idx, state, stats_name, padding, choice, FirstRun())
            return checkpoint(Block.forward, self, *inputs, use_reentrant=False)
        with self.saving():
            (hidden, x), stats = self.norm.beside(hidden), None
            if self.letter in "M*":
                y = self.mixer(x, seq_idx, state)
            elif isinstance(self.mixer, MoE):
                y, stats = self.mixer(x, stats_name, padding, choice, first_run)
            else:
                # a stand-in for decoding
                y = self.mixer(x, choice) if self.letter == "E" else self.mixer(x)
            return hidden + y, stats
