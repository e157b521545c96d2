"""One token for each of several samples, every one with its own way of drawing."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.generate.request import TokenScore
from nemotron.generate.sample import Sample, Selected
from nemotron.generate.sampling import adjust, choose


def select(samples: Sequence[Sample], logits: Float[Tensor, "B V"]) -> list[Selected]:
    """Choose the next token of each sample."""
    adjusted = _adjusted(samples, logits)
    groups: dict[tuple[object, ...], list[int]] = {}
    for row, sample in enumerate(samples):
        groups.setdefault(sample.request.sampling.cut, []).append(row)
    drawn, logprobs = [0] * len(samples), [0.0] * len(samples)
    for rows in groups.values():
        part = adjusted if len(rows) == len(samples) else adjusted[rows]
        uniform = torch.tensor([samples[row].uniform for row in rows], dtype=torch.float64)
        choice = choose(part, samples[rows[0]].request.sampling, uniform.to(logits.device))
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


def _adjusted(samples: Sequence[Sample], logits: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
    """Return the logits after biases, penalties and grammars."""
    changed = [
        row
        for row, sample in enumerate(samples)
        if sample.request.sampling.changes_logits or sample.guide is not None
    ]
    if not changed:
        return logits
    logits = logits.float().clone()
    for row in changed:
        request, tokens = samples[row].request, torch.tensor(samples[row].tokens)
        prompt, answer = tokens.to(logits.device).tensor_split([len(request.prompt)])
        logits[row] = adjust(logits[row], request.sampling, prompt, answer)
        if (guide := samples[row].guide) is not None:
            guide.restrict(logits[row])
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
