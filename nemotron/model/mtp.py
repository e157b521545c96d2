"""Multi-token prediction: one block, applied once for each token further ahead."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nemotron.model.block import Block
from nemotron.model.cache import CachedRows
from nemotron.model.config import ModelConfig
from nemotron.model.linear import Linear, RMSNorm
from nemotron.model.router import RoutingStats


class MTP(nn.Module):
    """The shared block: joins embedding and hidden state, mixes, normalises.

    Released checkpoints keep the joining layers inside the first inner layer and the last norm
    inside the last one, so the modules live there.
    Source: NVIDIA/Megatron-LM: megatron/core/transformer/multi_token_prediction.py.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_epsilon
        self.layers = nn.ModuleList(Block(config, letter) for letter in config.mtp_pattern)
        first, last = self.layers[0], self.layers[-1]
        first.enorm = RMSNorm(size, eps)
        first.hnorm = RMSNorm(size, eps)
        first.eh_proj = Linear(2 * size, size)
        last.final_layernorm = RMSNorm(size, eps)

    def forward(
        self,
        embedding: Float[Tensor, "B T D"],
        hidden: Float[Tensor, "B T D"],
        seq_idx: Int[Tensor, "B T"] | None,
        *,
        cache: CachedRows | None = None,
        has_stats: bool = False,
        padding: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], list[RoutingStats]]:
        """Predict one token further from the depth before and the next token's embedding.

        `cache` holds what the block, apart from the backbone, remembers of the rows; their places
        are those of `hidden`. With `has_stats` the second result holds the routers' statistics,
        without `padding`.
        """
        first, last = self.layers[0], self.layers[-1]
        part = first.get_submodule
        joined = torch.cat([part("enorm")(embedding), part("hnorm")(hidden)], dim=-1)
        x = part("eh_proj")(joined)
        routing = []
        if cache is not None:
            cache.begin(x.shape[1])
        for index, layer in enumerate(self.layers):
            name = f"mtp.layers.{index}" if has_stats else None
            state = cache.layers[index] if cache is not None else None
            x, stats = layer(x, seq_idx, state, name, padding)
            if stats is not None:
                routing.append(stats)
        if cache is not None:
            cache.end(x.shape[1])
        return last.get_submodule("final_layernorm")(x), routing
