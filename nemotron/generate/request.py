"""What is asked of the engine, and what comes back while it works and at the end."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from nemotron.errors import UserError
from nemotron.generate.budget import ReasoningBudget
from nemotron.generate.guide import Grammar
from nemotron.generate.sampling import Sampling, fresh_seed

Finish = Literal["stop", "length", "abort"]
"""Why an answer ended: a stop token or string, its longest length, or because it was canceled."""


@dataclass(frozen=True)
class Begun:
    """The first tokens of an answer, chosen before; the answer continues them."""

    tokens: tuple[int, ...]
    forced: tuple[bool, ...]
    logprobs: tuple[float, ...]
    versions: tuple[tuple[int, int], ...]
    """As `Answer.versions`."""

    @classmethod
    def of(cls, answer: "Answer") -> "Begun":
        """Return an answer with log-probabilities as far as it goes."""
        return cls(
            tuple(answer.tokens),
            tuple(answer.forced),
            tuple(answer.logprobs),
            tuple(answer.versions),
        )


@dataclass(frozen=True)
class Request:
    """A prompt and how it is to be continued."""

    prompt: Sequence[int]
    max_tokens: int = 128
    """Longest answer, the stop token included; 0 only with `prompt_logprobs`."""
    sampling: Sampling = field(default_factory=Sampling)
    num_samples: int = 1
    """Answers to draw; the prompt is read once. Sample k has the seed of the request plus k."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the answer, beside those of the engine; none of them is in its text."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they do not appear in its text."""
    include_stop_str_in_output: bool = False
    """Whether the text ends with the stop string or the text of the stop token."""
    min_tokens: int = 0
    """Tokens that come before the one that may end the answer: no stop token is drawn before, and
    a stop string counts if it ends later."""
    ignore_eos: bool = False
    """Whether the stop tokens of the engine do not end the answer."""
    skip_special_tokens: bool = True
    """Whether the text lacks the names of special tokens."""
    forced: tuple[int, ...] = ()
    """Tokens with which the answer begins."""
    budget: ReasoningBudget | None = None
    logprobs: bool = False
    """Whether log-probabilities are computed."""
    top_logprobs: int = 0
    """How many of the likeliest tokens at each place are recorded; needs `logprobs`."""
    prompt_logprobs: int | None = None
    """How many of the likeliest tokens are recorded in the place of each token of the prompt after
    the first, beside its log-probability under the model; None: no such record."""
    grammar: Grammar | None = None
    """The form of the answer; tokens that are forced are not checked against it."""
    experts: bool = False
    """Whether the experts that each token chose are recorded."""
    begun: Begun | None = None
    """What the one sample has answered before, with the seed of now. It counts in `max_tokens`, is
    read again as the prompt is, and has 0 as log-probability under the model itself."""

    def check(self, vocab_size: int, name: str = "prompt") -> None:
        """Refuse what a model with such a vocabulary cannot answer; `name` is that of the prompt.

        Raises:
            UserError: when the request is impossible.
        """
        if self.max_tokens < (self.prompt_logprobs is None):
            raise UserError("must be at least 1.", key="max_new_tokens", value=self.max_tokens)
        if not 0 <= self.min_tokens <= self.max_tokens:
            rule = f"must be from 0 to the {self.max_tokens} tokens of the longest answer."
            raise UserError(rule, key="min_tokens", value=self.min_tokens)
        if self.grammar is not None and (self.min_tokens or self.ignore_eos):
            raise UserError(
                "min_tokens and ignore_eos exclude a given form of the answer, which says itself "
                "where the answer ends; leave them out."
            )
        if self.num_samples < 1:
            raise UserError("must be at least 1.", key="num_samples", value=self.num_samples)
        for key, count in (
            ("top_logprobs", self.top_logprobs),
            ("prompt_logprobs", self.prompt_logprobs or 0),
        ):
            if count < 0:
                raise UserError("must be at least 0.", key=key, value=count)
        if not all(self.stop):
            raise UserError("a stop string is empty; give it at least one character.")
        named = {
            name: self.prompt,
            "forced": self.forced,
            "stop_ids": self.stop_ids,
            "logit_bias": self.sampling.logit_bias,
        }
        for key, tokens in named.items():
            for token in tokens:
                if not 0 <= token < vocab_size:
                    raise UserError(
                        f"has token {token}, but the model's vocabulary has {vocab_size} "
                        f"tokens; use the tokenizer that the model was trained with.",
                        key=key,
                    )
        if not self.prompt:
            raise UserError("is empty; give it at least one token.", key=name)


def requests_of(
    prompts: Sequence[Sequence[int]], max_tokens: int, sampling: Sampling
) -> list[Request]:
    """Return a request for each prompt.

    All have one seed, except that the n-th copy of a prompt has the n-th seed after it: answers to
    one prompt differ, and another prompt changes nothing.

    Raises:
        UserError: when no prompt is given.
    """
    if not prompts:
        raise UserError("no prompt is given; give at least one.")
    first = fresh_seed() if sampling.seed is None else sampling.seed
    copies: Counter[tuple[int, ...]] = Counter()
    requests = []
    for prompt in map(tuple, prompts):
        seed = (first + copies[prompt]) % 2**63
        copies[prompt] += 1
        requests.append(Request(prompt, max_tokens, replace(sampling, seed=seed)))
    return requests


@dataclass(frozen=True)
class TokenScore:
    """A token and its log-probability in nats, under the model."""

    token: int
    logprob: float


@dataclass(frozen=True)
class PromptLogprobs:
    """What the model thinks of each token of a prompt after the first, given those before it.

    In nats: temperature 1, no penalty, no cut. The tensors lie in the memory of the CPU.
    """

    logprobs: Float[Tensor, " T"]
    top_tokens: Int[Tensor, "T K"]
    """The likeliest tokens in the place of each, the likeliest first."""
    top_logprobs: Float[Tensor, "T K"]


@dataclass(frozen=True)
class DraftedPass:
    """A pass through the model that read drafts of an answer."""

    num_drafts: int
    num_accepted: int
    """So many of the first ones were accepted; one more token follows them."""


@dataclass
class Answer:
    """One sample of a request, as far as it goes."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    """Empty if the engine has no tokenizer."""
    forced: list[bool] = field(default_factory=list)
    """Whether the model was not asked about a token; such tokens are not actions of a policy."""
    logprobs: list[float] = field(default_factory=list)
    """Of each token in nats, under the distribution that it was drawn from; 0 if forced."""
    raw_logprobs: list[float] = field(default_factory=list)
    """Of each token in nats, under the model: temperature 1, no penalty, no cut."""
    top_logprobs: list[list[TokenScore]] = field(default_factory=list)
    """The likeliest tokens at each place, the likeliest first."""
    prompt_logprobs: PromptLogprobs | None = None
    """Of the prompt, if they were asked for; known with the first event."""
    versions: list[tuple[int, int]] = field(default_factory=list)
    """From which token on which version of the weights was used."""
    experts: Int[Tensor, "tokens layers K"] | None = None
    """Experts of prompt and answer without the last token, which no layer read; int16, -1 unknown.

    Known when the answer has ended.
    """
    passes: list[DraftedPass] = field(default_factory=list)
    """Of speculative decoding."""
    finish: Finish | None = None
    stop_reason: int | str | None = None
    """The stop string, or the token of the request's `stop_ids`, that ended the answer."""


@dataclass(frozen=True)
class Event:
    """One more token of an answer, or its end."""

    request: int
    sample: int
    token: int | None
    """None for the end of a canceled request, or of an answer without tokens."""
    text: str
    """What became readable with the token."""
    answer: Answer
    """The answer so far, with what else came in the same step; complete if it has a `finish`."""
    finish: Finish | None
    """Why the answer ended with this event; None if it continues."""
    place: int
    """Which token of the answer this is, counted from 0."""
