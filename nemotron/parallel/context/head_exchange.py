"""Mamba-2 over a row that ranks share: each swaps its tokens of all heads for all tokens of some.

The whole row of a rank's heads is convolved and scanned as on one process, with slices of the
weights, and the way back is the same in reverse. A weight gets its gradient only on the rank that
used its slice, so adding up over the ranks is right. With fewer groups than ranks, B and C of a
group go to all ranks that have heads of it.

A rank receives S (cp - 1) / cp rows of P Hc + 2 N Gc activations and Hc float32 time steps, with
Hc = H / cp and Gc = max(1, G / cp), and P Hc activations come back: in bf16 for 131072 tokens of
Nemotron 3 Super on 8 ranks 287 + 224 MiB, against 56 MiB of states (`state_passing`); it is
for short rows and few ranks, and cp can be at most H. The gate z stays where it is.

Source: NVIDIA/Megatron-LM: megatron/core/ssm/mamba_context_parallel.py.
"""

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.model.mamba2 import Mamba2
from nemotron.model.state import MambaState
from nemotron.parallel.collectives import Group, all_to_all, gather
from nemotron.parallel.context.chunks import in_rank_order, in_row_order


class HeadExchange:
    """A `ConvAndScan` for one rank's two chunks of each row."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.one_each = [1] * self.size

    def __call__(
        self,
        mixer: Mamba2,
        xBC: Float[Tensor, "B Tl C"],
        dt: Float[Tensor, "B Tl H"],
        seq_idx: Int[Tensor, "B Tl"] | None,
        state: MambaState | None,
    ) -> Float[Tensor, "B Tl I"]:
        assert state is None, "nothing is generated from rows that ranks share"
        if seq_idx is not None:
            seq_idx = in_row_order(gather(seq_idx, 1, self.group), self.size)
        weight, bias = mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias
        mixed = mixer.causal_conv1d(
            self._tokens_of_own_heads(self._channels_by_rank(mixer, xBC)),
            self._own_channels(mixer, weight.T).T,
            None if bias is None else self._own_channels(mixer, bias[None])[0],
            seq_idx=seq_idx,
        )  # [B, T, Cc]
        heads = mixer.num_heads // self.size
        groups = max(1, mixer.num_groups // self.size)
        bc = groups * mixer.state_size
        x, B, C = mixed.split([heads * mixer.head_dim, bc, bc], dim=-1)
        own = slice(self.rank * heads, (self.rank + 1) * heads)
        y = mixer.ssd(
            x.unflatten(-1, (heads, -1)),
            self._tokens_of_own_heads(dt.unflatten(-1, (self.size, -1))),
            -mixer.A_log[own].exp(),
            B.unflatten(-1, (groups, -1)),
            C.unflatten(-1, (groups, -1)),
            mixer.D[own],
            seq_idx=seq_idx,
        )
        assert isinstance(y, Tensor)
        return self._heads_of_own_tokens(y.flatten(2))

    def _channels_by_rank(
        self, mixer: Mamba2, values: Float[Tensor, "B Tl C"]
    ) -> Float[Tensor, "B Tl cp Cc"]:
        """Split the channels by the rank that has their heads; a group may go to several."""
        parts = []
        for part in mixer.split(values):
            # fewer groups than ranks: the ranks that share a group lie side by side
            copies = max(1, self.size // part.shape[2])
            part = part.repeat_interleave(copies, dim=2) if copies > 1 else part
            parts.append(part.unflatten(2, (self.size, -1)).flatten(3))
        return torch.cat(parts, dim=-1)

    def _own_channels(self, mixer: Mamba2, values: Float[Tensor, "W C"]) -> Float[Tensor, "W Cc"]:
        return self._channels_by_rank(mixer, values.unsqueeze(0))[0, :, self.rank]

    def _tokens_of_own_heads(self, values: Float[Tensor, "B Tl cp Cc"]) -> Float[Tensor, "B T Cc"]:
        """Give every rank its channels of the own tokens; get the own channels of all tokens."""
        came = all_to_all(values.movedim(2, 0), self.one_each, self.one_each, self.group)
        return in_row_order(came.transpose(0, 1).flatten(1, 2), self.size)

    def _heads_of_own_tokens(self, values: Float[Tensor, "B T Ic"]) -> Float[Tensor, "B Tl I"]:
        """Give every rank its tokens of the own heads; get all heads of the own tokens."""
        sent = in_rank_order(values, self.size).unflatten(1, (self.size, -1)).transpose(0, 1)
        came = all_to_all(sent, self.one_each, self.one_each, self.group)
        return came.movedim(0, 2).flatten(2)
