"""One token for each of several samples, every one with its own way of drawing."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.generate.request import TokenScore
from nemotron.generate.sample import Sample, Selected
from nemotron.generate.sampling import Choice, accept_or_draw, adjust, choose


@dataclass(frozen=True)
class Draft:
    """A guess at a token."""

    token: int
    shares: Float[Tensor, " V"] | None = None
    """Probabilities (float64) that it was drawn with; absent: it counts if it is what is chosen."""


def select(
    samples: Sequence[Sample],
    logits: Float[Tensor, "B V"],
    drafts: Sequence[Draft | None] | None = None,
) -> list[Selected]:
    """Choose the next token of each sample; it is distributed alike whatever its draft is."""
    if all(map(_takes_the_likeliest, samples)):
        fixed = [sample.take_forced() for sample in samples]
        likeliest = logits.argmax(-1).tolist()
        return [
            Selected(free if other is None else other, other is not None)
            for free, other in zip(likeliest, fixed, strict=True)
        ]
    adjusted = _adjusted(samples, logits)
    guesses = drafts or [None] * len(samples)
    groups: dict[tuple[object, ...], list[int]] = {}
    for row, (sample, guess) in enumerate(zip(samples, guesses, strict=True)):
        key = (guess is not None and _is_drawn(guess), *sample.request.sampling.cut)
        groups.setdefault(key, []).append(row)
    drawn, logprobs = [0] * len(samples), [0.0] * len(samples)
    for rows in groups.values():
        part = adjusted if len(rows) == len(samples) else adjusted[rows]
        own = [samples[row] for row in rows]
        given = [guess for row in rows if (guess := guesses[row]) is not None and _is_drawn(guess)]
        if given and own[0].request.sampling.temperature > 0:
            choice = _choose_beside(own, part, given)
        else:
            sampling = own[0].request.sampling
            uniforms = _uniforms(own, part) if sampling.temperature > 0 else None
            choice = choose(part, sampling, uniforms)
        found = zip(rows, choice.tokens.tolist(), choice.logprobs.tolist(), strict=True)
        for row, token, logprob in found:
            drawn[row], logprobs[row] = token, logprob
    forced = [sample.take_forced() for sample in samples]
    tokens = [free if fixed is None else fixed for free, fixed in zip(drawn, forced, strict=True)]
    scores = _scores(samples, logits, tokens)
    return [
        Selected(
            *(token, fixed is not None, 0.0 if fixed is not None else logprob),
            *(score.logprob, score.top),
        )
        for token, fixed, logprob, score in zip(tokens, forced, logprobs, scores, strict=True)
    ]


def _takes_the_likeliest(sample: Sample) -> bool:
    request = sample.request
    is_greedy = request.sampling.temperature == 0 and not request.sampling.changes_logits
    is_free = sample.guide is None and not sample.barred
    return is_greedy and is_free and not request.logprobs


def _is_drawn(draft: Draft) -> bool:
    return draft.shares is not None


def _uniforms(samples: Sequence[Sample], like: Tensor) -> Float[Tensor, " B"]:
    drawn = torch.tensor([sample.uniform for sample in samples], dtype=torch.float64)
    return drawn.to(like.device)


def _choose_beside(
    samples: Sequence[Sample], logits: Float[Tensor, "B V"], drafts: Sequence[Draft]
) -> Choice:
    """Choose for samples whose drafts were drawn, and who draw in the same way."""
    tokens = torch.tensor([draft.token for draft in drafts])
    drafted_with = [draft.shares for draft in drafts if draft.shares is not None]
    tests = torch.tensor([sample.test_uniform for sample in samples], dtype=torch.float64)
    return accept_or_draw(
        logits,
        samples[0].request.sampling,
        tokens.to(logits.device),
        torch.stack(drafted_with),
        tests.to(logits.device),
        _uniforms(samples, logits),
    )


def _adjusted(samples: Sequence[Sample], logits: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
    """Return the logits after biases, penalties, grammars and shortest lengths."""
    changed = [
        row
        for row, sample in enumerate(samples)
        if sample.request.sampling.changes_logits or sample.guide is not None or sample.barred
    ]
    if not changed:
        return logits
    logits = logits.float().clone()
    for row in changed:
        request = samples[row].request
        if request.sampling.changes_logits:
            tokens = torch.tensor(samples[row].tokens, device=logits.device)
            prompt, answer = tokens.tensor_split([len(request.prompt)])
            logits[row] = adjust(logits[row], request.sampling, prompt, answer)
        if (guide := samples[row].guide) is not None:
            guide.restrict(logits[row])
        if barred := samples[row].barred:
            logits[row, list(barred)] = -torch.inf
    return logits


@dataclass(frozen=True)
class _Score:
    """What the model itself thinks of a chosen token, where that was asked for."""

    logprob: float = 0.0
    top: Sequence[TokenScore] = ()


def _scores(
    samples: Sequence[Sample], logits: Float[Tensor, "B V"], tokens: list[int]
) -> list[_Score]:
    result = [_Score()] * len(samples)
    rows = [row for row, sample in enumerate(samples) if sample.request.logprobs]
    if not rows:
        return result
    chosen = torch.tensor([tokens[row] for row in rows], device=logits.device)
    logprobs = logits[rows].float().log_softmax(-1)
    found = logprobs.gather(1, chosen[:, None]).flatten().tolist()
    for row, value, of_row in zip(rows, found, logprobs, strict=True):
        result[row] = _Score(value, _likeliest(of_row, samples[row].request.top_logprobs))
    return result


def _likeliest(logprobs: Float[Tensor, " V"], count: int) -> list[TokenScore]:
    if not count:
        return []
    values, tokens = logprobs.topk(min(count, logprobs.shape[0]))
    return [TokenScore(*pair) for pair in zip(tokens.tolist(), values.tolist(), strict=True)]
