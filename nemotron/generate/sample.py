"""One answer while it is written: its tokens, its text, and when it must end."""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.data.tokenizer import Tokenizer
from nemotron.generate.budget import Reasoning
from nemotron.generate.prefixes import Prefix
from nemotron.generate.prompt_scores import PromptScores
from nemotron.generate.request import Answer, Begun, Event, Finish, Request, TokenScore
from nemotron.generate.sampling import streams
from nemotron.generate.text import StopStrings, TextStream


@dataclass(frozen=True)
class Selected:
    """The next token of a sample; the log-probabilities are 0 unless they were asked for."""

    token: int
    is_forced: bool
    logprob: float = 0.0
    """Under the distribution that it was drawn from; 0 if forced."""
    raw_logprob: float = 0.0
    """Under the model."""
    top: Sequence[TokenScore] = ()
    """The likeliest tokens, if they were asked for."""


@dataclass(eq=False)
class Sample:
    """Sample `number` of a request; lives from its submission to its last event."""

    request_id: int
    number: int
    order: int
    """Place among all samples in the order of their arrival; older ones go first."""
    request: Request
    seed: int
    stop_ids: frozenset[int]
    tokenizer: Tokenizer | None
    slot: int | None = None
    """Its place in the cache; None while it waits."""
    prefix: Prefix | None = None
    """A state that it can begin with."""
    prompt_scores: PromptScores | None = None
    """Those of the request, if the log-probabilities of its prompt are wanted."""
    followers: list["Sample"] = field(default_factory=list)
    """Samples of the same request that begin with the state after the prompt."""

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        self.answer = Answer()
        self.forced = deque(self.request.forced)
        self.logits: Float[Tensor, " V"] | None = None
        """Of the next token, where no pass through the model is needed for them."""
        self._experts: list[Int[Tensor, "tokens layers K"]] = []
        self._uniforms, self._draft_uniforms, self._test_uniforms = streams(self.seed, 3)
        self._stream = (
            None
            if self.tokenizer is None
            else TextStream(
                self.tokenizer,
                self.request.prompt,
                skip_specials=self.request.skip_special_tokens,
            )
        )
        self._stops = StopStrings(
            self.request.stop, included=self.request.include_stop_str_in_output
        )
        grammar = self.request.grammar
        self.guide = None if grammar is None else grammar.begin()
        self._reasoning = None
        if self.request.budget is not None:
            self._reasoning = Reasoning(self.request.budget)
            self.forced.extend(self._reasoning.begin())
        if self.request.begun is not None:
            self._go_on_after(self.request.begun)

    def _go_on_after(self, begun: Begun) -> None:
        """Be where the answer was after these tokens."""
        version_at = dict(begun.versions)
        version = 0
        for place, token in enumerate(begun.tokens):
            version = version_at.get(place, version)
            is_forced = begun.forced[place]
            if is_forced:
                self.take_forced()
            self.push(Selected(token, is_forced, begun.logprobs[place]), version)
        assert self.answer.finish is None, "an answer that has ended does not go on"

    @property
    def barred(self) -> Collection[int]:
        """Tokens that may not come next, because they would end the answer too early."""
        return self.stop_ids if len(self.answer.tokens) < self.request.min_tokens else ()

    @property
    def reads_all(self) -> bool:
        """Whether it must read its text from the beginning, whatever states are stored."""
        return self.prompt_scores is not None and not self.prompt_scores.is_complete

    @property
    def uniform(self) -> float:
        """The random number for the next token; it depends only on the seed and the place."""
        return self._uniforms[len(self.answer.tokens)]

    @property
    def test_uniform(self) -> float:
        """The random number that decides whether a draft of the next token is accepted."""
        return self._test_uniforms[len(self.answer.tokens)]

    def draft_uniform(self, ahead: int) -> float:
        """Return the random number for the draft of the token `ahead` places after the next."""
        return self._draft_uniforms[len(self.answer.tokens) + ahead]

    def take_forced(self) -> int | None:
        """Return the next token if it is not free."""
        return self.forced.popleft() if self.forced else None

    def begin_with(self, prefix: Prefix) -> None:
        """Take over what is known of the beginning of the text."""
        self.logits = prefix.logits
        if self.request.experts and prefix.experts is not None:
            self.add_experts(prefix.experts, 0)

    def add_experts(self, experts: Int[Tensor, "tokens layers K"], first: int) -> None:
        """Record the experts of tokens from the `first` on, but for those that were read before.

        What is computed again after a preemption may choose others by a rounding.
        """
        known = sum(map(len, self._experts))
        if (new := experts[known - first :]).shape[0]:
            self._experts.append(new)

    @property
    def experts(self) -> Int[Tensor, "tokens layers K"] | None:
        """What the routers chose so far; None where it is not recorded."""
        return torch.cat(self._experts) if self._experts else None

    def push(self, selected: Selected, version: int) -> Event:
        """Append a token to the answer."""
        answer, token = self.answer, selected.token
        if not answer.versions or answer.versions[-1][1] != version:
            answer.versions.append((len(answer.tokens), version))
        self.tokens.append(token)
        answer.tokens.append(token)
        answer.forced.append(selected.is_forced)
        if self.request.logprobs:
            answer.logprobs.append(selected.logprob)
            answer.raw_logprobs.append(selected.raw_logprob)
            answer.top_logprobs.append(list(selected.top))
        if self._reasoning is not None:
            self.forced.extend(self._reasoning.push(token))
        is_stop = self._may_end and token in self.stop_ids
        text = ""
        if self._stream is not None:
            is_shown = not is_stop or self.request.include_stop_str_in_output
            text = self._push_text(self._stream.push(token)) if is_shown else ""
        finish: Finish | None = None
        if is_stop or self._stops.found is not None:
            finish = "stop"
            own = token if token in self.request.stop_ids else None
            answer.stop_reason = own if is_stop else self._stops.found
        elif len(answer.tokens) == self.request.max_tokens:
            finish = "length"
        if self.guide is not None and not self.guide.push(token):
            finish = "length"
        return self._event(token, text, finish)

    def end(self) -> Event:
        """End an answer of no tokens, once the prompt is read."""
        return self._event(None, "", "length")

    def cancel(self) -> Event:
        """End the answer where it is."""
        return self._event(None, "", "abort")

    @property
    def _may_end(self) -> bool:
        """Whether the newest token may end the answer."""
        return len(self.answer.tokens) > self.request.min_tokens

    def _push_text(self, text: str) -> str:
        return self._stops.push(text) if self._may_end else self._stops.pass_over(text)

    def _event(self, token: int | None, text: str, finish: Finish | None) -> Event:
        if self.prompt_scores is not None and self.prompt_scores.is_complete:
            self.answer.prompt_logprobs = self.prompt_scores.result
        if finish is not None:
            if self._stream is not None:
                text += self._push_text(self._stream.close()) + self._stops.close()
            self.answer.finish = finish
        self.answer.text += text
        place = len(self.answer.tokens) - (token is not None)
        return Event(self.request_id, self.number, token, text, self.answer, finish, place)
