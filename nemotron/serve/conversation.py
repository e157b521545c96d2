"""How a model takes conversations: its template, its marks, and the tokens that end a turn."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from jinja2 import TemplateError

from nemotron.data.chat.check import Message, check_prompt
from nemotron.data.chat.foreign import ForeignTemplate
from nemotron.data.chat.render import Effort, render
from nemotron.data.chat.template import TEMPLATE, TURN_END
from nemotron.data.tokenizer import Tokenizer
from nemotron.errors import UserError
from nemotron.serve.split import THINK, marks_of


@dataclass(frozen=True)
class Turn:
    """How an answer is asked for."""

    thinks: bool = True
    keeps_history: bool = False
    """Whether reasoning from before the last user message stays in the prompt."""
    effort: Effort | None = None
    stated_budget: int | None = None
    is_opened: bool = True
    """Whether the prompt ends with the beginning of the answer."""


@dataclass(frozen=True)
class ChatPrompt:
    """The tokens of a conversation, up to the answer."""

    tokens: tuple[int, ...]
    thinks: bool
    """Whether the answer begins inside the reasoning."""


@dataclass(frozen=True)
class ChatFormat:
    """What the conversations of one model look like."""

    tokenizer: Tokenizer
    template: ForeignTemplate | None = None
    """None for our own."""
    more_stop_ids: frozenset[int] = frozenset()
    """Tokens that end a turn beside `<|im_end|>`, if there is such a token."""
    marks: dict[int, str] = field(default_factory=dict)
    """Special tokens that the text of an answer leaves out, with their names."""

    @classmethod
    def of(
        cls, tokenizer: Tokenizer, template: str | None, stop_ids: frozenset[int] = frozenset()
    ) -> "ChatFormat | None":
        """Return the format of a model; None if its tokenizer and files know no conversations."""
        if template is None and _turn_end(tokenizer) is None:
            return None
        foreign = None if template in (None, TEMPLATE) else ForeignTemplate(str(template))
        return cls(tokenizer, foreign, stop_ids, marks_of(tokenizer))

    @property
    def template_text(self) -> str:
        """The text of the chat template."""
        return TEMPLATE if self.template is None else self.template.source

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a turn."""
        end = _turn_end(self.tokenizer)
        return self.more_stop_ids | (frozenset() if end is None else {end})

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Message] | None, turn: Turn
    ) -> ChatPrompt:
        """Return the tokens after which the model answers.

        Raises:
            ValueError: when the conversation is none, or the model's template refuses it.
        """
        messages = [_known_role(message) for message in messages]
        check_prompt(messages, list(tools) if tools else None)
        try:
            text = render(
                messages,
                tools or None,
                enable_thinking=turn.thinks,
                truncate_history_thinking=not turn.keeps_history,
                budget=turn.stated_budget,
                effort=turn.effort,
                add_generation_prompt=turn.is_opened,
                template=self.template,
            ).text
        except (TemplateError, TypeError, AssertionError) as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from None
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("messages hold half a letter; give UTF-8 text.") from None
        tokens = self.tokenizer.encode(text, specials=True)
        return ChatPrompt(tuple(tokens), text.rstrip().endswith(THINK))


def _known_role(message: Message) -> Message:
    """Return a message with OpenAI's newer name of the role system as that role."""
    is_developer = isinstance(message, dict) and message.get("role") == "developer"
    return {**message, "role": "system"} if is_developer else message


def _turn_end(tokenizer: Tokenizer) -> int | None:
    try:
        return tokenizer.id(TURN_END)
    except UserError:
        return None
