"""Log-probabilities of the tokens of a prompt, found while the prompt is read."""

from collections.abc import Sequence
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.generate.request import PromptLogprobs, Request
from nemotron.generate.scoring import LOGITS_AT_ONCE
from nemotron.model.hybrid import HybridLM


class PromptScores:
    """What the model thinks of each token of a prompt after the first, given those before it.

    The samples of a request share one. Of each token it holds 4 bytes, and 12 for each of the
    `num_top` likeliest in its place, whatever the size of the vocabulary.
    """

    def __init__(self, prompt: Sequence[int], num_top: int) -> None:
        self.num_top = num_top
        self._prompt = prompt
        self._parts: list[PromptLogprobs] = []
        self._num_known = 0

    @classmethod
    def of(cls, request: Request) -> "PromptScores | None":
        """Return empty scores, or None where a request wants none."""
        num_top = request.prompt_logprobs
        return None if num_top is None else cls(request.prompt, num_top)

    @property
    def is_complete(self) -> bool:
        """Whether every token after the first has its log-probability."""
        return self._num_known == len(self._prompt) - 1

    def targets(self, start: int, size: int) -> Sequence[int]:
        """Return what follows each of `size` tokens read from `start` on, as far as it is needed.

        The beginning is needed again after a preemption: then all comes from one reading.
        """
        if self.is_complete:
            return ()
        return self._prompt[start + 1 : start + 1 + size]

    def add(self, start: int, found: PromptLogprobs) -> None:
        """Record the log-probabilities of the `targets` of tokens from `start` on."""
        if start == 0:
            self._parts, self._num_known = [], 0
        assert start == self._num_known, f"{start} does not follow {self._num_known} known ones"
        self._parts.append(_part(found, slice(None), self.num_top))
        self._num_known += len(found.logprobs)

    @cached_property
    def result(self) -> PromptLogprobs:
        """All of them, once they are complete."""
        assert self.is_complete, "the prompt has not been read"
        parts, self._parts = self._parts, []
        return _joined(parts, self.num_top)


@torch.inference_mode()
def score_prompts(
    model: HybridLM,
    hidden: Float[Tensor, "B T D"],
    scores: Sequence[PromptScores | None],
    starts: Sequence[int],
) -> None:
    """Add to the scores of some prompts what follows the hidden states of their next tokens.

    Row b holds the tokens of its text from `starts[b]` on. Logits of at most `LOGITS_AT_ONCE`
    tokens are in memory at a time.
    """
    size = hidden.shape[1]
    wanted = [
        (row, start, one, targets)
        for row, (one, start) in enumerate(zip(scores, starts, strict=True))
        if one is not None and (targets := one.targets(start, size))
    ]
    if not wanted:
        return
    places = [row * size + at for row, _, _, targets in wanted for at in range(len(targets))]
    tokens = [token for _, _, _, targets in wanted for token in targets]
    num_top = max(one.num_top for _, _, one, _ in wanted)
    states = hidden.flatten(0, 1)[torch.tensor(places, device=hidden.device)]
    parts = zip(
        states.split(LOGITS_AT_ONCE), torch.tensor(tokens).split(LOGITS_AT_ONCE), strict=True
    )
    found = _joined([_score(model, *part, num_top) for part in parts], num_top)
    first = 0
    for _, start, one, targets in wanted:
        last = first + len(targets)
        one.add(start, _part(found, slice(first, last), num_top))
        first = last


def _score(
    model: HybridLM, hidden: Float[Tensor, "P D"], tokens: Int[Tensor, " P"], num_top: int
) -> PromptLogprobs:
    """Return the log-probabilities of tokens, and the likeliest ones in their places."""
    logits = model.logits(hidden)  # [P, V]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = logits.logsumexp(-1, keepdim=True)
    own = logits.gather(1, tokens.to(logits.device)[:, None]) - total
    values, ids = logits.topk(min(num_top, logits.shape[1]))
    # the same subtraction for both: the likeliest token has the same bits in both
    return PromptLogprobs(own[:, 0].cpu(), ids.cpu(), (values - total).cpu())


def _part(found: PromptLogprobs, rows: slice, num_top: int) -> PromptLogprobs:
    return PromptLogprobs(
        found.logprobs[rows], found.top_tokens[rows, :num_top], found.top_logprobs[rows, :num_top]
    )


def _joined(parts: Sequence[PromptLogprobs], num_top: int) -> PromptLogprobs:
    if not parts:  # a prompt of one token
        return PromptLogprobs(
            torch.empty(0), torch.empty(0, num_top, dtype=torch.int64), torch.empty(0, num_top)
        )
    return PromptLogprobs(
        torch.cat([part.logprobs for part in parts]),
        torch.cat([part.top_tokens for part in parts]),
        torch.cat([part.top_logprobs for part in parts]),
    )
