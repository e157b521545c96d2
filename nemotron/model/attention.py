"""Grouped-query attention without positions: order comes from the Mamba layers."""

from typing import Protocol

from jaxtyping import Float, Int
from torch import Tensor, nn

from nemotron.model.config import ModelConfig
from nemotron.model.linear import Linear
from nemotron.model.state import AttentionState
from nemotron.ops.attention import AttentionOp, attention


class AttentionCore(Protocol):
    """Attention over heads where ranks share a row."""

    def __call__(
        self,
        attention: AttentionOp,
        q: Float[Tensor, "B T Hq Dh"],
        k: Float[Tensor, "B S Hkv Dh"],
        v: Float[Tensor, "B S Hkv Dh"],
        *,
        seq_idx: Int[Tensor, "B T"] | None,
    ) -> Float[Tensor, "B T Hq Dh"]:
        """Attend causally to the whole row, by means of the layer's operation."""


class Attention(nn.Module):
    """Causal softmax attention; query head i reads key-value head i // (Hq / Hkv)."""

    core: AttentionCore | None
    """Absent: a row is whole."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, queries)
        self.k_proj = Linear(config.hidden_size, keys)
        self.v_proj = Linear(config.hidden_size, keys)
        self.o_proj = Linear(queries, config.hidden_size)
        self.attention = attention
        self.core = None

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        seq_idx: Int[Tensor, "B T"] | None = None,
        state: AttentionState | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Attend within the row; with `state`, also to what was seen before."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(self.attend(q, k, v, seq_idx, state))

    def attend(
        self,
        q: Float[Tensor, "B T Q"],
        k: Float[Tensor, "B T K"],
        v: Float[Tensor, "B T K"],
        seq_idx: Int[Tensor, "B T"] | None,
        state: AttentionState | None,
    ) -> Float[Tensor, "B T Q"]:
        """Do what lies between the projections; the channels of the heads lie side by side."""
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))  # [B, T, heads, Dh]
        if state is not None:
            assert seq_idx is None, "a cached row is one document"
            assert self.core is None, "nothing is generated from rows that ranks share"
            k, v, lengths = state.append(k, v)
            return self.attention(q, k, v, lengths=lengths).flatten(2)
        if self.core is None:
            return self.attention(q, k, v, seq_idx=seq_idx).flatten(2)
        return self.core(self.attention, q, k, v, seq_idx=seq_idx).flatten(2)
