"""Choosing the next token: a pure function of the logits and one uniform number per row."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature 0 takes the likeliest, without any randomness.

    `top_k` keeps the k likeliest tokens; `top_p` then keeps the fewest whose probability, among
    those kept, reaches p. Without a `seed` every call draws anew.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(
                f"temperature = {self.temperature} must be a finite number of at least 0; "
                f"0 always takes the likeliest token."
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k = {self.top_k} must be at least 1; leave it out to keep all.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p} must lie in (0, 1]; leave it out to keep all.")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UserError(f"seed = {self.seed} must lie in 0 … 2^63 - 1.")


def choose(
    logits: Float[Tensor, "B V"], sampling: Sampling, uniform: Float[Tensor, " B"] | None
) -> Int[Tensor, " B"]:
    """Return one token a row; `uniform` in [0, 1) says where in the distribution to look.

    A row's token depends on that row alone, so it does not change with its neighbours.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    assert uniform is not None, "a temperature above 0 needs random numbers"
    logits = logits.float()
    # a tiny temperature must not make infinities of large logits
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    tokens = None
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        logits, tokens = logits.topk(sampling.top_k, dim=-1)
    elif sampling.top_p is not None:
        logits, tokens = logits.sort(dim=-1, descending=True, stable=True)
    # float64: a float32 sum over a large vocabulary would shift the rare tokens
    mass = logits.softmax(-1, dtype=torch.float64).cumsum(-1)  # [B, V]
    last = torch.full_like(uniform, mass.shape[-1] - 1, dtype=torch.int64).unsqueeze(1)
    if sampling.top_p is not None:
        # up to and including the first token at which the mass reaches top_p
        last = torch.searchsorted(mass, sampling.top_p * mass[:, -1:]).minimum(last)
    threshold = uniform.double().unsqueeze(1) * mass.gather(1, last)
    place = torch.searchsorted(mass, threshold, right=True).minimum(last)
    if tokens is not None:
        place = tokens.gather(1, place)
    return place.squeeze(1)


def draw_uniforms(
    prompts: Sequence[Sequence[int]], num_tokens: int, sampling: Sampling
) -> Float[Tensor, "B T"] | None:
    """Return the random numbers of every row in advance, or None when none are needed.

    A row's numbers follow from the seed alone, except that the n-th copy of one prompt gets the
    n-th stream: several samples of a prompt differ, and a different neighbour changes nothing.
    """
    if sampling.temperature == 0:
        return None
    seed = sampling.seed if sampling.seed is not None else torch.Generator().seed() % 2**63
    copies: Counter[tuple[int, ...]] = Counter()
    rows = []
    for prompt in prompts:
        generator = torch.Generator().manual_seed((seed + copies[tuple(prompt)]) % 2**63)
        copies[tuple(prompt)] += 1
        rows.append(torch.rand(num_tokens, generator=generator, dtype=torch.float64))
    return torch.stack(rows)
