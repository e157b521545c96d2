"""The tokens of a conversation, and what is known of each."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from nemotron.generate.request import Answer


@dataclass
class Transcript:
    """A prompt, and what follows it: answers of a model, and what was put between them."""

    prompt: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    """All that follows the prompt."""
    logprobs: list[float] = field(default_factory=list)
    """Of each token when it was sampled; 0 if forced."""
    forced: list[bool] = field(default_factory=list)
    """Whether a token was not the model's choice."""
    num_sampled: int = 0
    """Tokens of the answers, without what was put between them."""
    _experts: list[Int[Tensor, "tokens layers K"]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.tokens)

    @property
    def ids(self) -> tuple[int, ...]:
        """All tokens."""
        return (*self.prompt, *self.tokens)

    @property
    def experts(self) -> Int[Tensor, "tokens layers K"] | None:
        """Experts of all tokens but the last, as each was first read; None if not recorded."""
        return torch.cat(self._experts) if self._experts else None

    def add_answer(self, answer: Answer) -> None:
        """Append what a model answered to all tokens so far."""
        if answer.experts is not None:
            # an earlier answer's tokens keep the experts that they were sampled with
            self._experts.append(answer.experts[sum(map(len, self._experts)) :])
        self.tokens += answer.tokens
        self.logprobs += answer.logprobs
        self.forced += answer.forced
        self.num_sampled += len(answer.tokens)

    def add_forced(self, tokens: Sequence[int]) -> None:
        """Append tokens that no model chose."""
        self.tokens += tokens
        self.logprobs += [0.0] * len(tokens)
        self.forced += [True] * len(tokens)
