"""Passes through a model that continue texts of a cache."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.model.cache import BLOCK_SIZE, Cache
from nemotron.model.cache_formats import UNCHANGED, CacheFormats
from nemotron.model.cached_rows import CachedRows
from nemotron.model.hybrid import HybridLM

PIECE = 512
"""Tokens of a prompt that pass the model at once, which bounds the memory of a long one."""


def new_cache(
    model: HybridLM,
    slots: int,
    blocks: int | None = None,
    block_size: int = BLOCK_SIZE,
    *,
    drafts: int = 0,
    replay: bool = False,
    formats: CacheFormats = UNCHANGED,
) -> Cache:
    """Return a cache in the dtype and on the device of the model."""
    table = model.backbone.embeddings.weight
    dtype = model.compute_dtype or table.dtype
    device = table.device
    return Cache(
        model.config,
        slots,
        blocks=blocks,
        block_size=block_size,
        drafts=drafts,
        replay=replay,
        formats=formats,
        dtype=dtype,
        device=device,
    )


@torch.inference_mode()
def append(model: HybridLM, rows: CachedRows, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B V"]:
    """Append the same number of tokens to every row; return the logits of the next one."""
    return score(model, extend(model, rows, tokens, only_last=True))


@torch.inference_mode()
def extend(
    model: HybridLM, rows: CachedRows, tokens: Int[Tensor, "B T"], *, only_last: bool = False
) -> Float[Tensor, "B S D"]:
    """Append the same number of tokens to every row; return their hidden states, or the last."""
    return model(tokens, cache=rows, only_last=only_last)


@torch.inference_mode()
def score(model: HybridLM, hidden: Float[Tensor, "B T D"]) -> Float[Tensor, "B V"]:
    """Return the logits of the token after the last one."""
    return model.logits(hidden[:, -1])


def read(
    model: HybridLM, prompts: Sequence[Sequence[int]], piece: int = PIECE
) -> tuple[CachedRows, Float[Tensor, "B V"]]:
    """Read prompts into a cache of their own; return its rows and the logits of the next token.

    Prompts of one length are read together, so that nothing is padded.
    """
    cache = new_cache(model, len(prompts))
    slots = [cache.admit() for _ in prompts]
    logits: list[Tensor] = [torch.empty(0)] * len(prompts)
    by_length: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(number)
    for numbers in by_length.values():
        rows = CachedRows(cache, [slots[number] for number in numbers])
        ids = torch.tensor([list(prompts[number]) for number in numbers], device=cache.device)
        for tokens in ids.split(piece, dim=1):
            found = append(model, rows, tokens)
        for number, row in zip(numbers, found, strict=True):
            logits[number] = row
    return CachedRows(cache, slots), torch.stack(logits)
