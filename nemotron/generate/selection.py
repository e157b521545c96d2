"""One token for each of several samples, every one with its own way of drawing."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

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
    raw = _raw_logprobs(samples, logits, tokens)
    return [
        Selected(token, fixed is not None, 0.0 if fixed is not None else logprob, of_model)
        for token, fixed, logprob, of_model in zip(tokens, forced, logprobs, raw, strict=True)
    ]


def _adjusted(samples: Sequence[Sample], logits: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
    """Return the logits after biases and penalties."""
    changed = [row for row, s in enumerate(samples) if s.request.sampling.changes_logits]
    if not changed:
        return logits
    logits = logits.float().clone()
    for row in changed:
        request, tokens = samples[row].request, torch.tensor(samples[row].tokens)
        prompt, answer = tokens.to(logits.device).tensor_split([len(request.prompt)])
        logits[row] = adjust(logits[row], request.sampling, prompt, answer)
    return logits


def _raw_logprobs(
    samples: Sequence[Sample], logits: Float[Tensor, "B V"], tokens: list[int]
) -> list[float]:
    result = [0.0] * len(samples)
    rows = [row for row, sample in enumerate(samples) if sample.request.logprobs]
    if rows:
        chosen = torch.tensor([tokens[row] for row in rows], device=logits.device)
        found = logits[rows].float().log_softmax(-1).gather(1, chosen[:, None])
        for row, value in zip(rows, found.flatten().tolist(), strict=True):
            result[row] = value
    return result
