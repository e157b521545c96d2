"""The definition of a step over a few tokens, layer by layer, in float32 or wider."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.ops.attention import reference as attention
from nemotron.ops.rms_norm import gated_reference
from nemotron.ops.rms_norm import reference as rms_norm
from nemotron.ops.ssd import reference as ssd
from nemotron.ops.token_step.stack import (
    AttentionWeights,
    DenseWeights,
    ExpertsWeights,
    JoinWeights,
    KeysPlace,
    MambaPlace,
    MambaWeights,
    Matrix,
    Stack,
    Step,
)


def multiply(x: Float[Tensor, "*batch I"], matrix: Matrix) -> Float[Tensor, "*batch O"]:
    """Return x Wᵀ, summed in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(wide), matrix.dense().to(wide)).to(x.dtype)


def token_step(stack: Stack, step: Step) -> Float[Tensor, "B T D"]:
    """hidden + mixer(norm(hidden)) for every layer, then the final norm."""
    wide = torch.promote_types(stack.dtype, torch.float32)
    if stack.join is None and step.hidden is not None:
        hidden = step.hidden.to(wide)
    else:
        hidden = F.embedding(step.tokens, stack.embeddings).to(stack.dtype).to(wide)
    if stack.join is not None:
        hidden = _join(stack.join, hidden, step)
    step.kept = [None] * len(stack.layers)
    for number, layer in enumerate(stack.layers):
        x = rms_norm(hidden, layer.norm, layer.eps)
        if isinstance(layer, MambaWeights):
            hidden = hidden + _mamba(layer, step, number, x)
        elif isinstance(layer, AttentionWeights):
            hidden = hidden + _attention(layer, step, number, x)
        elif isinstance(layer, ExpertsWeights):
            hidden = hidden + _experts(layer, step, x)
        else:
            assert isinstance(layer, DenseWeights), layer
            hidden = hidden + multiply(multiply(x, layer.up).relu().square(), layer.down)
    hidden = hidden[:, -1:] if step.only_last else hidden
    return rms_norm(hidden, stack.final_norm, stack.eps).to(stack.dtype)


def advance(stack: Stack, step: Step, counts: Int[Tensor, " B"]) -> None:
    """Scan the tokens that are kept once more, each text by itself."""
    for layer, place, kept in zip(stack.layers, step.places, step.kept, strict=True):
        if not isinstance(layer, MambaWeights):
            continue
        assert isinstance(place, MambaPlace), place
        assert kept is not None, "the step did not keep its inputs"
        for row, (slot, count) in enumerate(zip(step.slots, counts, strict=True)):
            if count:
                inputs = kept[row : row + 1, :count]
                _scan(layer, place, slot[None], inputs, is_kept=False)


def _join(join: JoinWeights, embedded: Tensor, step: Step) -> Tensor:
    assert step.hidden is not None, "what is joined with the embeddings?"
    parts = (
        rms_norm(embedded, join.embedding_norm, join.eps),
        rms_norm(step.hidden.to(embedded.dtype), join.hidden_norm, join.eps),
    )
    return multiply(torch.cat(parts, dim=-1), join.proj)


def _mamba(layer: MambaWeights, step: Step, number: int, x: Tensor) -> Tensor:
    place, groups = step.places[number], layer.num_groups
    assert isinstance(place, MambaPlace), place
    inner, channels = layer.out_proj.num_inputs, layer.kernel.shape[1]
    z, xBC, dt = multiply(x, layer.in_proj).split([inner, channels, layer.decay.shape[0]], -1)
    # what is convolved later is rounded as it is stored
    inputs = torch.cat([xBC.to(place.conv.dtype).to(x.dtype), dt], dim=-1)
    if step.keeps_inputs:
        step.kept[number] = inputs.float()
    y = _scan(layer, place, step.slots, inputs, is_kept=step.keeps_inputs)
    y = gated_reference(y, z, layer.gate_norm, groups, layer.gate_eps)
    return multiply(y, layer.out_proj)


def _scan(
    layer: MambaWeights,
    place: MambaPlace,
    slots: Int[Tensor, " B"],
    inputs: Float[Tensor, "B T CH"],
    *,
    is_kept: bool,
) -> Float[Tensor, "B T I"]:
    """Convolve and scan; the states stay if they are kept."""
    wide, heads = inputs.dtype, layer.decay.shape[0]
    xBC, dt = inputs.split([layer.kernel.shape[1], heads], -1)
    before, length = place.conv[slots].to(wide), inputs.shape[1]
    window = torch.cat([before, xBC], dim=1)
    mixed = sum(window[:, i : i + length] * row for i, row in enumerate(layer.kernel))
    assert isinstance(mixed, Tensor), "a kernel has rows"
    mixed = F.silu(mixed if layer.bias is None else mixed + layer.bias)
    inner, size = layer.out_proj.num_inputs, layer.num_groups * layer.state_size
    x, B, C = mixed.split([inner, size, size], -1)
    B, C = (t.unflatten(-1, (layer.num_groups, -1)) for t in (B, C))
    dt = F.softplus(dt + layer.dt_bias).clamp(*layer.limits)
    state = place.ssm[slots].to(wide)
    x = x.unflatten(-1, (heads, -1))
    y, state = ssd(x, dt, layer.decay, B, C, layer.skip, state, None)
    if not is_kept:
        place.ssm[slots] = state.to(place.ssm.dtype)
        place.conv[slots] = window[:, length:].to(place.conv.dtype)
    return y.flatten(2)


def _attention(layer: AttentionWeights, step: Step, number: int, x: Tensor) -> Tensor:
    place, size = step.places[number], layer.head_size
    assert isinstance(place, KeysPlace), place
    new = multiply(x, layer.qkv_proj).unflatten(-1, (-1, size))
    q, k, v = new.split([layer.num_queries, layer.num_keys, layer.num_keys], 2)
    results = []
    for row, before in enumerate(step.lengths.tolist()):
        end, table = before + x.shape[1], step.tables[row]
        for pool, tokens in ((place.keys, k[row]), (place.values, v[row])):
            for position in range(before, end):
                block, offset = divmod(position, pool.shape[1])
                pool[table[block], offset] = tokens[position - before].to(pool.dtype)
        keys, values = (
            pool[table].flatten(0, 1)[None, step.skipped : end].to(x.dtype)
            for pool in (place.keys, place.values)
        )
        results.append(attention(q[row : row + 1], keys, values, None, None))
    return multiply(torch.cat(results).flatten(2), layer.o_proj)


def _experts(layer: ExpertsWeights, step: Step, x: Tensor) -> Tensor:
    tokens = x.flatten(0, 1)
    scores = multiply(tokens, layer.router).sigmoid()
    chosen = (scores + layer.router_bias).topk(layer.top_k, dim=-1).indices
    weights = scores.gather(1, chosen)
    if layer.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    step.chosen.append(chosen)
    weights = weights * layer.scaling
    latent = tokens if layer.to_latent is None else multiply(tokens, layer.to_latent)
    routed = torch.zeros_like(latent)
    for token, expert, weight in zip(
        torch.arange(len(tokens)).repeat_interleave(layer.top_k),
        chosen.flatten(),
        weights.flatten(),
        strict=True,
    ):
        up, down = (Matrix(m.blocks[expert], m.num_outputs) for m in (layer.up, layer.down))
        routed[token] += multiply(multiply(latent[token], up).relu().square() * weight, down)
    if layer.from_latent is not None:
        routed = multiply(routed, layer.from_latent)
    shared = multiply(multiply(tokens, layer.shared_up).relu().square(), layer.shared_down)
    return (routed + shared).view_as(x)
