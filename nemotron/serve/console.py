"""What `nemotron chat` does once the model is loaded: a conversation in the terminal."""

import contextlib
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemotron.data.chat.calls import Call
from nemotron.errors import UserError
from nemotron.exit_codes import DONE
from nemotron.generate.budget import ReasoningBudget
from nemotron.generate.engine import Engine
from nemotron.generate.request import Request
from nemotron.generate.sampling import Sampling
from nemotron.serve.conversation import ChatFormat, Turn
from nemotron.serve.split import Delta, Splitter
from nemotron.terminal import printable

HELP = "Enter sends; /new begins again, /quit or Ctrl-D ends, Ctrl-C stops an answer."
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
MAX_TURNS = 8
"""Answers to one message; the calls of the last one are not run."""

Message = dict[str, Any]  # Any: JSON


@dataclass(frozen=True)
class Tools:
    """Tools that a model may call, and what runs them."""

    specifications: Sequence[Message] = ()
    """In OpenAI's Responses format."""
    run: Callable[[str, Mapping[str, Any]], str] = lambda name, arguments: ""
    """Takes the name and the arguments of a call, and returns what the model reads."""


@dataclass(frozen=True)
class Manner:
    """How every answer of a conversation is written."""

    sampling: Sampling
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    system: str = ""
    thinks: bool = True
    budget: ReasoningBudget | None = None
    tools: Tools = Tools()


@dataclass(frozen=True)
class Said:
    """What a tool said to a call."""

    call: Call
    text: str


class Conversation:
    """The messages so far; an answer that was stopped stays as far as it came."""

    def __init__(self, engine: Engine, chat: ChatFormat, manner: Manner, length: int) -> None:
        self._engine, self._chat, self._manner, self._length = engine, chat, manner, length
        self.messages: list[Message] = []
        self.begin()

    def begin(self) -> None:
        """Forget all but the system message."""
        system = self._manner.system
        self.messages = [{"role": "system", "content": system}] if system else []

    def ask(self, text: str, show: Callable[[Delta | Said], None]) -> None:
        """Send a message, run the tools that are called, and `show` all that is said as it comes.

        Raises:
            UserError: when the message is impossible or the conversation too long; it is then as
                before.
        """
        messages: list[Message] = [*self.messages, {"role": "user", "content": text}]
        for turn in range(MAX_TURNS):
            answer, calls = self._answer(messages, show)
            messages.append(answer)
            if not calls or turn == MAX_TURNS - 1:
                break
            answer["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in calls
            ]
            for call in calls:
                said = self._manner.tools.run(call.name, call.arguments)
                messages.append({"role": "tool", "content": said})
                show(Said(call, said))
        self.messages = messages

    def _answer(
        self, messages: list[Message], show: Callable[[Delta | Said], None]
    ) -> tuple[Message, tuple[Call, ...]]:
        """Return the model's next message and the calls in it."""
        request, thinks = self._request(messages)
        answer = {"role": "assistant", "content": "", "reasoning_content": ""}
        splitter = Splitter(self._manner.tools.specifications, thinks=thinks)
        calls: tuple[Call, ...] = ()
        # Ctrl-C ends the answer, and the engine cancels its request
        with contextlib.suppress(KeyboardInterrupt):
            for event in self._engine.run([request]):
                mark = "" if event.token is None else self._chat.marks.get(event.token, "")
                deltas = [splitter.push(event.text + mark)]
                if event.finish:
                    deltas.append(splitter.close())
                for delta in deltas:
                    answer["reasoning_content"] += delta.reasoning
                    answer["content"] += delta.content
                    calls += delta.calls
                    show(delta)
        if not self._engine.is_idle:
            self._engine.step()
        return answer, calls

    def _request(self, messages: list[Message]) -> tuple[Request, bool]:
        manner = self._manner
        tools = manner.tools.specifications or None
        try:
            prompt = self._chat.prompt(messages, tools, Turn(manner.thinks))
        except ValueError as error:
            raise UserError(str(error)) from None
        room = self._length - len(prompt.tokens)
        if room < 1:
            raise UserError(
                f"the conversation has {len(prompt.tokens)} tokens, the model takes "
                f"{self._length}; /new begins again."
            )
        request = Request(
            prompt.tokens,
            min(manner.max_new_tokens, room),
            manner.sampling,
            stop_ids=self._chat.stop_ids,
            stop=manner.stop,
            budget=manner.budget if prompt.thinks else None,
        )
        return request, prompt.thinks


def chat(conversation: Conversation) -> int:
    """Hold the conversation until the input ends; return the exit code."""
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # history and editing of `input`
        print(HELP)
    while (text := _next_line("> " if is_terminal else "")) is not None:
        command = text.strip()
        if command == "/quit":
            break
        if command == "/new":
            conversation.begin()
        elif command.startswith("/"):
            print(HELP)
        elif command:
            _answer(conversation, text)
    return DONE


def _answer(conversation: Conversation, text: str) -> None:
    shown = _Shown(colors=sys.stdout.isatty())
    try:
        conversation.ask(text, shown.add)
    except UserError as error:
        print(printable(str(error)))
    else:
        shown.end()


class _Shown:
    """Prints an answer, its reasoning dimmed or between tags."""

    def __init__(self, *, colors: bool) -> None:
        self._begin, self._end = (DIM, PLAIN + "\n\n") if colors else ("<think>\n", "\n</think>\n")
        self._reasons = self._has_text = False

    def add(self, delta: Delta | Said) -> None:
        if isinstance(delta, Said):
            self._add_call(delta)
            return
        text = ""
        if delta.reasoning:
            text += ("" if self._reasons else self._begin) + printable(delta.reasoning)
            self._reasons = True
        if delta.content:
            text += self._close() + printable(delta.content)
            self._has_text = True
        print(text, end="", flush=True)

    def end(self) -> None:
        print(self._close(), flush=True)

    def _add_call(self, said: Said) -> None:
        """Print a call and what the tool said, on a line of its own."""
        given = ", ".join(
            f"{name}={json.dumps(value, ensure_ascii=False)}"
            for name, value in said.call.arguments.items()
        )
        line = printable(f"{said.call.name}({given}) = {said.text}")
        start = self._close() or ("\n" if self._has_text else "")
        print(f"{start}{line}", flush=True)
        self._has_text = False

    def _close(self) -> str:
        closing, self._reasons = self._end if self._reasons else "", False
        return closing


def _next_line(prompt: str) -> str | None:
    """Return what the user types; None at the end. Ctrl-C drops the line."""
    while True:
        try:
            return input(prompt)
        except EOFError:
            return None
        except KeyboardInterrupt:
            if not prompt:
                raise
            print()
