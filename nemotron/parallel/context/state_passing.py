"""Mamba-2 over a row that ranks share: each scans its own chunks, and only states travel.

With s_t = exp(dt_t A) s_{t-1} + dt_t x_t ⊗ B_t and y_t = s_t C_t + D x_t, a chunk that is scanned
from a zero state lacks only d_t S C_t of y_t, where S is the state before the chunk and d_t the
decay from there to token t: zero once another document has begun. So a rank

1. asks for the last W - 1 inputs before each of its chunks, for the convolution;
2. scans both chunks from zero, to final states F_c and decays phi_c, which are d at the last token;
3. gathers (F_c, phi_c) of all chunks: in the order of the row S_{c+1} = phi_c S_c + F_c;
4. adds d_t S C_t.

Per row it receives, for step 1, 2 (W - 1) C activations (120 KiB in bf16 for Nemotron 3 Super) and,
for step 3, 2 (cp - 1) H (P N + 1) float32 numbers (4 MiB a chunk), however long the row is; the
gradients are as many. Every rank takes part in both, forward and backward: the second chunk of any
rank has others before it.

Source: Dao & Gu 2024, "Transformers are SSMs", section 8.2 (sequence parallelism);
open-lm-engine/lm-engine: mamba2/op.py (contiguous chunks, states through a gathered prefix scan).
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nemotron.model.mamba2 import Mamba2
from nemotron.model.state import MambaState
from nemotron.parallel.collectives import Group, all_gather, all_to_all
from nemotron.parallel.context.chunks import chunks_of, in_rank_order, in_row_order

GATHERED_BYTES = 1 << 30
"""Of the states of all ranks that exist at a time."""

SUMMED_TOKENS = 128
"""Tokens whose running sum is one product."""


class StatePassing:
    """A `ConvAndScan` for one rank's tokens; its two chunks of B rows go as 2 B rows."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def __call__(
        self,
        mixer: Mamba2,
        xBC: Float[Tensor, "B Tl C"],
        dt: Float[Tensor, "B Tl H"],
        seq_idx: Int[Tensor, "B Tl"] | None,
        state: MambaState | None,
    ) -> Float[Tensor, "B Tl I"]:
        assert state is None, "nothing is generated from rows that ranks share"
        weight, dt = mixer.conv1d.weight.squeeze(1), _as_rows(dt)
        before = weight.shape[1] - 1
        ids = None if seq_idx is None else _as_rows(seq_idx)
        window_ids = None if ids is None else self._with_inputs_before(ids, before)
        # as tokens, not as the convolution's state, which fewer backends take beside documents
        window = self._with_inputs_before(_as_rows(xBC), before)
        mixed = mixer.causal_conv1d(window, weight, mixer.conv1d.bias, seq_idx=window_ids)
        x, B, C = mixer.split(mixed[:, before:])
        A = -mixer.A_log.exp()
        y, final = mixer.ssd(x, dt, A, B, C, mixer.D, seq_idx=ids, return_final_state=True)
        decay = _running_sum(dt * A).exp()  # [2B, T, H]
        if ids is not None and window_ids is not None:
            # the state before a chunk is that of the document with which the last one ended
            decay = decay * (ids == window_ids[:, before - 1, None]).unsqueeze(-1)
        y = _AddCarried.apply(y, C, decay, self._entering(final, decay[:, -1]))
        return y.flatten(2).unflatten(0, (-1, 2)).flatten(1, 2)

    def _with_inputs_before(
        self, values: Shaped[Tensor, "B2 T *rest"], number: int
    ) -> Shaped[Tensor, "B2 T1 *rest"]:
        """Put the last tokens of the chunk before in front of each; zeros where there is none."""
        first, second = values[:, -number:].unflatten(0, (-1, 2)).unbind(1)
        # the first chunk sends to the next rank and the second to the rank before; on the last
        # rank, where the row turns round, the first sends to the second
        counts = [0] * self.size
        counts[min(self.rank + 1, self.size - 1)] = 1
        if self.rank > 0:
            counts[self.rank - 1] = 1
            came = all_to_all(torch.stack([second, first]), counts, counts, self.group)
        else:
            came = all_to_all(first.unsqueeze(0), counts, counts, self.group)
            came = torch.cat([torch.zeros_like(came), came])
        return torch.cat([came.transpose(0, 1).flatten(0, 1), values], dim=1)

    def _entering(
        self, final: Float[Tensor, "B2 H P N"], decay: Float[Tensor, "B2 H"]
    ) -> Float[Tensor, "B2 H P N"]:
        """Return the state before each of this rank's chunks.

        Many short rows have as many states as many long ones: of those, some are gathered at a time
        and again in backward.
        """
        rows = max(1, GATHERED_BYTES // (self.size * final[:2].nbytes))
        parts = list(zip(final.split(2 * rows), decay.split(2 * rows), strict=True))
        if len(parts) == 1:
            return self._passed_on(final, decay)
        return torch.cat(
            [
                checkpoint(self._passed_on, *part, use_reentrant=False, preserve_rng_state=False)
                for part in parts
            ]
        )

    def _passed_on(
        self, final: Float[Tensor, "B2 H P N"], decay: Float[Tensor, "B2 H"]
    ) -> Float[Tensor, "B2 H P N"]:
        own = torch.cat([final.flatten(2), decay.unsqueeze(-1)], dim=-1)
        chunks = all_gather(own.unflatten(0, (-1, 2)), 1, self.group)  # [B, 2cp, H, PN + 1]
        decays = in_row_order(chunks[..., -1], self.size)
        weights = torch.stack(
            # the weights are brought into the order of the states, which are large
            [in_rank_order(_weights(decays, c), self.size) for c in chunks_of(self.rank, self.size)]
        )
        return torch.einsum("kbch,bchs->bkhs", weights, chunks[..., :-1]).reshape(final.shape)


def _running_sum(values: Float[Tensor, "B2 T H"]) -> Float[Tensor, "B2 T H"]:
    """Add up along the tokens; on a GPU by products, since its `cumsum` is not deterministic."""
    if values.device.type != "cuda":
        return values.cumsum(1)
    length = values.shape[1]
    blocks = F.pad(values, (0, 0, 0, -length % SUMMED_TOKENS)).unflatten(1, (-1, SUMMED_TOKENS))
    inside = values.new_ones(SUMMED_TOKENS, SUMMED_TOKENS).tril() @ blocks  # [2B, blocks, ., H]
    before = values.new_ones(blocks.shape[1], blocks.shape[1]).tril(-1) @ inside[:, :, -1]
    return (inside + before.unsqueeze(2)).flatten(1, 2)[:, :length]


def _as_rows(values: Shaped[Tensor, "B Tl *rest"]) -> Shaped[Tensor, "B2 T *rest"]:
    return values.unflatten(1, (2, -1)).flatten(0, 1)


def _weights(decays: Float[Tensor, "B chunks H"], chunk: int) -> Float[Tensor, "B chunks H"]:
    """Return what is left of each chunk's final state where `chunk` begins: 0 from there on."""
    later = decays[:, :chunk].flip(1)  # the nearest first
    until = F.pad(later, (0, 0, 1, 0), value=1.0)[:, :chunk].cumprod(1)
    return F.pad(until.flip(1), (0, 0, 0, decays.shape[1] - chunk))


class _AddCarried(torch.autograd.Function):
    """y_t + d_t S C_t; by hand, to keep nothing as large as y in float32 until backward."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Float[Tensor, "B T H P"],
        C: Float[Tensor, "B T G N"],
        decay: Float[Tensor, "B T H"],
        state: Float[Tensor, "B H P N"],
    ) -> Float[Tensor, "B T H P"]:
        ctx.save_for_backward(C, decay, state)
        groups = C.shape[2]
        carried = _carried(C, state).mul_(_by_group(decay, groups).unsqueeze(-1))
        total = torch.empty_like(y, memory_format=torch.contiguous_format)
        torch.add(carried, _by_group(y, groups), out=_by_group(total, groups))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        C, decay, state = ctx.saved_tensors
        groups = C.shape[2]
        wide = _by_group(grad.to(state.dtype), groups)  # [B, T, G, R, P]
        grad_decay = (_carried(C, state) * wide).sum(-1).flatten(2)
        wide = wide * _by_group(decay, groups).unsqueeze(-1)
        grad_C = torch.einsum("btgrp,bgrpn->btgn", wide, state.unflatten(1, (groups, -1)))
        grad_state = torch.einsum("btgrp,btgn->bgrpn", wide, C.to(state.dtype))
        return grad, grad_C.to(C.dtype), grad_decay, grad_state.flatten(1, 2)


def _carried(
    C: Float[Tensor, "B T G N"], state: Float[Tensor, "B H P N"]
) -> Float[Tensor, "B T G R P"]:
    """Return S C_t, in the dtype of the state."""
    state = state.unflatten(1, (C.shape[2], -1))
    return torch.einsum("btgn,bgrpn->btgrp", C.to(state.dtype), state)


def _by_group(
    values: Shaped[Tensor, "B T H *rest"], groups: int
) -> Shaped[Tensor, "B T G R *rest"]:
    return values.unflatten(2, (groups, -1))
