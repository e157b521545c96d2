"""Conversations in which a model may call tools, many of them at a time.

The tokens of a conversation are never written anew from its text: the model goes on from the very
tokens that it sampled, and what tools say is appended to them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nemotron.data.chat.calls import Call, read_calls
from nemotron.generate.request import Answer, Begun
from nemotron.generate.sampling import Sampling
from nemotron.posttrain.answering import Answerer, Asked
from nemotron.posttrain.environments.base import Response, Row, params_of
from nemotron.posttrain.prompts import Prompts
from nemotron.posttrain.transcript import Transcript
from nemotron.posttrain.verify import Beginning, Called, ToolCalls, Verifiers

MAX_TURNS = 16
"""Answers of the model in one conversation, unless another number is given."""
STRIDE = 1 << 32
"""What is added to the seed from one turn to the next: more than any number of samples."""


@dataclass(frozen=True)
class Limits:
    """How long a conversation may become, and what is asked of its answers."""

    max_turns: int = MAX_TURNS
    """Answers of the model; the calls of the last one are run, but nobody reads what they say."""
    max_tokens: int | None = None
    """Tokens of prompt, answers and what tools said together; absent: no limit."""
    timeout_s: float = 30.0
    """Longest time for the calls of one turn."""
    experts: bool = False
    """Whether the experts of each token are recorded."""


@dataclass
class Conversation:
    """A conversation as far as it goes."""

    row: Row
    sampling: Sampling
    tools: list[dict[str, Any]]
    transcript: Transcript
    limits: Limits
    state: Any = None  # Any: JSON, what the environment makes of it
    runs_tools: bool = False
    items: list[dict[str, Any]] = field(default_factory=list)
    """What was said and called, as items of OpenAI's Responses format."""
    turns: int = 0
    """Answers of the model so far."""
    num_calls: int = 0
    response: Response = field(default_factory=lambda: Response(""))
    fault: str | None = None
    """Why tools did not answer; such a conversation says nothing about the model."""
    is_over: bool = False
    begun: Begun | None = None
    """The answer that the model has not ended."""

    @classmethod
    def about(
        cls, row: Row, prompt: Sequence[int], sampling: Sampling, limits: Limits
    ) -> "Conversation":
        """Return one of which the model has not said anything."""
        tools = [dict(tool) for tool in params_of(row).get("tools") or []]
        return cls(row, sampling, tools, Transcript(tuple(prompt)), limits)

    def begin(self, beginning: Beginning) -> None:
        """Take the state in which the tools are."""
        self.state, self.runs_tools = beginning.state, beginning.has_tools
        self.fault = beginning.fault
        self.is_over = self.fault is not None

    @property
    def room(self) -> int | None:
        """Tokens that may still come; None without a limit."""
        limit = self.limits.max_tokens
        return None if limit is None else limit - len(self.transcript)

    @property
    def num_sampled(self) -> int:
        """Tokens of all answers so far."""
        return self.transcript.num_sampled + (len(self.begun.tokens) if self.begun else 0)

    def goes_on(self, until: int | None) -> bool:
        """Say whether the model has something to answer before it has `until` tokens."""
        return not self.is_over and (until is None or self.num_sampled < until)

    def take(self, answer: Answer, response: Response) -> ToolCalls | None:
        """Take an answer of the model; returns the calls that must be run for it to go on."""
        self.transcript.add_answer(answer)
        self.turns += 1
        self.response = response
        if not self.tools:
            self.is_over = True
            return None
        text, calls = read_calls(response.text, self.tools)
        self._note(text, response.reasoning, calls)
        self.num_calls += len(calls)
        self.response = replace(response, text=text, output=tuple(self.items))
        # without tools of its own, an environment judges the arguments alone
        if not calls or not self.runs_tools or response.is_truncated:
            self.is_over = True
            return None
        named = [{"name": call.name, "arguments": dict(call.arguments)} for call in calls]
        return ToolCalls(self.row, self.state, named)

    def hear(self, made: ToolCalls, called: Called, prompts: Prompts) -> None:
        """Take what the tools said to the newest calls, and go on unless a limit is reached."""
        if called.fault is not None:
            self.fault, self.is_over = called.fault, True
            return
        self.state = called.state
        ids = [item["call_id"] for item in self.items if item["type"] == "function_call"]
        self.items += [
            {"type": "function_call_output", "call_id": call_id, "output": said}
            for call_id, said in zip(ids[-len(called.said) :], called.said, strict=True)
        ]
        self.response = replace(self.response, output=tuple(self.items))
        said = [{"role": "tool", "content": each} for each in called.said]
        wanted = [{"type": "function", "function": call} for call in made.calls]
        turn = {"role": "assistant", "content": "", "tool_calls": wanted}
        more = prompts.go_on(turn, said, last=self.transcript.tokens[-1])
        if self.turns == self.limits.max_turns:
            self.is_over = True
        elif self.room is not None and self.room <= len(more):
            self.is_over = True
            self.response = replace(self.response, is_truncated=True)
        else:
            self.transcript.add_forced(more)

    def _note(self, text: str, reasoning: str, calls: Sequence[Call]) -> None:
        if reasoning:
            self.items.append({"type": "reasoning", "summary": [], "text": reasoning})
        if text or not calls:
            content = [{"type": "output_text", "text": text}]
            self.items.append({"type": "message", "content": content})
        self.items += [
            {
                "type": "function_call",
                "name": call.name,
                "arguments": json.dumps(dict(call.arguments)),
                "call_id": f"call_{self.turns - 1}_{place}",
            }
            for place, call in enumerate(calls)
        ]

    def next(self, until: int | None = None) -> Asked:
        """Return what the model is asked next, up to so many tokens of all its answers."""
        seed = self.sampling.seed
        seed = None if seed is None else (seed + self.turns * STRIDE) % 2**63
        return Asked(
            self.transcript.ids,
            replace(self.sampling, seed=seed),
            experts=self.limits.experts,
            room=self.room,
            begun=self.begun,
            pause_at=None if until is None else until - self.transcript.num_sampled,
        )


def converse(
    answerer: Answerer, verifiers: Verifiers, talks: Sequence[Conversation], samples: int
) -> None:
    """Let a model talk about each row, with its tools until it calls none of them.

    `samples` conversations about one row, with seeds that count on, stand side by side; its prompt
    is read once for all of them.
    """
    begin(verifiers, talks)
    go_on(answerer, verifiers, talks, samples)


def begin(verifiers: Verifiers, talks: Sequence[Conversation]) -> None:
    """Bring the tools into the states in which conversations begin."""
    timeout_s = talks[0].limits.timeout_s if talks else 0.0
    with_tools = [talk for talk in talks if talk.tools]
    beginnings = verifiers.begin([talk.row for talk in with_tools], timeout_s)
    for talk, beginning in zip(with_tools, beginnings, strict=True):
        talk.begin(beginning)


def go_on(
    answerer: Answerer,
    verifiers: Verifiers,
    talks: Sequence[Conversation],
    samples: int,
    until: int | None = None,
) -> None:
    """As `converse`, with conversations that have begun, until each has so many sampled tokens."""
    timeout_s = talks[0].limits.timeout_s if talks else 0.0
    if any(talk.num_sampled for talk in talks):
        open_ = [talk for talk in talks if talk.goes_on(until)]
        answers = answerer.answer([talk.next(until) for talk in open_])
        pairs = list(zip(open_, answers, strict=True))
    else:
        first = [replace(talk.next(until), num_samples=samples) for talk in talks[::samples]]
        answers = answerer.answer(first)
        pairs = [(t, a) for t, a in zip(talks, answers, strict=True) if not t.is_over]
    while pairs:
        waiting = []
        for talk, answer in pairs:
            talk.begun = None if answer.finish else Begun.of(answer)
            if talk.begun:
                continue
            is_truncated = answer.finish == "length"
            response = answerer.prompts.response(answer.tokens, is_truncated=is_truncated)
            if (calls := talk.take(answer, response)) is not None:
                waiting.append((talk, calls))
        found = verifiers.call([calls for _, calls in waiting], timeout_s)
        for (talk, made), called in zip(waiting, found, strict=True):
            talk.hear(made, called, answerer.prompts)
        open_ = [talk for talk, _ in waiting if talk.goes_on(until)]
        answers = answerer.answer([talk.next(until) for talk in open_])
        pairs = list(zip(open_, answers, strict=True))
