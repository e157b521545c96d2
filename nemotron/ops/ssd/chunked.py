"""The scan in chunks, tuned for CPUs, with a hand-written backward pass.

Per chunk of Q tokens, with a = dt A, cs its running sum inside the chunk and u = dt x:

    y_t   = sum_{s<=t} (C_t . B_s) exp(cs_t - cs_s) u_s  +  exp(cs_t) C_t S  +  D x_t
    S_out = exp(cs_Q) S  +  sum_s exp(cs_Q - cs_s) u_s (x) B_s            (Dao & Gu 2024, section 6)

C . B is computed once per group, and the heads of a group stand side by side in the products with
the state. Chunks are worked on in blocks that fit the cache; only the state at the start of each
block is kept for the backward pass, everything else is computed again. Products are taken in the
dtype of x; decays, states and sums stay in float32.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.registry import Backend

CHUNK = 64
"""Tokens in a chunk: longer ones cost more inside, shorter ones more between; 32-64 are best."""
BLOCK_ELEMENTS = 1 << 19
"""Elements of the [heads, Q, Q] decay of the chunks that are worked on together."""


@dataclass(frozen=True)
class _Span:
    """Consecutive chunks of equal length: tokens start to start + num_chunks * length."""

    start: int
    num_chunks: int
    length: int

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + self.num_chunks * self.length)


def _spans(num_tokens: int, elements_per_chunk_token: int) -> list[_Span]:
    """Cut a row into blocks of whole chunks, and a last chunk of what is left over."""
    whole = num_tokens // CHUNK
    per_block = max(1, BLOCK_ELEMENTS // (elements_per_chunk_token * CHUNK * CHUNK))
    spans = [
        _Span(first * CHUNK, min(per_block, whole - first), CHUNK)
        for first in range(0, whole, per_block)
    ]
    if num_tokens % CHUNK:
        spans.append(_Span(whole * CHUNK, 1, num_tokens % CHUNK))
    return spans


def _running_sum(
    a: Float[Tensor, "b n Q H"], ids: Int[Tensor, "b n Q"] | None, reverse: bool = False
) -> Float[Tensor, "b n Q H"]:
    """Sum along the chunk, starting anew at each document, so that none sees another's rounding."""
    if reverse:
        flipped = _running_sum(a.flip(2), ids.flip(2) if ids is not None else None)
        return flipped.flip(2)
    if ids is None or bool((ids[:, :, 1:] == ids[:, :, :-1]).all()):
        return a.cumsum(2)
    result = a.clone()
    same = (ids[:, :, 1:] == ids[:, :, :-1]).to(a.dtype).unsqueeze(-1)
    for t in range(1, a.shape[2]):
        result[:, :, t] += result[:, :, t - 1] * same[:, :, t - 1]
    return result


def _exp_(exponent: Tensor) -> Tensor:
    """exp() in place of what is at most 0 where it counts; below -87 float32's is 0 and slow."""
    return exponent.clamp_(-87, 0).exp_()


class _Block:
    """What forward and backward both need of one block of chunks.

    Letters: b rows, n chunks, Q tokens of a chunk, G groups, R heads of a group, P, N as always.
    """

    def __init__(
        self,
        x: Float[Tensor, "b T H P"],
        dt: Float[Tensor, "b T H"],
        A: Float[Tensor, " H"],
        B: Float[Tensor, "b T G N"],
        C: Float[Tensor, "b T G N"],
        state: Float[Tensor, "b G N RP"],
        ids: Int[Tensor, "b T"] | None,
        last_id: Int[Tensor, " b"] | None,
        length: int,
    ) -> None:
        b, _, heads, self.P = x.shape
        self.G, self.N = B.shape[2:]
        self.b, self.Q, self.n, self.R = b, length, x.shape[1] // length, heads // self.G
        self.narrow, self.wide = x.dtype, dt.dtype
        self.x = x.unflatten(1, (-1, length)).unflatten(3, (self.G, self.R))  # [b n Q G R P]
        self.dt = dt.unflatten(1, (-1, length))  # [b n Q H]
        self.ids = ids.unflatten(1, (-1, length)) if ids is not None else None
        # differences of float32 sums would lose the digits that exp() needs
        cs = _running_sum((self.dt * A).double(), self.ids)  # [b n Q H]
        self.into = _exp_(
            cs.to(self.wide, copy=True)
        )  # decay from the start of the chunk to the token
        self.out_of = _exp_((cs[:, :, -1:] - cs).to(self.wide))  # and from there to the end
        self.carry = self.into[:, :, -1]  # [b n H]
        self.B, self.C = (
            m.unflatten(1, (-1, length)).transpose(2, 3).reshape(-1, length, self.N) for m in (B, C)
        )  # [bnG Q N]
        self.same = None
        if self.ids is not None:
            assert last_id is not None
            before = torch.cat([last_id[:, None], self.ids[:, :-1, -1]], dim=1)  # [b n]
            self.into = self.into * (self.ids == before[:, :, None]).unsqueeze(-1)
            self.out_of = self.out_of * (self.ids == self.ids[:, :, -1:]).unsqueeze(-1)
            self.carry = self.into[:, :, -1]
            same = self.ids[:, :, :, None] == self.ids[:, :, None, :]
            self.same = same.repeat_interleave(self.G, dim=1).view(-1, length, length)
        # exp(cs_t - cs_s) is taken of the leading digits; the rest scales the tokens t and s
        leading = cs.to(self.wide)
        rest = self._by_group((cs - leading).to(self.wide))
        self.finer_t, self.finer_s = rest.exp(), rest.neg().exp()  # [b n Q G R 1]
        steps = leading.transpose(2, 3).contiguous()  # [b n H Q]
        decay = _exp_(steps[..., :, None] - steps[..., None, :])
        self.decay = decay.view(-1, self.R, length, length)  # [bnG R Q Q]
        self.CB = self._masked(self._product(self.C, self.B.mT))  # [bnG Q Q]
        self.u = self._by_head(self.x, self._by_group(self.dt) * self.finer_s)  # [bnH Q P]
        self.weighted = self._by_side(self.x, self._by_group(self.out_of * self.dt))
        self.states = self._pass_on(state)  # [b n+1 G N RP]

    def _product(
        self, left: Float[Tensor, "batch I J"], right: Float[Tensor, "batch J K"]
    ) -> Float[Tensor, "batch I K"]:
        """Multiply in the dtype of x, as the Triton kernels of mamba-ssm do; go on in `wide`."""
        return torch.bmm(left.to(self.narrow), right.to(self.narrow)).to(self.wide)

    def _masked(self, pairs: Tensor) -> Tensor:
        pairs.tril_()
        return pairs if self.same is None else pairs.mul_(self.same)

    def _by_group(self, values: Float[Tensor, "b n Q H"]) -> Float[Tensor, "b n Q G R 1"]:
        return values.unflatten(3, (self.G, self.R)).unsqueeze(-1)

    def _by_head(
        self, values: Float[Tensor, "b n Q G R P"], factor: Float[Tensor, "b n Q G R 1"]
    ) -> Float[Tensor, "bnH Q P"]:
        """Multiply and line up by head; the product is written in its place at once."""
        order = (0, 1, 3, 4, 2, 5)
        product = self.x.new_empty(self.b, self.n, self.G, self.R, self.Q, self.P)
        torch.mul(values.permute(order), factor.permute(order), out=product)
        return product.view(-1, self.Q, self.P)

    def _by_side(
        self, values: Float[Tensor, "b n Q G R P"], factor: Float[Tensor, "b n Q G R 1"]
    ) -> Float[Tensor, "bnG Q RP"]:
        """Multiply and put the heads of a group side by side."""
        product = self.x.new_empty(self.b, self.n, self.G, self.Q, self.R, self.P)
        torch.mul(values.transpose(2, 3), factor.transpose(2, 3), out=product)
        return product.view(-1, self.Q, self.R * self.P)

    def _ungrouped(self, values: Float[Tensor, "bnG Q RP"]) -> Float[Tensor, "b n Q G R P"]:
        shape = (self.b, self.n, self.G, self.Q, self.R, self.P)
        return values.view(shape).transpose(2, 3)

    def _from_heads(self, values: Float[Tensor, "bnH Q P"]) -> Float[Tensor, "b n Q G R P"]:
        shape = (self.b, self.n, self.G, self.R, self.Q, self.P)
        return values.view(shape).permute(0, 1, 4, 2, 3, 5)

    def _carries(self) -> tuple[Float[Tensor, "b G 1 RP"], ...]:
        carries = self.carry.repeat_interleave(self.P, dim=2)
        return carries.view(self.b, self.n, self.G, 1, self.R * self.P).unbind(1)

    def _pass_on(self, state: Tensor) -> Tensor:
        shape = (self.b, self.n, self.G, self.N, self.R * self.P)
        added = self._product(self.B.mT, self.weighted).view(shape)
        states = added.new_empty(self.b, self.n + 1, *shape[2:])
        states[:, 0] = state
        for chunk, carry in enumerate(self._carries()):
            torch.addcmul(added[:, chunk], states[:, chunk], carry, out=states[:, chunk + 1])
        return states

    def incoming(self) -> Float[Tensor, "bnG N RP"]:
        """The state at the start of each chunk, the heads of a group side by side."""
        return self.states[:, :-1].flatten(0, 2)

    def output(self, D: Float[Tensor, " H"], y: Float[Tensor, "b T H P"]) -> None:
        """Write y of this block."""
        # decay -> M, in place
        weights = self.decay.mul_(self.CB.unsqueeze(1)).view(-1, self.Q, self.Q)
        inside = self._product(weights, self.u)
        carried = self._ungrouped(self._product(self.C, self.incoming()))
        total = carried.mul_(self._by_group(self.into))
        total.addcmul_(self._from_heads(inside), self.finer_t)
        total.addcmul_(self.x.to(total.dtype), D.view(self.G, self.R, 1))
        y.unflatten(1, (-1, self.Q)).unflatten(3, (self.G, self.R)).copy_(total)

    def gradients(
        self, dy: Float[Tensor, "b T H P"], A: Tensor, D: Tensor, dstate: Tensor
    ) -> tuple[Tensor, ...]:
        """Return dx, ddt, dA, dB, dC, dD of this block and the gradient of its first state."""
        G, R, Q, P, N = self.G, self.R, self.Q, self.P, self.N
        dy = dy.unflatten(1, (-1, Q)).unflatten(3, (G, R))  # [b n Q G R P]
        dy_heads = self._by_head(dy, self.finer_t)  # [bnH Q P]
        dy_into = self._by_side(dy, self._by_group(self.into))  # [bnG Q RP]

        # gradients of the states at the end of each chunk, from the last chunk to the first
        local = self._product(self.C.mT, dy_into).view(self.b, self.n, G, N, R * P)
        dstates = torch.empty_like(self.states)
        dstates[:, self.n] = dstate
        for chunk, carry in reversed(list(enumerate(self._carries()))):
            torch.addcmul(local[:, chunk], dstates[:, chunk + 1], carry, out=dstates[:, chunk])
        dstate, ends = dstates[:, 0], dstates[:, 1:]
        outgoing = ends.flatten(0, 2)  # [bnG N RP]

        # inside the chunk
        pairs = self._product(dy_heads, self.u.mT).view(-1, R, Q, Q).mul_(self.decay)
        dCB = self._masked(pairs.sum(1))  # [bnG Q Q]
        # d loss / d cs gains in t and loses in s from each pair; t = s would only add rounding
        pairs.mul_(self.CB.tril(-1).unsqueeze(1))
        # sums that nearly cancel are taken in float64: a long time step multiplies what is left
        exact = pairs.double()
        dcs = exact.sum(-1).sub_(exact.sum(-2))  # [bnG R Q]
        weights = self.decay.mul_(self.CB.unsqueeze(1)).view(-1, Q, Q)
        du = self._from_heads(self._product(weights.mT, dy_heads))

        # through the states
        from_state = self._ungrouped(self._product(self.B, outgoing))
        from_state.mul_(self._by_group(self.out_of))
        leaving = (from_state * self.x).sum(-1).flatten(3).mul_(self.dt).double()  # [b n Q H]
        leaving[:, :, -1] = 0  # the last token enters the state undecayed
        du = from_state.addcmul_(du, self.finer_s)  # [b n Q G R P]
        incoming = self.incoming()
        carried = self._product(self.C, incoming).mul_(dy_into).view(-1, Q, R, P).sum(-1)
        dC = self._product(dCB, self.B).add_(self._product(dy_into, incoming.mT))
        dB = self._product(dCB.mT, self.C).add_(self._product(self.weighted, outgoing.mT))

        ddt = (du * self.x).sum(-1).flatten(3)  # [b n Q H]
        shape = (self.b, self.n, G, R, Q)
        dcs = dcs.add_(carried.mT).view(shape).permute(0, 1, 4, 2, 3).flatten(3).sub_(leaving)
        kept = (ends * self.states[:, :-1]).sum(3).unflatten(-1, (R, P)).sum(-1).flatten(2)
        dcs[:, :, -1] += leaving.sum(2).addcmul_(kept, self.carry)
        da = _running_sum(dcs, self.ids, reverse=True).to(self.wide)
        dA = (da * self.dt).sum((0, 1, 2))
        ddt = ddt.addcmul_(da, A)
        dD = (dy * self.x).sum((0, 1, 2, 5)).flatten()
        dx = du.mul_(self._by_group(self.dt)).addcmul_(dy, D.view(G, R, 1))
        dB, dC = (m.view(self.b, self.n, G, Q, N).transpose(2, 3) for m in (dB, dC))
        return dx, ddt, dA, dB, dC, dD, dstate


class _ChunkedScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        initial_state: Tensor | None,
        seq_idx: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        b, T, H, P = x.shape
        G, N = B.shape[2:]
        if initial_state is None:
            state = dt.new_zeros(b, G, N, H // G * P)
        else:
            state = initial_state.to(dt.dtype).reshape(b, G, H // G * P, N).mT
        spans = _spans(T, b * H)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        starts = []
        for span in spans:
            starts.append(state)
            block = _block(x, dt, A, B, C, state, seq_idx, span)
            block.output(D, y[:, span.tokens])
            state = block.states[:, -1].contiguous()
        ctx.save_for_backward(x, dt, A, B, C, D, seq_idx, *starts)
        ctx.has_initial = initial_state is not None
        ctx.set_materialize_grads(False)
        return y, state.mT.reshape(b, H, P, N)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, seq_idx, *starts = ctx.saved_tensors
        b, T, H, P = x.shape
        G, N = B.shape[2:]
        if dfinal is None:
            dstate = dt.new_zeros(b, G, N, H // G * P)
        else:
            dstate = dfinal.to(dt.dtype).reshape(b, G, H // G * P, N).mT
        if dy is None:
            dy = torch.zeros_like(x)
        dx, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, B, C))
        ddt = torch.empty(dt.shape, dtype=dt.dtype, device=dt.device)
        dA, dD = torch.zeros_like(A), torch.zeros_like(D)
        for span, state in zip(reversed(_spans(T, b * H)), reversed(starts), strict=True):
            block = _block(x, dt, A, B, C, state, seq_idx, span)
            part = block.gradients(dy[:, span.tokens], A, D, dstate)
            for whole, piece in zip((dx, ddt, dB, dC), (*part[:2], *part[3:5]), strict=True):
                view = whole[:, span.tokens].unflatten(1, (-1, span.length))
                view.copy_(
                    piece.view(view.shape) if piece.ndim == view.ndim else piece.flatten(3, 4)
                )
            dA += part[2]
            dD += part[5]
            dstate = part[6]
        dinitial = None
        if ctx.has_initial:
            dinitial = dstate.mT.reshape(b, H, P, N)
        return dx, ddt, dA, dB, dC, dD, dinitial, None


def _block(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    seq_idx: Tensor | None,
    span: _Span,
) -> _Block:
    ids = last_id = None
    if seq_idx is not None:
        ids = seq_idx[:, span.tokens]
        # what comes before the row belongs to document 0
        last_id = seq_idx[:, span.start - 1] if span.start else torch.zeros_like(seq_idx[:, 0])
    x, dt, B, C = (t[:, span.tokens] for t in (x, dt, B, C))
    return _Block(x, dt, A, B, C, state, ids, last_id, span.length)


def ssd(
    x: Float[Tensor, "B T H P"],
    dt: Float[Tensor, "B T H"],
    A: Float[Tensor, " H"],
    B: Float[Tensor, "B T G N"],
    C: Float[Tensor, "B T G N"],
    D: Float[Tensor, " H"],
    initial_state: Float[Tensor, "B H P N"] | None,
    seq_idx: Int[Tensor, "B T"] | None,
) -> tuple[Float[Tensor, "B T H P"], Float[Tensor, "B H P N"]]:
    """Scan in chunks."""
    return _ChunkedScan.apply(x, dt, A, B, C, D, initial_state, seq_idx)


backend = Backend("chunked", ssd, features=frozenset({"documents", "initial_state", "final_state"}))
