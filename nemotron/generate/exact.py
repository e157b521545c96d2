"""Operations whose result for a token does not depend on how many others are computed with it.

Libraries choose the order of a sum by the sizes of a product, so that a token decoded alone and the
same token in a whole text differ in their last bits. Here every product has one size: rows are cut
into tiles and filled up, keys into blocks, and the scan into chunks that begin at fixed places. A
model with these operations gives the same bits whether a text is read at once or token by token,
alone or beside others.
Source: vllm-project/vllm PR 54993 (replay of the partial chunk), NVIDIA/Megatron-LM
(`batch_invariant_mode`).
"""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.generate.module_copies import copy_modules, take_over
from nemotron.model import few_tokens
from nemotron.model.attention import Attention
from nemotron.model.hybrid import HybridLM
from nemotron.model.linear import Linear, RMSNorm
from nemotron.model.mamba2 import Mamba2
from nemotron.model.moe import Experts
from nemotron.model.router import Choice, FirstRun, Router, Routing
from nemotron.model.state import CHUNK, MambaSlots, MambaState, Partial
from nemotron.ops.rms_norm import gated_reference, reference
from nemotron.ops.routing import count

ROWS, KEYS = 16, 64
"""Tokens in a tile of a product, and keys in a block."""
SIDES = 16
"""Widths of a product are filled up to a multiple of it: with 7 inputs, a row's sum has another
order at another place of its tile on CPUs with vectors of 32 bytes."""
VECTORS = 64
"""Tokens for which functions such as exp are computed at once: a multiple of any vector's width,
because the elements that are left over pass through other code."""


def exact_view(model: HybridLM) -> HybridLM:
    """Return a model that has its parameters in common with `model`, with exact operations.

    It is slower than `model`. An engine whose cache replays (`Engine(mamba_decode="replay")`) and a
    pass over whole texts give the same bits with it.
    """
    view = cast(HybridLM, copy_modules(model))
    for module in list(view.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Mamba2):
                setattr(module, name, ExactMamba(child))
            elif isinstance(child, Router):
                setattr(module, name, ExactRouter(child))
    for module in view.modules():
        if isinstance(module, Linear):
            vars(module)["linear"] = linear
        elif isinstance(module, Router):
            vars(module)["wide_linear"] = wide_linear
        elif isinstance(module, Experts):
            vars(module)["grouped_linear"] = grouped_linear
        elif isinstance(module, Attention):
            vars(module)["attention"] = attention
        elif isinstance(module, RMSNorm):
            vars(module)["rms_norm"] = rms_norm
    return view


def in_vectors(function: Callable[..., Tensor], *tensors: Float[Tensor, "B T *rest"]) -> Tensor:
    """Apply what treats every token by itself, to as many tokens at a time as fill vectors."""
    shape = tensors[0].shape[:2]
    flat = [tensor.flatten(0, 1) for tensor in tensors]
    fill = -flat[0].shape[0] % VECTORS
    filled = [torch.cat([t, t.new_zeros(fill, *t.shape[1:])]).split(VECTORS) for t in flat]
    found = torch.cat([function(*tiles) for tiles in zip(*filled, strict=True)])
    return found[: flat[0].shape[0]].unflatten(0, shape)


def linear(x: Float[Tensor, "*batch I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "*batch O"]:
    """As `ops.linear`, tile by tile."""
    rows, (outputs, inputs) = x.reshape(-1, x.shape[-1]), weight.shape
    filled = F.pad(rows, (0, -inputs % SIDES, 0, -rows.shape[0] % ROWS))
    weight = F.pad(weight.to(x.dtype), (0, -inputs % SIDES, 0, -outputs % SIDES))
    tiles = [F.linear(tile.contiguous(), weight) for tile in filled.split(ROWS)]
    return torch.cat(tiles)[: rows.shape[0], :outputs].reshape(*x.shape[:-1], outputs)


def wide_linear(x: Float[Tensor, "M I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "M O"]:
    """As `ops.linear.wide_linear`, tile by tile."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return linear(x.to(wide), weight)


def grouped_linear(
    rows: Float[Tensor, "R I"], weight: Float[Tensor, "E O I"], counts: Int[Tensor, " E"]
) -> Float[Tensor, "R O"]:
    """As `ops.grouped_linear`, tile by tile."""
    parts = rows.split(counts.tolist())
    pairs = zip(parts, weight, strict=True)
    return torch.cat([linear(part, own) for part, own in pairs])


def rms_norm(
    x: Float[Tensor, "B T D"], weight: Float[Tensor, " D"], eps: float
) -> Float[Tensor, "B T D"]:
    """As `ops.rms_norm`, whose backends take another formula for more tokens."""
    return in_vectors(partial(reference, weight=weight, eps=eps), x)


def attention(
    q: Float[Tensor, "B T Hq Dh"],
    k: Float[Tensor, "B S Hkv Dh"],
    v: Float[Tensor, "B S Hkv Dh"],
    *,
    seq_idx: Int[Tensor, "B S"] | None = None,
    lengths: Int[Tensor, " B"] | None = None,
) -> Float[Tensor, "B T Hq Dh"]:
    """As `ops.attention`, a tile of queries and a block of keys at a time, in float32 or wider.

    Blocks are read in order and change nothing for a query that stands before them.
    """
    assert seq_idx is None, "a row is one document"
    dtype, wide = v.dtype, torch.promote_types(q.dtype, torch.float32)
    if lengths is None:
        lengths = torch.full((q.shape[0],), k.shape[1], device=q.device)
    length, groups, size = q.shape[1], k.shape[2], q.shape[3]
    side = -size % SIDES
    places = lengths[:, None] - length + torch.arange(length + -length % ROWS, device=q.device)
    q = F.pad(q.to(wide), (0, side, 0, 0, 0, -length % ROWS)) * size**-0.5
    q = q.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)  # [B, Hkv, R, T, Dh]
    is_known = torch.arange(k.shape[1], device=k.device) < lengths[:, None]
    k, v = (
        F.pad(t.to(wide) * is_known[..., None, None], (0, side, 0, 0, 0, -t.shape[1] % KEYS))
        for t in (k, v)
    )
    k, v = (t.transpose(1, 2).flatten(0, 1) for t in (k, v))  # [B Hkv, S, Dh]
    tiles = zip(q.split(ROWS, dim=3), places.split(ROWS, dim=1), strict=True)
    found = torch.cat([_attend(tile, place, k, v) for tile, place in tiles], dim=3)
    return found.permute(0, 3, 1, 2, 4).flatten(2, 3)[:, :length, :, :size].to(dtype)


def _attend(
    q: Float[Tensor, "B Hkv R T Dh"],
    places: Int[Tensor, "B T"],
    k: Float[Tensor, "C S Dh"],
    v: Float[Tensor, "C S Dh"],
) -> Float[Tensor, "B Hkv R T Dh"]:
    """Attend with one tile of queries."""
    rows = q.flatten(0, 1).flatten(1, 2).contiguous()  # [B Hkv, R T, Dh]
    top = rows.new_full((*rows.shape[:2], 1), float("-inf"))
    total, result = torch.zeros_like(top), torch.zeros_like(rows)
    for begin in range(0, k.shape[1], KEYS):
        keys, values = (t[:, begin : begin + KEYS].contiguous() for t in (k, v))
        seen = torch.arange(begin, begin + KEYS, device=q.device) <= places[..., None]
        seen = seen[:, None, None].expand(*q.shape[:4], -1).reshape(*rows.shape[:2], -1)
        scores = torch.stack([a @ b.T for a, b in zip(rows, keys, strict=True)])
        scores = scores.masked_fill(~seen, float("-inf"))
        newest = torch.maximum(top, scores.amax(-1, keepdim=True))
        shares, old = (scores - newest).exp(), (top - newest).exp()
        total = total * old + shares.sum(-1, keepdim=True)
        added = torch.stack([a @ b for a, b in zip(shares, values, strict=True)])
        result, top = result * old + added, newest
    return (result / total).view(q.shape)


class ExactRouter(Router):
    """Routes as many tokens at a time as fill vectors."""

    def __init__(self, router: Router) -> None:
        take_over(self, router)

    def forward(
        self,
        x: Float[Tensor, "M D"],
        choice: Choice | None = None,
        first_run: FirstRun | None = None,
    ) -> Routing:
        """As `Router.forward`."""
        if choice is not None:  # the gate before it is not exact either
            return super().forward(x, choice)
        filled = F.pad(x, (0, 0, 0, -x.shape[0] % VECTORS)).split(VECTORS)
        tiles = [super(ExactRouter, self).forward(tile) for tile in filled]
        scores, experts, weights = (
            torch.cat([getattr(tile, name) for tile in tiles])[: x.shape[0]]
            for name in ("scores", "experts", "weights")
        )
        return Routing(scores, experts, weights, count(experts.flatten(), self.num_experts))


class ExactMamba(Mamba2):
    """Scans in chunks that begin at fixed places of the text; a partial chunk is scanned again."""

    def __init__(self, mamba: Mamba2) -> None:
        take_over(self, mamba)

    def forward(
        self,
        u: Float[Tensor, "B T D"],
        seq_idx: Int[Tensor, "B T"] | None = None,
        state: MambaState | None = None,
    ) -> Float[Tensor, "B T D"]:
        """As `Mamba2.forward`."""
        assert seq_idx is None, "a row is one document"
        z, xBC, dt = self.in_proj(u).split(self.splits, dim=-1)
        dt = in_vectors(self._time_step, dt)
        if state is None:
            state = self._empty(xBC, dt)
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        window = torch.cat([state.conv, xBC], dim=1)
        mixed = _convolve(window, weight, bias, xBC.shape[1])
        y = self._scan(mixed, dt, state)
        state.store(window[:, xBC.shape[1] :], state.ssm)
        norm = in_vectors(self._normalize, y.to(u.dtype), z)
        return self.out_proj(norm)

    def _normalize(self, y: Float[Tensor, "M I"], z: Float[Tensor, "M I"]) -> Float[Tensor, "M I"]:
        return gated_reference(y, z, self.norm.weight, self.num_groups, self.norm.eps)

    def _empty(self, xBC: Float[Tensor, "B T C"], dt: Float[Tensor, "B T H"]) -> MambaState:
        """Return the state before a text."""
        rows, width = xBC.shape[0], self.conv1d.weight.shape[2] - 1
        slots = MambaSlots(
            xBC.new_zeros(rows, width, xBC.shape[2]),
            dt.new_zeros(rows, self.num_heads, self.head_dim, self.state_size),
            partial=Partial(
                xBC.new_zeros(rows, CHUNK, xBC.shape[2]), dt.new_zeros(rows, CHUNK, dt.shape[2])
            ),
        )
        state = MambaState(slots, slice(0, rows))
        state.load()
        state.steps = torch.zeros(rows, dtype=torch.int64, device=xBC.device)
        return state

    def _scan(
        self, mixed: Float[Tensor, "B T C"], dt: Float[Tensor, "B T H"], state: MambaState
    ) -> Float[Tensor, "B T I"]:
        """Scan up to the next end of a chunk of any row, again and again."""
        results, first, length = [], 0, mixed.shape[1]
        row = torch.arange(mixed.shape[0], device=mixed.device)[:, None]
        partial = state.partial
        assert partial is not None, "the cache does not replay"
        assert state.steps is not None, "the rows must be begun first"
        while first < length:
            begins = state.steps % CHUNK
            count = min(length - first, CHUNK - int(begins.max()))
            places = begins[:, None] + torch.arange(count, device=mixed.device)
            partial.mixed[row, places] = mixed[:, first : first + count]
            partial.dt[row, places] = dt[:, first : first + count]
            x, B, C = (_fill(t) for t in self.split(partial.mixed))
            decay = partial.dt * -self.A_log.exp()
            inputs = few_tokens.Inputs(partial.mixed, x, partial.dt, decay, B)
            ssm = _fill(_fill(state.ssm).mT).mT.contiguous()
            y = few_tokens.scan(inputs, C, self.D, ssm)[..., : self.head_dim]
            results.append(y.flatten(2)[row, places])
            state.steps = state.steps + count
            ends = (begins + count == CHUNK) * CHUNK
            if bool(ends.any()):
                inputs.advance(ssm, ends)
                state.ssm.copy_(ssm[..., : self.head_dim, : self.state_size])
            first += count
        return torch.cat(results, dim=1)


def _fill(x: Float[Tensor, "*batch N"]) -> Float[Tensor, "*batch filled"]:
    return F.pad(x, (0, -x.shape[-1] % SIDES)) if x.shape[-1] % SIDES else x


def _convolve(
    window: Float[Tensor, "B S C"],
    weight: Float[Tensor, "C W"],
    bias: Float[Tensor, " C"] | None,
    length: int,
) -> Float[Tensor, "B T C"]:
    wide = torch.promote_types(window.dtype, torch.float32)
    inputs, y = window.to(wide), torch.zeros((), dtype=wide, device=window.device)
    for offset in range(weight.shape[1]):
        y = y + inputs[:, offset : offset + length] * weight[:, offset].to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return in_vectors(F.silu, y).to(window.dtype)
