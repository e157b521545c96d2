"""Answers in OpenAI's form: whole, or as the chunks of a stream."""

import json
import secrets
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemotron.data.chat.calls import Call
from nemotron.data.tokenizer import Tokenizer
from nemotron.generate.text import REPLACEMENT
from nemotron.serve.echo import Echo
from nemotron.serve.errors import ApiError
from nemotron.serve.scored import Scored
from nemotron.serve.split import Delta, Splitter
from nemotron.serve.worker import Piece

Json = dict[str, Any]  # Any: JSON


@dataclass
class Written:
    """What one choice holds so far."""

    text: str = ""
    reasoning: str = ""
    calls: list[Json] = field(default_factory=list)
    tokens: list[Scored] = field(default_factory=list)
    """Where log-probabilities were asked for."""
    is_begun: bool = False
    """Whether a piece of it has come."""
    finish: str | None = None
    stop_reason: int | str | None = None
    """The stop string or token of the request that ended it; an addition of vLLM."""

    @property
    def end(self) -> Json:
        """Why it ended, in the form of a choice; empty of reasons before."""
        return {"finish_reason": self.finish, "stop_reason": self.stop_reason}


@dataclass
class Usage:
    """Tokens of a request."""

    prompt: int
    generated: int = 0
    reasoning: int = 0
    drafts: int = 0
    """Tokens that were guessed (speculative decoding)."""
    accepted: int = 0

    def push(self, piece: Piece, *, reasons: bool = False) -> None:
        """Count a piece of an answer, which may belong to the reasoning."""
        self.reasoning += piece.token is not None and reasons
        self.generated += piece.token is not None
        self.drafts += piece.num_drafts
        self.accepted += piece.num_accepted

    def body(self) -> Json:
        """Return them in OpenAI's form."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt + self.generated,
            "completion_tokens_details": {
                "reasoning_tokens": self.reasoning,
                "accepted_prediction_tokens": self.accepted,
                "rejected_prediction_tokens": self.drafts - self.accepted,
            },
        }


def take(splitter: Splitter, marks: dict[int, str], piece: Piece) -> Delta:
    """Return what a piece adds to an answer in the chat format."""
    # special tokens are not decoded as text, but these belong to the format
    mark = "" if piece.token is None else marks.get(piece.token, "")
    delta = splitter.push(piece.text + mark)
    if piece.finish is None:
        return delta
    rest = splitter.close()
    return Delta(
        delta.reasoning + rest.reasoning, delta.content + rest.content, delta.calls + rest.calls
    )


class Completion:
    """The answer to a request for completions."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"
    closing = b"data: [DONE]\n\n"
    """What ends a stream."""

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        usage: Usage,
        samples: int,
        *,
        logprobs: bool,
        stop_token_ids: Collection[int] = (),
        echoes: Sequence[Echo] = (),
    ) -> None:
        """`stop_token_ids` are those that the request names; `echoes` lead the answers."""
        self.id, self.created = f"{self.prefix}-{secrets.token_hex(12)}", int(time.time())
        self.model, self.usage = model, usage
        self._tokenizer, self._samples, self._logprobs = tokenizer, samples, logprobs
        self._stop_token_ids, self._echoes = frozenset(stop_token_ids), echoes
        self._texts: dict[int, str] = {}
        self._choices: dict[int, Written] = {}

    def begin(self, count: int) -> list[Json]:
        """Return what a stream of so many choices begins with."""
        self._choices = {index: Written() for index in range(count)}
        return []

    def push(self, piece: Piece) -> list[Json]:
        """Take a piece of an answer; return the chunks that it makes, if any."""
        index = piece.prompt * self._samples + piece.sample
        choice = self._choices[index]
        self.usage.push(piece)
        text, own = "", []
        if self._echoes and not choice.is_begun:
            echo = self._echoes[piece.prompt]
            text, own = echo.text, echo.scored(piece.prompt_logprobs)
        choice.is_begun = True
        own += self._token_scores(piece, len(choice.text) + len(text))
        text += piece.text
        choice.text += text
        choice.tokens += own
        choice.finish, choice.stop_reason = piece.finish, self._stop_reason(piece)
        if not (text or own or piece.finish):
            return []
        return [self._chunk(self._text_choice(index, text, own, choice.end))]

    def whole(self) -> Json:
        """Return the whole answer."""
        choices = [
            self._text_choice(index, choice.text, choice.tokens, choice.end)
            for index, choice in self._choices.items()
        ]
        return {**self._frame(self.kind), "choices": choices, "usage": self.usage.body()}

    def sent(self, chunk: Json) -> bytes:
        """Return a chunk as a server-sent event."""
        return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"

    def failure(self, error: ApiError) -> Json:
        """Return the chunk that says why no more of an answer comes."""
        return error.body()

    def usage_chunk(self) -> Json:
        """Return the last chunk of a stream that counts tokens."""
        return {**self._frame(self.chunk_kind), "choices": [], "usage": self.usage.body()}

    def _stop_reason(self, piece: Piece) -> int | str | None:
        """Return the stop string, or the token if the request names it."""
        reason = piece.stop_reason
        return reason if isinstance(reason, str) or reason in self._stop_token_ids else None

    def _token_scores(self, piece: Piece, begin: int) -> list[Scored]:
        if not self._logprobs or piece.token is None or piece.logprob is None:
            return []
        return [Scored(piece.token, piece.logprob, begin, piece.top)]

    def _text_choice(self, index: int, text: str, tokens: list[Scored], end: Json) -> Json:
        logprobs = None
        if self._logprobs:
            logprobs = {
                "tokens": [self._text_of(scored.token) for scored in tokens],
                "token_logprobs": [scored.logprob for scored in tokens],
                "top_logprobs": [self._by_text(scored) for scored in tokens],
                "text_offset": [scored.begin for scored in tokens],
            }
        return {"index": index, "text": text, "logprobs": logprobs, **end}

    def _by_text(self, scored: Scored) -> Json | None:
        """Return the likeliest tokens and the own one; of several with one text, the likeliest."""
        if scored.logprob is None:
            return None
        likeliest = {score.token: score.logprob for score in scored.top}
        likeliest.setdefault(scored.token, scored.logprob)
        found = {self._text_of(token): value for token, value in reversed(likeliest.items())}
        return dict(reversed(found.items()))

    def _text_of(self, token: int) -> str:
        """Return the text of a token alone, which a long prompt asks for again and again."""
        if token not in self._texts:
            self._texts[token] = self._tokenizer.decode([token])
        return self._texts[token]

    def _frame(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, choice: Json) -> Json:
        return {**self._frame(self.chunk_kind), "choices": [choice]}


class Chat(Completion):
    """The answer to a conversation; its texts pass through a `Splitter` for each choice."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        usage: Usage,
        splitters: list[Splitter],
        marks: dict[int, str],
        *,
        logprobs: bool,
        stop_token_ids: Collection[int] = (),
    ) -> None:
        super().__init__(
            *(model, tokenizer, usage, len(splitters)),
            logprobs=logprobs,
            stop_token_ids=stop_token_ids,
        )
        self._splitters, self._marks = splitters, marks

    def begin(self, count: int) -> list[Json]:
        super().begin(count)
        first = {"role": "assistant", "content": ""}
        return [
            self._chunk(self._delta(index, first, [], choice.end))
            for index, choice in self._choices.items()
        ]

    def push(self, piece: Piece) -> list[Json]:
        index, splitter = piece.sample, self._splitters[piece.sample]
        choice = self._choices[index]
        self.usage.push(piece, reasons=splitter.is_reasoning)
        delta = take(splitter, self._marks, piece)
        own = self._token_scores(piece, len(choice.text))
        choice.tokens += own
        texts = {"reasoning_content": delta.reasoning, "content": delta.content}
        new: Json = {key: text for key, text in texts.items() if text}
        calls = [_call_body(call) for call in delta.calls]
        if calls:
            numbered = enumerate(calls, len(choice.calls))
            new["tool_calls"] = [{"index": number, **call} for number, call in numbered]
        choice.calls += calls
        choice.reasoning += new.get("reasoning_content", "")
        choice.text += new.get("content", "")
        choice.stop_reason = self._stop_reason(piece)
        if piece.finish is not None:
            is_call = piece.finish == "stop" and choice.calls
            choice.finish = "tool_calls" if is_call else piece.finish
        if not (new or own or choice.finish):
            return []
        return [self._chunk(self._delta(index, new, own, choice.end))]

    def whole(self) -> Json:
        choices = [
            {
                "index": index,
                "message": _message(choice),
                "logprobs": self._scores(choice.tokens),
                **choice.end,
            }
            for index, choice in self._choices.items()
        ]
        return {**self._frame(self.kind), "choices": choices, "usage": self.usage.body()}

    def _delta(self, index: int, delta: Json, tokens: list[Scored], end: Json) -> Json:
        scores = self._scores(tokens) if tokens else None
        return {"index": index, "delta": delta, "logprobs": scores, **end}

    def _scores(self, tokens: list[Scored]) -> Json | None:
        if not self._logprobs:
            return None
        content = []
        for scored in tokens:
            others = [self._score(other.token, other.logprob) for other in scored.top]
            assert scored.logprob is not None, "a chat does not repeat its prompt"
            own = self._score(scored.token, scored.logprob)
            content.append({**own, "top_logprobs": others})
        return {"content": content, "refusal": None}

    def _score(self, token: int, logprob: float) -> Json:
        text = self._text_of(token)
        is_whole = REPLACEMENT not in text
        return {
            "token": text,
            "logprob": logprob,
            "bytes": list(text.encode()) if is_whole else None,
        }


def _message(choice: Written) -> Json:
    message: Json = {"role": "assistant", "content": choice.text, "refusal": None}
    if choice.reasoning:
        message["reasoning_content"] = choice.reasoning
    if choice.calls:
        message |= {"content": choice.text or None, "tool_calls": choice.calls}
    return message


def _call_body(call: Call) -> Json:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    identity = f"call_{secrets.token_hex(12)}"
    function = {"name": call.name, "arguments": arguments}
    return {"id": identity, "type": "function", "function": function}
