"""Choosing the next token: a pure function of the logits and one uniform number per row."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature 0 takes the likeliest, without any randomness.

    `top_k` keeps the k likeliest tokens; `top_p` then keeps the fewest whose probability, among
    those kept, reaches p, and `min_p` those that have at least this share of the likeliest one's
    probability. Without a `seed` every request draws anew.

    Before that, `logit_bias` is added to the logits of single tokens. The logits of tokens that
    are in the prompt or the answer are then divided by `repetition_penalty` where they are
    positive and multiplied by it where they are not; `presence_penalty` is subtracted from those
    of tokens in the answer, and `frequency_penalty` once for each time that they are there.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            rule = "must be a finite number of at least 0; 0 always takes the likeliest token."
            raise UserError(rule, key="temperature", value=self.temperature)
        if self.top_k is not None and self.top_k < 1:
            rule = "must be at least 1; leave it out to keep all."
            raise UserError(rule, key="top_k", value=self.top_k)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            rule = "must lie in (0, 1]; leave it out to keep all."
            raise UserError(rule, key="top_p", value=self.top_p)
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            rule = "must lie in [0, 1]; leave it out to keep all."
            raise UserError(rule, key="min_p", value=self.min_p)
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UserError("must lie in 0 … 2^63 - 1.", key="seed", value=self.seed)
        if not 0 < self.repetition_penalty < math.inf:
            rule = "must be a finite number above 0; 1 changes nothing."
            raise UserError(rule, key="repetition_penalty", value=self.repetition_penalty)
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(value := getattr(self, name)):
                raise UserError("must be a finite number.", key=name, value=value)
        for token, bias in self.logit_bias.items():
            if math.isnan(bias) or bias == math.inf:
                key = f"logit_bias of token {token}"
                raise UserError("must be a number below inf.", key=key, value=bias)

    @property
    def changes_logits(self) -> bool:
        """Whether the logits depend on more than the model."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return bool(self.logit_bias) or penalties != (1.0, 0.0, 0.0)

    @property
    def cut(self) -> tuple[object, ...]:
        """What rows must have in common to be chosen from together."""
        return self.temperature, self.top_k, self.top_p, self.min_p


@dataclass(frozen=True)
class Choice:
    """One token for each row.

    `logprobs` (float64, in nats) are those of the distribution that the tokens were drawn from;
    with temperature 0 it has one token, so they are 0.
    """

    tokens: Int[Tensor, " B"]
    logprobs: Float[Tensor, " B"]


@dataclass(frozen=True)
class Drawn:
    """One token for each row, and the probabilities (float64) of all tokens."""

    tokens: Int[Tensor, " B"]
    shares: Float[Tensor, "B V"]


def choose(
    logits: Float[Tensor, "B V"], sampling: Sampling, uniform: Float[Tensor, " B"] | None
) -> Choice:
    """Choose one token for each row, at the quantile `uniform` in [0, 1) of its distribution.

    A row's token depends on that row alone, so it does not change with its neighbors.
    """
    if sampling.temperature == 0:
        return Choice(logits.argmax(-1), logits.new_zeros(logits.shape[0], dtype=torch.float64))
    assert uniform is not None, "a temperature above 0 needs random numbers"
    return _draw(_cut(logits, sampling), uniform)


def draw(logits: Float[Tensor, "B V"], sampling: Sampling, uniform: Float[Tensor, " B"]) -> Drawn:
    """Return what `choose` draws, and the `distribution` that it is drawn from."""
    cut = _cut(logits, sampling)
    return Drawn(_draw(cut, uniform).tokens, _distribution(cut, logits))


def _draw(cut: "_Cut", uniform: Float[Tensor, " B"]) -> Choice:
    place = torch.searchsorted(cut.mass, uniform.double().unsqueeze(1) * cut.kept, right=True)
    place = place.minimum(cut.last)
    logprobs = (cut.shares.gather(1, place) / cut.kept).log()
    if cut.tokens is not None:
        place = cut.tokens.gather(1, place)
    return Choice(place.squeeze(1), logprobs.squeeze(1))


def distribution(logits: Float[Tensor, "B V"], sampling: Sampling) -> Float[Tensor, "B V"]:
    """Return the probabilities (float64) with which `choose` draws each token."""
    assert sampling.temperature > 0, "the likeliest token is not drawn"
    return _distribution(_cut(logits, sampling), logits)


def _distribution(cut: "_Cut", logits: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
    is_kept = torch.arange(cut.shares.shape[1], device=logits.device) <= cut.last
    shares = (cut.shares / cut.kept).where(is_kept, 0.0)
    if cut.tokens is None:
        return shares
    return shares.new_zeros(logits.shape).scatter_(1, cut.tokens, shares)


def accept_or_draw(
    logits: Float[Tensor, "B V"],
    sampling: Sampling,
    drafts: Int[Tensor, " B"],
    drafted_with: Float[Tensor, "B V"],
    test: Float[Tensor, " B"],
    uniform: Float[Tensor, " B"],
) -> Choice:
    """Choose one token a row so that it is distributed as by `choose`, and often the draft.

    A draft that was drawn with probability q is accepted with probability min(1, p / q), which
    `test` decides; another token is drawn from what p has more than q.
    Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding".
    """
    shares = distribution(logits, sampling)
    drafts = drafts.unsqueeze(1)
    is_accepted = test.unsqueeze(1) * drafted_with.gather(1, drafts) < shares.gather(1, drafts)
    mass = (shares - drafted_with).clamp_(min=0).cumsum(-1)
    # the draft was refused although both are equal up to rounding
    mass = torch.where(mass[:, -1:] > 0, mass, shares.cumsum(-1))
    whole = mass[:, -1:].contiguous()
    place = torch.searchsorted(mass, uniform.double().unsqueeze(1) * whole, right=True)
    place = place.minimum(torch.searchsorted(mass, whole))
    tokens = torch.where(is_accepted, drafts, place)
    return Choice(tokens.squeeze(1), shares.gather(1, tokens).log().squeeze(1))


@dataclass(frozen=True)
class _Cut:
    """The tokens of each row that may be drawn, likeliest first if some may not."""

    shares: Float[Tensor, "B S"]
    mass: Float[Tensor, "B S"]
    """Sums of `shares`, both in float64."""
    last: Int[Tensor, "B 1"]
    kept: Float[Tensor, "B 1"]
    """Mass up to and including the `last` place that is kept."""
    tokens: Int[Tensor, "B S"] | None
    """Which they are; absent: all in their order."""


def _cut(logits: Float[Tensor, "B V"], sampling: Sampling) -> _Cut:
    logits = logits.float()
    # a tiny temperature must not make infinities of large logits
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    tokens = None
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        logits, tokens = logits.topk(sampling.top_k, dim=-1)
    elif sampling.top_p is not None or sampling.min_p:
        logits, tokens = logits.sort(dim=-1, descending=True, stable=True)
    # float64: a float32 sum over a large vocabulary would shift the rare tokens
    shares = logits.softmax(-1, dtype=torch.float64)
    mass = shares.cumsum(-1)  # [B, V]
    shape = (logits.shape[0], 1)
    last = torch.full(shape, mass.shape[-1] - 1, dtype=torch.int64, device=logits.device)
    if sampling.top_p is not None:
        # up to and including the first token at which the mass reaches top_p
        last = torch.searchsorted(mass, sampling.top_p * mass[:, -1:]).minimum(last)
    if sampling.min_p:
        enough = (shares >= sampling.min_p * shares[:, :1]).sum(-1, keepdim=True)
        last = last.minimum(enough - 1)
    return _Cut(shares, mass, last, mass.gather(1, last), tokens)


def adjust(
    logits: Float[Tensor, " V"], sampling: Sampling, prompt: Tensor, answer: Tensor
) -> Float[Tensor, " V"]:
    """Return the logits of one row after its bias and penalties, in float32.

    `prompt` and `answer` are the row's tokens so far.
    """
    logits = logits.float().clone()
    if sampling.logit_bias:
        tokens = torch.tensor(list(sampling.logit_bias), device=logits.device)
        values = list(sampling.logit_bias.values())
        bias = torch.tensor(values, dtype=logits.dtype, device=logits.device)
        logits.index_add_(0, tokens, bias)
    if sampling.repetition_penalty != 1:
        seen = torch.cat([prompt, answer]).unique()
        found, penalty = logits[seen], sampling.repetition_penalty
        logits[seen] = torch.where(found > 0, found / penalty, found * penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        seen, counts = answer.unique(return_counts=True)
        logits[seen] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    return logits


class Uniforms:
    """The random numbers of one answer: number t depends only on the seed and t."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed % 2**63)
        self._drawn: list[float] = []

    def __getitem__(self, position: int) -> float:
        while position >= len(self._drawn):
            more = torch.rand(64, generator=self._generator, dtype=torch.float64)
            self._drawn += more.tolist()
        return self._drawn[position]


def streams(seed: int, count: int) -> list[Uniforms]:
    """Return sequences that do not depend on each other; the first is that of the seed itself."""
    odd = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: far from the seeds of other answers
    return [Uniforms(seed + number * odd) for number in range(count)]


def fresh_seed() -> int:
    """Return a random seed."""
    return torch.Generator().seed() % 2**63
