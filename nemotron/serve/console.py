"""What `nemotron chat` does once the model is loaded: a conversation in the terminal."""

import contextlib
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Manner:
    """How every answer of a conversation is written."""

    sampling: Sampling
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    system: str = ""
    thinks: bool = True
    budget: ReasoningBudget | None = None


class Conversation:
    """The messages so far; an answer that was stopped stays as far as it came."""

    def __init__(self, engine: Engine, chat: ChatFormat, manner: Manner, length: int) -> None:
        self._engine, self._chat, self._manner, self._length = engine, chat, manner, length
        self.messages: list[dict[str, str]] = []
        self.begin()

    def begin(self) -> None:
        """Forget all but the system message."""
        system = self._manner.system
        self.messages = [{"role": "system", "content": system}] if system else []

    def ask(self, text: str, show: Callable[[Delta], None]) -> None:
        """Send a message, and `show` the answer while it comes.

        Raises:
            UserError: when the message is impossible or the conversation too long; it is then as
                before.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        request, thinks = self._request(messages)
        answer = {"role": "assistant", "content": "", "reasoning_content": ""}
        splitter = Splitter((), thinks=thinks)
        # Ctrl-C ends the answer, and the engine cancels its request
        with contextlib.suppress(KeyboardInterrupt):
            for event in self._engine.run([request]):
                mark = "" if event.token is None else self._chat.marks.get(event.token, "")
                for delta in (
                    splitter.push(event.text + mark),
                    *([splitter.close()] * bool(event.finish)),
                ):
                    answer["reasoning_content"] += delta.reasoning
                    answer["content"] += delta.content
                    show(delta)
        if not self._engine.is_idle:
            self._engine.step()
        self.messages = [*messages, answer]

    def _request(self, messages: list[dict[str, str]]) -> tuple[Request, bool]:
        manner = self._manner
        try:
            prompt = self._chat.prompt(messages, None, Turn(manner.thinks))
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
        self._reasons = False

    def add(self, delta: Delta) -> None:
        text = ""
        if delta.reasoning:
            text += ("" if self._reasons else self._begin) + printable(delta.reasoning)
            self._reasons = True
        if delta.content:
            text += self._close() + printable(delta.content)
        print(text, end="", flush=True)

    def end(self) -> None:
        print(self._close(), flush=True)

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
