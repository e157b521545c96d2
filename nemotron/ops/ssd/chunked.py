"""The scan in chunks, of torch's operations, with a hand-written backward pass.

Per chunk of Q tokens, with a = dt A, cs its running sum inside the chunk and u = dt x:

    y_t   = sum_{s<=t} (C_t . B_s) exp(cs_t - cs_s) u_s  +  exp(cs_t) C_t S  +  D x_t
    S_out = exp(cs_Q) S  +  sum_s exp(cs_Q - cs_s) u_s (x) B_s            (Dao & Gu 2024, section 6)

C . B is computed once per group, and the heads of a group stand side by side in the products with
the state. What has one number per token and head is computed for the whole row at once (`_Cut`),
what has more in blocks of chunks that fit the cache (`_Block`). The states between the chunks are
kept for the backward pass, everything else is computed again. Products are taken in the dtype of
x; decays, states and sums stay in float32.

Letters: b rows, n chunks, Q tokens of a chunk, G groups, R heads of a group, P, N as always.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from nemotron.ops import float32_products
from nemotron.ops.registry import Backend

CHUNK = 64
"""Tokens in a chunk: longer ones cost more inside, shorter ones more between; 32-64 are best."""
BLOCK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 26}
"""Elements of the [heads, Q, Q] decay of the chunks that are worked on together, by device.

A CPU wants what fits its cache. A GPU wants few launches: here 256 MB in float32.
"""


def _exp2_(exponent: Tensor) -> Tensor:
    """2 to the power of what is at most 0 where it counts; below -126 float32's is 0 and slow."""
    return exponent.clamp_(-126, 0).exp2_()


def _running_sum(
    a: Float[Tensor, "b n Q H"], ids: Int[Tensor, "b n Q"] | None, reverse: bool = False
) -> Float[Tensor, "b n Q H"]:
    """Sum along the chunk, starting anew at each document, so that none sees another's rounding."""
    if a.device.type == "cuda":
        return _running_sum_by_product(a, ids, reverse)
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


def _running_sum_by_product(
    a: Float[Tensor, "b n Q H"], ids: Int[Tensor, "b n Q"] | None, reverse: bool
) -> Float[Tensor, "b n Q H"]:
    """The same as one product: no wait for the device, and deterministic, which `cumsum` is not."""
    length = a.shape[2]
    added = a.new_ones(length, length).tril()
    if ids is not None:
        added = added * torch.eq(ids[:, :, :, None], ids[:, :, None, :])
    return (added.mT if reverse else added) @ a


class _Cut(NamedTuple):
    """Inputs cut into chunks and what has one number per token and head: of a row or a block."""

    x: Float[Tensor, "b n Q G R P"]
    B: Float[Tensor, "b n G Q N"]
    C: Float[Tensor, "b n G Q N"]
    dt: Float[Tensor, "b n Q G R 1"]
    into: Float[Tensor, "b n Q G R 1"]
    """Decay from the start of the chunk to the token."""
    out_of: Float[Tensor, "b n Q G R 1"]
    """Decay from the token to the end of the chunk."""
    carry: Float[Tensor, "b n G 1 RP"]
    """Decay of the whole chunk."""
    leading: Float[Tensor, "b n H Q"]
    """log2 of `into`: the digits that exp(cs_t - cs_s) is taken of; the rest scales t and s."""
    finer_t: Float[Tensor, "b n Q G R 1"]
    finer_s: Float[Tensor, "b n Q G R 1"]
    same: Bool[Tensor, "b n 1 Q Q"] | None = None
    """Pairs of tokens of one document; None where there is only one."""

    def blocks(self) -> "list[_Cut]":
        """Cut a row into blocks of chunks."""
        parts = [self.split(tensor) for tensor in self if tensor is not None]
        return [_Cut(*block) for block in zip(*parts, strict=True)]

    def split(self, tensor: Shaped[Tensor, "b n *rest"]) -> tuple[Tensor, ...]:
        """Split what has the row's chunks as the blocks are."""
        b, _, heads, _ = self.leading.shape
        elements = BLOCK_ELEMENTS[tensor.device.type]
        return tensor.split(max(1, elements // (b * heads * CHUNK * CHUNK)), dim=1)


def _cut(
    x: Float[Tensor, "b nQ H P"],
    dt: Float[Tensor, "b nQ H"],
    A: Float[Tensor, " H"],
    B: Float[Tensor, "b nQ G N"],
    C: Float[Tensor, "b nQ G N"],
    ids: Int[Tensor, "b n Q"] | None,
) -> _Cut:
    """Cut a row into chunks and compute its decays."""
    groups = B.shape[2]
    B, C = (m.unflatten(1, (-1, CHUNK)).transpose(2, 3) for m in (B, C))
    dt = dt.unflatten(1, (-1, CHUNK))
    # differences of float32 sums would lose the digits that exp() needs
    cs = _running_sum((dt * A).double().mul_(math.log2(math.e)), ids)  # [b n Q H]
    into = _exp2_(cs.to(dt.dtype, copy=True))
    out_of = _exp2_((cs[:, :, -1:] - cs).to(dt.dtype))
    same = None
    if ids is not None:
        # what comes before the row belongs to document 0
        before = F.pad(ids[:, :-1, -1], (1, 0))  # [b n]
        into *= torch.eq(ids, before[:, :, None]).unsqueeze(-1)
        out_of *= torch.eq(ids, ids[:, :, -1:]).unsqueeze(-1)
        same = torch.eq(ids[:, :, :, None], ids[:, :, None, :]).unsqueeze(2)
    carry = into[:, :, -1].repeat_interleave(x.shape[3], dim=2).unflatten(2, (groups, 1, -1))
    leading = cs.to(dt.dtype)
    rest = (cs - leading).to(dt.dtype)
    dt, into, out_of, finer_t, finer_s = (
        t.unflatten(3, (groups, -1)).unsqueeze(-1)
        for t in (dt, into, out_of, rest.exp2(), rest.neg().exp2_())
    )
    x = _chunks(x, groups)
    leading = leading.transpose(2, 3).contiguous()
    return _Cut(x, B, C, dt, into, out_of, carry, leading, finer_t, finer_s, same)


def _chunks(values: Float[Tensor, "b nQ H P"], groups: int) -> Float[Tensor, "b n Q G R P"]:
    return values.unflatten(2, (groups, -1)).unflatten(1, (-1, CHUNK))


class _Block:
    """What forward and backward both need of a block of chunks."""

    def __init__(self, cut: _Cut) -> None:
        self.cut, self.x = cut, cut.x
        self.narrow, self.wide = cut.x.dtype, cut.dt.dtype
        self.exact = torch.float64 if self.narrow == self.wide else self.wide
        b, n, _, G, R, P = cut.x.shape
        self.heads_first = (b, n, G, R, CHUNK, P)
        self.sides_first = (b, n, G, CHUNK, R, P)
        self.B, self.C = (m.reshape(-1, *m.shape[3:]) for m in (cut.B, cut.C))
        decay = _exp2_(cut.leading[..., :, None] - cut.leading[..., None, :])  # [b n H Q Q]
        self.decay = decay.view(-1, R, CHUNK, CHUNK)  # [bnG R Q Q]
        self.CB = self.masked(self.product(self.C, self.B.mT))  # [bnG Q Q]
        self.u = self.by_head(self.x, cut.dt * cut.finer_s)  # [bnH Q P]
        self.ending = self.by_side(self.x, cut.dt * cut.out_of)  # [bnG Q RP]

    def product(
        self, left: Float[Tensor, "batch I J"], right: Float[Tensor, "batch J K"]
    ) -> Float[Tensor, "batch I K"]:
        """Multiply in the dtype of x, as the Triton kernels of mamba-ssm do; go on in `wide`."""
        return torch.bmm(left.to(self.narrow), right.to(self.narrow)).to(self.wide)

    def masked(self, pairs: Float[Tensor, "bnG Q Q"]) -> Float[Tensor, "bnG Q Q"]:
        """Let no token see later ones or another document's, in place."""
        if self.cut.same is not None:
            b, n, G = self.heads_first[:3]
            pairs.view(b, n, G, CHUNK, CHUNK).mul_(self.cut.same)
        return pairs.tril_()

    def by_head(
        self, values: Float[Tensor, "b n Q G R P"], factor: Float[Tensor, "b n Q G R 1"]
    ) -> Float[Tensor, "bnH Q P"]:
        """Multiply and line up by head; the product is written in its place at once."""
        product = self.x.new_empty(self.heads_first)
        torch.mul(values, factor, out=product.permute(0, 1, 4, 2, 3, 5))
        return product.view(-1, CHUNK, product.shape[-1])

    def by_side(
        self, values: Float[Tensor, "b n Q G R P"], factor: Float[Tensor, "b n Q G R 1"]
    ) -> Float[Tensor, "bnG Q RP"]:
        """Multiply and put the heads of a group side by side."""
        product = self.x.new_empty(self.sides_first)
        torch.mul(values, factor, out=product.transpose(2, 3))
        return product.flatten(4).flatten(0, 2)

    def from_heads(self, values: Float[Tensor, "bnH Q P"]) -> Float[Tensor, "b n Q G R P"]:
        """View what is lined up by head as tokens."""
        return values.view(self.heads_first).permute(0, 1, 4, 2, 3, 5)

    def from_sides(self, values: Float[Tensor, "bnG Q RP"]) -> Float[Tensor, "b n Q G R P"]:
        """View what stands side by side as tokens."""
        return values.view(self.sides_first).transpose(2, 3)

    def weights(self) -> Float[Tensor, "bnH Q Q"]:
        """(C_t . B_s) exp(cs_t - cs_s), in the place of the decay."""
        return self.decay.mul_(self.CB.unsqueeze(1)).view(-1, CHUNK, CHUNK)

    def output(
        self,
        D: Float[Tensor, "G R 1"],
        states: Float[Tensor, "b n1 G N RP"],
        y: Float[Tensor, "b n Q G R P"],
    ) -> None:
        """Fill y and the states after the first."""
        cut = self.cut
        before, after = states[:, :-1], states[:, 1:]
        added = self.product(self.B.mT, self.ending).view(after.shape)
        steps = zip(*(t.unbind(1) for t in (added, before, cut.carry, after)), strict=True)
        for more, state, carry, new in steps:
            torch.addcmul(more, state, carry, out=new)
        inside = self.product(self.weights(), self.u)
        carried = self.product(self.C, before.reshape(-1, *before.shape[3:]))
        total = self.from_sides(carried).mul_(cut.into)
        total.addcmul_(self.from_heads(inside), cut.finer_t)
        y.copy_(total.addcmul_(self.x.to(self.wide), D))


class _Gradients(NamedTuple):
    """Gradients of a row or a block, to be filled."""

    x: Float[Tensor, "b n Q G R P"]
    B: Float[Tensor, "b n G Q N"]
    C: Float[Tensor, "b n G Q N"]
    dt: Float[Tensor, "b n Q G R"]
    """Through u alone; what comes through the decays is still in the next three."""
    gained: Float[Tensor, "b n Q G R"]
    """By cs of a token: from the pairs in its chunk and from the state before the chunk."""
    leaving: Float[Tensor, "b n Q G R"]
    """Lost by cs of a token, and gained by that at the chunk's end: through the state after it."""
    kept: Float[Tensor, "b n G R"]
    """By the decay of the chunk."""

    @staticmethod
    def empty(cut: _Cut) -> "_Gradients":
        """Make room for the gradients of a row."""
        sizes, wide = cut.x.shape[:5], cut.dt
        gained = wide.new_empty(sizes, dtype=torch.float64)
        dx = cut.x.new_empty(cut.x.shape)
        # tokens first, as they are handed out
        dB, dC = (t.new_empty(t.transpose(2, 3).shape).transpose(2, 3) for t in (cut.B, cut.C))
        kept = wide.new_empty(sizes[:2] + sizes[3:])
        return _Gradients(dx, dB, dC, wide.new_empty(sizes), gained, wide.new_empty(sizes), kept)

    def fill(
        self,
        block: _Block,
        D: Float[Tensor, "G R 1"],
        states: Float[Tensor, "b n G N RP"],
        dy: Float[Tensor, "b n Q G R P"],
        dstate: Float[Tensor, "b G N RP"],
    ) -> Float[Tensor, "b G N RP"]:
        """Go back through a block; returns the gradient of its first state."""
        cut, narrow = block.cut, block.narrow
        b, n, _, G, R, P = cut.x.shape
        dy_heads = block.by_head(dy, cut.finer_t)  # [bnH Q P]
        dy_into = block.by_side(dy, cut.into)  # [bnG Q RP]

        # gradients of the states at the end of each chunk, from the last chunk to the first
        local = block.product(block.C.mT, dy_into).view(states.shape)
        dstates = local.new_empty(b, n + 1, *dstate.shape[1:])
        dstates[:, n] = dstate
        before, ends = dstates[:, :-1], dstates[:, 1:]
        steps = zip(*(t.unbind(1) for t in (local, ends, cut.carry, before)), strict=True)
        for more, old, carry, new in reversed(list(steps)):
            torch.addcmul(more, old, carry, out=new)
        incoming, outgoing = (
            t.reshape(-1, *states.shape[3:]).to(narrow) for t in (states, ends)
        )  # [bnG N RP]
        torch.sum((ends * states).sum(3).view(b, n, G, R, P), -1, out=self.kept)

        # inside the chunk
        pairs = block.product(dy_heads, block.u.mT).view(-1, R, CHUNK, CHUNK).mul_(block.decay)
        dCB = block.masked(pairs.sum(1)).to(narrow)  # [bnG Q Q]
        # d loss / d cs gains in t and loses in s from each pair; t = s would only add rounding
        pairs.mul_(block.CB.tril(-1).unsqueeze(1))
        # sums that nearly cancel are taken one precision up: a long time step multiplies the rest
        exact = pairs.to(block.exact)
        gained = exact.sum(-1).sub_(exact.sum(-2))  # [bnG R Q]
        du = block.from_heads(block.product(block.weights().mT, dy_heads))

        # through the states
        carried = block.product(block.C, incoming).mul_(dy_into).view(-1, CHUNK, R, P).sum(-1)
        gained.add_(carried.mT)
        self.gained.copy_(gained.view(b, n, G, R, CHUNK).permute(0, 1, 4, 2, 3))
        left = block.from_sides(block.product(block.B, outgoing)).mul_(cut.out_of)
        torch.sum(left * cut.x, -1, out=self.leaving)
        du = left.addcmul_(du, cut.finer_s)  # [b n Q G R P]
        torch.sum(du * cut.x, -1, out=self.dt)
        self.x.copy_(du.mul_(cut.dt).addcmul_(dy, D))
        dC = torch.bmm(dCB, block.B).baddbmm_(dy_into, incoming.mT)
        dB = torch.bmm(dCB.mT, block.C).baddbmm_(block.ending, outgoing.mT)
        self.C.copy_(dC.view(self.C.shape))
        self.B.copy_(dB.view(self.B.shape))
        return before[:, 0]

    def of_decays(
        self, cut: _Cut, A: Float[Tensor, " H"], ids: Int[Tensor, "b n Q"] | None
    ) -> tuple[Float[Tensor, "b nQ H"], Float[Tensor, " H"]]:
        """Return ddt and dA of the row."""
        dt = cut.dt.squeeze(-1)
        leaving = (self.leaving * dt).double()
        leaving[:, :, -1] = 0  # the last token enters the state undecayed
        dcs = self.gained.sub_(leaving)
        dcs[:, :, -1] += leaving.sum(2).addcmul_(self.kept, cut.into[:, :, -1].squeeze(-1))
        da = _running_sum(dcs.flatten(3), ids, reverse=True).to(dt.dtype)
        ddt = self.dt.flatten(3).addcmul_(da, A)
        return ddt.flatten(1, 2), (da * dt.flatten(3)).sum((0, 1, 2))


class _ChunkedScan(torch.autograd.Function):
    """The scan over whole chunks."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        state: Float[Tensor, "b G N RP"],
        ids: Int[Tensor, "b n Q"] | None,
    ) -> tuple[Tensor, Tensor]:
        cut = _cut(x, dt, A, B, C, ids)
        sizes = cut.carry.shape
        states = state.new_empty(sizes[0], sizes[1] + 1, *state.shape[1:])
        states[:, 0] = state
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        first = 0
        for block, part in zip(cut.blocks(), cut.split(_chunks(y, B.shape[2])), strict=True):
            last = first + block.x.shape[1]
            _Block(block).output(D.view(B.shape[2], -1, 1), states[:, first : last + 1], part)
            first = last
        ctx.save_for_backward(x, dt, A, B, C, D, ids, states)
        ctx.set_materialize_grads(False)
        return y, states[:, -1].clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, ids, states = ctx.saved_tensors
        groups = B.shape[2]
        cut = _cut(x, dt, A, B, C, ids)
        dy = _chunks(torch.zeros_like(x) if dy is None else dy, groups)
        dstate = torch.zeros_like(states[:, 0]) if dstate is None else dstate
        gradients = _Gradients.empty(cut)
        parts = zip(
            map(_Gradients._make, zip(*map(cut.split, gradients), strict=True)),
            cut.blocks(),
            cut.split(states[:, :-1]),
            cut.split(dy),
            strict=True,
        )
        for part, block, before, dy_part in reversed(list(parts)):
            dstate = part.fill(_Block(block), D.view(groups, -1, 1), before, dy_part, dstate)
        ddt, dA = gradients.of_decays(cut, A, ids)
        # products that nearly cancel must not be rounded to the format of x first
        dD = (dy.to(dt.dtype) * cut.x).sum((0, 1, 2, 5)).flatten()
        dx = gradients.x.flatten(3, 4).flatten(1, 2)
        dB, dC = (d.transpose(2, 3).flatten(1, 2) for d in (gradients.B, gradients.C))
        return dx, ddt, dA, dB, dC, dD, dstate, None


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
    b, num_tokens, heads, P = x.shape
    G, N = B.shape[2:]
    if initial_state is None:
        state = dt.new_zeros(b, G, N, heads // G * P)
    else:
        state = initial_state.to(dt.dtype).reshape(b, G, -1, N).mT
    if missing := -num_tokens % CHUNK:
        # tokens without a time step leave the state as it is
        x, B, C = (F.pad(t, (0, 0, 0, 0, 0, missing)) for t in (x, B, C))
        dt = F.pad(dt, (0, 0, 0, missing))
        if seq_idx is not None:
            last = seq_idx[:, -1:].expand(-1, missing)
            seq_idx = torch.cat([seq_idx, last], dim=1)
    ids = seq_idx.unflatten(1, (-1, CHUNK)) if seq_idx is not None else None
    y, state = _ChunkedScan.apply(x, dt, A, B, C, D, state, ids)
    return y[:, :num_tokens], state.mT.reshape(b, heads, P, N)


FEATURES = frozenset({"documents", "initial_state", "final_state"})
backend = Backend("chunked", ssd, features=FEATURES)
float32_backend = float32_products.backend(float32_products.in_float32(ssd), features=FEATURES)
