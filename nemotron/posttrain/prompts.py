"""How a task is put to a model, and what its answer says."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from nemotron.data.chat.check import check_tools
from nemotron.data.chat.foreign import ForeignTemplate
from nemotron.data.chat.render import render
from nemotron.data.tokenizer import Tokenizer
from nemotron.posttrain.environments.base import BadRow, Response

Messages = Sequence[dict[str, Any]]  # Any: chat messages as JSON


@dataclass(frozen=True)
class Prompts:
    """Writes prompts in the chat format, or as the text of their last message alone."""

    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    """Tokens that end an answer."""
    is_chat: bool
    enable_thinking: bool = True
    """Whether the chat format asks for reasoning."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer."""
    template: ForeignTemplate | None = None
    """The chat format of another model; None for our own."""

    def write(self, messages: Messages, tools: Messages = ()) -> tuple[int, ...]:
        """Return the tokens after which the model answers.

        Raises:
            BadRow: when the chat format cannot hold the conversation, or tools are no functions.
        """
        if not self.is_chat:
            return tuple(self.tokenizer.encode(str(messages[-1]["content"]), specials=False))
        try:
            check_tools(tools or None)
            return self._ids(messages, tools, is_answered=False)
        except (TemplateError, ValueError) as problem:
            raise BadRow(str(problem)) from None

    def go_on(self, turn: dict[str, Any], said: Messages, last: int) -> tuple[int, ...]:
        """Return the tokens between an answer and the next one: what tools said in between.

        `turn` is the answer as a message, and `last` its last token. The answer itself is not
        written again: a model may have written it otherwise than the chat format does.

        Raises:
            BadRow: when the chat format writes the answer otherwise once tools have spoken.
        """
        messages = [{"role": "user", "content": ""}, turn]
        before = self._ids(messages, (), is_answered=True)
        whole = self._ids([*messages, *said], (), is_answered=False)
        ends = [place for place, token in enumerate(before) if token in self.stop_ids]
        start = ends[-1] if ends else -1
        if start < 0 or whole[: start + 1] != before[: start + 1]:
            raise BadRow("the chat format changes an answer when tools speak after it")
        # an answer that ended otherwise is ended as the format does
        return whole[start + (last == before[start]) :]

    def _ids(self, messages: Messages, tools: Messages, *, is_answered: bool) -> tuple[int, ...]:
        text = render(
            messages,
            tools or None,
            enable_thinking=self.enable_thinking,
            add_generation_prompt=not is_answered,
            template=self.template,
        ).text
        return tuple(self.tokenizer.encode(text, specials=True))

    def response(self, answer: Sequence[int], *, is_truncated: bool) -> Response:
        """Return an answer's tokens as text; in the chat format without its reasoning."""
        while answer and answer[-1] in self.stop_ids:
            answer = answer[:-1]
        text = self.tokenizer.decode(answer)
        for stop in self.stop:
            text = text.removesuffix(stop)
        if not self.is_chat:
            return Response(text, is_truncated=is_truncated)
        reasoning, closed, after = text.rpartition("</think>")
        if not closed and self.enable_thinking:
            # the prompt ends inside the reasoning, which was never closed: there is no answer
            return Response("", reasoning=text.strip(), is_truncated=is_truncated)
        text = (after if closed else text).strip()
        return Response(
            text,
            reasoning=reasoning.removeprefix("<think>").strip(),
            output=({"type": "message", "content": [{"type": "output_text", "text": text}]},),
            is_truncated=is_truncated,
        )
